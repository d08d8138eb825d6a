"""Elementwise work in bf16 on a CPU, in one pass over memory where torch takes several: what torch computes, up to rounding.

numba, which comes with the extra `cpu`, compiles the loops (`loops.py`) for this processor. Before the first is used, all are held against
torch on a few numbers. Where one disagrees or numba is missing everything stays with torch, and `unavailable` says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

AT_LEAST = 1 << 15  # numbers that are worth a thread of their own
_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)  # a fork has none of its parent's threads


@cache
def unavailable() -> str | None:
    """Why the loops are not used in this process; None: they are."""
    if find_spec("numba") is None:
        return "numba is not installed: pip install 'tunesmith[cpu]'"
    from .trial import wrong_loop

    wrong = wrong_loop()
    return None if wrong is None else f"{wrong} computes something else on this processor"


def fit(*tensors: Tensor) -> bool:
    """Whether the loops can take these: bf16, on a CPU, each in one piece."""
    return all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.is_contiguous() for t in tensors) and unavailable() is None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, rounded once."""
    out = torch.empty_like(gate)
    _spread(_loops().swiglu, gate.numel(), AT_LEAST, *map(_numbers, (gate, up, out)))
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """What gate and up get."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _spread(_loops().swiglu_backward, gate.numel(), AT_LEAST, *map(_numbers, (grad, gate, up, d_gate, d_up)))
    return d_gate, d_up


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x[..., H] rstd w and rstd[..., 1] (fp32)."""
    out, rstd = torch.empty_like(x), torch.empty(*x.shape[:-1], 1)
    arrays = (_rows(x), _numbers(weight), np.float32(epsilon), rstd.view(-1).numpy(), _rows(out))
    _spread(_loops().rms_norm, rstd.numel(), max(1, AT_LEAST // x.shape[-1]), *arrays)
    return out, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What x and the weight get; the weight's in fp32."""
    loops, d_x = _loops(), torch.empty_like(x)
    d_weight = torch.empty(-(-rstd.numel() // loops.ROW_BLOCK), x.shape[-1])
    arrays = (_rows(grad), _rows(x), rstd.view(-1).numpy(), _numbers(weight), _rows(d_x), d_weight.numpy())
    _spread(loops.rms_norm_backward, len(d_weight), 1, *arrays)
    return d_x, d_weight.sum(0)


def token_logprobs(raw_SV: Tensor, targets_S: Tensor, scale: float, *, entropy: bool, slope: bool) -> tuple[Tensor, Tensor]:
    """log softmax of `scale` raw at the targets, and its entropy if asked, [S] in fp32. slope: whether raw becomes d logprob / d raw."""
    logprobs, entropies = torch.empty(len(raw_SV)), torch.empty(len(raw_SV) if entropy else 0)
    arrays = (_rows(raw_SV), targets_S.numpy(), np.float32(scale), logprobs.numpy(), entropies.numpy(), entropy, slope)
    _spread(_loops().token_logprobs, len(raw_SV), 1, *arrays)
    return logprobs, entropies


def square(x: Tensor) -> Tensor:
    """The sum of squares, fp32."""
    loops = _loops()
    sums = np.empty(-(-x.numel() // loops.SUM_BLOCK))
    _spread(loops.squares, len(sums), 1, _numbers(x), sums)
    return torch.tensor(sums.sum(), dtype=torch.float32)


def adamw(weight: Tensor, rest: Tensor, gradient: Tensor, first: Tensor, second: Tensor, **numbers: float) -> None:
    """One AdamW step of a bf16 weight whose master's lower half is `rest`; the gradient in bf16 or fp32.

    numbers: factor (of the gradient), rate, beta1, beta2, epsilon, decay, correction1 (1 - beta1^t), correction2 (the root of 1 - beta2^t).
    """
    names = ("factor", "rate", "beta1", "beta2", "epsilon", "decay", "correction1", "correction2")
    arrays = [_numbers(t) for t in (weight, rest, gradient, first, second)]
    _spread(_loops().adamw, weight.numel(), AT_LEAST, *arrays, *(np.float32(numbers[name]) for name in names))


def gather(x_HTD: Tensor, tokens_Bn: np.ndarray, shared: int) -> Tensor:
    """[Hkv B, shared n, D]: of each kv head and block, the tokens of every head that shares it. x: also transposed from [T, H, D]."""
    heads, _, width = x_HTD.shape
    out = x_HTD.new_empty(heads // shared * len(tokens_Bn), shared * tokens_Bn.shape[1], width)
    _spread(_loops().gather, len(out), 1, *_by_token(x_HTD), tokens_Bn, shared, _words(out))
    return out


def scatter(values: Tensor, tokens_Bn: np.ndarray, real_B: np.ndarray, out_HTD: Tensor, shared: int) -> None:
    """What `gather` has taken apart, back in its places: of each block as many tokens as are real."""
    numbers, *steps = _by_token(out_HTD)
    _spread(_loops().scatter, len(values), 1, _words(values), tokens_Bn, real_B, shared, *steps, numbers)


def add(values: Tensor, tokens_Bm: np.ndarray, real_B: np.ndarray, out_HTD: Tensor) -> None:
    """The same for kv heads, added (fp32), since blocks share keys."""
    _spread(_loops().add, len(out_HTD), 1, _cube(values), tokens_Bm, real_B, out_HTD.numpy())


def softmax(scores: Tensor, queries_B: np.ndarray, keys_B: np.ndarray, shared: int, scale: float, window: int) -> None:
    """Softmax of `scale` scores[Hkv B, shared n, m] in their place, causal; window: how far back a query sees, 0 for all."""
    _spread(_loops().softmax, len(scores), 1, _cube(scores), queries_B, keys_B, shared, np.float32(scale), window)


def softmax_backward(grad: Tensor, probs: Tensor, queries_B: np.ndarray, shared: int, scale: float) -> None:
    """What the scores get, in the place of what `probs` got."""
    _spread(_loops().softmax_backward, len(grad), 1, _cube(grad), _cube(probs), queries_B, shared, np.float32(scale))


def _by_token(x_HTD: Tensor) -> tuple[np.ndarray, int, int]:
    """[heads x tokens, D], and how far heads and tokens lie apart in it."""
    heads, tokens = x_HTD.shape[:2]
    if x_HTD.is_contiguous():
        return _words(x_HTD).reshape(heads * tokens, -1), tokens, 1
    return _words(x_HTD.transpose(0, 1)).reshape(heads * tokens, -1), 1, heads


def _words(x: Tensor) -> np.ndarray:
    """A tensor's memory to be copied: four numbers in one where they are so many."""
    return x.detach().view(torch.int64).numpy() if x.shape[-1] % 4 == 0 else _cube(x)


def _cube(x: Tensor) -> np.ndarray:
    return _numbers(x).reshape(x.shape)


def _loops() -> Any:
    from . import loops  # numba takes a second to load

    return loops


def _numbers(x: Tensor) -> np.ndarray:
    """A tensor's memory in one row; bf16 as its bits."""
    x = x.detach().reshape(-1)
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _rows(x: Tensor) -> np.ndarray:
    """[n, H]."""
    return _numbers(x).reshape(-1, x.shape[-1])


def _spread(loop: Callable[..., None], count: int, least: int, *arguments: Any) -> None:
    """Runs a loop over [0, count), cut at whole multiples of `least` among as many threads as torch takes."""
    parts = min(torch.get_num_threads(), -(-count // least))
    if parts <= 1:
        loop(*arguments, 0, count)
        return
    cuts = [min(count, -(-count // least) * part // parts * least) for part in range(parts + 1)]
    if parts not in _pools:
        _pools[parts] = ThreadPoolExecutor(parts - 1)
    others = [_pools[parts].submit(loop, *arguments, begin, end) for begin, end in pairwise(cuts[1:])]
    loop(*arguments, cuts[0], cuts[1])
    for other in others:
        other.result()
