"""From a recipe's data section to token stores and a balanced ledger: read, check, split, render, keep.

Takes the section, the chat template and the tokenizer; writes data/ledger.json, data/quarantine.jsonl and data/health.json in the run
directory (in time to be read even when the data are refused) and the rendered tokens in a memory-mapped store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataRefused, ModelError, TemplateError
from ..recipe import DataSection
from ..rundir import RunDirectory, write_json, write_text
from .check import Finding, check_data, length_finding, length_quantiles, trainable_share
from .ledger import Ledger
from .read import ReadResult, read_records
from .records import Conversation, Record
from .render import Rendered, TrainOn, render_records
from .split import split_validation
from .store import TokenStore, store_key
from .template import ChatTemplate


class Rows(Sequence[tuple[np.ndarray, np.ndarray]]):
    """Some rows of a store, by position, each at most `limit` tokens long: views, nothing is copied."""

    def __init__(self, store: TokenStore, positions: Sequence[int], limit: int):
        self.store, self.positions, self.limit = store, list(positions), limit
        self.row_ids = [store.row_ids[i] for i in self.positions]
        self.lengths = np.minimum(store.lengths[self.positions], limit) if self.positions else np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, weights = self.store[self.positions[index]]
        return ids[: self.limit], weights[: self.limit]


@dataclass
class PreparedData:
    """What training and evaluation take."""

    train: Rows
    validation: Rows | None
    records: list[Record]
    """The rows of `train`, in its order."""
    validation_records: list[Record]
    test_records: list[Record]
    ledger: Ledger
    findings: list[Finding]
    notes: list[str]
    sources: dict[str, dict[str, Any]]
    """train, test, validation: {"source", "sha256", "revision"}."""
    lengths: dict[str, float]
    """Quantiles of the training rows' lengths in tokens, before any cut."""
    max_length: int


@dataclass
class _Account:
    """What is written down on the way."""

    run: RunDirectory
    folder: str
    ledger: Ledger
    quarantine: list[dict[str, Any]]
    findings: list[Finding]

    def write(self, *, balanced: bool) -> None:
        """Writes the account; a refused run has no ledger, since its rows went nowhere."""
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in self.quarantine)
        write_text(self.run.file(f"{self.folder}/quarantine.jsonl"), lines)
        write_json(self.run.file(f"{self.folder}/health.json"), {"findings": [finding.to_json() for finding in self.findings]})
        if balanced:
            write_json(self.run.file(f"{self.folder}/ledger.json"), self.ledger.to_json())


def prepare_data(
    section: DataSection,
    run: RunDirectory,
    template: ChatTemplate | None,
    tokenizer: Any,
    *,
    folder: str = "data",
    system: str | None,
    train_on: TrainOn,
    context: int,
    seed: int,
) -> PreparedData:
    """Reads, checks, splits and renders. context: the model's, in tokens. Raises DataRefused, MissingFile, RecipeError or TemplateError."""
    account = _Account(run, folder, Ledger(), [], [])
    try:
        prepared = _prepare(section, account, template, tokenizer, system, train_on, context, seed)
    except (DataRefused, TemplateError):
        account.write(balanced=False)
        raise
    account.write(balanced=True)
    return prepared


def _prepare(
    section: DataSection,
    account: _Account,
    template: ChatTemplate | None,
    tokenizer: Any,
    system: str | None,
    train_on: TrainOn,
    context: int,
    seed: int,
) -> PreparedData:
    ledger, quarantine = account.ledger, account.quarantine
    read = read_records(section.train, section, system=system, quarantine=quarantine)
    sources = {"train": _source(section.train, read)}
    ledger.rows_in = read.rows_in
    ledger.drop("quarantined", len(read.rejected))
    test = read_records(section.test, section, system=system, quarantine=quarantine, default_split="test") if section.test else None
    notes = read.notes + (test.notes if test else [])
    if template is None and any(isinstance(record, Conversation) for record in read.records):
        raise ModelError(
            "the model has no chat template, so conversations cannot be written for it",
            where="model.chat_template",
            mend="name one (chatml), or a .jinja file; its new tokens are trained and saved",
        )
    if test:
        sources["test"] = _source(section.test, test)
    checked = check_data(read.records, test.records if test else [], section)
    account.findings += checked.findings
    for reason, count in checked.dropped.items():
        ledger.drop(reason, count)
    rendering = {"train_on": train_on, "system": system, "format": section.format, "columns": section.columns}
    store = _rendered(checked.records, sources["train"], "train", rendering, account, template, tokenizer, section)
    ledger.drop("quarantined", len(checked.records) - len(store))
    lengths = length_quantiles(store.lengths)
    account.findings.append(length_finding(store.lengths))
    limit = min(section.max_length or int(lengths["max"]), context)
    by_id = {record.row_id: record for record in checked.records}
    records = [by_id[row_id] for row_id in store.row_ids]
    fitting = _fit(store, records, limit, section, account)
    if isinstance(section.validation, str):
        other = read_records(section.validation, section, system=system, quarantine=quarantine, default_split="validation")
        sources["validation"], notes = _source(section.validation, other), notes + other.notes
        held_store = _rendered(other.records, sources["validation"], "validation", rendering, account, template, tokenizer, section)
        validation = Rows(held_store, [i for i, n in enumerate(held_store.lengths) if n <= context], limit)
        by_id = {record.row_id: record for record in other.records}
        held = [by_id[row_id] for row_id in validation.row_ids]
        kept = fitting
    else:
        _, held = split_validation([records[i] for i in fitting], section.validation, seed)
        apart = {record.row_id for record in held}
        kept = [i for i in fitting if records[i].row_id not in apart]
        at = {row_id: i for i, row_id in enumerate(store.row_ids)}
        validation = Rows(store, [at[record.row_id] for record in held], limit)
        ledger.rows_held_out = len(held)
    train = Rows(store, kept, limit)
    ledger.rows_trained = len(train)
    supervised = [int(np.count_nonzero(weights)) for _, weights in train]
    account.findings.append(trainable_share(train.lengths, supervised, train.row_ids))
    ledger.tokens["total"], ledger.tokens["supervised"] = int(train.lengths.sum()), sum(supervised)
    kept_records = [records[i] for i in kept]
    return PreparedData(
        train,
        validation if len(validation) else None,
        kept_records,
        held,
        test.records if test else [],
        ledger,
        account.findings,
        notes,
        sources,
        lengths,
        limit,
    )


