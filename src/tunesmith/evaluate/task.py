"""A task: a frozen evaluation set with its metrics, hashed; every candidate sees the same items.

Takes records; gives items whose prompt is what comes before the last assistant turn and whose reference is that turn's text, and the way
one answer is scored: under a JSON Schema, as one of some labels, or as free text. A row that is a prompt has a reference where it has a
column `answer`; a preference pair or a ranking has answers that are compared, and no reference.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.preference import AnyRecord, PreferencePair, PromptOnly, Ranking, prompt_of
from ..data.records import Conversation, Document, Message
from ..errors import DataRefused, RecipeError
from ..score import ItemScore, OutputFields, canonical, exact_match, parse_output, rouge_l, score_structured
from ..score.metrics import NEED_REFERENCE, OF_ANSWERS, PREFERENCE

LABEL_FIELD = "label"
"""The one label field of a classification task."""
ANSWER_COLUMN = "answer"
"""The column of a row that is a prompt which holds its reference."""
_NAMED = 5
"""Row ids an error message names."""


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt and its reference, None where the row has none. item_id: the row's id, made unique by -2, -3 ... where a row occurs twice.

    compared: whole dialogues on the prompt, the preferred first, of a row that says which of several answers is better.
    """

    item_id: str
    messages: tuple[Message, ...]
    reference: str | None
    tools: tuple[dict[str, Any], ...] | None = None
    compared: tuple[Conversation, ...] = ()

    @property
    def source_text(self) -> str:
        """What the user wrote: every message of the prompt but the system's, one a line."""
        return "\n".join(message.content for message in self.messages if message.role != "system")


@dataclass(frozen=True)
class Task:
    """The frozen items, their metrics and their hash."""

    name: str
    items: tuple[Item, ...]
    metrics: tuple[str, ...]
    sha256: str
    fields: OutputFields | None = None
    labels: tuple[str, ...] | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    """Rows that are no items: (row id, reason)."""

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON Schema of an answer, if there is one."""
        return self.fields.schema if self.fields else None

    @property
    def is_text(self) -> bool:
        """Whether the items are plain text, which nobody answers: perplexity is all there is."""
        return any(not item.messages for item in self.items)

    @property
    def is_compared(self) -> bool:
        """Whether the items are answers to be compared, so that a candidate need not give one of its own."""
        return any(item.compared for item in self.items)

    @property
    def wants_answers(self) -> bool:
        """Whether a candidate has to answer the items."""
        return not self.is_compared or any(metric in OF_ANSWERS for metric in self.metrics)

    @property
    def has_references(self) -> bool:
        """Whether every item has a reference; with fewer, nothing is measured against one, since candidates share all items."""
        return all(item.reference is not None for item in self.items)

    @property
    def without_reference(self) -> dict[str, str]:
        """Metric to the reason why it has no number, for want of references; empty where every item has one."""
        if self.has_references:
            return {}
        lacking = sum(item.reference is None for item in self.items)
        reason = f"{lacking} of {len(self.items)} items have no reference"
        return {metric: reason for metric in dict.fromkeys((*self.metrics, "perplexity")) if metric in NEED_REFERENCE}

    @property
    def label_fields(self) -> tuple[str, ...]:
        """Fields with a macro-F1 each."""
        return self.fields.labels if self.fields else (LABEL_FIELD,) if self.labels else ()

    @property
    def text_fields(self) -> tuple[str, ...]:
        """Fields scored by ROUGE-L."""
        return self.fields.texts if self.fields else ()

    @property
    def selection_metric(self) -> str:
        """What choices on the validation items go by: exact_match, or rougeL where answers are free text."""
        return "exact_match" if self.fields or self.labels else "rougeL"

    @property
    def labels_are_all(self) -> bool:
        """Whether label fields are all there is to an answer, so that a classifier can give it whole."""
        return bool(self.labels) or bool(self.fields and not self.fields.values and not self.fields.texts)

    def without(self, reasons: Mapping[str, str]) -> Task:
        """The task without some items, which are listed in `skipped`; hashed anew. reasons: item id to the reason."""
        if not reasons:
            return self
        items = [item for item in self.items if item.item_id not in reasons]
        digest = _hash(items, self.schema, self.labels, self.metrics)
        return replace(self, items=tuple(items), sha256=digest, skipped=(*self.skipped, *reasons.items()))

    def score(self, output: str, reference: str) -> ItemScore:
        """One answer's scores (each in [0, 1]) and predicted labels."""
        if self.fields:
            return score_structured(output, reference, self.fields)
        if self.labels:
            return ItemScore({"exact_match": exact_match(output, reference)}, {LABEL_FIELD: output.strip()})
        return ItemScore({"exact_match": exact_match(output, reference), "rougeL": rouge_l(output, reference)}, {})

    def reference_labels(self, reference: str) -> dict[str, str]:
        """The label of each label field of a reference."""
        if self.labels:
            return {LABEL_FIELD: reference.strip()}
        found = self.score(reference, reference).labels
        return {name: label for name, label in found.items() if label is not None}

    def strata(self, answer: str) -> str | None:
        """The first label field's label of any answer, valid or not: what few-shot examples are spread over."""
        if self.labels:
            return answer.strip()
        parsed = parse_output(answer, self.fields) if self.fields else None
        return canonical(parsed.get(self.fields.labels[0])) if parsed is not None and self.fields.labels else None


