"""Reading: a data file or hub data set to records, with every row either kept or quarantined.

`read_records` takes the source and the recipe's data section; it gives the records, what was found (format, notes,
hashes) and the quarantined rows, each with path, line, reason and what stood there. rows in = kept + quarantined, always.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataRefused, MissingFile, RecipeError
from . import hub
from .files import MAX_ROW_BYTES, NOT_UTF8, TO_UTF8, RawRow, kept, read_rows, too_long
from .formats import ANSWER_NAMES, FIELDS, REQUIRED, USED, RowRefused, a_row, detect, required, short, to_record
from .preference import FORMATS_OF, KIND_OF_FORMAT, AnyRecord, Kind, kind_of_record
from .records import Source

if TYPE_CHECKING:
    from ..recipe import DataSection


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that is not used: where it stands, why, and its text (of a long one the beginning, size and sha256)."""

    path: str
    line: int
    reason: str
    row: str | dict[str, Any]

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"

    def to_json(self) -> dict[str, Any]:
        """One line of data/quarantine.jsonl."""
        return {"path": self.path, "line": self.line, "reason": self.reason, "row": self.row}


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file to read: where it lies, and how it is named to people."""

    path: Path
    shown: str


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What one source held.

    format: the record format of every row. sha256: of the file, or of the files' hashes where there are several.
    revision: the commit of a hub data set. notes: what was found and decided on the way, as sentences.
    """

    records: list[AnyRecord]
    format: str
    rows_in: int
    rejected: list[Quarantined]
    notes: list[str]
    sha256: str
    files: dict[str, str]
    revision: str | None = None


@dataclass(slots=True)
class _Reading:
    """What accumulates while the files of one source are read."""

    records: list[AnyRecord] = field(default_factory=list)
    unsure: dict[int, RawRow] = field(default_factory=dict)  # by place in records: rows that may lack a key of the others' format
    rejected: list[Quarantined] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    formats: dict[str, tuple[int, str]] = field(default_factory=dict)  # format -> (rows, where the first one stands)
    keys: Counter[str] = field(default_factory=Counter)
    rows_in: int = 0


def read_records(
    source: str,
    section: DataSection,
    *,
    system: str | None = None,
    quarantine: list[dict[str, Any]] | None = None,
    default_split: str = "train",
    kinds: Sequence[Kind] = (),
) -> ReadResult:
    """Reads `source`: a file's path, or a hub data set where no such path exists (`default_split` where it names none).

    `system` (the task's description) becomes the system message of rows that bring none. Rejected rows are appended to
    `quarantine` as they are met, so it is complete even when the data are refused. `kinds`: what is wanted, where not
    anything will do; of a row with the keys of several formats it decides which is taken. Raises MissingFile; RecipeError
    for a wrong data.columns; DataRefused for a file that is empty, no text or a mixture of formats, of another kind than
    those wanted, without one usable row, or with more than data.max_rejected of its rows rejected.
    """
    _check_columns_setting(section)
    files, revision = locate(source, default_split)
    reading = _Reading()
    hashes: dict[str, str] = {}
    for file in files:
        hasher = hashlib.sha256()
        for raw in open_rows(file, reading.notes, hasher, section.columns):
            _take(raw, file, section, system, reading, quarantine, kinds)
        hashes[file.shown] = hasher.hexdigest()
    _reject_incomplete(reading, section, quarantine, kinds)
    form = _agreed_format(reading, section, source, kinds)
    _require_kind(form, kinds, source)
    _refuse_bad_shares(reading, section, source)
    _note_keys(reading, form, section)
    notes = [f"{source}: {len(reading.records)} of {reading.rows_in} rows are {form}"]
    notes += [f"{source}: {text}" + (f" ({count} times)" if count > 1 else "") for text, count in reading.notes.items()]
    total = hashes[files[0].shown] if len(files) == 1 else _hash_of_hashes(hashes)
    return ReadResult(reading.records, form, reading.rows_in, reading.rejected, notes, total, hashes, revision)


