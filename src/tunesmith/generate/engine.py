"""Batched generation and scoring from a shared prefix, on any transformers model whose attention and cache are the standard ones.

Takes rows (rows.py), moves them to their end; takes prompts and answers, gives log-probabilities. The prefix common to all prompts of a
call is computed once, for one row, and what rows of one prompt share beyond it once for all of them; the suffixes of a batch run together
without padding; the head runs on the positions that need it. Tokens that an adapter has learned are where the shared prefix begins.
Run it under `attention_implementation(model, attention.NAME)` and `taking(forwards)`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import ModelError
from ..models import kernels
from ..models.attention import refusal
from ..models.fused import FastPaths, fast_forwards, plain_layers, taking
from ..models.grouped import grouped
from ..models.head import logit_shape, shape_logits
from ..models.virtual import virtual_tokens
from .attention import NAME, attending, attention_implementation
from .cache import PrefixCache, PrefixKV
from .protocol import Sampling
from .rows import Row, choose_next, refuse_nan

# A shorter common prefix is not worth a pass of its own.
MIN_PREFIX = 8
# Tokens of a batch, the slots for its answers included: bounds the cache and the activations (the 135M model's cache: 23 kB a token).
BATCH_TOKENS = 16384
# Slots for answers allocated at first; the cache grows beyond.
FIRST_SLOTS = 128
# Logits held at once when scoring, in elements: 2**25 is 128 MiB in float32.
LOGIT_ELEMENTS = 2**25
# Finished rows are dropped when they are this share of the batch: dropping copies the cache, keeping computes in vain.
DROP_SHARE = 0.25
# Largest relative difference of the centred logits from the plain model's at which the two count as equal, by rounding unit.
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
CHECK_TOLERANCE_HALF = 0.1


class Engine:
    """Prefix, rows and steps of one model. tuned: it, or PEFT's module around it. loops: whether compiled loops do what they can."""

    def __init__(self, model: PreTrainedModel, tuned: torch.nn.Module, batch_size: int, *, loops: bool = False):
        self.model, self.tuned, self.batch_size = model, tuned, batch_size
        self.decoder, self.lm_head = model.get_decoder(), model.get_output_embeddings()
        self.config = model.config.get_text_config()
        self.layers = self.config.num_hidden_layers
        self.loops = loops
        paths = FastPaths()
        self.forwards = fast_forwards(model, paths) if loops else {}
        """What layers are to take while the engine runs."""
        self.refused: dict[str, str] = paths.refused
        """What of that is left out, and why."""
        self.last_position = (getattr(self.config, "max_position_embeddings", None) or sys.maxsize) - 1

    def _cache(self, lengths: list[int], *, prefix: PrefixKV | None, extra_slots: int = 0) -> PrefixCache:
        how = {"extra_slots": extra_slots, "device": self.model.device, "loops": self.loops}
        return PrefixCache(self.layers, lengths, prefix=prefix, **how)

    def logits(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of hidden states, with the scaling and soft-capping that the model's config names."""
        return shape_logits(self.lm_head(hidden_SH), *logit_shape(self.config))

    def forward(self, cache: PrefixCache, **inputs: torch.Tensor) -> torch.Tensor:
        """Hidden states of one pass, [N, H] for rows [1, N], [B, H] for a step [B, 1]. inputs: `input_ids`, or `inputs_embeds`."""
        positions = cache.positions().clamp(max=self.last_position)  # a finished row goes on beside the others until it is dropped
        with attending(cache):
            output = self.decoder(**inputs, position_ids=positions, cache=cache, use_cache=True)
        return output.last_hidden_state.flatten(0, 1)

    def prefix(self, ids: Sequence[int]) -> PrefixKV | None:
        """Keys and values per layer of learned tokens and those that all prompts begin with, for one row; None where there are none."""
        virtual = virtual_tokens(self.tuned, self.model.dtype)
        learned = None if virtual is None else virtual.prefix
        if virtual is not None and virtual.embeddings_NH is not None:
            learned = self._extended(None, virtual.count, inputs_embeds=virtual.embeddings_NH[None])
        return self._extended(learned, len(ids), input_ids=self._tensor([ids])) if ids else learned

    def _extended(self, prefix: PrefixKV | None, tokens: int, **inputs: torch.Tensor) -> PrefixKV:
        cache = self._cache([tokens], prefix=prefix)
        self.forward(cache, **inputs)
        return cache.take_prefix()

    def generate(self, rows: list[Row], sampling: Sampling, stop_ids: frozenset[int]) -> None:
        """Moves every row to its end."""
        P = shared_prefix_length([row.prompt for row in rows])
        prefix = self.prefix(rows[0].prompt[:P])
        lengths = [len(row.prompt) - P + min(row.limit, FIRST_SLOTS) for row in rows]
        for batch in batches(lengths, self.batch_size, alike=[tuple(row.prompt) for row in rows]):
            self._generate_batch([rows[i] for i in batch], P, prefix, sampling, stop_ids)

    def _generate_batch(self, rows: list[Row], P: int, prefix: PrefixKV | None, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        of_prompt: dict[tuple[int, ...], int] = {}
        prompt_B = [of_prompt.setdefault(tuple(row.prompt), len(of_prompt)) for row in rows]
        suffixes = [prompt[P:] for prompt in of_prompt]
        extra = min(max(row.limit for row in rows), FIRST_SLOTS)
        cache = self._cache([len(s) for s in suffixes], extra_slots=extra, prefix=prefix)
        hidden_NH = self.forward(cache, input_ids=self._tensor([[token for suffix in suffixes for token in suffix]]))
        last_P = torch.tensor([len(s) for s in suffixes], device=hidden_NH.device).cumsum(0) - 1
        hidden_BH = hidden_NH[last_P[prompt_B]]
        if len(of_prompt) < len(rows):
            cache.keep(prompt_B)
        while True:
            tokens_B = choose_next(self.logits(hidden_BH), rows, sampling, stop_ids)
            kept = [b for b, row in enumerate(rows) if row.finish_reason is None]
            if not kept:
                return
            if len(rows) - len(kept) >= DROP_SHARE * len(rows):
                cache.keep(kept)
                rows, tokens_B = [rows[b] for b in kept], [tokens_B[b] for b in kept]
            cache.next_step()
            hidden_BH = self.forward(cache, input_ids=self._tensor([[token] for token in tokens_B]))

    def logprobs(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability of every answer token, float32 [len(answer)] a pair."""
        P = shared_prefix_length(prompts)
        prefix = self.prefix(list(prompts[0][:P]))
        suffixes = [[*prompt[P:], *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        scores: list[np.ndarray] = [np.empty(0, np.float32)] * len(answers)
        scored = [i for i, answer in enumerate(answers) if len(answer)]
        for chosen in batches([len(suffixes[i]) for i in scored], self.batch_size):
            batch = [scored[i] for i in chosen]
            cache = self._cache([len(suffixes[i]) for i in batch], prefix=prefix)
            hidden_NH = self.forward(cache, input_ids=self._tensor([[token for i in batch for token in suffixes[i]]]))
            ends = np.cumsum([len(suffixes[i]) for i in batch])
            wanted_S = np.concatenate([np.arange(end - len(answers[i]), end) for end, i in zip(ends, batch, strict=True)])
            targets_S = np.concatenate([np.asarray(answers[i], dtype=np.int64) for i in batch])
            logprobs_S = self._token_logprobs(hidden_NH, wanted_S, targets_S)
            for i, part in zip(batch, np.split(logprobs_S, np.cumsum([len(answers[i]) for i in batch])[:-1]), strict=True):
                scores[i] = part
        return scores

    def _token_logprobs(self, hidden_NH: torch.Tensor, wanted_S: np.ndarray, targets_S: np.ndarray) -> np.ndarray:
        """log_softmax in float32 at the wanted positions, taken at the targets; in chunks, so that the full logits never exist."""
        size = max(1, LOGIT_ELEMENTS // self.config.vocab_size)
        wanted_chunks, target_chunks = (torch.from_numpy(array).to(hidden_NH.device).split(size) for array in (wanted_S, targets_S))
        parts = []
        for wanted, targets in zip(wanted_chunks, target_chunks, strict=True):
            logits_SV = self.logits(hidden_NH[wanted]).float()
            parts.append(logits_SV.gather(-1, targets[:, None]).squeeze(-1) - logits_SV.logsumexp(dim=-1))
        return refuse_nan(torch.cat(parts)).cpu().numpy()

    def difference(self, ids: Sequence[int], plain_attention: str) -> float:
        """How far this engine is from the plain model on the ids: the largest relative difference of centred logits.

        Shares a prefix, runs two rows of unlike length, and takes a step; raises ModelError where attention or cache are not standard.
        """
        ids = list(ids)
        n, p = len(ids), len(ids) // 2
        with attention_implementation(self.model, NAME), taking(self.forwards):
            cache = self._cache([n - p, n - p - 2], extra_slots=1, prefix=self.prefix(ids[:p]))
            rows_NH = self.forward(cache, input_ids=self._tensor([ids[p:] + ids[p:-2]]))
            if sorted(cache.attended) != list(range(self.layers)):
                raise ModelError(f"attention ran in layers {cache.attended} of {self.layers}", where=type(self.model).__name__)
            cache.next_step()
            step_BH = self.forward(cache, input_ids=self._tensor([ids[:1], ids[-2:-1]]))
            ours_3V = self.logits(torch.stack([rows_NH[n - p - 1], rows_NH[-1], step_BH[1]])).float()
        with attention_implementation(self.model, plain_attention), plain_layers(self.model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)  # PEFT's own word for a prefix
            plain_3V = self.tuned(input_ids=self._tensor([ids]), use_cache=False).logits[0, [-1, -3, -2]].float()
        plain_3V, ours_3V = (x - x.mean(dim=-1, keepdim=True) for x in (plain_3V, ours_3V))
        return float(((ours_3V - plain_3V).norm(dim=-1) / plain_3V.norm(dim=-1).clamp_min(1e-12)).max())

    def _tensor(self, ids: list[list[int]]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.model.device)


def why_no_loops(model: PreTrainedModel) -> str | None:
    """Why compiled loops cannot answer for a model in bf16 on a CPU, attention's held against torch's in a small forest; None: they can."""
    if reason := kernels.unavailable():
        return reason
    refused = refusal(model, grouped)
    return None if refused is None else f"their attention: {refused}"


def shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, leaving at least one of each outside; 0 if fewer than MIN_PREFIX, or for one prompt alone.

    >>> shared_prefix_length([list(range(9)), [*range(8), 99]]), shared_prefix_length([list(range(9))])
    (8, 0)
    """
    if len(prompts) < 2:
        return 0
    first, last = min(list(p) for p in prompts), max(list(p) for p in prompts)  # whatever these two share, all share
    longest = min(len(prompt) for prompt in prompts) - 1
    common = next((i for i in range(longest) if first[i] != last[i]), longest)
    return common if common >= MIN_PREFIX else 0


def batches(lengths: Sequence[int], batch_size: int, alike: Sequence[Hashable] | None = None) -> Iterator[list[int]]:
    """Indices in batches of rows of like length, longest first: at most batch_size rows and BATCH_TOKENS tokens (or one row) each.

    alike: a key a row; rows of equal key (and so of equal length) come in one batch, unless they alone are more than a batch holds.
    """
    units: dict[Hashable, list[int]] = {}
    for i, key in enumerate(range(len(lengths)) if alike is None else alike):
        units.setdefault(key, []).append(i)
    count = -(-len(lengths) // batch_size)
    size = -(-len(lengths) // count) if count else 1  # batches of even size
    batch: list[int] = []
    limit = 0
    for unit in sorted(units.values(), key=lambda unit: -lengths[unit[0]]):
        while unit:
            if batch and (len(batch) >= size or len(batch) + len(unit) > limit):
                yield batch
                batch = []
            if not batch:
                limit = max(1, min(batch_size, BATCH_TOKENS // lengths[unit[0]]))
            taken = len(unit) if len(batch) + len(unit) <= limit else min(size, limit)
            batch, unit = batch + unit[:taken], unit[taken:]
    if batch:
        yield batch
