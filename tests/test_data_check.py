"""`tunesmith data check`: what is wrong with a file is told once, with the rows, and nothing in it steers the terminal."""

from __future__ import annotations

import json

from tests.cli_tools import CONTROL, call, row, write_rows


def test_data_check_tells_what_is_wrong_with_a_file(tmp_path):
    rows = [*map(row, range(10)), row(0), '{"messages": 3}']
    train, test = write_rows(tmp_path / "train.jsonl", rows), write_rows(tmp_path / "test.jsonl", [row(1), row(50)])
    done = call("data", "check", train, "--test", test)
    assert done.status == 0
    assert f"rejected: {train}:12: " in done.out
    assert f"{test}: 2 of 2 rows are " in done.out
    assert "dropped, duplicate: 1" in done.out
    assert "a run without data.test_overlap: drop is refused" in done.out
    result = json.loads(call("data", "check", train, "--test", test, "--json").out)
    assert (result["rows_in"], result["test_rows_in"]) == (12, 2)
    assert [bad["line"] for bad in result["rejected"]] == [12]
    assert "test_overlap" in {finding["check"] for finding in result["findings"]}


def test_data_check_names_a_reason_once_with_the_rows_that_have_it_and_those_of_the_test_file(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [*map(row, range(200)), *['{"messages": 3}'] * 30])
    test = write_rows(tmp_path / "test.jsonl", [*map(row, range(300, 310)), "{"])
    done = call("data", "check", train, "--test", test)
    (line,) = [line for line in done.out.splitlines() if line.startswith(f"rejected: {train}:201, 202, 203, ")]
    assert " 220 and 10 more: " in line
    assert f"rejected: {test}:11: broken JSON" in done.out
    refused = call("data", "check", write_rows(tmp_path / "bad.jsonl", ['{"messages": 3}'] * 30))
    assert refused.err.count("bad.jsonl:") == 2  # where it is, and the reason
    assert "bad.jsonl:1, 2, 3, " in refused.err
    fine = call("data", "check", write_rows(tmp_path / "fine.jsonl", [row(1), row(2)]))
    assert fine.out.endswith("nothing was found wrong\n")


def test_data_check_reads_a_csv_of_its_own_columns_once_they_are_named(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"message {number} of a customer,refund\n" for number in range(8)))
    refused = call("data", "check", file)
    assert refused.status == 3
    assert "--columns prompt=text,completion=label" in refused.err
    assert "--format NAME" in refused.err
    mapped = json.loads(call("data", "check", file, "--columns", "prompt=text, completion=label", "--json").out)
    assert (mapped["format"], mapped["rows_in"], mapped["rejected"]) == ("prompt_completion", 8, [])
    assert json.loads(call("data", "check", file, "--format", "text", "--json").out)["format"] == "text"
    for words, tells in (
        (["--columns", "prompt"], "FIELD=COLUMN"),
        (["--columns", "prompt=txt,completion=label"], "did you mean `text`?"),
        (["--columns", "promt=text,completion=label"], "did you mean `prompt`?"),
        (["--format", "txt"], "did you mean `text`?"),
    ):
        done = call("data", "check", file, *words)
        assert done.status == 2
        assert tells in done.err


def test_what_data_hold_cannot_steer_the_terminal(tmp_path):
    rows = [*map(row, range(10)), '{"messages": "\\u001b[2J\\u0007"}', '{"\x1b]0;title\x07": 1}']
    done = call("data", "check", write_rows(tmp_path / "train.jsonl", rows))
    assert not CONTROL.search(done.out + done.err)


def test_rows_of_empty_answers_are_not_to_be_mapped_to_the_columns_that_they_have(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a question", "completion": ""}\n' * 8)
    refused = call("data", "check", file)
    assert refused.status == 3
    assert "--columns" not in refused.err
    assert "mend: mend the rows" in refused.err
