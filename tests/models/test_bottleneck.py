"""Bottleneck adapters compute what their papers say in every family, packed, checkpointed and fast; PEFT handles them like its own."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tests.families import FAMILIES
from tests.models.test_structure import BY_HAND
from tests.toys import batch_of, loaded, make_items, make_rows, make_stage, tiny_model, train_stage
from torch import nn

from tunesmith.errors import ModelError
from tunesmith.models.adapters import REFERENCE, adapter_parameters, copy_policy
from tunesmith.models.bottleneck import BottleneckConfig, BottleneckLayer
from tunesmith.models.methods import attach, resolve, trainable_count
from tunesmith.models.policy import Policy
from tunesmith.recipe import BottleneckMethod
from tunesmith.rundir import read_events

ARCHITECTURES = ["houlsby", "pfeiffer", "parallel"]
ROWS, PAIRS = make_rows(6), make_items(7)
IDS = torch.arange(14).view(2, 7)


def adapted(architecture: str, family: str = "llama", *, fresh: bool = False, dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    """A tiny model with an adapter, that is no longer fresh if it is not said to be."""
    method = BottleneckMethod(architecture=architecture, bottleneck_size=5, **settings)
    model = attach(loaded(tiny_model(family, dtype=dtype)), method, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not fresh:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def by_hand(base: nn.Module, trained: dict[str, torch.Tensor], method: BottleneckMethod, scaling: float, family: str) -> None:
    """Adds y + s U f(D x) to an untouched model by hooks on modules that are named by hand."""
    prefix, _, attention, inputs, feedforward = BY_HAND[family]
    read = {}
    for layer in (0, 1):
        begin = prefix.replace("1", str(layer))
        for part in [attention, feedforward] if method.architecture == "houlsby" else [feedforward]:
            own = {key: trained[f"base_model.model.{begin}{part}.bottleneck_adapter.{key}"] for key in NAMES}

            def add(module, given, y, own=own, layer=layer):
                x = read[layer] if method.architecture == "parallel" else y
                inner = getattr(F, method.non_linearity)(x @ own["down.weight"].T + own["down.bias"])
                return y + scaling * (inner @ own["up.weight"].T + own["up.bias"])

            base.get_submodule(begin + part).register_forward_hook(add)
        first = base.get_submodule(begin + inputs.split()[0])
        first.register_forward_hook(lambda module, given, y, layer=layer: read.update({layer: given[0]}))


NAMES = ["down.weight", "down.bias", "up.weight", "up.bias"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_papers_formula_in_plain_torch(family, architecture):
    settings = {"non_linearity": "gelu"} if family == "qwen2" else {"scaling": 1.5, "non_linearity": "silu"} if family == "gpt2" else {}
    model = adapted(architecture, family, **settings)
    method = BottleneckMethod(architecture=architecture, **settings)
    mine = adapter_parameters(model, "default")
    places = 2 if architecture == "houlsby" else 1
    assert len(mine) == 2 * places * len(NAMES)
    theirs = {name: parameter.detach().clone().requires_grad_() for name, parameter in mine.items()}
    plain = tiny_model(family)
    by_hand(plain, theirs, method, settings.get("scaling", 4.0 if architecture == "parallel" else 1.0), family)
    ours, expected = model(IDS).logits, plain(IDS).logits
    assert (ours - tiny_model(family)(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    ours.square().mean().backward()
    expected.square().mean().backward()
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_one_changes_nothing_and_trains_as_many_numbers_as_were_counted(family, architecture):
    base = tiny_model(family)
    method = resolve(base, BottleneckMethod(architecture=architecture, bottleneck_size=5))
    counted, expected = trainable_count(base, method), base(IDS).logits
    model = adapted(architecture, family, fresh=True)
    assert torch.equal(model(IDS).logits, expected)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == (2 if architecture == "houlsby" else 1) * 2 * (2 * 32 * 5 + 5 + 32)  # layers x (D, U, their biases)


def test_a_fresh_one_is_a_function_of_the_seed():
    def weights(seed: int) -> torch.Tensor:
        model = attach(loaded(tiny_model("llama")), BottleneckMethod(), seed=seed)
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def gradients(model: nn.Module, **options) -> list[torch.Tensor]:
    """Log-probabilities of packed rows, and the adapter's gradients."""
    policy = Policy(model, **options)
    logprobs = policy(batch_of(ROWS).forest).logprobs
    logprobs.mean().backward()
    return [logprobs.detach(), *(p.grad for p in adapter_parameters(model, "default").values())]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", ["llama", "phi", "opt"])
