"""The stages that several processes are tried on, and what is compared of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.toys import make_items, make_prompts, make_rows, make_stage

from tunesmith.recipe import FullMethod, LoraMethod, Stage

PPO = {
    "objective": {"type": "ppo", "rewards": [{"type": "regex", "pattern": "[a-m]"}], "num_mini_batches": 2, "num_ppo_epochs": 1},
    "method": LoraMethod(r=4),
    "rollout": {"prompts_per_step": 5, "max_new_tokens": 6},
    "eval_steps": 5,
}
WORK: dict[str, tuple[dict[str, Any], Any]] = {
    # an update has four rows; the last of an epoch two, in one batch, which the other process repeats
    "sft": ({"method": LoraMethod(r=4)}, make_rows(10)),
    "full": ({"method": FullMethod()}, make_rows(10)),
    # of rows by which no weight moved by rounding alone: where a gradient is that, AdamW takes a step of the rate's size, whichever way
    "dpo": ({"objective": "dpo", "method": LoraMethod(r=4)}, make_items(9, seed=3)),
    "kto": ({"objective": "kto", "method": LoraMethod(r=4)}, make_items(9, answers=1)),
    "ppo": (PPO, make_prompts(7)),
}


def stage_for(kind: str, **settings: Any) -> Stage:
    """A stage of five updates, of which every second one leaves a checkpoint."""
    return make_stage(**({"max_steps": 5, "eval_steps": 2, "save_steps": 2} | WORK[kind][0] | settings))


def result(path: Path) -> dict[str, torch.Tensor]:
    """The weights that a run saved."""
    (file,) = (file for file in (path / "stages" / "sft" / "model").glob("*.safetensors") if file.name != "heads.safetensors")
    return load_file(file)


def furthest(path: Path, other: Path) -> float:
    """The largest difference between two runs' weights, which have the same names."""
    first, second = result(path), result(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)
