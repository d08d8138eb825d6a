"""The loops, compiled by numba for this processor, over arrays that hold bf16 as its 16 bits (uint16).

Each takes whole rows or a stretch of numbers, works in fp32 and rounds once where it writes. Loops are written one after another over a row
that stays in cache, each simple enough for the compiler to take many numbers at once (so they count from 0: an index that might be
negative is looked at one by one); sums are loops of their own, since only there may
the order change. A NaN goes through: it is never compared away. Compiled code is kept on disk for the next process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

BLOCK = 2048  # numbers at once where there are no rows: what lies between two loops stays in the first cache
SUM_BLOCK, ROW_BLOCK = 1 << 16, 64  # numbers, and rows, that one sum is made of, whatever the number of threads
LEAST = np.float32(-70)  # of an exponent: what is made of it is still a normal number, as slow as any other
MOST = np.float32(80)
HALF_UP = np.uint32(0x7FFF)
ONE = np.float32(1)
UNSEEN = np.float32(-3e38)
SHIFT = np.float32(12582912)  # 1.5 x 2^23: what is added to it is rounded to a whole number


def _compiled(loop: Callable[..., Any], *, sums: bool = False) -> Callable[..., Any]:
    """sums: whether the order of additions may change."""
    made = njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"} if sums else {"contract"})(loop)
    with suppress(RuntimeError):  # where there is no folder to keep it in
        made.enable_caching()
    return made


def loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled when it is first called."""
    return _compiled(function)


def summing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and sums in any order."""
    return _compiled(function, sums=True)


def wide(number: Any) -> np.float32:
    """fp32 of bf16's bits, or of fp32; compiled code takes one or the other, as the array's type says."""
    return np.uint32(np.uint32(number) << 16).view(np.float32) if isinstance(number, np.uint16) else np.float32(number)


@overload(wide, inline="always")
def _wide(number):
    if number == types.uint16:
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: np.float32(number)


@njit(inline="always")
def narrow(number):
    """bf16's bits of fp32, to the nearest and halfway to the even one; a NaN's stay a NaN's."""
    bits = np.float32(number).view(np.uint32)
    rounded = np.uint32(bits + np.uint32(HALF_UP + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))))
    if np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        rounded = np.uint32(bits | np.uint32(0x400000))
    return np.uint16(np.uint32(rounded >> np.uint32(16)))


@njit(inline="always")
def exp(x):
    """e^x to an fp32's last bits: 2^n times a polynomial of what is left (Cephes' expf)."""
    if x < LEAST:
        x = LEAST
    if x > MOST:
        x = MOST
    shifted = np.float32(x * np.float32(1.44269504) + SHIFT)  # its lowest bits are n
    n = np.float32(shifted - SHIFT)
    r = np.float32(x - n * np.float32(0.693359375))
    r = np.float32(r + n * np.float32(2.12194440e-4))
    p = np.float32(1.9875691500e-4)
    p = np.float32(p * r + np.float32(1.3981999507e-3))
    p = np.float32(p * r + np.float32(8.3334519073e-3))
    p = np.float32(p * r + np.float32(4.1665795894e-2))
    p = np.float32(p * r + np.float32(1.6666665459e-1))
    p = np.float32(p * r + np.float32(5.0000001201e-1))
    p = np.float32(p * np.float32(r * r) + np.float32(r + ONE))
    return np.uint32(p.view(np.uint32) + np.uint32(shifted.view(np.uint32) << np.uint32(23))).view(np.float32)


