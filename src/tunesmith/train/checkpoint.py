"""A stage's state at a step, on disk and back: safetensors and JSON only, complete or absent, checked on load.

stages/NAME/checkpoints/step-N/   state.safetensors (masters, moments, RNG), state.json (progress), manifest.json

Each further process R adds state.R.safetensors, with its own RNG and its shards of what is sharded: the parts of a tensor, in the order of
the processes, are the whole, whatever the number of processes that reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from ..errors import CheckpointError, NonFinite
from ..rundir import RunDirectory, rank
from .devices import gather, of_first, together, wait
from .masters import local
from .optimiser import Optimiser
from .updates import MOMENTS_BLOCK
from .zero import ZeroOptimiser

STATE = "state.json"
RNG, SOURCE = "rng.", "source."
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


def save_checkpoint(
    run: RunDirectory,
    stage: str,
    progress: Progress,
    optimiser: Optimiser | ZeroOptimiser,
    fingerprint: str,
    source: Mapping[str, torch.Tensor],
) -> Path:
    """Writes step-N; weights that are not finite are refused, so that the newest checkpoint is always usable. Raises NonFinite.

    source: what the source of windows needs to go on, such as rollouts that are not used up.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in optimiser.state().items()}
    halves = {name: local(p) for name, p in zip(optimiser.names, optimiser.parameters, strict=True) if p.dtype == torch.float16}
    bad = together([name for name, tensor in (tensors | halves).items() if tensor.is_floating_point() and not _is_finite(tensor)])
    if bad:
        raise NonFinite(f"`{bad[0]}` is not finite", where=f"stage {stage}, step {progress.step}", mend="lower learning_rate")
    if rank() == 0:
        tensors |= {f"{SOURCE}{name}": tensor.contiguous() for name, tensor in source.items()}
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if is_sharded(name, optimiser)}
    tensors |= {f"{RNG}{device}": state for device, state in _random_states().items()}
    with run.checkpoint(stage, progress.step) as own:
        folder = Path(of_first(lambda: str(own)))
        save_file(tensors, folder / _file_of(rank()))  # written from where they lie: masters share one buffer, but no bytes of it
        if rank() == 0:
            (folder / STATE).write_text(json.dumps({"fingerprint": fingerprint, **asdict(progress)}, indent=2))
        wait()
    return run.path / "stages" / stage / "checkpoints" / f"step-{progress.step}"


def is_sharded(name: str, optimiser: Optimiser | ZeroOptimiser) -> bool:
    """Whether the processes hold different parts of a tensor of the optimiser's state, KIND.PARAMETER."""
    return name.partition(".")[2] in optimiser.sharded


def _random_states() -> dict[str, torch.Tensor]:
    """By device, what its random numbers go on from: dropout's come from the device that computes."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def _file_of(process: int) -> str:
    return f"state.{process}.safetensors" if process else "state.safetensors"


def _is_finite(tensor: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in tensor.view(-1).split(CHECKED))


def read_state(folder: Path) -> tuple[str, Progress]:
    """The fingerprint of what a verified checkpoint was made of, and how far it came. Raises CheckpointError for another version's."""
    state = json.loads((folder / STATE).read_text())
    fingerprint = state.pop("fingerprint", None)
    if fingerprint is None or state.keys() != {field.name for field in fields(Progress)}:
        raise CheckpointError(
            "the checkpoint was made by another version of tunesmith",
            where=str(folder),
            mend="go on with the version that made it, or choose another --out",
        )
    return fingerprint, Progress(**state)


def load_checkpoint(folder: Path, optimiser: Optimiser | ZeroOptimiser, fingerprint: str) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Puts a verified checkpoint's state in place; gives how far it came, and the source's state.

    Raises CheckpointError when it belongs to another recipe, data or version, or when 8-bit moments cannot be cut as these processes hold
    them.
    """
    made_of, progress = read_state(folder)
    if made_of != fingerprint:
        raise CheckpointError(
            "the checkpoint was made with other settings or data",
            where=str(folder),
            mend="resume with the recipe the run began with, or choose another --out",
        )
    with _parts(folder) as files:
        own = files[rank() % len(files)]
        torch.set_rng_state(own.get_tensor(f"{RNG}cpu"))
        if torch.cuda.is_available() and f"{RNG}cuda" in own.keys():  # noqa: SIM118 - no mapping
            torch.cuda.set_rng_state(own.get_tensor(f"{RNG}cuda"))
        source = {name.removeprefix(SOURCE): files[0].get_tensor(name) for name in files[0].keys() if name.startswith(SOURCE)}  # noqa: SIM118
        _require_whole_blocks(files, optimiser, folder)
    optimiser.load(_Saved(folder, optimiser))
    return progress, source


def other_random_numbers(folder: Path) -> str | None:
    """What to say where a checkpoint's random states are of other kinds of devices than there are here, so that one begins anew."""
    with safe_open(folder / _file_of(0), "pt") as file:
        held = {name.removeprefix(RNG) for name in file.keys() if name.startswith(RNG)}  # noqa: SIM118 - no mapping
    here = set(_random_states())
    if held == here:
        return None
    before, now = (" and ".join(sorted(kinds)) for kinds in (held, here))
    return f"the checkpoint holds the random state of {before}, and this machine has {now}: dropout is not what it would have been unbroken"


