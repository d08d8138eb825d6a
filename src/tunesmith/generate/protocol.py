"""What a generator is: prompts as token ids in, generations out; and the settings and results that go with it.

Takes nothing and imports no tensor library at run time, so that every part may name these types. `LocalGenerator` (local.py) is one
`Generator`; an endpoint is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Nothing of a model's generation_config ever adds to it.

    temperature: 0 is greedy, else the logits are divided by it. top_p: the smallest set of tokens whose probability reaches it (1 is all).
    top_k: the k most probable tokens (0 is all). seed: with the prompt's tokens and its occurrence it names each row's random stream,
    unless `generate` is given a seed for each row.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise ValueError(f"temperature must be >= 0, top_p in (0, 1], top_k >= 0; got {self}")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer.

    token_ids: every token chosen, the ending stop token included. text: those without the stop token, special tokens skipped.
    finish_reason: "stop" where a stop token was chosen or the constraint is complete, "length" where the token limit cut it.
    logprobs: where asked for, each token's natural log-probability, in nats, under softmax(logits / temperature) over the whole vocabulary,
    before top-k, top-p or a constraint leave anything out (temperature 0 counts as 1); float32.
    """

    token_ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None = None


class Matcher(Protocol):
    """The state of one row under a constraint."""

    def mask_(self, logits_V: torch.Tensor) -> None:
        """Sets the logit of every token that may not come next to minus infinity, in place."""

    def accept(self, token: int) -> bool:
        """Takes the chosen token; true when nothing but a stop token may follow."""


class Constraint(Protocol):
    """A set of allowed answers; made by `json_schema_constraint` or `choice_constraint`. stop_ids: the tokens that may end one."""

    stop_ids: frozenset[int]

    def matcher(self) -> Matcher:
        """A fresh state, one for each row."""


class Generator(Protocol):
    """Anything that continues prompts and scores answers."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        constraint: Constraint | None = None,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> list[Generation]:
        """One generation a prompt, in the asked order.

        seeds: one a prompt, each of which fully decides its row's random stream (`stream_seed` makes them). logprobs: whether the
        generations carry those of their tokens.
        """

    def logprobs(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each pair the natural log-probability of every answer token, float32 [len(answer)], at temperature 1."""
