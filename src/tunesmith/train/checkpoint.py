"""A stage's state at a step, on disk and back: safetensors and JSON only, complete or absent, checked on load.

stages/NAME/checkpoints/step-N/   state.safetensors (masters, moments, RNG), state.json (progress), manifest.json
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError, NonFinite
from ..rundir import RunDirectory
from .optimiser import FlatAdamW

STATE, TENSORS = "state.json", "state.safetensors"
RNG = "rng.cpu"


@dataclass
class Progress:
    """How far a stage has come."""

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    evaluated_step: int | None = None
    stopped_early: bool = False
    seconds: float = 0.0
    tokens: int = 0
    """Useful tokens so far: a shared token counts once per row that holds it."""
    saw_gradients: bool = False
    learned: bool = False
    """Whether an update with a positive rate was made."""


def save_checkpoint(run: RunDirectory, stage: str, progress: Progress, optimiser: FlatAdamW, fingerprint: str) -> Path:
    """Writes step-N; what is not finite is refused, so that the newest checkpoint is always usable. Raises NonFinite."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in optimiser.state().items()}
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise NonFinite(f"`{bad[0]}` is not finite", where=f"stage {stage}, step {progress.step}", mend="lower learning_rate")
    tensors[RNG] = torch.get_rng_state()
    with run.checkpoint(stage, progress.step) as folder:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / TENSORS)
        (folder / STATE).write_text(json.dumps({"fingerprint": fingerprint, **asdict(progress)}, indent=2))
    return run.path / "stages" / stage / "checkpoints" / f"step-{progress.step}"


def load_checkpoint(folder: Path, optimiser: FlatAdamW, fingerprint: str) -> Progress:
    """Puts a verified checkpoint's state in place. Raises CheckpointError when it belongs to another recipe or data."""
    state = json.loads((folder / STATE).read_text())
    if state.pop("fingerprint") != fingerprint:
        raise CheckpointError(
            "the checkpoint was made with other settings or data",
            where=str(folder),
            mend="resume with the recipe the run began with, or choose another --out",
        )
    tensors = load_file(folder / TENSORS)
    torch.set_rng_state(tensors.pop(RNG))
    optimiser.load(tensors)
    return Progress(**state)


def load_weights(folder: Path, optimiser: FlatAdamW) -> None:
    """Puts only a checkpoint's trained weights in place: for taking the best one at the end."""
    optimiser.load_weights(load_file(folder / TENSORS))