def test_packed_fast_and_checkpointed_it_computes_the_same(family, architecture):
    plain = gradients(adapted(architecture, family), fast=False)
    for options in ({"fast": True}, {"fast": True, "gradient_checkpointing": True}, {"fast": False, "gradient_checkpointing": True}):
        for ours, expected in zip(gradients(adapted(architecture, family), **options), plain, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    alone = adapted(architecture, family)
    single = torch.cat([Policy(alone)(batch_of([row]).forest).logprobs for row in ROWS])
    torch.testing.assert_close(single, plain[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_leaves_no_activation_behind(architecture, checkpointing):
    model = adapted(architecture)
    policy, kept = Policy(model, gradient_checkpointing=checkpointing), []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | BottleneckLayer)]
    for layer in layers:
        layer.register_forward_hook(lambda module, given, y: kept.extend(map(weakref.ref, (given[0], y))))
    gc.disable()
    try:
        policy(batch_of(ROWS).forest).logprobs.mean().backward()
        assert len(kept) > len(layers)
        assert not [one for one in kept if one() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_trains_in_fp32_on_a_frozen_bf16_base_whose_dtype_it_computes_in(architecture):
    model = adapted(architecture, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    wanted = adapted(architecture)(IDS).logits
    assert (logits - wanted).abs().mean() < 0.03 * wanted.abs().mean()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_adapters_stand_in_one_model_and_each_computes_its_own(architecture):
    model = adapted(architecture)
    start, base = model(IDS).logits, tiny_model("llama")(IDS).logits
    copy_policy(model)
    other = copy.copy(model.peft_config["default"])
    other.bottleneck_size, other.scaling = 3, 2.0
    model.add_adapter("other", other)
    policy = Policy(model, fast=False)
    policy.causal.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in adapter_parameters(model, "default").values():
            parameter.add_(0.1)
    assert (model(IDS).logits - start).abs().max() > 0.1
    with policy.using(REFERENCE):
        assert torch.equal(model(IDS).logits, start)
    for unchanged in (None, "other"):
        with policy.using(unchanged):
            assert torch.equal(model(IDS).logits, base)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"default"}


def test_a_copy_of_a_model_reads_its_own_feed_forwards_input():
    model = adapted("parallel")
    twin = copy.deepcopy(model)
    del model
    assert torch.equal(twin(IDS).logits, adapted("parallel")(IDS).logits)


def test_a_parallel_adapter_that_is_not_shown_its_input_says_so():
    layer = adapted("parallel").base_model.model.model.layers[0].mlp.down_proj
    with pytest.raises(ModelError, match="was not shown the feed-forward's input"):
        layer(torch.zeros(1, 48))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_takes_it_off_and_does_not_merge_it(architecture):
    model = adapted(architecture)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged: its layers are not linear"):
            merge()
    bare = model.unload()
    assert torch.equal(bare(IDS).logits, tiny_model("llama")(IDS).logits)
    assert not any(isinstance(module, BottleneckLayer) or module._forward_pre_hooks for module in bare.modules())


def test_peft_puts_it_on_by_its_config_alone():
    model = get_peft_model(tiny_model("opt"), BottleneckConfig(architecture="houlsby", bottleneck_size=5))
    names = {name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}
    assert names == {f"base_model.model.model.decoder.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.out_proj", "fc2")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dpo_that_goes_on_with_it_starts_at_ln_2(tmp_path, architecture):
    method = {"type": "bottleneck", "architecture": architecture, "bottleneck_size": 4}
    train_stage(loaded(tiny_model("llama")), make_stage(method=method, max_steps=24), tmp_path / "sft", make_rows(12))
    losses = [event["loss"] for event in read_events(tmp_path / "sft") if "loss" in event]
    assert sum(losses[-6:]) < 0.98 * sum(losses[:6])  # an epoch each
    stage = make_stage(name="dpo", objective="dpo", method=method, max_steps=3, rows=len(PAIRS), warmup_steps=0)
    start = tmp_path / "sft" / "stages" / "sft" / "model"
    train_stage(loaded(tiny_model("llama")), stage, tmp_path / "dpo", PAIRS, start=start)
    losses = [event["loss"] for event in read_events(tmp_path / "dpo") if "loss" in event]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses[-1] - math.log(2)) > 1e-3
