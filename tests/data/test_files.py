"""Files: CSV, byte-order marks, sizes, and files that are not what their names say."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.rows import GOOD, jsonl, section, turns, write

from tunesmith.data.read import read_records
from tunesmith.errors import DataRefused, MissingFile


def read_csv(folder, text, **settings):
    return read_records(write(folder, "a.csv", text), section(max_rejected=1.0, **settings))


def test_csv_quotes_span_lines_and_the_line_is_the_records_first(tmp_path):
    result = read_csv(tmp_path, '\ufeffprompt,completion\r\n"one\r\ntwo, ""three""",a\r\nq,b\r\n"x",\n\n5" screen,c\n')
    assert [(record.source.line, record.messages[0].content, record.answer) for record in result.records] == [
        (2, 'one\r\ntwo, "three"', "a"),
        (4, "q", "b"),
        (7, '5" screen', "c"),
    ]
    assert [(bad.line, bad.reason) for bad in result.rejected] == [(5, "empty answer (turn 2 of 2)")]


def test_csv_rows_with_odd_fields_nul_bytes_or_stray_quotes_are_rejected_one_by_one(tmp_path):
    text = b'prompt,completion\na,b\na\na,b,c\na\x00,b\n"a"x,b\ncaf\xe9,b\nc,d\n'
    result = read_csv(tmp_path, text)
    assert [record.source.line for record in result.records] == [2, 8]
    assert [(bad.line, bad.reason.split(":")[0]) for bad in result.rejected] == [
        (3, "1 fields where the header has 2"),
        (4, "3 fields where the header has 2"),
        (5, "holds a NUL byte"),
        (6, "broken CSV"),
        (7, "not UTF-8"),
    ]


def test_a_quote_that_is_never_closed_costs_each_line_after_it_and_not_one_row_only(tmp_path):
    result = read_csv(tmp_path, 'prompt,completion\na,b\nc,"d\ne,f\ng,h\n')
    assert [record.source.line for record in result.records] == [2]
    assert [bad.line for bad in result.rejected] == [3, 4, 5]
    assert all("inside the quote opened on line 3, which is never closed" in bad.reason for bad in result.rejected)
    assert result.rows_in == 4


def test_a_csv_field_may_be_as_long_as_a_row(tmp_path):
    assert len(read_csv(tmp_path, "prompt,completion\nq," + "x" * 900_000 + "\n").records[0].answer) == 900_000


def test_another_delimiter_is_taken_from_the_header_and_noted(tmp_path):
    result = read_csv(tmp_path, "prompt;completion\na, b;c\n")
    assert turns(result.records[0]) == [("user", "a, b"), ("assistant", "c")]
    assert any("separated by semicolons" in note for note in result.notes)
    tabs = read_records(write(tmp_path, "a.tsv", "prompt\tcompletion\na,b\tc\n"), section())
    assert tabs.records[0].messages[0].content == "a,b"


@pytest.mark.parametrize("header", ["prompt,prompt", "caf\udce9,completion"])
def test_a_header_that_cannot_be_trusted_refuses_the_file(tmp_path, header):
    path = tmp_path / "a.csv"
    path.write_bytes(f"{header}\na,b\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(DataRefused, match=r"the header (names|cannot be read)"):
        read_records(str(path), section())


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.text(st.sampled_from('ab",;\r\n\t é\x00')), st.text(st.sampled_from('xy",\n\r ö'))), min_size=1, max_size=8))
def test_what_the_csv_module_writes_is_read_back_field_by_field(tmp_path, pairs):
    stream = io.StringIO()
    pairs, quarantine = [("long enough to be text " * 500, "yes"), *pairs], []
    csv.writer(stream).writerows([("prompt", "completion"), *pairs])
    try:
        records = read_records(write(tmp_path, "a.csv", stream.getvalue()), section(max_rejected=1.0), quarantine=quarantine).records
    except DataRefused:
        records = []
    expected = [pair for pair in pairs if all(field.strip() and "\x00" not in field for field in pair)]
    assert [(record.messages[0].content, record.answer) for record in records] == expected
    assert len(quarantine) == len(pairs) - len(expected)


