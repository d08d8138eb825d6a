"""The key-value cache of batched generation: a prefix shared by all rows, held once, and each row's own suffix, written in place.

Takes a transformers model's keys and values through the `Cache` interface, gives our attention (attention.py) what it needs. A forward
pass is one of two kinds:
    rows    the tokens of B rows one after another, unpadded, as one row [1, N]; they enter empty suffixes
    step    one token a live row, [B, 1]; it enters the next slot of every suffix
Suffixes are right-aligned: row b's own tokens lie in slots start[b] .. used-1, so that a step writes one slot for all rows.
Buffers are [Hkv, B, slots, D]: heads first, so that the shared prefix is one matrix product a head (RelayAttention,
Zhu et al. 2024, arXiv:2402.14808; Hydragen, Juravsky et al. 2024, arXiv:2402.05099).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..data.forest import Node
from ..models.attention import KEY_STEP, in_few_shapes

# Slots are added by at least this many, and by half of what is there, so that a long answer copies its cache a few times at most.
MIN_GROWTH = 64


# Attention scores held at once, in float32 elements: on a CPU they should stay in its cache (2**18 is 1 MiB), elsewhere fill the device.
SCORE_ELEMENTS_CPU = 2**18
SCORE_ELEMENTS = 2**25


@dataclass(frozen=True)
class Block:
    """Queries that attention takes at once: some rows, and of them the slots first_query .. first_query + queries - 1.

    first_key: first slot that any of the rows uses. tokens: the queries' place among the pass's tokens. flat: each query's place in the
    padded [rows, queries] grid, or None where the rows are equally long and nothing is padded.
    """

    rows: slice
    first_key: int
    first_query: int
    queries: int
    tokens: slice
    flat: torch.Tensor | None


@dataclass
class RowLayout:
    """Where tokens lie; one object for all layers.

    prefix: length of the shared prefix. starts: first slot of each row. used: slots written, the current pass included. capacity: slots
    allocated. kind: of the current pass. row_N, slot_N: of each token in a "rows" pass.
    """

    prefix: int
    starts: list[int]
    used: int
    capacity: int
    kind: Literal["rows", "step"]
    device: torch.device
    row_N: torch.Tensor = field(init=False)
    slot_N: torch.Tensor = field(init=False)
    start_B: torch.Tensor = field(init=False)
    masks: dict[tuple[int, int], torch.Tensor | None] = field(default_factory=dict)
    _blocks: list[Block] | None = None
    _nodes: tuple[Node, ...] | None = None
    _start_array: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.row_N = torch.tensor([b for b, start in enumerate(self.starts) for _ in range(start, self.used)], device=self.device)
        self.slot_N = torch.tensor([slot for start in self.starts for slot in range(start, self.used)], device=self.device)
        self.changed()

    def changed(self) -> None:
        """Forgets what was derived from starts and used."""
        self.start_B = torch.tensor(self.starts, device=self.device)
        self.masks.clear()
        self._blocks = self._nodes = self._start_array = None

    def nodes(self) -> tuple[Node, ...]:
        """A "rows" pass as a forest whose prefix stands behind its tokens."""
        if self._nodes is None:
            N, ends = len(self.row_N), np.cumsum([self.used - start for start in self.starts]).tolist()
            shared = ((N, N + self.prefix),) if self.prefix else ()
            self._nodes = tuple(Node(a, b, shared) for a, b in pairwise([0, *ends]))
        return self._nodes

    def start_array(self) -> np.ndarray:
        """First slot of each row, int64[B]."""
        if self._start_array is None:
            self._start_array = np.array(self.starts, dtype=np.int64)
        return self._start_array

    def blocks(self, heads: int) -> list[Block]:
        """The current pass in blocks whose scores are few enough; rows of like length should be neighbours, for little padding."""
        if self._blocks is None:
            limit = (SCORE_ELEMENTS_CPU if self.device.type == "cpu" else SCORE_ELEMENTS) // heads
            self._blocks = list(self._step_blocks(limit) if self.kind == "step" else self._row_blocks(limit))
        return self._blocks

    def _step_blocks(self, limit: int) -> Iterator[Block]:
        size = max(1, limit // (self.prefix + self.used))
        for first in range(0, len(self.starts), size):
            rows = slice(first, min(len(self.starts), first + size))
            yield Block(rows, min(self.starts[rows]), self.used - 1, 1, rows, None)

    def _row_blocks(self, limit: int) -> Iterator[Block]:
        first, token = 0, 0
        while first < len(self.starts):
            end, longest = first, 0
            while end < len(self.starts):
                grown = max(longest, self.used - self.starts[end])
                if end > first and (end + 1 - first) * grown * (self.prefix + grown) > limit:
                    break
                end, longest = end + 1, grown
            rows, first_slot = slice(first, end), self.used - longest
            tokens = sum(self.used - start for start in self.starts[rows])
            if end - first == 1:
                size = max(1, limit // (self.prefix + longest))
                for query in range(0, longest, size):
                    count = min(size, longest - query)
                    yield Block(rows, first_slot, first_slot + query, count, slice(token + query, token + query + count), None)
            else:
                chosen = slice(token, token + tokens)
                flat = (self.row_N[chosen] - first) * longest + self.slot_N[chosen] - first_slot
                yield Block(rows, first_slot, first_slot, longest, chosen, None if tokens == (end - first) * longest else flat)
            first, token = end, token + tokens


# Keys and values [Hkv, P, D] of a shared prefix, one pair a layer.
PrefixKV = list[tuple[torch.Tensor, torch.Tensor]]


class PrefixLayer(CacheLayerMixin):
    """One model layer's keys and values: prefix [Hkv, P, D] or None, suffixes [Hkv, B, slots, D].

    In 16 bits on a CPU, zeros fill the prefix up to whole steps of keys, and there is a step of slots beyond the capacity, so that any
    block's keys can end on a whole step.
    """

    is_sliding = False

    def __init__(self, layout: RowLayout, prefix: tuple[torch.Tensor, torch.Tensor] | None):
        super().__init__()
        self.layout = layout
        self.prefix = None if prefix is None else (_filled(prefix[0]), _filled(prefix[1]))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the suffixes; key_states and value_states are [*, Hkv, *, D], whose dtype and device they take."""
        B, slots = len(self.layout.starts), self.layout.capacity + _spare(key_states)
        self.keys = key_states.new_zeros(key_states.shape[1], B, slots, key_states.shape[3])
        self.values = value_states.new_zeros(value_states.shape[1], B, slots, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes this pass's keys and values to their slots and returns them unchanged; attention reads the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        layout = self.layout
        slots = layout.capacity + _spare(key_states)
        if slots > self.keys.shape[2]:
            self.keys, self.values = (_grown(buffer, slots) for buffer in (self.keys, self.values))
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            if layout.kind == "step":
                buffer[:, :, layout.used - 1] = new[:, :, 0].transpose(0, 1)
            else:
                buffer[:, layout.row_N, layout.slot_N] = new[0]
        return key_states, value_states

    def keep(self, rows: torch.Tensor, first_slot: int) -> None:
        """Keeps the named rows, and the slots from first_slot on."""
        self.keys = self.keys[:, :, first_slot:].index_select(1, rows)
        self.values = self.values[:, :, first_slot:].index_select(1, rows)

    def get_seq_length(self) -> int:
        """Always 0: models ask it only to number positions, which every call here gives itself."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes for a dense mask, which our mask function does not build."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _spare(like: torch.Tensor) -> int:
    return KEY_STEP if in_few_shapes(like) else 0


def _filled(x_KPD: torch.Tensor) -> torch.Tensor:
    filling = -x_KPD.shape[1] % KEY_STEP if in_few_shapes(x_KPD) else 0
    return torch.nn.functional.pad(x_KPD, (0, 0, 0, filling)) if filling else x_KPD


def _grown(buffer: torch.Tensor, slots: int) -> torch.Tensor:
    grown = buffer.new_zeros(*buffer.shape[:2], slots, buffer.shape[3])
    grown[:, :, : buffer.shape[2]] = buffer
    return grown


class PrefixCache(Cache):
    """The cache of one batch of rows over one shared prefix.

    suffix_lengths: tokens of each row outside the prefix, each at least 1. extra_slots: slots to allocate beyond the longest, for steps.
    prefix: what `take_prefix` of another cache gave, per layer, or None. loops: whether attention may take the compiled ones.
    """

    def __init__(
        self,
        layers: int,
        suffix_lengths: list[int],
        *,
        extra_slots: int = 0,
        prefix: PrefixKV | None = None,
        device: torch.device | str = "cpu",
        loops: bool = False,
    ):
        self.loops = loops
        longest = max(suffix_lengths)
        starts = [longest - length for length in suffix_lengths]
        prefix_length = 0 if prefix is None else prefix[0][0].shape[1]
        self.layout = RowLayout(prefix_length, starts, longest, longest + extra_slots, "rows", torch.device(device))
        super().__init__(layers=[PrefixLayer(self.layout, None if prefix is None else prefix[i]) for i in range(layers)])
        self.attended: list[int] = []  # layers whose attention ran in the current pass
        self.last_updated = -1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one layer's keys and values; see PrefixLayer.update."""
        self.last_updated = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def positions(self) -> torch.Tensor:
        """Position of every token of the current pass in its own row, prefix counted: [1, N] for rows, [B, 1] for a step."""
        layout = self.layout
        if layout.kind == "rows":
            return (layout.prefix + layout.slot_N - layout.start_B[layout.row_N])[None]
        return (layout.prefix + layout.used - 1 - layout.start_B)[:, None]

    def next_step(self) -> None:
        """Opens the next slot: the coming pass is a step."""
        layout = self.layout
        layout.kind = "step"
        layout.used += 1
        layout.changed()
        if layout.used > layout.capacity:
            layout.capacity += max(MIN_GROWTH, layout.capacity // 2)

    def keep(self, rows: list[int]) -> None:
        """Keeps the named rows, in that order, one as often as it is named, and drops the slots that no row left uses."""
        layout = self.layout
        first_slot = min(layout.starts[b] for b in rows)
        index = torch.tensor(rows, device=layout.device)
        for layer in self.layers:
            layer.keep(index, first_slot)
        layout.starts = [layout.starts[b] - first_slot for b in rows]
        layout.used -= first_slot
        layout.capacity -= first_slot
        layout.changed()

    def take_prefix(self) -> PrefixKV:
        """The shared prefix and the first row's keys and values per layer, [Hkv, P, D] each, to be the shared prefix of other caches."""
        used = self.layout.used
        own = [(layer.keys[:, 0, :used].contiguous(), layer.values[:, 0, :used].contiguous()) for layer in self.layers]
        if not self.layout.prefix:
            return own
        P = self.layout.prefix
        return [
            (torch.cat([layer.prefix[0][:, :P], keys], 1), torch.cat([layer.prefix[1][:, :P], values], 1))
            for layer, (keys, values) in zip(self.layers, own, strict=True)
        ]
