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

from ..errors import DataRefused, ModelError, RecipeError, TemplateError
from ..recipe import DataSection
from ..rundir import RunDirectory, write_json, write_text
from .check import Finding, check_data, drop_duplicates, find_test_overlap, length_finding, length_quantiles, trainable_share
from .items import Items, RenderedPart, Rows, names_of, render_items
from .ledger import Ledger
from .preference import AnyRecord, Kind, kind_of_record, make_prompt
from .read import ReadResult, read_records
from .records import Conversation, Document
from .render import TrainOn
from .split import split_validation
from .store import Example, TokenStore, store_key
from .template import ChatTemplate
from .write import row_of

ACCEPTED: dict[Kind, tuple[Kind, ...]] = {  # of data, by what is wanted, the first where rows could be either
    "conversation": ("conversation",),
    "pair": ("pair",),
    "ranking": ("ranking", "pair"),  # a pair is a ranking of two
    "unpaired": ("unpaired",),
    "prompt": ("prompt", "conversation"),  # a conversation is a prompt whose answer is known
}


@dataclass(frozen=True)
class Rendering:
    """How rows become tokens. context: the most tokens that the model has room for; system: the message of rows that bring none."""

    template: ChatTemplate | None
    tokenizer: Any
    context: int
    system: str | None = None
    train_on: TrainOn = "all"


@dataclass
class PreparedData:
    """What training and evaluation take. items and records are in one order; train and validation are the items' rows, flat."""

    items: Items
    validation_items: Items | None
    records: list[AnyRecord]
    """The items' records, in order."""
    validation_records: list[AnyRecord]
    test_records: list[AnyRecord]
    """Of any kind."""
    ledger: Ledger
    findings: list[Finding]
    notes: list[str]
    sources: dict[str, dict[str, Any]]
    """train, test, validation: {"source", "sha256", "revision"}."""
    lengths: dict[str, float]
    """Quantiles of the training rows' lengths in tokens, before any cut."""
    max_length: int
    quarantine: list[dict[str, Any]]

    @property
    def train(self) -> Rows:
        """Every row of `items`, flat."""
        return self.items.rows

    @property
    def validation(self) -> Rows | None:
        """Every row of `validation_items`, flat."""
        return None if self.validation_items is None else self.validation_items.rows

    def write_account(self, run: RunDirectory, folder: str = "data") -> None:
        """Writes ledger.json, health.json and quarantine.jsonl."""
        _write_findings(run, folder, self.quarantine, self.findings)
        write_json(run.file(f"{folder}/ledger.json"), self.ledger.to_json())


def _write_findings(run: RunDirectory, folder: str, quarantine: Sequence[dict[str, Any]], findings: Sequence[Finding]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in quarantine)
    write_text(run.file(f"{folder}/quarantine.jsonl"), lines)
    write_json(run.file(f"{folder}/health.json"), {"findings": [finding.to_json() for finding in findings]})


def prepare_data(
    section: DataSection,
    run: RunDirectory,
    rendering: Rendering,
    *,
    seed: int,
    folder: str = "data",
    kept_apart: Sequence[AnyRecord] = (),
    kind: Kind | None = "conversation",
) -> PreparedData:
    """Reads, checks, renders and splits; the caller writes the account. Raises DataRefused, MissingFile, RecipeError or TemplateError.

    kept_apart: test rows, beside the section's own, that may not be among the training rows. kind: what the objective trains on; None
    takes the rows as they are. Data of another kind are refused. Data that are refused have a quarantine and findings, written here, but
    no ledger, since their rows went nowhere.
    """
    work = _Preparation(section, run, rendering, seed, folder, kept_apart, ACCEPTED[kind] if kind else ())
    try:
        return work.prepare()
    except (DataRefused, TemplateError):
        _write_findings(run, folder, work.quarantine, work.findings)
        raise