def locate(source: str, default_split: str = "train") -> tuple[list[DataFile], str | None]:
    """The files of a source and, for a hub data set, its commit. Raises MissingFile or DataRefused."""
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            raise MissingFile("this is a folder, not a data file", where=source, mend="name one file in it")
        if path.exists():
            return [DataFile(path, source)], None
    except OSError as error:
        raise MissingFile(f"cannot be looked at: {error.strerror}", where=short(source), mend="check the path") from error
    if hub.is_hub_name(source):
        found, revision = hub.fetch(source, default_split)
        return [DataFile(path, shown) for path, shown in found], revision
    if path.is_symlink():
        raise MissingFile(f"the link leads to {path.readlink()}, which is not there", where=source, mend="check the link")
    neighbours = list(path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.stem, {entry.stem for entry in neighbours}, n=1)  # an ending that is alike says nothing
    near = difflib.get_close_matches(path.name, [entry.name for entry in neighbours if entry.stem in near], n=1, cutoff=0)
    raise MissingFile("no such data file", where=source, mend=f"did you mean {path.parent / near[0]}?" if near else "check the path")


def open_rows(file: DataFile, notes: Counter[str], hasher: Any, columns: dict[str, str] | None = None) -> Iterator[RawRow]:
    """The raw rows of one file; an unreadable file is a MissingFile, and so is one that vanishes while it is read."""

    def on_columns(names: list[str]) -> None:
        for ours, theirs in (columns or {}).items():
            if theirs not in names:
                near = difflib.get_close_matches(theirs, names, n=1)
                mend = f"did you mean `{near[0]}`?" if near else f"its columns: {', '.join(map(short, names))}"
                raise RecipeError(f"data.columns takes `{ours}` from `{theirs}`, which the file does not have", where=file.shown, mend=mend)

    try:
        yield from read_rows(file.path, file.shown, notes, hasher, on_columns)
    except OSError as error:
        raise MissingFile(
            f"cannot be read: {error.strerror or error}", where=file.shown, mend="check that the file is there and readable"
        ) from error


def _check_columns_setting(section: DataSection) -> None:
    for ours in section.columns:
        if ours not in FIELDS:
            near = difflib.get_close_matches(ours, sorted(FIELDS), n=1)
            mend = f"did you mean `{near[0]}`?" if near else f"fields: {', '.join(sorted(FIELDS))}"
            raise RecipeError(
                f"`{ours}` is no field of ours; data.columns maps our field to the file's column", where="data.columns", mend=mend
            )


def _take(
    raw: RawRow,
    file: DataFile,
    section: DataSection,
    system: str | None,
    reading: _Reading,
    quarantine: list[dict[str, Any]] | None,
    kinds: Sequence[Kind],
) -> None:
    """Keeps one row as a record, or quarantines it."""
    reading.rows_in += 1
    source = Source(file.shown, raw.line)
    try:
        reading.records.append(_record(raw, source, section, system, reading, kinds))
    except RowRefused as error:
        _reject(raw, source, str(error), reading, quarantine)


