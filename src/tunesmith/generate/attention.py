"""Attention over a shared prefix and each row's own suffix, as a function that transformers calls in place of its own.

Takes queries from any model whose attention goes through transformers' AttentionInterface, and the keys and values of a `PrefixCache`;
gives the attended values. Scores over the prefix are one matrix product a key-value head for all rows together, scores over the suffixes
one a row and head, and one softmax in float32 runs over both. In bf16 on a CPU compiled loops do what is no large product, where they are
available, and prompts are read block by block as in training, the prefix's keys gathered for each block. Exact up to rounding. Every extra
argument is honoured (scaling, softcap, sliding window) or refused by name with ModelError (sinks, position bias, dropout, bidirectional or
chunked patterns).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..errors import ModelError
from ..models import kernels
from ..models.attention import KEY_STEP, QUERY_STEP, Layout, in_few_shapes
from ..models.grouped import grouped
from .cache import Block, PrefixCache, PrefixLayer

NAME = "tunesmith_shared_prefix"

# Masks are kept for all layers where a pass has at most this many blocks, else made anew: long rows would hold as much as their scores.
CACHED_MASKS = 64
_UNKNOWN = object()

# What models pass along that does not change attention.
_HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep"}

_active: ContextVar[PrefixCache | None] = ContextVar("tunesmith_prefix_cache", default=None)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Has the model, and every part of it with a config of its own, use the named attention; what was set before comes back after."""
    configs: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            configs.setdefault(id(config), config)
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


@contextmanager
def attending(cache: PrefixCache) -> Iterator[None]:
    """Names the cache that attention reads, for one forward pass."""
    cache.attended.clear()
    token = _active.set(cache)
    try:
        yield
    finally:
        _active.reset(token)


def window_mask(
    *, attention_mask: torch.Tensor | None = None, local_size: int | None = None, use_vmap: bool = False, **kwargs: object
) -> torch.Tensor:
    """What transformers takes for a mask: one number, the sliding window's width in tokens, or 0 for none. Never a T x T tensor."""
    if use_vmap or attention_mask is not None or "allow_is_bidirectional_skip" in kwargs:
        raise ModelError("this model's attention mask is not a plain causal or sliding one", where="attention mask")
    return torch.tensor([local_size or 0])


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """query [1, H, N, D] (rows) or [B, H, 1, D] (step) -> ([1, N, H, Dv] or [B, 1, H, Dv], None); keys and values come from the cache."""
    cache = _active.get()
    if cache is None:
        raise ModelError(f"attention {NAME!r} was called outside of generation", where=type(module).__name__)
    refused = [name for name, given in kwargs.items() if name not in _HARMLESS and given is not None and given is not False]
    if kwargs.get("output_attentions"):
        refused.append("output_attentions")
    if dropout:
        refused.append("dropout")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        refused.append("is_causal=False")
    if refused:
        raise ModelError(f"shared-prefix attention does not know {', '.join(refused)}", where=type(module).__name__)
    window = int(attention_mask[0]) if attention_mask is not None else sliding_window or 0
    if sliding_window is not None and sliding_window != window:
        raise ModelError(f"the layer says sliding window {sliding_window}, its mask {window}", where=type(module).__name__)
    cache.attended.append(cache.last_updated)
    layer = cache.layers[cache.last_updated]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    step = cache.layout.kind == "step"
    fit = cache.loops and query.dtype == layer.keys.dtype and kernels.fit(layer.keys, layer.values)
    if softcap or scaling <= 0 or not fit:
        attended_NHD = attend(query[:, :, 0] if step else query[0].transpose(0, 1), layer, scaling, softcap or 0.0, window)
    elif step:
        attended_NHD = _step_by_loops(query[:, :, 0], layer, scaling, window)
    else:
        attended_NHD = _rows_by_loops(query[0], key[0], value[0], layer, scaling, window)
    return attended_NHD.unsqueeze(1 if step else 0), None


def _rows_by_loops(
    query_HND: torch.Tensor, key_KND: torch.Tensor, value_KND: torch.Tensor, layer: PrefixLayer, scaling: float, window: int
) -> torch.Tensor:
    """Attended values [N, H, Dv] of a pass over rows: the attention of training, over a forest of one root."""
    if P := layer.layout.prefix:
        key_KND, value_KND = (torch.cat((own, shared[:, :P]), 1) for own, shared in zip((key_KND, value_KND), layer.prefix, strict=True))
    return grouped(query_HND, key_KND, value_KND, Layout(layer.layout.nodes()), scaling, window or None, None)


