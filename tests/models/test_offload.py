"""Activations moved to the host between the passes: equal gradients, weights left in place, and a refusal without a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.toys import batch_of, make_rows, make_stage, tiny_model

from tunesmith.errors import RecipeError
from tunesmith.models import policy as policy_module
from tunesmith.models.offload import offloaded
from tunesmith.models.policy import Policy
from tunesmith.recipe import Stage

FOREST = batch_of(make_rows(6, shared=20)).forest


def gradients(monkeypatch, **options) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients, and how many tensors were moved; nothing is pinned, for which a GPU is needed."""
    moved = []

    def counted(model):
        hooks = offloaded(model, pin=False)
        pack = hooks.pack_hook
        hooks.pack_hook = lambda saved: (kept := pack(saved), moved.append(isinstance(kept, tuple)))[0]
        return hooks

    monkeypatch.setattr(policy_module, "offloaded", counted)
    policy = Policy(tiny_model("llama"), **options)
    policy(FOREST).logprobs.sum().backward()
    return {name: parameter.grad for name, parameter in policy.named_parameters()}, sum(moved)


@pytest.mark.parametrize("others", [{}, {"gradient_checkpointing": "selective"}])
def test_gradients_are_those_without_and_no_weight_is_moved(monkeypatch, others):
    plain, none = gradients(monkeypatch, **others)
    away, moved = gradients(monkeypatch, activation_offload=True, **others)
    assert none == 0 < moved
    for name, gradient in plain.items():
        torch.testing.assert_close(away[name], gradient, rtol=0, atol=0, msg=name)
    model = tiny_model("llama")
    weight, x = model.lm_head.weight, torch.randn(3, 32, requires_grad=True)
    hooks = offloaded(model, pin=False)
    assert isinstance(hooks.pack_hook(weight.T), torch.Tensor)
    assert isinstance(hooks.pack_hook(x), tuple)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_refused_before_training_as_not_measured():
    with pytest.raises(RecipeError, match=r"needs a CUDA device, and this machine has none; .* NOT MEASURED"):
        make_stage(activation_offload=True)


def test_with_every_layer_recomputed_there_is_nothing_to_offload():
    with pytest.raises(ValueError, match="nothing to move"):
        Stage(name="a", objective="sft", activation_offload=True, gradient_checkpointing=True)
