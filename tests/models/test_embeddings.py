"""A table that is embeddings and head has one gradient, and no second one of its size is made on the way."""

from __future__ import annotations

import pytest
import torch
from tests.toys import batch_of, make_rows, make_stage, tiny_model

from tunesmith.models import embeddings
from tunesmith.models.policy import Policy
from tunesmith.objectives import SFT
from tunesmith.train.optimiser import Optimiser
from tunesmith.train.window import run_window


def tied_model(dtype: torch.dtype = torch.float32):
    model = tiny_model("llama", dtype=dtype)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def gradient_of_table(dtype: torch.dtype, *, sparse: bool, batches: int) -> torch.Tensor:
    model = tied_model(dtype)
    policy = Policy(model)
    table = model.get_input_embeddings()
    assert "forward" in vars(table), "this is no table of both kinds, or the path is not taken"
    if not sparse:
        embeddings.plain_lookup(model)
        assert "forward" not in vars(table)
    optimiser = Optimiser(policy.named_parameters(), make_stage())
    run_window(policy, SFT(), [batch_of(make_rows(4, seed=seed)) for seed in range(batches)])
    place = next(i for i, p in enumerate(optimiser.parameters) if p is table.weight)
    return table.weight.grad if dtype == torch.float32 else optimiser._units[place][0].gradient


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_a_tied_table_is_that_of_a_dense_one(dtype, batches):
    spare, dense = (gradient_of_table(dtype, sparse=sparse, batches=batches) for sparse in (True, False))
    assert not spare.is_sparse
    assert (spare.float() - dense.float()).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * dense.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_table_whose_head_no_loss_has_used_still_trains(dtype):
    model = tied_model(dtype)
    policy = Policy(model)
    optimiser = Optimiser(policy.named_parameters(), make_stage())
    before = model.get_input_embeddings().weight.detach().clone()
    policy.last_hidden(batch_of(make_rows(4)).forest).sum().backward()
    optimiser.step(1e-2, optimiser.grad_norm())
    assert not torch.equal(model.get_input_embeddings().weight, before)


def test_a_policy_made_plain_looks_up_plainly():
    model = tied_model()
    Policy(model).make_plain()
    assert "forward" not in vars(model.get_input_embeddings())


def test_tables_apart_and_frozen_ones_are_left_as_they_are():
    apart, frozen = tiny_model("llama"), tied_model().requires_grad_(False)
    for model in (apart, frozen):
        Policy(model)
        assert "forward" not in vars(model.get_input_embeddings())


@pytest.mark.parametrize("times", [64, 512])
def test_a_token_that_occurs_often_gets_all_of_its_small_gradients(times):
    """Added one by one to the head's gradient of 1 they would all be rounded away."""
    table = torch.nn.Embedding(5, 4, padding_idx=0, dtype=torch.bfloat16)
    small = torch.full((times, 4), 0.0009).bfloat16()  # less than half a step of bf16 from a quarter on
    looked_up = embeddings._Lookup.apply(table.weight, torch.full((times,), 3), table.padding_idx)
    ((looked_up * small).sum() + table.weight.sum()).backward()
    exact = 1 + times * small[0, 0].double()
    assert table.weight.grad[3, 0].double() == pytest.approx(float(exact), rel=2**-8)


def test_the_padding_token_gets_no_gradient_from_the_lookup_as_with_torchs_own():
    table = torch.nn.Embedding(5, 4, padding_idx=2)
    tokens, given = torch.tensor([1, 2, 2, 4]), torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    found = [
        torch.autograd.grad((looked_up * given).sum(), table.weight)[0].to_dense()
        for looked_up in (embeddings._Lookup.apply(table.weight, tokens, 2), table(tokens))
    ]
    assert torch.equal(*found)
    assert found[0].count_nonzero() == 8
