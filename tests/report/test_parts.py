"""Candidates, learning, costs, examples, account: what each part of the report makes of a run's files."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import yaml

from tunesmith.planning import compare_plan
from tunesmith.report import write_report
from tunesmith.report._account import findings_view, ledger_view, repeat_view
from tunesmith.report._candidates import candidates_view
from tunesmith.report._examples import _marked, choose, examples_view
from tunesmith.report._learning import costs_view, learning_view
from tunesmith.report._read import read_run
from tunesmith.report._words import Limits, excerpt, number, text

LIMITS = Limits()


def sample(item, output, score, reference='{"intent": "refund", "summary": "a b c"}', **scores):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": f"message {item}"}]
    return {
        "item_id": item,
        "prompt": prompt,
        "reference": reference,
        "output": output,
        "finish_reason": "stop",
        "scores": {"exact_match": score, **scores},
    }


def put_samples(run_path, **candidates):
    for name, lines in candidates.items():
        (run_path / "samples" / f"task.{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_number_of_the_candidates_table_has_its_interval_and_n(run_path):
    for task in candidates_view(read_run(run_path), LIMITS)["tasks"]:
        for row in task["tables"][0]["rows"]:
            for cell in row["cells"]:
                assert (cell["known"] and " to " in cell["interval"] and cell["n"] in ("150", "60")) or cell["value"] == "NOT MEASURED"


def test_what_a_candidate_cannot_do_is_not_measured_with_its_reason(run_path):
    table = candidates_view(read_run(run_path), LIMITS)["tasks"][0]["tables"][0]
    classical = next(row for row in table["rows"] if row["label"] == "Classical")
    labels = [metric["label"] for metric in table["metrics"]]
    cell = classical["cells"][labels.index("ROUGE-L")]
    assert (cell["value"], cell["why"]) == ("NOT MEASURED", "it cannot write summary")


def test_a_candidate_of_the_recipe_that_was_not_evaluated_is_named(run_path):
    path = run_path / "evaluation.json"
    evaluation = json.loads(path.read_text())
    del evaluation["tasks"]["task"]["candidates"]["few_shot"]
    path.write_text(json.dumps(evaluation))
    assert candidates_view(read_run(run_path), LIMITS)["tasks"][0]["missing"] == [("Few-shot", "named in the recipe, but not evaluated")]


def test_a_lower_perplexity_reads_as_better_and_a_higher_as_worse(run_path):
    path = run_path / "evaluation.json"
    row = {"task": "general", "metric": "perplexity", "candidate": "tuned", "baseline": "zero_shot"}
    spans = [(-0.2, -0.1), (0.1, 0.2), (-0.1, 0.1), (None, None)]
    path.write_text(json.dumps({"comparisons": [{**row, "difference": 0.1, "low": low, "high": high} for low, high in spans]}))
    (shown,) = candidates_view(read_run(run_path), LIMITS)["comparisons"]
    assert [line["reading"] for line in shown] == ["better", "worse", "no clear difference", "NOT MEASURED"]


def test_few_shot_trials_are_read_in_either_of_the_two_shapes(run_path):
    path = run_path / "evaluation.json"
    flat = {
        "k": 4,
        "set": 1,
        "metric": "exact_match",
        "value": 0.125,
        "n": 40,
        "trials": [{"k": 4, "metric": "exact_match", "value": 0.125, "n": 40}],
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "few_shot": flat}))
    choice = candidates_view(read_run(run_path), LIMITS)["choices"][0]
    assert ("Value", "12.5%") in choice["chosen"]
    assert choice["rows"] == [["4", "exact_match", "12.5%", "40"]]


def test_a_step_that_a_resumed_run_repeated_counts_once(run_path):
    lines = [{"stage": "sft", "step": step, "loss": loss, "learning_rate": 1e-4} for step, loss in ((1, 3.0), (2, 2.5), (2, 2.0), (3, 1.0))]
    (run_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stage,) = learning_view(read_run(run_path), LIMITS)["stages"]
    assert stage["steps"] == 3
    assert stage["caption"] == "Training loss 3.00 at step 1, 1.00 at step 3; validation loss: NOT MEASURED."


def test_a_loss_of_nan_is_counted_and_not_drawn(run_path):
    (run_path / "events.jsonl").write_text(
        '{"stage": "sft", "step": 1, "loss": 2.0}\n{"stage": "sft", "step": 2, "loss": NaN}\n{"step": 3, "lo'
    )
    (stage,) = learning_view(read_run(run_path), LIMITS)["stages"]
    assert stage["not_finite"] == 1


def test_the_validation_loss_is_read_from_its_own_events(run_path):
    lines = [{"stage": "sft", "step": 4, "loss": 1.0}, {"event": "evaluated", "stage": "sft", "step": 4, "eval_loss": 0.5}]
    (run_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stage,) = learning_view(read_run(run_path), LIMITS)["stages"]
    assert stage["caption"] == "Training loss 1.00 at step 4; validation loss 0.50 at step 4."


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([0.5], "validation loss 0.50 at step 1."),
        ([0.9, 0.5], "validation loss 0.90 at step 1, 0.50 at step 2, the last the lowest."),
        ([0.5, 0.9], "validation loss 0.50 at step 1, 0.90 at step 2, the first the lowest."),
        ([0.9, 0.4, 0.6], "validation loss 0.90 at step 1, 0.60 at step 3; lowest validation loss 0.40 at step 2."),
    ],
)
def test_no_validation_loss_is_listed_twice(run_path, losses, said):
    lines = [{"event": "evaluated", "stage": "sft", "step": step, "eval_loss": loss} for step, loss in enumerate(losses, 1)]
    (run_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stage,) = learning_view(read_run(run_path), LIMITS)["stages"]
    assert stage["caption"] == f"Training loss: NOT MEASURED; {said}"
    points = "1 point" if len(losses) == 1 else f"{len(losses)} points"
    assert stage["loss"].count(f"{losses[0]:.2f} at ") == 1
    assert points in stage["loss"]


def test_tokens_computed_once_are_counted_over_the_steps_that_were_logged(run_path):
    steps = [{"stage": "sft", "step": step, "loss": 1.0, "tokens": 100, "computed_tokens": 30} for step in (5, 10, 10, 15)]
    (run_path / "events.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    svg = costs_view(read_run(run_path), LIMITS)["tokens"]
    assert "Training: tokens of 3 logged steps: 300;" in svg
    assert "Training: computed, shared ones once: 90 (30%)" in svg


def test_parts_of_a_phase_are_shown_once_under_it_and_cost_the_candidates_their_time(run_path):
    with (run_path / "events.jsonl").open("a") as events:
        events.write('{"event": "phase_part", "of": "evaluate", "name": "task.tuned", "seconds": 25.3}\n')
    run = read_run(run_path)
    assert costs_view(run, LIMITS)["phases"].count("task, tuned") == 2  # the label, and the chart's description
    rows = candidates_view(run, LIMITS)["tasks"][0]["tables"][0]["rows"]
    assert {row["label"]: row["seconds"] for row in rows}["Tuned"] == "25 s"


def test_a_prediction_without_a_measurement_stays_not_measured(run_path):
    compared = compare_plan({"seconds": 300, "peak_memory_bytes": 1073741824}, {"seconds": 330})
    (run_path / "plan.json").write_text(json.dumps({"compared": compared}))
    plan = {row["label"]: row for row in costs_view(read_run(run_path), LIMITS)["plan"]}
    assert plan["Time"] == {"label": "Time", "predicted": "5.0 min", "measured": "5.5 min", "error": "-9%"}
    assert (plan["Peak memory"]["predicted"], plan["Peak memory"]["measured"]) == ("1 GiB", "NOT MEASURED")
    assert plan["Tokens"]["predicted"] == "NOT MEASURED"


def test_shared_tokens_that_nobody_counted_are_not_measured(run_path):
    (run_path / "events.jsonl").write_text('{"stage": "sft", "step": 1, "loss": 1.0, "tokens": 100}\n')
    assert "Training: computed, shared ones once: NOT MEASURED" in costs_view(read_run(run_path), LIMITS)["tokens"]


def test_twelve_examples_hold_wins_losses_and_ties():
    outcomes = {f"{kind}{index}": kind for kind in ("win", "loss", "both_right", "both_wrong") for index in range(20)}
    assert Counter(outcomes[item] for item in choose(outcomes)) == {"win": 4, "loss": 4, "both_wrong": 2, "both_right": 2}


def test_the_choice_does_not_depend_on_the_order_of_the_samples():
    outcomes = {f"i{index}": ("win", "loss", "both_right", "both_wrong")[index % 4] for index in range(80)}
    backwards = dict(reversed(list(outcomes.items())))
    assert choose(outcomes) == choose(backwards)
    assert choose(outcomes) != sorted(outcomes)[:12]


def test_without_losses_the_twelve_are_filled_by_others_and_no_item_twice():
    outcomes = {f"i{index}": "win" if index < 30 else "both_wrong" for index in range(40)}
    chosen = choose(outcomes)
    assert len(chosen) == len(set(chosen)) == 12
    assert Counter(outcomes[item] for item in chosen) == {"win": 4, "both_wrong": 8}
    assert len(choose({"a": "win", "b": "win"})) == 2


def test_only_items_of_both_candidates_are_compared_and_counted(run_path):
    put_samples(run_path, few_shot=[sample("a", "{}", 0), sample("b", "{}", 1)], tuned=[sample("a", "{}", 1), sample("c", "{}", 1)])
    got = examples_view(read_run(run_path), LIMITS)
    assert (got["n"], dict(got["counts"])) == (1, {"Win": 1, "Loss": 0, "Both wrong": 0, "Both right": 0})


def graded(item, score):
    """A sample of a task whose answers have a gold reward, in place of right and wrong."""
    return {"item_id": item, "output": f"answer {item}", "scores": {} if score is None else {"gold_reward": score}}


def test_of_a_graded_metric_two_equal_answers_are_no_different_and_neither_right_nor_wrong(run_path, monkeypatch):
    monkeypatch.setattr("tunesmith.report._examples.main_metric", lambda run: "gold_reward")
    theirs = [graded(*one) for one in (("a", 0.5), ("b", 0.25), ("c", 0.75), ("d", None))]
    put_samples(run_path, few_shot=theirs, tuned=[graded(*one) for one in (("a", 0.5), ("b", 0.5), ("c", 0.25), ("d", 1.0))])
    got = examples_view(read_run(run_path), LIMITS)
    assert dict(got["counts"]) == {"Better": 1, "Worse": 1, "No difference": 1}
    assert got["unscored"] == 1
    assert [(one["item"], one["title"], one["meaning"]) for one in got["examples"]] == [
        ("b", "Better", "the tuned model is better"),
        ("c", "Worse", "the base is better"),
        ("a", "No difference", "no difference"),
    ]
    marks = [(cell["mark"], cell["note"]) for cell in got["examples"][0]["fields"][0]["cells"]]
    assert marks == [("close", "Gold reward 0.25"), ("close", "Gold reward 0.50")]


def test_an_answer_without_a_score_says_so_and_has_none_of_0():
    assert _marked(graded("a", None), "gold_reward") == {"mark": "none", "note": "no score"}
    assert _marked(graded("a", 0.0), "gold_reward") == {"mark": "close", "note": "Gold reward 0.00"}


def test_fields_are_marked_by_the_scores_of_the_evaluation(run_path):
    ours = sample("a", '{"intent": "refund", "summary": "a b"}', 1, **{"field_accuracy.intent": 1.0, "rougeL": 0.8})
    theirs = sample("a", '{"intent": "defect", "summary": "a b c", "mood": "sour"}', 0, **{"field_accuracy.intent": 0.0, "rougeL": 1.0})
    put_samples(run_path, few_shot=[theirs], tuned=[ours])
    fields = {field["name"]: field for field in examples_view(read_run(run_path), LIMITS)["examples"][0]["fields"]}
    assert [cell["mark"] for cell in fields["intent"]["cells"]] == ["wrong", "right"]
    assert [(cell["mark"], cell["note"]) for cell in fields["summary"]["cells"]] == [("right", ""), ("close", "ROUGE-L 0.80")]
    assert [cell["mark"] for cell in fields["mood"]["cells"]] == ["wrong", "none"]


def test_a_broken_output_is_shown_raw_and_its_fields_are_wrong(run_path):
    torn = {**sample("a", '{"intent": "ref', 0), "finish_reason": "length"}
    put_samples(run_path, few_shot=[torn], tuned=[sample("a", '{"intent": "refund", "summary": "a b c"}', 1)])
    example = examples_view(read_run(run_path), LIMITS)["examples"][0]
    assert [answer["broken"] and answer["broken"].text for answer in example["answers"]] == ['{"intent": "ref', None]
    assert [answer["cut_off"] for answer in example["answers"]] == [True, False]
    assert {field["cells"][0]["mark"] for field in example["fields"]} == {"wrong"}


def test_an_answer_that_is_a_plain_label_is_compared_whole(run_path):
    put_samples(run_path, few_shot=[sample("a", "card_lost", 0, "card_stolen")], tuned=[sample("a", "card_stolen", 1, "card_stolen")])
    (field,) = examples_view(read_run(run_path), LIMITS)["examples"][0]["fields"]
    assert [(cell["text"].text, cell["mark"]) for cell in field["cells"]] == [("card_lost", "wrong"), ("card_stolen", "right")]


@pytest.mark.parametrize(("trained", "balances", "off"), [(363, True, "0"), (360, False, "3"), (None, None, "412")])
def test_the_ledger_says_whether_it_balances(run_path, trained, balances, off):
    path = run_path / "data" / "ledger.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows_trained": trained}))
    account = ledger_view(read_run(run_path), LIMITS)["parts"][0]["account"]
    assert account["balances"] is balances
    if balances is False:
        assert account["off_by"] == off


def test_the_quarantine_shows_its_first_rows_and_counts_all(run_path):
    rows = [{"path": "train.jsonl", "line": line, "reason": "no JSON", "row": "x" * 500} for line in range(1, 101)]
    (run_path / "data" / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = ledger_view(read_run(run_path), LIMITS)["parts"][0]
    assert got["quarantined"] == 100
    assert [row["place"] for row in got["quarantine"]] == [f"train.jsonl:{line}" for line in range(1, 9)]
    assert got["quarantine"][0]["row"].cut == 500 - LIMITS.quarantine_text


def test_the_rows_of_a_stage_with_data_of_its_own_have_their_account_and_their_quarantine(run_path):
    recipe = yaml.safe_load((run_path / "recipe.yaml").read_text())
    stage = recipe["stages"][-1]["name"]
    folder = run_path / "data" / stage
    folder.mkdir()
    ledger = {"rows_in": 30, "rows_trained": 23, "rows_held_out": 3, "rows_dropped": {"quarantined": 4}, "tokens": {}}
    (folder / "ledger.json").write_text(json.dumps(ledger))
    bad = [{"path": "pairs.jsonl", "line": line, "reason": "chosen equals rejected", "row": "x"} for line in range(1, 5)]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    own = ledger_view(read_run(run_path), LIMITS)["parts"][1]
    assert (own["stage"], own["quarantined"], own["account"]["balances"]) == (stage, 4, True)
    page = write_report(run_path).read_text()
    assert f"Rows of stage {stage}" in page
    assert "pairs.jsonl:4" in page


def test_findings_that_name_rows_come_first_and_in_words(run_path):
    titles = [finding["title"] for finding in findings_view(read_run(run_path), LIMITS)["findings"]]
    assert titles == ["The same row more than once", "One prompt with different answers", "How long the rows are"]


def test_the_command_quotes_a_name_that_a_shell_would_read(make_run, tmp_path):
    run = read_run(make_run(tmp_path / "my run; rm -rf"))
    assert repeat_view(run, LIMITS)["command"] == "tunesmith run recipe.yaml --out '../my run; rm -rf-again'"


def test_the_manifest_is_shown_whole_but_for_the_recipe(run_path):
    groups = dict(repeat_view(read_run(run_path), LIMITS)["groups"])
    assert ("torch", "2.13.0") in groups["Versions"]
    assert ("test.sha256", "ab" * 32) in groups["Data"]
    assert ("memory", "7.75 GiB") in groups["Hardware"]
    assert "Recipe" not in groups


def test_a_sample_file_is_never_read_from_outside_the_run(run_path):
    (run_path.parent / "task.evil.jsonl").write_text("{}\n")
    run = read_run(run_path)
    assert run.samples("../../task", "evil") is None
    assert run.samples("task", "../task.evil") is None
    assert run.samples("task", "tuned")


def test_text_that_cannot_be_encoded_or_would_deceive_becomes_visible():
    assert text("a\ud800b\u202ec\x00\x1b") == "a\ufffdb\ufffdc\u2400\u241b"
    assert text("keeps\n\ttabs\r\n") == "keeps\n\ttabs\n"
    assert (excerpt("x" * 10, 4).text, excerpt("x" * 10, 4).cut) == ("xxxx", 6)


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), [1], 10**400])
def test_what_is_no_finite_number_is_no_number(value):
    assert number(value) is None
