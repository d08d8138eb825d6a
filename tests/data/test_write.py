"""Writing: what is written reads back as the same records."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.rows import jsonl, section

from tunesmith.data.preference import make_pair, make_prompt, make_ranking, make_unpaired
from tunesmith.data.read import read_records
from tunesmith.data.records import Message, Source
from tunesmith.data.write import write_records
from tunesmith.errors import DataRefused

HERE = Source("rows.jsonl", 1)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "c1", "function": {"name": "look", "arguments": {"at": "sky"}}}
TALK = [Message("system", "S"), Message("user", "q"), Message("assistant", "a"), Message("user", "q2")]
LOOKED = [Message("assistant", "", "why", (CALL,)), Message("tool", "blue", None, None, "c1", "look"), Message("assistant", "Blue.")]
RED = [Message("assistant", "Red.\n\nHuman: no")]
RECORDS = {
    "preference": [
        make_pair(TALK, LOOKED, RED, HERE, margin=0.5, tools=[TOOL]),
        make_pair(TALK[1:2], RED, LOOKED[2:], HERE),
    ],
    "ranking": [make_ranking(TALK, [LOOKED, RED, LOOKED[2:]], HERE, tools=[TOOL]), make_ranking(TALK, [RED, LOOKED], HERE)],
    "unpaired": [make_unpaired(TALK, LOOKED, True, HERE, tools=[TOOL]), make_unpaired(TALK, RED, False, HERE)],
    "prompt": [make_prompt(TALK, {"answer": "4", "n": [1, None], "odd": None}, HERE, tools=[TOOL]), make_prompt(TALK, {}, HERE)],
}


def same(read, written) -> bool:
    """Whether two lists of records are equal but for where they were read."""
    return [{**fields(one), "source": None} for one in read] == [{**fields(one), "source": None} for one in written]


def fields(record):
    return {name: getattr(record, name) for name in record.__slots__}


@pytest.mark.parametrize("form", RECORDS)
def test_records_of_each_format_read_back_as_they_were(tmp_path, form):
    write_records(tmp_path / "out.jsonl", RECORDS[form], form)
    result = read_records(str(tmp_path / "out.jsonl"), section())
    assert (result.format, result.rejected) == (form, [])
    assert same(result.records, RECORDS[form])


def test_pairs_read_back_from_openai_s_shape_and_from_dialogues(tmp_path):
    write_records(tmp_path / "out.jsonl", RECORDS["preference"], "preference", pairs="openai")
    assert "preferred_output" in json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert same(read_records(str(tmp_path / "out.jsonl"), section()).records, RECORDS["preference"])
    plain = [make_pair(TALK[1:], LOOKED[2:], [Message("assistant", "Red.")], HERE, margin=1.0)]
    write_records(tmp_path / "out.jsonl", plain, "preference", pairs="hh")
    assert json.loads((tmp_path / "out.jsonl").read_text())["rejected"] == "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant: Red."
    assert same(read_records(str(tmp_path / "out.jsonl"), section()).records, plain)


@pytest.mark.parametrize("record", RECORDS["preference"])
def test_a_pair_that_a_dialogue_of_two_speakers_cannot_hold_is_not_written_as_one(tmp_path, record):
    with pytest.raises(DataRefused, match="an HH dialogue holds nothing but plain turns") as caught:
        write_records(tmp_path / "out.jsonl", [record], "preference", pairs="hh")
    assert caught.value.where == record.row_id
    assert not (tmp_path / "out.jsonl").exists()


def test_a_record_of_another_kind_is_not_written(tmp_path):
    with pytest.raises(DataRefused, match="kind ranking cannot be written as preference"):
        write_records(tmp_path / "out.jsonl", RECORDS["ranking"], "preference")


def test_a_file_that_was_read_is_written_with_the_same_ids(tmp_path):
    rows = [{"prompt": f"q{i}", "completions": ["a", "b", "c"], "scores": [i % 3, i % 3 - 1, i % 3 + 1]} for i in range(5)]
    first = read_records(jsonl(tmp_path, rows), section()).records
    write_records(tmp_path / "again.jsonl", first, "ranking")
    assert [r.row_id for r in read_records(str(tmp_path / "again.jsonl"), section()).records] == [r.row_id for r in first]


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(_TEXT, _TEXT, _TEXT, st.none() | st.floats(0, 9)), min_size=1, max_size=4), st.sampled_from(["trl", "openai"]))
def test_any_text_survives_writing_and_reading(tmp_path, values, shape):
    pairs = [
        make_pair([Message("user", asked)], [Message("assistant", good)], [Message("assistant", bad)], HERE, margin=margin)
        for asked, good, bad, margin in values
        if good.strip() != bad.strip()
    ]
    write_records(tmp_path / "out.jsonl", pairs, "preference", pairs=shape)
    if pairs:
        assert same(read_records(str(tmp_path / "out.jsonl"), section()).records, pairs)
