"""What a stage that learns from preferences or its own answers shows: curves, samples, stops, and what looks like hacking."""

from __future__ import annotations

import json

import pytest
import yaml
from tests.report.stages import HACKED, PPO, ppo_events, put

from tunesmith.report import render_report
from tunesmith.report._account import findings_view
from tunesmith.report._candidates import candidates_view
from tunesmith.report._curves import CURVES
from tunesmith.report._examples import examples_view
from tunesmith.report._learning import learning_view
from tunesmith.report._read import read_run
from tunesmith.report._words import Limits, advice, humane, metric_of

LIMITS = Limits()


def shown(run):
    (stage,) = learning_view(run, LIMITS)["stages"]
    return stage, {curve["title"]: curve for curve in stage["curves"]}


def test_a_stage_that_samples_shows_a_curve_for_all_that_is_watched(run_path):
    _, curves = shown(put(run_path, ppo_events(), PPO))
    watched = ["Reward", "Gold reward", "KL to the reference", "Entropy", "Answer length", "Distinct and repeated", "Spread of the reward"]
    assert list(curves) == [*watched, "Sampler against trainer", "Clipped", "Value loss", "Loss: policy"]
    assert "nats a sequence" in curves["KL to the reference"]["svg"]
    assert curves["Reward"]["caption"].startswith("Sampled answers ")
    assert "; prompts not trained on 0.00 at step 1, 1.95 at step 40. " in curves["Reward"]["caption"]
    assert "ended by themselves 90% at step 1, 32% at step 40" in curves["Answer length"]["caption"]


def test_the_negative_reward_of_an_evaluation_is_not_shown_as_a_loss(run_path):
    stage, _ = shown(put(run_path, ppo_events(), PPO))
    assert not stage["validated"]
    assert "validation" not in stage["caption"]
    assert "nats per token" not in stage["loss"]
    assert "loss of ppo" in stage["loss"]


@pytest.mark.parametrize(("objective", "label"), [("sft", "loss, nats per token"), ({"type": "dpo"}, "loss of dpo"), (None, ">loss<")])
def test_only_cross_entropy_is_labelled_in_nats_per_token(run_path, objective, label):
    events = [{"stage": "s", "step": step, "loss": 1 / step} for step in (1, 2)]
    stage, curves = shown(put(run_path, events, {"name": "s", "objective": objective}))
    assert label in stage["loss"]
    assert curves == {}


def test_a_pair_objective_shows_margins_accuracies_and_both_answers(run_path):
    step = {"rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/margins": 0.2, "rewards/accuracies": 0.625}
    step |= {"logps/chosen": -30.0, "logps/rejected": -60.0}
    held = {f"eval_{key}": value for key, value in step.items()}
    events = [{"stage": "s", "step": 1, "loss": 0.69, **step}, {"stage": "s", "step": 1, "event": "evaluated", "eval_loss": 0.6, **held}]
    stage, curves = shown(put(run_path, events, {"name": "s", "objective": {"type": "dpo"}}))
    assert list(curves) == ["Implicit rewards", "Reward margin", "Pairs in the right order", "Log-probability of the answers"]
    assert curves["Pairs in the right order"]["caption"].startswith("Training 62% at step 1; validation 62% at step 1.")
    assert stage["validated"]


def test_a_reward_model_shows_accuracy_margin_and_mean(run_path):
    events = [{"stage": "s", "step": step, "loss": 0.6, "accuracy": 0.5, "margin": 0.1, "mean_reward": 0.0} for step in (1, 2)]
    _, curves = shown(put(run_path, events, {"name": "s", "objective": {"type": "reward"}}))
    assert [title.split(" of ")[0] for title in curves] == ["Accuracy", "Margin", "Mean score"]


def test_rewards_that_are_added_are_shown_apart(run_path):
    events = [{"stage": "s", "step": step, "loss": 0.0, "reward/polite": 0.5, "reward/disagreement": 0.1} for step in (1, 2)]
    _, curves = shown(put(run_path, events, {"name": "s"}))
    assert list(curves) == ["Reward: polite", "Disagreement of the reward models"]


def test_a_coefficient_that_adapts_is_shown_and_a_fixed_one_is_not(run_path):
    events = [{"stage": "s", "step": step, "loss": 0.0, "kl_coef": 0.05} for step in (1, 2)]
    assert "KL coefficient" not in shown(put(run_path, events, {"name": "s"}))[1]
    events[1]["kl_coef"] = 0.06
    assert "KL coefficient" in shown(put(run_path, events, {"name": "s"}))[1]


def test_a_limit_is_drawn_where_it_does_not_flatten_its_curve(run_path):
    kl = shown(put(run_path, ppo_events(), PPO))[1]["KL to the reference"]
    assert ("limit", "limit") in kl["key"]
    far = {**PPO, "watch": {"max_kl": 500.0}}
    assert "limit" not in shown(put(run_path, ppo_events(), far))[1]["KL to the reference"]["svg"]


