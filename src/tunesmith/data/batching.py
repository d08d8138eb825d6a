"""Which rows make which update: a pure function of (seed, epoch, position), so that a resumed run continues at the exact row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .forest import Forest, build_forest

Row = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """One forward pass of SFT: a forest and the rows' indices in the store."""

    forest: Forest
    rows: tuple[int, ...]


def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The order of an epoch's rows, [rows] int64."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)


class DatasetSource:
    """Accumulation windows from a store of rows, each row once an epoch; the last window of an epoch may be smaller.

    store: `store[i]` gives (ids, weights). window(step) is a pure function of step.
    """

    def __init__(
        self,
        store: Sequence[Row],
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        make: Callable[[list[Row], tuple[int, ...]], Batch] | None = None,
    ):
        self.store, self.batch_size, self.accumulation, self.seed = store, batch_size, accumulation, seed
        self.make = make or (lambda rows, indices: Batch(build_forest(rows), indices))
        self.steps_per_epoch = math.ceil(len(store) / (batch_size * accumulation))

    def window(self, step: int) -> list[Batch]:
        """The micro-batches of update `step`, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, len(self.store))
        size = self.batch_size * self.accumulation
        return list(self._batches(order[within * size : (within + 1) * size]))

    def once(self) -> Iterator[Batch]:
        """Every row once, in the store's order: for validation."""
        return self._batches(np.arange(len(self.store)))

    def _batches(self, indices: np.ndarray) -> Iterator[Batch]:
        for start in range(0, len(indices), self.batch_size):
            chosen = tuple(int(i) for i in indices[start : start + self.batch_size])
            yield self.make([self.store[i] for i in chosen], chosen)
