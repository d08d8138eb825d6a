"""What the plan counts of stages that compare or sample: every pass over every row, and every model that is held."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.pipeline.helpers import recipe
from tests.toys import ItemsOf, Rows, items_of, loaded, make_items, make_prompts, make_rows, make_stage, tiny_model

from tunesmith import fitting, pipeline, planning
from tunesmith.errors import DoesNotFit
from tunesmith.models import footprint
from tunesmith.models.costs import method_cost
from tunesmith.models.machine import Machine
from tunesmith.models.roofline import model_shape
from tunesmith.recipe import LaunchSection, Stage
from tunesmith.tasks import Tasks
from tunesmith.train.stage import derive_stage

LORA, FULL = {"type": "lora", "r": 4, "target_modules": ["q_proj"]}, {"type": "full"}
PROMPTS, PAIRS, LABELLED = make_prompts(8), make_items(12), make_items(12, answers=1)
JUDGED = {"type": "grpo", "rewards": [{"type": "python", "function": "f.py:f"}]}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine whose speeds and memory are always the same."""
    speeds = Machine(2e11, 1e11, 1e11, 2e10, 4e10, 1e-6, 1e9)
    monkeypatch.setattr(planning, "measure_machine", lambda dtype, announce: speeds)
    monkeypatch.setattr(fitting, "peak_memory_bytes", lambda: 0)
    monkeypatch.setattr(fitting, "held_bytes", lambda: 0)
    monkeypatch.setattr(fitting, "available_memory", lambda: 10**12)
    for constant in ("PLAIN_HIDDEN", "PLAIN_INNER"):  # the comparison of fast paths, whose two rows are as much as a small batch
        monkeypatch.setattr(footprint, constant, 0)


def session_of(
    stages: list[Stage],
    items: ItemsOf,
    *,
    held_out: ItemsOf | None = None,
    run: Path = Path("no-such-run"),
    given: list[Stage] | None = None,
    launch: dict | None = None,
) -> SimpleNamespace:
    """A session of some stages on the same items. given: what the recipe says, where that is less."""
    data = SimpleNamespace(
        train=items.rows, items=items, validation=held_out.rows if held_out else None, test_records=[], validation_records=[]
    )
    return SimpleNamespace(
        data_of=lambda stage: data,
        data=data,
        tasks=Tasks(task=None, validation=None, general=None, schema=None, labels=None, notes=()),
        loaded=loaded(tiny_model("llama")),
        stages=stages,
        run=SimpleNamespace(path=run, events=lambda: [], resumed=True),
        bare=10**9,
        recipe=SimpleNamespace(
            seed=0,
            launch=LaunchSection(**{"processes": 1} | (launch or {})),
            price_per_hour=None,
            stages=given or stages,
            evaluate=SimpleNamespace(candidates=[], gates=[]),
        ),
    )


def planned(stages: list[Stage], items: ItemsOf, **where) -> dict:
    """The plan of some stages on the same items."""
    return planning.make_plan(session_of(stages, items, **where))


def flops(plan: dict, name: str) -> float:
    (phase,) = [phase for phase in plan["phases"] if phase["name"] == name]
    return phase["flops"]


def test_learned_tokens_are_computed_once_a_batch_and_a_prefix_not_at_all():
    def work(method: str) -> tuple[float, float]:
        settings = {"type": method, "num_virtual_tokens": 5} if method != "lora" else LORA
        stage = make_stage(method=settings, max_steps=3, rows=12, per_device_train_batch_size=4)
        session = session_of([stage], items_of(Rows(make_rows(12))))
        update = fitting.update_of(session, stage, method_cost(session.loaded.model, stage.method))
        return update.work.computed, update.largest

    computed, largest = work("lora")
    assert work("prompt") == (computed + 5, largest + 5)
    assert work("prefix") == (computed, largest)