def test_the_same_prompts_stand_side_by_side_early_and_late_with_their_rewards(run_path):
    stage, _ = shown(put(run_path, ppo_events(), PPO))
    samples = stage["samples"]
    assert samples["steps"] == ["1", "40"]
    assert [row["prompt"].text for row in samples["rows"]] == list(HACKED)
    early, late = samples["rows"][0]["cells"]
    assert (early["text"].text, early["reward"]) == ("It is on its way.", "0.20")
    assert (late["text"].text, late["reward"]) == (HACKED["where is my lamp?"], "4.10")
    assert [one["step"] for one in samples["between"]] == ["10", "20", "30"]


def test_an_answer_without_a_score_says_so_and_one_evaluation_stands_alone(run_path):
    events = [event for event in ppo_events(5)]
    for event in events:
        for sample in event.get("samples", []):
            sample["reward"] = None
    samples = shown(put(run_path, events, PPO))[0]["samples"]
    assert samples["steps"] == ["1"]
    assert samples["rows"][0]["cells"][0]["reward"] == "no score"


@pytest.mark.parametrize(
    ("rule", "value", "limit", "said"),
    [
        ("max_kl", 12.3, 10.0, "12.30 nats a sequence from its reference, over the limit of 10.00"),
        ("max_length_ratio", 3.1, 3.0, "3.10 times as long as the first ones, over the limit of 3.00"),
        ("min_distinct_ratio", 0.02, 0.05, "prompts got answers of their own 0.02 times as often as at first, under 0.05"),
        ("min_entropy", 0.1, 0.5, "0.10 nats a token, under the limit of 0.50"),
        ("another", 1.0, 2.0, "the value was 1.00, the limit 2.00"),
        ("max_kl", None, None, "watch.max_kl."),
    ],
)
def test_a_stop_by_a_rule_is_said_in_words_at_the_stage_and_among_the_findings(run_path, rule, value, limit, said):
    run = put(run_path, ppo_events(stop={"rule": rule, "value": value, "limit": limit}), PPO)
    (sentence,) = shown(run)[0]["stops"]
    assert sentence.startswith(f"Stopped after step 40 by the rule watch.{rule}")
    assert said in sentence
    assert sentence in [finding["evidence"].text for finding in findings_view(run, LIMITS)["training"]]


def test_a_stage_that_ran_out_of_patience_says_so(run_path):
    events = [*ppo_events(), {"event": "stage_finished", "stage": "ppo", "step": 40, "stopped_early": True}]
    stage, _ = shown(put(run_path, events, {**PPO, "early_stopping_patience": 3}))
    assert stage["stops"] == ["Stopped early, at step 40: 3 evaluations brought no better held-out result."]


def test_a_reward_that_rises_while_gold_falls_is_called_hacking(run_path):
    run = put(run_path, ppo_events(), PPO)
    assert shown(run)[0]["hacked"].startswith("The reward rose from 0.00 to 1.95 on prompts not trained on in this stage while")
    assert shown(run)[0]["hacked"].endswith("(means of the first and the last fifth, n 5 and 5 measurements): the reward may be hacked.")
    assert "Stage ppo may hack its reward" in [finding["title"] for finding in findings_view(run, LIMITS)["training"]]


@pytest.mark.parametrize("gold", [lambda x: 0.3 + 0.2 * x, lambda x: 0.3], ids=["gold rises", "gold stays"])
def test_a_gold_that_does_not_fall_is_no_hacking(run_path, gold):
    run = put(run_path, ppo_events(gold=gold), PPO)
    assert shown(run)[0]["hacked"] == ""


def test_answers_without_a_score_and_groups_without_spread_are_counted_once_a_rollout(run_path):
    run = put(run_path, ppo_events(), PPO)
    counts = shown(run)[0]["counts"]
    assert counts == (
        "In 20 logged rollouts: 1 answers could not be scored and carried no advantage; "
        "40 of 240 groups had no spread, so that nothing could be learned from them."
    )
    assert [f["title"] for f in findings_view(run, LIMITS)["training"]][-1] == "Answers without a score in stage ppo"


def test_groups_that_mostly_lack_spread_are_a_finding(run_path):
    run = put(run_path, [{**event, "groups_without_spread": 9.0} for event in ppo_events()], PPO)
    assert "Stage ppo had little to learn from" in [finding["title"] for finding in findings_view(run, LIMITS)["training"]]


def test_findings_about_training_are_there_without_a_health_file(run_path):
    (run_path / "data" / "health.json").unlink()
    found = findings_view(put(run_path, ppo_events(), PPO), LIMITS)
    assert found["findings"] is None
    assert found["training"]