def _source(name: str, read: ReadResult) -> dict[str, Any]:
    return {"source": name, "sha256": read.sha256, "revision": read.revision}


def _rendered(
    records: Sequence[Record],
    source: dict[str, Any],
    part: str,
    settings: dict[str, Any],
    account: _Account,
    template: ChatTemplate | None,
    tokenizer: Any,
    section: DataSection,
) -> TokenStore:
    """The store of all rows that render and carry loss, built once; the others go to quarantine. Raises the first one's error when none is left."""

    def usable() -> Iterator[tuple[str, Rendered]]:
        for record, result in zip(records, render_records(records, template, tokenizer, settings["train_on"]), strict=True):
            if isinstance(result, Rendered) and np.any(result.weights):
                yield record.row_id, result

    rows = hashlib.sha256("\n".join(record.row_id for record in records).encode()).hexdigest()
    key = store_key(source["sha256"], {**settings, "rows": rows}, template, tokenizer)
    store, _ = TokenStore.open_or_build(usable, account.run.file(f"{account.folder}/tokens/{part}"), key)
    there = set(store.row_ids)
    failed = [record for record in records if record.row_id not in there]
    errors = [_why_not(result) for result in render_records(failed, template, tokenizer, settings["train_on"])]
    for record, error in zip(failed, errors, strict=True):
        row = [m.to_hf() for m in record.messages] if isinstance(record, Conversation) else record.text
        account.quarantine.append({"path": record.source.path, "line": record.source.line, "reason": error.what, "row": row})
    if not len(store):
        raise errors[0]
    if len(failed) > section.max_rejected * len(records):
        raise DataRefused(
            f"{len(failed)} of {len(records)} rows cannot be rendered; the first: {errors[0].what}",
            where=source["source"],
            mend="mend the rows in data/quarantine.jsonl, or raise data.max_rejected",
        )
    return store


def _why_not(result: Rendered | TemplateError) -> TemplateError:
    if isinstance(result, TemplateError):
        return result
    return TemplateError("no token of the row carries loss", mend="give an assistant turn a weight above 0")


def _fit(store: TokenStore, records: Sequence[Record], limit: int, section: DataSection, account: _Account) -> list[int]:
    """Positions of the rows that stay, after the stated policy for rows over the limit."""
    long = [i for i, length in enumerate(store.lengths) if length > limit]
    if not long:
        return list(range(len(store)))
    names = [store.row_ids[i] for i in long]
    q = length_quantiles(store.lengths)
    evidence = f"{len(long)} of {len(store)} rows are longer than {limit} tokens (p50 {q['p50']}, p99 {q['p99']}, longest {q['max']})"
    if section.too_long == "refuse":
        where = f"{records[long[0]].source} ({', '.join(names[:5])})"
        raise DataRefused(evidence, where=where, mend="raise data.max_length, or set data.too_long to drop or cut")
    cut = [i for i in long if section.too_long == "cut" and np.any(store[i][1][:limit])]
    gone = set(long) - set(cut)
    account.ledger.tokens["truncated"] += sum(int(store.lengths[i]) - limit for i in cut)
    account.ledger.drop("too_long", len(gone))
    what = f"{evidence}; {len(cut)} were cut, {len(gone)} dropped"
    account.findings.append(Finding("too_long", names, [], what, "shorten these rows, or raise data.max_length"))
    if len(gone) == len(store):
        raise DataRefused("no row fits: " + evidence, where=section.train, mend="raise data.max_length")
    return [i for i in range(len(store)) if i not in gone]
