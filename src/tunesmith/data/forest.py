"""A batch as a forest of shared prefixes: every token that rows have in common is held, and later computed, once.

Takes rows of (token ids, loss weights) and gives a `Forest`: packed tokens, each node a run of them with a parent,
and for each supervised token the packed position whose hidden state predicts it. Plain packing is the case in which
no two rows share a beginning. Numbers carry their dimensions: B rows, T packed tokens, S supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MIN_SHARED = 16  # tokens; a shorter common beginning costs more in bookkeeping than it saves


@dataclass(frozen=True, slots=True)
class Node:
    """Packed tokens [start, end), which attend causally to themselves and fully to every ancestor's tokens."""

    start: int
    end: int
    ancestors: tuple[tuple[int, int], ...]
    """(start, end) of each ancestor, root first."""


@dataclass(frozen=True, slots=True)
class Forest:
    """One packed batch."""

    tokens_T: np.ndarray
    positions_T: np.ndarray
    nodes: tuple[Node, ...]
    source_S: np.ndarray
    """Packed index whose hidden state predicts the supervised token."""
    target_S: np.ndarray
    """The supervised token's id."""
    weight_S: np.ndarray
    """Its loss weight, float32, never 0."""
    row_S: np.ndarray
    """The row it belongs to; S is ordered by row, then by position."""
    last_B: np.ndarray
    """Packed index of each row's last token."""
    lengths_B: np.ndarray
    """Each row's length in tokens, as if it stood alone."""


def build_forest(rows: Sequence[tuple[np.ndarray, np.ndarray]], *, min_shared: int = MIN_SHARED) -> Forest:
    """Packs rows of (ids[T_row] int, weights[T_row] float32) into a forest. Row order is kept in row_S and last_B."""
    ids = [np.ascontiguousarray(row[0], dtype=np.int64) for row in rows]
    if any(len(row) == 0 for row in ids):
        raise ValueError("a row has no tokens")
    order = sorted(range(len(ids)), key=lambda b: ids[b].tolist())
    common = [_common_prefix(ids[a], ids[b]) for a, b in pairwise(order)]
    builder = _Builder(ids, order, common, min_shared)
    builder.grow(0, len(order), 0, ())
    paths = builder.paths
    index = [np.concatenate([np.arange(a, b) for a, b in paths[b_]]) for b_ in range(len(ids))]
    tokens = np.concatenate(builder.chunks)
    positions = np.concatenate(builder.positions)
    supervised = [np.nonzero(np.asarray(weights) != 0)[0] for _, weights in rows]
    if any(len(s) and s[0] == 0 for s in supervised):
        raise ValueError("a row's first token cannot carry loss: nothing predicts it")
    return Forest(
        tokens_T=tokens,
        positions_T=positions,
        nodes=tuple(builder.nodes),
        source_S=_join([index[b][s - 1] for b, s in enumerate(supervised)], np.int64),
        target_S=_join([ids[b][s] for b, s in enumerate(supervised)], np.int64),
        weight_S=_join([np.asarray(rows[b][1])[s] for b, s in enumerate(supervised)], np.float32),
        row_S=_join([np.full(len(s), b) for b, s in enumerate(supervised)], np.int64),
        last_B=np.array([row[-1] for row in index], dtype=np.int64),
        lengths_B=np.array([len(row) for row in ids], dtype=np.int64),
    )


def _join(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = np.nonzero(a[:n] != b[:n])[0]
    return int(differ[0]) if len(differ) else n


class _Builder:
    """Depth-first growth over lexicographically sorted rows, whose neighbours' common prefixes are known."""

    def __init__(self, ids: list[np.ndarray], order: list[int], common: list[int], min_shared: int):
        self.ids, self.order, self.common, self.min_shared = ids, order, common, min_shared
        self.nodes: list[Node] = []
        self.chunks: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.paths: dict[int, tuple[tuple[int, int], ...]] = {}
        self.size = 0

    def grow(self, low: int, high: int, depth: int, path: tuple[tuple[int, int], ...]) -> None:
        """Places rows order[low:high], whose first `depth` tokens already lie along `path`."""
        rows = self.order[low:high]
        shared = min(self.common[low : high - 1], default=len(self.ids[rows[0]]))
        if shared == max(len(self.ids[row]) for row in rows):  # one row, or equal ones
            path = self._place(rows[0], depth, shared, path)
            self.paths.update(dict.fromkeys(rows, path))
            return
        if shared - depth >= self.min_shared:
            path = self._place(rows[0], depth, shared, path)
            depth = shared
        start = low
        for i in range(low, high):
            if i == high - 1 or not self._stay_together(i, depth):
                self.grow(start, i + 1, depth, path)
                start = i + 1

    def _stay_together(self, i: int, depth: int) -> bool:
        """Whether sorted rows i and i + 1 share enough beyond `depth`, or are equal."""
        equal = self.common[i] == len(self.ids[self.order[i]]) == len(self.ids[self.order[i + 1]])
        return equal or self.common[i] - depth >= self.min_shared

    def _place(self, row: int, begin: int, end: int, path: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if begin == end:
            return path
        span = (self.size, self.size + end - begin)
        self.nodes.append(Node(*span, ancestors=path))
        self.chunks.append(self.ids[row][begin:end])
        self.positions.append(np.arange(begin, end))
        self.size = span[1]
        return (*path, span)
