"""Attention over a forest: each token sees its ancestors' tokens and, causally, its own node's, and nothing else.

Registered with transformers' AttentionInterface, so every model that goes through the interface can be packed without
padding. The forward and backward passes are written out (one autograd function for the whole forest), since slices under autograd would
cost a zero-filled copy each. Long nodes are cut into blocks of queries: no T x T matrix exists. In 16 bits on a CPU, queries and keys
are filled up to whole steps, so that products come in few shapes. Every extra argument is honoured (scaling, sliding window, soft cap)
or refused (dropout, sinks, biases).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from ..data.forest import Node
from ..errors import ModelError
from .virtual import KeysValues

FOREST = "tunesmith_forest"
QUERY_BLOCK = 128  # queries at once: bounds the scores of one block to heads x 128 x keys, and spares those after the block
QUERY_STEP, KEY_STEP = 16, 32  # of a block; each shape that oneDNN has not seen costs 1 to 8 ms and up to 3 MB (AMX), and a softmax of
# bf16 takes twice as long where a row's end does not fill 32


TRIED = 512  # tokens of a trial's long node: several blocks of every kernel's, so that some are seen whole, some in part, and some not
AGREES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative to the largest number


class Layout(NamedTuple):
    """The nodes of a batch, and learned keys and values, a pair [Hkv, n, D] a layer, which nodes know as tokens [T, T + n)."""

    nodes: tuple[Node, ...]
    prefix: KeysValues | None = None
    masks: Mapping[int | None, Any] = {}
    """What FlexAttention makes of the nodes, by sliding window, where it is used."""


_layout: ContextVar[Layout | None] = ContextVar("forest_layout", default=None)


@contextmanager
def forest_layout(layout: Layout | None) -> Iterator[None]:
    """Makes the layout of a batch known to the attention function for a while."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def current_layout() -> Layout | None:
    """The layout of the batch in hand, to be captured by activation checkpointing."""
    return _layout.get()


def _refuse(name: str, module: torch.nn.Module) -> None:
    raise ModelError(
        f"attention in {type(module).__name__} needs `{name}`, which the packed attention does not compute",
        where=getattr(getattr(module, "config", None), "model_type", None),
        mend="tune another model family",
    )


def forest_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    kernel: Callable[..., Tensor] | None = None,
    layout: Layout | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """query[1, Hq, T, D], key and value[1, Hkv, T, D] -> (output[1, T, Hq, D], None); the layout is the current batch's.

    kernel: what computes it in place of this file's own, from the same arguments. layout: the batch's, where a layer was given it.
    """
    layout = _layout.get() if layout is None else layout
    if layout is None:
        raise ModelError(
            "the model was called outside the policy's forward", mend="call the policy, or switch the attention implementation first"
        )
    if extra.get("dropout"):
        _refuse("attention dropout", module)
    for name in ("s_aux", "position_bias", "head_mask"):
        if extra.get(name) is not None:
            _refuse(name, module)
    if attention_mask is not None:
        _refuse("attention_mask", module)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    key, value = key[0], value[0]
    if layout.prefix is not None:
        key, value = _with_prefix(module, key, value, layout.prefix)
    out = (kernel or packed)(query[0], key, value, layout, scale, extra.get("sliding_window"), extra.get("softcap"))
    return out.unsqueeze(0), None


def _with_prefix(module: torch.nn.Module, key: Tensor, value: Tensor, prefix: KeysValues) -> tuple[Tensor, Tensor]:
    """A layer's keys and values [Hkv, T + n, D], its learned ones after the tokens' own."""
    keys, values = prefix[module.layer_idx]
    if (keys.shape[0], keys.shape[2], values.shape[2]) != (key.shape[0], key.shape[2], value.shape[2]):
        raise ModelError(
            f"prefix tuning makes keys and values of {keys.shape[0]} heads of {keys.shape[2]}, layer {module.layer_idx} has "
            f"{key.shape[0]} of {key.shape[2]} and {value.shape[2]}",
            where=getattr(getattr(module, "config", None), "model_type", None),
            mend="use another method, such as prompt",
        )
    return torch.cat([key, keys], 1), torch.cat([value, values], 1)


AttentionInterface.register(FOREST, forest_attention)


def blocks_of(node: Node) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """(first query, past the last, key spans) of each block of a node's queries; the last span ends with the block."""
    for begin in range(node.start, node.end, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, node.end)
        yield begin, end, [*node.ancestors, (node.start, end)]


