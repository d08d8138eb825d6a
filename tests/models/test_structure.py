"""A layer's attention and feed-forward are found in every family, also under adapters and fast paths; what is something else is refused."""

from __future__ import annotations

import pytest
import torch
from tests.families import FAMILIES, SHAPE
from tests.models.method_cases import ADAPTER_CASES
from tests.toys import loaded, make_stage, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig

from tunesmith.errors import ModelError
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.models.structure import sublayers

QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
GATED = ("model.layers.1.", QKV, "self_attn.o_proj", "mlp.gate_proj mlp.up_proj", "mlp.down_proj")
BY_HAND = dict.fromkeys(FAMILIES, GATED) | {
    "phi": ("model.layers.1.", QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    "gpt2": ("transformer.h.1.", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "neox": ("gpt_neox.layers.1.", "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers.1.", QKV, "self_attn.out_proj", "fc1", "fc2"),
}


def found(model: nn.Module) -> tuple[str, ...]:
    """The second layer's parts, as BY_HAND has them."""
    layers = sublayers(model)
    assert len(layers) == 2
    one = layers[1]
    prefix = f"{one.layer}."
    parts = one.attention_inputs, (one.attention_output,), one.feedforward_inputs, (one.feedforward_output,)
    assert all(name.startswith(prefix) for part in parts for name in part)
    return prefix, *(" ".join(name.removeprefix(prefix) for name in part) for part in parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_a_layer_are_those_found_by_hand(family):
    assert found(tiny_model(family)) == BY_HAND[family]


@pytest.mark.parametrize("method", ADAPTER_CASES)
def test_they_are_the_same_with_an_adapter_fast_paths_packed_attention_and_checkpointing(method):
    model = attach(loaded(tiny_model("llama")), make_stage(method=ADAPTER_CASES[method]).method, seed=0)
    policy = Policy(model, gradient_checkpointing=True)
    assert found(policy.causal) == BY_HAND["llama"]


def test_they_are_the_same_in_bf16():
    assert found(tiny_model("gemma3", dtype=torch.bfloat16)) == BY_HAND["gemma3"]


def test_the_model_is_left_as_it_was():
    model = tiny_model("gpt2")
    model.transformer.h[0].attn.resid_dropout.training = True
    ids = torch.arange(6)[None]
    training = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(1)
    before = model(ids).logits
    torch.manual_seed(1)
    sublayers(model)
    assert torch.equal(model(ids).logits, before)
    assert {name: module.training for name, module in model.named_modules()} == training
    assert model.config._attn_implementation == "eager"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("config", [MixtralConfig, Qwen2MoeConfig])
def test_a_mixture_of_experts_is_refused_also_where_it_has_a_shared_expert(config):
    model = AutoModelForCausalLM.from_config(config(**SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts=4))
    with pytest.raises(ModelError, match=r"model\.layers\.0: .*belongs to no linear layer that is called"):
        sublayers(model)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())


class Longer(nn.Module):
    """A feed-forward with one linear layer more."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.plain, self.more = plain, nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.more(self.plain(x))


class Twice(Longer):
    """One whose last layer is called twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.more(self.more(x))


class Unused(Longer):
    """One with a layer that is not called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(x)


@pytest.mark.parametrize("other", [Longer, Twice, Unused, lambda plain: nn.Identity()])
def test_a_layer_that_is_something_else_is_refused_by_name(other):
    model = tiny_model("llama")
    model.model.layers[1].mlp = other(model.model.layers[1].mlp)
    with pytest.raises(ModelError, match=r"model\.layers\.1: the layer is not attention and one feed-forward"):
        sublayers(model)
