"""The language-model head on supervised tokens only: log-probabilities without the full logits.

For hidden states h[S, H], head weight W[V, H] and targets[S] it gives log softmax(W h)[target] and, if asked, the entropy.
Where the head is frozen the gradient towards h is formed in the forward pass (d logp / d h = W[target] - p W, exact), so that
the logits are computed once. Where it trains, their gradient is kept from the forward pass if it is small, else computed again in the
backward pass. Products are of many tokens, in the model's dtype; what lies between them takes fewer at a time, in fp32 and in cache, and
leaves the logits' gradient in the logits' place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels


class Room(NamedTuple):
    """Bytes of logits, counted as fp32, that are held at once."""

    chunk: int
    """In fp32."""
    frozen: int
    """In the model's dtype, of a head that does not train."""
    trained: int
    """In the model's dtype, of one that does: its gradient is as large as the head, and is made once for all of these."""


ROOM = {"cpu": Room(2 * 2**20, 32 * 2**20, 128 * 2**20), "cuda": Room(32 * 2**20, 128 * 2**20, 512 * 2**20)}
"""A chunk stays in a processor's cache; a GPU wants work enough for all of it."""


def room_on(device: str) -> Room:
    """Of a kind of device."""
    return ROOM.get(device, ROOM["cuda"])


def token_logprobs(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    targets_S: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    fast: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(logprobs[S], entropy[S] if asked) in fp32; the entropy (nats) carries no gradient.

    softcap: cap * tanh(logit / cap), as in Gemma 2; scale multiplies the logits before it. fast: whether compiled loops may be used.
    """
    logprobs_S, entropy_S = _TokenLogprobs.apply(hidden_SH, weight_VH, bias_V, targets_S, softcap, scale, entropy, fast)
    return logprobs_S, entropy_S if entropy else None


def _spans(count: int, size: int) -> Iterator[slice]:
    return (slice(a, min(a + size, count)) for a in range(0, count, size))


def _rows(room: int, vocabulary: int) -> int:
    return max(1, room // (4 * vocabulary))


def logit_shape(config: Any) -> tuple[float | None, float]:
    """(softcap, scale) of a head's logits, as a model's text config names them: Gemma caps, Cohere multiplies, Granite divides."""
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return getattr(config, "final_logit_softcapping", None), scale


def shape_logits(raw_SV: Tensor, softcap: float | None, scale: float) -> Tensor:
    """The model's logits [S, V] from its head's products, which are overwritten: scaled, then capped."""
    if scale != 1.0:
        raw_SV.mul_(scale)
    return raw_SV if softcap is None else raw_SV.div_(softcap).tanh_().mul_(softcap)


def _logits(raw: Tensor, softcap: float | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """fp32 logits[S, V] of the head's products and d logits / d scaled products, which is None where it is 1."""
    logits = shape_logits(raw.float(), softcap, scale)
    return logits, None if softcap is None else 1 - (logits / softcap).square_()


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, scale, want_entropy, fast):  # noqa: ANN001
        count, vocabulary = hidden.shape[0], weight.shape[0]
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        room = room_on(hidden.device.type)
        at_once = _rows(room.frozen if frozen else room.trained, vocabulary)
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs) if want_entropy else logprobs.new_empty(0)
        slope_SH = torch.empty_like(hidden) if frozen and hidden.requires_grad else None
        keep = not frozen and hidden.requires_grad and count <= at_once
        raw_SV = None
        for block in _spans(count, at_once):
            raw_SV = None  # the last one's goes before the next is made
            raw_SV = torch.nn.functional.linear(hidden[block], weight, bias)
            slope = keep or slope_SH is not None
            logprobs[block], found = _logprobs(raw_SV, targets[block], softcap, scale, entropy=want_entropy, slope=slope, fast=fast)
            if want_entropy:
                entropy[block] = found
            if slope_SH is not None:
                slope_SH[block] = raw_SV @ weight
        ctx.save_for_backward(hidden, weight, bias, targets, slope_SH, raw_SV if keep else None)
        ctx.shape = (softcap, scale)
        ctx.at_once, ctx.fast = at_once, fast
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_S, _):  # noqa: ANN001
        hidden, weight, bias, targets, slope_SH, kept_SV = ctx.saved_tensors
        if slope_SH is not None:
            return (slope_SH * grad_S[:, None]).to(hidden.dtype), None, None, None, None, None, None, None
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = None
        d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if bias is not None and needs_bias else None
        for block in _spans(hidden.shape[0], ctx.at_once):
            d_raw_SV = kept_SV  # the last block's goes before the next is made
            if d_raw_SV is None:
                d_raw_SV = torch.nn.functional.linear(hidden[block], weight, bias)
                _logprobs(d_raw_SV, targets[block], *ctx.shape, entropy=False, slope=True, fast=ctx.fast)
            grad_S1 = grad_S[block, None]
            if d_bias is not None:
                d_bias += (d_raw_SV.T @ grad_S1.to(d_raw_SV.dtype))[:, 0]
            if d_hidden is not None:
                d_hidden[block] = (d_raw_SV @ weight) * grad_S1
            if needs_weight:
                part = d_raw_SV.T @ (hidden[block] * grad_S1).to(hidden.dtype)
                if d_weight is not None:
                    d_weight.add_(part)
                else:
                    d_weight = part.float() if ctx.at_once < hidden.shape[0] else part
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def _logprobs(
    raw_SV: Tensor, targets_S: Tensor, softcap: float | None, scale: float, *, entropy: bool, slope: bool, fast: bool
) -> tuple[Tensor, Tensor]:
    """(logprobs[S], entropy[S] if asked) of the head's products. slope: whether these become d logprob / d product."""
    if fast and softcap is None and scale > 0 and kernels.fit(raw_SV):
        return kernels.token_logprobs(raw_SV, targets_S, scale, entropy=entropy, slope=slope)
    logprobs = torch.empty(len(raw_SV), dtype=torch.float32, device=raw_SV.device)
    entropies = torch.empty_like(logprobs) if entropy else logprobs.new_empty(0)
    for chunk in _spans(len(raw_SV), _rows(room_on(raw_SV.device.type).chunk, raw_SV.shape[1])):
        logits, curve = _logits(raw_SV[chunk], softcap, scale)
        logp, t = torch.log_softmax(logits, -1), targets_S[chunk]
        logprobs[chunk] = logp.gather(1, t[:, None])[:, 0]
        if entropy:
            entropies[chunk] = -torch.linalg.vecdot(logp.exp(), logp)
        if slope:
            raw_SV[chunk] = _d_raw(logp.exp_(), t, curve, scale)
    return logprobs, entropies


def _d_raw(probs: Tensor, targets: Tensor, curve: Tensor | None, scale: float) -> Tensor:
    """d logp[target] / d (W h + b), overwriting probs[S, V]."""
    d = probs.neg_()
    d[torch.arange(len(targets), device=d.device), targets] += 1
    if curve is not None:
        d.mul_(curve)
    return d.mul_(scale) if scale != 1.0 else d
