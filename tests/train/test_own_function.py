"""What trains is the model's own function: a model that computes more, or attends otherwise, is refused, and so is a wrong pass of ours."""

from __future__ import annotations

import pytest
import torch
from tests.families import FAMILIES, SHAPE, tiny_model
from tests.pipeline.helpers import recipe, stage
from tests.toys import loaded, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    FalconConfig,
    GraniteConfig,
    ModernBertDecoderConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

import tunesmith
from tunesmith.errors import InvariantViolated, ModelError
from tunesmith.models import attention, head
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.recipe import Stage
from tunesmith.rundir import read_events
from tunesmith.train.invariants import computes_the_models_own

GROUPED = SHAPE | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
METHODS = ["lora", "ia3", "prefix", "prompt", "p_tuning", "bottleneck", "full"]


def random_model(config, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of a config with weights large enough that everything matters."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, 0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_models_is_computed_as_it_computes_itself(family, dtype):
    computes_the_models_own(Policy(tiny_model(family, dtype=dtype)))


@pytest.mark.parametrize(
    "config",
    [
        lambda: GraniteConfig(**GROUPED, logits_scaling=4.0, attention_multiplier=0.3, embedding_multiplier=3.0, residual_multiplier=0.5),
        lambda: CohereConfig(**GROUPED, logit_scale=0.25, use_qk_norm=True),
        lambda: PhimoeConfig(**GROUPED, sliding_window=None, num_local_experts=4),
        lambda: Qwen2MoeConfig(**GROUPED, **EXPERTS),
    ],
    ids=["logits that are scaled", "normed keys", "experts", "experts with a window that is off"],
)
def test_what_the_policy_knows_to_compute_is_accepted(config):
    computes_the_models_own(Policy(random_model(config())))


@pytest.mark.parametrize(
    "config",
    [
        lambda: ModernBertDecoderConfig(**SHAPE, layer_types=["full_attention"] * 2),
        lambda: BertConfig(**SHAPE, is_decoder=True),
        lambda: PhimoeConfig(**GROUPED, sliding_window=64, num_local_experts=4),
        lambda: Qwen2MoeConfig(**GROUPED, **EXPERTS, sliding_window=64, use_sliding_window=True, max_window_layers=1),
    ],
    ids=["a layer before the head", "a transform before the head", "a window in the mask alone", "a window in some layers' masks"],
)
def test_a_model_that_computes_something_else_besides_is_refused(config):
    with pytest.raises(InvariantViolated, match="of the model's own forward"):
        computes_the_models_own(Policy(random_model(config())))


def test_a_model_that_keeps_its_own_attention_is_refused():
    config = FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ModelError, match="keeps an attention of its own"):
        Policy(random_model(config))


def halved_values(passes):
    """The packed attention's backward pass, with half of the gradient of the values."""
    return staticmethod(lambda ctx, grad: (lambda found: (*found[:2], found[2] * 0.5, *found[3:]))(passes(ctx, grad)))


def turned_hidden(passes):
    """The head's backward pass, with the gradient of the hidden states turned round."""
    return staticmethod(lambda ctx, *grads: (lambda found: (-found[0], *found[1:]))(passes(ctx, *grads)))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    "where, wrong", [(attention._ForestAttention, halved_values), (head._TokenLogprobs, turned_hidden)], ids=["attention", "head"]
)
def test_a_wrong_backward_pass_of_ours_is_refused(where, wrong, method, monkeypatch):
    model = tiny_model("llama")
    policy = Policy(attach(loaded(model), Stage(name="s", objective="sft", method=method).method, seed=0))
    computes_the_models_own(policy)
    monkeypatch.setattr(where, "backward", wrong(where.backward))
    with pytest.raises(InvariantViolated, match="gradients"):
        computes_the_models_own(policy)


def test_a_wrong_scale_of_attention_is_refused(monkeypatch):
    policy, plain = Policy(tiny_model("llama")), attention._probabilities
    monkeypatch.setattr(attention, "_probabilities", lambda q, k, mask, scale, softcap: plain(q, k, mask, 2 * scale, softcap))
    with pytest.raises(InvariantViolated, match="nats a token"):
        computes_the_models_own(policy)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_and_windows_are_as_they_were_after(method):
    model = tiny_model("mistral")
    policy = Policy(attach(loaded(model), Stage(name="s", objective="sft", method=method).method, seed=0))
    before = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    computes_the_models_own(policy)
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == before
    assert model.config.sliding_window == 9
    assert model.config._attn_implementation == attention.FOREST
    if method != "full":
        assert policy.model.active_adapter == "default"
        assert policy.model.has_active_enabled_adapter


def test_a_run_on_such_a_model_ends_before_its_first_update(tmp_path):
    folder, tokenizer = tmp_path / "model", tiny_tokenizer()
    shape = SHAPE | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    random_model(ModernBertDecoderConfig(**shape, layer_types=["full_attention"] * 2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(InvariantViolated, match="of the model's own forward"):
        tunesmith.train(recipe(tmp_path, folder, stages=[stage(method="lora")]), out=tmp_path / "run")
    assert not [event for event in read_events(tmp_path / "run") if "loss" in event]
