"""The plan: a roofline of each phase, its FLOPs and bytes against what this machine really does, and the peak of memory.

The machine is measured once (matrix products in the model's dtype, memory bandwidth) and kept in the cache. A phase takes the sum of its
two times; `bound_by` says which. Constants that no shape gives were fitted on a 135M Llama on CPU and are named below.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..recipe import WHOLE, Stage
from ..rundir import write_json
from .head import CHUNK_BYTES, CHUNKS_AT_ONCE
from .layout import backbone_of
from .load import LoadedModel, cache_folder

PASSES_HIDDEN, PASSES_INNER = (
    150,
    60,
)  # times a token's hidden (inner) vector is read or written outside matrix products, one layer, one training step
SAVED_HIDDEN, SAVED_INNER = 9, 3  # vectors of each width that the backward pass keeps, per token and layer
FORWARD_SHARE = 0.35  # of those passes, what a forward alone takes
STEP_OVERHEAD = 4e-4  # seconds a layer of one decoding step, whatever the batch
HEAD_CHUNKS = 4  # the head's logits of a chunk and what is made of them, each as large
PASSED_HIDDEN, PASSED_INNER = 9, 4  # vectors of each width that a forward pass without gradients holds at once, per token, in one layer
LOGIT_COPIES = 3  # fp32 logits and what is made of them, at once
SCATTERED = 1.5  # what the process holds for each byte in use while generating: freed blocks that nothing of their size has taken again
MOMENTS = {"adamw_torch_fused": 8, "muon": 4, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0}  # bytes that a rule keeps of a weight
LIBRARIES = 150 * 2**20  # bytes that libraries take once they really work


@dataclass(frozen=True)
class Machine:
    """What the machine does, measured: matrix products in FLOP/s, and bytes/s moved by elementwise work."""

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Shape:
    """What of a model decides its cost."""

    parameters: int
    linear: int
    """Weights of the backbone's linear layers."""
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    itemsize: int
    cached: int
    """Numbers that one token leaves in the cache of keys and values, all layers together."""


@dataclass(frozen=True)
class Phase:
    """One phase's prediction."""

    name: str
    seconds: float
    flops: float
    bytes: float
    bound_by: str


def measure_machine(dtype: torch.dtype) -> Machine:
    """The machine's speeds in this dtype and with the present threads; about half a second the first time, then from the cache."""
    name = f"{platform.processor() or platform.machine()}-{torch.__version__}-{torch.get_num_threads()}-{str(dtype).removeprefix('torch.')}"
    path = cache_folder() / "machine.json"
    known = _known_machines(path)
    if name not in known:
        known[name] = asdict(Machine(_matmul_rate(dtype), _bandwidth(dtype)))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    return Machine(**known[name])


def _known_machines(path: Path) -> dict[str, dict[str, float]]:
    """What was measured before; nothing where the note is torn."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _rate(work: float, run: Callable[[], Any]) -> float:
    """Work a second with all threads to itself: by processor time, so that other programs on the machine do not count."""
    run()
    best = 0.0
    for _ in range(5):
        began = time.process_time()
        for _ in range(4):
            run()
        best = max(best, 4 * work / max(time.process_time() - began, 1e-9))
    return best * torch.get_num_threads()


def _matmul_rate(dtype: torch.dtype) -> float:
    a, b = torch.randn(1024, 640).to(dtype), torch.randn(1536, 640).to(dtype)
    return _rate(2.0 * 1024 * 640 * 1536, lambda: nn.functional.linear(a, b))


def _bandwidth(dtype: torch.dtype) -> float:
    a = torch.randn(1 << 22).to(dtype)
    return _rate(3.0 * a.numel() * a.element_size(), lambda: a + a)


def model_shape(loaded: LoadedModel) -> Shape:
    """Counts a model's weights."""
    model = loaded.model
    backbone = backbone_of(model)
    config = model.config.get_text_config()
    linear = sum(
        m.weight.numel() for m in backbone.modules() if isinstance(getattr(m, "weight", None), nn.Parameter) and m.weight.dim() == 2
    )
    table = model.get_input_embeddings().weight
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        linear=linear - table.numel(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=inner,
        vocabulary=table.shape[0],
        itemsize=table.element_size(),
        cached=2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_size,
    )


def train_phase(shape: Shape, machine: Machine, stage: Stage, *, tokens: float, supervised: float) -> Phase:
    """Forward and backward over `tokens` computed tokens (shared ones once), `supervised` of which go through the head."""
    full = stage.method.type in WHOLE
    passes = (3 if full else 2) + (0.5 if stage.gradient_checkpointing == "selective" else float(stage.gradient_checkpointing))
    flops = 2.0 * shape.linear * tokens * passes + 2.0 * shape.vocabulary * shape.hidden * supervised * (4 if full else 2)
    moved = _elementwise(shape, tokens) + supervised * shape.vocabulary * 4 * 6
    if full:
        moved += stage.max_steps * shape.parameters * 40.0
    return _phase(f"train {stage.name}", machine, flops, moved)


