"""Raw rows out of one data file, each with the line it begins on, or the reason why it is none.

Takes a .jsonl, .json, .csv, .tsv or .parquet file, gives `RawRow`s in order. A file is read once, hashed on the way, and
never held whole but for .json. One bad row never costs its neighbours; a problem of the whole file is an error.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import DataRefused

MAX_ROW_BYTES = 1_000_000  # bytes; a longer row is a file that lost its line breaks, not an example
KEPT_BYTES = 65_536  # bytes of a rejected row that the quarantine keeps whole
PREFIX_BYTES = 1_000  # bytes kept of a longer one, beside its size and sha256
_HEAD_BYTES = 65_536  # bytes looked at to tell text from binary
_CONTROL_SHARE = 0.05  # of the head; compressed data has a tenth, UTF-16 a half, text none
_CHUNK_BYTES = 1 << 20

NOT_UTF8 = "not UTF-8"  # how the reason of such a row begins
TO_UTF8 = "save the file as UTF-8; if it is Latin-1 (Windows), by `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW`"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_TEXT_SUFFIXES = (".txt", ".text", ".md")
_BINARY = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"%PDF": "a PDF",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x7fELF": "a program",
    b"SQLite format 3": "an SQLite database",
    b"GGUF": "a GGUF model",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


@dataclass(frozen=True, slots=True)
class Oversized:
    """What is kept of a row that is too long to be held: its beginning, size and sha256."""

    prefix: bytes
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a file: `row` holds its values, or `reason` says why it is no row. `raw` is what stood there."""

    line: int
    row: dict[str, Any] | None
    reason: str | None
    raw: bytes | Oversized | None


def read_rows(path: Path, shown: str, notes: Counter[str], hasher: Any, on_columns: Callable[[list[str]], None]) -> Iterator[RawRow]:
    """The rows of the file at `path`, named `shown` in errors; what was found on the way is counted in `notes`.

    `on_columns` is told the columns of a CSV or Parquet file before its first row. When the last row is out, `hasher`
    (of hashlib) has seen the whole file. Raises DataRefused for a file that is empty, no text, or of another kind.
    """
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
        suffix = path.suffix.lower()
        _refuse_unusable(head, suffix, shown)
        marked = head.startswith(codecs.BOM_UTF8)
        if marked:
            hasher.update(codecs.BOM_UTF8)
            notes["byte-order mark skipped"] += 1
        stream.seek(len(codecs.BOM_UTF8) if marked else 0)
        if suffix == ".parquet":
            yield from _parquet(stream, shown, notes, hasher, on_columns)
        elif suffix in (".csv", ".tsv"):
            yield from _csv(stream, shown, notes, hasher, on_columns)
        elif suffix == ".json" and head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            yield from _json_list(stream, shown, hasher)
        else:
            yield from _json_lines(stream, notes, hasher)


def kept(raw: bytes | Oversized) -> str | dict[str, Any]:
    """What the quarantine keeps of a rejected row: its text, or of a long one the beginning, size and sha256."""
    if isinstance(raw, bytes):
        if len(raw) <= KEPT_BYTES:
            return raw.decode("utf-8", "backslashreplace")
        raw = Oversized(raw[:PREFIX_BYTES], len(raw), hashlib.sha256(raw).hexdigest())
    return {"prefix": raw.prefix.decode("utf-8", "backslashreplace"), "bytes": raw.size, "sha256": raw.sha256}


def too_long(size: int) -> str:
    """The reason of a row over the limit, with its size."""
    return f"row of {size / 1e6:.1f} MB; at most {MAX_ROW_BYTES / 1e6:.0f} MB is read"


def _refuse_unusable(head: bytes, suffix: str, shown: str) -> None:
    if not head.strip():
        raise DataRefused("the file is empty", where=shown, mend="name a file with rows")
    kind = next((name for magic, name in _BINARY.items() if head.startswith(magic)), None)
    if kind == "Parquet" and suffix == ".parquet":
        return
    control = sum(count for byte, count in Counter(head).items() if byte < 9 or (13 < byte < 32 and byte != 27))
    if kind or (control >= 8 and control > _CONTROL_SHARE * len(head)):
        raise DataRefused(
            f"the file is no text: it {f'is {kind}' if kind else 'holds binary data'}",
            where=shown,
            mend="unpack or convert it to UTF-8 JSON lines, CSV or Parquet (with that suffix)",
        )
    if suffix == ".parquet":
        raise DataRefused("the file is no Parquet file", where=shown, mend="give it the suffix of what it holds")
    if suffix not in SUFFIXES:
        mend = f"rename it to one of {', '.join(SUFFIXES)}"
        if suffix in _TEXT_SUFFIXES:
            mend = 'write each document as a line {"text": "..."} of a .jsonl file; JSON lines or a table only need the suffix of such'
        raise DataRefused(f"the suffix {suffix or '(none)'} does not say how to read it", where=shown, mend=mend)


