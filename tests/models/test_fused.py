"""Each fast path against the layer it stands for: PEFT's LoRA, transformers' SwiGLU and RMSNorm, forward and gradients in fp32."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from tests.toys import batch_of, loaded, make_rows, tiny_model
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tunesmith.models import fused
from tunesmith.models.fused import FastPaths, _LoraProduct, fuse_layers, fuse_lora, is_plain, remove_fast_forwards
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.recipe import LoraMethod

ROWS = make_rows(6)


def lora(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    """A model with an adapter that is no longer fresh."""
    model = attach(loaded(tiny_model(family, dtype=dtype)), LoraMethod(r=3, **settings), seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def forward_and_gradients(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    gradients = [x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
    layer.zero_grad()
    return [y.detach(), *gradients]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_alpha": 1.5}])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_lora_as_one_product_equals_pefts_layer(family, settings):
    model = lora(family, **settings)
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    plain = [copy.deepcopy(layer) for layer in layers]
    paths = FastPaths()
    fuse_lora(model, paths)
    assert paths.used == {"lora": len(layers)}
    for fast, slow in zip(layers, plain, strict=True):
        x, grad = torch.randn(2, 5, slow.in_features), torch.randn(2, 5, slow.out_features)
        ours, theirs = forward_and_gradients(fast, x, grad), forward_and_gradients(slow, x, grad)
        assert len(ours) == len(theirs) == 4
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_fused_layer_switched_off_or_merged_is_the_base():
    model = lora()
    policy, batch = Policy(model), batch_of(ROWS).forest
    tuned = policy(batch).logprobs.detach()
    with model.disable_adapter():
        base = policy(batch).logprobs.detach()
    torch.testing.assert_close(base, Policy(tiny_model("llama"))(batch).logprobs, rtol=1e-5, atol=1e-5)
    assert (tuned - base).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(policy(batch).logprobs, tuned, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(policy(batch).logprobs, tuned, rtol=1e-4, atol=1e-4)


def test_a_fused_layer_without_gradients_gives_the_same():
    model = lora()
    policy, batch = Policy(model), batch_of(ROWS).forest
    tuned = policy(batch).logprobs
    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(policy(batch).logprobs, tuned.detach())


def test_a_young_delta_survives_bf16_where_a_sum_would_round_it_away():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(48, 32).bfloat16()
    a, b = torch.randn(4, 32), torch.randn(48, 4) * 1e-3
    wide = torch.empty(48, 36, dtype=torch.bfloat16)
    wide[:, :32] = weight
    fused = _LoraProduct.apply(x, wide, None, a.requires_grad_(), b.requires_grad_(), 1.0).detach()
    exact = x.double() @ weight.double().T + (x.double() @ a.double().T) @ b.double().T
    summed = x @ weight.T + (x @ a.detach().bfloat16().T) @ b.detach().bfloat16().T
    assert (fused.double() - exact).square().mean() < 0.8 * (summed.double() - exact).square().mean()


def test_the_frozen_weight_is_held_once():
    model = lora()
    Policy(model)
    layer = next(module for module in model.modules() if isinstance(module, LoraLinear))
    assert layer.get_base_layer().weight.data_ptr() == layer.wide.data_ptr()


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}])
def test_a_layer_that_is_not_plain_keeps_its_own_forward(settings):
    model = lora(**settings)
    paths = FastPaths()
    fuse_lora(model, paths)
    assert "lora" not in paths.used
    assert "not a plain LoRA layer" in paths.refused["lora"]


def test_gpt2s_transposed_layers_are_not_plain():
    model = lora("gpt2")
    assert not any(is_plain(module) for module in model.modules() if isinstance(module, LoraLinear))
    batch = batch_of(ROWS).forest
    torch.testing.assert_close(Policy(model)(batch).logprobs, Policy(lora("gpt2"), fast=False)(batch).logprobs)


class Mlp(nn.Module):
    """The usual gated layer, with any activation."""

    def __init__(self, activation: str):
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_swiglu_equals_the_plain_layer():
    layer, plain, paths = Mlp("silu"), Mlp("silu"), FastPaths()
    fuse_layers(nn.ModuleList([layer]), paths)
    assert paths.used == {"swiglu": 1}
    x, grad = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    for a, b in zip(forward_and_gradients(layer, x, grad), forward_and_gradients(plain, x, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [True, False])
def test_silu_is_computed_once_in_each_pass(trained, monkeypatch):
    layer, plain, count, silu = Mlp("silu"), Mlp("silu"), [], torch.nn.functional.silu
    fuse_layers(nn.ModuleList([layer]), FastPaths())
    for each in (layer, plain):
        each.down_proj.weight.requires_grad_(trained)  # where it does not train, nothing is computed again for it
    monkeypatch.setattr(fused.F, "silu", lambda x: count.append(x.shape) or silu(x))
    x = torch.randn(3, 5, 8)
    for grad in torch.randn(2, 3, 5, 8):
        ours = forward_and_gradients(layer, x, grad)
        made, count[:] = len(count), []
        for a, b in zip(ours, forward_and_gradients(plain, x, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        count.clear()
        assert made == 2


def test_a_second_derivative_through_swiglu_is_refused():
    layer = Mlp("silu")
    fuse_layers(nn.ModuleList([layer]), FastPaths())
    x = torch.randn(3, 5, 8, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_a_gated_layer_with_another_activation_is_left_alone(activation):
    layer, paths = Mlp(activation), FastPaths()
    fuse_layers(nn.ModuleList([layer]), paths)
    assert "forward" not in vars(layer)
    assert (paths.used, list(paths.refused)) == ({}, ["swiglu"])


def norm(kind: type[nn.Module]) -> nn.Module:
    layer = kind(16)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, 16))
    return layer


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("block", [1, 32, 1 << 16])  # numbers at once: one row, rows in part, all rows
def test_rms_norm_equals_the_plain_layer(block, turned, monkeypatch):
    monkeypatch.setattr(fused, "NORM_BLOCK", block)
    layer, plain, paths = norm(LlamaRMSNorm), norm(LlamaRMSNorm), FastPaths()
    fuse_layers(nn.ModuleList([layer]), paths)
    assert paths.used == {"rms_norm": 1}
    x, grad = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    if turned:  # as heads are, whose tokens do not lie side by side
        x, grad = (torch.randn(5, 3, 16).transpose(0, 1) for _ in range(2))
    for a, b in zip(forward_and_gradients(layer, x, grad), forward_and_gradients(plain, x, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_norm_that_adds_one_to_its_weight_is_left_alone():
    layer, paths = norm(Gemma2RMSNorm), FastPaths()
    layer.variance_epsilon = layer.eps
    fuse_layers(nn.ModuleList([layer]), paths)
    assert "forward" not in vars(layer)


def test_plain_gives_every_layer_its_own_forward_for_a_while():
    policy = Policy(lora())
    fast = {module for module in policy.model.modules() if "forward" in vars(module)}
    with policy.plain():
        assert not any("forward" in vars(module) for module in policy.model.modules())
    assert {module for module in policy.model.modules() if "forward" in vars(module)} == fast
    assert remove_fast_forwards(policy.model).keys() == fast


def inner_tensors() -> list[torch.Tensor]:
    """What this process holds of the feed-forward's width."""
    return [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.dim() == 3 and one.shape[-1] == 48]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gate_and_up_are_kept_for_the_backward_pass_unless_layers_are_computed_again(checkpointing):
    policy = Policy(lora(), gradient_checkpointing=checkpointing)
    assert policy.fast_paths.used["swiglu"] == 2
    gc.collect()
    before = inner_tensors()  # of other tests in this process
    logprobs = policy(batch_of(ROWS).forest).logprobs
    held = [one for one in inner_tensors() if not any(one is other for other in before)]
    assert bool(held) is not checkpointing
    logprobs.sum().backward()