def in_few_shapes(like: Tensor) -> bool:
    """Whether products of such tensors are compiled for each shape, as oneDNN does on a CPU in 16 bits."""
    return like.device.type == "cpu" and like.dtype.itemsize == 2


def _steps(like: Tensor) -> tuple[int, int]:
    """What queries and keys of a block are filled up to."""
    return (QUERY_STEP, KEY_STEP) if in_few_shapes(like) else (1, 1)


def _gather(x_HTD: Tensor, spans: list[tuple[int, int]], step: int) -> Tensor:
    """The tokens of the spans one after another, filled up with zeros to whole steps."""
    parts = [x_HTD[:, a:b] for a, b in spans]
    filling = -sum(b - a for a, b in spans) % step
    if filling:
        parts.append(x_HTD.new_zeros(x_HTD.shape[0], filling, x_HTD.shape[2]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _queries(x_KGTD: Tensor, begin: int, end: int, step: int) -> Tensor:
    """[Hkv, groups x n, D]: a block's part, filled up with zeros to whole steps."""
    part = x_KGTD[:, :, begin:end]
    filling = -(end - begin) % step
    part = torch.nn.functional.pad(part, (0, 0, 0, filling)) if filling else part
    return part.reshape(x_KGTD.shape[0], -1, x_KGTD.shape[-1])


KEPT_MASKS = 64  # of a batch: under a sliding window a long row's blocks have each a mask of its own, together as large as its scores
_masks: list[tuple[tuple[Node, ...], dict[tuple[Any, ...], Tensor]]] = [((), {})]


def _mask(nodes: tuple[Node, ...], groups: int, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """[groups x n, m]: -inf where one of the last m keys is after the query, or `window` or more before, else 0; all see keys before them.

    n queries and all keys together are whole steps. The last of the queries sees the last of the keys; what they are filled up with,
    queries see nothing of and it sees anything. Kept while a batch is computed, for all its layers.
    """
    held = _masks[0]
    if held[0] is not nodes:  # another thread's batch may take the place, and has masks of its own
        held = _masks[0] = (nodes, {})
    query_step, key_step = _steps(like)
    before = keys - queries if window is None else 0  # keys that need no mask
    last, m = keys - before, keys + -keys % key_step - before
    key = (groups, queries, last, m, window, like.dtype, like.device)
    mask = held[1].get(key)
    if mask is None:
        n = queries + -queries % query_step
        age = torch.arange(last - queries, last - queries + n, device=like.device)[:, None] - torch.arange(m, device=like.device)[None]
        hidden = (age < 0) if window is None else (age < 0) | (age >= window)
        hidden[queries:] = False
        mask = like.new_zeros(n, m).masked_fill_(hidden, float("-inf")).repeat(groups, 1)
        if len(held[1]) < KEPT_MASKS:
            held[1][key] = mask
    return mask


def _probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Softmax of the masked scores of q[Hkv, groups x n, D] and k[Hkv, m, D], taken in fp32, and the derivative of the soft cap there.

    mask: of the last keys alone; all queries see those before.
    """
    slope = None
    if softcap is None:
        scores = scaled_product(q, k.transpose(1, 2), scale)
    else:
        capped = torch.tanh(torch.bmm(q, k.transpose(1, 2)).float().mul_(scale / softcap))
        scores, slope = capped * softcap, (1 - capped * capped).to(q.dtype)
    scores[:, :, scores.shape[2] - mask.shape[1] :].add_(mask)
    return torch.softmax(scores, -1).to(q.dtype), slope


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Products of matrices, multiplied before they are rounded: in fp16 what is still to be multiplied may be too large."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def packed(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """query[Hq, T, D], key and value[Hkv, T + n, D] -> [T, Hq, D]: one node's block of queries after another."""
    return _ForestAttention.apply(query, key, value, layout.nodes, scale, window, softcap)


class _ForestAttention(torch.autograd.Function):
    """Attention with written-out backward; saves q, k and v, recomputes the probabilities.

    In 16 bits, scores and probabilities are rounded to them between products, as the products are: an fp32 copy of either would no longer
    lie in cache. Outputs are as near to fp32's as those of the models' own attention, gradients up to a fifth further off, or nearer
    (tests/models/test_attention.py).
    """

    @staticmethod
    def forward(ctx, query, key, value, nodes, scale, window, softcap):  # noqa: ANN001
        heads, total, dim = query.shape
        kv_heads = key.shape[0]
        groups = heads // kv_heads
        query_step, key_step = _steps(query)
        out_THD = query.new_zeros(total, heads, value.shape[-1])  # a token of no node attends to nothing
        grouped = query.reshape(kv_heads, groups, total, dim)
        for node in nodes:
            for begin, end, spans in blocks_of(node):
                k, v = _gather(key, spans, key_step), _gather(value, spans, key_step)
                q = _queries(grouped, begin, end, query_step)
                mask = _mask(nodes, groups, end - begin, sum(b - a for a, b in spans), window, q)
                probs, _ = _probabilities(q, k, mask, scale, softcap)
                o = torch.bmm(probs, v)
                out_THD[begin:end] = o.view(heads, -1, o.shape[-1])[:, : end - begin].transpose(0, 1)
        ctx.save_for_backward(query, key, value)
        ctx.layout = (nodes, scale, window, softcap)
        return out_THD

    @staticmethod
    def backward(ctx, grad_THD):  # noqa: ANN001
        query, key, value = ctx.saved_tensors
        nodes, scale, window, softcap = ctx.layout
        heads, total, dim = query.shape
        kv_heads = key.shape[0]
        groups = heads // kv_heads
        query_step, key_step = _steps(query)
        grouped = query.reshape(kv_heads, groups, total, dim)
        d_out = grad_THD.transpose(0, 1).view(kv_heads, groups, total, -1)
        d_query = torch.zeros_like(grouped)
        d_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
        d_value = torch.zeros(value.shape, dtype=torch.float32, device=key.device)
        for node in nodes:
            for begin, end, spans in blocks_of(node):
                k, v = _gather(key, spans, key_step), _gather(value, spans, key_step)
                q, g = _queries(grouped, begin, end, query_step), _queries(d_out, begin, end, query_step)
                mask = _mask(nodes, groups, end - begin, sum(b - a for a, b in spans), window, q)
                probs, slope = _probabilities(q, k, mask, scale, softcap)
                dv = torch.bmm(probs.transpose(1, 2), g)
                d_scores = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), probs, -1, probs.dtype)
                if slope is not None:
                    d_scores.mul_(slope)
                d_query[:, :, begin:end] = scaled_product(d_scores, k, scale).view(kv_heads, groups, -1, dim)[:, :, : end - begin]
                dk = scaled_product(d_scores.transpose(1, 2), q, scale)
                offset = 0
                for a, b in spans:
                    d_key[:, a:b] += dk[:, offset : offset + b - a]
                    d_value[:, a:b] += dv[:, offset : offset + b - a]
                    offset += b - a
        return d_query.view(heads, total, dim), d_key.to(key.dtype), d_value.to(value.dtype), None, None, None, None


def _agrees(model: PreTrainedModel, kernel: Callable[..., Tensor], *, masks: Callable[..., Mapping[int | None, Any]] | None = None) -> bool:
    """Whether outputs and gradients of another kernel are `packed`'s up to rounding, on a small forest in the model's shape and dtype."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    nodes, total = (Node(0, 20, ()), Node(20, 50, ((0, 20),)), Node(50, TRIED, ((0, 20), (20, 50))), Node(TRIED, TRIED + 9, ())), TRIED + 9
    windows = (None, 16) if getattr(config, "sliding_window", None) else (None,)
    layout = Layout(nodes, None, masks(nodes, total, total, {*windows}, model.device) if masks is not None else {})
    generator, found = torch.Generator().manual_seed(0), []
    shapes = [(count, total, width) for count in (heads, *[getattr(config, "num_key_value_heads", None) or heads] * 2)]
    given = [torch.randn(shape, generator=generator).to(model.device, model.dtype).requires_grad_() for shape in shapes]
    toward = torch.randn(total, heads, width, generator=generator).to(model.device, model.dtype)
    both: tuple[Callable[..., Tensor], ...] = (packed, kernel)
    with torch.enable_grad():
        for each in both:
            outs = [each(*given, layout, width**-0.5, window, getattr(config, "attn_logit_softcapping", None)) for window in windows]
            found.append([tensor for out in outs for tensor in (out, *torch.autograd.grad(out, given, toward))])
    return all(bool((a - b).abs().max() <= AGREES[model.dtype] * b.abs().max()) for b, a in zip(*found, strict=True))


def refusal(
    model: PreTrainedModel, kernel: Callable[..., Tensor], *, masks: Callable[..., Mapping[int | None, Any]] | None = None
) -> str | None:
    """Why a kernel cannot stand in for `packed` in a model; None: it can.

    masks: makes what it needs of nodes, queries, keys, windows and device.
    """
    try:
        return None if _agrees(model, kernel, masks=masks) else "it computes something else"
    except Exception as error:  # no compiler, or shapes that the kernel does not take: torch raises whatever it pleases
        return f"it does not run: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
