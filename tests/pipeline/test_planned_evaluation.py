"""What the plan counts of the evaluation, of each candidate, and of the checks before a stage's first update."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tests.pipeline.test_planning import LONG, LORA, PAIRS, PROMPTS, flops, sampling, session_of
from tests.toys import make_stage

from tunesmith import planning
from tunesmith.evaluate.candidates import Asked
from tunesmith.models.machine import Machine
from tunesmith.models.roofline import model_shape
from tunesmith.recipe import EvaluateSection
from tunesmith.tasks import Tasks

SHARED, OWN, ANSWER = 390, 4, 6  # tokens of a row of 400: begun alike by all, its own, and supervised
ITEMS, HELD = 5, 3


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(planning, "measure_machine", lambda dtype, announce: Machine(2e11, 1e10, 1e11, 2e10, 4e10, 1e-6, 1e9))
    monkeypatch.setattr(planning, "_evaluation_bytes", lambda *args: 0)
    monkeypatch.setattr(planning, "_shared_beginning", lambda session: SHARED)


def task(items: int, *, is_text: bool = False, wants_answers: bool = True) -> SimpleNamespace:
    return SimpleNamespace(items=[None] * items, is_text=is_text, wants_answers=wants_answers)


def evaluated(*candidates: str, task=None, validation=None, general=None, **settings) -> dict:
    """The plan of a run of one stage, with its evaluation."""
    session = session_of([make_stage(objective="sft", name="s", method=LORA, max_steps=1)], LONG)
    session.data.ledger = SimpleNamespace(tokens={"supervised": 12 * ANSWER}, rows_trained=12)
    session.data.lengths = {"mean": float(SHARED + OWN + ANSWER)}
    session.tasks = Tasks(task, validation, general, schema=None, labels=None, notes=())
    session.recipe.evaluate = EvaluateSection(candidates=list(candidates), max_new_tokens=64, **settings)
    session.template, session.context = None, 1000
    return planning.make_plan(session)


def work(session_shape, tokens: float, heads: float, pairs: float) -> float:
    """FLOPs of so many tokens through the layers, so many through the head, and so many pairs in attention."""
    shape = session_shape
    return 2 * shape.linear * tokens + 2 * shape.vocabulary * shape.hidden * heads + 4 * shape.hidden * shape.layers * pairs


@pytest.fixture(scope="module")
def shape():
    return model_shape(session_of([], LONG).loaded)


def answered(shape, count: int, before: int) -> float:
    """Prompts read after what they share, then answers."""
    read = work(shape, before + count * OWN, count, count * OWN * (before + OWN / 2) + before**2 / 2)
    return read + work(shape, count * ANSWER, count * ANSWER, count * ANSWER * (before + OWN + ANSWER / 2))


def scored(shape, count: int, before: int) -> float:
    length = OWN + ANSWER
    return work(shape, before + count * length, count * ANSWER, count * length * (before + length / 2) + before**2 / 2)


def test_a_candidate_reads_the_prompts_answers_them_and_scores_the_references(shape):
    plan = evaluated("zero_shot", "tuned", "classical", task=task(ITEMS))
    for name in ("zero_shot", "tuned"):
        assert flops(plan, f"evaluate {name}") == pytest.approx(answered(shape, ITEMS, SHARED) + scored(shape, ITEMS, SHARED))
    assert not [phase for phase in plan["phases"] if "classical" in phase["name"]]


def test_in_16_bits_some_answers_of_the_tuned_model_are_made_again_one_by_one_and_together(shape, monkeypatch):
    monkeypatch.setattr(planning, "is_checked_alone", lambda task, section, dtype: dtype == "float32")  # as the tiny model is
    plan = evaluated("zero_shot", "tuned", task=task(ITEMS))
    again = 16 * answered(shape, 1, SHARED) + answered(shape, 16, SHARED)
    assert flops(plan, "evaluate tuned") == pytest.approx(flops(plan, "evaluate zero_shot") + again)


def test_few_shot_answers_the_validation_items_with_each_set_of_each_size_and_then_the_task(shape):
    settings = {"few_shot_k": [2, 4], "few_shot_sets": 3}
    plan = evaluated("few_shot", task=task(ITEMS), validation=task(HELD), **settings)
    before = {k: SHARED + k * (OWN + ANSWER) for k in (2, 3, 4)}
    trials = 3 * (answered(shape, HELD, before[2]) + answered(shape, HELD, before[4]))
    chosen = answered(shape, ITEMS, before[3]) + scored(shape, ITEMS, before[3])  # of a size between them
    assert flops(plan, "evaluate few_shot") == pytest.approx(trials + chosen)
    alone = evaluated("few_shot", task=task(ITEMS), **settings)
    assert flops(alone, "evaluate few_shot") == pytest.approx(chosen)


def test_the_guard_set_is_scored_under_the_base_and_under_the_result(shape, monkeypatch):
    asked = Asked(prompts=[[1] * 5, [1] * 7], references=[[1] * 2, [1] * 3])
    monkeypatch.setattr(planning, "encode_items", lambda *args, **settings: asked)
    one_pass = work(shape, 7 + 10, 2 + 3, (7**2 + 10**2) / 2)
    for candidates, passes in ((["zero_shot", "tuned"], 2), (["tuned", "classical"], 1)):
        plan = evaluated(*candidates, general=task(2))
        assert flops(plan, "evaluate general") == pytest.approx(passes * one_pass)
    assert not [phase for phase in evaluated("classical", general=task(2))["phases"] if phase["name"] == "evaluate general"]


def test_plain_text_and_preferred_answers_are_scored_and_not_answered(shape, monkeypatch):
    monkeypatch.setattr(planning, "encode_items", lambda *args, **settings: Asked([[1]], [[1] * 9]))
    texts = evaluated("zero_shot", task=task(1, is_text=True))
    assert flops(texts, "evaluate zero_shot") == pytest.approx(work(shape, 10, 9, 50))
    compared = evaluated("tuned", task=task(ITEMS, wants_answers=False))
    assert flops(compared, "evaluate tuned") == pytest.approx(scored(shape, 4 * ITEMS, SHARED))


@pytest.mark.parametrize(
    "stage, items",
    [(make_stage(objective="dpo", name="s", method=LORA, max_steps=1), PAIRS), (sampling({"type": "grpo"}), PROMPTS)],
    ids=["fixed data", "sampled answers"],
)
def test_a_stage_begins_with_checks_on_its_first_rows(stage, items, monkeypatch):
    def start() -> float:
        return sum(phase["flops"] for phase in planning.make_plan(session_of([stage], items))["phases"] if phase["name"] == "start s")

    whole = start()
    monkeypatch.setattr(planning, "CHECKS", 0)
    first = sum(len(items.rows[i][0]) for i in range(2))
    shape = model_shape(session_of([], items).loaded)
    assert whole - start() >= 0.9 * 10 * 2 * shape.linear * first
