"""Elementwise work in bf16 on a CPU, in one pass over memory where torch takes several: what torch computes, up to rounding.

The loops (`loops.c`) are compiled by the system's C compiler. Before the first is used they are held against torch on a few numbers
(`trial.py`), and those of attention in a small forest (`grouped.py`).
Where one disagrees or there is no compiler everything stays with torch, and `unavailable` says why.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .build import NotBuilt, load

AT_LEAST = 1 << 15  # numbers that are worth a thread of their own
SUM_BLOCK, ROW_BLOCK = 1 << 16, 64  # numbers, and rows, that one sum is made of: as in loops.c
_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)  # a fork has none of its parent's threads
_library = cache(load)
_left_out: list[str] = []


def unavailable() -> str | None:
    """Why the loops are not used in this process; None: they are."""
    return _left_out[0] if _left_out else _reason()


def leave_out(reason: str) -> None:
    """Has this process compute without them from here on: where another process of the run cannot have them, all do the same."""
    _left_out[:] = [reason]


@cache
def _reason() -> str | None:
    try:
        _library()
    except NotBuilt as error:
        return str(error)
    from .trial import wrong_loop

    wrong = wrong_loop()
    return None if wrong is None else f"{wrong} computes something else on this processor"


def fit(*tensors: Tensor) -> bool:
    """Whether the loops can take these: bf16, on a CPU, each in one piece."""
    return all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.is_contiguous() for t in tensors) and unavailable() is None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, rounded once."""
    out = torch.empty_like(gate)
    _spread("swiglu", gate.numel(), AT_LEAST, gate, up, out)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """What gate and up get."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _spread("swiglu_backward", gate.numel(), AT_LEAST, grad, gate, up, d_gate, d_up)
    return d_gate, d_up


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x[..., H] rstd w and rstd[..., 1] (fp32)."""
    out, rstd, width = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32), x.shape[-1]
    _spread("rms_norm", rstd.numel(), max(1, AT_LEAST // width), x, weight, float(epsilon), width, rstd, out)
    return out, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What x and the weight get; the weight's in fp32."""
    d_x, rows, width = torch.empty_like(x), rstd.numel(), x.shape[-1]
    d_weight = x.new_empty(-(-rows // ROW_BLOCK), width, dtype=torch.float32)
    _spread("rms_norm_backward", len(d_weight), 1, grad, x, rstd, weight, rows, width, d_x, d_weight)
    return d_x, d_weight.sum(0)


def token_logprobs(raw_SV: Tensor, targets_S: Tensor, scale: float, *, entropy: bool, slope: bool) -> tuple[Tensor, Tensor]:
    """log softmax of `scale` raw at the targets, and its entropy if asked, [S] in fp32. slope: whether raw becomes d logprob / d raw."""
    count, vocabulary = raw_SV.shape
    targets_S = targets_S.to(torch.int64).contiguous()
    if count and not 0 <= int(targets_S.min()) <= int(targets_S.max()) < vocabulary:
        raise IndexError(f"targets from {int(targets_S.min())} to {int(targets_S.max())} are not all among the head's {vocabulary} tokens")
    logprobs, entropies = (raw_SV.new_empty(n, dtype=torch.float32) for n in (count, count if entropy else 0))
    asked = (ctypes.c_int(entropy), ctypes.c_int(slope))
    _spread("token_logprobs", count, 1, raw_SV, targets_S, float(scale), vocabulary, logprobs, entropies, *asked)
    return logprobs, entropies


def square(x: Tensor) -> Tensor:
    """The sum of squares, fp32."""
    sums = x.new_empty(-(-x.numel() // SUM_BLOCK), dtype=torch.float64)
    _spread("squares", len(sums), 1, x, x.numel(), sums)
    return sums.sum().float()


def adamw(weight: Tensor, low: Tensor, gradient: Tensor, first: Tensor, second: Tensor, *, place: int = 0, **numbers: float) -> None:
    """One AdamW step of bf16 weights whose masters' lower halves are `low`; the gradient in bf16 or fp32.

    place: of the first weight, by which it is rounded (train/masters.py).
    numbers: factor (of the gradient), rate, beta1, beta2, epsilon, decay, correction1 (1 - beta1^t), correction2 (the root of 1 - beta2^t).
    """
    numbers |= {"rest1": 1 - numbers["beta1"], "rest2": 1 - numbers["beta2"]}
    names = ("factor", "rate", "rest1", "beta2", "rest2", "epsilon", "decay", "correction1", "correction2")
    loop = "adamw_bf16" if gradient.dtype == torch.bfloat16 else "adamw_fp32"
    _spread(loop, weight.numel(), AT_LEAST, weight, low, gradient, first, second, place, *(float(numbers[name]) for name in names))


def gather(x_HTD: Tensor, tokens_Bn: np.ndarray, shared: int) -> Tensor:
    """[Hkv B, shared n, D]: of each kv head and block, the tokens of every head that shares it. x: also transposed from [T, H, D]."""
    (heads, _, width), (blocks, n) = x_HTD.shape, tokens_Bn.shape
    out = x_HTD.new_empty(heads // shared * blocks, shared * n, width)
    _spread("gather", len(out), 1, x_HTD, *_steps(x_HTD), tokens_Bn, blocks, n, shared, width * x_HTD.itemsize, out)
    return out


def scatter(values: Tensor, tokens_Bn: np.ndarray, real_B: np.ndarray, out_HTD: Tensor, shared: int) -> None:
    """What `gather` has taken apart, back in its places: of each block as many tokens as are real."""
    size = out_HTD.shape[-1] * out_HTD.itemsize
    _spread("scatter", len(values), 1, values, tokens_Bn, real_B, *tokens_Bn.shape, shared, size, *_steps(out_HTD), out_HTD)


def add(values: Tensor, tokens_Bm: np.ndarray, real_B: np.ndarray, out_HTD: Tensor) -> None:
    """The same for kv heads, added (fp32), since blocks share keys."""
    heads, total, width = out_HTD.shape
    _spread("add", heads, 1, values, tokens_Bm, real_B, *tokens_Bm.shape, width, total, out_HTD)


def softmax(scores: Tensor, queries_B: np.ndarray, keys_B: np.ndarray, shared: int, scale: float, window: int) -> None:
    """Softmax of `scale` scores[Hkv B, shared n, m] in their place, causal; window: how far back a query sees, 0 for all."""
    sizes = (len(queries_B), *scores.shape[1:], shared)
    _spread("softmax", len(scores), 1, scores, queries_B, keys_B, *sizes, float(scale), window)


def attend_step(
    query_BHD: Tensor,
    keys_KBSD: Tensor,
    values_KBSD: Tensor,
    scores_KRP: Tensor | None,
    *,
    starts_B: np.ndarray,
    used: int,
    shared: int,
    window: int,
    scale: float,
) -> Tensor:
    """What the values of each row's own slots give a step's token, [B, H, Dv]; slots are starts[b] up to the one before `used`.

    scores: of the `shared` keys that all rows begin with, [K, B x heads of a kv head or more, `shared` or more], which become
    probabilities; None where there are none. window: how far back a token sees, 0 for all.
    """
    (rows, heads, width), kv_heads, value_width = query_BHD.shape, len(keys_KBSD), values_KBSD.shape[-1]
    out = query_BHD.new_empty(rows, heads, value_width)
    lines, filled = (0, 0) if scores_KRP is None else scores_KRP.shape[1:]
    sizes = (rows, kv_heads, heads // kv_heads, keys_KBSD.shape[2], used, width, value_width, shared, lines, filled)
    least = max(1, AT_LEAST // ((shared + used) * width * (heads // kv_heads)))
    _spread(
        "attend_step",
        kv_heads * rows,
        least,
        query_BHD,
        keys_KBSD,
        values_KBSD,
        starts_B,
        *sizes,
        window,
        float(scale),
        out if scores_KRP is None else scores_KRP,
        out,
    )
    return out


def _steps(x_HTD: Tensor) -> tuple[int, int]:
    """How far heads and tokens lie apart, in rows of D."""
    heads, tokens = x_HTD.shape[:2]
    return (tokens, 1) if x_HTD.is_contiguous() else (1, heads)


def _given(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument


def _spread(name: str, count: int, least: int, *arguments: Any) -> None:
    """Runs a loop over [0, count), cut at whole multiples of `least` among as many threads as torch takes.

    Arguments are handed over as C has them: tensors and arrays by their memory, which must be in one piece, int as int64_t.
    """
    loop, given = getattr(_library(), name), [_given(argument) for argument in arguments]
    steps = -(-count // least)
    parts = min(torch.get_num_threads(), steps)
    if parts <= 1:
        loop(*given, ctypes.c_int64(0), ctypes.c_int64(count))
        return
    cuts = [min(count, steps * part // parts * least) for part in range(parts + 1)]
    if parts not in _pools:
        _pools[parts] = ThreadPoolExecutor(parts - 1)
    others = [_pools[parts].submit(partial(loop, *given, ctypes.c_int64(a), ctypes.c_int64(b))) for a, b in pairwise(cuts[1:])]
    try:
        loop(*given, ctypes.c_int64(0), ctypes.c_int64(cuts[1]))
    finally:
        wait(others)  # whatever ends this one: they write to memory that it holds
    for other in others:
        other.result()
