"""Several adapters on one base: which is active when, that a reference stays what it was, and that it is what DPO starts from."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.toys import batch_of, loaded, make_items, make_job, make_rows, make_stage, stage_inputs, tiny_model, train_stage

from tunesmith.errors import InvariantViolated
from tunesmith.models.adapters import REFERENCE, active_adapter, adapter_parameters, copy_policy
from tunesmith.models.methods import add_adapter, attach, load_adapter, save_result
from tunesmith.models.policy import Policy
from tunesmith.recipe import FullMethod, LoraMethod
from tunesmith.rundir import RunDirectory, atomic_folder, read_events
from tunesmith.train import offline, work
from tunesmith.train.invariants import starts_where_it_compares
from tunesmith.train.loop import train
from tunesmith.train.work import WorkInputs, stage_work

ROWS, PAIRS = make_rows(6), make_items(7)
COMPARING = ["dpo", "simpo", "orpo", "cpo"]
STARTS = ["fresh adapter", "trained adapter", "full"]


def adapted(*, r: int = 4, seed: int = 0, **settings) -> torch.nn.Module:
    """A tiny Llama with an adapter that is no longer fresh."""
    model = attach(loaded(tiny_model("llama")), LoraMethod(r=r, **settings), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def saved_adapter(folder: Path, **settings) -> Path:
    with atomic_folder(folder) as temporary:
        save_result(adapted(**settings), loaded(tiny_model("llama")), temporary, {})
    return folder


def logprobs(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy(batch_of(ROWS).forest).logprobs


def under(policy: Policy, adapter: str | None) -> torch.Tensor:
    with policy.using(adapter):
        return policy(batch_of(ROWS).forest).logprobs


def what_trains(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_reference_is_the_start_exactly_and_stays_so_while_the_policy_trains(tmp_path):
    model = adapted()
    copy_policy(model)
    policy = Policy(model)
    start = logprobs(policy)
    assert torch.equal(under(policy, REFERENCE), start)
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model, REFERENCE).values())
    held = {name: parameter.clone() for name, parameter in adapter_parameters(model, REFERENCE).items()}
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        job = make_job(policy, make_stage(max_steps=4, learning_rate=5e-2), run, ROWS)
        assert not any(REFERENCE in name for name in job.optimiser.names)
        train(job)
    assert (logprobs(policy) - start).abs().max() > 0.1
    assert torch.equal(under(policy, REFERENCE), start)
    assert all(torch.equal(parameter, held[name]) for name, parameter in adapter_parameters(model, REFERENCE).items())


def test_after_another_adapter_was_active_the_policy_is_and_what_trained_trains():
    model = adapted()
    trained = what_trains(model)
    copy_policy(model)
    policy = Policy(model)
    before = logprobs(policy)
    for adapter in (REFERENCE, None):
        assert not under(policy, adapter).requires_grad
        assert what_trains(model) == trained
        assert torch.equal(logprobs(policy), before)
        with pytest.raises(ZeroDivisionError), policy.using(adapter):
            raise ZeroDivisionError
        assert what_trains(model) == trained
        assert torch.equal(logprobs(policy), before)
    assert policy(batch_of(ROWS).forest).logprobs.requires_grad


def test_a_parameter_frozen_by_hand_is_not_thawed_by_making_adapters_active():
    model = adapted()
    frozen = next(iter(adapter_parameters(model, "default").values())).requires_grad_(False)
    copy_policy(model)
    with active_adapter(model, REFERENCE):
        pass
    assert not frozen.requires_grad


def test_without_an_adapter_the_base_computes_and_a_name_that_is_not_there_is_an_error():
    policy, base = Policy(adapted()), Policy(tiny_model("llama"))
    assert (logprobs(policy) - logprobs(base)).abs().max() > 0.1
    torch.testing.assert_close(under(policy, None), logprobs(base), rtol=1e-5, atol=1e-5)
    assert torch.equal(under(base, None), logprobs(base))
    for named in (policy, base):
        with pytest.raises(KeyError), named.using("absent"):
            pass


@pytest.mark.parametrize("ranks", [(2, 5), (5, 2)])
def test_fused_layers_compute_each_of_several_adapters_of_other_ranks_as_peft_does(tmp_path, ranks):
    policies = []
    folder = saved_adapter(tmp_path / "other", r=ranks[1], seed=1, lora_alpha=3.0)
    for fast in (True, False):
        model = adapted(r=ranks[0])
        add_adapter(model, loaded(tiny_model("llama")), folder, "other")
        copy_policy(model)
        policies.append(Policy(model, fast=fast))
    fused, plain = policies
    assert fused.fast_paths.used["lora"]
    assert not plain.fast_paths.used
    alone = Policy(load_adapter(loaded(tiny_model("llama")), folder), fast=False)
    for adapter in ("other", "default", REFERENCE, None, "other"):
        torch.testing.assert_close(under(fused, adapter), under(plain, adapter), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(under(fused, "other"), logprobs(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logprobs(fused), logprobs(plain), rtol=1e-5, atol=1e-5)
    assert (under(fused, "other") - logprobs(fused)).abs().max() > 0.1


def compared(tmp_path: Path, start: str, *, lora_dropout: float = 0.0, **changed) -> list[dict]:
    """A stage of three updates of DPO from a start; its logged updates."""
    folder = saved_adapter(tmp_path / "start", lora_dropout=lora_dropout) if start == "trained adapter" else None
    method = FullMethod() if start == "full" else LoraMethod(r=4, lora_dropout=lora_dropout)
    stage = make_stage(objective="dpo", method=method, max_steps=3, rows=len(PAIRS), start_from=folder and str(folder), **changed)
    train_stage(loaded(tiny_model("llama")), stage, tmp_path / "run", PAIRS, start=folder)
    notes = [event["note"] for event in read_events(tmp_path / "run") if event.get("event") == "note"]
    assert any(f"lora_dropout of {lora_dropout} is off" in note for note in notes) == (lora_dropout > 0)
    return [event for event in read_events(tmp_path / "run") if "loss" in event]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_dpo_starts_at_ln_2_whatever_it_starts_from(tmp_path, start, checkpointing):
    lines = compared(tmp_path, start, gradient_checkpointing=checkpointing, warmup_steps=0)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert abs(lines[-1]["loss"] - math.log(2)) > 1e-3


@pytest.mark.parametrize("what", ["base instead of the trained start", "sums of another row", "sums of another model"])
def test_a_reference_that_is_not_the_start_ends_the_stage_before_its_first_update(tmp_path, monkeypatch, what):
    plain = offline.row_sums

    def wrong(policy, batches):
        if what == "base instead of the trained start":
            with policy.using(None):
                return plain(policy, batches)
        sums = plain(policy, batches)
        return np.roll(sums, 1) if what == "sums of another row" else sums * 1.01

    monkeypatch.setattr(offline, "row_sums", wrong)
    with pytest.raises(InvariantViolated, match="nats a token away from the reference"):
        compared(tmp_path, "trained adapter")
    assert not [event for event in read_events(tmp_path / "run") if "loss" in event]


def test_a_policy_that_is_not_the_one_that_sampled_is_named():
    policy = Policy(adapted())
    batch = batch_of(ROWS)
    batch.columns["old_S"] = logprobs(policy).numpy()
    starts_where_it_compares(policy, [batch])
    batch.columns["old_S"] = batch.columns["old_S"] / 0.7  # the temperature forgotten in one of the two
    with pytest.raises(InvariantViolated, match="away from the policy that sampled"):
        starts_where_it_compares(policy, [batch])


@pytest.mark.parametrize("objective", COMPARING)
def test_two_forwards_of_an_objective_that_compares_are_identical_though_the_adapter_has_dropout(tmp_path, objective):
    base = loaded(tiny_model("llama"))
    method = LoraMethod(r=4, lora_dropout=0.5)
    stage = make_stage(objective={"type": objective}, method=method, start_from="an adapter", rows=len(PAIRS))
    inputs = stage_inputs(base, PAIRS, tmp_path / "stores")
    model = adapted(lora_dropout=0.5)
    given = WorkInputs(base, model, inputs.data, None, [], None, "key", 0, lambda policy: None, lambda note: None)
    with RunDirectory.open(tmp_path / "run", resume=False) as run, stage_work(stage, given, run) as made:
        assert torch.equal(logprobs(made.policy), logprobs(made.policy))
    with RunDirectory.open(tmp_path / "sft", resume=False) as run, stage_work(make_stage(), given, run) as made:
        assert not torch.equal(logprobs(made.policy), logprobs(made.policy))  # where nothing is compared, dropout is the recipe's


def test_dpo_with_dropout_in_its_adapter_starts_at_ln_2(tmp_path):
    lines = compared(tmp_path, "trained adapter", lora_dropout=0.5)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("start", STARTS)
def test_while_answers_are_sampled_the_reference_is_the_start_too(tmp_path, start):
    folder = saved_adapter(tmp_path / "start")
    base = loaded(tiny_model("llama"))
    if start == "trained adapter":
        model = load_adapter(base, folder, trainable=True)
    else:
        model = attach(base, FullMethod() if start == "full" else LoraMethod(r=4), seed=0)
    inputs = SimpleNamespace(model=model, start=folder if start == "trained adapter" else None)
    stage = SimpleNamespace(rollout=SimpleNamespace(temperature=0.7))
    reference = work._reference(stage, inputs)
    policy = Policy(model, temperature=0.7)
    begin = logprobs(policy)
    torch.testing.assert_close(reference(policy, batch_of(ROWS).forest), begin, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    assert (logprobs(policy) - begin).abs().max() > 0.1
    torch.testing.assert_close(reference(policy, batch_of(ROWS).forest), begin, rtol=1e-5, atol=1e-5)
