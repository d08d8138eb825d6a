"""Method by capability: which cell a test shows, and why another has none. `docs/make_support.py` makes the page of it."""

from __future__ import annotations

from typing import Any

from tunesmith.models.methods import METHOD_KINDS
from tunesmith.recipe import WHOLE

METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "partial": {"type": "partial", "last_layers": 1},
    "lora": {"type": "lora", "r": 4},
    "dora": {"type": "lora", "r": 4, "use_dora": True},
    "pissa": {"type": "lora", "r": 4, "init_lora_weights": "pissa"},
    "qlora": {"type": "lora", "r": 4},
    "ia3": {"type": "ia3"},
    "houlsby": {"type": "bottleneck", "architecture": "houlsby", "bottleneck_size": 8},
    "pfeiffer": {"type": "bottleneck", "architecture": "pfeiffer", "bottleneck_size": 8},
    "parallel": {"type": "bottleneck", "architecture": "parallel", "bottleneck_size": 8},
    "prefix": {"type": "prefix", "num_virtual_tokens": 4},
    "prompt": {"type": "prompt", "num_virtual_tokens": 4},
    "p_tuning": {"type": "p_tuning", "num_virtual_tokens": 4},
}
"""A row each, with settings for a tiny Llama; `qlora` stands on a base of four bits."""
CAPABILITIES = {
    "fp32": "trains on a base in fp32",
    "bf16": "trains on a base in bf16",
    "fp16": "trains on a base in fp16, the loss scaled",
    "checkpointing": "activations recomputed: the same gradients",
    "packed": "rows packed together: each as if alone",
    "resume": "interrupted and resumed: bitwise the same weights",
    "merge": "merged weights give the live model's logits",
    "ddp": "two processes: the loss curve of one",
    "fsdp2": "two processes, the base's weights sharded: the loss curve of one",
    "zero3": "two processes, all weights sharded by DeepSpeed: the loss curve of one",
}


def reason(method: str, capability: str) -> str | None:
    """Why a cell is grey, or None where a test shows it."""
    kind = METHOD_KINDS[METHODS[method]["type"]]
    if capability == "merge" and METHODS[method]["type"] in WHOLE:
        return "the result is a whole model: there is nothing to merge"
    if capability == "merge":
        return "weights of a few bits cannot hold what was learned" if method == "qlora" else kind.mergeable
    if capability in ("fsdp2", "zero3") and method == "qlora":
        return "a quantised base is not sharded"
    return None


GREEN = [(method, capability) for method in METHODS for capability in CAPABILITIES if reason(method, capability) is None]


def test_name(method: str, capability: str) -> str:
    """The test behind a green cell."""
    return f"tests/support/test_support.py::test_works[{method}-{capability}]"
