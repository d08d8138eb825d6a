"""The loops held against torch in fp64 on a few numbers, on this processor; those of attention: grouped.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels

ROUNDING = 2**-8  # a whole step of bf16 above a power of two, relative: one rounding is half of it
ROWS, WIDTH, VOCABULARY = 70, 72, 3000


def wrong_loop() -> str | None:
    """The name of the first that computes something else; None: all are right."""
    with torch.inference_mode(False), torch.enable_grad():  # wherever it is first asked
        return next((name for name, got, want, bound in _compared() if not _near(got, want, bound)), None)


def _near(got: Tensor, want: Tensor, bound: float) -> bool:
    return bool(((got.double() - want).abs() <= bound * (want.abs() + bound * want.abs().max())).all())


def _compared() -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(name, what a loop gives, what it should give, the bound)."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    gate, up, grad = (numbers(ROWS, WIDTH) for _ in range(3))
    gate *= 4
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    product = F.silu(g) * u
    yield "swiglu", kernels.swiglu(gate, up), product.detach(), ROUNDING
    for got, want in zip(kernels.swiglu_backward(grad, gate, up), torch.autograd.grad(product, (g, u), grad.double()), strict=True):
        yield "swiglu_backward", got, want, ROUNDING

    x, weight = up, numbers(WIDTH)
    wide, w = x.double().requires_grad_(), weight.double().requires_grad_()
    normed = F.rms_norm(wide, (WIDTH,), w, 1e-5)
    got, rstd = kernels.rms_norm(x, weight, 1e-5)
    yield "rms_norm", got, normed.detach(), 2 * ROUNDING
    exact = torch.autograd.grad(normed, (wide, w), grad.double())
    for got, want in zip(kernels.rms_norm_backward(grad, x, rstd, weight), exact, strict=True):
        yield "rms_norm_backward", got, want, 2 * ROUNDING

    raw = 4 * numbers(ROWS, VOCABULARY)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    logits = raw.double().requires_grad_()
    logp = torch.log_softmax(0.7 * logits, -1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    logprobs, entropy = kernels.token_logprobs(raw, targets, 0.7, entropy=True, slope=True)
    yield "token_logprobs", logprobs, chosen.detach(), 1e-5
    yield "token_logprobs", entropy, -(logp.exp() * logp).sum(-1).detach(), 1e-4
    yield "token_logprobs", raw, torch.autograd.grad(chosen.sum(), logits)[0], ROUNDING

    yield "attend_step", *_attended(numbers, 0)
    yield "attend_step", *_attended(numbers, 9)

    yield "square", kernels.square(grad)[None], grad.double().square().sum()[None], 1e-5
    yield from _adamw(numbers(3000), grad.view(-1)[:3000], numbers(3000, dtype=torch.float32))
    yield from _adamw(numbers(3000), grad.view(-1)[:3000].float(), numbers(3000, dtype=torch.float32))


def _attended(numbers: Callable[..., Tensor], window: int) -> tuple[Tensor, Tensor, float]:
    """A step of three rows, two heads on each of two kv heads, over six shared keys and up to seven of their own."""
    shared, used, scale, starts = 6, 8, 0.3, [1, 4, 7]
    query, keys, values, before = numbers(3, 4, 16), numbers(2, 3, 10, 16), numbers(2, 3, 10, 8), numbers(2, shared, 16)
    scores = torch.nn.functional.pad(query.view(3, 2, 2, 16).transpose(0, 1).reshape(2, 6, 16) @ before.mT, (0, 2))
    given, learned = scores[..., :shared].double(), numbers(2, shared, 8)
    own = kernels.attend_step(query, keys, values, scores, starts_B=np.array(starts), used=used, shared=shared, window=window, scale=scale)
    got = own.double() + (scores[..., :shared].double() @ learned.double()).view(2, 3, 2, 8).transpose(0, 1).reshape(3, 4, 8)
    want = torch.empty_like(got)
    for b, start in enumerate(starts):
        for head in range(4):
            kv = head // 2
            logits = torch.cat([given[kv, 2 * b + head % 2], keys[kv, b, start:used].double() @ query[b, head].double()]) * scale
            if window:
                logits[: max(0, len(logits) - window)] = -torch.inf
            want[b, head] = torch.softmax(logits, 0) @ torch.cat([learned[kv], values[kv, b, start:used]]).double()
    return got, want, 16 * ROUNDING  # sums of rounded terms that may come to nothing


def _adamw(weight: Tensor, gradient: Tensor, first: Tensor) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    second, place, count = first.square(), 10**10, len(weight)
    low = torch.arange(0, 20 * count, 20, dtype=torch.int32)
    master = _joined(weight, low, place).double()
    d = gradient.double() * 0.5
    m, v = 0.9 * first.double() + 0.1 * d, 0.9999 * second.double() + 0.0001 * d.square()
    moved = master * (1 - 1e-2 * 0.1) - 1e-2 * (m / 0.271) / (v.sqrt() / 0.1723 + 1e-8)
    named = {"factor": 0.5, "rate": 1e-2, "beta1": 0.9, "beta2": 0.9999, "epsilon": 1e-8, "decay": 0.1, "correction1": 0.271}
    low = low.to(torch.int16)
    kernels.adamw(weight, low, gradient, first, second, place=place, **named, correction2=0.1723)
    for got, want in ((_joined(weight, low.int() & 0xFFFF, place), moved), (first, m), (second, v)):
        yield "adamw", got, want, 1e-4


def _joined(weight: Tensor, low: Tensor, place: int) -> Tensor:
    """Masters of bf16 weights that were rounded up from thresholds (train/masters.py)."""
    thresholds = (torch.arange(len(weight)) + place) * 0x9E3779B1 % (1 << 32) >> 16
    upper = weight.view(torch.int16).int() - (low + thresholds >> 16).int()
    return (upper << 16 | low).view(torch.float32)