def forward_phase(name: str, shape: Shape, machine: Machine, *, tokens: float, heads: float) -> Phase:
    """A forward pass over `tokens`, `heads` of which go through the head: validation, perplexity, prompts."""
    flops = 2.0 * shape.linear * tokens + 2.0 * shape.vocabulary * shape.hidden * heads
    return _phase(name, machine, flops, FORWARD_SHARE * _elementwise(shape, tokens) + heads * shape.vocabulary * 4 * 3)


def decode_phase(name: str, shape: Shape, machine: Machine, *, items: int, new_tokens: float, batch: int) -> Phase:
    """Greedy decoding of `new_tokens` for each of `items` prompts, `batch` at once: every step reads all weights."""
    steps = new_tokens * max(1.0, items / batch)
    flops = 2.0 * (shape.linear + shape.vocabulary * shape.hidden) * items * new_tokens
    moved = steps * shape.parameters * shape.itemsize + items * new_tokens * shape.vocabulary * 4 * 3
    phase = _phase(name, machine, flops, moved)
    overhead = steps * shape.layers * STEP_OVERHEAD
    return Phase(name, phase.seconds + overhead, flops, moved, phase.bound_by)


def _elementwise(shape: Shape, tokens: float) -> float:
    return tokens * shape.layers * (PASSES_HIDDEN * shape.hidden + PASSES_INNER * shape.inner) * shape.itemsize


def _phase(name: str, machine: Machine, flops: float, moved: float) -> Phase:
    compute, memory = flops / machine.flops_per_second, moved / machine.bytes_per_second
    return Phase(name, compute + memory, flops, moved, "compute" if compute >= memory else "memory bandwidth")


def train_memory(shape: Shape, stage: Stage, *, resident: int, batch_tokens: int, trainable: int) -> int:
    """Peak bytes of a stage: what is resident after loading, the trained state, and the largest batch's activations.

    batch_tokens: computed tokens of the largest batch. trainable: weights that train.
    """
    full = stage.method.type in WHOLE
    again = {False: 0, "selective": (shape.layers + 1) // 2, True: shape.layers}[stage.gradient_checkpointing]
    layers = min(shape.layers, shape.layers - again + 2)  # of those computed again, one in the backward pass and what it is made of
    saved = batch_tokens * layers * (SAVED_HIDDEN * shape.hidden + SAVED_INNER * shape.inner) * shape.itemsize
    kept = batch_tokens * again * shape.hidden * shape.itemsize
    wide = 0 if full else shape.linear // shape.layers * shape.itemsize
    head = HEAD_CHUNKS * CHUNK_BYTES
    if full:  # the logits' gradient of many chunks, in the model's dtype, and the head's own in fp32
        head += CHUNKS_AT_ONCE * CHUNK_BYTES * shape.itemsize // 4 + shape.vocabulary * shape.hidden * 4
    return int(resident + LIBRARIES + trainable * _state_bytes(shape, stage) + saved + kept + wide + head)


def _state_bytes(shape: Shape, stage: Stage) -> int:
    """Bytes that a trained weight takes beside what was resident: moments, 8 of AdamW; a bf16 weight's other half 2, its gradient 2, or 4
    where batches are added up; of a full fp32 model the gradient 4; of an adapter the weight itself besides."""
    if stage.method.type not in WHOLE:
        return 8 + MOMENTS[stage.optim]
    if shape.itemsize == 4:
        return 4 + MOMENTS[stage.optim]
    return (6 if stage.gradient_accumulation_steps > 1 else 4) + MOMENTS[stage.optim]


def evaluation_memory(
    shape: Shape,
    *,
    resident: int,
    items: int,
    batch_size: int,
    prompt_tokens: float,
    new_tokens: int,
    batch_tokens: int,
    logit_elements: int,
) -> int:
    """Peak bytes of answering and scoring `items` prompts: the cache of a batch, one pass over its prompts, its logits.

    resident: bytes held before it begins. prompt_tokens: of the longest prompt, without what all prompts begin with. new_tokens: of the
    longest answer. batch_tokens, logit_elements: the engine's limits (generate.engine's BATCH_TOKENS and LOGIT_ELEMENTS).
    """
    row = prompt_tokens + new_tokens
    rows = max(1, min(batch_size, items, int(batch_tokens // row)))
    cache = rows * row * shape.cached * shape.itemsize
    passed = rows * row * (PASSED_HIDDEN * shape.hidden + PASSED_INNER * shape.inner) * shape.itemsize
    logits = max(rows, min(rows * new_tokens, logit_elements // shape.vocabulary)) * shape.vocabulary * (4 * LOGIT_COPIES + shape.itemsize)
    return int(resident + LIBRARIES + SCATTERED * (cache + max(passed, logits)))


def available_memory() -> int:
    """Bytes this process may still take, the resident ones not counted; of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62
    for limit, used in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    return free


def phase_json(phase: Phase) -> dict[str, Any]:
    """A phase for plan.json."""
    return asdict(phase)
