"""DoRA's norms are computed once an answer, and give the very same answer."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from peft.tuners.lora.dora import DoraLinearLayer

from tests.toys import loaded, tiny_model, tiny_tokenizer
from tunesmith.generate import LocalGenerator, local
from tunesmith.models.dora import norms_kept
from tunesmith.models.methods import attach
from tunesmith.recipe import LoraMethod

PROMPTS = [[5, 6, 7], [5, 6, 8, 9]]


@contextmanager
def as_peft_does(model):
    yield


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request):
    made = attach(loaded(tiny_model("qwen2", dtype=request.param)), LoraMethod(r=4, use_dora=True), seed=0).model
    turn(made, seed=0)
    return made


def turn(model, seed):
    """Trains it, so to say."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))


def said(model):
    generator = LocalGenerator(model, tiny_tokenizer())
    answers = generator.generate(PROMPTS, max_new_tokens=6, logprobs=True)
    assert not generator.notes
    return [(one.token_ids, list(one.logprobs)) for one in answers], [list(one) for one in generator.logprobs(PROMPTS, [[1, 2], [3]])]


def test_answers_and_scores_are_those_of_pefts_own_forward_also_after_more_training(model, monkeypatch):
    for seed in (1, 2):
        ours = said(model)
        with monkeypatch.context() as patch:
            patch.setattr(local, "norms_kept", as_peft_does)
            assert said(model) == ours
        turn(model, seed)
        assert said(model) != ours


def test_the_norms_are_computed_once_for_all_of_an_answers_tokens(model, monkeypatch):
    counted, plain = [], DoraLinearLayer.get_weight_norm
    monkeypatch.setattr(DoraLinearLayer, "get_weight_norm", lambda *args, **words: counted.append(1) or plain(*args, **words))
    generator = LocalGenerator(model, tiny_tokenizer())
    generator.generate(PROMPTS, max_new_tokens=2)
    counted.clear()
    generator.generate(PROMPTS, max_new_tokens=8)
    layers = [module for module in model.modules() if isinstance(module, DoraLinearLayer)]
    assert layers
    assert len(counted) == len(layers)
    assert not any("forward" in vars(layer) for layer in layers)


def test_whoever_keeps_norms_that_are_kept_already_leaves_them_to_the_first(model):
    layer = next(module for module in model.modules() if isinstance(module, DoraLinearLayer))
    with norms_kept(model):
        first = layer.forward
        with norms_kept(model):
            assert layer.forward is first
        assert layer.forward is first
    assert "forward" not in vars(layer)
