"""IA3 against PEFT's on every layout: which layers it derives, that a fresh one changes nothing, and one step."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as PEFTS
from tests.families import FAMILIES, tiny_model
from tests.toys import loaded
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from tunesmith.errors import RecipeError
from tunesmith.models.methods import attach, resolve, trainable_count
from tunesmith.recipe import Ia3Method

IDS = torch.tensor([[5, 9, 40, 77, 12, 80, 66, 33]])
PAPERS = {  # keys, values, and the last of each feed-forward part; a layer that holds queries too is scaled whole, as in PEFT
    "llama": (["down_proj", "k_proj", "v_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "neox": (["dense_4h_to_h", "query_key_value"], ["dense_4h_to_h"]),
    "opt": (["fc2", "k_proj", "v_proj"], ["fc2"]),
    "phi": (["fc2", "k_proj", "v_proj"], ["fc2"]),
}


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits[0]


def step(model: nn.Module) -> torch.Tensor:
    torch.nn.functional.cross_entropy(logits(model)[:-1], IDS[0, 1:]).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.5 * parameter.grad
        return logits(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_keys_values_and_inner_activations_are_derived_for_every_layout_and_train_as_pefts(family):
    base = loaded(tiny_model(family))
    given = resolve(base.model, Ia3Method())
    assert (given.target_modules, given.feedforward_modules) == PAPERS.get(family, PAPERS["llama"])
    counted = trainable_count(base.model, given)
    model = attach(base, given, seed=0)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert torch.equal(logits(model), logits(tiny_model(family)))
    config = IA3Config(task_type="CAUSAL_LM", target_modules=given.target_modules, feedforward_modules=given.feedforward_modules)
    theirs = get_peft_model(tiny_model(family), config)
    before = logits(theirs).detach()
    after = step(model)
    torch.testing.assert_close(after, step(theirs), rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "name"), [("llama", "llama"), ("mistral", "mistral"), ("gpt2", "gpt2"), ("neox", "gpt_neox")])
def test_where_pefts_own_table_has_keys_and_values_the_derived_layers_are_its(family, name):
    assert resolve(tiny_model(family), Ia3Method()).target_modules == sorted(PEFTS[name])


def test_layers_that_are_named_are_taken_and_those_that_end_a_feed_forward_part_are_scaled_in_their_input():
    model = tiny_model("llama")
    given = resolve(model, Ia3Method(target_modules=["v_proj", "mlp.down_proj"]))
    assert given.feedforward_modules == ["mlp.down_proj"]
    assert resolve(model, Ia3Method(target_modules=["v_proj"])).feedforward_modules == []
    with pytest.raises(RecipeError, match="`v_porj` matches no linear layer"):
        resolve(model, Ia3Method(target_modules=["v_porj"]))
    with pytest.raises(RecipeError, match="`down_proj` is none of the target modules"):
        resolve(model, Ia3Method(target_modules=["v_proj"], feedforward_modules=["down_proj"]))


def test_a_model_whose_feed_forward_parts_have_no_linear_layers_is_refused_with_what_to_write():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_local_experts=2, **shape))
    with pytest.raises(RecipeError, match="is not known") as caught:
        resolve(model, Ia3Method())
    assert "feedforward_modules" in caught.value.mend
    assert resolve(model, Ia3Method(target_modules=["k_proj", "v_proj"])).feedforward_modules == []
