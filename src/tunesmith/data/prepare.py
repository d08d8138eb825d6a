"""From a recipe's data section to token stores and a balanced ledger: read, check, split, render, keep.

Takes the section, the chat template and the tokenizer; writes data/ledger.json, data/quarantine.jsonl and data/health.json in the run
directory (in time to be read even when the data are refused) and the rendered tokens in a memory-mapped store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import DataRefused, ModelError, TemplateError
from ..recipe import DataSection
from ..rundir import RunDirectory, write_json, write_text
from .check import Finding, check_data, drop_duplicates, find_test_overlap, length_finding, length_quantiles, trainable_share
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


@dataclass(frozen=True)
class Rendering:
    """How rows become tokens. context: the model's, in tokens; system: the message of rows that bring none."""

    template: ChatTemplate | None
    tokenizer: Any
    context: int
    system: str | None = None
    train_on: TrainOn = "all"


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
    quarantine: list[dict[str, Any]]

    def write_account(self, run: RunDirectory, folder: str = "data") -> None:
        """Writes ledger.json, health.json and quarantine.jsonl."""
        _write_findings(run, folder, self.quarantine, self.findings)
        write_json(run.file(f"{folder}/ledger.json"), self.ledger.to_json())


def _write_findings(run: RunDirectory, folder: str, quarantine: Sequence[dict[str, Any]], findings: Sequence[Finding]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in quarantine)
    write_text(run.file(f"{folder}/quarantine.jsonl"), lines)
    write_json(run.file(f"{folder}/health.json"), {"findings": [finding.to_json() for finding in findings]})


def prepare_data(
    section: DataSection, run: RunDirectory, rendering: Rendering, *, seed: int, folder: str = "data", kept_apart: Sequence[Record] = ()
) -> PreparedData:
    """Reads, checks, renders and splits; the caller writes the account. Raises DataRefused, MissingFile, RecipeError or TemplateError.

    kept_apart: test rows, beside the section's own, that may not be among the training rows. Data that are refused have a quarantine and
    findings, written here, but no ledger, since their rows went nowhere.
    """
    work = _Preparation(section, run, rendering, seed, folder, kept_apart)
    try:
        return work.prepare()
    except (DataRefused, TemplateError):
        _write_findings(run, folder, work.quarantine, work.findings)
        raise


