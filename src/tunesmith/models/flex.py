"""The forest's attention as one rule, and as torch's FlexAttention kernel (Dong et al. 2024, arXiv:2412.05496) on CUDA.

The nodes are numbered by depth-first entry; a node's exit is the first number after its descendants'. Query q sees key k where
entry[k] <= entry[q] < exit[k], which says that k's node is q's or an ancestor of it, and k does not stand later. A sliding window
bounds how much later q stands. On a CPU torch computes the forward pass alone, so there the kernel of attention.py is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from ..data.forest import Node
from .attention import Layout, forest_attention, refusal
from .fused import FastPaths

FLEX = "tunesmith_forest_flex"
FLEX_ATTENTION = "flex_attention"  # among the fast paths
MASK_BLOCK = 128  # queries, and keys, of which a mask's block says whether any are seen: torch's own default


class Visibility(NamedTuple):
    """Where each of T tokens stands in the forest."""

    entry_T: np.ndarray
    exit_T: np.ndarray
    position_T: np.ndarray
    """In the row, from its first token on, learned ones included."""

    def seen(self, q: Any, k: Any, window: int | None = None) -> Any:
        """Whether the token at index q sees the one at k; elementwise for arrays, of numpy or torch."""
        entry, end, position = self
        inside = (entry[k] <= entry[q]) & (entry[q] < end[k]) & (position[k] <= position[q])
        return inside if window is None else inside & (position[q] - position[k] < window)


def visibility(nodes: Sequence[Node], total: int) -> Visibility:
    """The numbers of a forest's `total` tokens; ancestors that are no nodes themselves (a learned prefix) are numbered too."""
    paths = {(*node.ancestors, (node.start, node.end))[: depth + 1] for node in nodes for depth in range(len(node.ancestors) + 1)}
    order = {path: number for number, path in enumerate(sorted(paths))}  # a path comes before those that go on from it
    below = dict.fromkeys(order, 0)
    for path in order:
        for depth in range(len(path)):
            below[path[: depth + 1]] += 1
    found = Visibility(*(np.zeros(total, dtype=np.int32) for _ in Visibility._fields))
    for path, number in order.items():
        begin, end = path[-1]
        before = sum(b - a for a, b in path[:-1])
        found.entry_T[begin:end], found.exit_T[begin:end] = number, number + below[path]
        found.position_T[begin:end] = np.arange(before, before + end - begin)
    return found


def flex_masks(
    nodes: Sequence[Node], queries: int, keys: int, windows: set[int | None], device: torch.device
) -> dict[int | None, BlockMask]:
    """A batch's masks for all its layers, by their sliding window."""
    rule = Visibility(*(torch.from_numpy(part).to(device) for part in visibility(nodes, keys)))
    return {window: _block_mask(rule, queries, keys, window, device) for window in windows}


def _block_mask(rule: Visibility, queries: int, keys: int, window: int | None, device: torch.device) -> BlockMask:
    """torch's `create_block_mask` of the rule, made one block of queries after another: its own would hold queries x keys numbers."""
    index, size = torch.arange(keys, device=device), MASK_BLOCK
    counts = []
    for begin in range(0, queries, size):
        seen = rule.seen(torch.arange(begin, min(begin + size, queries), device=device)[:, None], index[None], window)
        counts.append(torch.nn.functional.pad(seen.sum(0), (0, -keys % size)).view(-1, size).sum(-1))
    seen_QK = torch.stack(counts)[None, None]
    whole_QK = seen_QK == size * size
    partial, full = _in_order((seen_QK > 0) & ~whole_QK), _in_order(whole_QK)
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=size, mask_mod=lambda _b, _h, q, k: rule.seen(q, k, window), seq_lengths=(queries, keys)
    )


def _in_order(blocks_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row, how many blocks are marked, and all blocks' numbers, marked ones first."""
    marked = blocks_QK.to(torch.int32)
    return marked.sum(-1, dtype=torch.int32), marked.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


@cache
def _compiled() -> Callable[..., Tensor]:
    """Not compiled it would make all T x T scores: whole, so that it fails where torch would fall back to that; for any size at once, so
    that what computes a batch does not hang on which came first."""
    return torch.compile(flex_attention, fullgraph=True, dynamic=True)


def flex(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """query[Hq, T, D], key and value[Hkv, T + n, D] -> [T, Hq, D]; the arguments are those of attention.py's kernel."""
    kernel = flex_attention if query.device.type == "cpu" or torch.compiler.is_compiling() else _compiled()

    def cap(score: Tensor, *_index: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    out = kernel(
        query[None],
        key[None],
        value[None],
        score_mod=None if softcap is None else cap,
        block_mask=layout.masks[window],
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return out[0].transpose(0, 1)


def flex_forest_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """`forest_attention` by the FlexAttention kernel."""
    return forest_attention(*args, kernel=flex, **kwargs)


AttentionInterface.register(FLEX, flex_forest_attention)


def use_flex(model: PreTrainedModel, paths: FastPaths) -> None:
    """Gives a model the FlexAttention kernel, if on its device it computes and differentiates what attention.py's does."""
    reason = refusal(model, flex, masks=flex_masks)
    if reason is not None:
        paths.refused[FLEX_ATTENTION] = reason
        return
    model.set_attn_implementation(FLEX)
    paths.count(FLEX_ATTENTION)
