"""Step-0 invariants: each holds on a sound model, and each names what is wrong on one where it was broken, before anything is trained."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tests.families import FAMILIES, VOCABULARY
from tests.toys import Rows, batch_of, loaded, make_rows, make_stage, tiny_model, train_stage
from tests.train.answers import make_policy, make_source, objective_of

from tunesmith.errors import InvariantViolated
from tunesmith.models import attention, fused, grouped
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.models.virtual import virtual_tokens
from tunesmith.objectives import SFT
from tunesmith.recipe import LoraMethod, PrefixMethod
from tunesmith.rundir import read_events
from tunesmith.train import invariants
from tunesmith.train.invariants import (
    every_answer_ends_with_a_stop,
    every_row_carries_loss,
    fast_paths_agree,
    fresh_adapter_changes_nothing,
    no_leak,
    one_start_of_text,
    something_trains,
    starts_where_it_compares,
)

ROWS = make_rows(6)
LORA = LoraMethod(r=4)


def lora_policy(family: str = "llama", *, dtype: torch.dtype = torch.float32, **settings) -> Policy:
    return Policy(attach(loaded(tiny_model(family, dtype=dtype)), LORA.model_copy(update=settings), seed=0))


def leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as if all packed rows were one text, which is what position ids alone give on most models."""
    from transformers import AttentionInterface

    from tunesmith.data.forest import Node

    for name, plain in ((attention.FOREST, attention.forest_attention), (grouped.GROUPED, grouped.grouped_forest_attention)):

        def leaking(module, query, key, *args, plain=plain, **kwargs):
            with attention.forest_layout(attention.Layout((Node(0, query.shape[2], ()),))):
                return plain(module, query, key, *args, **kwargs)

        monkeypatch.setitem(AttentionInterface._global_mapping, name, leaking)


def test_a_row_without_loss_is_named():
    silent = (ROWS[1][0], np.zeros_like(ROWS[1][1]))
    with pytest.raises(InvariantViolated, match="1 rows carry no loss: second"):
        every_row_carries_loss([ROWS[0], silent], ["first", "second"])
    every_row_carries_loss(ROWS, ROWS.row_ids)


def test_a_row_whose_end_of_turn_carries_no_loss_is_named():
    rows = [(np.array([5, 6, 9, 3]), np.array([0.0, 1, 1, 0])), (np.array([5, 6, 9]), np.array([0.0, 1, 0]))]
    every_answer_ends_with_a_stop(rows[:1], ["first"], [9])
    with pytest.raises(InvariantViolated, match="end of turn carries no loss in 1 rows: second"):
        every_answer_ends_with_a_stop(rows, ["first", "second"], [9])


