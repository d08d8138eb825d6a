"""The rows of a generation: what each has said so far, its random stream, its place in the constraint, and when it ends.

Takes prompts and settings, gives `Row`s; `choose_next` takes logits and moves every unfinished row on by one token. Both ways of
generating (engine.py, fallback.py) choose here and nowhere else, so they differ in speed only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from ..errors import ModelError, NonFinite
from .protocol import Constraint, Generation, Matcher, Sampling
from .sampling import choose_tokens, row_seeds, row_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Row:
    """One prompt and its answer so far. limit: most tokens the answer may have. logprobs: of its tokens, or None where not asked for."""

    prompt: list[int]
    limit: int
    stream: np.random.Generator | None
    matcher: Matcher | None
    logprobs: list[float] | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    stopped_by_token: bool = False

    def generation(self, tokenizer: PreTrainedTokenizerBase) -> Generation:
        """The finished row, with its text."""
        said = self.token_ids[:-1] if self.stopped_by_token else self.token_ids
        text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(self.token_ids, text, self.finish_reason or "length", self.logprobs)


def make_rows(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    constraint: Constraint | None,
    max_positions: int | None,
    *,
    virtual: int = 0,
    seeds: Sequence[int] | None = None,
    logprobs: bool = False,
) -> list[Row]:
    """One row a prompt, in order. seeds: what decides each row's stream, in place of the sampling's seed and the prompt. virtual: positions
    that learned tokens take.

    Raises ModelError, naming the prompt, where it leaves no room in the model's max_positions tokens.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    check_lengths(prompts, max_positions, room=1, virtual=virtual)
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds")
    rows = []
    for prompt, seed in zip(prompts, row_seeds(prompts, sampling.seed) if seeds is None else seeds, strict=True):
        limit = max_new_tokens if max_positions is None else min(max_new_tokens, max_positions - virtual - len(prompt))
        stream = row_stream(seed) if sampling.temperature > 0 else None
        matcher = constraint.matcher() if constraint else None
        rows.append(Row([int(token) for token in prompt], limit, stream, matcher, [] if logprobs else None))
    return rows


def check_lengths(prompts: Sequence[Sequence[int]], max_positions: int | None, *, room: int, virtual: int = 0) -> None:
    """Refuses an empty prompt, and one that leaves less than `room` tokens of the model's context beside the `virtual` ones."""
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ModelError("the prompt has no tokens, so there is nothing to continue", where=f"prompt {number}")
        if max_positions is not None and virtual + len(prompt) + room > max_positions:
            learned = f" and {virtual} learned ones" if virtual else ""
            raise ModelError(
                f"{len(prompt)} tokens{learned} do not fit the model's context of {max_positions}",
                where=f"prompt {number}",
                mend="shorten the prompt (fewer few-shot examples) or use a model with a longer context",
            )


def choose_next(logits_BV: torch.Tensor, rows: Sequence[Row], sampling: Sampling, stop_ids: frozenset[int]) -> list[int]:
    """The next token of every row, which unfinished rows take; a finished row gets its last token again, to be ignored.

    logits [B, V] of the rows in order; changed in place under a constraint. Log-probabilities, for rows that want them, are the model's
    own: of what a constraint, top-k or top-p leave out too. Raises NonFinite where the logits hold NaN.
    """
    refuse_nan(logits_BV.amax(dim=-1))  # NaN if any of them is; far cheaper than looking at each
    logprobs, normaliser_B = any(row.logprobs is not None for row in rows), None
    if any(row.matcher is not None for row in rows):
        logits_BV = logits_BV.float()
        normaliser_B = (logits_BV / (sampling.temperature or 1.0)).logsumexp(dim=-1) if logprobs else None
    for row, logits_V in zip(rows, logits_BV, strict=True):
        if row.matcher is not None and row.finish_reason is None:
            row.matcher.mask_(logits_V)
    uniforms_B = [row.stream.random() if row.stream is not None and row.finish_reason is None else 0.0 for row in rows]
    tokens_B, logprobs_B = choose_tokens(logits_BV, sampling, uniforms_B, logprobs=logprobs, normaliser_B=normaliser_B)
    for b, row in enumerate(rows):
        if row.finish_reason is None:
            _take(row, tokens_B[b], stop_ids)
            if row.logprobs is not None:
                row.logprobs.append(logprobs_B[b])
        tokens_B[b] = row.token_ids[-1]
    return tokens_B


def refuse_nan(values: torch.Tensor) -> torch.Tensor:
    """The values, unless one of them is NaN: then NonFinite."""
    if bool(values.isnan().any()):
        raise NonFinite("the model's logits are NaN", where="generation", mend="look at the training log: the weights may have diverged")
    return values


def _take(row: Row, token: int, stop_ids: frozenset[int]) -> None:
    """Appends the token and decides whether the row ends."""
    row.token_ids.append(token)
    complete = row.matcher.accept(token) if row.matcher is not None else False
    row.stopped_by_token = token in stop_ids
    if complete or row.stopped_by_token:
        row.finish_reason = "stop"
    elif len(row.token_ids) >= row.limit:
        row.finish_reason = "length"
