"""Formats: what a row means in each, which one its keys are, and every way in which a row can be bad."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tests.data.rows import GOOD, jsonl, read_one, reason_of, section, turns, write

from tunesmith.data.read import read_records
from tunesmith.data.records import REASONING_KEYS
from tunesmith.errors import DataRefused, RecipeError


def test_openai_messages_keep_tools_calls_reasoning_and_weights(tmp_path):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "unit": null}'}}
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Rain "}, {"type": "text", "text": "today?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Look it up.", "weight": 0},
            {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "dry"},
            {"role": "assistant", "content": "No.", "weight": 1},
        ],
        "tools": [tool],
    }
    record = read_one(tmp_path, row)
    assert turns(record) == [("system", "Be brief."), ("user", "Rain today?"), ("assistant", ""), ("tool", "dry"), ("assistant", "No.")]
    assert record.tools == (tool,)
    assert [message.weight for message in record.messages] == [None, None, 0.0, None, 1.0]
    hf = record.to_hf()
    assert hf[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo", "unit": None}
    assert {hf[2][key] for key in REASONING_KEYS} == {"Look it up."}
    assert hf[3] == {"role": "tool", "content": "dry", "tool_call_id": "c1", "name": "weather"}
    assert record.answer == "No."
    assert record.prompt() == record.messages[:-1]


@pytest.mark.parametrize("key", REASONING_KEYS)
def test_reasoning_is_read_under_each_of_its_names(tmp_path, key):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", key: "hm"}]}
    assert read_one(tmp_path, row).messages[-1].reasoning == "hm"


def test_alpaca_joins_instruction_and_input_and_keeps_system_and_history(tmp_path):
    row = {"instruction": "Translate.", "input": "chat", "output": "cat", "system": "You know French.", "history": [["hi", "hello"]]}
    expected = [
        ("system", "You know French."),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "Translate.\n\nchat"),
        ("assistant", "cat"),
    ]
    assert turns(read_one(tmp_path, row)) == expected
    assert turns(read_one(tmp_path, {"instruction": "Say hi.", "input": "", "output": "hi"})) == [("user", "Say hi."), ("assistant", "hi")]


def test_sharegpt_roles_and_function_calls_are_mapped(tmp_path):
    row = {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": "dry"},
            {"from": "gpt", "value": "No.", "weight": 0.5},
        ],
        "tools": "[]",
    }
    record = read_one(tmp_path, row)
    assert [message.role for message in record.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert record.messages[2].tool_calls == ({"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}},)
    assert record.messages[-1].weight == 0.5


def test_prompt_and_completion_are_strings_or_messages_and_only_the_completion_carries_loss(tmp_path):
    assert turns(read_one(tmp_path, GOOD)) == [("user", "What is 2+2?"), ("assistant", "4")]
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    record = read_one(tmp_path, {"prompt": asked, "completion": [{"role": "assistant", "content": "d"}]})
    assert turns(record) == [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert [message.weight for message in record.messages] == [None, 0.0, None, None]


def test_plain_text_is_a_document(tmp_path):
    record = read_one(
        tmp_path,
        {"text": "Once upon a time."},
    )
    assert record.text == "Once upon a time."


def test_a_json_list_is_read_with_the_line_of_each_element(tmp_path):
    path = write(tmp_path, "rows.json", '[\n {"prompt": "a",\n  "completion": "b"},\n\n 17,\n {"prompt": "c", "completion": "d"}\n]\n')
    result = read_records(path, section(max_rejected=0.5))
    assert [record.source.line for record in result.records] == [2, 6]
    assert [(bad.line, bad.reason) for bad in result.rejected] == [(5, "not a JSON object but a number")]
    assert result.rows_in == 3


def test_a_parquet_file_gives_the_same_records_as_json_lines(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}", "weight": 1.0}], "tools": None}
        for i in range(3)
    ]
    path = tmp_path / "train.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    from_parquet, from_lines = read_records(str(path), section()), read_records(jsonl(tmp_path, rows), section())
    assert [record.messages for record in from_parquet.records] == [record.messages for record in from_lines.records]
    assert [record.row_id for record in from_parquet.records] == [record.row_id for record in from_lines.records]
    assert from_parquet.records[2].source.line == 3
    assert from_parquet.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_nulls_that_parquet_adds_to_tools_of_different_keys_are_no_part_of_them(tmp_path):
    turns_ = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns_, "tools": [{"name": "f", "x": 1}]}, {"messages": turns_, "tools": [{"name": "g", "y": [2]}]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    records = read_records(str(tmp_path / "train.parquet"), section()).records
    assert [record.tools for record in records] == [({"name": "f", "x": 1},), ({"name": "g", "y": [2]},)]


def test_columns_map_csv_parquet_and_json_keys_and_whole_numbers_become_text(tmp_path):
    mapping = {"prompt": "text", "completion": "category"}
    from_csv = read_records(write(tmp_path, "a.csv", "id,text,category\n1,hello,greet\n"), section(columns=mapping))
    assert turns(from_csv.records[0]) == [("user", "hello"), ("assistant", "greet")]
    parquet.write_table(pa.table({"text": ["hello"], "category": [7]}), tmp_path / "a.parquet")
    from_parquet = read_records(str(tmp_path / "a.parquet"), section(columns=mapping))
    assert from_parquet.records[0].answer == "7"
    assert any("numbers in `category` are read as text" in note for note in from_parquet.notes)
    assert turns(read_one(tmp_path, {"text": "hello", "category": "greet"}, columns=mapping)) == turns(from_csv.records[0])
    assert any("not used: 'id'" in note for note in from_csv.notes)


@pytest.mark.parametrize(
    "columns, message", [({"prompt": "txt", "completion": "category"}, "did you mean `text`"), ({"promt": "text"}, "did you mean `prompt`")]
)
def test_a_column_map_that_names_nothing_is_a_recipe_error_with_the_nearest_name(tmp_path, columns, message):
    with pytest.raises(RecipeError, match=message):
        read_records(write(tmp_path, "a.csv", "text,category\nhello,greet\n"), section(columns=columns))


def test_the_format_and_unused_keys_are_reported(tmp_path):
    result = read_records(jsonl(tmp_path, [{**GOOD, "score": 3}]), section())
    assert result.format == "prompt_completion"
    assert any("1 of 1 rows are prompt_completion" in note for note in result.notes)
    assert any("not used: 'score'" in note for note in result.notes)


def test_rows_with_the_keys_of_two_formats_are_read_by_precedence_and_that_is_said(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "text": "a b"}
    result = read_records(jsonl(tmp_path, [row]), section())
    assert result.format == "messages"
    assert any("messages and of text" in note for note in result.notes)


def test_a_mixture_of_formats_is_refused_and_a_stated_format_quarantines_the_others(tmp_path):
    path = jsonl(tmp_path, [GOOD] * 9 + [{"instruction": "a", "output": "b"}])
    with pytest.raises(DataRefused, match=r"9 prompt_completion \(first at .*:1\), 1 alpaca \(first at .*:10\)"):
        read_records(path, section())
    result = read_records(path, section(format="prompt_completion"))
    assert len(result.records) == 9
    assert "missing key `prompt`, `completion`" in result.rejected[0].reason


def test_text_beside_a_label_is_not_silently_read_as_a_document(tmp_path):
    path = write(tmp_path, "a.csv", "text,category\nhello,greet\n")
    with pytest.raises(DataRefused, match=r"`text` stands beside `category`"):
        read_records(path, section())
    assert read_records(path, section(format="text")).records[0].text == "hello"


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"prompt": "a", ', "broken JSON"),
        ('{"prompt": "a", "completion": NaN}', "NaN is no JSON number"),
        ('{"prompt": "a", "completion": "b", "completion": "c"}', "the key 'completion' occurs twice"),
        ("[" * 100_000, "nested too deep"),
        ("[1, 2]", "not a JSON object but a list"),
        ('"text"', "not a JSON object but text"),
        ({"prompt": "a"}, "missing key `completion`"),
        ({"prompt": "a", "completion": None}, "missing key `completion`"),
        ({"prompt": 3, "completion": "b"}, "wrong type: prompt is a number, not text"),
        ({"prompt": "a", "completion": {"b": 1}}, "wrong type: completion is an object"),
        ({"prompt": "a", "completion": ""}, "empty answer"),
        ({"prompt": "a", "completion": " \n"}, "empty answer"),
        ({"prompt": " ", "completion": "b"}, "empty prompt"),
        ('{"prompt": "a", "completion": "\\ud800"}', "lone surrogate, U+D800"),
        ({"prompt": [{"type": "image_url", "image_url": "x"}], "completion": "b"}, "part of type 'image_url'"),
        ({"prompt": [{"type": "text", "text": 3}], "completion": "b"}, "is a number, not text"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "b"}]},
            "the last turn is not the assistant's",
        ),
        ({"prompt": [{"role": "robot", "content": "a"}], "completion": "b"}, "role is 'robot', none of system"),
        ({"prompt": [{"role": "user"}], "completion": "b"}, "missing key `content` in prompt[0]"),
        ({"prompt": [{"role": "user", "content": "a", "weight": 1}], "completion": "b"}, "a user turn carries no loss"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b", "weight": 0}]}, "every assistant turn has weight 0"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b", "weight": -1}]}, "weight is -1"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b", "weight": True}]}, "weight is True"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}]}, "missing key `name`"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b", "function_call": {"name": "f"}}]}, "holds `function_call`"),
        (
            {"prompt": "a", "completion": [{"role": "assistant", "content": "b", "thinking": "x", "reasoning": "y"}]},
            "two different reasonings",
        ),
        ({"prompt": [{"role": "assistant", "content": "b"}], "completion": "c"}, "nothing stands before the answer"),
        ({"prompt": "a", "completion": "b", "tools": {"name": "x"}}, "wrong type: tools is an object, not a list"),
        ({"prompt": "a", "completion": "b", "tools": "not json"}, "tools is text that is no JSON"),
    ],
)
def test_a_bad_row_is_quarantined_with_its_reason_and_its_neighbours_stay(tmp_path, row, reason):
    assert reason in reason_of(tmp_path, row)


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["messages", "role", "content", "from", "value", "type", "text", "tool_calls", "function"]),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["messages", "sharegpt", "alpaca", "prompt_completion", "text"]),
)
def test_no_json_value_makes_a_reader_raise_anything_but_a_rejection(tmp_path, values, form):
    keys = {"messages": ["messages"], "sharegpt": ["conversations"], "alpaca": ["instruction", "output"], "text": ["text"]}
    rows = [dict.fromkeys(keys.get(form, ["prompt", "completion"]), value) for value in values]
    quarantine = []
    try:
        kept = len(read_records(jsonl(tmp_path, rows), section(format=form, max_rejected=1.0), quarantine=quarantine).records)
    except DataRefused:
        kept = 0
    assert kept + len(quarantine) == len(rows)
