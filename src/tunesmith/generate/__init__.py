"""Generation: prompts as token ids in, answers and log-probabilities out.

`Generator` is what the rest of the project asks for; `LocalGenerator` is one on a model in this process, `ServerGenerator` one over a
vLLM server. Constraints hold answers to a JSON schema or to a list of labels.
"""

from __future__ import annotations

from .constraint import choice_constraint, json_schema_constraint
from .local import LocalGenerator, batch_disagreement
from .protocol import GREEDY, Constraint, Generation, Generator, Matcher, Sampling
from .sampling import stream_seed
from .server import ServerGenerator

__all__ = [
    "GREEDY",
    "Constraint",
    "Generation",
    "Generator",
    "LocalGenerator",
    "Matcher",
    "Sampling",
    "ServerGenerator",
    "batch_disagreement",
    "choice_constraint",
    "json_schema_constraint",
    "stream_seed",
]