class _Preparation:
    """One data section at work: each method is a step, and what it finds goes into the account."""

    def __init__(
        self,
        section: DataSection,
        run: RunDirectory,
        rendering: Rendering,
        seed: int,
        folder: str,
        kept_apart: Sequence[AnyRecord],
        kinds: tuple[Kind, ...],
    ):
        self.section, self.run, self.rendering, self.seed, self.folder = section, run, rendering, seed, folder
        self.kept_apart, self.kinds = kept_apart, kinds
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
        self._require_usable_settings(train.records)
        test = self._read(self.section.test, "test").records if self.section.test else []
        checked = check_data(train.records, [*test, *self.kept_apart], self.section, self.findings)
        for reason, count in checked.dropped.items():
            self.ledger.drop(reason, count)
        part = self._rendered(checked.records, "train")
        self.ledger.drop("quarantined", len(checked.records) - len(part))
        lengths = length_quantiles(part.store.lengths)
        self.findings.append(length_finding(part.store.lengths))
        apart = self._validation_file(self.section.validation, part.records, test) if isinstance(self.section.validation, str) else None
        longest = max([int(lengths["max"]), *(apart.lengths if apart else [])])
        limit = min(self.section.max_length or int(longest), self.rendering.context)
        kept = self._fit(part, limit)
        if apart:
            held_part, held = apart, self._fit(apart, limit, "validation")
        else:
            held_part, (kept, held) = part, self._split(part, kept)
        items = part.items(kept, limit)
        self._account_tokens(items, part)
        return PreparedData(
            items=items,
            validation_items=held_part.items(held, limit) if held else None,
            records=[part.records[i] for i in kept],
            validation_records=[held_part.records[i] for i in held],
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
        kinds = () if part == "test" else self.kinds  # what is measured need not be of the kind that is learned from
        how = {"system": self.rendering.system, "quarantine": self.quarantine, "default_split": part}
        read = read_records(source, self.section, **how, kinds=kinds)
        if self.kinds[:1] == ("prompt",) and part != "test":
            read = self._asked(read)
        self.sources[part] = {"source": source, "sha256": read.sha256, "revision": read.revision}
        self.notes += read.notes
        return read

    def _asked(self, read: ReadResult) -> ReadResult:
        """Conversations as prompts, where prompts are wanted: what comes before the last answer, and the answer as a column."""
        if text := next((row for row in read.records if isinstance(row, Document)), None):
            raise DataRefused(
                "the rows are text, and the stage's objective wants prompts: nothing is asked in them",
                where=str(text.source),
                mend="name a file of prompts or conversations, or map its columns by data.columns: {prompt: text}",
            )
        records = [
            make_prompt(row.prompt(), {"answer": row.answer}, row.source, tools=row.tools or ()) if isinstance(row, Conversation) else row
            for row in read.records
        ]
        return replace(read, records=records)

    def _require_usable_settings(self, records: Sequence[AnyRecord]) -> None:
        """A template for what is written in turns, and no cutting of what is compared."""
        if self.rendering.template is None and any(not isinstance(record, Document) for record in records):
            raise ModelError(
                "the model has no chat template, so conversations cannot be written for it",
                where="model.chat_template",
                mend="name one (chatml), or a .jinja file; its new tokens are trained and saved",
            )
        kind = kind_of_record(records[0])
        if self.section.too_long == "cut" and kind != "conversation":
            raise RecipeError(
                f"`cut` would unpair: rows of kind {kind} are fitted whole, since a part of an answer is not what was judged, nor a part "
                "of a prompt what was asked",
                where="data.too_long",
                mend="say drop or refuse",
            )

    def _rendered(self, records: Sequence[AnyRecord], part: str) -> RenderedPart:
        """The items that render whole and carry loss, as a store; the others go to quarantine. Raises the first error if there is none."""
        how = self.rendering

        def usable() -> Iterator[Example]:
            for record, result in zip(records, render_items(records, how.template, how.tokenizer, how.train_on), strict=True):
                if not isinstance(result, TemplateError):
                    yield from zip(names_of(record), result, strict=True)

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
        made = RenderedPart(store, records)
        failures = render_items(made.failed, how.template, how.tokenizer, how.train_on)
        errors = [result for result in failures if isinstance(result, TemplateError)]
        for record, error in zip(made.failed, errors, strict=True):
            self.quarantine.append({"path": record.source.path, "line": record.source.line, "reason": error.what, "row": row_of(record)})
        if not len(made):
            raise errors[0]
        if len(made.failed) > self.section.max_rejected * len(records):
            raise DataRefused(
                f"{len(made.failed)} of {len(records)} rows cannot be rendered; the first: {errors[0].what}",
                where=self.sources[part]["source"],
                mend="mend the rows in data/quarantine.jsonl, or raise data.max_rejected",
            )
        return made

    def _fit(self, made: RenderedPart, limit: int, part: str = "train") -> list[int]:
        """Positions of the items that stay, after the stated policy for those with a row over the limit; the ledger counts training rows
        only. An item stays or goes whole."""
        long = [i for i, length in enumerate(made.lengths) if length > limit]
        if not long:
            return list(range(len(made)))
        source = self.sources[part]["source"]
        names = [made.records[i].row_id for i in long]
        q = length_quantiles(made.lengths)
        evidence = f"{len(long)} of {len(made)} rows are longer than {limit} tokens (p50 {q['p50']}, p99 {q['p99']}, longest {q['max']})"
        if self.section.too_long == "refuse":
            where = f"{made.records[long[0]].source} ({', '.join(names[:5])})"
            raise DataRefused(evidence, where=where, mend="raise data.max_length, or set data.too_long to drop or cut")
        cut = [i for i in long if self.section.too_long == "cut" and np.any(made.store[made.rows_of(i)[0]][1][:limit])]
        gone = set(long) - set(cut)
        what = f"{evidence}; {len(cut)} were cut, {len(gone)} dropped"
        if part == "train":
            self.ledger.tokens["truncated"] += sum(int(made.lengths[i]) - limit for i in cut)
            self.ledger.drop("too_long", len(gone))
        else:
            self.notes.append(f"{source}: {what}")
        self.findings.append(Finding("too_long", names, [], what, "shorten these rows, or raise data.max_length"))
        if len(gone) == len(made):
            raise DataRefused("no row fits: " + evidence, where=source, mend="raise data.max_length")
        return [i for i in range(len(made)) if i not in gone]

    def _split(self, part: RenderedPart, fitting: list[int]) -> tuple[list[int], list[int]]:
        """(positions to train on, positions held out)."""
        _, held = split_validation([part.records[i] for i in fitting], self.section.validation, self.seed)
        apart = {record.row_id for record in held}
        self.ledger.rows_held_out = len(held)
        return [i for i in fitting if part.records[i].row_id not in apart], [i for i in fitting if part.records[i].row_id in apart]

    def _validation_file(self, source: str, train: Sequence[AnyRecord], test: Sequence[AnyRecord]) -> RenderedPart:
        """The rendered rows of a validation file: none twice, none that is a test or a training row."""
        read = self._read(source, "validation").records
        records, repeats = drop_duplicates(read)
        if repeats:
            self.findings += [replace(found, check="repeated_validation_row") for found in repeats]
            self.notes.append(f"{source}: {len(read) - len(records)} of {len(read)} validation rows repeat another and are left out")
        records = self._without(source, records, [*test, *self.kept_apart], "test")
        records = self._without(source, records, train, "training")
        return self._rendered(records, "validation")

    def _without(self, source: str, records: list[AnyRecord], others: Sequence[AnyRecord], kind: str) -> list[AnyRecord]:
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

    def _account_tokens(self, items: Items, part: RenderedPart) -> None:
        rows = items.rows
        self.ledger.rows_trained = len(items)
        supervised = [int(np.count_nonzero(weights)) for _, weights in rows]
        if kind_of_record(part.records[0]) != "prompt":
            self.findings.append(trainable_share(rows.lengths, supervised, rows.row_ids))
        self.ledger.tokens["total"], self.ledger.tokens["supervised"] = int(rows.lengths.sum()), sum(supervised)
