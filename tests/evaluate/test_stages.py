"""Candidates that are stages' results, sampled answers, items without a reference, and the measures that need none."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest

from tunesmith.errors import RecipeError
from tunesmith.evaluate import EvaluationInputs, StageResult, check_gates, evaluate_candidates, freeze_task
from tunesmith.recipe import EvaluateSection, Gate
from tunesmith.score._reward_process import Unscorable

from .helpers import ScriptedGenerator, WordEncoder, pair, prompt_row, ranking, row

PROMPTS = [prompt_row(f"question {n}", n) for n in range(10)]
GATE = Gate(metric="gold_reward", better_than="sft")


class Ends:
    """A gold measure: whether an answer says please, and whether it ends."""

    sha256, name = "ends", "gold.py:ends"

    def __init__(self, lost=None):
        self.lost, self.asked = lost, []

    def checks(self, prompts, answers):
        self.asked.append(list(zip(prompts, answers, strict=True)))
        return [
            Unscorable("raised KeyError") if answer == self.lost else {"polite": float("please" in answer), "ends": 1.0}
            for answer in answers
        ]


class Bench:
    """A run of three stages, sft, reward and ppo, whose models answer with a word of their own."""

    def __init__(self, task, **changes):
        self.encoder, self.opened, self.scored = WordEncoder(), [], []
        self.models = {
            "base": ScriptedGenerator(self.encoder, lambda prompt: "what", nats=3.0),
            "sft": ScriptedGenerator(self.encoder, lambda prompt: "no", nats=2.0),
            "tuned": ScriptedGenerator(self.encoder, lambda prompt: "yes please", nats=1.0),
        }
        results = {
            "sft": StageResult(self.load("sft"), "sft hash"),
            "reward": StageResult(self.load("reward"), "reward hash", "score", "sft", self.open_scores),
            "ppo": StageResult(self.load("tuned"), "tuned hash", "log_ratio", "sft"),
        }
        settings = {
            "task": task,
            "training": [],
            "encoder": self.encoder,
            "base": self.load("base"),
            "tuned": self.load("tuned"),
            "base_id": "base hash",
            "tuned_id": "tuned hash",
            "max_new_tokens": 8,
            "vocabulary_size": 100,
            "results": results,
            "last_stage": "ppo",
            "reward_models": ("reward",),
            "gold": Ends(),
        }
        self.inputs = EvaluationInputs(**{**settings, **changes})

    def load(self, name):
        def load():
            self.opened.append(name)
            return self.models[name]

        return load

    def open_scores(self):
        self.opened.append("scores")

        def scores(rows):
            self.scored.append(len(rows))
            return np.array([float(len(one)) for one in rows])

        return scores

    def run(self, done=None, save=lambda unit, payload: None, **section):
        return evaluate_candidates(EvaluateSection(**section), self.inputs, done=done, save=save)


def gold_task(records=PROMPTS, metrics=("gold_reward",)):
    return freeze_task("task", records, metrics=metrics)


def candidates(result):
    return result.evaluation["tasks"]["task"]["candidates"]


def values(result, candidate):
    return {metric: one["value"] for metric, one in candidates(result)[candidate]["metrics"].items()}


def test_a_stage_is_a_candidate_and_tuned_is_compared_with_it():
    result = Bench(gold_task()).run(candidates=["zero_shot", "sft", "tuned"], gates=[GATE])
    assert list(candidates(result)) == ["zero_shot", "sft", "tuned"]
    assert values(result, "sft") == {"gold_reward": 0.5, "gold_reward.polite": 0.0, "gold_reward.ends": 1.0}
    assert values(result, "tuned")["gold_reward"] == 1.0
    pairs = [(one["metric"], one["baseline"]) for one in result.evaluation["comparisons"]]
    assert ("gold_reward", "sft") in pairs
    assert ("gold_reward", "zero_shot") in pairs
    assert result.evaluation["verdict"] == "PASS"
    assert [line["output"] for line in result.samples["task.sft"]] == ["no"] * 10


def test_a_stage_that_only_a_gate_names_is_evaluated_too():
    result = Bench(gold_task()).run(candidates=["tuned"], gates=[GATE])
    assert result.evaluation["gates"][0]["result"] == "PASS"


def test_one_model_is_at_hand_at_a_time_the_base_first():
    bench, alive = Bench(gold_task()), []

    def load(name):
        def make():
            gc.collect()
            alive.append([known() is not None for known in made])
            made.append(weakref.ref(generator := ScriptedGenerator(bench.encoder, lambda prompt: name)))
            return generator

        return make

    made: list = []
    results = {"sft": StageResult(load("sft"), "sft hash"), "ppo": bench.inputs.results["ppo"]}
    bench.inputs = replace(bench.inputs, base=load("base"), tuned=load("tuned"), results=results)
    bench.run(candidates=["tuned", "sft", "zero_shot"])
    assert alive == [[], [False], [False, False]]


def test_the_last_stage_is_the_tuned_model_asked_once_and_not_compared_with_itself():
    bench = Bench(gold_task())
    result = bench.run(candidates=["tuned", "ppo"])
    assert values(result, "tuned") == values(result, "ppo")
    assert len(bench.models["tuned"].calls) == 1
    assert len(bench.inputs.gold.asked) == 1
    assert result.evaluation["comparisons"] == []
    assert result.evaluation["recommendation"]["candidate"] == "tuned"


def test_a_stage_costs_more_than_the_base_and_less_than_the_tuned_model():
    bench = Bench(gold_task())
    bench.models["sft"].script = bench.models["tuned"].script
    advice = bench.run(candidates=["zero_shot", "tuned", "sft"]).evaluation["recommendation"]
    assert advice["candidate"] == "sft"
    assert "of those that" not in advice["reason"]
    bench = Bench(gold_task())
    bench.models["base"].script = bench.models["sft"].script = bench.models["tuned"].script
    assert bench.run(candidates=["sft", "tuned", "zero_shot"]).evaluation["recommendation"]["candidate"] == "zero_shot"


def test_a_stage_without_a_result_reads_not_measured():
    bench = Bench(gold_task())
    bench.inputs = replace(bench.inputs, results={})
    result = bench.run(candidates=["sft", "tuned"], gates=[GATE])
    assert result.evaluation["tasks"]["task"]["not_measured"] == {"sft": "the stage has no result"}
    assert result.evaluation["verdict"] == "NOT MEASURED"


def test_sampled_answers_take_the_same_stream_for_each_candidate_and_greedy_ones_none():
    bench = Bench(gold_task())
    result = bench.run(candidates=["zero_shot", "sft", "tuned"], temperature=0.7)
    seeds = [model.calls[0]["seeds"] for model in bench.models.values()]
    assert seeds[0] == seeds[1] == seeds[2]
    assert len(set(seeds[0])) == 10
    assert bench.models["sft"].calls[0]["sampling"].temperature == 0.7
    assert candidates(result)["tuned"]["decoding"] == "sampled at 0.7"
    greedy = Bench(gold_task())
    assert candidates(greedy.run(candidates=["tuned"]))["tuned"]["decoding"] == "free"
    assert greedy.models["tuned"].calls[0]["sampling"].temperature == 0
    assert "seeds" not in greedy.models["tuned"].calls[0]


def test_another_temperature_or_seed_asks_again():
    bench, done = Bench(gold_task()), {}
    for settings, seed, times in (({}, 0, 1), ({"temperature": 0.7}, 0, 2), ({"temperature": 0.7}, 0, 2), ({"temperature": 0.7}, 1, 3)):
        bench.inputs = replace(bench.inputs, seed=seed)
        bench.run(done=done, save=done.__setitem__, candidates=["tuned"], **settings)
        assert len(bench.models["tuned"].calls) == times


def test_a_resumed_evaluation_asks_gold_reward_model_and_models_nothing_twice():
    done = {}
    task = gold_task(
        [pair(f"question {n}", "good answer here", "bad", n) for n in range(8)], ("gold_reward", "reward", "preference_accuracy")
    )
    first = Bench(task).run(done=done, save=done.__setitem__, candidates=["zero_shot", "sft", "reward", "tuned"])
    again = Bench(task)
    assert again.run(done=done, candidates=["zero_shot", "sft", "reward", "tuned"]).evaluation == first.evaluation
    assert (again.opened, again.scored, again.inputs.gold.asked) == ([], [], [])


def test_other_answers_and_another_measure_are_measured_again():
    bench, done = Bench(gold_task()), {}
    bench.run(done=done, save=done.__setitem__, candidates=["tuned"])
    bench.models["tuned"].script = lambda prompt: "no"
    bench.inputs = replace(bench.inputs, tuned_id="another hash")
    assert values(bench.run(done=done, save=done.__setitem__, candidates=["tuned"]), "tuned")["gold_reward"] == 0.5
    bench.inputs.gold.sha256 = "changed"
    bench.run(done=done, candidates=["tuned"])
    assert len(bench.inputs.gold.asked) == 3


def test_an_answer_without_gold_leaves_the_measure_and_its_gate_not_measured():
    result = Bench(gold_task(), gold=Ends(lost="no")).run(candidates=["sft", "tuned"], gates=[GATE])
    reason = "10 of 10 answers could not be measured: gold.py:ends raised KeyError"
    assert candidates(result)["sft"]["not_measured"]["gold_reward"] == reason
    assert result.evaluation["gates"][0]["result"] == "NOT MEASURED"
    assert reason in result.evaluation["gates"][0]["reason"]


def test_items_without_a_reference_leave_what_needs_one_not_measured_with_the_reason():
    bench = Bench(gold_task(metrics=("exact_match", "rougeL", "gold_reward")))
    result = bench.run(candidates=["zero_shot", "tuned"])
    assert set(values(result, "tuned")) == {"gold_reward", "gold_reward.polite", "gold_reward.ends"}
    reason = "10 of 10 items have no reference"
    assert candidates(result)["tuned"]["not_measured"] == dict.fromkeys(("exact_match", "rougeL", "perplexity"), reason)
    assert result.evaluation["tasks"]["task"]["chance"] == {}
    assert result.samples["task.tuned"][0]["reference"] is None


def test_the_column_answer_of_a_prompt_is_its_reference():
    rows = [prompt_row(f"question {n}", n, answer=answer) for n, answer in enumerate(["yes please", 7, None, "  "])]
    assert [item.reference for item in freeze_task("task", rows).items] == ["yes please", "7", None, None]
    result = Bench(freeze_task("task", rows[:2])).run(candidates=["tuned"])
    assert values(result, "tuned")["exact_match"] == 0.5
    assert "perplexity" in values(result, "tuned")


def test_a_prompt_without_a_reference_is_no_item_where_answers_are_labels():
    task = freeze_task("task", [prompt_row("one", 1, answer="yes"), prompt_row("two", 2)], labels=["yes", "no"])
    assert len(task.items) == 1
    assert task.skipped[0][1] == "it has no `answer` that an answer could be held to"


def test_the_reward_of_an_answer_is_the_score_of_prompt_and_answer_by_the_runs_reward_model():
    bench = Bench(gold_task(metrics=("reward",)))
    result = bench.run(candidates=["sft", "tuned"])
    prompt = len(bench.encoder.ids("user: question 1 assistant:"))
    assert values(result, "sft") == {"reward": prompt + 2}  # a word and the end token
    assert values(result, "tuned") == {"reward": prompt + 3}
    assert bench.opened[-1] == "scores"


def test_without_a_reward_model_the_reward_is_not_measured():
    result = Bench(gold_task(metrics=("reward",)), reward_models=()).run(candidates=["tuned"])
    assert candidates(result)["tuned"]["not_measured"]["reward"] == "no stage of the run trained a reward model"


class Liking(ScriptedGenerator):
    """Log-probability `nats` a token, and `more` for every token of an answer with the word good."""

    def __init__(self, encoder, nats, more):
        super().__init__(encoder, lambda prompt: "yes", nats)
        self.more = more

    def logprobs(self, prompts, answers):
        self.calls.append({"references": len(answers)})
        good = [self.more if "good" in self.encoder.text(answer) else 0.0 for answer in answers]
        return [np.full(len(answer), -self.nats + more, dtype=np.float32) for answer, more in zip(answers, good, strict=True)]


def compared(records, **changes):
    bench = Bench(freeze_task("task", records, metrics=("preference_accuracy",)), **changes)
    bench.models = {
        "base": Liking(bench.encoder, 1.0, -0.2),
        "sft": Liking(bench.encoder, 1.0, 0.5),
        "tuned": Liking(bench.encoder, 1.0, 0.6),
    }
    return bench


PAIRS = [pair(f"question {n}", "a good answer", "bad", n) for n in range(8)]


def test_preferences_are_judged_by_what_each_candidate_is_and_the_shorter_answer_stands_beside_them():
    bench = compared(PAIRS)
    result = bench.run(candidates=["zero_shot", "reward", "tuned"])
    found = {name: values(result, name)["preference_accuracy"] for name in candidates(result)}
    # The base likes good answers less a token; tuned likes them by 0.1 a token more than its start; the score head likes length.
    assert found == {"zero_shot": 0.0, "reward": 1.0, "tuned": 1.0, "shorter": 0.0}
    assert bench.opened == ["base", "sft", "scores", "tuned"]
    assert all("prompts" not in call for model in bench.models.values() for call in model.calls)
    against = {one["baseline"]: one["difference"] for one in result.evaluation["comparisons"]}
    assert against == {"zero_shot": 1.0, "reward": 0.0, "shorter": 1.0}
    assert result.evaluation["tasks"]["task"]["chance"]["preference_accuracy"] == {"value": 0.5, "n": 8}


def test_the_implicit_reward_is_taken_over_the_start_and_not_over_the_base():
    bench = compared(PAIRS)
    bench.models["tuned"].more = 0.4  # more than the base's, less than the start's
    assert values(bench.run(candidates=["tuned"]), "tuned") == {"preference_accuracy": 0.0}
    results = {**bench.inputs.results, "ppo": replace(bench.inputs.results["ppo"], start="base")}
    bench.inputs = replace(bench.inputs, results=results)
    assert values(bench.run(candidates=["tuned"]), "tuned") == {"preference_accuracy": 1.0}


def test_a_sum_of_log_ratios_and_their_mean_can_prefer_different_answers():
    bench = compared([pair("question", "good answer of five words", "good", 1)])
    bench.models["tuned"].nats, bench.models["tuned"].more = 1.5, 0.5  # below the start on every token: more tokens, more loss
    assert values(bench.run(candidates=["tuned"]), "tuned") == {"preference_accuracy": 0.0}
    ppo = replace(bench.inputs.results["ppo"], compares="mean_log_ratio")
    bench.inputs = replace(bench.inputs, results={**bench.inputs.results, "ppo": ppo})
    assert values(bench.run(candidates=["tuned"]), "tuned") == {"preference_accuracy": 0.5}


def test_candidates_that_compare_by_different_yardsticks_are_said_to():
    bench = compared(PAIRS)
    said = [bench.run(candidates=names).evaluation["notes"] for names in (["zero_shot", "tuned"], ["tuned"])]
    assert ["compares by mean log-probability; tuned compares by log-prob" in str(notes) for notes in said] == [True, False]


def test_the_shorter_answer_is_never_recommended():
    records = [pair(f"question {n}", "good", "a bad answer", n) for n in range(8)]
    bench = compared([*records, pair("question 8", "fine", "a good answer", 8)])  # of which the base is right
    result = bench.run(candidates=["zero_shot"])
    assert values(result, "shorter") == {"preference_accuracy": 1.0}
    assert values(result, "zero_shot")["preference_accuracy"] == pytest.approx(1 / 9)
    advice = result.evaluation["recommendation"]
    assert advice["candidate"] == "zero_shot"
    assert advice["reason"].startswith("zero_shot has the best preference_accuracy of those that give whole answers: 0.111 on 9 items")


def test_a_reward_model_that_compares_best_is_not_recommended_since_it_writes_nothing():
    result = compared([*PAIRS, pair("question 8", "a fine answer", "good", 8)]).run(candidates=["zero_shot", "reward"])
    assert values(result, "reward")["preference_accuracy"] > values(result, "zero_shot")["preference_accuracy"] > 0
    assert result.evaluation["recommendation"]["candidate"] == "zero_shot"


def test_a_base_that_is_wrong_of_every_pair_is_not_recommended_though_nothing_else_may_be():
    advice = compared(PAIRS).run(candidates=["zero_shot", "reward"]).evaluation["recommendation"]
    assert advice == {"candidate": None, "reason": "no candidate got anything right: preference_accuracy 0.000 on 8 items for each."}


def test_a_result_that_is_compared_by_its_own_log_probability_needs_no_start():
    bench = compared(PAIRS)
    own = replace(bench.inputs.results["ppo"], compares="logprob", start="gone")
    bench.inputs = replace(bench.inputs, results={**bench.inputs.results, "ppo": own})
    assert values(bench.run(candidates=["tuned"]), "tuned") == {"preference_accuracy": 1.0}


def test_the_shorter_answer_may_be_asked_for_by_name_and_is_not_measured_without_pairs():
    assert values(compared(PAIRS).run(candidates=["shorter"]), "shorter") == {"preference_accuracy": 0.0}
    gate = Gate(metric="preference_accuracy", better_than="shorter")
    assert compared(PAIRS).run(candidates=["tuned", "shorter"], gates=[gate]).evaluation["verdict"] == "PASS"
    alone = Bench(gold_task()).run(candidates=["shorter", "tuned"])
    assert alone.evaluation["tasks"]["task"]["not_measured"] == {"shorter": "it stands beside preference_accuracy, which is not asked for"}


def test_a_reward_model_has_its_account_and_gives_no_answers():
    bench = compared([ranking(f"question {n}", "the best answer of all", "bad", "a middling one", line=n) for n in range(8)])
    entry = candidates(bench.run(candidates=["reward"]))["reward"]
    assert entry["metrics"]["preference_accuracy"]["value"] == pytest.approx(2 / 3)
    assert entry["reward_model"]["accuracy_by_place"] == [{"place": 1, "value": 1.0, "n": 16}, {"place": 2, "value": 0.0, "n": 8}]
    assert entry["reward_model"]["length_bias"]["pearson"] == pytest.approx(1.0)
    assert entry["reward_model"]["calibration"]["n"] == 24
    alone = Bench(gold_task()).run(candidates=["reward", "tuned"])
    assert alone.evaluation["tasks"]["task"]["not_measured"] == {"reward": "a reward model gives scores and no answers"}


def test_pairs_are_answered_only_where_a_metric_of_answers_is_asked_for():
    bench = compared(PAIRS)
    bench.inputs = replace(bench.inputs, task=freeze_task("task", PAIRS, metrics=("preference_accuracy", "gold_reward")))
    assert set(values(bench.run(candidates=["tuned"]), "tuned")) >= {"preference_accuracy", "gold_reward"}


def test_a_result_whose_start_is_not_there_is_not_compared_and_says_why():
    bench = compared(PAIRS)
    bench.inputs = replace(bench.inputs, results={"ppo": bench.inputs.results["ppo"]})
    result = bench.run(candidates=["zero_shot", "tuned"])
    assert result.evaluation["tasks"]["task"]["not_measured"] == {"tuned": "what it started from is not there to compare it with"}
    assert "preference_accuracy" in values(result, "zero_shot")


def test_the_hash_of_a_task_covers_the_answers_compared():
    rows = [replace(pair("q", *answers), row_id="r1") for answers in (("a", "b"), ("b", "a"), ("a", "c"))]
    hashes = {freeze_task("task", [one]).sha256 for one in rows}
    assert len(hashes) == 3


def test_a_gate_may_name_a_check_of_the_gold_measure_and_no_metric_that_is_not_asked_for():
    task = gold_task()
    check_gates([Gate(metric="gold_reward.polite", better_than="sft")], task)
    with pytest.raises(RecipeError, match="preference_accuracy is not measured"):
        check_gates([Gate(metric="preference_accuracy", better_than="sft")], task)


def test_free_text_conversations_keep_their_references_beside_the_gold_measure():
    task = freeze_task("task", [row(f"question {n}", "yes please") for n in range(6)], metrics=("exact_match", "gold_reward"))
    found = values(Bench(task).run(candidates=["tuned"]), "tuned")
    assert (found["exact_match"], found["gold_reward"]) == (1.0, 1.0)
    assert "perplexity" in found
