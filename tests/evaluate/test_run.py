"""The whole evaluation on a scripted generator: order, decoding, selection, resuming, the shape of evaluation.json."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace

import pytest

from tunesmith.errors import TemplateError
from tunesmith.evaluate import EvaluationInputs, evaluate_candidates, freeze_task
from tunesmith.recipe import EvaluateSection, Gate

from .helpers import SCHEMA, WORDS, ScriptedGenerator, WordEncoder, desk_rows, last_question, right_answer, row, ticket

METRICS = ["exact_match", "field_accuracy", "macro_f1", "rougeL", "json_validity"]
GATES = [
    Gate(metric="exact_match", better_than="few_shot"),
    Gate(metric="perplexity", task="general", not_worse_than="zero_shot", margin=0.05),
]
CONSTRAINT = object()


def base_script(prompt):
    """Wrong without examples; with two or more it answers the cases above 15 (of each hundred) right."""
    shots = prompt.count("assistant:") - 1
    return right_answer(last_question(prompt), wrong_below=100 if shots < 2 else 15)


def tuned_script(prompt):
    return right_answer(last_question(prompt), wrong_below=3)


class Setup:
    """Inputs whose generators remember what they were asked."""

    def __init__(self, *, tuned_nats=1.0, **changes):
        self.encoder = WordEncoder()
        self.base = ScriptedGenerator(self.encoder, base_script)
        self.tuned = ScriptedGenerator(self.encoder, tuned_script, nats=tuned_nats)
        self.order = []
        settings = {
            "task": freeze_task("task", desk_rows(40, start=200), schema=SCHEMA, metrics=METRICS),
            "validation": freeze_task("validation", desk_rows(20, start=100), schema=SCHEMA),
            "general": freeze_task("general", [row(f"question {n}", f"an answer {n}") for n in range(30)], metrics=[]),
            "training": desk_rows(60),
            "encoder": self.encoder,
            "base": self._load("base"),
            "tuned": self._load("tuned"),
            "base_id": "base hash",
            "tuned_id": "tuned hash",
            "constraint": CONSTRAINT,
            "max_new_tokens": 32,
            "vocabulary_size": 1000,
        }
        self.inputs = EvaluationInputs(**{**settings, **changes})

    def _load(self, name):
        def load():
            self.order.append(name)
            return getattr(self, name)

        return load

    def run(self, done=None, save=lambda unit, payload: None, announce=lambda words: None, **section):
        settings = {"few_shot_k": [1, 2, 4], "few_shot_sets": 2, "gates": GATES, **section}
        return evaluate_candidates(EvaluateSection(**settings), self.inputs, done=done, save=save, announce=announce)


@pytest.fixture(scope="module")
def finished():
    setup = Setup()
    return setup, setup.run()


def test_the_verdict_is_pass_and_says_by_how_much_on_how_many_items(finished):
    _, result = finished
    assert result.evaluation["verdict"] == "PASS"
    first, second = result.evaluation["gates"]
    assert first["result"] == second["result"] == "PASS"
    assert "n = 40" in first["reason"]
    assert "n = 30" in second["reason"]
    assert result.evaluation["recommendation"]["candidate"] == "tuned"


def test_evaluation_json_has_the_shape_that_scripts_rely_on_and_no_number_without_its_n(finished):
    _, result = finished
    evaluation = json.loads(json.dumps(result.evaluation, allow_nan=False))
    assert {"tasks", "comparisons", "gates", "recommendation", "verdict"} <= set(evaluation)
    assert set(evaluation["tasks"]) == {"task", "general"}
    task = evaluation["tasks"]["task"]
    assert (task["n"], len(task["hash"])) == (40, 64)
    assert list(task["candidates"]) == ["zero_shot", "few_shot", "classical", "tuned"]
    assert list(evaluation["tasks"]["general"]["candidates"]) == ["zero_shot", "tuned"]
    for name, n in (("task", 40), ("general", 30)):
        for candidate in evaluation["tasks"][name]["candidates"].values():
            assert candidate["metrics"]
            assert all(set(one) == {"value", "low", "high", "n"} and one["n"] == n for one in candidate["metrics"].values())
    compared = {"task", "metric", "candidate", "baseline", "difference", "low", "high", "minimum_detectable"}
    assert all(compared <= set(one) and one["n"] in (30, 40) for one in evaluation["comparisons"])


def test_base_candidates_are_asked_under_the_constraint_and_the_tuned_one_freely(finished):
    setup, result = finished
    assert {call["constraint"] for call in setup.base.calls if "prompts" in call} == {CONSTRAINT}
    assert {call["constraint"] for call in setup.tuned.calls if "prompts" in call} == {None}
    candidates = result.evaluation["tasks"]["task"]["candidates"]
    assert [candidates[name]["decoding"] for name in ("zero_shot", "few_shot", "tuned")] == ["constrained", "constrained", "free"]
    assert "decoding" not in candidates["classical"]


def test_every_candidate_answers_the_same_items_in_the_same_order(finished):
    _, result = finished
    ids = {name: [one["item_id"] for one in lines] for name, lines in result.samples.items()}
    assert set(ids) == {"task.zero_shot", "task.few_shot", "task.classical", "task.tuned", "general.zero_shot", "general.tuned"}
    assert ids["task.zero_shot"] == ids["task.few_shot"] == ids["task.classical"] == ids["task.tuned"]
    sample = result.samples["task.tuned"][5]
    assert set(sample) == {"item_id", "prompt", "reference", "output", "finish_reason", "scores"}
    assert sample["scores"]["exact_match"] == 1.0
    assert sample["output"] == sample["reference"]
    assert [message["role"] for message in sample["prompt"]] == ["system", "user"]


def test_few_shot_is_chosen_on_validation_before_any_test_item_is_asked_and_ties_go_to_the_smaller_k(finished):
    setup, result = finished
    asked = [call["prompts"] for call in setup.base.calls if "prompts" in call]
    kinds = ["validation" if "case 1" in last_question(prompts[0]) else "test" for prompts in asked]
    assert kinds == ["validation"] * 6 + ["test"] * 2
    table = result.evaluation["few_shot"]["table"]
    assert [(one["k"], one["set"], one["value"], one["n"]) for one in table] == [
        (1, 0, 0.0, 20),
        (1, 1, 0.0, 20),
        (2, 0, 0.25, 20),
        (2, 1, 0.25, 20),
        (4, 0, 0.25, 20),
        (4, 1, 0.25, 20),
    ]
    assert (result.evaluation["few_shot"]["selected"]["k"], result.evaluation["few_shot"]["selected"]["set"]) == (2, 0)
    few_shot_prompt = asked[-1][0]
    assert few_shot_prompt.count("user:") == 3
    assert few_shot_prompt.count("system:") == 1


def test_few_shot_examples_come_from_the_training_rows_only(finished):
    setup, result = finished
    training = {one.row_id for one in setup.inputs.training}
    assert all(set(one["row_ids"]) <= training for one in result.evaluation["few_shot"]["table"])


def test_each_model_is_loaded_once(finished):
    setup, _ = finished
    assert setup.order == ["base", "tuned"]


def test_the_base_is_let_go_of_before_the_tuned_model_is_loaded():
    setup, alive = Setup(), []

    def load_base():
        alive.append(weakref.ref(generator := ScriptedGenerator(setup.encoder, base_script)))
        return generator

    def load_tuned():
        gc.collect()
        alive.append(alive[0]() is not None)
        return setup.tuned

    setup.inputs = replace(setup.inputs, base=load_base, tuned=load_tuned)
    setup.run()
    assert alive[1] is False


def test_a_resumed_evaluation_asks_nothing_twice_and_ends_byte_equal():
    whole = Setup()
    kept = {}
    expected = whole.run(save=lambda unit, payload: kept.update({unit: json.loads(json.dumps(payload))}))
    for stop in range(len(kept)):
        done = dict(list(kept.items())[:stop])
        again = Setup()
        saved = []
        found = again.run(done=done, save=lambda unit, payload, saved=saved: saved.append(unit))
        assert saved == list(kept)[stop:]
        assert json.dumps([found.evaluation, found.samples]) == json.dumps([expected.evaluation, expected.samples])
    complete = Setup()
    complete.run(done=kept)
    assert complete.order == []
    assert complete.base.calls == complete.tuned.calls == []


def test_a_kept_unit_of_another_model_template_or_setting_is_computed_again():
    kept = {}
    Setup().run(save=lambda unit, payload: kept.update({unit: payload}))

    def recomputed(setup, **section):
        units = []
        setup.run(done=kept, save=lambda unit, payload: units.append(unit), **section)
        return set(units)

    assert recomputed(Setup(tuned_id="trained on")) == {"task.tuned.answers", "task.tuned.perplexity", "general.tuned.perplexity"}
    assert "task.zero_shot.answers" in recomputed(Setup(max_new_tokens=33))
    for changed in ({"dtype": "float16"}, {"version": "9.9"}, {"stop_ids": (3,)}):
        assert "task.zero_shot.answers" in recomputed(Setup(**changed))
    other = Setup()
    other.encoder.sha256 = "template-b"
    assert recomputed(other) == set(kept)
    assert recomputed(Setup(seed=1)) >= {"few_shot.k2.set0", "few_shot.k4.set1"}


def test_each_task_says_the_hash_of_the_prompts_that_were_asked(finished):
    def hashes(result):
        return [task["prompt_sha256"] for task in result.evaluation["tasks"].values()]

    assert [len(one) for one in hashes(finished[1])] == [64, 64]
    assert hashes(Setup().run()) == hashes(finished[1])
    other = freeze_task("task", desk_rows(40, start=300), schema=SCHEMA, metrics=METRICS)
    theirs = hashes(Setup(task=other).run())
    assert theirs[0] != hashes(finished[1])[0]


def test_bf16_answers_that_depend_on_the_batch_are_counted_once_and_noted():
    setup, kept = Setup(dtype="bfloat16"), {}
    alone = iter(range(16))

    def generate(prompts, **how):
        made = ScriptedGenerator.generate(setup.tuned, prompts, **how)
        return [replace(made[0], token_ids=[99])] if len(prompts) == 1 and next(alone) < 3 else made

    setup.tuned.generate = generate
    result = setup.run(save=lambda unit, payload: kept.update({unit: payload}))
    words = "3 of 16 answers differ in bf16 when generated alone (tuned, the first 32 tokens)"
    assert words in result.evaluation["notes"]
    assert result.seconds["alone.tuned"] > 0
    again = Setup(dtype="bfloat16")
    assert words in again.run(done=kept).evaluation["notes"]
    assert again.tuned.calls == []
    few = Setup(dtype="bfloat16", task=freeze_task("task", desk_rows(15, start=200), schema=SCHEMA, metrics=METRICS))
    assert not any("generated alone" in note for one in (few, Setup()) for note in one.run().evaluation["notes"])


def test_too_few_items_recommend_nothing_and_say_why():
    six, five = (freeze_task("task", desk_rows(n, start=200), schema=SCHEMA, metrics=METRICS) for n in (6, 5))
    assert Setup(task=six).run().evaluation["recommendation"]["candidate"] is not None
    found = Setup(task=five).run().evaluation["recommendation"]
    assert found == {"candidate": None, "reason": "NOT MEASURED: n = 5 items cannot show anything at 95%; at least 6 are needed."}


def test_an_evaluation_through_another_template_than_trainings_is_refused():
    with pytest.raises(TemplateError, match="not the one of the training"):
        Setup(training_template_sha256="template-of-training").run()
    assert Setup(training_template_sha256="template-a").run().evaluation["verdict"] == "PASS"


def test_every_language_model_score_carries_its_templates_hash(finished):
    _, result = finished
    for task in result.evaluation["tasks"].values():
        assert {one["template_sha256"] for name, one in task["candidates"].items() if name != "classical"} == {"template-a"}


def test_forgetting_on_the_general_set_fails_the_verdict_and_the_recommendation_says_so():
    result = Setup(tuned_nats=1.2).run()
    assert result.evaluation["verdict"] == "FAIL"
    assert result.evaluation["gates"][1]["reason"].startswith("worse by more than the margin of 0.05")
    assert "but it fails a gate" in result.evaluation["recommendation"]["reason"]


def test_without_a_test_set_nothing_is_claimed_and_nothing_is_asked():
    setup = Setup(task=None, general=None)
    result = setup.run()
    assert result.evaluation["verdict"] == "NOT MEASURED"
    assert {gate["result"] for gate in result.evaluation["gates"]} == {"NOT MEASURED"}
    assert setup.order == []
    assert result.evaluation["recommendation"]["candidate"] is None


def test_an_empty_test_set_reads_not_measured_for_each_candidate():
    result = Setup(task=freeze_task("task", [], schema=SCHEMA, metrics=METRICS)).run()
    assert result.evaluation["tasks"]["task"]["n"] == 0
    assert set(result.evaluation["tasks"]["task"]["not_measured"]) == {"zero_shot", "few_shot", "classical", "tuned"}
    assert result.evaluation["verdict"] == "NOT MEASURED"


def test_without_gates_the_verdict_is_not_measured_though_everything_was_compared():
    result = Setup().run(gates=[])
    assert result.evaluation["verdict"] == "NOT MEASURED"
    assert result.evaluation["comparisons"]


def test_a_candidate_that_was_not_asked_for_costs_nothing_and_is_not_measured():
    setup = Setup()
    result = setup.run(candidates=["tuned"])
    assert setup.order == ["tuned"]
    assert list(result.evaluation["tasks"]["task"]["candidates"]) == ["tuned"]
    assert result.evaluation["verdict"] == "NOT MEASURED"


def test_without_validation_items_the_smallest_k_is_used_and_the_notes_say_so():
    result = Setup(validation=None).run()
    assert result.evaluation["few_shot"]["selected"]["k"] == 1
    assert any("no validation items" in note for note in result.evaluation["notes"])


def test_a_small_context_skips_long_examples_with_a_note_in_the_results():
    setup = Setup(training=[row(f"{WORDS['refund']} " * 80, ticket("refund")), *desk_rows(12)], context_length=160)
    result = setup.run(few_shot_k=[4], few_shot_sets=10)
    assert any("would not fit the model's context" in note for note in result.evaluation["notes"])
    assert all(len(prompt.split()) + 32 <= 160 for call in setup.base.calls if "prompts" in call for prompt in call["prompts"])


def test_free_text_tasks_are_chosen_by_rouge_l_and_the_classical_candidate_is_not_measured():
    rows = [row(f"say {n}", f"word {n} and more") for n in range(30)]
    encoder = WordEncoder()
    echo = ScriptedGenerator(encoder, lambda prompt: f"word {last_question(prompt).split()[-1]}")
    inputs = EvaluationInputs(
        task=freeze_task("task", rows[:10], metrics=["exact_match", "rougeL"]),
        validation=freeze_task("validation", rows[10:16]),
        training=rows[16:],
        encoder=encoder,
        base=lambda: echo,
        tuned=None,
        base_id="b",
        tuned_id="t",
        max_new_tokens=8,
        vocabulary_size=100,
    )
    result = evaluate_candidates(EvaluateSection(few_shot_k=[2], few_shot_sets=1), inputs)
    assert result.evaluation["few_shot"]["selected"]["metric"] == "rougeL"
    absent = result.evaluation["tasks"]["task"]["not_measured"]
    assert absent == {"classical": "the answers have no label fields", "tuned": "there is no tuned model"}


def test_what_is_done_is_announced_in_words_with_its_n_and_timed(finished):
    said = []
    result = Setup().run(announce=said.append)
    assert "tuned: 40 answers to task (free decoding)" in said
    assert set(result.seconds) == {*result.samples, "few_shot.selection"}
    assert "seconds" not in json.dumps(result.evaluation)


def test_what_a_generator_notes_is_said_once_and_again_by_a_resumed_run():
    """Such as why answers come the slow way; units that are done are not generated again."""
    setup, kept = Setup(), {}
    setup.tuned.notes = ["the slow way: no compiler"]
    found = setup.run(save=kept.__setitem__)
    assert found.evaluation["notes"].count("the slow way: no compiler") == 1
    assert "the slow way: no compiler" in Setup().run(done=kept).evaluation["notes"]
