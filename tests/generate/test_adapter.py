"""LoRA merged for the while: the same function inside, the same bits afterwards."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear

from tests.families import tiny_model
from tests.generate.helpers import plain_logits
from tunesmith.generate import merged_adapter

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def adapted(dtype=torch.float32, family="llama", **settings):
    settings = dict(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False) | settings
    torch.manual_seed(1)
    return get_peft_model(tiny_model(family, dtype=dtype), LoraConfig(**settings)).eval()


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_bitwise_the_same_afterwards(dtype):
    model = adapted(dtype)
    before = weights(model)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with merged_adapter(model):
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert sorted(changed) == sorted(name for name in before if name.endswith("base_layer.weight"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses


def test_an_error_inside_restores_the_weights_too():
    model = adapted(torch.bfloat16)
    before = weights(model)
    with pytest.raises(KeyError), merged_adapter(model):
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, LoraLinear))


@pytest.mark.parametrize("family,targets", [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"])])
def test_inside_the_model_computes_the_same_without_its_lora_matrices(family, targets):
    model = adapted(family=family, target_modules=targets)
    expected = plain_logits(model, IDS)
    used = []
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.lora_A["default"].register_forward_hook(lambda *_: used.append(1))
    with merged_adapter(model):
        torch.testing.assert_close(plain_logits(model, IDS), expected, atol=2e-5, rtol=1e-5)
    assert used == []
    torch.testing.assert_close(plain_logits(model, IDS), expected, atol=0, rtol=0)
    assert used != []


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["c_fc"]}])
def test_a_layer_that_is_not_plain_lora_is_left_alone_and_still_right(settings):
    model = adapted(family="gpt2" if "lora_bias" in settings else "llama", **settings)
    expected, before = plain_logits(model, IDS), weights(model)
    with merged_adapter(model):
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        torch.testing.assert_close(plain_logits(model, IDS), expected)


def test_a_weight_that_the_embeddings_share_is_not_merged():
    model = adapted(family="gemma3", target_modules=["lm_head"])
    assert model.get_base_model().lm_head.base_layer.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    expected = plain_logits(model, IDS)
    with merged_adapter(model):
        torch.testing.assert_close(plain_logits(model, IDS), expected, atol=0, rtol=0)


def test_two_active_adapters_are_both_merged():
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected = plain_logits(model, IDS)
    with merged_adapter(model):
        torch.testing.assert_close(plain_logits(model, IDS), expected, atol=2e-5, rtol=1e-5)


def test_a_model_without_an_adapter_passes_through():
    model = tiny_model("llama")
    expected = plain_logits(model, IDS)
    with merged_adapter(model):
        torch.testing.assert_close(plain_logits(model, IDS), expected, atol=0, rtol=0)
