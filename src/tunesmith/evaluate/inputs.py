"""What the evaluation works on: the frozen tasks, the models as callables that open them, and what its results depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from ..data.records import Conversation
from ..generate.protocol import Constraint, Generator
from ..score.gold import Checks, Unscorable
from .encode import Encoder
from .task import Task

BASE, TUNED = "base", "tuned"

RowScores = Callable[[Sequence[Sequence[int]]], np.ndarray]
"""A reward model at work: rows of token ids to float64 [rows]."""
Compares = Literal["score", "log_ratio", "mean_log_ratio", "logprob", "mean_logprob"]
"""How a model says which answer is better: by its score head, by its log-probability over its start's (the implicit reward of
arXiv:2305.18290, as a sum or a mean over tokens), or by its own log-probability, as a sum or a mean."""
OVER_START = frozenset({"log_ratio", "mean_log_ratio"})
"""Those that the start's log-probabilities are needed for."""


class GoldMeasure(Protocol):
    """A measure that training never saw. sha256: of what it is. name: for sentences about it."""

    sha256: str

    @property
    def name(self) -> str:
        """Which function it is."""

    def checks(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Checks | Unscorable]:
        """Each answer's checks, or why it has none."""


@dataclass(frozen=True)
class StageResult:
    """What a stage gave, or what a stage started from.

    open: makes its generator. identity: hash of its weights. compares: how it judges answers. start: what log-ratios are taken against, a
    key of `EvaluationInputs.results`, or the base. scores: opens its score head, where it is a reward model.
    """

    open: Callable[[], Generator]
    identity: str
    compares: Compares = "mean_logprob"
    start: str = BASE
    scores: Callable[[], RowScores] | None = None


@dataclass(frozen=True)
class EvaluationInputs:
    """What the evaluation works on.

    base, tuned: make the generator of the base and of the tuned model, called once, when it is first needed (tuned None: there is none).
    base_id, tuned_id: hashes of their weights. constraint: the compiled schema or labels, None for free text. context_length: the model's,
    in tokens. vocabulary_size: the perplexity of knowing nothing. training_template_sha256: of the template the tuned model trained with.
    dtype, stop_ids, version: how the models are held, the tokens that end an answer, and the package's version, on which outputs depend.
    results: stages' results by name, in order, and other starts that they are compared with. last_stage: the stage whose result is `tuned`.
    reward_models: the results whose scores are the metric `reward`; of several the mean. gold: the measure of the metric `gold_reward`.
    """

    task: Task | None
    training: Sequence[Conversation]
    encoder: Encoder
    base: Callable[[], Generator]
    tuned: Callable[[], Generator] | None
    base_id: str
    tuned_id: str
    max_new_tokens: int
    vocabulary_size: int
    general: Task | None = None
    validation: Task | None = None
    constraint: Constraint | None = None
    context_length: int | None = None
    training_template_sha256: str | None = None
    dtype: str = "float32"
    stop_ids: tuple[int, ...] = ()
    version: str = ""
    seed: int = 0
    results: Mapping[str, StageResult] = field(default_factory=dict)
    last_stage: str = ""
    reward_models: tuple[str, ...] = ()
    gold: GoldMeasure | None = None

    def model_of(self, candidate: str) -> str:
        """The model that a candidate is: the base, the tuned one, or a stage's result by its name."""
        if candidate in ("zero_shot", "few_shot"):
            return BASE
        return TUNED if candidate == self.last_stage else candidate

    def result_of(self, model: str) -> StageResult:
        """A model's result. Raises KeyError for one that is not there."""
        if model == BASE:
            return StageResult(self.base, self.base_id)
        if model == TUNED and self.tuned is not None:
            known = self.results.get(self.last_stage)
            compares = (known.compares, known.start, known.scores) if known else ()
            return StageResult(self.tuned, self.tuned_id, *compares)
        return self.results[model]