def test_a_missing_file_names_the_nearest_and_a_folder_is_not_a_file(tmp_path):
    jsonl(tmp_path, [GOOD])
    for ending in ("csv", "md", "zip"):
        (tmp_path / f"train.{ending}").write_text("other")
    with pytest.raises(MissingFile, match=r"did you mean .*train\.jsonl") as caught:
        read_records(str(tmp_path / "trian.jsonl"), section())
    assert caught.value.exit_status == 2
    with pytest.raises(MissingFile) as caught:
        read_records(str(tmp_path / "rows.jsonl"), section())
    assert caught.value.mend == "check the path"  # only the ending is alike
    with pytest.raises(MissingFile, match="folder"):
        read_records(str(tmp_path), section())
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(MissingFile, match=r"the link leads to gone\.jsonl, which is not there"):
        read_records(str(tmp_path / "link.jsonl"), section())
    with pytest.raises(MissingFile):
        read_records("x" * 10_000 + ".jsonl", section())


@pytest.mark.parametrize(
    "name, content", [("a.jsonl", b""), ("a.csv", b" \n\n"), ("a.parquet", b""), ("a.csv", b"prompt,completion\n"), ("a.json", b"[]")]
)
def test_an_empty_file_is_refused(tmp_path, name, content):
    with pytest.raises(DataRefused, match=r"empty|holds no rows") as caught:
        read_records(write(tmp_path, name, content), section())
    assert caught.value.exit_status == 3


@pytest.mark.parametrize(
    "name, content, kind",
    [
        ("a.jsonl", b"\x1f\x8b\x08" + bytes(200), "gzip"),
        ("a.jsonl", json.dumps(GOOD).encode("utf-16"), "UTF-16"),
        ("a.jsonl", json.dumps(GOOD).encode("utf-16-le"), "binary"),
        ("a.csv", random.Random(0).randbytes(5_000), "binary"),
        ("a.parquet", random.Random(0).randbytes(5_000), "binary"),
        ("a.jsonl", b"PAR1" + bytes(100), "Parquet"),
        ("photo.jpg", b"\xff\xd8\xff\xe0" + bytes(100), "JPEG"),
    ],
)
def test_a_file_that_is_no_text_is_refused_saying_so(tmp_path, name, content, kind):
    with pytest.raises(DataRefused, match=rf"the file is no text: .*{kind}"):
        read_records(write(tmp_path, name, content), section())


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "hello\n", "the suffix .txt"),
        ("a.parquet", "prompt,completion\n", "no Parquet file"),
        ("a.parquet", b"PAR1" + b"x" * 100 + b"PAR1", "cannot be read"),
        ("a.json", '[{"prompt": "a", "completion": "b"}, {"prompt"]', "broken JSON list"),
        ("a.json", '[{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b"}]', "a comma or ] is missing"),
        ("a.json", '[{"prompt": "a", "completion": "b"}] []', "text follows"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, content, message):
    with pytest.raises(DataRefused, match=message):
        read_records(write(tmp_path, name, content), section())


def test_too_many_rejected_rows_refuse_the_data_with_the_first_twenty_and_the_count(tmp_path):
    quarantine = []
    path = jsonl(tmp_path, [GOOD] * 36 + ["{"] * 24)
    with pytest.raises(DataRefused, match=r"24 of 60 rows were rejected, and data.max_rejected is 0.2") as caught:
        read_records(path, section(), quarantine=quarantine)
    first = ", ".join(map(str, range(37, 57)))
    assert str(caught.value).splitlines()[1] == f"  {path}:{first} and 4 more: {quarantine[0]['reason']}"
    assert len(quarantine) == 24
    assert len(read_records(path, section(max_rejected=0.4)).records) == 36


def test_nothing_usable_is_refused_even_if_every_rejection_is_allowed(tmp_path):
    with pytest.raises(DataRefused, match="no row is usable; 2 of 2 were rejected"):
        read_records(jsonl(tmp_path, ["{", "["]), section(max_rejected=1.0))


def test_the_file_is_hashed_while_it_is_read(tmp_path):
    path = jsonl(tmp_path, [GOOD, "{", GOOD, ""])
    result = read_records(path, section(max_rejected=0.5))
    assert result.sha256 == hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest() == result.files[path]