def _step_by_loops(query_BHD: torch.Tensor, layer: PrefixLayer, scaling: float, window: int) -> torch.Tensor:
    """Attended values [B, H, Dv] of a step: products over the prefix for all rows together, and one loop for all that is a row's own."""
    (B, H, D), layout, scores = query_BHD.shape, layer.layout, None
    K, rows = len(layer.keys), B * H // len(layer.keys)
    if layout.prefix:
        query_KRD = query_BHD.reshape(B, K, H // K, D).transpose(0, 1).reshape(K, rows, D)
        query_KRD = torch.nn.functional.pad(query_KRD, (0, 0, 0, -rows % QUERY_STEP if rows > QUERY_STEP else 0))
        scores = torch.bmm(query_KRD, layer.prefix[0].transpose(1, 2))
    how = {"starts_B": layout.start_array(), "used": layout.used, "shared": layout.prefix, "window": window, "scale": scaling}
    attended_BHD = kernels.attend_step(query_BHD.contiguous(), layer.keys, layer.values, scores, **how)
    if scores is None:
        return attended_BHD
    of_prefix = torch.bmm(scores, layer.prefix[1])[:, :rows].view(K, B, H // K, -1).transpose(0, 1)
    return attended_BHD.add_(of_prefix.reshape(B, H, -1))


def attend(query_NHD: torch.Tensor, layer: PrefixLayer, scaling: float, softcap: float, window: int) -> torch.Tensor:
    """Attended values [N, H, Dv] of the pass's tokens, block by block; softcap 0 and window 0 mean none."""
    layout = layer.layout
    blocks = layout.blocks(query_NHD.shape[1])
    attended = []
    for number, block in enumerate(blocks):
        end = block.first_query + block.queries
        if in_few_shapes(query_NHD):  # slots beyond are zeros, and hidden
            end += -(end - block.first_key) % KEY_STEP
        hidden = layout.masks.get((number, window), _UNKNOWN)
        if hidden is _UNKNOWN:
            hidden = hidden_keys(layout.start_B[block.rows], layout.prefix, block, window, end)
            if len(blocks) <= CACHED_MASKS:
                layout.masks[number, window] = hidden
        attended.append(_attend_block(query_NHD[block.tokens], layer, block, end, scaling, softcap, hidden))
    return torch.cat(attended) if len(attended) > 1 else attended[0]


def _attend_block(
    query_NHD: torch.Tensor, layer: PrefixLayer, block: Block, end: int, scaling: float, softcap: float, hidden_BTS: torch.Tensor | None
) -> torch.Tensor:
    """attend() for the tokens of one block, whose keys are those of the slots before `end`; hidden is what `hidden_keys` gives for it."""
    H, D = query_NHD.shape[1:]
    B, T, P = block.rows.stop - block.rows.start, block.queries, layer.layout.prefix
    own_slots = slice(block.first_key, end)
    keys_KBSD, values_KBSD = layer.keys[:, block.rows, own_slots], layer.values[:, block.rows, own_slots]
    K, G, S, Dv = keys_KBSD.shape[0], H // keys_KBSD.shape[0], keys_KBSD.shape[2], values_KBSD.shape[3]
    if block.flat is not None:
        query_NHD = query_NHD.new_zeros(B * T, H, D).index_copy_(0, block.flat, query_NHD)
    query_KBD = query_NHD.reshape(B, T, K, G, D).permute(2, 0, 3, 1, 4).reshape(K, B * G * T, D)
    scores = _product(query_KBD.reshape(K * B, G * T, D), keys_KBSD.flatten(0, 1).transpose(1, 2)).reshape(K, B, G, T, S)
    if P:
        prefix_keys, prefix_values = layer.prefix
        prefix_scores = _product(query_KBD, prefix_keys.transpose(1, 2))[..., :P].reshape(K, B, G, T, P)
        scores = torch.cat((prefix_scores, scores), dim=-1)
    scores = scores.float().mul_(scaling)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if hidden_BTS is not None:
        scores.masked_fill_(hidden_BTS[None, :, None], torch.finfo(torch.float32).min)
    weights = torch.softmax(scores, dim=-1).to(query_NHD.dtype)
    attended = _product(weights[..., P:].reshape(K * B, G * T, S), values_KBSD.flatten(0, 1)).reshape(K, B * G * T, Dv)
    if P:
        attended += _product(weights[..., :P].reshape(K, B * G * T, P), prefix_values)
    attended_NHD = attended.view(K, B, G, T, Dv).permute(1, 3, 0, 2, 4).reshape(B * T, H, Dv)
    return attended_NHD if block.flat is None else attended_NHD[block.flat]


def _product(a_XRI: torch.Tensor, b_XJM: torch.Tensor) -> torch.Tensor:
    """[X, R, M] of a's R rows and the first I of b's J rows, those beyond being zeros.

    In 16 bits on a CPU a's rows are filled up to whole steps for it, if there are more than one step has.
    """
    rows, filling = a_XRI.shape[1], 0
    if in_few_shapes(a_XRI) and rows > QUERY_STEP:
        filling = -rows % QUERY_STEP
    wider = b_XJM.shape[1] - a_XRI.shape[2]
    if filling or wider:
        a_XRI = torch.nn.functional.pad(a_XRI, (0, wider, 0, filling))
    return torch.bmm(a_XRI, b_XJM)[:, :rows]


def hidden_keys(start_B: torch.Tensor, prefix: int, block: Block, window: int, end: int) -> torch.Tensor | None:
    """Which keys the block's queries must not see, true where hidden: [B, T, prefix + S], or None where they see all.

    S counts the slots from block.first_key to the one before `end`. A query in slot s of a row that starts at slot r stands at position
    prefix + s - r. It sees the prefix, and its own row's slots from r to s; with a window only keys less than `window` positions before it.
    """
    device = start_B.device
    key_S = torch.arange(block.first_key, end, device=device)
    query_T = torch.arange(block.first_query, block.first_query + block.queries, device=device)
    position_BT = prefix + query_T - start_B[:, None]
    hidden_BTS = (key_S < start_B[:, None, None]) | (key_S > query_T[:, None])
    hidden_BTP = torch.zeros(*position_BT.shape, prefix, dtype=torch.bool, device=device)
    if window:
        hidden_BTS |= query_T[:, None] - key_S >= window
        hidden_BTP |= position_BT[..., None] - torch.arange(prefix, device=device) >= window
    hidden = torch.cat((hidden_BTP, hidden_BTS), dim=-1)
    return hidden if bool(hidden.any()) else None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, window_mask)
