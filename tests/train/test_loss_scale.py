"""fp16 with loss scaling: the losses are fp32's, an overflow costs no row, the scale resumes, and what is really wrong ends the run."""

from __future__ import annotations

import pytest
import torch
from tests.toys import batch_of, loaded, make_job, make_rows, make_stage, tiny_model, train_stage

from tunesmith.errors import NonFinite
from tunesmith.models.policy import Policy
from tunesmith.objectives import SFT
from tunesmith.rundir import RunDirectory, read_events
from tunesmith.train import loss_scale
from tunesmith.train.loop import train
from tunesmith.train.loss_scale import LossScale
from tunesmith.train.optimiser import Optimiser

ROWS = make_rows(12)


def job_of(run, *, report=lambda event: None, optim="adamw_torch_fused", **changed):
    policy = Policy(tiny_model("llama", dtype=torch.float16))
    stage = make_stage(max_steps=6, save_steps=2, learning_rate=3e-3, optim=optim, per_device_train_batch_size=4)
    optimiser = Optimiser(policy.named_parameters(), stage, loss_scale=LossScale())
    return make_job(policy, stage, run, ROWS, optimiser=optimiser, report=report, **changed)


def trained(path, **changed) -> Optimiser:
    with RunDirectory.open(path, resume=path.exists()) as run:
        job = job_of(run, **changed)
        train(job)
    return job.optimiser


def events_of(path, kind: str) -> list:
    return [event for event in read_events(path) if event.get("event") == kind]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_losses_are_within_half_a_percent_of_those_of_fp32(tmp_path, method):
    losses = {}
    for dtype in (torch.float32, torch.float16):
        stage = make_stage(method=method, max_steps=12, learning_rate=3e-3, per_device_train_batch_size=4)
        train_stage(loaded(tiny_model("llama", dtype=dtype)), stage, tmp_path / str(dtype), ROWS)
        events = [event for event in read_events(tmp_path / str(dtype)) if "loss" in event]
        losses[dtype] = [event["loss"] for event in events]
    assert all(event["loss_scale"] >= 2.0**12 for event in events)
    assert losses[torch.float16] == pytest.approx(losses[torch.float32], rel=5e-3)
    assert losses[torch.float32][-1] < 0.8 * losses[torch.float32][0]


def test_an_overflow_makes_no_update_halves_the_scale_is_logged_and_passes_over_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "START", 2.0**24)
    high = trained(tmp_path / "high")
    overflows = events_of(tmp_path / "high", "overflowed")
    assert [event["loss_scale"] for event in overflows] == [2.0**23 / 2**i for i in range(len(overflows))]
    assert overflows
    monkeypatch.setattr(loss_scale, "START", high.scale)
    fitting = trained(tmp_path / "fitting")
    assert not events_of(tmp_path / "fitting", "overflowed")
    assert all(torch.equal(tensor, fitting.state()[name]) for name, tensor in high.state().items() if "loss_scale" not in name)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_a_resumed_run_ends_bit_for_bit_as_the_unbroken_one_scale_included(tmp_path, monkeypatch, optim):
    monkeypatch.setattr(loss_scale, "GROWTH", 3)
    monkeypatch.setattr(loss_scale, "START", 2.0**12)
    whole = trained(tmp_path / "whole", optim=optim)

    def stop(event) -> None:
        if event.get("step") == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", report=stop, optim=optim)
    again = trained(tmp_path / "broken", optim=optim)
    assert whole.scale == again.scale == 2.0**14
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in whole.state().items())


def test_an_overflow_right_after_a_checkpoint_is_logged_once_where_the_run_is_broken_off(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "START", 2.0**24)
    fitting = trained(tmp_path / "fitting").scale
    monkeypatch.setattr(loss_scale, "START", fitting)
    monkeypatch.setattr(loss_scale, "GROWTH", 1)  # so that it is soon too large, at nearly every update

    def stop(event) -> None:
        if event.get("step") == 5 and "loss" in event:  # the fourth update left a checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", report=stop)
    trained(tmp_path / "run")
    logged = [(event["step"], event["loss_scale"]) for event in events_of(tmp_path / "run", "overflowed")]
    assert 5 in {step for step, _ in logged}
    assert len(logged) == len(set(logged))


class NoNumber(SFT):
    """Its loss is not a number."""

    def terms(self, outputs, batch):
        return {name: term._replace(sum=term.sum * float("nan")) for name, term in super().terms(outputs, batch).items()}


def test_a_loss_that_is_no_number_is_no_overflow_and_ends_the_run(tmp_path):
    with pytest.raises(NonFinite, match="the loss is nan"):
        trained(tmp_path / "run", objective=NoNumber())
    assert not events_of(tmp_path / "run", "overflowed")


def test_gradients_that_overflow_at_any_scale_end_the_run_with_nothing_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(Optimiser, "grad_norm", lambda self, reduce: float("inf"))
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        job = job_of(run)
        with pytest.raises(NonFinite, match="overflow in fp16 at the smallest loss scale"):
            train(job)
    assert len(events_of(tmp_path / "run", "overflowed")) == 16
    assert job.optimiser.fraction_changed() == 0


def test_without_the_scale_gradients_of_a_small_loss_would_be_rounded_to_0():
    def lost(scale: float) -> float:
        policy = Policy(tiny_model("llama", dtype=torch.float16))
        (policy(batch_of(ROWS).forest).logprobs.mean() * 1e-6 * scale).backward()
        return float(torch.cat([p.grad.flatten() == 0 for p in policy.parameters()]).float().mean())

    assert lost(1.0) > 2 * lost(2.0**16)


def test_weights_that_overflow_fp16_are_never_written_though_their_masters_are_finite(tmp_path):
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        job = job_of(run)
        job.optimiser.masters[0].flatten()[0] = 1e5
        with pytest.raises(NonFinite):
            train(job)
        assert run.checkpoints("sft") == []


def test_the_scale_grows_after_many_updates_without_an_overflow_and_only_then(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH", 3)
    scale, seen = LossScale(), []
    for overflow in (False, False, True, False, False, False, False):
        scale.overflowed("here") if overflow else scale.held()
        seen.append(scale.value / 2**16)
    assert seen == [1, 1, 0.5, 0.5, 0.5, 1, 1]
