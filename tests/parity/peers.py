"""TRL's own loss methods over a tiny model, called on what they read of a trainer, and batches as its collators pad them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from tests.families import tiny_model
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from tunesmith.data.batching import Row


def fused_model(*, seed: int = 0) -> nn.Module:
    """A tiny Llama with the head that TRL's trainers give a model."""
    model = tiny_model("llama", seed=seed)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


def trainer(model: nn.Module, **settings: Any) -> SimpleNamespace:
    """What TRL's loss methods read of their trainer, on one process."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        is_main_process=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        unwrap_model=lambda x: x,
        autocast=nullcontext,
    )
    common = {
        "model": model,
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "is_encoder_decoder": False,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
    }
    return SimpleNamespace(**(common | settings))


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """input_ids, attention_mask and completion_mask, padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    names = ("input_ids", "attention_mask", "completion_mask")
    batch = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in names}
    for i, (ids, weights) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = torch.from_numpy(ids)
        batch["attention_mask"][i, : len(ids)] = 1
        batch["completion_mask"][i, : len(ids)] = torch.from_numpy(weights != 0)
    return batch


def sampled(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Prompts padded on the left and answers on the right, each with its mask."""
    prompts = [torch.from_numpy(ids[weights == 0]) for ids, weights in rows]
    answers = [torch.from_numpy(ids[weights != 0]) for ids, weights in rows]
    batch = {}
    for name, parts, left in (("prompt", prompts, True), ("completion", answers, False)):
        longest = max(map(len, parts))
        places = [slice(longest - len(part), longest) if left else slice(0, len(part)) for part in parts]
        ids, mask = torch.zeros(2, len(parts), longest, dtype=torch.long)
        for i, (part, place) in enumerate(zip(parts, places, strict=True)):
            ids[i, place], mask[i, place] = part, 1
        batch |= {f"{name}_ids": ids, f"{name}_mask": mask}
    return batch


def table(flat: Sequence[Any], width: int) -> Tensor:
    """Arrays of tokens as rows of a table, filled with 0."""
    made = torch.zeros(len(flat), width)
    for i, values in enumerate(flat):
        made[i, : len(values)] = torch.as_tensor(values)
    return made
