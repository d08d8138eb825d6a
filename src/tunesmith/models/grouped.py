"""The forest's attention in bf16 on a CPU: blocks of queries of one shape at once, and compiled loops between the products.

What attention.py computes one block after another is computed here for as many blocks as go into cache: products of few matrices take
twice as long each, and small calls cost more than their work. Queries and keys of a block come in whole steps and the number of blocks is a
power of two, since oneDNN keeps a kernel for each shape. A soft cap is left to attention.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel

from ..data.forest import Node
from . import kernels
from .attention import KEY_STEP, QUERY_BLOCK, Layout, blocks_of, forest_attention, packed, refusal, scaled_product
from .fused import FastPaths

GROUPED = "tunesmith_forest_grouped"
GROUPED_ATTENTION = "grouped_attention"  # among the fast paths
STEP = 32  # queries that a block is filled up to
INDICES = 1 << 21  # keys that all blocks name, 16 MiB of them: longer rows are left to attention.py
SCORES = 1 << 20  # numbers: of so many blocks at once that their scores stay in cache


class Group(NamedTuple):
    """B blocks of up to n queries and m keys, as indices of tokens; beyond a block's own they name some token that nobody looks at."""

    queries_Bn: np.ndarray
    keys_Bm: np.ndarray
    queries_B: np.ndarray
    """How many are real: the last of them sees the last key."""
    keys_B: np.ndarray


def groups_of(nodes: tuple[Node, ...], heads: int) -> list[Group]:
    """All blocks of a batch's nodes, those of one shape together, each of a power of two."""
    shapes: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for node in nodes:
        for begin, end, spans in blocks_of(node):
            keys = np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in spans])
            shapes[-(-(end - begin) // STEP) * STEP, -(-len(keys) // KEY_STEP) * KEY_STEP].append(
                (np.arange(begin, end, dtype=np.int64), keys)
            )
    found = []
    for (n, m), blocks in sorted(shapes.items()):
        most = max(1, SCORES // (heads * n * m))
        while blocks:
            count = 1 << (min(most, len(blocks)).bit_length() - 1)
            taken, blocks = blocks[:count], blocks[count:]
            sizes = (np.array([len(part[i]) for part in taken], dtype=np.int64) for i in range(2))
            filled = (np.stack([np.pad(part[i], (0, size - len(part[i])), mode="edge") for part in taken]) for i, size in enumerate((n, m)))
            found.append(Group(*filled, *sizes))
    return found


_last: list[tuple[tuple[Node, ...], dict[int, list[Group]]]] = [((), {})]


def _kept(nodes: tuple[Node, ...], heads: int) -> list[Group]:
    """`groups_of`, while a batch is computed, for all its layers; another thread's batch may take the place, and gets groups of its own."""
    held = _last[0]
    if held[0] is not nodes:
        held = _last[0] = (nodes, {})
    if heads not in held[1]:
        held[1][heads] = groups_of(nodes, heads)
    return held[1][heads]


def grouped(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """query[Hq, T, D], key and value[Hkv, T + n, D] -> [T, Hq, D]; the arguments are those of attention.py's kernel."""
    given = (query.contiguous(), key.contiguous(), value.contiguous())
    if softcap is not None or scale <= 0 or not kernels.fit(*given) or _indices(layout.nodes) > INDICES:
        return packed(query, key, value, layout, scale, window, softcap)
    return _GroupedAttention.apply(*given, layout.nodes, scale, window or 0)


def _indices(nodes: tuple[Node, ...]) -> int:
    """How many keys the blocks name, of long rows the square of their length over that of a block."""
    return sum(-(-(n.end - n.start) // QUERY_BLOCK) * (n.end - n.start + sum(b - a for a, b in n.ancestors)) for n in nodes)


class _GroupedAttention(torch.autograd.Function):
    """Attention with written-out backward; saves q, k and v, recomputes the probabilities (compare attention.py's)."""

    @staticmethod
    def forward(ctx, query, key, value, nodes, scale, window):  # noqa: ANN001
        heads, total, _ = query.shape
        out_THD = query.new_zeros(total, heads, value.shape[-1])  # a token of no node attends to nothing
        for group, q, k, v in _gathered(nodes, query, key, value):
            probs = torch.bmm(q, k.transpose(1, 2))
            kernels.softmax(probs, group.queries_B, group.keys_B, heads // len(key), scale, window)
            kernels.scatter(torch.bmm(probs, v), group.queries_Bn, group.queries_B, out_THD.transpose(0, 1), heads // len(key))
        ctx.save_for_backward(query, key, value)
        ctx.layout = (nodes, scale, window)
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THD):  # noqa: ANN001
        query, key, value = ctx.saved_tensors
        nodes, scale, window = ctx.layout
        shared = len(query) // len(key)
        grad = grad_THD.contiguous().transpose(0, 1)
        d_query = torch.zeros_like(query)
        d_key, d_value = (t.new_zeros(t.shape, dtype=torch.float32) for t in (key, value))
        for group, q, k, v in _gathered(nodes, query, key, value):
            g = kernels.gather(grad, group.queries_Bn, shared)
            probs = torch.bmm(q, k.transpose(1, 2))
            kernels.softmax(probs, group.queries_B, group.keys_B, shared, scale, window)
            kernels.add(torch.bmm(probs.transpose(1, 2), g), group.keys_Bm, group.keys_B, d_value)
            d_scores = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), probs, -1, probs.dtype)
            kernels.scatter(scaled_product(d_scores, k, scale), group.queries_Bn, group.queries_B, d_query, shared)
            kernels.add(scaled_product(d_scores.transpose(1, 2), q, scale), group.keys_Bm, group.keys_B, d_key)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _gathered(nodes: tuple[Node, ...], query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[Group, Tensor, Tensor, Tensor]]:
    """Each group with its queries [Hkv B, heads of a kv head x n, D], keys and values [Hkv B, m, D]."""
    for group in _kept(nodes, len(query)):
        q = kernels.gather(query, group.queries_Bn, len(query) // len(key))
        yield group, q, kernels.gather(key, group.keys_Bm, 1), kernels.gather(value, group.keys_Bm, 1)


def grouped_forest_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """`forest_attention` by this file's kernel."""
    return forest_attention(*args, kernel=grouped, **kwargs)


AttentionInterface.register(GROUPED, grouped_forest_attention)


def use_grouped(model: PreTrainedModel, paths: FastPaths) -> None:
    """Gives a model this kernel, if it computes and differentiates what attention.py's does; with a soft cap it would leave all to that."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return
    if (reason := refusal(model, grouped)) is not None:
        paths.refused[GROUPED_ATTENTION] = reason
        return
    model.set_attn_implementation(GROUPED)
    paths.count(GROUPED_ATTENTION)
