"""One iteration's rollouts: the rows that are trained on, a column for each thing that the objective reads; to a checkpoint and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..data.batching import Batch

PREFIX = "rollouts."


def flat(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows one after another; of none, an empty array."""
    return np.concatenate(rows) if len(rows) else np.zeros(0, dtype=np.float32)


@dataclass
class Rollouts:
    """N rows. items [N]: whose answer each is. ids: N arrays, prompt and answer. prompt_lengths [N].

    columns: by name, N arrays of one number an answer's token. row_columns: by name, one number a row [N].
    """

    iteration: int
    items: np.ndarray
    ids: list[np.ndarray]
    prompt_lengths: np.ndarray
    columns: dict[str, list[np.ndarray]]
    row_columns: dict[str, np.ndarray]
    metrics: dict[str, Any]
    make: Callable[[Rollouts], list[list[Batch]]]
    idle: bool = False
    """Whether there is nothing to learn from them: no answer is better than another."""
    parts: list[list[Batch]] = field(default_factory=list)
    """For each update of a pass its batches."""

    def weights(self, row: int) -> np.ndarray:
        """1 for each token of the answer, 0 for the prompt's: float32 [T]."""
        weights = np.ones(len(self.ids[row]), dtype=np.float32)
        weights[: self.prompt_lengths[row]] = 0
        return weights

    def rebuild(self) -> None:
        """Makes the batches, once every column is there."""
        self.parts = self.make(self)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything but the batches, as tensors by name."""
        lengths = np.array([len(row) for row in self.ids], dtype=np.int64)
        held = {
            "iteration": np.array(self.iteration),
            "idle": np.array(self.idle),
            "items": self.items.astype(np.int64),
            "ids": flat(self.ids).astype(np.int64),
            "lengths": lengths,
            "prompt_lengths": self.prompt_lengths.astype(np.int64),
            "metrics": np.frombuffer(json.dumps(self.metrics).encode(), dtype=np.uint8).copy(),
            **{f"token.{name}": flat(values) for name, values in self.columns.items()},
            **{f"row.{name}": values for name, values in self.row_columns.items()},
        }
        return {PREFIX + name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in held.items()}

    @classmethod
    def load(cls, state: Mapping[str, torch.Tensor], make: Callable[[Rollouts], list[list[Batch]]]) -> Rollouts | None:
        """A checkpoint's rollouts with their batches; None where it holds none."""
        held = {name.removeprefix(PREFIX): tensor.numpy() for name, tensor in state.items() if name.startswith(PREFIX)}
        if not held:
            return None
        ends, answers = np.cumsum(held["lengths"]), np.cumsum(held["lengths"] - held["prompt_lengths"])
        rollouts = cls(
            iteration=int(held["iteration"].item()),
            items=held["items"],
            ids=np.split(held["ids"], ends)[:-1],
            prompt_lengths=held["prompt_lengths"],
            columns={name.removeprefix("token."): np.split(v, answers)[:-1] for name, v in held.items() if name.startswith("token.")},
            row_columns={name.removeprefix("row."): v for name, v in held.items() if name.startswith("row.")},
            metrics=json.loads(held["metrics"].tobytes()),
            make=make,
            idle=bool(held["idle"].item()),
        )
        rollouts.rebuild()
        return rollouts