def load_weights(folder: Path, optimiser: Optimiser | ZeroOptimiser) -> None:
    """Puts only a checkpoint's trained weights in place: for taking the best one at the end."""
    optimiser.load_weights(_Saved(folder, optimiser))


@contextmanager
def _parts(folder: Path) -> Iterator[list[Any]]:
    """What each process wrote, opened."""
    with ExitStack() as opened:
        names = [_file_of(process) for process in range(len(list(folder.glob("state*.safetensors"))))]
        yield [opened.enter_context(safe_open(folder / name, "pt")) for name in names]


class _Saved(Mapping[str, torch.Tensor]):
    """This process's part of every tensor of a saved optimiser's state. Each is opened alone when it is asked for: pages of a mapped file
    that were read count as this process's memory until the file is closed."""

    def __init__(self, folder: Path, optimiser: Optimiser | ZeroOptimiser) -> None:
        self._folder = folder
        self._lengths = gather(optimiser.parts())
        with _parts(folder) as files:
            self._names = [name for name in files[0].keys() if not name.startswith((SOURCE, RNG))]  # noqa: SIM118 - no mapping

    def __getitem__(self, name: str) -> torch.Tensor:
        with _parts(self._folder) as files:
            files = [file for file in files if name in file.keys()]  # noqa: SIM118 - no mapping
            if not files:
                raise KeyError(name)
            if name in self._lengths[0]:
                sizes, here = [file.get_slice(name).get_shape()[0] for file in files], [each[name] for each in self._lengths]
                if sum(sizes) == sum(here):
                    return _between(files, name, sizes, sum(here[: rank()]), sum(here[: rank() + 1]))
            parts = [file.get_tensor(name) for file in files]
            return torch.cat(parts) if len(parts) > 1 else parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _between(files: Sequence[Any], name: str, sizes: Sequence[int], begin: int, end: int) -> torch.Tensor:
    """[begin, end) of the tensor whose parts, of these sizes, the files hold one after another; other parts are not read."""
    parts, offset = [], 0
    for file, size in zip(files, sizes, strict=True):
        first, last = max(0, begin - offset), min(size, end - offset)
        if first < last:
            parts.append(file.get_slice(name)[first:last])
        offset += size
    if not parts:
        return files[0].get_tensor(name)[:0]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _require_whole_blocks(files: Sequence[Any], optimiser: Optimiser | ZeroOptimiser, folder: Path) -> None:
    """A shard's blocks of 8-bit moments begin with it: joined and cut elsewhere than between blocks, numbers would get others' scales."""
    held = gather({name: local(parameter).numel() for name, parameter in zip(optimiser.names, optimiser.parameters, strict=True)})
    for name, parameter in zip(optimiser.names, optimiser.parameters, strict=True):
        if f"first_scale.{name}" not in files[0].keys():  # noqa: SIM118 - no mapping
            continue
        key = f"weight.{name}"
        before = [math.prod(file.get_slice(key).get_shape()) for file in files if key in file.keys()]  # noqa: SIM118
        now = [each[name] for each in held] if isinstance(parameter, DTensor) else []
        cuts = [{end for end in accumulate(sizes) if end < parameter.numel()} for sizes in (before, now)]
        if cuts[0] != cuts[1] and any(end % MOMENTS_BLOCK for end in cuts[0] | cuts[1]):
            raise CheckpointError(
                f"the 8-bit moments of `{name}` share scales in blocks of {MOMENTS_BLOCK}, which these processes cut elsewhere",
                where=str(folder),
                mend=f"resume on {len(before)} processes with launch.strategy: fsdp, as it was"
                if len(before) > 1
                else "resume without sharding",
            )
