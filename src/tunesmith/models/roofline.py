"""The time of each phase as a roofline: its FLOPs and bytes against what this machine really does (Williams et al. 2009).

A phase takes the sum of its times; `bound_by` says which is the longest. Constants that no shape gives are named below; they are
estimates for a 135M Llama on CPU, and how far they are off is what plan.json's `compared` says of each run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..recipe import Stage
from . import kernels
from .costs import MethodCost
from .load import LoadedModel
from .machine import Machine
from .methods.targets import layer_size, linear_layers

PASSES_HIDDEN, PASSES_INNER = (
    100,
    40,
)  # times a token's hidden (inner) vector is read or written outside matrix products, one layer, one training step
FORWARD_SHARE = 0.35  # of those passes, what a forward alone takes
BESIDE = 1.15  # what training takes over the sum of its parts; 135M on two cores in fp32, LoRA 1.33 and full 1.07
# What a CPU takes in 16 bits over that, in training and in a forward pass: its speeds are measured on what lies in cache, and a product is
# as fast as that in one direction only. 135M with AMX: 1.4 (IA3) to 1.8 (full), up to 2.3 in slower hours, and 0.9 to 1.5; not measured
# without AMX.
TRAIN_IN_16_BITS, FORWARD_IN_16_BITS = 1.8, 1.6
# In their place where compiled loops do what lies between products (kernels/): training took 1.5 by turns in one process, 1.2 (GRPO's) to
# 2.8 by five stages on two threads; validation and a reference's sums 1.4 to 1.6 times what the second gave.
TRAIN_BY_LOOPS, FORWARD_BY_LOOPS = 2.0, 2.0
ATTENTION_IN_16_BITS = 0.33  # of the time of torch's kernel, which is measured
START_IN_16_BITS = 3.0  # seconds beside a start's passes, in which each product's kernel is made
# Over FORWARD_IN_16_BITS, where a model answers by transformers' own layers and not by loops; 1.2 on the quickstart's general text.
READING_IN_16_BITS = 1.3
TRAIN_CALLS, FORWARD_CALLS = 260, 80  # operations of one layer on one batch, with their backward or alone
# The same in 16 bits on a CPU, where each product packs its weights anew: by batches of 64 to 1024 tokens, 0.4 s of each and 0.12 s of a
# forward pass's do not depend on how many there are.
TRAIN_CALLS_IN_16_BITS, FORWARD_CALLS_IN_16_BITS = 800, 400
# Of one layer in one decoding step. In 16 bits with AMX a step of one row takes 2 ms a layer beside the weights that it reads: a thousand
# times the small call that is measured; by loops, what an evaluation of three candidates and GRPO's answers took.
DECODE_CALLS, DECODE_CALLS_IN_16_BITS, DECODE_CALLS_BY_LOOPS = 90, 1100, 850
FEW_QUERIES = 3.0  # times what attention's speed says: one query a row is small products, with scores and weights written out
# Of an update, over all that trains; 135M on two cores: 8-bit moments took 2.5 s in bf16 (in blocks) and 2.3 in fp32, Muon's products
# 3.4 and 3.6.
OPTIMISER_PASSES = {"adamw_torch_fused": 10, "adamw_8bit": 45, "paged_adamw_8bit": 45, "adafactor": 14, "muon": 70}
OPTIMISER_PASSES_BY_LOOPS = 7  # of AdamW over 16-bit weights, by such a loop
MASTER_BYTES = 4  # a trained number's, which each of those passes reads or writes, and a checkpoint holds beside its moments
RECOMPUTED: dict[bool | str, float] = {False: 0.0, "selective": 0.5, True: 1.0}  # share of the layers that checkpointing computes twice
ATTENTION_BACKWARD = 2.5  # times the forward's work


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
    dtype: torch.dtype
    cached: int
    """Numbers that one token leaves in the cache of keys and values, all layers together."""
    weights: int
    """Bytes that the weights are held in."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number that the model computes with."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Tokens:
    """What some batches hold."""

    computed: float
    """Tokens that go through the model, shared and learned ones once a batch."""
    supervised: float
    """Tokens that go through the head."""
    pairs: float = 0.0
    """Pairs of a token and one before it that attention looks at."""
    batches: float = 1.0

    def times(self, factor: float) -> Tokens:
        """So many times as much."""
        return Tokens(*(factor * value for value in (self.computed, self.supervised, self.pairs, self.batches)))