def _lines(stream: IO[bytes], hasher: Any, observe: Callable[[bytes], None] | None = None) -> Iterator[tuple[int, bytes | Oversized]]:
    """(number, line with its line break) of a binary stream; a line over the limit is read through but not held."""
    number = 0
    while chunk := stream.readline(MAX_ROW_BYTES + 2):
        number += 1
        hasher.update(chunk)
        if observe:
            observe(chunk)
        if chunk.endswith(b"\n") or len(chunk) < MAX_ROW_BYTES + 2:
            yield number, chunk
            continue
        digest, size, prefix = hashlib.sha256(chunk), len(chunk), chunk[:PREFIX_BYTES]
        while not chunk.endswith(b"\n") and (chunk := stream.readline(_CHUNK_BYTES)):
            hasher.update(chunk)
            if observe:
                observe(chunk)
            digest.update(chunk)
            size += len(chunk)
        yield number, Oversized(prefix, size, digest.hexdigest())


def _json_lines(stream: IO[bytes], notes: Counter[str], hasher: Any) -> Iterator[RawRow]:
    for number, line in _lines(stream, hasher):
        if isinstance(line, Oversized):
            yield RawRow(number, None, too_long(line.size), line)
            continue
        line = line.rstrip(b"\r\n")
        if not line.strip():
            notes["blank lines skipped"] += 1
        elif len(line) > MAX_ROW_BYTES:
            yield RawRow(number, None, too_long(len(line)), line)
        else:
            row, reason = _parse_json(line)
            yield RawRow(number, row, reason, line)


def _parse_json(raw: bytes) -> tuple[dict[str, Any] | None, str | None]:
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_twice)
    except UnicodeDecodeError as error:
        return None, f"{NOT_UTF8}: byte 0x{raw[error.start]:02x} at position {error.start + 1} of the row"
    except json.JSONDecodeError as error:
        return None, f"broken JSON: {error.msg} (column {error.colno})"
    except RecursionError:
        return None, "broken JSON: nested too deep"
    except ValueError as error:
        return None, f"broken JSON: {error}"
    return (value, None) if isinstance(value, dict) else (None, f"not a JSON object but {kind_of(value)}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:40]!r} occurs twice in one object")
    return made


def kind_of(value: Any) -> str:
    """The JSON kind of a value, in words."""
    kinds = ((bool, "true or false"), (str, "text"), (int, "a number"), (float, "a number"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null" if value is None else type(value).__name__)


def _json_list(stream: IO[bytes], shown: str, hasher: Any) -> Iterator[RawRow]:
    """The elements of a JSON list, each on the line where it begins; a list broken between elements cannot be read on."""
    data = stream.read()
    hasher.update(data)
    text = data.decode("utf-8", "surrogateescape")
    decoder = json.JSONDecoder()
    blank = re.compile(r"\s*")
    place = blank.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    line, counted = 1, 0
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            _, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            what = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be parsed"
            raise DataRefused(
                f"broken JSON list: {what}, in the element that begins here",
                where=f"{shown}:{line}",
                mend="mend it, or write one object a line (.jsonl)",
            ) from error
        raw = text[place:end].encode("utf-8", "surrogateescape")
        row, reason = (None, too_long(len(raw))) if len(raw) > MAX_ROW_BYTES else _parse_json(raw)
        yield RawRow(line, row, reason, raw)
        place = blank.match(text, end).end()  # type: ignore[union-attr]
        if text[place : place + 1] == ",":
            place = blank.match(text, place + 1).end()  # type: ignore[union-attr]
        elif text[place : place + 1] != "]":
            line += text.count("\n", counted, place)
            raise DataRefused(
                "broken JSON list: a comma or ] is missing", where=f"{shown}:{line}", mend="mend it, or write one object a line (.jsonl)"
            )
    if text[place + 1 :].strip():
        raise DataRefused("text follows after the JSON list", where=shown, mend="one list a file, or one object a line (.jsonl)")


class _Quotes:
    """Whether a quoted CSV field is open, fed with the bytes as they come; the rules of Python's csv module."""

    def __init__(self, delimiter: bytes):
        self.delimiter, self.state = delimiter[0], "start"

    @property
    def open(self) -> bool:
        return self.state == "quoted"

    def feed(self, chunk: bytes) -> None:
        if b'"' not in chunk:
            if self.state != "quoted":
                self.state = "start" if chunk[-1] in (10, self.delimiter) else "plain"
            return
        state, delimiter = self.state, self.delimiter
        for byte in chunk:
            if byte == 34:
                state = {"start": "quoted", "quoted": "closing", "closing": "quoted"}.get(state, "plain")
            elif state != "quoted":
                state = "start" if byte == delimiter or byte == 10 else "plain"
        self.state = state


def _csv(stream: IO[bytes], shown: str, notes: Counter[str], hasher: Any, on_columns: Callable[[list[str]], None]) -> Iterator[RawRow]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))  # the module's own limit, 131 kB, is below a row's
    delimiter = _delimiter(stream, shown, notes)
    header: list[str] | None = None
    for number, raw, reason in _csv_records(stream, hasher, delimiter):
        if isinstance(raw, bytes) and not reason and not raw.strip():
            notes["blank lines skipped"] += 1
            continue
        fields = None
        if not reason and isinstance(raw, bytes):
            fields, reason = _parse_csv(raw, delimiter)
        if header is None:
            header = _header(fields, reason, f"{shown}:{number}")
            on_columns(header)
        elif fields is None or len(fields) != len(header):
            counts = f"{len(fields or [])} fields where the header has {len(header)}"
            yield RawRow(number, None, reason or counts, raw)
        else:
            yield RawRow(number, dict(zip(header, fields, strict=True)), None, raw)


