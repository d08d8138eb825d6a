"""AdamW over one buffer against torch's own, the schedule against transformers', and fp32 masters."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from tests.toys import batch_of, is_a_neighbour, loaded, make_rows, make_stage, tiny_model
from transformers import get_scheduler

from tunesmith.errors import CheckpointError
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.objectives import SFT
from tunesmith.recipe import Ia3Method
from tunesmith.train import masters
from tunesmith.train.masters import Apart
from tunesmith.train.optimiser import Optimiser
from tunesmith.train.schedule import learning_rate
from tunesmith.train.updates import Moment
from tunesmith.train.updates.adamw import AdamW
from tunesmith.train.window import run_window

HF_NAMES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("kind", HF_NAMES)
@pytest.mark.parametrize("total, warmup", [(20, 0), (20, 3), (7, 7), (5, 9), (1, 0)])
def test_the_rate_of_each_step_is_that_of_transformers(kind, total, warmup):
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(HF_NAMES[kind], optimiser, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        ours = learning_rate(step, total=total, warmup=warmup, peak=3e-4, kind=kind)
        assert ours == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12, abs=1e-18)
        optimiser.step()
        scheduler.step()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_logged_rate_is_the_closed_form_whatever_the_accumulation(accumulation, tmp_path):
    from tests.toys import make_job

    from tunesmith.rundir import RunDirectory
    from tunesmith.train.loop import train

    rows = make_rows(16)
    stage = make_stage(max_steps=6, warmup_steps=2, gradient_accumulation_steps=accumulation, rows=16)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        train(make_job(Policy(tiny_model("llama")), stage, run, rows))
        rates = [event["learning_rate"] for event in run.events() if "loss" in event]
    assert rates == [learning_rate(step, total=6, warmup=2, peak=stage.learning_rate, kind="cosine") for step in range(6)]


@pytest.mark.parametrize("clip", [None, 0.05])
def test_updates_equal_those_of_torchs_adamw_with_clipping_and_decay_of_matrices_only(clip):
    rows = make_rows(12)
    plain, model = tiny_model("llama"), tiny_model("llama")
    stage = make_stage(weight_decay=0.1, max_grad_norm=clip, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    policy, reference = Policy(model), Policy(plain)
    ours = Optimiser(policy.named_parameters(), stage)
    groups = [
        {"params": [p for p in reference.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in reference.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), eps=1e-6)
    for step in range(5):
        batch = [batch_of(rows[2 * step : 2 * step + 4])]
        ours.zero_grad()
        theirs.zero_grad()
        run_window(policy, SFT(), batch)
        run_window(reference, SFT(), batch)
        norm = ours.grad_norm()
        their_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip or 1e9)
        assert norm == pytest.approx(float(their_norm), rel=1e-5)
        rate = learning_rate(step, total=5, warmup=1, peak=1e-2, kind="linear")
        for group in theirs.param_groups:
            group["lr"] = rate
        ours.step(rate, norm)
        theirs.step()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6, msg=name)


def train_bf16(steps: int) -> Optimiser:
    rows = make_rows(8)
    policy = Policy(tiny_model("llama", dtype=torch.bfloat16))
    optimiser = Optimiser(policy.named_parameters(), make_stage())
    for _ in range(steps):
        optimiser.zero_grad()
        run_window(policy, SFT(), [batch_of(rows)])
        optimiser.step(1e-5, optimiser.grad_norm())
    return optimiser


def test_trained_weights_are_fp32_and_more_than_nine_tenths_move_in_a_hundred_bf16_steps():
    optimiser = train_bf16(100)
    assert optimiser.flat.dtype == torch.float32
    assert optimiser.fraction_changed() > 0.9
    for parameter, master in zip(optimiser.parameters, optimiser.masters, strict=True):
        assert parameter.dtype == torch.bfloat16
        assert is_a_neighbour(parameter.data, master)


def moved_by(steps: float, weights: torch.nn.Parameter, unit: Apart) -> None:
    """Masters of weights from 1 to 2 go on by so many steps of bf16, away from 0 or toward it."""
    for master, _, _ in unit.pieces(1.0):
        master.add_(steps * 2**-7)


@pytest.mark.parametrize("toward", [1, -1])
def test_as_many_bf16_weights_move_by_a_step_as_an_update_is_of_one(toward):
    """Rounded to the nearest, none would move before half a step, and then all at once. Of any thousand in a row it holds too."""
    weights = torch.nn.Parameter(torch.full((100_000,), 1.5, dtype=torch.bfloat16))
    unit = Apart("weight", weights, AdamW(make_stage()))
    assert torch.equal(unit.masters[0], weights.float()), "it begins where the model is"
    for update in range(1, 16):
        moved_by(toward * 0.13, weights, unit)
        gone = 0.13 * update
        torch.testing.assert_close(unit.masters[0], torch.full_like(unit.masters[0], 1.5 + toward * gone * 2**-7))
        steps = (weights.float() - 1.5) * toward * 2**7
        assert set(steps.tolist()) == {math.floor(gone), math.ceil(gone)}
        assert torch.allclose(steps.view(100, 1000).mean(1), torch.tensor(gone), atol=0.01)


def test_weights_of_either_sign_are_rounded_as_often_up_as_their_masters_are_above():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(400, 500, generator=draw)
    weights = torch.nn.Parameter(torch.zeros(400, 500, dtype=torch.bfloat16))
    unit = Apart("weight", weights, AdamW(make_stage()))
    for master, _, _ in unit.pieces(1.0):
        master.copy_(values.view(master.shape))
    off = (weights.float() - values) / (2.0 ** (values.abs().log2().floor() - 7))
    assert off.abs().max() <= 1
    assert off.mean().abs() < 0.005
    assert off.mean(0).abs().max() < 0.1, "of a column"
    assert off.mean(1).abs().max() < 0.1, "of a row"


def test_a_part_of_a_tensor_is_rounded_as_it_is_in_the_whole(monkeypatch):
    values = torch.randn(30, 11, generator=torch.Generator().manual_seed(0))

    def rounded(values: torch.Tensor, place: int) -> torch.Tensor:
        monkeypatch.setattr(masters, "_place", lambda parameter: place)
        weights = torch.nn.Parameter(torch.zeros(values.shape, dtype=torch.bfloat16))
        for master, _, _ in Apart("weight", weights, AdamW(make_stage())).pieces(1.0):
            master.copy_(values.reshape(master.shape))
        return weights.data

    assert torch.equal(rounded(values, 0)[13:], rounded(values[13:], 13 * 11))
    assert not torch.equal(rounded(values, 0)[13:], rounded(values[13:], 0))


@pytest.mark.parametrize("place", [0, 5, 2**31 - 3, 2**32 - 3, 3 * 10**10])
@pytest.mark.parametrize("stride", [1, 7])
def test_thresholds_are_multiples_of_the_golden_ratio_at_any_place(place, stride):
    exact = [(place + i) * 0x9E3779B1 % 2**32 >> 16 for i in range(0, 100, stride)]
    assert masters._thresholds(place, len(exact), torch.device("cpu"), stride).tolist() == exact


def test_weights_that_are_updated_in_blocks_move_as_all_at_once_do(monkeypatch):
    monkeypatch.setattr(masters.kernels, "unavailable", lambda: "torch's blocks are asked about")
    moved = {}
    for block in (100, 1 << 20):
        monkeypatch.setitem(masters.UPDATE_BLOCK, "cpu", block)
        weights = torch.nn.Parameter(torch.randn(30, 11, generator=torch.Generator().manual_seed(0)).bfloat16())
        optimiser = Optimiser([("weight", weights)], make_stage(optim="adamw_torch_fused"))
        for step in range(3):
            (weights.float() * torch.randn(30, 11, generator=torch.Generator().manual_seed(step))).sum().backward()
            optimiser.step(1e-2, torch.tensor(2.0))
            optimiser.zero_grad()
        moved[block] = (weights.data.clone(), optimiser.masters[0].clone())
    assert all(torch.equal(few, many) for few, many in zip(*moved.values(), strict=True))


@pytest.mark.parametrize("batches", [1, 2], ids=["bf16 gradients", "fp32 gradients"])
def test_one_pass_over_bf16_weights_moves_them_as_torchs_kernel_does_on_any_number_of_threads(batches, monkeypatch):
    moved, before = [], torch.get_num_threads()
    for loops, threads in ((False, 1), (True, 1), (True, 3)):
        monkeypatch.setattr(masters.kernels, "unavailable", lambda loops=loops: None if loops else "switched off")
        torch.set_num_threads(threads)
        draw = torch.Generator().manual_seed(0)
        weights = torch.nn.Parameter(torch.randn(300, 501, generator=draw).bfloat16())
        optimiser = Optimiser([("weight", weights)], make_stage(optim="adamw_torch_fused", weight_decay=0.1, max_grad_norm=1.0))
        norms = []
        for _ in range(4):
            for _ in range(batches):
                (weights.float() * torch.randn(300, 501, generator=draw)).sum().backward()
            norms.append(optimiser.grad_norm())
            optimiser.step(1e-2, norms[-1])
            optimiser.zero_grad()
        assert is_a_neighbour(weights.data, optimiser.masters[0])
        moved.append((optimiser.masters[0].clone(), torch.tensor(norms)))
    torch.set_num_threads(before)
    torchs, ours, threaded = moved
    assert all(torch.equal(a, b) for a, b in zip(ours, threaded, strict=True))
    assert not torch.equal(ours[0], torchs[0]), "one of them was not what it is called"
    torch.testing.assert_close(ours[0], torchs[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1], torchs[1], rtol=1e-5, atol=0)


def of_all_sizes(draw: torch.Generator) -> torch.Tensor:
    """Numbers of either sign, some halfway between two bf16 values."""
    bits = (torch.randn(10_000, generator=draw) * torch.logspace(-30, 30, 10_000)).view(torch.int32)
    bits[:1000] = (bits[:1000] & ~0xFFFF) | 0x8000
    return bits.view(torch.float32)


def test_one_pass_that_moves_nothing_leaves_every_bit_of_masters_and_weights():
    draw = torch.Generator().manual_seed(0)
    values, weights = of_all_sizes(draw), torch.nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16))
    unit = Apart("weight", weights, AdamW(make_stage()))
    for master, _, _ in unit.pieces(1.0):
        master.copy_(values)
    began = weights.data.clone()
    unit.gradient = torch.randn(10_000, generator=draw).bfloat16()
    unit.move(1.0, Moment(1, 0.0, 0.0))
    assert torch.equal(unit.masters[0].view(torch.int32), values.view(torch.int32))
    assert torch.equal(weights.data, began)
    assert unit.memory["second"].count_nonzero() == 10_000, "nothing was done"


def test_a_master_is_held_beside_its_bf16_weight_to_the_last_bit():
    values = of_all_sizes(torch.Generator().manual_seed(0))
    weights = torch.nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16))
    unit = Apart("weight", weights, AdamW(make_stage()))
    for master, _, _ in unit.pieces(1.0):
        master.copy_(values)
    assert torch.equal(unit.masters[0].view(torch.int32), values.view(torch.int32))
    assert torch.equal(unit.sample(7).view(torch.int32), values[::7].view(torch.int32))
    assert is_a_neighbour(weights.data, values)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -0x400000])  # CUDA's, and a processor's of either sign
def test_a_master_that_is_not_a_number_leaves_a_weight_that_is_none(bits):
    weights = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    for master, _, _ in Apart("weight", weights, AdamW(make_stage())).pieces(1.0):
        master.copy_(torch.full((4,), bits, dtype=torch.int32).view(torch.float32))
    assert weights.isnan().all()


def test_a_model_stored_in_bf16_learns_in_bf16_as_fast_as_in_fp32():
    """By updates of a hundredth to a tenth of a step; with weights rounded to the nearest the loss falls by a fifth as much."""
    rows, fallen = make_rows(8), {}
    for dtype in (torch.float32, torch.bfloat16):
        policy = Policy(tiny_model("llama", dtype=torch.bfloat16).to(dtype))
        optimiser, losses = Optimiser(policy.named_parameters(), make_stage()), []
        for _ in range(21):
            optimiser.zero_grad()
            losses.append(run_window(policy, SFT(), [batch_of(rows)]).loss)
            optimiser.step(1e-5, optimiser.grad_norm())
        fallen[dtype] = losses[0] - losses[-1]
    assert fallen[torch.float32] > 0.05
    assert fallen[torch.bfloat16] == pytest.approx(fallen[torch.float32], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_stage_that_has_ended_leaves_neither_weights_nor_masters_nor_moments(dtype):
    policy = Policy(tiny_model("llama", dtype=dtype))
    optimiser = Optimiser(policy.named_parameters(), make_stage())
    run_window(policy, SFT(), [batch_of(make_rows(4))])
    optimiser.step(1e-5, optimiser.grad_norm())
    held = [weakref.ref(thing) for thing in (*policy.parameters(), *optimiser.state().values(), *(unit for unit, *_ in optimiser._units))]
    del policy, optimiser
    gc.collect()
    assert [thing() for thing in held if thing() is not None] == []


def test_adamw_on_bf16_weights_would_round_most_updates_away():
    rows = make_rows(8)
    policy = Policy(tiny_model("llama", dtype=torch.bfloat16))
    began = copy.deepcopy([p.data for p in policy.parameters()])
    adamw = torch.optim.AdamW(policy.parameters(), lr=1e-5, weight_decay=0.0)
    for _ in range(100):
        adamw.zero_grad()
        run_window(policy, SFT(), [batch_of(rows)])
        adamw.step()
    moved = sum(int((p != q).sum()) for p, q in zip(policy.parameters(), began, strict=True))
    assert moved / sum(p.numel() for p in policy.parameters()) < 0.3


def test_gradients_of_bf16_weights_add_up_in_fp32_over_a_window():
    rows = make_rows(6)
    policy = Policy(tiny_model("llama", dtype=torch.bfloat16))
    optimiser = Optimiser(policy.named_parameters(), make_stage(gradient_accumulation_steps=1))
    batches = [batch_of(rows[:2]), batch_of(rows[2:4]), batch_of(rows[4:])]
    parts = []
    for batch in batches:
        optimiser.zero_grad()
        (-policy(batch.forest).logprobs.sum()).backward()
        parts.append([unit.gradient for unit in optimiser._apart])
    optimiser.zero_grad()
    for batch in batches:
        (-policy(batch.forest).logprobs.sum()).backward()
    for grads, got in zip(zip(*parts, strict=True), [unit.gradient for unit in optimiser._apart], strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, grads[0].float() + grads[1].float() + grads[2].float())
    optimiser.zero_grad()
    run_window(policy, SFT(), [batch_of(rows)])
    assert {unit.gradient.dtype for unit in optimiser._apart} == {torch.bfloat16}
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_weight_decay_leaves_ia3s_scales_at_1_and_muon_leaves_them_to_adamw(optim):
    policy = Policy(attach(loaded(tiny_model("llama")), Ia3Method(), seed=0))
    optimiser = Optimiser(policy.named_parameters(), make_stage(optim=optim, weight_decay=0.5))
    assert {type(unit.rule) for unit, *_ in optimiser._units} == {AdamW}
    for _ in range(3):
        optimiser.zero_grad()
        optimiser.step(0.1, 1.0)
    assert all(torch.equal(master, torch.ones_like(master)) for master in optimiser.masters)


def test_a_state_saved_and_loaded_makes_the_same_next_update_bit_for_bit():
    rows = make_rows(8)

    def step(policy: Policy, optimiser: Optimiser) -> None:
        optimiser.zero_grad()
        run_window(policy, SFT(), [batch_of(rows)])
        optimiser.step(1e-3, optimiser.grad_norm())

    first, second = Policy(tiny_model("llama")), Policy(tiny_model("llama"))
    one, two = Optimiser(first.named_parameters(), make_stage()), Optimiser(second.named_parameters(), make_stage())
    for _ in range(3):
        step(first, one)
    two.load({name: tensor.clone() for name, tensor in one.state().items()})
    step(first, one)
    step(second, two)
    assert torch.equal(one.flat, two.flat)
    assert one.fraction_changed() == two.fraction_changed()


def test_a_state_of_another_model_is_refused():
    one = Optimiser(Policy(tiny_model("llama")).named_parameters(), make_stage())
    other = Optimiser(Policy(tiny_model("gpt2")).named_parameters(), make_stage())
    with pytest.raises(CheckpointError, match="not this stage's"):
        one.load(other.state())