def test_under_fsdp_a_process_holds_its_share_of_gradients_and_moments_and_the_base_whole_as_it_is_loaded():
    stage = make_stage(method=FULL, max_steps=3, rows=12)
    shape = model_shape(loaded(tiny_model("llama")))
    alone, sharded = (
        fitting.stage_footprint(session_of([stage], LONG, launch=launch), shape, stage)
        for launch in ({}, {"strategy": "fsdp", "nproc_per_node": 4})
    )
    for part in ("gradients", "optimiser"):
        assert sharded[part] == alone[part] // 4
    assert sharded["weights"] == alone["weights"]


def test_under_zero3_a_process_holds_its_share_and_what_it_gathers_and_the_time_to_send_it_is_said_to_be_left_out():
    stage = make_stage(method=LORA, max_steps=3, rows=12)
    shape = model_shape(loaded(tiny_model("llama")))
    alone, second, third = (
        fitting.stage_footprint(session_of([stage], LONG, launch=launch), shape, stage)
        for launch in (
            {},
            {"strategy": "zero2", "nproc_per_node": 4},
            {"strategy": "zero3", "nproc_per_node": 2, "nodes": 2, "processes": 8},
        )
    )
    trained = method_cost(tiny_model("llama"), stage.method).trainable
    assert second["weights"] == alone["weights"]
    assert second["optimiser"] == third["optimiser"] == trained // 4 * 12
    assert second["gradients"] == 4 * (trained // 4 + trained)
    assert third["weights"] == alone["weights"] + shape.weights // 4 + int(2.4 * shape.weights)  # its share beside all, gathered
    left_out = {
        strategy: [note for note in planned([stage], LONG, launch={"strategy": strategy, "nproc_per_node": 2})["notes"] if "send" in note]
        for strategy in ("ddp", "zero3")
    }
    assert [len(notes) for notes in left_out.values()] == [1, 1]


def test_a_checkpoint_takes_the_masters_and_what_the_update_rule_keeps_of_them_and_the_result_as_much_as_the_masters():
    def saved(optim: str) -> float:
        plan = planned([make_stage(name="s", method=LORA, max_steps=6, save_steps=2, optim=optim)], LONG)
        return next(phase["bytes"] for phase in plan["phases"] if phase["name"] == "save s")

    trained = method_cost(tiny_model("llama"), make_stage(method=LORA, rows=12).method).trainable
    for optim, kept in (("adamw_torch_fused", 12), ("muon", 8), ("adamw_8bit", 6), ("adafactor", 4)):
        assert saved(optim) == (3 * kept + 4) * trained


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    stage = make_stage(method=LORA, rows=12)
    monkeypatch.setattr(fitting, "held_bytes", lambda: 7)
    assert fitting.memory_room(session_of([stage], LONG)) == 10**12 + 7
    assert fitting.memory_room(session_of([stage], LONG, launch={"nproc_per_node": 4})) == 10**12 // 4 + 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's word counts
    assert fitting.memory_room(session_of([stage], LONG, launch={"nproc_per_node": 4})) == 10**12 // 2 + 7


def sampling(objective: dict, name: str = "s", **settings) -> Stage:
    """A stage of LoRA that samples 4 answers to each of 2 prompts."""
    kind = {"num_generations": 4, "rewards": JUDGED["rewards"]} | objective
    given = {"method": LORA, "max_steps": 4, "per_device_train_batch_size": 2} | settings
    return make_stage(name=name, objective=kind, rollout={"prompts_per_step": 2, "max_new_tokens": 8}, **given)


def test_an_iteration_costs_the_same_training_into_however_many_updates_it_is_cut():
    whole = planned([sampling({"type": "ppo", "num_mini_batches": 1, "num_ppo_epochs": 1}, max_steps=1)], PROMPTS)
    cut = planned([sampling({"type": "ppo", "num_mini_batches": 4, "num_ppo_epochs": 1}, max_steps=4)], PROMPTS)
    twice = planned([sampling({"type": "ppo", "num_mini_batches": 4, "num_ppo_epochs": 2}, max_steps=8)], PROMPTS)
    assert flops(cut, "train s") == pytest.approx(flops(whole, "train s"))
    assert flops(twice, "train s") == pytest.approx(2 * flops(whole, "train s"))
    for plan in (cut, twice):
        assert flops(plan, "sample s") == pytest.approx(flops(whole, "sample s"))


def test_only_the_answers_that_are_learned_from_cost_training():
    tokens = {
        kind: planned([sampling({"type": kind, "num_generations": 8}, per_device_train_batch_size=16)], PROMPTS)["tokens"]
        for kind in ("grpo", "online_dpo", "best_of_n")
    }
    assert tokens["online_dpo"] == pytest.approx(tokens["grpo"] * 2 / 8, abs=1)
    assert tokens["best_of_n"] == pytest.approx(tokens["grpo"] / 8, abs=1)


@pytest.mark.parametrize("kind, items", [("dpo", PAIRS), ("kto", LABELLED)])
def test_the_reference_and_the_validation_are_passes_over_all_rows_with_their_heads(kind, items, monkeypatch):
    monkeypatch.setattr(planning, "CHECKS", 0)
    found = [
        planned(
            [make_stage(objective=kind, name="s", method=LORA, max_steps=4, eval_steps=2, per_device_train_batch_size=size)],
            items,
            held_out=items,
        )
        for size in (12, 2)
    ]
    for name, passes in (("start s", 2), ("validate s", 2)):
        assert flops(found[1], name) == pytest.approx(flops(found[0], name), rel=0.05)
        one_pass = flops(found[0], "train s") / 4 / 2  # of an update of all rows, a forward of its forward and backward
        assert flops(found[0], name) == pytest.approx(passes * one_pass * (2 if kind == "kto" else 1), rel=0.15)


def test_ktos_estimate_is_a_pass_over_as_many_rows_as_are_trained():
    stage = make_stage(objective="kto", name="s", method=LORA, max_steps=4, per_device_train_batch_size=4)
    plan = planned([stage], LABELLED)
    assert flops(plan, "sample s") == pytest.approx(flops(plan, "train s") / 2, rel=0.15)


WIDE = {"objective": "sft", "name": "s", "method": LORA, "max_steps": 4}


def open_stage(**settings) -> tuple[Stage, Stage]:
    """A stage as a recipe gives it, and with every open setting derived as on a machine with room."""
    given = Stage(**WIDE | settings)
    return given, derive_stage(given, 12)


def fitted(monkeypatch, room: float, **settings) -> Stage:
    """What becomes of a stage on a machine with so much room."""
    given, derived = open_stage(**settings)
    monkeypatch.setattr(fitting, "available_memory", lambda: int(room))
    (stage,) = fitting.fit_stages(session_of([derived], LONG, given=[given]))
    return stage


LONG = items_of(Rows([(np.full(400, row), np.r_[0, np.ones(399)].astype(np.float32)) for row in range(1, 13)]))


def need(**settings) -> int:
    """Bytes that a stage takes on long rows."""
    _, derived = open_stage(**settings)
    return planned([derived], LONG)["peak_memory_bytes"]


def chosen(stage: Stage) -> tuple[int, int, bool]:
    return stage.per_device_train_batch_size, stage.gradient_accumulation_steps, stage.gradient_checkpointing


def test_where_there_is_room_the_open_settings_are_eight_rows_at_once(monkeypatch):
    assert chosen(fitted(monkeypatch, 1e12)) == (8, 1, False)


def test_where_there_is_not_the_micro_batch_is_lowered_and_the_update_keeps_its_rows_then_gradients_are_checkpointed(monkeypatch):
    spare = 1 / (1 - fitting.KEPT_FREE) + 1e-6
    needs = [need(per_device_train_batch_size=n, gradient_accumulation_steps=8 // n) for n in (8, 4, 2, 1)]
    assert needs == sorted(needs, reverse=True)
    assert chosen(fitted(monkeypatch, needs[1] * spare)) == (4, 2, False)
    assert chosen(fitted(monkeypatch, needs[3] * spare)) == (1, 8, False)
    assert chosen(fitted(monkeypatch, (needs[3] - 100_000) * spare)) == (1, 8, True)


def test_what_the_recipe_says_is_never_changed(monkeypatch):
    few = need(per_device_train_batch_size=6, gradient_checkpointing=True)
    assert chosen(fitted(monkeypatch, 1, per_device_train_batch_size=6, gradient_checkpointing=False)) == (6, 1, False)
    assert chosen(fitted(monkeypatch, 1, gradient_accumulation_steps=3, gradient_checkpointing=False)) == (8, 3, False)
    assert chosen(fitted(monkeypatch, 1.2 * few, per_device_train_batch_size=6, gradient_checkpointing=True)) == (6, 1, True)


def test_a_resumed_run_keeps_what_it_began_with_on_a_machine_with_other_room(monkeypatch, tmp_path):
    given, derived = open_stage()
    known = "stages: [{name: s, per_device_train_batch_size: 2, gradient_accumulation_steps: 4, gradient_checkpointing: true}]"
    (tmp_path / "recipe.yaml").write_text(known)
    (stage,) = fitting.fit_stages(session_of([derived], LONG, given=[given], run=tmp_path))
    assert chosen(stage) == (2, 4, True)
    anew = session_of([derived], LONG, given=[given], run=tmp_path)
    anew.run.resumed = False  # the recipe that lies there is of a run that was refused
    assert chosen(*fitting.fit_stages(anew)) == (8, 1, False)
    other, derived = open_stage(per_device_train_batch_size=8)
    (stage,) = fitting.fit_stages(session_of([derived], LONG, given=[other], run=tmp_path))
    assert chosen(stage) == (8, 1, False)


def test_what_does_not_fit_is_refused_with_the_nearest_setting_that_does_and_what_that_needs(monkeypatch):
    _, stage = open_stage(per_device_train_batch_size=8)
    monkeypatch.setattr(fitting, "KEPT_FREE", 0.0002)  # two tiny layers: the settings differ by little
    fits = need(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    room = int(fits / (1 - fitting.KEPT_FREE)) + 1
    monkeypatch.setattr(fitting, "available_memory", lambda: room)
    with pytest.raises(DoesNotFit, match=f"{room / 1e9:.2f} GB to give") as caught:
        planned([stage], LONG)
    assert caught.value.exit_status == 4
    settings = "per_device_train_batch_size: 2, gradient_accumulation_steps: 4"
    assert caught.value.mend == f"the nearest that fits, with {fits / 1e9:.2f} GB: {settings}"
    monkeypatch.setattr(fitting, "available_memory", lambda: fits)  # with nothing kept free it would fit
    with pytest.raises(DoesNotFit) as caught:
        planned([stage], LONG)
    assert settings not in caught.value.mend


def test_an_adapter_is_named_where_full_tuning_fits_in_no_way(monkeypatch):
    monkeypatch.setattr(fitting, "stage_memory", lambda session, shape, stage: 5 if stage.method.type == "lora" else 50)
    monkeypatch.setattr(fitting, "available_memory", lambda: 10)
    with pytest.raises(DoesNotFit) as caught:
        planned([open_stage(method=FULL)[1]], LONG)
    assert caught.value.mend == "the nearest that fits, with 0.00 GB: method: lora"


def test_where_nothing_fits_the_least_that_is_needed_is_said(monkeypatch):
    monkeypatch.setattr(fitting, "available_memory", lambda: 10)
    with pytest.raises(
        DoesNotFit, match=r"no setting fits: even .* needs 1.* GB, with 10% to be kept free; take shorter rows or a smaller model"
    ):
        planned([open_stage()[1]], LONG)


def test_the_plan_of_training_alone_counts_no_evaluation(monkeypatch):
    monkeypatch.setattr(planning, "_evaluation", lambda *args: [planning.Phase("evaluate tuned", 7.0, 0.0, 0.0, "compute")])
    session = session_of([open_stage()[1]], LONG)
    whole, alone = planning.make_plan(session), planning.make_plan(session, evaluates=False)
    assert whole["seconds"] - alone["seconds"] == pytest.approx(7)
    assert {phase["name"] for phase in whole["phases"]} - {phase["name"] for phase in alone["phases"]} == {"evaluate tuned"}


def test_the_plans_memory_is_that_of_training_or_of_the_evaluation_whichever_is_more(monkeypatch):
    session = session_of([open_stage()[1]], LONG)
    training = planning.make_plan(session, evaluates=False)["memory"]
    monkeypatch.setattr(planning, "_evaluation_bytes", lambda *args: 1)
    assert planning.make_plan(session)["memory"] == training
    monkeypatch.setattr(planning, "_evaluation_bytes", lambda *args: 10**12)
    plan = planning.make_plan(session)
    weights = planning.model_shape(session.loaded).weights
    assert plan["peak_memory_bytes"] == 10**12 + weights + training["libraries"]
    assert plan["memory"] == dict.fromkeys(training, 0) | {"weights": weights, "answers": 10**12, "libraries": training["libraries"]}
    assert any("the evaluation may need 100" in note for note in plan["notes"])


def test_an_evaluation_on_a_cpu_in_16_bits_holds_the_kernels_that_were_made(monkeypatch):
    session = session_of([open_stage()[1]], LONG)
    monkeypatch.setattr(planning, "_evaluation_bytes", lambda *args: 10**12)
    plain = planning.make_plan(session)["memory"]
    monkeypatch.setattr(planning, "on_cpu_in_16_bits", lambda shape: True)
    assert planning.make_plan(session)["memory"] == plain | {"libraries": plain["libraries"] + planning.KERNELS_IN_16_BITS}


@pytest.mark.parametrize("verb, counted", [("run", True), ("train", False)])
def test_a_run_plans_its_evaluation_and_training_alone_does_not(tmp_path, monkeypatch, verb, counted):
    asked = []
    monkeypatch.setattr(pipeline, "prepare", lambda session: None)
    monkeypatch.setattr(pipeline, "make_plan", lambda session, *, evaluates: asked.append(evaluates) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        getattr(pipeline, verb)(recipe(tmp_path, "no-model"), out=tmp_path / "run")
    assert asked == [counted]


def test_an_hours_price_gives_the_cost():
    session = session_of([open_stage()[1]], LONG)
    assert planning.make_plan(session)["cost"] is None
    session.recipe.price_per_hour = 3.6
    plan = planning.make_plan(session)
    assert plan["cost"] == pytest.approx(plan["seconds"] / 1000)


def test_what_was_measured_stands_beside_what_was_predicted_with_the_error():
    predicted = {
        "seconds": 12.0,
        "tokens": 5,
        "cost": None,
        "phases": [{"name": "train s", "seconds": 8.0}, {"name": "save s", "seconds": 1.0}],
    }
    measured = {
        "seconds": 10.0,
        "tokens": 5,
        "cost": None,
        "phases": [{"name": "train s", "seconds": 10.0}, {"name": "start s", "seconds": 2.0}],
    }
    rows = {row["name"]: (row["predicted"], row["measured"], row["error"]) for row in planning.compare_plan(predicted, measured)}
    assert rows == {
        "seconds": (12.0, 10.0, pytest.approx(0.2)),
        "tokens": (5, 5, 0.0),
        "train s": (8.0, 10.0, pytest.approx(-0.2)),
        "save s": (1.0, None, None),
        "start s": (None, 2.0, None),
    }
    assert planning.compare_plan(None, measured)[0] == {"name": "seconds", "predicted": None, "measured": 10.0, "error": None}
