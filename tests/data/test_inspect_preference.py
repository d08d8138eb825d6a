"""What `init` and `data check` make of a file of preferences or prompts."""

from __future__ import annotations

import pytest
from tests.data.rows import jsonl

from tunesmith.data.inspect import inspect_file, propose_recipe
from tunesmith.errors import DataRefused
from tunesmith.inspection import check_data_file
from tunesmith.recipe import load_recipe

PAIRS = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
ROWS = {
    "dpo": PAIRS,
    "ranking": [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"], "worse"]} for row in PAIRS],
    "kto": [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in PAIRS],
}


@pytest.mark.parametrize("objective", ROWS)
def test_init_proposes_an_objective_that_the_rows_are_for(tmp_path, objective):
    files = propose_recipe(jsonl(tmp_path, ROWS[objective], "judged.jsonl"), folder=tmp_path)
    (tmp_path / "judged.yaml").write_text(files["judged.yaml"])
    recipe = load_recipe(tmp_path / "judged.yaml")
    assert [stage.objective.type for stage in recipe.stages] == [objective]
    assert recipe.evaluate.gates == []


def test_init_with_held_out_pairs_measures_how_often_the_better_answer_is_preferred(tmp_path):
    test = jsonl(tmp_path, [{**row, "prompt": f"asked {i}"} for i, row in enumerate(PAIRS)], "test.jsonl")
    files = propose_recipe(jsonl(tmp_path, PAIRS, "judged.jsonl"), test, folder=tmp_path)
    (tmp_path / "judged.yaml").write_text(files["judged.yaml"])
    recipe = load_recipe(tmp_path / "judged.yaml")
    assert recipe.task.metrics == ["preference_accuracy"]
    assert [gate.metric for gate in recipe.evaluate.gates] == ["preference_accuracy"]


def test_init_of_prompts_alone_says_that_a_reward_is_needed(tmp_path):
    with pytest.raises(DataRefused, match="the rows are prompts without answers") as caught:
        propose_recipe(jsonl(tmp_path, [{"prompt": "q"}, {"prompt": "r"}], "judged.jsonl"))
    assert "rewards" in caught.value.mend


def test_init_still_takes_an_answer_of_another_name_for_what_is_to_be_learned(tmp_path):
    path = jsonl(tmp_path, [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(5)], "judged.jsonl")
    assert inspect_file(path).columns == {"prompt": "prompt", "completion": "response"}


def test_data_check_reads_pairs_and_reports_what_is_wrong_with_them(tmp_path):
    rows = [*PAIRS, PAIRS[3], {**PAIRS[4], "chosen": "bad 4", "rejected": "good 4"}, {**PAIRS[5], "rejected": "good 5"}]
    found = check_data_file(jsonl(tmp_path, rows))
    assert (found["format"], found["rows_in"], found["dropped"]) == ("preference", 23, {"duplicate": 1})
    assert [entry["reason"] for entry in found["rejected"]] == ["chosen is equal to rejected"]
    assert {finding["check"] for finding in found["findings"]} >= {"duplicate", "conflicting_judgements"}
