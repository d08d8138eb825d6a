"""Items: the rows of a pair, ranking, unpaired answer or prompt stay together, from the file to the ledger."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tests.data.rendering import fuzz, supervised, template_of
from tests.data.rows import GOOD, jsonl

from tunesmith.data.items import Items, RenderedPart, render_items
from tunesmith.data.preference import make_pair, make_prompt, make_ranking
from tunesmith.data.prepare import Rendering, prepare_data
from tunesmith.data.records import Message, Source
from tunesmith.data.render import Rendered, encode_prompt, render
from tunesmith.data.store import TokenStore
from tunesmith.errors import DataRefused, ModelError, RecipeError, TemplateError
from tunesmith.recipe import DataSection
from tunesmith.rundir import RunDirectory

HERE = Source("rows.jsonl", 7)
PIECES = (
    "a",
    "Yes",
    " ",
    "\n",
    "\n\n",
    "  \n",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|endoftext|>",
    "é",
    "👍🏽",
    "1",
    ".",
    "\t",
    "it's",
    "中",
)


def pair(number: int, chosen: str = "good", rejected: str = "bad", **more):
    return {"prompt": f"question number {number}", "chosen": f"{chosen} {number}", "rejected": f"{rejected} {number}", **more}


def ranking(number: int):
    return {"prompt": f"question number {number}", "completions": [f"{word} {number}" for word in ("best", "fair", "poor")]}


def unpaired(number: int, label: bool = True):
    return {"prompt": f"question number {number}", "completion": f"answer {number}", "label": label}


def prompt(number: int):
    return {"prompt": f"question number {number}", "solution": str(number)}


ROWS = {"pair": (pair, 2), "ranking": (ranking, 3), "unpaired": (unpaired, 1), "prompt": (prompt, 1)}


@pytest.fixture
def prepared(tmp_path, smollm2_tokenizer, smollm2_template):
    """Prepares these training rows as a kind."""

    def preparer(rows, kind, template=smollm2_template, system=None, **settings):
        how = Rendering(template, smollm2_tokenizer, 8192, system)
        with RunDirectory.open(tmp_path / "run", resume=True) as run:
            return prepare_data(DataSection(train=jsonl(tmp_path, rows), **settings), run, how, seed=0, kind=kind)

    return preparer


def test_a_thousand_fuzzed_pairs_keep_answer_and_prompt_apart_and_end_once(smollm2_tokenizer, smollm2_template):
    draw = random.Random(4)
    pairs = []
    while len(pairs) < 1000:
        asked, chosen, rejected = (fuzz(draw, PIECES) for _ in range(3))
        if asked.strip() and chosen.strip() and rejected.strip() and chosen.strip() != rejected.strip():
            turns = [Message("user", asked)]
            if draw.random() < 0.3:
                turns = [Message("user", fuzz(draw, PIECES) + "."), Message("assistant", fuzz(draw, PIECES) + "."), *turns]
            pairs.append(make_pair(turns, [Message("assistant", chosen)], [Message("assistant", rejected)], HERE))
    (stop,) = smollm2_tokenizer.encode("<|im_end|>", add_special_tokens=False)
    for record, rows in zip(pairs, render_items(pairs, smollm2_template, smollm2_tokenizer), strict=True):
        asked_ids = encode_prompt(record.prompt, smollm2_template, smollm2_tokenizer).tolist()
        for answer, row in zip((record.chosen[0].content, record.rejected[0].content), rows, strict=True):
            assert row.ids[: len(asked_ids)].tolist() == asked_ids
            assert int(np.flatnonzero(row.weights)[0]) == len(asked_ids)
            ids = row.ids[row.weights > 0].tolist()
            assert ids[-1] == stop
            assert ids.count(stop) == 1
            assert smollm2_tokenizer.decode(ids[:-1]) == answer
            assert set(row.weights.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("kind", ROWS)
def test_an_item_is_its_records_rows_in_order_and_the_ledger_counts_items(prepared, smollm2_tokenizer, kind):
    make, width = ROWS[kind]
    data = prepared([make(i) for i in range(20)], kind, validation=0.2)
    assert (len(data.items), len(data.validation_items)) == (16, 4)
    assert len(data.train) == 16 * width
    assert len(data.validation) == 4 * width
    assert data.items.first.tolist() == list(range(0, 16 * width + 1, width))
    assert data.items.row_ids == [record.row_id for record in data.records]
    assert data.validation_items.row_ids == [record.row_id for record in data.validation_records]
    ids = data.items.row_ids[0]
    assert data.train.row_ids[:width] == ([ids] if width == 1 else [f"{ids}/{number}" for number in range(width)])
    ledger = data.ledger.to_json()
    assert (ledger["rows_in"], ledger["rows_trained"], ledger["rows_held_out"], ledger["rows_dropped"]) == (20, 16, 4, {})
    assert ledger["tokens"]["total"] == sum(len(row[0]) for item in data.items for row in item)
    assert ledger["tokens"]["supervised"] == sum(np.count_nonzero(row[1]) for item in data.items for row in item)
    for item, record in zip(data.items, data.records, strict=True):
        assert len(item) == width
        answers = [supervised(Rendered(row[0], row[1], 0), smollm2_tokenizer) for row in item]
        assert answers == [[f"{answer[0].content}<|im_end|>"] for answer in record.answers] or kind == "prompt"


def test_conversations_are_items_of_one_row(prepared):
    data = prepared([{"prompt": f"question {i}", "completion": "ok"} for i in range(10)], "conversation")
    assert (len(data.items), len(data.train), len(data.records)) == (9, 9, 9)
    ((ids, weights),) = data.items[-1]
    assert ids.tolist() == data.train[8][0].tolist()
    assert np.any(weights)
    assert data.items.row_ids == data.train.row_ids
    with pytest.raises(IndexError):
        data.items[9]


def test_a_prompt_is_what_the_model_is_asked_and_nothing_of_it_carries_loss(prepared, smollm2_tokenizer, smollm2_template):
    data = prepared([prompt(i) for i in range(5)], "prompt", system="Add up.")
    for ((ids, weights),), record in zip(data.items, data.records, strict=True):
        asked = [Message("system", "Add up."), *record.prompt[1:]]
        assert record.prompt[0] == asked[0]
        assert ids.tolist() == encode_prompt(asked, smollm2_template, smollm2_tokenizer).tolist()
        assert smollm2_tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
        assert not np.any(weights)
    assert data.ledger.tokens["supervised"] == 0
    assert not [finding for finding in data.findings if finding.check == "trainable_tokens"]


def test_labels_and_margins_stand_beside_the_items(prepared):
    data = prepared([unpaired(i, i % 3 == 0) for i in range(10)], "unpaired", validation=0)
    assert data.items.columns["label"].dtype == bool
    assert data.items.columns["label"].tolist() == [record.label for record in data.records]
    data = prepared([pair(i, margin=i) if i else pair(i) for i in range(10)], "pair", validation=0)
    assert data.items.columns["margin"].dtype == np.float32
    assert data.items.columns["margin"].tolist() == [float(i) for i in range(10)]
    assert prepared([pair(i) for i in range(10)], "pair").items.columns == {}


def test_pairs_serve_where_rankings_are_wanted(prepared):
    data = prepared([pair(i) for i in range(10)], "ranking", validation=0)
    assert [len(item) for item in data.items] == [2] * 10


@pytest.mark.parametrize("kind", ["conversation", "unpaired", "prompt"])
def test_pairs_are_refused_where_something_else_is_wanted_and_leave_an_account(prepared, tmp_path, kind):
    with pytest.raises(DataRefused, match="the rows are preference"):
        prepared([pair(i) for i in range(10)], kind)
    assert (tmp_path / "run" / "data" / "quarantine.jsonl").read_text() == ""


def test_without_a_stated_kind_the_rows_are_taken_as_they_are(prepared):
    assert len(prepared([pair(0), pair(1)], None, validation=0).items) == 2


@pytest.mark.parametrize("long", ["chosen", "rejected"])
def test_a_pair_with_an_answer_over_the_limit_is_dropped_whole(prepared, long):
    rows = [pair(i) for i in range(9)] + [{**pair(9), long: "very " * 100 + "long"}]
    data = prepared(rows, "pair", max_length=100, too_long="drop", validation=0)
    assert (len(data.items), len(data.train)) == (9, 18)
    assert data.ledger.to_json()["rows_dropped"] == {"too_long": 1}
    assert data.ledger.tokens["truncated"] == 0
    with pytest.raises(DataRefused, match="1 of 10 rows are longer than 100 tokens"):
        prepared(rows, "pair", max_length=100)


@pytest.mark.parametrize("kind", ROWS)
def test_what_is_compared_or_asked_is_never_cut(prepared, kind):
    with pytest.raises(RecipeError, match="cut` would unpair") as caught:
        prepared([ROWS[kind][0](i) for i in range(10)], kind, max_length=100, too_long="cut")
    assert caught.value.where == "data.too_long"


def test_every_lost_pair_has_a_line_in_the_quarantine_and_the_ledger(prepared, tmp_path):
    rows = [pair(i) for i in range(40)]
    rows += [{**pair(40), "rejected": "good 40"}, {**pair(41), "chosen": ""}, {**pair(42), "chosen": "\ud800"}]
    rows += [pair(3), {**pair(43), "chosen": "long " * 200}]
    data = prepared(rows, "pair", max_length=100, too_long="drop", test=jsonl(tmp_path, [pair(5)], "test.jsonl"), test_overlap="drop")
    ledger = data.ledger.to_json()
    assert ledger["rows_dropped"] == {"duplicate": 1, "quarantined": 3, "test_overlap": 1, "too_long": 1}
    assert ledger["rows_in"] == 45 == ledger["rows_trained"] + ledger["rows_held_out"] + 6
    assert [entry["line"] for entry in data.quarantine] == [41, 42, 43]
    assert data.test_records[0].chosen[0].content == "good 5"


def test_a_pair_whose_prompts_the_template_writes_differently_is_quarantined_whole(prepared, smollm2_tokenizer, tmp_path):
    tool = {"function": {"name": "look", "arguments": {}}}
    template = template_of(
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ '!' if loop.first and messages | selectattr('role', 'eq', 'tool') | list }}\n"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        smollm2_tokenizer,
    )
    looked = [
        {"role": "assistant", "content": "", "tool_calls": [tool]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    data = prepared([*(pair(i) for i in range(9)), {**pair(9), "chosen": looked}], "pair", template, validation=0)
    assert (len(data.items), len(data.train)) == (9, 18)
    (entry,) = data.quarantine
    assert entry["line"] == 10
    assert "a pair whose prompts differ" in entry["reason"]
    assert entry["row"]["rejected"] == [{"role": "assistant", "content": "bad 9"}]
    assert data.ledger.to_json()["rows_dropped"] == {"quarantined": 1}


def test_a_pair_of_which_one_row_cannot_be_rendered_loses_both(smollm2_tokenizer, smollm2_template):
    prompts = [Message("user", "q")]
    bad = make_pair(prompts, [Message("assistant", "a")], [Message("assistant", "b")], HERE, tools=[{"name": "<|im_end|>"}])
    good = make_pair(prompts, [Message("assistant", "a")], [Message("assistant", "b")], HERE)
    first, second, third = render_items([good, bad, good], smollm2_template, smollm2_tokenizer)
    assert isinstance(second, TemplateError)
    assert "rows.jsonl:7" in second.where
    assert len(first) == len(third) == 2


def test_a_prompt_that_cannot_be_rendered_costs_its_neighbours_nothing(smollm2_tokenizer, smollm2_template):
    records = [make_prompt([Message("user", f"q{i}")], {}, HERE, tools=[{"name": "<|im_end|>"}] if i == 1 else []) for i in range(3)]
    results = list(render_items(records, smollm2_template, smollm2_tokenizer))
    assert [isinstance(result, TemplateError) for result in results] == [False, True, False]
    assert "control token" in results[1].what


def test_a_row_of_a_pair_is_rendered_as_the_conversation_alone_is(smollm2_tokenizer, smollm2_template):
    record = make_ranking([Message("user", "q")], [[Message("assistant", word)] for word in "abc"], HERE)
    (rows,) = render_items([record], smollm2_template, smollm2_tokenizer, "all")
    for row, conversation in zip(rows, record.conversations(), strict=True):
        alone = render(conversation, smollm2_template, smollm2_tokenizer)
        assert (row.ids.tolist(), row.weights.tolist()) == (alone.ids.tolist(), alone.weights.tolist())


def test_without_a_chat_template_a_pair_asks_for_one(prepared):
    with pytest.raises(ModelError, match="no chat template"):
        prepared([pair(0), pair(1)], "pair", None)


def test_a_second_preparation_opens_the_same_store(prepared, tmp_path):
    rows = [pair(i) for i in range(10)]
    first = prepared(rows, "pair")
    written = (tmp_path / "run" / "data" / "tokens" / "train" / "key.json").stat().st_ino
    again = prepared(rows, "pair")
    assert (tmp_path / "run" / "data" / "tokens" / "train" / "key.json").stat().st_ino == written
    assert again.train.row_ids == first.train.row_ids


def test_a_validation_file_of_pairs_is_items_too_and_one_of_conversations_is_refused(prepared, tmp_path):
    held = jsonl(tmp_path, [pair(i) for i in range(20, 23)], "validation.jsonl")
    data = prepared([pair(i) for i in range(10)], "pair", validation=held)
    assert (len(data.items), len(data.validation_items), len(data.validation)) == (10, 3, 6)
    with pytest.raises(DataRefused, match="the rows are prompt_completion"):
        prepared([pair(i) for i in range(10)], "pair", validation=jsonl(tmp_path, [GOOD], "validation.jsonl"))


def test_test_rows_may_be_conversations_beside_pairs(prepared, tmp_path):
    data = prepared([pair(i) for i in range(10)], "pair", test=jsonl(tmp_path, [GOOD], "test.jsonl"))
    assert data.test_records[0].answer == "4"


def test_items_of_rankings_of_different_sizes_keep_their_own_rows(tmp_path):
    records = [make_ranking([Message("user", str(n))], [[Message("assistant", str(i))] for i in range(n)], HERE) for n in (2, 4, 3)]
    rows = [
        (f"{r.row_id}/{i}", Rendered(np.array([n, i], np.int32), np.array([0, 1], np.float32), 1))
        for n, r in enumerate(records)
        for i in range(len(r.answers))
    ]
    part = RenderedPart(TokenStore.build(rows, tmp_path / "store", {}), records)
    items = part.items([2, 0], 10)
    assert isinstance(items, Items)
    assert items.first.tolist() == [0, 3, 5]
    assert [[row[0].tolist() for row in item] for item in items] == [[[2, 0], [2, 1], [2, 2]], [[0, 0], [0, 1]]]
    assert json.dumps(items.row_ids) == json.dumps([records[2].row_id, records[0].row_id])
