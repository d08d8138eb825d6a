"""Which of several processes writes: the first that torchrun started. The others read, and what they would write goes nowhere."""

from __future__ import annotations

import os
from pathlib import Path

_followed: set[Path] = set()


def rank() -> int:
    """This process's number among those that train together, from 0; torchrun's environment says it."""
    return int(os.environ["RANK"]) if launched() else 0


def world() -> int:
    """How many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def launched() -> bool:
    """Whether torchrun, or what does as it does, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def follow(folder: Path) -> None:
    """From here on this process writes nothing below the folder: another one does."""
    _followed.add(folder)


def lead(folder: Path) -> None:
    """Ends `follow`."""
    _followed.discard(folder)


def is_writer(path: Path) -> bool:
    """Whether what this process writes to a path is to be put there."""
    return not any(path.is_relative_to(folder) for folder in _followed)