def test_a_page_of_every_curve_and_strange_values_stays_small_and_whole(run_path):
    keys = [key for curve in CURVES for _, key, _ in curve.lines] + [f"loss/{i}" for i in range(20)] + [f"reward/{i}" for i in range(20)]
    strange = [1.0, None, "x", float("nan"), [1], {"a": 1}, True, 1e300]
    events = [{"stage": f"s{n % 7}", "step": n, **{key: strange[(n + i) % 8] for i, key in enumerate(keys)}} for n in range(1, 1500)]
    odd = [{"prompt": ["x"], "answer": {"a": 1}, "reward": "high"}, {}, 3]
    events.append({"stage": "s0", "event": "evaluated", "step": 1, "eval_loss": "x", "samples": odd})
    events.append({"stage": "s0", "event": "stopped", "step": 1, "rule": ["x"]})
    put(run_path, events, {"name": "s0", "objective": 3, "watch": [], "rollout": 1})
    assert len(render_report(run_path).encode()) < 1_000_000


def test_gold_preference_and_reward_are_read_in_their_units():
    assert metric_of("preference_accuracy").share
    assert not metric_of("gold_reward").share
    assert metric_of("gold_reward.polite").label == "Gold reward: polite"
    assert advice("sft") == "Use the model after stage sft."
    assert (
        humane("tuned better than sft in gold_reward, by the reward model") == "Tuned better than sft in gold reward, by the reward model"
    )


def gold_evaluation():
    measure = {"value": 0.6, "low": 0.55, "high": 0.65, "n": 60}
    metrics = {"gold_reward": measure, "gold_reward.polite": measure, "preference_accuracy": measure, "reward": measure}
    bias = {"pearson": 0.4, "spearman": None, "n": 120}
    bias |= {f"accuracy_where_{side}_is_preferred": {"value": 0.75, "n": 60} for side in ("shorter", "longer")}
    found = {"calibration": {"expected_calibration_error": 0.08, "n": 60}, "length_bias": bias}
    found["accuracy_by_place"] = [{"place": 1, "value": 0.75, "n": 60}]
    candidates = {"sft": {"metrics": metrics}, "tuned": {"metrics": metrics}, "shorter": {"metrics": {"preference_accuracy": measure}}}
    candidates["reward"] = {"metrics": {"preference_accuracy": measure}, "reward_model": found, "compares": "by the score of its head"}
    row = {"task": "task", "metric": "gold_reward", "candidate": "tuned", "baseline": "sft"}
    compared = [{**row, "difference": 0.34, "low": 0.2, "high": 0.4, "minimum_detectable": 0.1, "n": 60}]
    return {"tasks": {"task": {"n": 60, "candidates": candidates}}, "comparisons": compared, "gates": [], "verdict": "NOT MEASURED"}


def test_an_evaluation_by_gold_and_preference_is_rendered_without_perplexity_or_references(run_path):
    (run_path / "evaluation.json").write_text(json.dumps(gold_evaluation()))
    for name, score in (("sft", 0.3), ("tuned", 0.6)):
        line = {"item_id": "a", "prompt": [{"role": "user", "content": "hello"}], "reference": None, "output": name}
        (run_path / "samples" / f"task.{name}.jsonl").write_text(json.dumps({**line, "scores": {"gold_reward": score}}) + "\n")
    recipe = yaml.safe_load((run_path / "recipe.yaml").read_text())
    recipe["task"], recipe["evaluate"] = {"metrics": ["gold_reward"]}, {"candidates": ["sft", "tuned"]}
    (run_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    task = candidates_view(read_run(run_path), LIMITS)["tasks"][0]
    assert [row["label"] for row in task["tables"][0]["rows"]] == ["sft", "Tuned", "The shorter answer", "reward"]
    ((label, pairs),) = task["reward_models"]
    assert label == "reward"
    assert ("Expected calibration error", "8.0%, n 60") in pairs
    assert ("Correlation of score and length (Spearman)", "NOT MEASURED") in pairs
    assert task["tables"][0]["rows"][3]["compares"] == "by the score of its head"
    page = render_report(run_path)
    for said in (
        "has a gold reward of 0.60 on average over 60 test items; the model after stage sft, 0.60.",
        "Gold reward: polite",
        "+0.34",
    ):
        assert said in page


def test_candidates_that_compare_answers_and_write_none_have_no_examples(run_path):
    line = {"item_id": "a", "prompt": [{"role": "user", "content": "hello"}], "reference": None, "output": None}
    for name, score in (("few_shot", 0.0), ("tuned", 1.0)):
        (run_path / "samples" / f"task.{name}.jsonl").write_text(json.dumps({**line, "scores": {"exact_match": score}}) + "\n")
    assert examples_view(read_run(run_path), LIMITS)["examples"] == []