def test_a_row_that_begins_with_two_starts_of_text_is_named():
    rows = [(np.array(ids), np.ones(len(ids))) for ids in ([1, 5, 1, 1], [1, 1, 5], [1])]
    with pytest.raises(InvariantViolated, match="1 rows begin with two BOS tokens: second"):
        one_start_of_text(rows, ["first", "second", "third"], 1)
    one_start_of_text(rows, ["first", "second", "third"], None)
    one_start_of_text(rows, ["first", "second", "third"], 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_leak_probe_passes_on_every_layout(family, dtype):
    policy = Policy(tiny_model(family, dtype=dtype))
    for vocabulary in (97, 50, 11):
        no_leak(policy, vocabulary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_leak_probe_fails_on_every_layout_when_attention_leaks(family, dtype, monkeypatch):
    leak(monkeypatch)
    policy = Policy(tiny_model(family, dtype=dtype))
    for vocabulary in range(90, 98):  # whichever row of the probe comes first
        with pytest.raises(InvariantViolated, match="see each other"):
            no_leak(policy, vocabulary)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing(family):
    fresh_adapter_changes_nothing(lora_policy(family), batch_of(ROWS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_starts_wrong_is_named(dtype):
    policy = lora_policy(dtype=dtype)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    with pytest.raises(InvariantViolated, match="a fresh adapter changes"):
        fresh_adapter_changes_nothing(policy, batch_of(ROWS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_that_makes_rounding_large_is_no_leak_in_16_bits_and_one_in_fp32(monkeypatch, dtype):
    policy = Policy(attach(loaded(tiny_model("llama", dtype=dtype)), PrefixMethod(num_virtual_tokens=4), seed=0))
    no_leak(policy, VOCABULARY)
    right = policy.hidden

    def apart_when_alone(embeddings, forest):
        states = right(embeddings, forest)
        prefixed = virtual_tokens(policy.model, dtype) is not None
        return states + 2 * states.std() if prefixed and len(forest.lengths_B) == 1 else states

    monkeypatch.setattr(policy, "hidden", apart_when_alone)
    with nullcontext() if dtype == torch.bfloat16 else pytest.raises(InvariantViolated, match="see each other"):
        no_leak(policy, VOCABULARY)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "orthogonal"}])
def test_where_rounding_adds_up_over_layers_each_layer_is_compared_with_its_base(monkeypatch, settings):
    policy = lora_policy(dtype=torch.bfloat16, **settings)
    monkeypatch.setitem(invariants.FRESH, torch.bfloat16, -1.0)
    fresh_adapter_changes_nothing(policy, batch_of(ROWS))
    assert not any(module._forward_hooks for module in policy.model.modules())
    with torch.no_grad():
        next(parameter for name, parameter in policy.named_parameters() if "lora_B" in name).normal_(0, 0.05)
    with pytest.raises(InvariantViolated, match="a fresh adapter changes"):
        fresh_adapter_changes_nothing(policy, batch_of(ROWS))


@pytest.mark.parametrize("fault", [0.004, float("nan")])
def test_layers_that_change_a_little_or_give_no_number_are_not_rounding(monkeypatch, fault):
    policy = lora_policy(dtype=torch.bfloat16)
    monkeypatch.setitem(invariants.FRESH, torch.bfloat16, -1.0)
    parameters = [p for name, p in policy.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for parameter in parameters if math.isfinite(fault) else parameters[-1:]:
            parameter.normal_().mul_(fault)
    with pytest.raises(InvariantViolated, match="a fresh adapter changes"):
        fresh_adapter_changes_nothing(policy, batch_of(ROWS))


def test_in_fp32_the_log_probabilities_alone_decide(monkeypatch):
    monkeypatch.setitem(invariants.FRESH, torch.float32, -1.0)
    with pytest.raises(InvariantViolated, match="a fresh adapter changes"):
        fresh_adapter_changes_nothing(lora_policy(), batch_of(ROWS))


def test_a_fast_layer_that_rounds_otherwise_than_the_base_is_not_a_wrong_start(monkeypatch):
    policy, right = lora_policy(dtype=torch.bfloat16), fused._LoraProduct.forward
    noise = torch.Generator().manual_seed(0)

    def rounded_otherwise(ctx, *given):
        y = right(ctx, *given)
        return y + y.abs().mean() * torch.randn(y.shape, generator=noise).to(y.dtype)

    monkeypatch.setattr(fused._LoraProduct, "forward", staticmethod(rounded_otherwise))
    forest = batch_of(ROWS).forest
    with torch.no_grad(), policy.using(None):
        base = policy(forest).logprobs
    with torch.no_grad():
        assert (policy(forest).logprobs - base).abs().mean() > invariants.FRESH[torch.bfloat16]
    fresh_adapter_changes_nothing(policy, batch_of(ROWS))


def test_a_model_in_which_nothing_trains_is_named():
    policy = Policy(tiny_model("llama"))
    something_trains(policy)
    policy.requires_grad_(False)
    with pytest.raises(InvariantViolated, match="no parameter trains"):
        something_trains(policy)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["grpo", "online_dpo", "best_of_n"])
def test_a_policy_that_starts_elsewhere_than_what_it_is_compared_with_is_named(kind, dropout):
    source = make_source(objective_of(kind), policy=make_policy(changed=0.0, lora_dropout=dropout))
    policy, batches = source.parts.policy, source.window(0).batches
    starts_where_it_compares(policy, batches)
    compared = "reference_B" if kind == "online_dpo" else "reference_S"
    for column, what in (("old_S", "the policy that sampled"), (compared, "the reference")):
        moved = [replace(batch, columns=batch.columns | {column: batch.columns[column] - 3.0}) for batch in batches]
        with pytest.raises(InvariantViolated, match=f"away from {what}, not at it"):
            starts_where_it_compares(policy, moved)


def test_dropout_does_not_make_a_start_look_like_another_place():
    source = make_source("best_of_n", policy=make_policy(changed=0.3, lora_dropout=0.5))
    batches = [
        replace(batch, columns={name: v for name, v in batch.columns.items() if name != "reference_S"})
        for batch in source.window(0).batches
    ]
    starts_where_it_compares(source.parts.policy, batches)
    assert any(module.training for module in source.parts.policy.modules()), "dropout is on again"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi"])
def test_fast_paths_that_agree_stay(family, dtype):
    policy = lora_policy(family, dtype=dtype)
    assert policy.fast_paths.used.get("lora") or family == "gpt2"
    used = dict(policy.fast_paths.used)
    assert fast_paths_agree(policy, SFT(), batch_of(ROWS)) == []
    assert policy.fast_paths.used == used


def wrong_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fused._SwiGLU.backward
    monkeypatch.setattr(fused._SwiGLU, "backward", staticmethod(lambda ctx, grad: (plain(ctx, grad)[0] * 0.5, plain(ctx, grad)[1])))


def wrong_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fused._SwiGLU.forward
    monkeypatch.setattr(fused._SwiGLU, "forward", staticmethod(lambda ctx, gate, up: plain(ctx, gate, up) * 1.3))


def wrong_lora(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient towards one of the adapter's matrices is halved; all others, the inputs' among them, are right."""
    plain = fused._LoraProduct.backward

    def backward(ctx, grad):
        gradients = list(plain(ctx, grad))
        gradients[position] = gradients[position] * 0.5
        return tuple(gradients)

    monkeypatch.setattr(fused._LoraProduct, "backward", staticmethod(backward))


def wrong_norm_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fused._RMSNorm.backward
    monkeypatch.setattr(fused._RMSNorm, "backward", staticmethod(lambda ctx, grad: (plain(ctx, grad)[0], -plain(ctx, grad)[1], None)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gradient_towards_a_weight_that_trains_is_found_in_full_tuning(dtype, monkeypatch):
    policy = Policy(tiny_model("llama", dtype=dtype))
    wrong_norm_weight(monkeypatch)
    loops = ["grouped_attention", "kernels"] if dtype == torch.bfloat16 else []
    assert fast_paths_agree(policy, SFT(), batch_of(ROWS)) == [*loops, "rms_norm", "swiglu"]


def test_the_comparison_leaves_the_adapter_as_it_was():
    policy = lora_policy()
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    assert fast_paths_agree(policy, SFT(), batch_of(ROWS)) == []
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize("break_it", [wrong_backward, wrong_forward, partial(wrong_lora, 3), partial(wrong_lora, 4)])
def test_a_fast_path_that_disagrees_is_taken_out_and_the_plain_layers_compute(break_it, monkeypatch):
    policy = lora_policy()
    break_it(monkeypatch)
    assert fast_paths_agree(policy, SFT(), batch_of(ROWS)) == ["lora", "rms_norm", "swiglu"]
    assert policy.fast_paths.used == {}
    assert set(policy.fast_paths.refused) == {"lora", "rms_norm", "swiglu"}
    plain = Policy(attach(loaded(tiny_model("llama")), LORA, seed=0), fast=False)
    torch.testing.assert_close(policy(batch_of(ROWS).forest).logprobs, plain(batch_of(ROWS).forest).logprobs, rtol=1e-5, atol=1e-5)


def test_the_loss_of_few_tokens_may_differ_by_more_since_rounding_cancels_less(monkeypatch):
    real, calls = invariants._loss_and_gradients, []

    def apart(*args):
        loss, gradients = real(*args)
        calls.append(loss)
        return loss * (1.0002 if len(calls) % 2 else 1.0), gradients

    monkeypatch.setattr(invariants, "_loss_and_gradients", apart)
    few, many = batch_of(make_rows(1)), batch_of(make_rows(30))
    assert len(few.forest.target_S) < 16 < 64 < len(many.forest.target_S)
    assert fast_paths_agree(lora_policy(), SFT(), few) == []
    assert fast_paths_agree(lora_policy(), SFT(), many) == ["lora", "rms_norm", "swiglu"]


def test_what_must_hold_at_step_0_is_tried_on_the_first_two_rows_of_training(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sys.modules["tunesmith.train.stage"],
        "fast_paths_agree",
        lambda policy, objective, batch: seen.append(len(batch.forest.lengths_B)) or [],
    )
    stage = make_stage(method="lora", max_steps=1, per_device_train_batch_size=4)
    train_stage(loaded(tiny_model("llama")), stage, tmp_path / "run", ROWS)
    assert seen == [2]


def test_dropout_in_the_adapter_does_not_make_fast_paths_disagree():
    policy = lora_policy(lora_dropout=0.5)
    with policy.deterministic():
        assert fast_paths_agree(policy, SFT(), batch_of(ROWS)) == []
        fresh_adapter_changes_nothing(policy, batch_of(ROWS))


def test_a_stage_that_drops_fast_paths_says_so_in_its_log(tmp_path, monkeypatch):
    wrong_backward(monkeypatch)
    monkeypatch.setattr(fused, "agrees_in_miniature", lambda *args, **kwargs: True)  # as if only the whole model showed it
    told = []
    train_stage(loaded(tiny_model("llama")), make_stage(method="lora", max_steps=2), tmp_path / "run", ROWS, report=told.append)
    events = [event for event in read_events(tmp_path / "run") if event.get("event") == "fast_paths_dropped"]
    assert [event["paths"] for event in events] == [["lora", "rms_norm", "swiglu"]]
    assert set(events[0]["reasons"].values()) == {"disagrees with the plain layers on the first batch"}
    assert any(event.get("event") == "fast_paths_dropped" for event in told)


def test_a_stage_says_in_its_log_which_layers_were_left_plain_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "_agrees", lambda module, forward, width: "RMSNorm" not in type(module).__name__)
    method = {"type": "lora", "r": 4, "use_dora": True}
    train_stage(loaded(tiny_model("llama")), make_stage(method=method, max_steps=1), tmp_path / "run", ROWS)
    (event,) = [event for event in read_events(tmp_path / "run") if event.get("event") == "fast_paths_dropped"]
    assert event["paths"] == ["lora", "rms_norm"]
    assert "is not a plain LoRA layer" in event["reasons"]["lora"]
    assert event["reasons"]["rms_norm"] == "LlamaRMSNorm computes something else"


@pytest.mark.parametrize("broken", ["leak", "silent row", "adapter"])
def test_a_stage_ends_before_its_first_update_when_an_invariant_does_not_hold(tmp_path, monkeypatch, broken):
    rows = ROWS
    if broken == "leak":
        leak(monkeypatch)
    elif broken == "silent row":
        rows = Rows([*ROWS, (ROWS[0][0] + 1, np.zeros_like(ROWS[0][1]))])
    else:
        monkeypatch.setattr("peft.tuners.lora.layer.nn.init.zeros_", lambda tensor: tensor.data.fill_(0.1))
    with pytest.raises(InvariantViolated):
        train_stage(loaded(tiny_model("llama")), make_stage(method="lora", max_steps=2), tmp_path / "run", rows)
    assert not [event for event in read_events(tmp_path / "run") if "loss" in event]
    assert not (tmp_path / "run" / "stages").exists()


def test_two_forwards_are_identical_whatever_dropout_the_model_brings():
    rows = batch_of(ROWS).forest
    model = tiny_model("gpt2")
    assert model.config.resid_pdrop == model.config.attn_pdrop == 0.1
    model.train()
    policy = Policy(model)
    assert torch.equal(policy(rows).logprobs, policy(rows).logprobs)


def test_the_adapters_dropout_is_on_in_training_and_off_where_nothing_is_trained():
    policy = lora_policy(lora_dropout=0.5)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    rows = batch_of(ROWS).forest
    assert not torch.equal(policy(rows).logprobs, policy(rows).logprobs)
    with policy.deterministic():
        first = policy(rows).logprobs
        assert torch.equal(first, policy(rows).logprobs)
    assert not torch.equal(policy(rows).logprobs, first)


def test_the_validation_loss_has_no_dropout_in_it():
    from tunesmith.train.window import evaluate_loss

    policy = lora_policy(lora_dropout=0.5)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    losses = {evaluate_loss(policy, SFT(), [batch_of(ROWS)]).loss for _ in range(3)}
    assert len(losses) == 1


def test_a_stages_result_answers_without_dropout(tmp_path):
    stage = make_stage(method={"type": "lora", "lora_dropout": 0.5}, max_steps=2, warmup_steps=0)
    model = train_stage(loaded(tiny_model("llama")), stage, tmp_path / "run", ROWS)
    assert not any(module.training for module in model.modules())