def freeze_task(
    name: str,
    records: Iterable[AnyRecord],
    *,
    schema: dict[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    metrics: Sequence[str] = ("exact_match",),
) -> Task:
    """Makes the task and hashes its items, its schema or labels, and its metrics.

    A conversation whose last turn has no text or calls tools, or that has nothing before it, is listed in `skipped` with its reason; so is
    a prompt without a reference where answers are JSON or labels. Raises RecipeError for a metric that such answers do not have, or both a
    schema and labels; DataRefused where a reference breaks the schema. Documents (plain text) become items without a prompt, measured by
    perplexity alone.
    """
    if schema is not None and labels is not None:
        raise RecipeError("a task has an output_schema or labels, not both", where="task", mend="remove one of the two")
    fields = OutputFields.from_schema(schema) if schema is not None else None
    names = tuple(dict.fromkeys(label.strip() for label in labels)) if labels is not None else None
    records = list(records)
    if any(isinstance(record, Document) for record in records):
        metrics = ()
    _check_metrics(metrics, fields, names)
    items, skipped, sources = [], [], {}
    for item_id, record in with_item_ids(records):
        reason = _unusable(record, needs_reference=bool(fields or names))
        if reason:
            skipped.append((record.row_id, reason))
            continue
        items.append(_item(item_id, record))
        sources[item_id] = record.source
    if fields:
        broken = [f"{i.item_id} ({sources[i.item_id]})" for i in items if parse_output(i.reference, fields) is None]
        if broken:
            raise DataRefused(
                f"{len(broken)} of {len(items)} references do not satisfy the output schema: {', '.join(broken[:_NAMED])}",
                where=f"task {name}",
                mend="correct these rows or the schema",
            )
    return Task(name, tuple(items), tuple(metrics), _hash(items, schema, names, metrics), fields, names, tuple(skipped))


def with_item_ids(records: Iterable[AnyRecord]) -> Iterator[tuple[str, AnyRecord]]:
    """Every row with the id of its item: its own, made unique by -2, -3 ... where it occurs twice."""
    seen: Counter[str] = Counter()
    for record in records:
        seen[record.row_id] += 1
        times = seen[record.row_id]
        yield record.row_id if times == 1 else f"{record.row_id}-{times}", record


def distinct_answers(conversations: Iterable[Conversation]) -> list[str]:
    """The sorted distinct answers: what `task.labels: auto` stands for, from the training rows."""
    return sorted({row.answer.strip() for row in conversations if not _unusable(row, needs_reference=True)})


def task_summary(task: Task) -> dict[str, Any]:
    """The task's head in evaluation.json: {"hash", "n", "skipped": {reason: n}}."""
    return {"hash": task.sha256, "n": len(task.items), "skipped": dict(Counter(reason for _, reason in task.skipped))}


def _item(item_id: str, record: AnyRecord) -> Item:
    if isinstance(record, Document):
        return Item(item_id, (), record.text)
    compared = record.conversations() if isinstance(record, PreferencePair | Ranking) else ()
    return Item(item_id, tuple(prompt_of(record)), _reference(record), record.tools, compared)


def _reference(record: AnyRecord) -> str | None:
    """A conversation's last turn; of a prompt the column `answer`, as JSON where it is neither text nor missing."""
    if isinstance(record, Conversation):
        return record.messages[-1].content
    answer = record.columns.get(ANSWER_COLUMN) if isinstance(record, PromptOnly) else None
    if answer is None or isinstance(answer, str):
        return answer if answer and answer.strip() else None
    return json.dumps(answer, ensure_ascii=False)


def _unusable(record: AnyRecord, *, needs_reference: bool) -> str | None:
    if isinstance(record, Document):
        return None
    if not isinstance(record, Conversation):
        lacks = needs_reference and _reference(record) is None
        return f"it has no `{ANSWER_COLUMN}` that an answer could be held to" if lacks else None
    last = record.messages[-1]
    if last.role != "assistant":
        return "the last turn is not the assistant's"
    if last.tool_calls:
        return "the last assistant turn calls tools, which is not scored"
    if not last.content.strip():
        return "the last assistant turn has no text"
    return None if record.prompt() else "nothing comes before the answer"


def _check_metrics(metrics: Sequence[str], fields: OutputFields | None, labels: tuple[str, ...] | None) -> None:
    if fields:
        possible = {"exact_match", "json_validity"}
        possible |= {"rougeL"} if fields.texts else set()
        possible |= {"field_accuracy"} if fields.exact else set()
        possible |= {"macro_f1"} if fields.labels else set()
        kind = "JSON answers under this output_schema"
    elif labels is not None:
        possible, kind = {"exact_match", "macro_f1"}, "answers that are one of some labels"
    else:
        possible, kind = {"exact_match", "rougeL"}, "free-text answers"
    possible |= {*OF_ANSWERS, PREFERENCE}
    for metric in metrics:
        if metric not in possible:
            mend = f"choose from {', '.join(sorted(possible))}"
            raise RecipeError(f"{metric} is not defined for {kind}", where="task.metrics", mend=mend)


def _hash(items: Sequence[Item], schema: dict[str, Any] | None, labels: tuple[str, ...] | None, metrics: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in ({"schema": schema, "labels": labels, "metrics": list(metrics)}, *map(_item_json, items)):
        digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _item_json(item: Item) -> dict[str, Any]:
    messages = [message.as_given() for message in item.messages]
    found = {"id": item.item_id, "messages": messages, "reference": item.reference, "tools": item.tools}
    if item.compared:
        found["compared"] = [[message.as_given() for message in dialogue.messages] for dialogue in item.compared]
    return found
