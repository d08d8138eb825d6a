"""The choice of the next token from logits: greedy, or by inverse transform from each row's own random stream.

Takes logits [B, V] and one uniform number a row, gives one token a row. Inverse transform (Devroye 1986, Non-Uniform Random Variate
Generation, II.2) over the vocabulary's own order, so that a row's draw depends on its logits and its stream alone: never on the other rows.
top-p is nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from .protocol import Sampling

# Most probable tokens looked at first for top-p.
FIRST_NUCLEUS = 128


def row_streams(prompts: Sequence[Sequence[int]], seed: int) -> list[np.random.Generator]:
    """One random stream a prompt, seeded by hash(seed, prompt's tokens, how many times the prompt came before).

    A row keeps its stream whatever the order of the prompts, the batch size, and the other rows; equal prompts get different streams.

    >>> a, b = row_streams([[1, 2], [3]], seed=7), row_streams([[3]], seed=7)
    >>> a[1].random() == b[0].random()
    True
    """
    seen: Counter[bytes] = Counter()
    streams = []
    for prompt in prompts:
        prompt_bytes = np.asarray(prompt, dtype=np.int64).tobytes()
        digest = hashlib.sha256(f"{seed}:{seen[prompt_bytes]}:".encode() + prompt_bytes).digest()
        seen[prompt_bytes] += 1
        streams.append(np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little"))))
    return streams


def kept_probabilities(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities [B, V], float32, after temperature, then top-k, then top-p, each row summing to 1.

    Ties at the k-th logit and at the edge of the nucleus are all kept, so that the kept set does not depend on a sort's order.
    """
    logits_BV = logits_BV.float() / sampling.temperature
    V = logits_BV.shape[-1]
    if 0 < sampling.top_k < V:
        smallest_kept_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept_B1, -torch.inf)
    probs_BV = torch.softmax(logits_BV, dim=-1)
    if sampling.top_p < 1:
        probs_BV = probs_BV.masked_fill(probs_BV < _smallest_in_nucleus(probs_BV, sampling.top_p), 0.0)
        probs_BV = probs_BV / probs_BV.sum(dim=-1, keepdim=True)
    return probs_BV


def _smallest_in_nucleus(probs_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability [B, 1] among each row's most probable tokens that together reach top_p.

    Looks at ever more of the most probable tokens, since a full sort of the vocabulary costs as much as a small model's step.
    """
    V, k = probs_BV.shape[-1], FIRST_NUCLEUS
    while True:
        top_Bk = probs_BV.topk(min(k, V), dim=-1).values
        mass_Bk = top_Bk.double().cumsum(dim=-1)
        if k >= V or bool((mass_Bk[:, -1] >= top_p).all()):
            last_B1 = (mass_Bk - top_Bk < top_p).sum(dim=-1, keepdim=True) - 1
            return top_Bk.gather(-1, last_B1)
        k *= 8


def choose_tokens(logits_BV: torch.Tensor, sampling: Sampling, uniforms_B: Sequence[float] | None) -> list[int]:
    """One token a row: the greatest logit, or the first token at which the cumulative probability exceeds the row's uniform number.

    logits [B, V]; uniforms: B numbers in [0, 1), not needed at temperature 0. A token of probability zero is never chosen.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1).tolist()
    probs_BV = kept_probabilities(logits_BV, sampling)
    mass_BV = probs_BV.double().cumsum(dim=-1)
    threshold_B1 = torch.tensor(uniforms_B, dtype=torch.float64, device=logits_BV.device)[:, None] * mass_BV[:, -1:]
    return torch.searchsorted(mass_BV, threshold_B1, right=True).clamp_(max=mass_BV.shape[-1] - 1).squeeze(-1).tolist()
