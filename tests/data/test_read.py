"""Reading: ids and the system message, the quarantine, and that no row vanishes."""

from __future__ import annotations

import hashlib
import json
import random

import pyarrow as pa
import pytest
from pyarrow import parquet
from tests.data.rows import GOOD, jsonl, read_one, section, write

from tunesmith.data.files import KEPT_BYTES, MAX_ROW_BYTES
from tunesmith.data.read import read_records


def test_the_task_description_becomes_the_system_message_of_rows_that_bring_none_and_changes_no_id(tmp_path):
    own = {"messages": [{"role": "system", "content": "Mine."}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = jsonl(tmp_path, [own, {"messages": own["messages"][1:]}])
    plain, described = read_records(path, section()), read_records(path, section(), system="Do it.")
    assert [record.messages[0].content for record in described.records] == ["Mine.", "Do it."]
    assert [record.row_id for record in plain.records] == [record.row_id for record in described.records]


def test_row_ids_are_content_hashes_equal_across_files_and_formats_and_differ_by_content(tmp_path):
    one = read_one(tmp_path, GOOD).row_id
    moved = read_records(jsonl(tmp_path, [{"prompt": "x", "completion": "y"}, GOOD], "other.jsonl"), section()).records[1]
    alpaca = read_one(tmp_path, {"instruction": GOOD["prompt"], "output": GOOD["completion"]})
    assert one == moved.row_id == alpaca.row_id
    assert one.startswith("r")
    assert len(one) == 13
    assert one != read_one(tmp_path, {**GOOD, "completion": "5"}).row_id


def test_a_quarantined_row_has_path_line_reason_and_what_stood_there(tmp_path):
    quarantine = []
    path = jsonl(tmp_path, [GOOD] * 4 + ["{oops"])
    result = read_records(path, section(), quarantine=quarantine)
    assert quarantine == [{"path": path, "line": 5, "reason": result.rejected[0].reason, "row": "{oops"}]
    assert str(result.rejected[0]).startswith(f"{path}:5: broken JSON")


def test_a_line_that_is_not_utf8_is_quarantined_with_its_byte(tmp_path):
    path = write(tmp_path, "a.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 5 + b'{"prompt": "caf\xe9", "completion": "b"}\n')
    result = read_records(path, section())
    assert (result.rejected[0].line, result.rejected[0].row) == (6, '{"prompt": "caf\\xe9", "completion": "b"}')
    assert "not UTF-8: byte 0xe9 at position 16" in result.rejected[0].reason


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_a_row_of_ten_megabytes_is_rejected_with_its_size_and_is_not_kept_whole(tmp_path, name):
    small, huge = "b" * 10, "x" * 10_000_000
    rows = [{"prompt": "q", "completion": answer} for answer in (*[small] * 5, huge, *[small] * 5)]
    if name == "a.csv":
        text = "prompt,completion\n" + "".join(f'q,"{row["completion"]}"\n' for row in rows)
    else:
        text = json.dumps(rows) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in rows)
    result = read_records(write(tmp_path, name, text), section())
    assert len(result.records) == 10
    (rejected,) = result.rejected
    assert rejected.reason.startswith("row of 10.0 MB; at most 1 MB is read")
    assert len(json.dumps(rejected.to_json())) < 10_000
    assert rejected.row["bytes"] >= 10_000_000
    assert result.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_the_hash_of_a_row_that_is_not_kept_whole_is_that_of_its_line(tmp_path):
    line = b'{"prompt": "' + b"x" * 2_000_000 + b'"}\n'
    path = write(tmp_path, "a.jsonl", json.dumps(GOOD).encode() + b"\n" + line)
    (rejected,) = read_records(path, section(max_rejected=0.5)).rejected
    assert rejected.row == {"prefix": line[:1000].decode(), "bytes": len(line), "sha256": hashlib.sha256(line).hexdigest()}


def test_a_row_of_just_the_limit_is_kept_and_one_byte_more_is_not(tmp_path):
    frame = len(json.dumps({"prompt": "q", "completion": ""}))
    rows = [json.dumps({"prompt": "q", "completion": "x" * (MAX_ROW_BYTES - frame + more)}) for more in (0, 1)]
    assert [len(row) for row in rows] == [MAX_ROW_BYTES, MAX_ROW_BYTES + 1]
    for end in ("\n", "\r\n"):
        result = read_records(write(tmp_path, "a.jsonl", end.join(rows)), section(max_rejected=0.5))
        assert ([record.source.line for record in result.records], [bad.line for bad in result.rejected]) == ([1], [2])


def test_a_rejected_row_over_the_quarantine_limit_is_kept_as_prefix_and_hash(tmp_path):
    bad = json.dumps({"prompt": "x" * KEPT_BYTES})
    (rejected,) = read_records(jsonl(tmp_path, [GOOD] * 9 + [bad]), section()).rejected
    assert rejected.row["sha256"] == hashlib.sha256(bad.encode()).hexdigest()


def test_a_parquet_row_over_the_limit_is_rejected_too(tmp_path):
    parquet.write_table(pa.table({"prompt": ["a"] * 6, "completion": ["b"] * 5 + ["x" * 2_000_000]}), tmp_path / "a.parquet")
    (rejected,) = read_records(str(tmp_path / "a.parquet"), section()).rejected
    assert (rejected.line, rejected.reason) == (6, "row of 2.0 MB; at most 1 MB is read")


def test_blank_lines_and_a_byte_order_mark_are_noted_and_are_no_rows(tmp_path):
    result = read_records(write(tmp_path, "a.jsonl", "\ufeff" + json.dumps(GOOD) + "\r\n\n  \n" + json.dumps(GOOD)), section())
    assert (result.rows_in, len(result.records)) == (2, 2)
    assert [record.source.line for record in result.records] == [1, 4]
    assert any("byte-order mark" in note for note in result.notes)
    assert any("blank lines skipped (2 times)" in note for note in result.notes)


def fuzzed_lines(count: int, seed: int) -> list[bytes]:
    """Lines from good to garbage: a good row, cut, with bytes flipped, inserted, or another JSON value."""
    draw = random.Random(seed)
    values = [
        None,
        0,
        1.5,
        True,
        "",
        "x",
        [],
        {},
        [{}],
        [{"role": "user"}],
        {"a": None},
        "\ud800",
        [[1]],
        [{"type": "text"}],
        [{"type": "audio"}],
    ]
    keys = ["prompt", "completion", "tools", "messages", "text", "role", "content", "weight", "x"]
    lines = []
    for index in range(count):
        line = json.dumps({**GOOD, "prompt": f"question {index}"}, ensure_ascii=draw.random() < 0.5).encode()
        kind = draw.randrange(6)
        if kind == 1:
            line = line[: draw.randrange(len(line))]
        elif kind == 2:
            line = bytes(byte ^ (1 << draw.randrange(8)) if draw.random() < 0.05 else byte for byte in line)
        elif kind == 3:
            line = draw.randbytes(draw.randrange(1, 60))
        elif kind == 4:
            line = json.dumps({draw.choice(keys): draw.choice(values) for _ in range(draw.randrange(5))}).encode()
        elif kind == 5:
            line = json.dumps({"prompt": draw.choice(values), "completion": draw.choice(values), "tools": draw.choice(values)}).encode()
        lines.append(line.replace(b"\n", b" "))
    return lines


@pytest.mark.parametrize("seed", range(2))
def test_of_ten_thousand_fuzzed_lines_each_is_kept_or_rejected_with_path_line_and_reason(tmp_path, seed):
    lines = [json.dumps(GOOD).encode()] * 200 + fuzzed_lines(10_000, seed)
    path = write(tmp_path, "fuzz.jsonl", b"\n".join(lines))
    quarantine = []
    result = read_records(path, section(format="prompt_completion", max_rejected=1.0), quarantine=quarantine)
    rows = [number for number, line in enumerate(lines, 1) if line.strip()]
    assert result.rows_in == len(rows) == len(result.records) + len(result.rejected)
    assert sorted([record.source.line for record in result.records] + [entry["line"] for entry in quarantine]) == rows
    assert all(entry["path"] == path and entry["reason"] and entry["row"] != "" for entry in quarantine)
    assert len(result.records) > 1000
    assert len(quarantine) > 1000
    json.dumps(quarantine).encode()