@dataclass(frozen=True)
class Phase:
    """One phase's prediction."""

    name: str
    seconds: float
    flops: float
    bytes: float
    bound_by: str


def model_shape(loaded: LoadedModel) -> Shape:
    """Counts a model's weights."""
    model = loaded.model
    config = model.config.get_text_config()
    sizes = (layer_size(layer) for layer in linear_layers(model).values())
    table = model.get_input_embeddings().weight
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        linear=sum(inputs * outputs for inputs, outputs in sizes),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=inner,
        vocabulary=table.shape[0],
        dtype=table.dtype,
        cached=2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_size,
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def train_phase(shape: Shape, machine: Machine, stage: Stage, cost: MethodCost, work: Tokens) -> Phase:
    """Forward, backward and update over all the batches of a stage."""
    again = RECOMPUTED[stage.gradient_checkpointing or False]
    tokens, heads = work.computed, 4 if cost.weight_gradients == 1 else 2
    passes = 1 + again + cost.depth + cost.weight_gradients
    flops = 2.0 * shape.linear * tokens * passes + 6.0 * cost.per_token * tokens
    flops += 2.0 * shape.vocabulary * shape.hidden * work.supervised * heads
    attention = 4.0 * shape.hidden * shape.layers * work.pairs * (1 + again + ATTENTION_BACKWARD * cost.depth)
    near = _elementwise(shape, tokens) * (1 - (1 - cost.depth) * (1 - FORWARD_SHARE) + again * FORWARD_SHARE)
    near += 2.0 * cost.saved_inputs * tokens * shape.itemsize + work.supervised * shape.vocabulary * 4 * 6
    near += cost.passed_in_16_bits * tokens * shape.itemsize if on_cpu_in_16_bits(shape) else 0.0
    moved = work.batches * shape.weights * (passes + cost.weight_passes)
    loops = _by_loops(shape)
    one_pass = loops and cost.whole and stage.optim == "adamw_torch_fused"
    moved += stage.max_steps * cost.trainable * MASTER_BYTES * (OPTIMISER_PASSES_BY_LOOPS if one_pass else OPTIMISER_PASSES[stage.optim])
    both, alone = (TRAIN_CALLS_IN_16_BITS, FORWARD_CALLS_IN_16_BITS) if on_cpu_in_16_bits(shape) else (TRAIN_CALLS, FORWARD_CALLS)
    calls = work.batches * shape.layers * ((1 + again) * alone + (both - alone) * cost.depth)
    found = _phase(f"train {stage.name}", _packed_attention(machine, shape), flops, attention, near, moved, calls)
    in_16_bits = TRAIN_BY_LOOPS if loops else TRAIN_IN_16_BITS
    return _slower(found, BESIDE * (in_16_bits if on_cpu_in_16_bits(shape) else 1.0))


def forward_phase(name: str, shape: Shape, machine: Machine, work: Tokens) -> Phase:
    """A forward pass as training makes it: validation, log-probabilities."""
    return _forward(name, shape, _packed_attention(machine, shape), work)


def _forward(name: str, shape: Shape, machine: Machine, work: Tokens) -> Phase:
    flops = 2.0 * shape.linear * work.computed + 2.0 * shape.vocabulary * shape.hidden * work.supervised
    attention = 4.0 * shape.hidden * shape.layers * work.pairs
    near = FORWARD_SHARE * _elementwise(shape, work.computed) + work.supervised * shape.vocabulary * 4 * 3
    calls = work.batches * shape.layers * (FORWARD_CALLS_IN_16_BITS if on_cpu_in_16_bits(shape) else FORWARD_CALLS)
    found = _phase(name, machine, flops, attention, near, work.batches * shape.weights, calls)
    in_16_bits = FORWARD_BY_LOOPS if _by_loops(shape) else FORWARD_IN_16_BITS
    return _slower(found, in_16_bits if on_cpu_in_16_bits(shape) else 1.0)


def start_phase(name: str, shape: Shape, machine: Machine, work: Tokens) -> Phase:
    """The passes before a stage's first update, by which it is checked."""
    found = forward_phase(name, shape, machine, work)
    return replace(found, seconds=found.seconds + START_IN_16_BITS) if on_cpu_in_16_bits(shape) else found


