"""Preference, ranking, unpaired and prompt rows: what each shape means, how it is told, and every way in which a row can be bad."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tests.data.rows import GOOD, jsonl, read_one, section, write

from tunesmith.data.preference import PreferencePair, PromptOnly, Ranking, Unpaired, kind_of_record
from tunesmith.data.read import read_records
from tunesmith.data.records import Message
from tunesmith.errors import DataRefused

PAIR = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
RANKING = {"prompt": "2+2?", "completions": ["4", "four-ish", "5"]}
UNPAIRED = {"prompt": "2+2?", "completion": "4", "label": True}
PROMPT = {"prompt": "2+2?", "solution": "4", "tests": ["assert x == 4"]}
ROWS = {"preference": PAIR, "ranking": RANKING, "unpaired": UNPAIRED, "prompt": PROMPT}
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2?\n\nAssistant:"


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def said(messages) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


def rejected(folder, row, form) -> str:
    """Why this row is rejected from a file of ten good rows of a format, each of which is kept, with its place."""
    good = [{**ROWS[form], "prompt": f"question {i}"} for i in range(10)]
    quarantine = []
    result = read_records(jsonl(folder, [*good[:5], row, *good[5:]]), section(), quarantine=quarantine)
    assert result.format == form
    assert len(result.records) == 10
    (entry,) = quarantine
    assert entry["path"].endswith("train.jsonl")
    assert entry["line"] == 6
    assert json.loads(entry["row"]) == row
    assert result.rows_in == len(result.records) + len(result.rejected)
    return entry["reason"]


@pytest.mark.parametrize(
    "form, kind, record", [("preference", "pair", PreferencePair), ("ranking", "ranking", Ranking), ("unpaired", "unpaired", Unpaired)]
)
def test_each_format_is_told_by_its_keys_and_reported(tmp_path, form, kind, record):
    result = read_records(jsonl(tmp_path, [ROWS[form]]), section())
    assert result.format == form
    assert isinstance(result.records[0], record)
    assert kind_of_record(result.records[0]) == kind
    assert f"{tmp_path}/train.jsonl: 1 of 1 rows are {form}" in result.notes


def test_a_prompt_row_keeps_every_other_key_as_a_column_and_that_is_said(tmp_path):
    result = read_records(jsonl(tmp_path, [{**PROMPT, "answer": None}]), section())
    (record,) = result.records
    assert isinstance(record, PromptOnly)
    assert record.columns == {"solution": "4", "tests": ["assert x == 4"], "answer": None}
    assert record.conversations() == ()
    assert any("columns given to reward functions: 'solution', 'tests'" in note for note in result.notes)
    beside = read_records(jsonl(tmp_path, [{"prompt": "q", "answer": "a"}]), section())
    assert any("`answer` is not trained on" in note for note in beside.notes)


def test_a_pair_is_read_in_every_shape_that_is_in_use(tmp_path):
    prompt = [user("hi"), assistant("hello"), user("2+2?")]
    shapes = [
        {"prompt": prompt, "chosen": "4", "rejected": "5"},
        {"prompt": prompt, "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"prompt": prompt, "chosen": assistant("4"), "rejected": assistant("5")},
        {"chosen": [*prompt, assistant("4")], "rejected": [*prompt, assistant("5")]},
        {"prompt": prompt, "chosen": [*prompt, assistant("4")], "rejected": [*prompt, assistant("5")]},
        {"input": {"messages": prompt}, "preferred_output": [assistant("4")], "non_preferred_output": [assistant("5")]},
        {"chosen": HH + " 4", "rejected": HH + " 5"},
        {"prompt": HH, "chosen": " 4".strip(), "rejected": "5"},
    ]
    records = [read_one(tmp_path, shape) for shape in shapes]
    assert {record.row_id for record in records} == {records[0].row_id}
    for record in records:
        assert said(record.prompt) == [("user", "hi"), ("assistant", "hello"), ("user", "2+2?")]
        assert (said(record.chosen), said(record.rejected)) == ([("assistant", "4")], [("assistant", "5")])


def test_only_the_answers_of_a_pair_carry_loss(tmp_path):
    call = {"function": {"name": "add", "arguments": {"a": 2}}}
    used = [assistant("", tool_calls=[call]), {"role": "tool", "content": "4"}, assistant("It is 4.")]
    record = read_one(tmp_path, {"prompt": [user("hi"), assistant("hello", weight=1), user("2+2?")], "chosen": used, "rejected": "5"})
    chosen, rejected_ = record.conversations()
    assert [message.weight for message in chosen.messages] == [None, 0.0, None, 1.0, None, 1.0]
    assert [message.weight for message in rejected_.messages] == [None, 0.0, None, 1.0]
    assert (chosen.row_id, rejected_.row_id) == (f"{record.row_id}/0", f"{record.row_id}/1")


def test_a_margin_tools_and_a_system_message_are_kept_and_tell_rows_apart(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    plain = read_one(tmp_path, PAIR)
    full = read_one(tmp_path, {**PAIR, "margin": 2, "tools": [tool], "system": "Be brief."})
    assert (full.margin, full.tools) == (2.0, (tool,))
    assert said(full.prompt) == [("system", "Be brief."), ("user", "2+2?")]
    nested = read_one(
        tmp_path,
        {
            "input": {"messages": [user("q")], "tools": [tool]},
            "preferred_output": [assistant("a")],
            "non_preferred_output": [assistant("b")],
        },
    )
    assert nested.tools == (tool,)
    assert len({plain.row_id, full.row_id, read_one(tmp_path, {**PAIR, "margin": 1}).row_id}) == 3


@pytest.mark.parametrize("form", ROWS)
def test_the_task_description_leads_a_prompt_that_brings_no_system_message_and_renames_no_row(tmp_path, form):
    path = jsonl(tmp_path, [ROWS[form], {**ROWS[form], "system": "Mine."}])
    plain, led = read_records(path, section()), read_records(path, section(), system="Task.")
    assert [record.prompt[0] for record in led.records] == [Message("system", "Task."), Message("system", "Mine.")]
    assert [record.row_id for record in led.records] == [record.row_id for record in plain.records]


@pytest.mark.parametrize(
    "more, order",
    [({}, "abc"), ({"ranks": [2, 3, 1]}, "cab"), ({"scores": [0.5, -1, 3]}, "cab"), ({"ranks": [3, 1, 2], "scores": [0, 9, 1]}, "bca")],
)
def test_a_ranking_is_best_first_by_rank_or_score(tmp_path, more, order):
    record = read_one(tmp_path, {"prompt": "q", "completions": ["a", "b", "c"], **more})
    assert "".join(answer[0].content for answer in record.answers) == order
    assert [conversation.answer for conversation in record.conversations()] == list(order)


@pytest.mark.parametrize(
    "row, form, reason",
    [
        ({**PAIR, "rejected": "4"}, "preference", "chosen is equal to rejected"),
        ({**PAIR, "rejected": " 4\n"}, "preference", "chosen is equal to rejected"),
        ({**PAIR, "chosen": " "}, "preference", "empty answer: chosen"),
        ({**PAIR, "rejected": []}, "preference", "empty answer: rejected has no messages"),
        ({**PAIR, "prompt": ""}, "preference", "empty prompt"),
        ({**PAIR, "prompt": [assistant("a")]}, "preference", "nothing stands before the answer"),
        ({**PAIR, "margin": 10**400}, "preference", "a number is too large"),
        ({**PAIR, "margin": 1e39}, "preference", "margin is 1e+39; at most 1e+06"),
        ({**PAIR, "margin": -0.5}, "preference", "margin is -0.5, below 0: the rejected answer would be the better one"),
        ({**PAIR, "margin": "much"}, "preference", "margin is 'much', not a number"),
        ({**PAIR, "chosen": [user("q")]}, "preference", "the last turn of chosen is not the assistant's"),
        ({**PAIR, "chosen": [assistant("a"), user("b"), assistant("c")]}, "preference", "chosen holds a user turn"),
        ({**PAIR, "chosen": [assistant("a", weight=0.5)]}, "preference", "counts whole"),
        ({**PAIR, "chosen": 4}, "preference", "wrong type: chosen is a number"),
        ({"prompt": "q", "chosen": "a"}, "preference", "missing key `rejected` of a preference row"),
        ({"prompt": "q"}, "preference", "missing key `chosen`, `rejected` of a preference row"),
        ({"chosen": "4", "rejected": "5"}, "preference", "no prompt"),
        ({"chosen": HH + " 4", "rejected": HH.replace("hi", "hey") + " 5"}, "preference", "a pair whose prompts differ"),
        ({"chosen": HH + " 4", "rejected": HH + " 5\n\nHuman: so?\n\nAssistant: 6"}, "preference", "a pair whose prompts differ"),
        ({"chosen": HH + " 4", "rejected": HH}, "preference", "empty answer: rejected"),
        ({"chosen": HH + " 4", "rejected": HH + " 4"}, "preference", "chosen is equal to rejected"),
        ({"chosen": HH + " 4", "rejected": HH + " 5\n\nHuman: so?"}, "preference", "the last turn of rejected is not the assistant's"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}, "preference", "a pair whose prompts differ"),
        (
            {"prompt": "other", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("d")]},
            "preference",
            "prompts differ",
        ),
        (
            {"input": {}, "preferred_output": [assistant("b")], "non_preferred_output": [assistant("d")]},
            "preference",
            "missing key `messages` in input",
        ),
        ({"preferred_output": [assistant("b")], "non_preferred_output": [assistant("d")]}, "preference", "missing key `input`"),
        ({**RANKING, "completions": ["a"]}, "ranking", "a ranking of 1 answer"),
        ({**RANKING, "completions": ["a", ""]}, "ranking", "empty answer: completions[1]"),
        ({**RANKING, "completions": ["a", "a "]}, "ranking", "two completions are equal"),
        ({**RANKING, "completions": "a, b"}, "ranking", "completions is text that is no JSON"),
        ({**RANKING, "ranks": [1, 2]}, "ranking", "2 ranks for 3 completions"),
        ({**RANKING, "ranks": [1, 2, 2]}, "ranking", "ranks hold a tie (2)"),
        ({**RANKING, "scores": [1, 1.0, 0]}, "ranking", "scores hold a tie"),
        ({**RANKING, "scores": [1, True, 0]}, "ranking", "scores[1] is True, not a number"),
        ({**RANKING, "ranks": [1, 2, 3], "scores": [1, 2, 3]}, "ranking", "different orders"),
        ({**UNPAIRED, "label": "yes"}, "unpaired", "label is 'yes', not true or false"),
        ({**UNPAIRED, "label": 1}, "unpaired", "label is 1, not true or false"),
        ({**UNPAIRED, "label": "true"}, "unpaired", "label is 'true', not true or false"),
        ({**UNPAIRED, "completion": "  "}, "unpaired", "empty answer: completion"),
        ({"prompt": "q", "label": True}, "unpaired", "missing key `completion` of an unpaired row"),
        ({**PROMPT, "prompt": " "}, "prompt", "empty prompt"),
        ({**PROMPT, "prompt": [user("q"), assistant("a")]}, "prompt", "the prompt ends with the assistant's turn"),
        ({**PROMPT, "prompt": []}, "prompt", "empty prompt"),
        ({**PROMPT, "solution": "\ud800"}, "prompt", "lone surrogate, U+D800"),
        ({"solution": "4"}, "prompt", "no format has the keys solution"),
    ],
)
def test_a_bad_row_is_quarantined_with_its_place_and_reason_and_its_neighbours_stay(tmp_path, row, form, reason):
    assert reason in rejected(tmp_path, row, form)


@pytest.mark.parametrize("one, other", [("preference", "ranking"), ("ranking", "unpaired"), ("unpaired", "preference")])
def test_a_mixture_of_formats_is_refused(tmp_path, one, other):
    path = jsonl(tmp_path, [ROWS[one]] * 9 + [ROWS[other]])
    with pytest.raises(DataRefused, match=rf"9 {one} \(first at .*:1\), 1 {other} \(first at .*:10\)"):
        read_records(path, section())


def test_conversations_among_unpaired_rows_are_a_mixture_and_no_bad_labels(tmp_path):
    with pytest.raises(DataRefused, match="a mixture of formats"):
        read_records(jsonl(tmp_path, [UNPAIRED] * 9 + [GOOD]), section())


def test_a_label_that_is_no_truth_value_is_a_column_unless_labels_are_wanted(tmp_path):
    path = jsonl(tmp_path, [{**UNPAIRED, "label": "arithmetic"}] * 3)
    assert read_records(path, section()).format == "prompt_completion"
    assert read_records(path, section(), kinds=("conversation",)).format == "prompt_completion"
    with pytest.raises(DataRefused, match="label is 'arithmetic', not true or false"):
        read_records(path, section(), kinds=("unpaired",))


def test_an_answer_without_a_label_is_quarantined_where_labels_are_wanted(tmp_path):
    result = read_records(jsonl(tmp_path, [UNPAIRED] * 9 + [GOOD]), section(), kinds=("unpaired",))
    assert [entry.reason for entry in result.rejected] == ["missing key `label` of an unpaired row"]


@pytest.mark.parametrize(
    "form, kinds",
    [("preference", ("conversation",)), ("prompt", ("pair",)), ("unpaired", ("conversation",)), ("ranking", ("pair",))],
)
def test_rows_of_another_kind_than_is_wanted_are_refused_naming_both(tmp_path, form, kinds):
    with pytest.raises(DataRefused, match=f"the rows are {form}, and the stage's objective wants"):
        read_records(jsonl(tmp_path, [ROWS[form]] * 3), section(), kinds=kinds)


def test_a_pair_is_never_taken_for_its_prompt_unless_the_recipe_says_so(tmp_path):
    path = jsonl(tmp_path, [PAIR])
    with pytest.raises(DataRefused, match="the rows are preference") as caught:
        read_records(path, section(), kinds=("prompt",))
    assert "data.format: prompt" in caught.value.mend
    (record,) = read_records(path, section(format="prompt"), kinds=("prompt",)).records
    assert record.columns == {"chosen": "4", "rejected": "5"}


def test_of_rows_with_pairs_and_messages_the_wanted_kind_is_taken_and_that_is_said(tmp_path):
    path = jsonl(tmp_path, [{**PAIR, "messages": [user("q"), assistant("a")]}])
    for kinds, form in (((), "preference"), (("pair",), "preference"), (("conversation",), "messages")):
        result = read_records(path, section(), kinds=kinds)
        assert result.format == form
        assert any(f"{form} was taken" in note for note in result.notes)


def test_columns_map_a_csv_file_of_each_format(tmp_path):
    path = write(tmp_path, "a.csv", "q,good,bad,by\n2+2?,4,5,0.5\n3+3?,6,7,\n")
    mapping = {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": "by"}
    first, second = read_records(path, section(columns=mapping)).records
    assert (said(first.prompt), said(first.chosen), first.margin, second.margin) == ([("user", "2+2?")], [("assistant", "4")], 0.5, None)
    path = write(tmp_path, "b.csv", "q,a,ok\n2+2?,4,true\n3+3?,7,False\n")
    mapping = {"prompt": "q", "completion": "a", "label": "ok"}
    records = read_records(path, section(columns=mapping, format="unpaired")).records
    assert [record.label for record in records] == [True, False]
    path = write(tmp_path, "c.csv", 'q,all\n2+2?,"[""4"", ""5""]"\n')
    (record,) = read_records(path, section(columns={"prompt": "q", "completions": "all"})).records
    assert len(record.answers) == 2
    (record,) = read_records(write(tmp_path, "d.csv", "q,gold\n2+2?,4\n"), section(columns={"prompt": "q"})).records
    assert record.columns == {"gold": "4"}


def test_a_parquet_file_gives_the_same_records_as_json_lines(tmp_path):
    rows = [{"chosen": [user("q"), assistant(f"a{i}")], "rejected": [user("q"), assistant(f"b{i}")], "margin": float(i)} for i in range(3)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    from_parquet = read_records(str(tmp_path / "train.parquet"), section()).records
    assert [r.row_id for r in from_parquet] == [r.row_id for r in read_records(jsonl(tmp_path, rows), section()).records]


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.sampled_from(["", "a", HH, HH + " b", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "messages", "type", "text", "tool_calls"]), inner, max_size=4)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": inner})
    ),
    max_leaves=10,
)
_KEYS = sorted(
    {key for row in ROWS.values() for key in row} | {"ranks", "scores", "margin", "tools", "system", "input", "preferred_output"}
)


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=5), min_size=1, max_size=4), st.sampled_from([*ROWS, "auto"]))
def test_no_json_value_makes_a_reader_raise_anything_but_a_rejection(tmp_path, values, form):
    quarantine, refused, kept = [], "", 0
    try:
        read = read_records(jsonl(tmp_path, values), section(format=form, max_rejected=1.0), quarantine=quarantine)
        kept = len(read.records)
    except DataRefused as error:
        refused = error.what
    assert kept + len(quarantine) == len(values) or "mixture" in refused


def test_a_pair_whose_dialogues_have_another_system_message_than_its_prompt_is_quarantined(tmp_path):
    def row(prompt, dialogue):
        turns = [[system, user("2+2?")] if system else [user("2+2?")] for system in (prompt, dialogue)]
        return {"prompt": turns[0], "chosen": [*turns[1], assistant("4")], "rejected": [*turns[1], assistant("5")]}

    brief, long = {"role": "system", "content": "Be brief."}, {"role": "system", "content": "Explain."}
    assert "another system message than the row's `prompt`" in rejected(tmp_path, row(brief, long), "preference")
    for prompt, dialogue in ((brief, brief), (brief, None), (None, brief)):
        record = read_one(tmp_path, row(prompt, dialogue))
        assert said(record.prompt) == [("system", "Be brief."), ("user", "2+2?")]


def test_labels_1_and_0_are_truth_values_where_labels_are_wanted(tmp_path):
    path = jsonl(tmp_path, [{**UNPAIRED, "label": 1}, {**UNPAIRED, "label": 0}, UNPAIRED])
    read = read_records(path, section(), kinds=("unpaired",))
    assert [record.label for record in read.records] == [True, False, True]
    assert any("labels 1 and 0 are read as true and false (2 times)" in note for note in read.notes)
    other = jsonl(tmp_path, [{**UNPAIRED, "label": label} for label in (1, 0, 1, 0, 2, 1.0)])
    found = read_records(other, section(max_rejected=0.5), kinds=("unpaired",))
    assert [entry.reason for entry in found.rejected] == ["label is 2, not true or false", "label is 1.0, not true or false"]
    table = write(tmp_path, "train.csv", "prompt,completion,label\n2+2?,4,1\n2+2?,5,0\n")
    assert [record.label for record in read_records(table, section(), kinds=("unpaired",)).records] == [True, False]


def test_labelled_answers_in_place_of_conversations_are_refused_with_the_way_to_train_on_them(tmp_path):
    path = jsonl(tmp_path, [UNPAIRED])
    with pytest.raises(DataRefused) as caught:
        read_records(path, section(), kinds=("conversation",))
    assert "data.format: prompt_completion trains on the completions of these rows" in caught.value.mend
    (record,) = read_records(path, section(format="prompt_completion"), kinds=("conversation",)).records
    assert record.answer == "4"


def test_prompts_and_prompts_with_a_completion_are_one_file_where_prompts_are_wanted(tmp_path):
    path = jsonl(tmp_path, [{"prompt": "2+2?", "answer": "4"}, {"prompt": "3+3?", "completion": "6"}])
    read = read_records(path, section(), kinds=("prompt", "conversation"))
    assert (read.format, len(read.records), read.rejected) == ("prompt", 2, [])
    assert any("the completion is their column `answer`" in note for note in read.notes)
    assert not any("completion" in note and "given to reward functions" in note for note in read.notes)
    with pytest.raises(DataRefused):
        read_records(path, section(), kinds=("conversation",))
