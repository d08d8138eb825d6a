"""The language-model head on supervised tokens only, in chunks: log-probabilities without the full logits.

For hidden states h[S, H], head weight W[V, H] and targets[S] it gives log softmax(W h)[target] and, if asked, the entropy.
Where the head is frozen the gradient towards h is formed in the forward pass (d logp / d h = W[target] - p W, exact), so that
the logits are computed once. Where it trains, their gradient is kept from the forward pass if it is small, else computed again in the
backward pass. Log-sum-exp is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 8 * 2**20  # of fp32 logits held at once
CHUNKS_AT_ONCE = 16  # of logits' gradients, in the model's dtype, behind one product for the gradient of a head that trains


def token_logprobs(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    targets_S: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(logprobs[S], entropy[S] if asked) in fp32; the entropy (nats) carries no gradient.

    softcap: cap * tanh(logit / cap), as in Gemma 2; scale multiplies the logits before it.
    """
    logprobs_S, entropy_S = _TokenLogprobs.apply(hidden_SH, weight_VH, bias_V, targets_S, softcap, scale, entropy)
    return logprobs_S, entropy_S if entropy else None


def _chunk(vocabulary: int) -> int:
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def logit_shape(config: Any) -> tuple[float | None, float]:
    """(softcap, scale) of a head's logits, as a model's text config names them: Gemma caps, Cohere multiplies, Granite divides."""
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return getattr(config, "final_logit_softcapping", None), scale


def shape_logits(raw_SV: Tensor, softcap: float | None, scale: float) -> Tensor:
    """The model's logits [S, V] from its head's products, which are overwritten: scaled, then capped."""
    if scale != 1.0:
        raw_SV.mul_(scale)
    return raw_SV if softcap is None else raw_SV.div_(softcap).tanh_().mul_(softcap)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """fp32 logits[S, V] and d logits / d scaled products, which is None where it is 1."""
    logits = shape_logits(torch.nn.functional.linear(hidden, weight, bias).float(), softcap, scale)
    return logits, None if softcap is None else 1 - (logits / softcap).square_()


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, scale, want_entropy):  # noqa: ANN001
        count, size = hidden.shape[0], _chunk(weight.shape[0])
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs) if want_entropy else logprobs.new_empty(0)
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        slope_SH = torch.empty_like(hidden) if frozen and hidden.requires_grad else None
        keep = not frozen and hidden.requires_grad and count <= CHUNKS_AT_ONCE * size
        d_raw_SV = hidden.new_empty(count, weight.shape[0]) if keep else None
        for a in range(0, count, size):
            h, t = hidden[a : a + size], targets[a : a + size]
            logits, curve = _logits(h, weight, bias, softcap, scale)
            logp = torch.log_softmax(logits, -1)
            logprobs[a : a + size] = logp.gather(1, t[:, None])[:, 0]
            if want_entropy:
                entropy[a : a + size] = -torch.linalg.vecdot(logp.exp(), logp)
            if slope_SH is not None:
                slope_SH[a : a + size] = _d_raw(logp.exp_(), t, curve, scale).to(weight.dtype) @ weight
            if d_raw_SV is not None:
                d_raw_SV[a : a + size] = _d_raw(logp.exp_(), t, curve, scale)
        ctx.save_for_backward(hidden, weight, bias, targets, slope_SH, d_raw_SV)
        ctx.shape = (softcap, scale)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_S, _):  # noqa: ANN001
        hidden, weight, bias, targets, slope_SH, kept_SV = ctx.saved_tensors
        if slope_SH is not None:
            return (slope_SH * grad_S[:, None]).to(hidden.dtype), None, None, None, None, None, None
        softcap, scale = ctx.shape
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = None
        d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if bias is not None and needs_bias else None
        size, count = _chunk(weight.shape[0]), hidden.shape[0]
        for begin in range(0, count, CHUNKS_AT_ONCE * size):
            end = min(begin + CHUNKS_AT_ONCE * size, count)
            d_raw_SV = kept_SV
            if d_raw_SV is None:
                d_raw_SV = hidden.new_empty(end - begin, weight.shape[0])
                for a in range(begin, end, size):
                    b = min(a + size, end)
                    logits, curve = _logits(hidden[a:b], weight, bias, softcap, scale)
                    d_raw_SV[a - begin : b - begin] = _d_raw(torch.softmax(logits, -1), targets[a:b], curve, scale)
            grad_S1 = grad_S[begin:end, None]
            if d_bias is not None:
                d_bias += (d_raw_SV.T @ grad_S1.to(d_raw_SV.dtype))[:, 0]
            if d_hidden is not None:
                d_hidden[begin:end] = (d_raw_SV @ weight) * grad_S1
            if needs_weight:
                part = d_raw_SV.T @ (hidden[begin:end] * grad_S1).to(hidden.dtype)
                if end - begin < count:
                    part = part.float()
                d_weight = part if d_weight is None else d_weight.add_(part)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _d_raw(probs: Tensor, targets: Tensor, curve: Tensor | None, scale: float) -> Tensor:
    """d logp[target] / d (W h + b), overwriting probs[S, V]."""
    d = probs.neg_()
    d[torch.arange(len(targets), device=d.device), targets] += 1
    if curve is not None:
        d.mul_(curve)
    return d.mul_(scale) if scale != 1.0 else d
