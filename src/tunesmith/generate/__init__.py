"""Generation: prompts as token ids in, answers and log-probabilities out.

`Generator` is what the rest of the project asks for; `LocalGenerator` is one on a model in this process. Constraints hold answers to a
JSON schema or to a list of labels.
"""

from __future__ import annotations

from .constraint import choice_constraint, json_schema_constraint
from .local import LocalGenerator, batch_disagreement, merged_adapter
from .protocol import GREEDY, Constraint, Generation, Generator, Matcher, Sampling

__all__ = [
    "GREEDY",
    "Constraint",
    "Generation",
    "Generator",
    "LocalGenerator",
    "Matcher",
    "Sampling",
    "batch_disagreement",
    "choice_constraint",
    "json_schema_constraint",
    "merged_adapter",
]
