"""Rewards: what scores a sampled answer. One settings class each; a new reward adds its class to the union."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ._base import PathText, Section


class _Weighted(Section):
    weight: Annotated[float, Field(ge=0)] = 1.0
    """What the score is multiplied by before rewards are added."""


class ExactAnswerReward(_Weighted):
    """1 where the answer equals the row's reference, else 0; spaces around either do not count. A reference that is a JSON number is
    compared as a number, one that is text as text."""

    type: Literal["exact_answer"] = "exact_answer"
    """The reward's name."""
    column: str = "answer"
    """The row's column that holds the reference."""


class RegexReward(_Weighted):
    """1 where the pattern is found in the answer, else 0."""

    type: Literal["regex"] = "regex"
    """The reward's name."""
    pattern: str
    """A Python regular expression, searched for anywhere in the answer."""


class JSONSchemaReward(_Weighted):
    """1 where the answer is JSON that the schema allows, else 0; with a reference column, the share of its fields that are right."""

    type: Literal["json_schema"] = "json_schema"
    """The reward's name."""
    output_schema: PathText
    """The JSON Schema's file."""
    column: str | None = None
    """The row's column that holds a reference object: valid answers then score the share of its top-level fields that are equal."""


class UnitTestReward(_Weighted):
    """The share of the row's tests that the answer's Python code passes, run in bubblewrap without network."""

    type: Literal["unit_tests"] = "unit_tests"
    """The reward's name."""
    column: str = "tests"
    """The row's column that holds a list of Python statements, each passing unless it raises."""
    seconds: Annotated[float, Field(gt=0)] = 5.0
    """Processor and wall time of one answer's tests."""


class PythonReward(_Weighted):
    """A function of yours: `reward(prompts, completions, **columns) -> list[float | None]`, run in a process of its own."""

    type: Literal["python"] = "python"
    """The reward's name."""
    function: PathText
    """The file and the function in it: rewards.py:polite. None for an answer that cannot be scored."""
    seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long one call may take."""


class ModelReward(_Weighted):
    """A reward model's score."""

    type: Literal["model"] = "model"
    """The reward's name."""
    model: PathText
    """An earlier stage of objective reward, an earlier run, or a sequence-classification model's folder, with whatever tokenizer."""


Reward = Annotated[
    ExactAnswerReward | RegexReward | JSONSchemaReward | UnitTestReward | PythonReward | ModelReward, Field(discriminator="type")
]