@summing
def _dot(a, b):
    total = np.float32(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@summing
def _total(a):
    total = 0.0
    for begin in range(0, a.size, BLOCK):
        part, block = a[begin : begin + BLOCK], np.float32(0)
        for i in range(part.size):
            block += part[i]
        total += block
    return total


@summing
def _square(a):
    total = np.float32(0)
    for i in range(a.size):
        x = wide(a[i])
        total += x * x
    return total


@loop
def squares(a, out, begin, end):
    """out[b] (fp64): the sum of the squares of a's block b."""
    for block in range(begin, end):
        out[block] = 0.0
        for start in range(block * SUM_BLOCK, min((block + 1) * SUM_BLOCK, a.size), BLOCK):
            out[block] += _square(a[start : min(start + BLOCK, (block + 1) * SUM_BLOCK)])


@loop
def swiglu(gate, up, out, begin, end):
    """out = silu(gate) up."""
    gates, ups, outs = gate[begin:end], up[begin:end], out[begin:end]
    for i in range(outs.size):
        g = wide(gates[i])
        outs[i] = narrow(g / (ONE + exp(-g)) * wide(ups[i]))


@loop
def swiglu_backward(grad, gate, up, d_gate, d_up, begin, end):
    """What gate and up get; silu's derivative is s (1 + g (1 - s)), s the logistic function."""
    grads, gates, ups, d_gates, d_ups = grad[begin:end], gate[begin:end], up[begin:end], d_gate[begin:end], d_up[begin:end]
    for i in range(grads.size):
        dy, g, u = wide(grads[i]), wide(gates[i]), wide(ups[i])
        s = ONE / (ONE + exp(-g))
        d_ups[i] = narrow(dy * g * s)
        d_gates[i] = narrow(dy * u * s * (ONE + g * (ONE - s)))


@loop
def rms_norm(x, weight, eps, rstd, out, begin, end):
    """out[n, H] = x rstd w, rounded before w as the models do; rstd[n]."""
    width = x.shape[1]
    for row in range(begin, end):
        a, o = x[row], out[row]
        r = ONE / np.sqrt(np.float32(_square(a) / np.float32(width)) + eps)
        rstd[row] = r
        for i in range(width):
            o[i] = narrow(wide(narrow(wide(a[i]) * r)) * wide(weight[i]))


@loop
def rms_norm_backward(grad, x, rstd, weight, d_x, d_weight, begin, end):
    """d_x[n, H], and d_weight[b, H] (fp32) that the rows of block b give."""
    width = x.shape[1]
    normed, towards = np.empty(width, np.float32), np.empty(width, np.float32)
    for block in range(begin, end):
        dw = d_weight[block]
        dw[:] = np.float32(0)
        for row in range(block * ROW_BLOCK, min((block + 1) * ROW_BLOCK, x.shape[0])):
            a, dy, dx, r = x[row], grad[row], d_x[row], rstd[row]
            for i in range(width):
                normed[i] = wide(a[i]) * r
            for i in range(width):
                dw[i] += wide(dy[i]) * normed[i]
            for i in range(width):
                towards[i] = wide(dy[i]) * wide(weight[i])
            along = -_dot(towards, normed) / np.float32(width)
            for i in range(width):
                dx[i] = narrow((towards[i] + normed[i] * along) * r)


@njit(inline="always")
def _ordered(bits):
    """An int16 that is larger where the bf16 number is, and its own inverse; a NaN's is beyond all numbers, or below all."""
    signed = np.int16(bits)
    return np.int16(signed ^ np.int16(np.int16(signed >> np.int16(15)) & np.int16(0x7FFF)))


@loop
def token_logprobs(raw, targets, scale, logprobs, entropy, want_entropy, want_slope, begin, end):
    """Of scale raw[n, V], the logits: log softmax at the target, the entropy, and in their place d logprob / d raw."""
    vocabulary = raw.shape[1]
    e, below = np.empty(vocabulary, np.float32), np.empty(vocabulary if want_entropy else 0, np.float32)
    for row in range(begin, end):
        x, target = raw[row], targets[row]
        highest = np.int16(-32768)
        for i in range(vocabulary):
            highest = max(highest, _ordered(x[i]))
        largest = wide(np.uint16(_ordered(highest)))
        for i in range(vocabulary):
            e[i] = exp((wide(x[i]) - largest) * scale)
        total = _total(e)
        logprobs[row] = np.float32(np.float64((wide(x[target]) - largest) * scale) - np.log(total))
        if want_entropy:
            for i in range(vocabulary):
                below[i] = (wide(x[i]) - largest) * scale
            entropy[row] = np.float32(np.log(total) - _dot(e, below) / total)
        if want_slope:
            share = np.float32(-1.0 / total)
            at_target = scale * (ONE + e[target] * share)
            share *= scale
            for i in range(vocabulary):
                x[i] = narrow(e[i] * share)
            x[target] = narrow(at_target)


@loop
def adamw(weight, rest, grad, first, second, factor, rate, beta1, beta2, epsilon, decay, correction1, correction2, begin, end):
    """One AdamW step of masters whose upper halves are bf16 weights and whose lower halves lie in rest; see train/masters.py."""
    master = np.empty(BLOCK, np.float32)
    bits = master.view(np.int32)
    keep, pace, rest1, rest2 = ONE - rate * decay, rate / correction1, ONE - beta1, ONE - beta2
    for start in range(begin, end, BLOCK):
        stop = min(start + BLOCK, end)
        w, low, g, m, v = weight[start:stop], rest[start:stop], grad[start:stop], first[start:stop], second[start:stop]
        for i in range(w.size):
            bits[i] = np.int32(np.int32(np.uint32(np.uint32(w[i]) << np.uint32(16))) + np.int32(low[i]))
        for i in range(w.size):
            d = wide(g[i]) * factor
            a = m[i] + rest1 * (d - m[i])
            b = beta2 * v[i] + rest2 * d * d
            m[i], v[i] = a, b
            master[i] = master[i] * keep - pace * a / (np.sqrt(b) / correction2 + epsilon)
        for i in range(w.size):
            low[i] = max(np.int16(bits[i]), np.int16(-32767))
            rounded = np.int32(min(bits[i], np.int32(0x7FFF7FFF)) + np.int32(32768))
            w[i] = np.uint16(np.uint32(np.uint32(rounded) >> np.uint32(16)))


@loop
def gather(x, head_step, token_step, tokens, groups, out, begin, end):
    """out[p, g, i] = x[head head_step + tokens[b, i] token_step], of p = (kv, b) and head = (kv, g): blocks of tokens, kv heads apart."""
    blocks, count = tokens.shape
    for part in range(begin, end):
        first, block = part // blocks * groups, part % blocks
        for group in range(groups):
            for i in range(count):
                _copy(x[(first + group) * head_step + tokens[block, i] * token_step], out[part, group * count + i])


@loop
def scatter(values, tokens, real, groups, head_step, token_step, out, begin, end):
    """The way back: what stands for a block's first real[b] tokens is put in their places."""
    blocks, count = tokens.shape
    for part in range(begin, end):
        first, block = part // blocks * groups, part % blocks
        for group in range(groups):
            for i in range(real[block]):
                _copy(values[part, group * count + i], out[(first + group) * head_step + tokens[block, i] * token_step])


@njit(inline="always")
def _copy(source, to):
    for d in range(to.size):
        to[d] = source[d]


@loop
def add(values, tokens, real, out, begin, end):
    """out[kv, token] (fp32) += values[(kv, b), i], of a block's first real[b] tokens, which other blocks may hold too."""
    blocks = tokens.shape[0]
    for head in range(begin, end):
        for block in range(blocks):
            for i in range(real[block]):
                to, source = out[head, tokens[block, i]], values[head * blocks + block, i]
                for d in range(to.size):
                    to[d] += wide(source[d])


@loop
def _largest(bits):
    """The largest of fp32 numbers, given as int32, in whose order a NaN is beyond all numbers, or below all."""
    highest = np.int32(-2147483648)
    for i in range(bits.size):
        highest = max(highest, np.int32(bits[i] ^ np.int32(np.int32(bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return np.int32(highest ^ np.int32(np.int32(highest >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@loop
def softmax(scores, queries, keys, groups, scale, window, begin, end):
    """Softmax of scale scores[(kv, b), (group, query), key] in their place; what a query does not see, and what is none, gets 0.

    Of a block, the last query sees the last key, the one before one fewer, and so on. Every row is gone over whole: loops as long as
    what is seen would cost more by what they guess wrong.
    """
    count, width = scores.shape[1] // groups, scores.shape[2]
    e, place = np.empty(width, np.float32), np.arange(width).astype(np.int32)
    bits = e.view(np.int32)
    for part in range(begin, end):
        block = part % queries.size
        for row in range(scores.shape[1]):
            line, query = scores[part, row], row % count
            if query >= queries[block]:
                for i in range(width):
                    line[i] = 0
                continue
            last = np.int32(keys[block] - queries[block] + query)
            first = np.int32(max(last - window + 1, 0) if window > 0 else 0)
            for i in range(width):
                seen = (place[i] >= first) & (place[i] <= last)
                e[i] = wide(line[i]) * scale if seen else UNSEEN
            largest = _largest(bits)
            for i in range(width):
                e[i] = exp(e[i] - largest)
            for i in range(width):
                e[i] = e[i] if (place[i] >= first) & (place[i] <= last) else np.float32(0)
            share = ONE / np.float32(_total(e))
            for i in range(width):
                line[i] = narrow(e[i] * share)


@summing
def _along(a, b):
    total = np.float32(0)
    for i in range(a.size):
        total += wide(a[i]) * wide(b[i])
    return total


@loop
def softmax_backward(grad, probs, queries, groups, scale, begin, end):
    """What the scores get, in the place of what their softmax got; nothing where the softmax is 0."""
    count, width = probs.shape[1] // groups, probs.shape[2]
    for part in range(begin, end):
        real = queries[part % queries.size]
        for row in range(probs.shape[1]):
            d, p = grad[part, row], probs[part, row]
            if row % count >= real:
                for i in range(width):
                    d[i] = 0
                continue
            mean = _along(d, p)
            for i in range(width):
                d[i] = narrow(wide(p[i]) * (wide(d[i]) - mean) * scale)
