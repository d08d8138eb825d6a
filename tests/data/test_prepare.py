"""A validation file serves for choices only: none of its rows was trained on or is a test row, and none vanishes without a word."""

from __future__ import annotations

import json

import pytest
from tests.data.rows import jsonl

from tunesmith.data.prepare import Rendering, prepare_data
from tunesmith.errors import DataRefused
from tunesmith.recipe import DataSection
from tunesmith.rundir import RunDirectory


def row(number: int, words: int = 1):
    return {"prompt": f"number {number} of the list", "completion": " ".join(["ok"] * words)}


@pytest.fixture
def prepared(tmp_path, smollm2_tokenizer, smollm2_template):
    """Prepares training rows 0 to 9 with these validation rows."""

    def preparer(validation, **settings):
        files = {"train": jsonl(tmp_path, map(row, range(10))), "validation": jsonl(tmp_path, validation, "validation.jsonl")}
        how = Rendering(smollm2_template, smollm2_tokenizer, 8192)
        with RunDirectory.open(tmp_path / "run", resume=True) as run:
            return prepare_data(DataSection(**files, **settings), run, how, seed=0)

    return preparer


def asked(data) -> list[str]:
    return [record.prompt()[-1].content for record in data.validation_records]


def test_a_validation_row_that_is_trained_on_is_left_out_with_a_finding(prepared, tmp_path):
    data = prepared([row(3), row(20), row(21)])
    assert asked(data) == ["number 20 of the list", "number 21 of the list"]
    assert len(data.validation) == 2
    assert len(data.train) == 10
    (finding,) = [found for found in data.findings if found.check == "validation_overlap"]
    assert finding.row_ids != []
    assert finding.related_ids == [data.records[3].row_id]
    assert f"{tmp_path}/validation.jsonl: 1 of 3 validation rows are training rows and are left out" in data.notes


def test_a_validation_file_of_training_rows_only_is_refused(prepared, tmp_path):
    with pytest.raises(DataRefused, match="every validation row is also a training row"):
        prepared([row(3), row(4)])
    findings = json.loads((tmp_path / "run" / "data" / "health.json").read_text())["findings"]
    assert findings[-1]["check"] == "validation_overlap"


def test_a_validation_file_of_test_rows_only_is_refused(prepared, tmp_path):
    with pytest.raises(DataRefused, match="every validation row is also a test row"):
        prepared([row(20)], test=jsonl(tmp_path, [row(20)], "test.jsonl"))


def test_a_validation_row_that_repeats_another_is_left_out_with_a_note(prepared, tmp_path):
    data = prepared([row(20), row(20), row(21)])
    assert asked(data) == ["number 20 of the list", "number 21 of the list"]
    assert f"{tmp_path}/validation.jsonl: 1 of 3 validation rows repeat another and are left out" in data.notes


@pytest.mark.parametrize(("policy", "left"), [("drop", 1), ("cut", 2)])
def test_a_validation_row_over_the_limit_is_dropped_or_cut_with_a_note(prepared, policy, left):
    data = prepared([row(20), row(21, words=300)], max_length=100, too_long=policy)
    assert len(data.validation) == len(data.validation_records) == left
    assert max(data.validation.lengths) <= 100
    (note,) = [note for note in data.notes if "longer than 100 tokens" in note]
    assert f"{left - 1} were cut, {2 - left} dropped" in note
    assert data.ledger.rows_dropped == {}, "the ledger counts training rows"


def test_a_validation_row_over_the_limit_is_refused_by_default(prepared):
    with pytest.raises(DataRefused, match="1 of 2 rows are longer than 100 tokens") as caught:
        prepared([row(20), row(21, words=300)], max_length=100)
    assert "validation.jsonl:2" in caught.value.where


def test_without_a_limit_the_longest_validation_row_stays_whole(prepared):
    data = prepared([row(20), row(21, words=300)])
    assert len(data.validation) == 2
    assert max(data.validation.lengths) == data.max_length > 300 > max(data.train.lengths)


@pytest.fixture
def prompts(tmp_path, smollm2_tokenizer, smollm2_template):
    """Prepares rows for an objective that asks prompts."""

    def preparer(rows, **settings):
        how = Rendering(smollm2_template, smollm2_tokenizer, 8192)
        with RunDirectory.open(tmp_path / "run", resume=True) as run:
            return prepare_data(DataSection(train=jsonl(tmp_path, rows), **settings), run, how, seed=0, kind="prompt")

    return preparer


def test_texts_are_refused_where_prompts_are_wanted(prompts):
    with pytest.raises(DataRefused, match="nothing is asked") as caught:
        prompts([{"text": f"number {number}"} for number in range(5)], validation=0.0)
    assert "{prompt: text}" in caught.value.mend
    assert len(prompts([{"text": f"number {number}"} for number in range(5)], columns={"prompt": "text"}, validation=0.0).records) == 5


def test_prompts_with_a_completion_are_asked_beside_prompts_without(prompts):
    data = prompts([{"prompt": "number 0", "answer": "ok"}, row(1), row(2)], validation=0.0)
    assert [(record.prompt[-1].content, record.columns) for record in data.records] == [
        ("number 0", {"answer": "ok"}),
        ("number 1 of the list", {"answer": "ok"}),
        ("number 2 of the list", {"answer": "ok"}),
    ]
    assert data.quarantine == []
