"""Layers computed again in the backward pass: the same gradients in the forest's layout, and less kept in between."""

from __future__ import annotations

import pytest
import torch
from tests.toys import batch_of, loaded, make_rows, tiny_model

from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.recipe import FullMethod, LoraMethod, Stage

FOREST = batch_of(make_rows(6, shared=20)).forest  # rows that share a beginning: a layout with a parent
METHODS = {"full": FullMethod(), "lora": LoraMethod(r=4), "dropout": LoraMethod(r=4, lora_dropout=0.3)}


def run(method: str, which, family: str = "llama") -> tuple[dict[str, torch.Tensor], int]:
    """The gradients, and the bytes that autograd kept for the backward pass."""
    model = attach(loaded(tiny_model(family)), METHODS[method], seed=0)
    policy = Policy(model, gradient_checkpointing=which)
    torch.manual_seed(0)
    kept = {}
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = policy(FOREST).logprobs.sum()
    loss.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}, sum(kept.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", [True, "selective"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_gradient_is_the_plain_one_to_the_bit_in_a_forest(method, which, family):
    assert len(FOREST.nodes) > 6
    plain, again = run(method, False, family)[0], run(method, which, family)[0]
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_all_layers_keep_less_than_every_second_and_that_less_than_none(method):
    none, half, all_layers = (run(method, which)[1] for which in (False, "selective", True))
    assert all_layers < half < none


def test_the_recipe_takes_true_false_and_selective():
    for given in (True, False, "selective"):
        assert Stage(name="a", objective="sft", gradient_checkpointing=given).gradient_checkpointing == given
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        Stage(name="a", objective="sft", gradient_checkpointing="some")
