"""The plan's formulas: what is counted is what arithmetic says; more work and more memory never cost less."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from tests.toys import batch_of, loaded, make_rows, make_stage, tiny_model

from tunesmith.models import kernels
from tunesmith.models.costs import MethodCost, method_cost
from tunesmith.models.footprint import HOLES_IN_16_BITS, generation_bytes, train_footprint
from tunesmith.models.machine import Machine
from tunesmith.models.methods import resolve
from tunesmith.models.policy import Policy
from tunesmith.models.roofline import (
    ATTENTION_IN_16_BITS,
    BESIDE,
    DECODE_CALLS,
    DECODE_CALLS_BY_LOOPS,
    DECODE_CALLS_IN_16_BITS,
    FORWARD_BY_LOOPS,
    FORWARD_CALLS,
    FORWARD_CALLS_IN_16_BITS,
    FORWARD_IN_16_BITS,
    OPTIMISER_PASSES,
    OPTIMISER_PASSES_BY_LOOPS,
    READING_IN_16_BITS,
    START_IN_16_BITS,
    TRAIN_BY_LOOPS,
    TRAIN_CALLS,
    TRAIN_CALLS_IN_16_BITS,
    TRAIN_IN_16_BITS,
    Shape,
    Tokens,
    decode_phase,
    forward_phase,
    model_shape,
    reading_phase,
    start_phase,
    storage_phase,
    together,
    train_phase,
)
from tunesmith.objectives import SFT
from tunesmith.recipe import FullMethod, LoraMethod
from tunesmith.train.optimiser import Optimiser
from tunesmith.train.window import run_window

SHAPE = Shape(
    parameters=134_515_008,
    linear=106_168_320,
    layers=30,
    hidden=576,
    inner=1536,
    vocabulary=49152,
    dtype=torch.bfloat16,
    cached=11_520,
    weights=269_030_016,
)
MACHINE = Machine(
    flops_per_second=2e11,
    weight_bytes_per_second=1e10,
    attention_flops_per_second=1e11,
    bytes_per_second=2e10,
    cached_bytes_per_second=4e10,
    call_seconds=1e-6,
    storage_bytes_per_second=1e9,
)
LORA, FULL = make_stage(method="lora", max_steps=10), make_stage(method="full", max_steps=10)
RANK_16, WHOLE_MODEL = MethodCost(4_884_480, False, per_token=4_884_480), MethodCost(SHAPE.parameters, True, weight_gradients=1.0)
WORK = Tokens(1e5, 1e4, batches=50)
GIB = 2**30
DTYPES = (torch.float32, torch.bfloat16)


def memory(stage=LORA, *, tokens: int = 2000, trainable: int = 5_000_000, bare: int = GIB, shape: Shape = SHAPE) -> int:
    cost = MethodCost(trainable, stage.method.type == "full", weight_gradients=float(stage.method.type == "full"))
    return sum(train_footprint(shape, stage, cost, bare=bare, batch_tokens=tokens).values())


def test_memory_grows_with_tokens_trained_weights_and_what_the_bare_process_holds():
    assert memory(tokens=1000) < memory(tokens=2000) < memory(tokens=4000)
    assert memory(trainable=1000) < memory(trainable=10_000_000)
    assert memory(bare=2 * GIB) - memory(bare=GIB) == GIB


def test_on_a_cpu_in_16_bits_what_layers_keep_leaves_holes(monkeypatch):
    def activations(cuda: bool, tokens: int) -> int:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        return train_footprint(SHAPE, LORA, RANK_16, bare=0, batch_tokens=tokens)["activations"]

    on_cpu, on_gpu = (activations(cuda, 2000) - activations(cuda, 1000) for cuda in (False, True))
    kept = 1000 * 30 * (11 * 576 + 3 * 1536) * 2
    assert on_cpu - on_gpu == pytest.approx((HOLES_IN_16_BITS - 1) * kept, rel=1e-3)


def test_offloaded_activations_are_those_of_one_layer():
    kept, away = (
        train_footprint(SHAPE, stage, RANK_16, bare=GIB, batch_tokens=2000)
        for stage in (LORA, LORA.model_copy(update={"activation_offload": True}))
    )
    weights_in_motion = SHAPE.linear // SHAPE.layers * SHAPE.itemsize
    assert (kept.pop("activations") - weights_in_motion) // 30 == away.pop("activations") - weights_in_motion
    assert kept == away


def test_full_tuning_in_bf16_needs_moments_lower_halves_and_gradients_beside_the_weights_that_are_there():
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
    held = [tensor for name, tensor in optimiser.state().items() if name.startswith(("first.", "second.", "low."))]
    held += [optimiser.flat_gradient, *(unit.gradient for unit in optimiser._apart)]
    trained = sum(p.numel() for p in model.parameters())
    size = replace(SHAPE, dtype=dtype)

    def planned(trainable):
        return memory(stage, tokens=0, trainable=trainable, bare=0, shape=size)

    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == planned(trained) - planned(0)


def test_evaluation_needs_more_memory_for_longer_prompts_answers_and_batches_up_to_the_engines_limits():
    def need(**changed):
        given = {"items": 1000, "batch_size": 50, "prompt_tokens": 200, "new_tokens": 60, "batch_tokens": 16384, "logit_elements": 1 << 25}
        return generation_bytes(SHAPE, **(given | changed))

    assert need(batch_size=10) < need(batch_size=20) < need(batch_size=50)
    assert need(prompt_tokens=100) < need() < need(prompt_tokens=260)
    assert need(new_tokens=10, prompt_tokens=100) < need(new_tokens=60, prompt_tokens=100)
    assert need(batch_size=1000) == need(batch_size=2000)
    assert need(items=1) < need(items=50) == need(items=51)
    cache = 50 * 260 * SHAPE.cached * SHAPE.itemsize
    assert need() > cache
    assert need() - need(batch_size=1) < 3 * GIB


def test_checkpointing_needs_less_memory_and_more_time():
    less = LORA.model_copy(update={"gradient_checkpointing": True})
    assert memory(less, tokens=8000) < memory(LORA, tokens=8000) - GIB // 2
    assert trained(LORA).seconds < trained(less).seconds


def trained(stage=LORA, cost: MethodCost | None = None, work: Tokens = WORK, machine: Machine = MACHINE):
    if cost is None:
        cost = WHOLE_MODEL if stage.method.type == "full" else RANK_16
    return train_phase(SHAPE, machine, stage, cost, work)


def test_the_flops_of_training_are_two_a_weight_and_token_for_each_pass():
    """Forward and towards the inputs; full tuning's weights besides, and its head twice; a LoRA's numbers two forward and four back."""
    tokens, heads, linear, head = 1e5, 1e4, 106_168_320, 49152 * 576
    assert trained(LORA).flops == pytest.approx(4 * linear * tokens + 6 * 4_884_480 * tokens + 4 * head * heads)
    assert trained(FULL).flops == pytest.approx(6 * linear * tokens + 8 * head * heads)
    assert trained(LORA.model_copy(update={"gradient_checkpointing": True})).flops - trained(LORA).flops == pytest.approx(
        2 * linear * tokens
    )
    half = MethodCost(10**7, True, weight_gradients=0.5, depth=0.5)
    assert trained(FULL, half).flops == pytest.approx(2 * linear * tokens * 2 + 4 * head * heads)
    assert forward_phase("f", SHAPE, MACHINE, WORK).flops == pytest.approx(2 * linear * tokens + 2 * head * heads)
    seen = replace(WORK, pairs=1e6)
    assert forward_phase("f", SHAPE, MACHINE, seen).flops - forward_phase("f", SHAPE, MACHINE, WORK).flops == 4 * 576 * 30 * 1e6


def test_time_grows_with_tokens_heads_and_steps_and_shrinks_on_a_faster_machine():
    twice = {name: 2 * value for name, value in asdict(MACHINE).items()} | {"call_seconds": MACHINE.call_seconds / 2}
    assert trained().seconds < trained(work=replace(WORK, computed=2e5)).seconds < 2 * trained().seconds
    assert trained().seconds < trained(work=replace(WORK, supervised=2e4)).seconds
    assert trained().seconds < trained(work=replace(WORK, batches=100)).seconds
    assert trained().seconds < trained(FULL).seconds
    assert trained(machine=Machine(**twice)).seconds == pytest.approx(trained().seconds / 2)
    assert trained(work=WORK.times(2)).seconds == pytest.approx(2 * trained().seconds, rel=1e-3)
    answers = [said(items=items).seconds for items in (50, 100, 150)]
    assert answers == sorted(answers)
    assert answers[-1] < said(items=150, batch=1).seconds
    assert said(items=50).seconds < said(items=50, context=1000.0).seconds
    assert said(items=50).seconds < said(items=50, longest=60.0).seconds
    assert forward_phase("f", SHAPE, MACHINE, WORK).seconds < trained().seconds


def test_what_binds_a_phase_is_the_longest_of_its_times():
    assert trained(machine=replace(MACHINE, flops_per_second=1e10)).bound_by == "compute"
    assert trained(machine=replace(MACHINE, cached_bytes_per_second=1e8)).bound_by == "memory bandwidth"
    assert trained(machine=replace(MACHINE, call_seconds=1.0)).bound_by == "calls"
    saved = storage_phase("save", MACHINE, 2e9)
    assert (saved.seconds, saved.bound_by) == (2.0, "storage")
    assert together("all", [trained(), saved]).seconds == trained().seconds + 2.0


@pytest.mark.parametrize(
    "loops, dtype, in_training",
    [(True, torch.bfloat16, TRAIN_BY_LOOPS), (False, torch.bfloat16, TRAIN_IN_16_BITS), (True, torch.float16, TRAIN_IN_16_BITS)],
)
def test_a_cpu_takes_longer_in_16_bits_than_its_speeds_say_and_a_gpu_does_not(loops, dtype, in_training, monkeypatch):
    monkeypatch.setattr(kernels, "unavailable", lambda: None if loops else "there are none")
    shape, by_loops = replace(SHAPE, dtype=dtype), loops and dtype == torch.bfloat16
    passing = FORWARD_BY_LOOPS if by_loops else FORWARD_IN_16_BITS
    reading = passing * (1.0 if by_loops else READING_IN_16_BITS)
    still = replace(MACHINE, call_seconds=0.0)  # calls are more in 16 bits, and come last

    def seconds(make, cuda: bool) -> float:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        return make().seconds

    for make, factor in (
        (lambda: train_phase(shape, still, LORA, RANK_16, WORK), in_training),
        (lambda: forward_phase("validate", shape, still, WORK), passing),
        (lambda: reading_phase("score", shape, still, WORK), reading),
    ):
        assert seconds(make, cuda=False) == pytest.approx(factor * seconds(make, cuda=True))
    attending = [
        seconds(lambda: train_phase(shape, still, LORA, RANK_16, replace(WORK, pairs=1e7)), cuda)
        - seconds(lambda: train_phase(shape, still, LORA, RANK_16, WORK), cuda)
        for cuda in (False, True)
    ]
    assert attending[0] == pytest.approx(ATTENTION_IN_16_BITS * in_training * attending[1])
    seeing = [
        seconds(lambda: forward_phase("validate", shape, still, replace(WORK, pairs=1e7)), cuda)
        - seconds(lambda: forward_phase("validate", shape, still, WORK), cuda)
        for cuda in (False, True)
    ]
    assert seeing[0] == pytest.approx(ATTENTION_IN_16_BITS * passing * seeing[1])
    answering = [seconds(lambda: reading_phase("score", shape, still, replace(WORK, pairs=1e7)), cuda) for cuda in (False, True)]
    if by_loops:
        assert answering[0] == seconds(lambda: forward_phase("", shape, still, replace(WORK, pairs=1e7)), cuda=False)
    else:
        assert answering[0] == pytest.approx(reading * answering[1]), "its attention is another"
    starting = [seconds(lambda: start_phase("start", shape, still, WORK), cuda) for cuda in (False, True)]
    assert starting[0] == pytest.approx(START_IN_16_BITS + passing * starting[1])
    for make, more, factors in (
        (lambda of: train_phase(shape, of, LORA, RANK_16, WORK), TRAIN_CALLS_IN_16_BITS - TRAIN_CALLS, (BESIDE * in_training, BESIDE)),
        (lambda of: forward_phase("validate", shape, of, WORK), FORWARD_CALLS_IN_16_BITS - FORWARD_CALLS, (passing, 1.0)),
    ):
        calls = [
            (seconds(lambda make=make: make(MACHINE), cuda) - seconds(lambda make=make: make(still), cuda)) / factor
            for cuda, factor in zip((False, True), factors, strict=True)
        ]
        assert calls[0] - calls[1] == pytest.approx(WORK.batches * shape.layers * more * MACHINE.call_seconds)
    decoding = [seconds(lambda: said(shape=shape, items=1), cuda) for cuda in (False, True)]
    more_calls = 40 * shape.layers * ((DECODE_CALLS_BY_LOOPS if by_loops else DECODE_CALLS_IN_16_BITS) - DECODE_CALLS)
    assert decoding[0] - decoding[1] == pytest.approx(more_calls * MACHINE.call_seconds)
    in_fp32 = replace(shape, dtype=torch.float32)
    for cuda in (False, True):
        assert seconds(lambda: forward_phase("validate", in_fp32, MACHINE, WORK), cuda) == forward_phase("", in_fp32, MACHINE, WORK).seconds


def test_a_loop_moves_16_bit_weights_in_fewer_passes_over_memory_and_fp32_ones_and_other_rules_as_before(monkeypatch):
    def moved(shape: Shape, loops: bool, **settings) -> float:
        monkeypatch.setattr(kernels, "unavailable", lambda: None if loops else "there are none")
        stage = make_stage(method="full", max_steps=7, **settings)
        return train_phase(shape, MACHINE, stage, WHOLE_MODEL, WORK).bytes

    spared = 7 * WHOLE_MODEL.trainable * 4 * (OPTIMISER_PASSES["adamw_torch_fused"] - OPTIMISER_PASSES_BY_LOOPS)
    assert moved(SHAPE, False) - moved(SHAPE, True) == pytest.approx(spared)
    assert moved(SHAPE, False, optim="adafactor") == moved(SHAPE, True, optim="adafactor")
    in_fp32 = replace(SHAPE, dtype=torch.float32)
    assert moved(in_fp32, False) == moved(in_fp32, True)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_layers_that_compute_in_fp32_keep_more_numbers_beside_a_16_bit_model(settings):
    costs = [method_cost(tiny_model("llama", dtype=dtype), LoraMethod(r=4, target_modules=["q_proj"], **settings)) for dtype in DTYPES]
    assert costs[1].saved_inputs > 1.5 * costs[0].saved_inputs
    assert costs[1].weight_passes == 2 * costs[0].weight_passes
    plain = [method_cost(tiny_model("llama", dtype=dtype), LoraMethod(r=4, target_modules=["q_proj"])) for dtype in DTYPES]
    assert plain[0] == plain[1]


def test_answering_one_at_a_time_is_bound_by_memory_bandwidth_for_all_weights_are_read_each_step():
    assert said(machine=replace(MACHINE, call_seconds=0.0), items=1, batch=1).bound_by == "memory bandwidth"
    assert said(items=2, batch=1).bytes - said(items=2, batch=2).bytes == pytest.approx(40 * SHAPE.weights)
    slower = replace(MACHINE, weight_bytes_per_second=MACHINE.weight_bytes_per_second / 2)
    assert said(machine=slower, items=1).seconds - said(items=1).seconds == pytest.approx(40 * SHAPE.weights / 1e10)


def test_answering_is_two_flops_a_weight_and_token_the_heads_too_and_attention_to_all_before_it():
    weights = SHAPE.linear + SHAPE.vocabulary * SHAPE.hidden
    assert said(items=3).flops == pytest.approx(3 * 40 * (2 * weights + 4 * 576 * 30 * 20))
    assert said(items=3, context=100.0).flops - said(items=3).flops == pytest.approx(3 * 40 * 4 * 576 * 30 * 100)
    assert said(items=3, longest=60.0).flops == said(items=3).flops


def said(*, shape: Shape = SHAPE, machine: Machine = MACHINE, items: int, batch=50, context: float = 0.0, longest: float | None = None):
    return decode_phase("a", shape, machine, items=items, new_tokens=40, batch=batch, context=context, longest=longest)


def test_the_parts_of_memory_are_weights_gradients_optimiser_activations_logits_rollouts_and_libraries():
    parts = train_footprint(SHAPE, FULL, WHOLE_MODEL, bare=GIB, batch_tokens=1000)
    assert list(parts) == ["weights", "gradients", "optimiser", "activations", "logits", "rollouts", "libraries"]
    assert parts["weights"] == 2 * SHAPE.parameters
    assert (parts["gradients"], parts["optimiser"]) == (2 * SHAPE.parameters, 10 * SHAPE.parameters)


def test_a_lora_product_reads_its_inputs_beside_it_a_dora_layer_more_and_a_plain_layer_nothing():
    model = tiny_model("llama")
    methods = [LoraMethod(r=4, target_modules=["q_proj"]), LoraMethod(r=4), LoraMethod(r=4, use_dora=True)]
    one, all_layers, dora = (method_cost(model, resolve(model, method)).passed_in_16_bits for method in methods)
    assert 0 < one < all_layers < dora
    assert method_cost(model, FullMethod()).passed_in_16_bits == 0
    more = replace(RANK_16, passed_in_16_bits=1000)
    for shape, bytes_more in ((SHAPE, 1000 * WORK.computed * SHAPE.itemsize), (replace(SHAPE, dtype=torch.float32), 0)):
        with_it, without = (train_phase(shape, MACHINE, LORA, cost, WORK).bytes for cost in (more, RANK_16))
        assert with_it - without == pytest.approx(bytes_more)


def test_what_a_method_costs_is_told_from_its_settings_and_the_model():
    model = tiny_model("llama")

    def cost(**settings):
        return method_cost(model, resolve(model, LoraMethod(r=4, **settings)))

    plain = cost(target_modules=["q_proj"])
    assert (plain.trainable, plain.per_token, plain.saved_inputs) == (2 * 4 * 64, 2 * 4 * 64, 2 * 4)
    assert cost(target_modules=["q_proj"], lora_dropout=0.1).saved_inputs == 2 * 4 + int(3.3 * 2 * 32)
    whole = method_cost(model, FULL.method)
    assert (whole.trainable, whole.whole, whole.weight_gradients, whole.depth) == (
        sum(p.numel() for p in model.parameters()),
        True,
        1.0,
        1.0,
    )


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
