"""The task: what the tuned model is for, and how an answer is scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ._base import PathText, Section

Metric = Literal["exact_match", "field_accuracy", "macro_f1", "rougeL", "json_validity", "gold_reward", "preference_accuracy", "reward"]
METRICS_KNOWN_AS = {"accuracy": "exact_match", "em": "exact_match", "f1": "macro_f1", "rouge": "rougeL", "rouge-l": "rougeL"}


class TaskSection(Section):
    """What a good answer is."""

    description: str | None = None
    """What the model is to do; the system message of rows that bring none, and the head of the report."""
    output_schema: PathText | None = None
    """A JSON Schema that every answer must satisfy; its enum fields are the labels, its free strings are scored by ROUGE-L."""
    labels: Annotated[list[str], Field(min_length=1)] | Literal["auto"] | None = None
    """For classification: the allowed answers, or auto for the distinct answers of the training rows."""
    gold_reward: PathText | None = None
    """A measure that training never sees, as file:function with `checks(prompt, answer) -> {name: 0 to 1}`; their mean counts."""
    metrics: list[Metric] = ["exact_match"]
    """What is measured on the test items; where they have references, the perplexity of those too, so not of pairs or bare prompts."""

    @field_validator("labels")
    @classmethod
    def _each_once(cls, labels: object) -> object:
        if isinstance(labels, list) and len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise ValueError(f"must name each label once, and {twice!r} is there {labels.count(twice)} times")
        return labels