def _reject(raw: RawRow, source: Source, reason: str, reading: _Reading, quarantine: list[dict[str, Any]] | None) -> None:
    stood = raw.raw if raw.raw is not None else json.dumps(raw.row, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")
    rejected = Quarantined(source.path, source.line, reason, kept(stood))
    reading.rejected.append(rejected)
    if quarantine is not None:
        quarantine.append(rejected.to_json())


def _record(raw: RawRow, source: Source, section: DataSection, system: str | None, reading: _Reading, kinds: Sequence[Kind]) -> AnyRecord:
    if raw.row is None:
        raise RowRefused(raw.reason)
    row = _mapped(raw.row, section.columns, reading.notes)
    reading.keys.update(key for key, value in row.items() if value is not None)
    if section.format == "auto":
        found, why = detect(row, kinds)
        if not found:
            raise RowRefused(why)
        form = found[0]
        if len(found) > 1:
            reading.notes[f"rows have the keys of {' and of '.join(found)}; {form} was taken (data.format says otherwise)"] += 1
    else:
        form = section.format
    if raw.raw is None and (size := _size(row, form)) > MAX_ROW_BYTES:
        raise RowRefused(too_long(size))
    rows, first = reading.formats.get(form, (0, str(source)))
    reading.formats[form] = (rows + 1, first)
    record = to_record(row, form, source, system, reading.notes)
    labelled = form == "prompt_completion" and ("unpaired" in kinds or row.get("label") is not None)
    if section.format == "auto" and (form == "prompt" or labelled):
        reading.unsure[len(reading.records)] = raw
    return record


def _reject_incomplete(reading: _Reading, section: DataSection, quarantine: list[dict[str, Any]] | None, kinds: Sequence[Kind]) -> None:
    """Quarantines rows that were read in a format of fewer keys where all others show what they lack: a pair without its answers is no
    prompt, unless prompts are wanted, and an answer without a usable label among labelled ones is no conversation."""
    incomplete = {"prompt": ("preference", "prompt_completion", "ranking", "unpaired"), "prompt_completion": ("unpaired",)}
    for form, whole in incomplete.items():
        others = [other for other in reading.formats if other != form]
        if _prompts_with_answers(reading, kinds):
            return
        kind = KIND_OF_FORMAT[form]
        places = [place for place, record in enumerate(reading.records) if kind_of_record(record) == kind]
        if form not in reading.formats or len(others) != 1 or others[0] not in whole or not reading.unsure.keys() >= set(places):
            continue
        for place in places:
            raw = reading.unsure[place]
            row = _mapped(raw.row or {}, section.columns, Counter())
            absent = ", ".join(f"`{key}`" for key in required(others[0], row) if row.get(key) is None)
            reason = f"missing key {absent} of {a_row(others[0])}" if absent else f"label is {short(row.get('label'))}, not true or false"
            _reject(raw, reading.records[place].source, reason, reading, quarantine)
        gone = set(places)
        reading.records = [record for place, record in enumerate(reading.records) if place not in gone]
        del reading.formats[form]
        return


def _mapped(row: dict[str, Any], columns: dict[str, str], notes: Counter[str]) -> dict[str, Any]:
    """The row under our names. A whole number in a mapped prompt or completion, such as a label's, is read as text."""
    if not columns:
        return row
    if absent := [theirs for theirs in columns.values() if theirs not in row]:
        raise RowRefused(f"missing key {', '.join(map(short, absent))}, which data.columns names")
    theirs = set(columns.values())
    mapped = {key: value for key, value in row.items() if key not in theirs}
    for ours, name in columns.items():
        value = row[name]
        if ours in ("prompt", "completion") and isinstance(value, int) and not isinstance(value, bool):
            notes[f"numbers in `{name}` are read as text"] += 1
            value = str(value)
        mapped[ours] = value
    return mapped


def _size(row: dict[str, Any], form: str) -> int:
    """Bytes of the values that the format uses, as JSON; a Parquet row has no text of its own to measure."""
    used = {key: value for key, value in row.items() if key in USED[form] or form == "prompt"}
    return len(json.dumps(used, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace"))


def _prompts_with_answers(reading: _Reading, kinds: Sequence[Kind]) -> bool:
    """Whether some of the prompts that are wanted have a completion beside them: no mixture, since each row has a prompt to ask."""
    return "prompt" in kinds and reading.formats.keys() == {"prompt", "prompt_completion"}


def _agreed_format(reading: _Reading, section: DataSection, source: str, kinds: Sequence[Kind]) -> str:
    """The one format of all rows; where the recipe leaves it open, a mixture is refused."""
    if section.format != "auto":
        return section.format
    if _prompts_with_answers(reading, kinds):
        return "prompt"
    if len(reading.formats) > 1:
        parts = [f"{rows} {form} (first at {first})" for form, (rows, first) in reading.formats.items()]
        most = max(reading.formats, key=lambda form: reading.formats[form][0])
        mend = f"split the file by format, or set data.format: {most} to quarantine the other rows (in `data check`: --format {most})"
        raise DataRefused(f"the rows are a mixture of formats: {', '.join(parts)}", where=source, mend=mend)
    return next(iter(reading.formats), "auto")


def _require_kind(form: str, kinds: Sequence[Kind], source: str) -> None:
    """Raises DataRefused where the rows are of a kind that is not wanted."""
    if not kinds or form == "auto" or KIND_OF_FORMAT[form] in kinds:
        return
    wanted = [name for kind in kinds for name in FORMATS_OF[kind]]
    shown = ", ".join(f"{name} ({', '.join(REQUIRED[name])})" for name in wanted)
    mend = f"name a file of such rows, or map its columns by data.columns: {shown}"
    if "prompt" in kinds and "prompt" in USED[form]:
        mend += "; data.format: prompt asks the prompts of these rows and ignores their answers"
    if "conversation" in kinds and form == "unpaired":
        mend += "; data.format: prompt_completion trains on the completions of these rows and ignores their labels"
    raise DataRefused(f"the rows are {form}, and the stage's objective wants {' or '.join(wanted)}", where=source, mend=mend)


NAMED = 20  # reasons, and rows of a reason, that are named to people


def rejections(rows: Sequence[tuple[str, int, str]]) -> list[str]:
    """A line for each reason for which rows (path, line, reason) were rejected, naming them; the most frequent reason first.

    >>> rejections([("a.jsonl", 1, "it is empty"), ("a.jsonl", 2, "broken JSON"), ("a.jsonl", 4, "it is empty")])
    ['a.jsonl:1, 4: it is empty', 'a.jsonl:2: broken JSON']
    """
    lines: dict[tuple[str, str], list[int]] = defaultdict(list)
    for path, line, reason in rows:
        lines[path, reason].append(line)
    named = []
    for (path, reason), found in sorted(lines.items(), key=lambda entry: -len(entry[1]))[:NAMED]:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        named.append(f"{path}:{', '.join(map(str, found[:NAMED]))}{more}: {reason}")
    return named + ([f"{len(lines) - NAMED} more reasons"] if len(lines) > NAMED else [])


def _refuse_bad_shares(reading: _Reading, section: DataSection, source: str) -> None:
    rejected, rows_in = len(reading.rejected), reading.rows_in
    first = "".join(f"\n  {line}" for line in rejections([(row.path, row.line, row.reason) for row in reading.rejected]))
    if not reading.records:
        what = f"no row is usable; {rejected} of {rows_in} were rejected:{first}" if rejected else "the file holds no rows"
        raise DataRefused(
            what, where=source, mend=_mend_unusable(reading, source) if rejected else "put rows into it, or name another file"
        )
    if rejected > section.max_rejected * rows_in:
        raise DataRefused(
            f"{rejected} of {rows_in} rows were rejected, and data.max_rejected is {section.max_rejected:g}:{first}",
            where=source,
            mend=TO_UTF8 if _mostly_not_utf8(reading) else "mend the rows, or raise data.max_rejected to train without them",
        )


def _mostly_not_utf8(reading: _Reading) -> bool:
    return 2 * sum(entry.reason.startswith(NOT_UTF8) for entry in reading.rejected) > len(reading.rejected)


def _mend_unusable(reading: _Reading, source: str) -> str:
    """What to do with a file of which no row is usable: its encoding, its header, or the formats and how columns are mapped to them."""
    if _mostly_not_utf8(reading):
        return TO_UTF8
    if {"prompt", "completion"} <= set(reading.keys):
        return "mend the rows: their columns are prompt and completion already"
    formats = ", ".join(f"{name} ({', '.join(keys)})" for name, keys in REQUIRED.items())
    mend = f"give rows in one of the formats {formats}, or map them by data.columns"
    keys = list(reading.keys)
    answer = next((name for name in ANSWER_NAMES if name in keys), None)
    pair = ["text", answer] if answer and "text" in keys else keys if len(keys) == 2 else ["COLUMN", "COLUMN"]
    if keys:
        mend += f"; for `tunesmith data check` that is --columns prompt={pair[0]},completion={pair[1]}, or --format NAME"
    if keys and not answer and Path(source).suffix.lower() in (".csv", ".tsv"):
        mend += "; where the first line is a row already, put a header above it, such as text,label"
    return mend


def _note_keys(reading: _Reading, form: str, section: DataSection) -> None:
    for ours, theirs in section.columns.items():
        reading.notes[f"`{ours}` is taken from `{theirs}`"] += 1
    unused = sorted(key for key in reading.keys if key not in USED[form])
    if form == "prompt" and "prompt_completion" in reading.formats:
        unused = [key for key in unused if key != "completion"]
        reading.notes["rows with a completion are asked as the others are, and the completion is their column `answer`"] += 1
    if form == "prompt":
        reading.notes.update(_notes_of_columns(unused))
    elif unused:
        names = ", ".join(short(key) for key in unused[:10]) + (f" and {len(unused) - 10} more" if len(unused) > 10 else "")
        reading.notes[f"keys that are not used: {names}"] += 1


def _notes_of_columns(columns: Sequence[str]) -> list[str]:
    """What becomes of a prompt row's other keys; a usual name of an answer may have been meant to be trained on."""
    notes = [f"columns given to reward functions: {', '.join(map(short, columns))}"] if columns else []
    if beside := [name for name in ANSWER_NAMES if name in columns]:
        notes.append(f"`{beside[0]}` is not trained on; data.columns: {{completion: {beside[0]}}} would make it the answer")
    return notes


def _hash_of_hashes(hashes: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{digest}  {Path(shown).name}\n" for shown, digest in hashes.items()).encode()).hexdigest()
