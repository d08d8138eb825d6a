"""A stage's state at a step, on disk and back: safetensors and JSON only, complete or absent, checked on load.

stages/NAME/checkpoints/step-N/   state.safetensors (masters, moments, RNG), state.json (progress), manifest.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError, NonFinite
from ..rundir import RunDirectory
from .masters import local
from .optimiser import Optimiser

STATE, TENSORS = "state.json", "state.safetensors"
RNG, SOURCE = "rng.cpu", "source."
CHECKED = 1 << 22  # numbers tested for being finite at once, since the test takes as much memory again


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
    """Whether an update with a positive rate and a gradient was made."""
    had_gradient: bool = False


def save_checkpoint(
    run: RunDirectory, stage: str, progress: Progress, optimiser: Optimiser, fingerprint: str, source: Mapping[str, torch.Tensor]
) -> Path:
    """Writes step-N; weights that are not finite are refused, so that the newest checkpoint is always usable. Raises NonFinite.

    source: what the source of windows needs to go on, such as rollouts that are not used up.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in optimiser.state().items()}
    halves = {name: local(p) for name, p in zip(optimiser.names, optimiser.parameters, strict=True) if p.dtype == torch.float16}
    bad = [name for name, tensor in (tensors | halves).items() if tensor.is_floating_point() and not _is_finite(tensor)]
    if bad:
        raise NonFinite(f"`{bad[0]}` is not finite", where=f"stage {stage}, step {progress.step}", mend="lower learning_rate")
    tensors[RNG] = torch.get_rng_state()
    tensors |= {f"{SOURCE}{name}": tensor.contiguous() for name, tensor in source.items()}
    with run.checkpoint(stage, progress.step) as folder:
        save_file(tensors, folder / TENSORS)  # written from where they lie: masters share one buffer, but no bytes of it
        (folder / STATE).write_text(json.dumps({"fingerprint": fingerprint, **asdict(progress)}, indent=2))
    return run.path / "stages" / stage / "checkpoints" / f"step-{progress.step}"


def _is_finite(tensor: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in tensor.view(-1).split(CHECKED))


def load_checkpoint(folder: Path, optimiser: Optimiser, fingerprint: str) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Puts a verified checkpoint's state in place; gives how far it came, and the source's state.

    Raises CheckpointError when it belongs to another recipe or data.
    """
    state = json.loads((folder / STATE).read_text())
    if state.pop("fingerprint") != fingerprint:
        raise CheckpointError(
            "the checkpoint was made with other settings or data",
            where=str(folder),
            mend="resume with the recipe the run began with, or choose another --out",
        )
    tensors = load_file(folder / TENSORS)
    torch.set_rng_state(tensors.pop(RNG))
    source = {name.removeprefix(SOURCE): tensors.pop(name) for name in list(tensors) if name.startswith(SOURCE)}
    optimiser.load(tensors)
    return Progress(**state), source


def load_weights(folder: Path, optimiser: Optimiser) -> None:
    """Puts only a checkpoint's trained weights in place: for taking the best one at the end."""
    optimiser.load_weights(load_file(folder / TENSORS))