class _Preparation:
    """One data section at work: each method is a step, and what it finds goes into the account."""

    def __init__(self, section: DataSection, run: RunDirectory, rendering: Rendering, seed: int, folder: str, kept_apart: Sequence[Record]):
        self.section, self.run, self.rendering, self.seed, self.folder = section, run, rendering, seed, folder
        self.kept_apart = kept_apart
        self.ledger = Ledger()
        self.quarantine: list[dict[str, Any]] = []
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.sources: dict[str, dict[str, Any]] = {}

    def prepare(self) -> PreparedData:
        """All steps in order."""
        train = self._read(self.section.train, "train")
        self.ledger.rows_in = train.rows_in
        self.ledger.drop("quarantined", len(train.rejected))
        self._require_template(train.records)
        test = self._read(self.section.test, "test").records if self.section.test else []
        checked = check_data(train.records, [*test, *self.kept_apart], self.section, self.findings)
        for reason, count in checked.dropped.items():
            self.ledger.drop(reason, count)
        store = self._rendered(checked.records, "train")
        self.ledger.drop("quarantined", len(checked.records) - len(store))
        lengths = length_quantiles(store.lengths)
        self.findings.append(length_finding(store.lengths))
        records = _in_store_order(store, checked.records)
        apart = self._validation_file(self.section.validation, records, test) if isinstance(self.section.validation, str) else None
        longest = max([int(lengths["max"]), *(apart[0].lengths if apart else [])])
        limit = min(self.section.max_length or int(longest), self.rendering.context)
        fitting = self._fit(store, records, limit)
        if apart:
            kept, (validation, held) = fitting, self._fitting_validation(*apart, limit)
        else:
            kept, validation, held = self._split(store, records, fitting, limit)
        rows = Rows(store, kept, limit)
        self._account_tokens(rows)
        return PreparedData(
            train=rows,
            validation=validation if len(validation) else None,
            records=[records[i] for i in kept],
            validation_records=held,
            test_records=test,
            ledger=self.ledger,
            findings=self.findings,
            notes=self.notes,
            sources=self.sources,
            lengths=lengths,
            max_length=limit,
            quarantine=self.quarantine,
        )

    def _read(self, source: str, part: str) -> ReadResult:
        read = read_records(source, self.section, system=self.rendering.system, quarantine=self.quarantine, default_split=part)
        self.sources[part] = {"source": source, "sha256": read.sha256, "revision": read.revision}
        self.notes += read.notes
        return read

    def _require_template(self, records: Sequence[Record]) -> None:
        if self.rendering.template is None and any(isinstance(record, Conversation) for record in records):
            raise ModelError(
                "the model has no chat template, so conversations cannot be written for it",
                where="model.chat_template",
                mend="name one (chatml), or a .jinja file; its new tokens are trained and saved",
            )

    def _rendered(self, records: Sequence[Record], part: str) -> TokenStore:
        """The rows that render and carry loss, as a store; the others go to quarantine. Raises the first error if there is none."""
        how = self.rendering

        def usable() -> Iterator[tuple[str, Rendered]]:
            for record, result in zip(records, render_records(records, how.template, how.tokenizer, how.train_on), strict=True):
                if isinstance(result, Rendered) and np.any(result.weights):
                    yield record.row_id, result

        rows = hashlib.sha256("\n".join(record.row_id for record in records).encode()).hexdigest()
        settings = {
            "train_on": how.train_on,
            "system": how.system,
            "format": self.section.format,
            "columns": self.section.columns,
            "rows": rows,
        }
        key = store_key(self.sources[part]["sha256"], settings, how.template, how.tokenizer)
        store, _ = TokenStore.open_or_build(usable, self.run.file(f"{self.folder}/tokens/{part}"), key)
        there = set(store.row_ids)
        failed = [record for record in records if record.row_id not in there]
        errors = [_why_not(result) for result in render_records(failed, how.template, how.tokenizer, how.train_on)]
        for record, error in zip(failed, errors, strict=True):
            row = [m.to_hf() for m in record.messages] if isinstance(record, Conversation) else record.text
            self.quarantine.append({"path": record.source.path, "line": record.source.line, "reason": error.what, "row": row})
        if not len(store):
            raise errors[0]
        if len(failed) > self.section.max_rejected * len(records):
            raise DataRefused(
                f"{len(failed)} of {len(records)} rows cannot be rendered; the first: {errors[0].what}",
                where=self.sources[part]["source"],
                mend="mend the rows in data/quarantine.jsonl, or raise data.max_rejected",
            )
        return store

    def _fit(self, store: TokenStore, records: Sequence[Record], limit: int, part: str = "train") -> list[int]:
        """Positions of the rows that stay, after the stated policy for rows over the limit; the ledger counts training rows only."""
        long = [i for i, length in enumerate(store.lengths) if length > limit]
        if not long:
            return list(range(len(store)))
        source = self.sources[part]["source"]
        names = [store.row_ids[i] for i in long]
        q = length_quantiles(store.lengths)
        evidence = f"{len(long)} of {len(store)} rows are longer than {limit} tokens (p50 {q['p50']}, p99 {q['p99']}, longest {q['max']})"
        if self.section.too_long == "refuse":
            where = f"{records[long[0]].source} ({', '.join(names[:5])})"
            raise DataRefused(evidence, where=where, mend="raise data.max_length, or set data.too_long to drop or cut")
        cut = [i for i in long if self.section.too_long == "cut" and np.any(store[i][1][:limit])]
        gone = set(long) - set(cut)
        what = f"{evidence}; {len(cut)} were cut, {len(gone)} dropped"
        if part == "train":
            self.ledger.tokens["truncated"] += sum(int(store.lengths[i]) - limit for i in cut)
            self.ledger.drop("too_long", len(gone))
        else:
            self.notes.append(f"{source}: {what}")
        self.findings.append(Finding("too_long", names, [], what, "shorten these rows, or raise data.max_length"))
        if len(gone) == len(store):
            raise DataRefused("no row fits: " + evidence, where=source, mend="raise data.max_length")
        return [i for i in range(len(store)) if i not in gone]

    def _split(self, store: TokenStore, records: Sequence[Record], fitting: list[int], limit: int) -> tuple[list[int], Rows, list[Record]]:
        """(positions to train on, rows held out, their records)."""
        _, held = split_validation([records[i] for i in fitting], self.section.validation, self.seed)
        apart = {record.row_id for record in held}
        self.ledger.rows_held_out = len(held)
        positions = [i for i in fitting if records[i].row_id in apart]
        return [i for i in fitting if records[i].row_id not in apart], Rows(store, positions, limit), [records[i] for i in positions]

    def _validation_file(self, source: str, train: Sequence[Record], test: Sequence[Record]) -> tuple[TokenStore, list[Record]]:
        """The rendered rows of a validation file and their records, in one order: none twice, none that is a test or a training row."""
        read = self._read(source, "validation").records
        records, repeats = drop_duplicates(read)
        if repeats:
            self.findings += [replace(found, check="repeated_validation_row") for found in repeats]
            self.notes.append(f"{source}: {len(read) - len(records)} of {len(read)} validation rows repeat another and are left out")
        records = self._without(source, records, [*test, *self.kept_apart], "test")
        records = self._without(source, records, train, "training")
        store = self._rendered(records, "validation")
        return store, _in_store_order(store, records)

    def _without(self, source: str, records: list[Record], others: Sequence[Record], kind: str) -> list[Record]:
        """The validation rows that are like none of the others: no choice is made on a test item, nor on what was trained on."""
        overlap = find_test_overlap(records, others, self.section.near_duplicate_threshold)
        if not overlap:
            return records
        what = f"{len(overlap)} of {len(records)} validation rows are {kind} rows and are left out"
        related = list(dict.fromkeys(others[j].row_id for j, _ in overlap.values()))
        mend = "nothing to do; a validation file of other rows says more"
        self.findings.append(Finding("validation_overlap", [records[i].row_id for i in overlap], related, what, mend))
        self.notes.append(f"{source}: {what}")
        if len(overlap) == len(records):
            raise DataRefused(
                f"every validation row is also a {kind} row, so none remains",
                where=source,
                mend="name another file in data.validation, or a share of the training rows (0.1)",
            )
        return [record for i, record in enumerate(records) if i not in overlap]

    def _fitting_validation(self, store: TokenStore, records: Sequence[Record], limit: int) -> tuple[Rows, list[Record]]:
        positions = self._fit(store, records, limit, "validation")
        return Rows(store, positions, limit), [records[i] for i in positions]

    def _account_tokens(self, rows: Rows) -> None:
        self.ledger.rows_trained = len(rows)
        supervised = [int(np.count_nonzero(weights)) for _, weights in rows]
        self.findings.append(trainable_share(rows.lengths, supervised, rows.row_ids))
        self.ledger.tokens["total"], self.ledger.tokens["supervised"] = int(rows.lengths.sum()), sum(supervised)


def _in_store_order(store: TokenStore, records: Sequence[Record]) -> list[Record]:
    by_id = {record.row_id: record for record in records}
    return [by_id[row_id] for row_id in store.row_ids]


def _why_not(result: Rendered | TemplateError) -> TemplateError:
    if isinstance(result, TemplateError):
        return result
    return TemplateError("no token of the row carries loss", mend="give an assistant turn a weight above 0")
