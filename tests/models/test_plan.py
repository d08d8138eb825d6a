"""The plan's formulas: more work and more memory never cost less; the machine is measured once; what does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.toys import batch_of, items_of, loaded, make_rows, make_stage, tiny_model

from tunesmith.errors import DoesNotFit
from tunesmith.models import plan
from tunesmith.models.plan import (
    Machine,
    Shape,
    available_memory,
    decode_phase,
    evaluation_memory,
    forward_phase,
    measure_machine,
    model_shape,
    train_memory,
    train_phase,
)
from tunesmith.models.policy import Policy
from tunesmith.objectives import SFT
from tunesmith.train.optimiser import Optimiser
from tunesmith.train.window import run_window

SHAPE = Shape(parameters=134_515_008, linear=106_168_320, layers=30, hidden=576, inner=1536, vocabulary=49152, itemsize=2, cached=11_520)
MACHINE = Machine(2e11, 2e10)
LORA, FULL = make_stage(method="lora", max_steps=10), make_stage(method="full", max_steps=10)
GIB = 2**30


def memory(stage=LORA, *, tokens: int = 2000, trainable: int = 5_000_000, resident: int = GIB) -> int:
    return train_memory(SHAPE, stage, resident=resident, batch_tokens=tokens, trainable=trainable)


def test_memory_grows_with_tokens_trained_weights_and_what_is_resident():
    assert memory(tokens=1000) < memory(tokens=2000) < memory(tokens=4000)
    assert memory(trainable=1000) < memory(trainable=10_000_000)
    assert memory(resident=2 * GIB) - memory(resident=GIB) == GIB


def test_full_tuning_in_bf16_needs_moments_rests_and_gradients_beside_the_weights_that_are_there():
    def beyond(stage):
        return memory(stage, trainable=SHAPE.parameters) - memory(stage, trainable=0)

    assert beyond(FULL) == 12 * SHAPE.parameters
    assert beyond(FULL.model_copy(update={"gradient_accumulation_steps": 4})) == 14 * SHAPE.parameters
    assert beyond(LORA) == 16 * SHAPE.parameters


@pytest.mark.parametrize("dtype, accumulation", [(torch.bfloat16, 1), (torch.bfloat16, 2), (torch.float32, 1), (torch.float32, 2)])
def test_the_state_of_full_tuning_is_what_the_optimiser_holds(dtype, accumulation):
    model = tiny_model("llama", dtype=dtype)
    stage = make_stage(method="full", max_steps=2, gradient_accumulation_steps=accumulation)
    policy = Policy(model)
    optimiser = Optimiser(policy.named_parameters(), stage)
    batches = [batch_of(make_rows(2, seed=seed)) for seed in range(accumulation)]
    run_window(policy, SFT(), batches)
    held = [tensor for name, tensor in optimiser.state().items() if name.startswith(("first.", "second.", "rest."))]
    held += [optimiser.flat_gradient, *(unit.gradient for unit in optimiser._apart)]
    trained = sum(p.numel() for p in model.parameters())
    size = replace(SHAPE, itemsize=dtype.itemsize)

    def planned(trainable):
        return train_memory(size, stage, resident=0, batch_tokens=0, trainable=trainable)

    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == planned(trained) - planned(0)


def test_evaluation_needs_more_memory_for_longer_prompts_answers_and_batches_up_to_the_engines_limits():
    def need(**changed):
        given = {"items": 1000, "batch_size": 50, "prompt_tokens": 200, "new_tokens": 60, "batch_tokens": 16384, "logit_elements": 1 << 25}
        return evaluation_memory(SHAPE, resident=GIB, **(given | changed))

    assert need(batch_size=10) < need(batch_size=20) < need(batch_size=50)
    assert need(prompt_tokens=100) < need() < need(prompt_tokens=260)
    assert need(new_tokens=10, prompt_tokens=100) < need(new_tokens=60, prompt_tokens=100)
    assert need(batch_size=1000) == need(batch_size=2000)
    assert need(items=1) < need(items=50) == need(items=51)
    cache = 50 * 260 * SHAPE.cached * SHAPE.itemsize
    assert need() > GIB + cache
    assert need() - need(batch_size=1) < 3 * GIB


def test_checkpointing_needs_less_memory_and_more_time():
    less = LORA.model_copy(update={"gradient_checkpointing": True})
    assert memory(less, tokens=8000) < memory(LORA, tokens=8000) - GIB // 2
    times = [train_phase(SHAPE, MACHINE, stage, tokens=1e5, supervised=1e4).seconds for stage in (LORA, less)]
    assert times[0] < times[1]


def test_time_grows_with_tokens_heads_and_steps_and_shrinks_on_a_faster_machine():
    def seconds(tokens=1e5, supervised=1e4, machine=MACHINE, stage=LORA):
        return train_phase(SHAPE, machine, stage, tokens=tokens, supervised=supervised).seconds

    assert seconds() < seconds(tokens=2e5) < 2.01 * seconds()
    assert seconds() < seconds(supervised=2e4)
    assert seconds() < seconds(stage=FULL)
    assert seconds(machine=Machine(4e11, 4e10)) == pytest.approx(seconds() / 2)
    answers = [decode_phase("a", SHAPE, MACHINE, items=items, new_tokens=40, batch=50).seconds for items in (50, 100, 150)]
    assert answers == sorted(answers)
    assert (
        decode_phase("a", SHAPE, MACHINE, items=150, new_tokens=40, batch=50).seconds
        < decode_phase("a", SHAPE, MACHINE, items=150, new_tokens=40, batch=1).seconds
    )
    assert forward_phase("f", SHAPE, MACHINE, tokens=1e5, heads=10).seconds < seconds()


def test_what_binds_a_phase_is_the_slower_of_the_two():
    def phase(machine):
        return train_phase(SHAPE, machine, LORA, tokens=1e5, supervised=1e4)

    assert phase(Machine(1e10, 1e12)).bound_by == "compute"
    assert phase(Machine(1e14, 1e9)).bound_by == "memory bandwidth"


@pytest.mark.parametrize("family, cached", [("llama", 64), ("gpt2", 128), ("gemma3", 64), ("opt", 128)])
def test_a_models_shape_is_counted_from_its_weights(family, cached):
    model = tiny_model(family)
    shape = model_shape(loaded(model))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.hidden, shape.vocabulary, shape.itemsize) == (2, 32, 97, 4)
    assert 0 < shape.linear < shape.parameters
    assert shape.cached == cached
    if family == "llama":
        assert shape.linear == 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)


def test_the_machine_is_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(plan, "_matmul_rate", lambda dtype: calls.append(dtype) or 1e11)
    monkeypatch.setattr(plan, "_bandwidth", lambda dtype: 1e10)
    first = measure_machine(torch.float32)
    assert measure_machine(torch.float32) == first == Machine(1e11, 1e10)
    assert calls == [torch.float32]
    measure_machine(torch.bfloat16)
    assert calls == [torch.float32, torch.bfloat16]
    assert len(json.loads((tmp_path / "machine.json").read_text())) == 2


def test_a_torn_note_of_the_machine_is_measured_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(plan, "_matmul_rate", lambda dtype: 1e11)
    monkeypatch.setattr(plan, "_bandwidth", lambda dtype: 1e10)
    for torn in ('{"x', "[]", '{"x": 1}'):
        (tmp_path / "machine.json").write_text(torn)
        assert measure_machine(torch.float32) == Machine(1e11, 1e10)


def test_the_measured_speeds_are_those_of_a_computer(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    machine = measure_machine(torch.float32)
    assert 1e8 < machine.flops_per_second < 1e15
    assert 1e8 < machine.bytes_per_second < 1e13


def test_available_memory_is_positive_and_no_more_than_the_machine_has():
    import os

    assert 0 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_plan_that_needs_more_memory_than_there_is_is_refused_with_what_would_help(monkeypatch):
    from tunesmith import planning

    rows = make_rows(12)
    data = SimpleNamespace(train=rows, items=items_of(rows), validation=None, test_records=[])
    session = SimpleNamespace(
        data_of=lambda stage: data,
        loaded=loaded(tiny_model("llama")),
        stages=[make_stage(method={"type": "lora", "target_modules": ["q_proj"]}, max_steps=3)],
        data=data,
        recipe=SimpleNamespace(seed=0, evaluate=SimpleNamespace(candidates=[])),
        tasks=SimpleNamespace(task=None, general=[], validation=None),
    )
    monkeypatch.setattr(planning, "measure_machine", lambda dtype: MACHINE)
    monkeypatch.setattr(planning, "_evaluation", lambda *args: [])
    assert planning.make_plan(session)["peak_memory_bytes"] > 0
    monkeypatch.setattr(planning, "available_memory", lambda: 10_000_000)
    with pytest.raises(DoesNotFit, match="gradient_checkpointing") as caught:
        planning.make_plan(session)
    assert caught.value.exit_status == 4