def _delimiter(stream: IO[bytes], shown: str, notes: Counter[str]) -> bytes:
    """Tab for .tsv; for .csv the comma, unless the header has none and holds semicolons or tabs, which is noted."""
    begin = stream.tell()
    first = stream.readline(_HEAD_BYTES)
    stream.seek(begin)
    if shown.lower().endswith(".tsv"):
        return b"\t"
    found = next((sign for sign in (b",", b";", b"\t") if sign in first), b",")
    if found != b",":
        notes[f"fields are separated by {'semicolons' if found == b';' else 'tabs'}"] += 1
    return found


def _header(fields: list[str] | None, reason: str | None, where: str) -> list[str]:
    if fields is None:
        mend = TO_UTF8 if (reason or "").startswith(NOT_UTF8) else "the first line must name the columns, as UTF-8"
        raise DataRefused(f"the header cannot be read: {reason}", where=where, mend=mend)
    names = [name.strip() for name in fields]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataRefused(f"the header names {', '.join(map(repr, twice))} twice", where=where, mend="give each column its own name")
    return names


def _csv_records(stream: IO[bytes], hasher: Any, delimiter: bytes) -> Iterator[tuple[int, bytes | Oversized, str | None]]:
    """(first line, bytes, reason) of each record; a quote that is never closed costs each line after it its own reason."""
    quotes, digest = _Quotes(delimiter), hashlib.sha256()
    parts: list[tuple[int, bytes | Oversized]] = []

    def observe(chunk: bytes) -> None:
        quotes.feed(chunk)
        digest.update(chunk)

    for number, line in _lines(stream, hasher, observe):
        parts.append((number, line))
        if not quotes.open:
            yield _joined(parts, digest.hexdigest())
            parts, digest = [], hashlib.sha256()
    for number, line in parts:
        yield number, line, f"inside the quote opened on line {parts[0][0]}, which is never closed"


def _joined(parts: list[tuple[int, bytes | Oversized]], sha256: str) -> tuple[int, bytes | Oversized, str | None]:
    start, lines = parts[0][0], [line for _, line in parts]
    whole = [line for line in lines if isinstance(line, bytes)]
    if len(whole) == len(lines):
        raw = b"".join(whole).rstrip(b"\r\n")
        return start, raw, too_long(len(raw)) if len(raw) > MAX_ROW_BYTES else None
    size = sum(len(line) if isinstance(line, bytes) else line.size for line in lines)
    prefix = lines[0][:PREFIX_BYTES] if isinstance(lines[0], bytes) else lines[0].prefix
    return start, Oversized(prefix, size, sha256), too_long(size)


def _parse_csv(raw: bytes, delimiter: bytes) -> tuple[list[str] | None, str | None]:
    if b"\x00" in raw:
        return None, "holds a NUL byte"
    try:
        records = list(csv.reader(io.StringIO(raw.decode("utf-8"), newline=""), delimiter=delimiter.decode(), strict=True))
    except UnicodeDecodeError as error:
        return None, f"{NOT_UTF8}: byte 0x{raw[error.start]:02x} at position {error.start + 1} of the row"
    except csv.Error as error:
        return None, f"broken CSV: {error}"
    return (records[0], None) if len(records) == 1 else (None, f"broken CSV: {len(records)} records where one was expected")


def _parquet(stream: IO[bytes], shown: str, notes: Counter[str], hasher: Any, on_columns: Callable[[list[str]], None]) -> Iterator[RawRow]:
    """Rows of a Parquet file; the line is the row's number. Only columns whose values are text, numbers, lists or records are read."""
    import pyarrow as pa
    from pyarrow import parquet

    while chunk := stream.read(_CHUNK_BYTES):
        hasher.update(chunk)
    stream.seek(0)
    try:
        file = parquet.ParquetFile(stream)
        on_columns(file.schema_arrow.names)
        wanted = [
            field.name for field in file.schema_arrow if not pa.types.is_binary(field.type) and not pa.types.is_large_binary(field.type)
        ]
        if skipped := [name for name in file.schema_arrow.names if name not in wanted]:
            notes[f"binary columns not read: {', '.join(skipped)}"] += 1
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(number, _without_nulls(row), None, None)
    except (pa.ArrowException, OSError) as error:
        raise DataRefused(
            f"the Parquet file cannot be read: {str(error).splitlines()[0][:200]}",
            where=shown,
            mend="write it again, or convert it to JSON lines",
        ) from error


def _without_nulls(value: Any) -> Any:
    """Values without the nulls that Parquet puts where only another row has the key."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
