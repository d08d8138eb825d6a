"""Evaluation: frozen tasks, candidates, gates and the verdict."""

from .candidates import derive_max_new_tokens, encodable
from .encode import Encoder, TemplateEncoder
from .inputs import EvaluationInputs, StageResult
from .run import EvaluationResult, evaluate_candidates
from .task import Item, Task, distinct_answers, freeze_task, with_item_ids
from .verdict import check_gates

__all__ = [
    "Encoder",
    "EvaluationInputs",
    "EvaluationResult",
    "Item",
    "StageResult",
    "Task",
    "TemplateEncoder",
    "check_gates",
    "derive_max_new_tokens",
    "distinct_answers",
    "encodable",
    "evaluate_candidates",
    "freeze_task",
    "with_item_ids",
]
