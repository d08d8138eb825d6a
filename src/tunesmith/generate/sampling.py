"""The choice of the next token from logits: greedy, or by inverse transform from each row's own random stream.

Takes logits [B, V] and one uniform number a row, gives one token a row, and its log-probability where asked. Inverse transform (Devroye
1986, Non-Uniform Random Variate Generation, II.2) over the vocabulary's own order, so that a row's draw depends on its logits and its
stream alone: never on the other rows. The cumulative sum is taken in two levels, over blocks of the vocabulary and then inside the one
block that the draw falls into. top-p is nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751).
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
# Tokens of a block of the vocabulary: about the root of a large one, so that both levels are short.
BLOCK = 256
# Logits worked on at once, in elements: on a CPU they should stay in its cache (2**19 is 2 MiB), elsewhere fill the device.
CHOICE_ELEMENTS_CPU = 2**19
CHOICE_ELEMENTS = 2**27


def stream_seed(*parts: int | str | bytes) -> int:
    """A seed of 63 bits made from the parts by SHA-256; equal parts give an equal seed, on every machine.

    >>> stream_seed(7, "prompt-3", 0) == stream_seed(7, "prompt-3", 0), stream_seed(1, 23) == stream_seed(12, 3)
    (True, False)
    """
    digest = hashlib.sha256()
    for part in parts:
        held = part if isinstance(part, bytes) else str(part).encode()
        digest.update(f"{len(held)}:".encode() + held)
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def row_seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """One seed a prompt: hash(seed, prompt's tokens, how many times the prompt came before).

    A row keeps its seed whatever the order of the prompts, the batch size, and the other rows; equal prompts get different seeds.

    >>> row_seeds([[1, 2], [3]], seed=7)[1] == row_seeds([[3]], seed=7)[0]
    True
    """
    seen: Counter[bytes] = Counter()
    seeds = []
    for prompt in prompts:
        prompt_bytes = np.asarray(prompt, dtype=np.int64).tobytes()
        seeds.append(stream_seed(seed, seen[prompt_bytes], prompt_bytes))
        seen[prompt_bytes] += 1
    return seeds


def row_stream(seed: int) -> np.random.Generator:
    """The random stream that a row's seed names; any integer."""
    return np.random.Generator(np.random.PCG64(stream_seed("stream", seed)))


def choose_tokens(
    logits_BV: torch.Tensor,
    sampling: Sampling,
    uniforms_B: Sequence[float] | None,
    *,
    logprobs: bool = False,
    normaliser_B: torch.Tensor | None = None,
) -> tuple[list[int], list[float] | None]:
    """One token a row: the greatest logit, or the first token at which the cumulative probability exceeds the row's uniform number.

    logits [B, V], left as they are; uniforms: B numbers in [0, 1), not needed at temperature 0. A token of probability zero is never
    chosen. With logprobs also each token's natural log-probability under softmax(logits / temperature) over the whole vocabulary, in nats
    (temperature 0 counts as 1): normaliser [B], where given, stands for the log-sum-exp of those.
    """
    B, V = logits_BV.shape
    size = max(1, (CHOICE_ELEMENTS_CPU if logits_BV.device.type == "cpu" else CHOICE_ELEMENTS) // V)
    uniforms_B1 = None if sampling.temperature == 0 else torch.tensor(uniforms_B, dtype=torch.float64, device=logits_BV.device)[:, None]
    tokens, scores = [], []
    for first in range(0, B, size):
        rows = slice(first, min(B, first + size))
        chosen, logs = _choose(
            logits_BV[rows],
            sampling,
            None if uniforms_B1 is None else uniforms_B1[rows],
            logprobs,
            None if normaliser_B is None else normaliser_B[rows],
        )
        tokens.append(chosen)
        scores.append(logs)
    return torch.cat(tokens).tolist(), torch.cat(scores).tolist() if logprobs else None


def _choose(
    logits_BV: torch.Tensor, sampling: Sampling, uniforms_B1: torch.Tensor | None, logprobs: bool, normaliser_B: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """choose_tokens for a few rows: tokens [B] and, where asked, log-probabilities [B]."""
    temperature = sampling.temperature or 1.0
    if uniforms_B1 is None:
        logits_BV = logits_BV.float()
        tokens_B = logits_BV.argmax(dim=-1)
        normaliser_B = logits_BV.logsumexp(dim=-1) if logprobs and normaliser_B is None else normaliser_B
    else:
        greatest_B1, weights_BW = _weights(logits_BV, temperature)
        if logprobs and normaliser_B is None:
            normaliser_B = weights_BW.sum(dim=-1).log() + greatest_B1.squeeze(-1) / temperature
        tokens_B = draw(_keep_(weights_BW, sampling), uniforms_B1)
    if not logprobs:
        return tokens_B, None
    return tokens_B, logits_BV.gather(-1, tokens_B[:, None]).squeeze(-1).float() / temperature - normaliser_B


def _weights(logits_BV: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest logit [B, 1], and exp((logits - greatest) / temperature) [B, W], float32, W the next multiple of BLOCK, filled by 0."""
    B, V = logits_BV.shape
    greatest_B1 = logits_BV.amax(dim=-1, keepdim=True).float()
    weights_BW = torch.empty(B, -(-V // BLOCK) * BLOCK, dtype=torch.float32, device=logits_BV.device)
    weights_BW[:, V:] = -torch.inf
    weights_BW[:, :V] = logits_BV
    weights_BW.sub_(greatest_B1)
    if temperature != 1:
        weights_BW.div_(temperature)
    return greatest_B1, weights_BW.exp_()


def kept_probabilities(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities [B, V], float32, after temperature, then top-k, then top-p, each row summing to 1."""
    weights_BV = _keep_(_weights(logits_BV, sampling.temperature)[1], sampling)[:, : logits_BV.shape[-1]]
    return weights_BV / weights_BV.sum(dim=-1, keepdim=True)


def _keep_(weights_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The weights, in place, with those outside the top k, then outside the nucleus, set to 0.

    Ties at the k-th weight and at the edge of the nucleus are all kept, so that the kept set does not depend on a sort's order.
    """
    if 0 < sampling.top_k < weights_BV.shape[-1]:
        weights_BV.masked_fill_(weights_BV < weights_BV.topk(sampling.top_k, dim=-1).values[:, -1:], 0.0)
    if sampling.top_p < 1:
        weights_BV.masked_fill_(weights_BV < _smallest_in_nucleus(weights_BV, sampling.top_p), 0.0)
    return weights_BV


def _smallest_in_nucleus(weights_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest weight [B, 1] among each row's greatest that together reach the share top_p of all.

    Looks at ever more of the greatest, since a full sort of the vocabulary costs as much as a small model's step.
    """
    V, k = weights_BV.shape[-1], FIRST_NUCLEUS
    wanted_B1 = top_p * weights_BV.sum(dim=-1, keepdim=True).double()
    while True:
        top_Bk = weights_BV.topk(min(k, V), dim=-1).values
        mass_Bk = top_Bk.double().cumsum(dim=-1)
        if k >= V or bool((mass_Bk[:, -1:] >= wanted_B1).all()):
            last_B1 = (mass_Bk - top_Bk < wanted_B1).sum(dim=-1, keepdim=True) - 1
            return top_Bk.gather(-1, last_B1)
        k *= 8


def draw(weights_BW: torch.Tensor, uniforms_B1: torch.Tensor) -> torch.Tensor:
    """The first index [B] at which the cumulative weight exceeds the row's uniform number times all weight.

    weights [B, W], W a multiple of BLOCK, each >= 0, float32; uniforms [B, 1], float64. The blocks' sums are float32, all further sums
    float64: a draw differs from that of a float64 sum over everything only where it falls within some 1e-7 of a block's edge.
    """
    blocks_BNK = weights_BW.view(len(weights_BW), -1, BLOCK)
    before_BN = blocks_BNK.sum(dim=-1).double().cumsum(dim=-1)
    threshold_B1 = uniforms_B1 * before_BN[:, -1:]
    block_B1 = _first_above(before_BN, threshold_B1)
    before_B1 = torch.where(block_B1 > 0, before_BN.gather(-1, (block_B1 - 1).clamp_min(0)), 0.0)
    inside_BK = blocks_BNK.gather(1, block_B1[:, :, None].expand(-1, 1, BLOCK)).squeeze(1).double().cumsum(dim=-1)
    return (block_B1 * BLOCK + _first_above(inside_BK, threshold_B1 - before_B1)).squeeze(-1)


def _first_above(cumulative_BN: torch.Tensor, threshold_B1: torch.Tensor) -> torch.Tensor:
    """The first index [B, 1] whose cumulative weight exceeds the threshold, or, by rounding past the end, the last with any weight."""
    last_B1 = torch.searchsorted(cumulative_BN, cumulative_BN[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative_BN, threshold_B1, right=True), last_B1)
