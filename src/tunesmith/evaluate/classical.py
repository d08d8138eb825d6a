"""The classical candidate: TF-IDF and logistic regression for each label field; no language model.

Takes training and validation conversations and a task; gives a label for each field and item. Word 1-2-grams and character 3-5-grams
within words, C chosen on the validation items. It cannot write text: where the schema has text or value fields it is scored on its
label fields only, and never recommended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion

from ..data.records import Conversation
from ..score import parse_output
from .task import LABEL_FIELD, Item, Task

REGULARISATION = (1.0, 10.0, 100.0, 1000.0)
"""The values of C tried."""
_RARE = 2000
"""Training rows from which n-grams of a single row are left out, to bound the time."""


@dataclass(frozen=True)
class ClassicalAnswers:
    """labels: for each item, field to label. trials: for each C the share of validation items with every field right (n of them)."""

    labels: tuple[dict[str, str], ...]
    trials: tuple[dict[str, float | int | None], ...]
    C: float


def classical_answers(training: Sequence[Conversation], validation: Task | None, task: Task) -> ClassicalAnswers:
    """Fits one classifier a label field on the training rows for each C, keeps the C that is best on validation, answers the items.

    Ties go to the smaller C; without validation items C is 10. Raises ValueError for a task without label fields or training rows.
    """
    rows = [(source_text(row), labels) for row in training if (labels := _labels(row.answer, task)) is not None]
    if not task.label_fields or not rows:
        raise ValueError("the classical candidate needs label fields and training rows")
    rare = 2 if len(rows) >= _RARE else 1
    features = FeatureUnion(
        [
            ("words", TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=rare, token_pattern=r"(?u)\b\w+\b")),
            ("characters", TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, min_df=rare)),
        ]
    )
    known = features.fit_transform([text for text, _ in rows])
    checks = validation.items if validation else ()
    asked = features.transform([item.source_text for item in (*checks, *task.items)])
    trials, best = [], None
    for C in REGULARISATION if checks else (10.0,):
        columns = {name: _fit_predict(known, [labels[name] for _, labels in rows], asked, C) for name in task.label_fields}
        predicted = [{name: str(columns[name][position]) for name in columns} for position in range(asked.shape[0])]
        right = [labels == task.reference_labels(item.reference) for labels, item in zip(predicted, checks, strict=False)]
        value = sum(right) / len(right) if right else None
        trials.append({"C": C, "exact_match": value, "n": len(right)})
        if best is None or (value is not None and value > best[0]):
            best = (value if value is not None else -math.inf, C, predicted[len(checks) :])
    return ClassicalAnswers(tuple(best[2]), tuple(trials), best[1])


def source_text(row: Conversation) -> str:
    """What the user wrote before the last answer, as `Item.source_text` gives it for an item."""
    return Item(row.row_id, tuple(row.prompt()), row.answer).source_text


def answer_text(labels: dict[str, str], task: Task) -> str:
    """The labels as the task writes them: the bare label, or a JSON object of the label fields."""
    if task.labels:
        return labels[LABEL_FIELD]
    return json.dumps({name: json.loads(label) for name, label in labels.items() if label}, ensure_ascii=False)


def _labels(answer: str, task: Task) -> dict[str, str] | None:
    if task.fields and parse_output(answer, task.fields) is None:
        return None
    return task.reference_labels(answer)


def _fit_predict(known: csr_matrix, labels: list[str], asked: csr_matrix, C: float) -> np.ndarray:
    """Labels[N] for the rows asked; a field with one label in training always gets that one."""
    if len(set(labels)) == 1:
        return np.array([labels[0]] * asked.shape[0])
    classifier = LogisticRegression(C=C, max_iter=1000, tol=1e-3)
    return classifier.fit(known, np.array(labels)).predict(asked)