def reading_phase(name: str, shape: Shape, machine: Machine, work: Tokens) -> Phase:
    """A forward pass of a model that answers: over prompts, or over references, which it scores; by loops as in training, else with an
    attention of its own."""
    if _by_loops(shape):
        return forward_phase(name, shape, machine, work)
    return _slower(_forward(name, shape, machine, work), READING_IN_16_BITS if on_cpu_in_16_bits(shape) else 1.0)


def decode_phase(
    name: str, shape: Shape, machine: Machine, *, items: float, new_tokens: float, batch: int, context: float, longest: float | None = None
) -> Phase:
    """Decoding of `new_tokens` for each of `items` prompts of `context` tokens, `batch` at once: every step reads all weights.

    longest: tokens of a batch's longest answer, which is how many steps it takes; as many as the others have where None.
    """
    said = items * new_tokens
    flops = 2.0 * (shape.linear + shape.vocabulary * shape.hidden) * said
    attention = 4.0 * shape.hidden * shape.layers * said * (context + new_tokens / 2)
    near = said * (shape.vocabulary * 4 * 3 + FORWARD_SHARE * _elementwise(shape, 1))
    steps = (longest or new_tokens) * math.ceil(items / batch)
    in_16_bits = DECODE_CALLS_BY_LOOPS if _by_loops(shape) else DECODE_CALLS_IN_16_BITS
    calls = steps * shape.layers * (in_16_bits if on_cpu_in_16_bits(shape) else DECODE_CALLS)
    slower = replace(machine, attention_flops_per_second=machine.attention_flops_per_second / FEW_QUERIES)
    return _phase(name, slower, flops, attention, near, 0.0, calls, read=steps * shape.weights)


def storage_phase(name: str, machine: Machine, stored: float) -> Phase:
    """Bytes written for good."""
    return Phase(name, stored / machine.storage_bytes_per_second, 0.0, stored, "storage")


def together(name: str, phases: Sequence[Phase]) -> Phase:
    """Several phases as one, bound by what the longest is bound by."""
    longest = max(phases, key=lambda phase: phase.seconds)
    seconds, flops, moved = (sum(getattr(phase, what) for phase in phases) for what in ("seconds", "flops", "bytes"))
    return Phase(name, seconds, flops, moved, longest.bound_by)


def phase_json(phase: Phase) -> dict[str, Any]:
    """A phase for plan.json."""
    return asdict(phase)


def on_cpu_in_16_bits(shape: Shape) -> bool:
    """Whether a model's products are made in 16 bits by a processor."""
    return shape.itemsize == 2 and not torch.cuda.is_available()


def _by_loops(shape: Shape) -> bool:
    """Whether compiled loops do what lies between those products."""
    return shape.dtype == torch.bfloat16 and on_cpu_in_16_bits(shape) and kernels.unavailable() is None


def _slower(phase: Phase, factor: float) -> Phase:
    return replace(phase, seconds=factor * phase.seconds)


def _packed_attention(machine: Machine, shape: Shape) -> Machine:
    """The machine with the speed of our attention over a batch's rows in place of torch's kernel's."""
    faster = ATTENTION_IN_16_BITS if on_cpu_in_16_bits(shape) else 1.0
    return replace(machine, attention_flops_per_second=machine.attention_flops_per_second / faster)


def _elementwise(shape: Shape, tokens: float) -> float:
    return tokens * shape.layers * (PASSES_HIDDEN * shape.hidden + PASSES_INNER * shape.inner) * shape.itemsize


def _phase(
    name: str, machine: Machine, flops: float, attention: float, near: float, moved: float, calls: float, *, read: float = 0.0
) -> Phase:
    """near: bytes of elementwise work on activations; moved: bytes that no cache holds; calls: operations, each with its overhead.

    read: bytes of weights that few rows need.
    """
    compute = flops / machine.flops_per_second + attention / machine.attention_flops_per_second
    memory = near / machine.cached_bytes_per_second + moved / machine.bytes_per_second + read / machine.weight_bytes_per_second
    overhead = calls * machine.call_seconds
    bound = max((compute, "compute"), (memory, "memory bandwidth"), (overhead, "calls"))[1]
    return Phase(name, compute + memory + overhead, flops + attention, near + moved + read, bound)
