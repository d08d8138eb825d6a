"""Every format of data, from the file to the verdict: the same recipe runs on a user's own rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tests.cli_tools import call
from tests.data.test_hub import COMMIT, hub  # noqa: F401
from tests.pipeline.helpers import LABELS, conversations, read_json, recipe, stage, weights, write_rows
from tests.toys import model_folder

import tunesmith
from tunesmith import tasks
from tunesmith.errors import DataRefused, ModelError


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in conversations(count, seed=seed)]


def as_csv(path: Path, rows) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "question", "colour"), *((str(i), a, b) for i, (a, b) in enumerate(rows))])
    return path


def as_parquet(path: Path, rows) -> Path:
    pq.write_table(pa.table({"question": [a for a, _ in rows], "colour": [b for _, b in rows]}), path)
    return path


def as_alpaca(path: Path, rows) -> Path:
    return write_rows(path, [{"instruction": a, "input": "", "output": b} for a, b in rows])


def as_sharegpt(path: Path, rows) -> Path:
    return write_rows(path, [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in rows])


def as_prompt_completion(path: Path, rows) -> Path:
    return write_rows(path, [{"prompt": a, "completion": b} for a, b in rows])


MAPPED = {"columns": {"prompt": "question", "completion": "colour"}}
FORMATS = {
    "csv": (as_csv, "rows.csv", MAPPED),
    "parquet": (as_parquet, "rows.parquet", MAPPED),
    "alpaca": (as_alpaca, "rows.jsonl", {}),
    "sharegpt": (as_sharegpt, "rows.jsonl", {}),
    "prompt_completion": (as_prompt_completion, "rows.jsonl", {}),
}


def classification(folder: Path, model: Path) -> dict:
    return recipe(folder, model, task={"labels": "auto"}, evaluate={"max_new_tokens": 8})


@pytest.fixture(scope="module")
def as_messages(tiny, tmp_path_factory):
    """The run on the rows as `messages`."""
    folder = tmp_path_factory.mktemp("messages")
    result = tunesmith.run(classification(folder, tiny), out=folder / "run")
    return result.path, result.evaluation


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_rows_in_any_format_give_the_same_weights_and_the_same_evaluation(tiny, as_messages, name, tmp_path):
    write, file, settings = FORMATS[name]
    made = classification(tmp_path, tiny)
    made["data"] = {
        "train": str(write(tmp_path / file, pairs(20, 0))),
        "test": str(write(tmp_path / f"test-{file}", pairs(6, 1))),
        **settings,
    }
    notes = []
    result = tunesmith.run(made, out=tmp_path / "run", report=lambda event: notes.extend(event.get("notes", [])))
    run, evaluation = as_messages
    assert weights(result.path) == weights(run)
    assert result.evaluation == evaluation
    assert any(f"20 of 20 rows are {'prompt_completion' if settings else name}" in note for note in notes)


def test_labels_auto_are_the_answers_of_the_training_rows_and_the_untrained_candidates_give_only_those(as_messages):
    run, evaluation = as_messages
    for candidate in ("zero_shot", "few_shot"):
        lines = [json.loads(line) for line in (run / "samples" / f"task.{candidate}.jsonl").read_text().splitlines()]
        assert {line["output"] for line in lines} <= set(LABELS)
        assert evaluation["tasks"]["task"]["candidates"][candidate]["decoding"] == "constrained"
    assert evaluation["tasks"]["task"]["candidates"]["tuned"]["decoding"] == "free"


def test_a_test_row_with_another_answer_than_the_labels_is_refused_or_where_they_are_auto_named(tiny, tmp_path):
    made = recipe(tmp_path, tiny, task={"labels": "auto"})
    odd = conversations(6, seed=1)
    odd[2]["messages"][1]["content"] = "dark  violet"
    odd[4] = odd[2]
    write_rows(tmp_path / "test.jsonl", odd)
    evaluation = tunesmith.run(made, out=tmp_path / "run").evaluation
    assert any(note.startswith("2 of 6 test items have an answer that no training row has") for note in evaluation["notes"])
    made["task"] = {"labels": list(LABELS)}
    named = r"'dark  violet' \(.*test\.jsonl:3\), 'dark  violet' \(.*test\.jsonl:5\)"
    with pytest.raises(DataRefused, match=rf"2 of 6 references are none of task\.labels: {named}"):
        tunesmith.run(made, out=tmp_path / "refused")
    assert not (tmp_path / "refused" / "stages").exists()


def test_a_row_to_train_on_with_another_answer_than_the_labels_is_named(tiny, tmp_path):
    made = recipe(tmp_path, tiny, task={"labels": [f" {label}" for label in LABELS]}, stages=[stage(max_steps=1)])
    rows = [json.loads(line) for line in Path(made["data"]["train"]).read_text().splitlines()]
    rows[3]["messages"][1]["content"] = "violet"
    write_rows(Path(made["data"]["train"]), rows)
    (note,) = [n for n in tunesmith.run(made, out=tmp_path / "run").evaluation["notes"] if "task.labels" in n]
    assert note.startswith("1 of ")
    assert note.endswith("have an answer that is none of task.labels: 'violet' (" + made["data"]["train"] + ":4)")


@pytest.mark.parametrize(("labels", "said"), [(["refund", "Refund ", "other"], "refund/Refund "), (["refund", "re fund"], None)])
def test_labels_that_differ_in_capitals_or_blanks_alone_are_named(labels, said):
    notes = tasks._alike(labels)
    assert notes == (() if said is None else (f"labels that differ in capitals or blanks alone count as different ones: {said}",))


def test_a_label_that_is_written_in_two_ways_is_named_by_the_run(tiny, tmp_path):
    made = recipe(tmp_path, tiny, task={"labels": "auto"})
    rows = [json.loads(line) for line in Path(made["data"]["train"]).read_text().splitlines()]
    was = rows[0]["messages"][1]["content"]
    rows[0]["messages"][1]["content"] = was.upper()
    write_rows(Path(made["data"]["train"]), rows)
    notes = tunesmith.run(made, out=tmp_path / "run").evaluation["notes"]
    assert any(was in note and was.upper() in note and "capitals" in note for note in notes)


def test_a_free_text_task_is_scored_by_rouge_and_decoded_freely(tiny, tmp_path):
    made = recipe(tmp_path, tiny, task={"metrics": ["rougeL"], "description": "Name a colour."})
    made["evaluate"]["gates"] = [{"metric": "rougeL", "better_than": "zero_shot"}]
    evaluation = tunesmith.run(made, out=tmp_path / "run").evaluation
    for entry in evaluation["tasks"]["task"]["candidates"].values():
        assert entry["decoding"] == "free"
        assert 0 <= entry["metrics"]["rougeL"]["value"] <= 1
        assert entry["metrics"]["rougeL"]["n"] == 6
    (sample, *_) = (tmp_path / "run" / "samples" / "task.tuned.jsonl").read_text().splitlines()
    assert json.loads(sample)["prompt"][0] == {"role": "system", "content": "Name a colour."}
    assert evaluation["verdict"] in ("PASS", "FAIL")


def texts(count: int, seed: int) -> list[dict[str, str]]:
    return [{"text": f"{prompt} is {answer}"} for prompt, answer in pairs(count, seed)]


def text_recipe(tmp_path: Path, model: Path, **data) -> dict:
    made = recipe(tmp_path, model, task={"metrics": []})
    made["data"] = {
        "train": str(write_rows(tmp_path / "texts.jsonl", texts(20, 0))),
        "test": str(write_rows(tmp_path / "held.jsonl", texts(6, 1))),
        **data,
    }
    made["evaluate"] |= {"candidates": ["zero_shot", "tuned"], "gates": [{"metric": "perplexity", "better_than": "zero_shot"}]}
    return made


@pytest.mark.parametrize("data", [{}, {"format": "text"}])
def test_plain_text_trains_a_base_model_without_a_chat_template_and_is_measured_by_perplexity(data, tmp_path):
    base = model_folder(tmp_path / "base", template=None, markers=False)
    made = text_recipe(tmp_path, base, **data)
    made["stages"][0] |= {"max_steps": 20, "method": "full"}
    result = tunesmith.run(made, out=tmp_path / "run")
    task = result.evaluation["tasks"]["task"]["candidates"]
    assert task["tuned"]["metrics"]["perplexity"]["value"] < task["zero_shot"]["metrics"]["perplexity"]["value"]
    assert result.verdict == "PASS"
    assert read_json(result.path / "manifest.json")["chat_template_sha256"] is None


def test_conversations_on_a_base_model_without_a_chat_template_are_refused_wherever_they_stand(tmp_path):
    base = model_folder(tmp_path / "base", template=None, markers=False)
    with pytest.raises(ModelError, match="no chat template") as caught:
        tunesmith.run(recipe(tmp_path, base), out=tmp_path / "train")
    assert "chatml" in caught.value.mend
    made = text_recipe(tmp_path, base)
    made["data"]["test"] = str(write_rows(tmp_path / "conversations.jsonl", conversations(6, seed=1)))
    with pytest.raises(ModelError, match="no chat template") as caught:
        tunesmith.run(made, out=tmp_path / "test")
    assert caught.value.where == "data.test"
    made = text_recipe(tmp_path, base)
    made["evaluate"]["general"] = made["data"]["train"].replace("texts", "conversations")
    with pytest.raises(ModelError, match="no chat template"):
        tunesmith.run(made, out=tmp_path / "general")
    assert not list(tmp_path.glob("*/stages"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_model_gets_chatml_whose_new_tokens_train_are_saved_and_answer(method, tmp_path):
    base = model_folder(tmp_path / "base", template=None, markers=False)
    made = recipe(tmp_path, base, stages=[{"name": "sft", "objective": "sft", "learning_rate": 3e-2, "max_steps": 100, "method": method}])
    made["model"]["chat_template"] = "chatml"
    made["data"]["validation"] = 0.0
    made["evaluate"] |= {"candidates": ["zero_shot", "tuned"], "gates": [], "max_new_tokens": 8}
    for row in (rows := conversations(20)):
        row["messages"][1]["content"] = "red"
    write_rows(tmp_path / "train.jsonl", rows)
    result = tunesmith.run(made, out=tmp_path / "run")
    tuned = [json.loads(line) for line in (result.path / "samples" / "task.tuned.jsonl").read_text().splitlines()]
    assert [line["finish_reason"] for line in tuned] == ["stop"] * 6  # at <|im_end|>, which the base did not know
    assert {line["output"] for line in tuned} == {"red"}
    assert tunesmith.Chat(result.path).ask(tuned[0]["prompt"][-1]["content"]) == "red"  # what the evaluation asked and got


def test_hub_data_sets_are_trained_on_at_the_commit_that_was_read_and_the_saved_recipe_names_it(tiny, tmp_path, hub):  # noqa: F811
    lines = {"train.jsonl": pairs(20, 0), "test.jsonl": pairs(6, 1)}
    hub.files[COMMIT] = {
        name: "".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in rows).encode() for name, rows in lines.items()
    }
    made = recipe(tmp_path, tiny)
    made["data"] = {"train": "acme/tickets", "test": "acme/tickets:test"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    done = call("train", "recipe.yaml", "--out", "run", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["ledger"]["rows_in"] == 20
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data"]
    assert (saved["train"], saved["test"]) == (f"acme/tickets@{COMMIT}", f"acme/tickets@{COMMIT}:test")
    sources = read_json(tmp_path / "run" / "manifest.json")["data"]
    assert {part: source["revision"] for part, source in sources.items()} == {"train": COMMIT, "test": COMMIT}
    assert "huggingface.co" not in "".join(hub.requests)
    assert any(path.endswith("/train.jsonl") for path in hub.requests)
