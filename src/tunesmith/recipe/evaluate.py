"""The evaluation: candidates, decoding, the guard against forgetting, and the gates of the verdict."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ._base import PathText, Section

CANDIDATES = ("zero_shot", "few_shot", "classical", "tuned", "shorter")
CandidateName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Gate(Section):
    """One condition of the verdict, decided by the paired interval."""

    metric: str
    """The metric compared, e.g. exact_match or perplexity."""
    candidate: CandidateName = "tuned"
    """The candidate that must pass."""
    task: Literal["task", "general"] = "task"
    """The recipe's own task, or the guard set."""
    better_than: CandidateName | None = None
    """The baseline to beat: the whole interval of the paired difference lies on the better side of the margin."""
    not_worse_than: CandidateName | None = None
    """The baseline not to fall behind by more than the margin, by the whole interval."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """The margin, in the metric's own units; for perplexity a ratio (0.05 is 5%)."""

    @model_validator(mode="after")
    def _one_baseline(self) -> Gate:
        if (self.better_than is None) == (self.not_worse_than is None):
            raise ValueError("give exactly one of better_than and not_worse_than")
        return self


class EvaluateSection(Section):
    """What is compared, on the same frozen items."""

    candidates: list[CandidateName] = ["zero_shot", "few_shot", "classical", "tuned"]
    """The systems under evaluation: zero_shot, few_shot, classical, tuned, shorter (of two answers), or the name of a stage."""
    few_shot_k: list[Annotated[int, Field(ge=1)]] = [2, 4, 8]
    """Numbers of examples tried for few_shot; k and the examples are chosen on the validation rows."""
    few_shot_sets: Annotated[int, Field(ge=1)] = 2
    """Example sets tried for each k."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer in tokens; derived as half as much again as the longest training answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature of the answers; 0 is greedy."""
    batch_size: Annotated[int, Field(ge=1)] = 50
    """Prompts generated together."""
    general: PathText | None = None
    """Conversations the tuning never sees; perplexity on them is the guard against forgetting."""
    gates: list[Gate] = []
    """The conditions of PASS; none means NOT MEASURED."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of the intervals."""
    bootstrap_resamples: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the paired bootstrap."""
