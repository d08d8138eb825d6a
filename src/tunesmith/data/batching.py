"""Which items make which update: a pure function of (seed, epoch, position), so that a resumed run continues at the exact item.

An item is one or more rows that belong together: a conversation is one, a pair two, a ranking one for each answer. An item's rows are
always in one batch, next to one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .forest import Forest, build_forest

Row = tuple[np.ndarray, np.ndarray]
T = TypeVar("T")


class Share(NamedTuple):
    """Which of several processes' work is meant: that of process `rank` of `world`."""

    rank: int = 0
    world: int = 1


ALONE = Share()


def deal(parts: Sequence[T], share: Share) -> list[tuple[T, bool]]:
    """The parts that are a process's own, and whether each counts.

    All processes get as many, since what one of them computes of a sharded model all have to take part in: where parts are too few, a
    process repeats the first, which does not count.

    >>> deal("abcde", Share(1, 2))
    [('b', True), ('d', True), ('a', False)]
    """
    own = [(part, True) for part in parts[share.rank :: share.world]]
    return own + [(part, False) for part in parts[:1]] * (-(-len(parts) // share.world) - len(own))


@dataclass(frozen=True)
class Batch:
    """One forward pass: a forest, whose items its rows are, and what the objective needs to know of them.

    items: the items' indices in the source. item_B: each row's place in `items`. columns: arrays by name, whose suffix says what they
    count: _B rows, _I items, _S supervised tokens in the forest's order.
    """

    forest: Forest
    items: tuple[int, ...]
    item_B: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    counts: bool = True
    """Whether it is learned from, and not only computed to keep step with other processes."""


@dataclass(frozen=True)
class Window:
    """What one update is made from: this process's share of it.

    metrics: what the source knows of it, for the log. stop: the rule by which the stage ends here in place of an update, and why.
    """

    batches: Sequence[Batch]
    metrics: Mapping[str, float] = field(default_factory=dict)
    stop: Mapping[str, Any] | None = None


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The order of an epoch's rows, [rows] int64; that of the last two is kept."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)
    order.setflags(write=False)  # it is everyone's
    return order


class DatasetSource:
    """Accumulation windows from items, each once an epoch; the last window of an epoch may be smaller.

    items: `items[i]` gives the item's rows, each (ids, weights). columns: for the batches, one value an item where the name ends in _I, one
    a row where it ends in _B, in the order of the items. trim: rows end with their last supervised token, where a score is read.
    accumulation: batches of an update, of all processes together. share: which of them this process gets.
    window(step) is a pure function of step.
    """

    def __init__(
        self,
        items: Sequence[Sequence[Row]],
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        columns: Mapping[str, np.ndarray] | None = None,
        trim: bool = False,
        share: Share = ALONE,
    ):
        self.items, self.batch_size, self.accumulation, self.seed = items, batch_size, accumulation, seed
        self.columns, self.trim, self.share = dict(columns or {}), trim, share
        self.steps_per_epoch = math.ceil(len(items) / (batch_size * accumulation))
        sizes = [len(items[i]) for i in range(len(items))] if any(name.endswith("_B") for name in self.columns) else []
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def window(self, step: int) -> Window:
        """The batches of update `step`, counted from 0 over all epochs."""
        return Window(list(self._batches(self.chosen(step))))

    def chosen(self, step: int) -> np.ndarray:
        """The items of update `step`, of all processes together."""
        epoch, within = divmod(step, self.steps_per_epoch)
        size = self.batch_size * self.accumulation
        return epoch_order(self.seed, epoch, len(self.items))[within * size : (within + 1) * size]

    def once(self) -> Iterator[Batch]:
        """Every item once, in its order, as far as this process has a share in it: for validation."""
        return self._batches(np.arange(len(self.items)))

    def state(self) -> dict[str, Any]:
        """Nothing: a window depends on its number alone."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes nothing."""

    def _batches(self, indices: np.ndarray) -> Iterator[Batch]:
        chunks = [indices[start : start + self.batch_size].tolist() for start in range(0, len(indices), self.batch_size)]
        for chosen, counts in deal(chunks, self.share):
            yield self._batch(tuple(chosen), counts)

    def _batch(self, chosen: tuple[int, ...], counts: bool) -> Batch:
        groups = [self.items[i] for i in chosen]
        rows = [_trimmed(row) if self.trim else row for group in groups for row in group]
        item_B = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        return Batch(build_forest(rows), chosen, item_B, {name: self._column(name, chosen) for name in self.columns}, counts)

    def _column(self, name: str, chosen: tuple[int, ...]) -> np.ndarray:
        values = self.columns[name]
        if name.endswith("_I"):
            return values[list(chosen)]
        return np.concatenate([values[self._first[i] : self._first[i + 1]] for i in chosen])


def _trimmed(row: Row) -> Row:
    ids, weights = row
    end = int(np.flatnonzero(weights)[-1]) + 1
    return ids[:end], weights[:end]
