"""Items: what one record of data becomes, as rows of tokens that stay together.

A conversation, a document, an unpaired answer and a prompt are one row each, a pair is two (chosen, rejected), a ranking as many as it
has answers, best first. Takes records, gives their rendered rows, or the reason why an item has none; `Items` is a view of a token store
in which each item's rows are adjacent, and `Rows` the flat view of the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from ..errors import TemplateError
from .preference import AnyRecord, PreferencePair, PromptOnly, Unpaired, dialogues, kind_of_record
from .render import ROWS_PER_BATCH, Rendered, TrainOn, prompt_results, render_records
from .store import TokenStore
from .template import ChatTemplate

Row = tuple[np.ndarray, np.ndarray]
"""(ids int32[T], weights float32[T])."""


class Rows(Sequence[Row]):
    """Some rows of a store, by position, each at most `limit` tokens long: views, nothing is copied."""

    def __init__(self, store: TokenStore, positions: Sequence[int], limit: int):
        self.store, self.positions, self.limit = store, list(positions), limit
        self.row_ids = [store.row_ids[i] for i in self.positions]
        self.lengths = np.minimum(store.lengths[self.positions], limit) if self.positions else np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        ids, weights = self.store[self.positions[index]]
        return ids[: self.limit], weights[: self.limit]


class Items(Sequence[tuple[Row, ...]]):
    """Items by position, each the tuple of its rows.

    rows: the same rows, flat, in order. first: int64[N + 1], item i is rows[first[i] : first[i + 1]]. row_ids: list of N, the records'.
    columns: what an objective needs of each item, arrays of N by name: "label" (bool) of unpaired answers, "margin" (float32, 0 where a
    row gives none) of pairs of which at least one has a margin.
    """

    def __init__(self, rows: Rows, first: np.ndarray, row_ids: list[str], columns: dict[str, np.ndarray]):
        self.rows, self.first, self.row_ids, self.columns = rows, first, row_ids, columns

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> tuple[Row, ...]:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = index % len(self)
        return tuple(self.rows[row] for row in range(int(self.first[place]), int(self.first[place + 1])))


class RenderedPart:
    """The records of one part (training, validation) that could be rendered, and the store of their rows, in one order.

    lengths: int64[N], the tokens of each item's longest row. first: int64[N + 1], where each item's rows begin in the store.
    """

    def __init__(self, store: TokenStore, records: Sequence[AnyRecord]):
        self.store = store
        there = set(store.row_ids)
        by_first_row = {names_of(record)[0]: record for record in records}
        self.records = [by_first_row[name] for name in store.row_ids if name in by_first_row]
        self.failed = [record for record in records if names_of(record)[0] not in there]
        self.first = np.cumsum([0, *(len(names_of(record)) for record in self.records)], dtype=np.int64)
        self.lengths = np.maximum.reduceat(store.lengths, self.first[:-1]) if self.records else np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.records)

    def rows_of(self, item: int) -> range:
        """The positions of an item's rows in the store."""
        return range(int(self.first[item]), int(self.first[item + 1]))

    def items(self, chosen: Sequence[int], limit: int) -> Items:
        """Some of the items, by position, with rows of at most `limit` tokens."""
        records = [self.records[i] for i in chosen]
        rows = Rows(self.store, [row for i in chosen for row in self.rows_of(i)], limit)
        first = np.cumsum([0, *(len(self.rows_of(i)) for i in chosen)], dtype=np.int64)
        return Items(rows, first, [record.row_id for record in records], _columns(records))


def names_of(record: AnyRecord) -> list[str]:
    """The row ids of a record's rows: its own where there is one row, RID/0, RID/1 ... where there are several."""
    return [record.row_id] if isinstance(record, PromptOnly) else [one.row_id for one in dialogues(record)]


def render_items(
    records: Sequence[AnyRecord], template: ChatTemplate | None, tokenizer: Any, train_on: TrainOn = "all"
) -> Iterator[tuple[Rendered, ...] | TemplateError]:
    """Each record's rendered rows or the reason it has none, in order, as `render_records` does it; records of one kind.

    An item is whole or not there: each of its rows renders and carries loss, and the tokens before the first one that carries loss are the
    same in all of them, so that only the answers differ. A PromptOnly is the ids that ask for the answer, with weights 0.
    """
    if records and kind_of_record(records[0]) == "prompt":
        yield from _render_prompts(records, template, tokenizer)
        return
    rendered = render_records(chain.from_iterable(map(dialogues, records)), template, tokenizer, train_on)
    for record in records:
        rows = [next(rendered) for _ in dialogues(record)]
        yield _whole_item(record, rows)


def _whole_item(record: AnyRecord, rows: Sequence[Rendered | TemplateError]) -> tuple[Rendered, ...] | TemplateError:
    whole: list[Rendered] = []
    for row in rows:
        if isinstance(row, TemplateError):
            return row
        if not np.any(row.weights):
            return _error(record, "no token of the row carries loss", "give an assistant turn a weight above 0")
        whole.append(row)
    prompts = {row.ids[: int(np.flatnonzero(row.weights)[0])].tobytes() for row in whole}
    if len(prompts) > 1:
        what = f"a {kind_of_record(record)} whose prompts differ: the template writes the prompt in another way before another answer"
        return _error(record, what, "leave the row out, or name a template that fits in model.chat_template")
    return tuple(whole)


def _render_prompts(
    records: Sequence[AnyRecord], template: ChatTemplate | None, tokenizer: Any
) -> Iterator[tuple[Rendered, ...] | TemplateError]:
    if template is None:
        raise TemplateError("a prompt needs a chat template", mend="set model.chat_template")
    for begin in range(0, len(records), ROWS_PER_BATCH):
        chunk = records[begin : begin + ROWS_PER_BATCH]
        prompts = [(record.prompt, record.tools) for record in chunk if isinstance(record, PromptOnly)]
        for record, ids in zip(chunk, prompt_results(prompts, template, tokenizer), strict=True):
            if isinstance(ids, TemplateError):
                yield _error(record, ids.what, ids.mend)
            else:
                yield (Rendered(ids, np.zeros(len(ids), dtype=np.float32), len(ids)),)


def _error(record: AnyRecord, what: str, mend: str | None) -> TemplateError:
    return TemplateError(what, where=f"{record.source} ({record.row_id})", mend=mend)


def _columns(records: Sequence[AnyRecord]) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    margins = [record.margin for record in records if isinstance(record, PreferencePair)]
    if any(margin is not None for margin in margins):
        columns["margin"] = np.array([margin or 0.0 for margin in margins], dtype=np.float32)
    labels = [record.label for record in records if isinstance(record, Unpaired)]
    if labels:
        columns["label"] = np.array(labels, dtype=bool)
    return columns
