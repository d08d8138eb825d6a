"""Partial tuning: what names and layers make trainable in every layout, that nothing else moves, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tests.families import FAMILIES, tiny_model
from tests.toys import loaded, make_rows, make_stage, model_folder, train_stage

from tunesmith.errors import RecipeError
from tunesmith.models.load import load_model
from tunesmith.models.methods import attach, resolve
from tunesmith.recipe import ModelSection, PartialMethod

LAST_NORM = {"gpt2": "ln_f", "neox": "final_layer_norm", "opt": "final_layer_norm", "phi": "final_layernorm"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layers_and_the_norm_after_them_train(family):
    model = attach(loaded(tiny_model(family)), PartialMethod(last_layers=1), seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    norm = f".{LAST_NORM.get(family, 'norm')}."
    want = {name for name, _ in model.named_parameters() if ".1." in name or (norm in name and ".0." not in name)}
    assert trained == want
    assert any(norm in name and ".1." not in name for name in trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_moves_what_trains_and_nothing_else_and_its_result_is_a_whole_model(tmp_path, dtype):
    folder = model_folder(tmp_path / "base")
    section = ModelSection(name=str(folder), dtype=dtype)
    stage = make_stage(method={"type": "partial", "modules": ["layers.0.mlp", "norm"]}, max_steps=3)
    train_stage(load_model(section), stage, tmp_path / "run", make_rows(6))
    before = dict(load_model(section).model.named_parameters())
    after = dict(load_model(section.model_copy(update={"name": str(tmp_path / "run/stages/sft/model")})).model.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "layers.0.mlp" in name or name == "model.norm.weight"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"modules": ["mlp", "q_porj"]}, r"`q_porj` matches no module[\s\S]*q_proj"),
        ({"last_layers": 3}, "the model has 2 layers, and not 3"),
    ],
)
def test_what_the_model_has_not_is_refused(settings, says):
    with pytest.raises(RecipeError, match=says):
        resolve(tiny_model("llama"), PartialMethod(**settings))


def test_a_tied_head_is_named_by_its_embeddings(tmp_path):
    tied, apart = (load_model(ModelSection(name=str(model_folder(tmp_path / str(t), tied=t)), dtype="float32")) for t in (True, False))
    with pytest.raises(RecipeError, match="cannot train without the other") as caught:
        resolve(tied.model, PartialMethod(modules=["lm_head"]))
    assert "embed_tokens" in caught.value.mend
    assert attach(tied, PartialMethod(modules=["embed_tokens"]), seed=0).lm_head.weight.requires_grad
    model = attach(apart, PartialMethod(modules=["lm_head"]), seed=0)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"lm_head.weight"}


def test_new_tokens_whose_embeddings_would_not_train_are_refused(tmp_path):
    base = load_model(ModelSection(name=str(model_folder(tmp_path / "base", tied=False)), dtype="float32"))
    with pytest.raises(RecipeError, match="would not train"):
        attach(base, PartialMethod(modules=["norm", "embed_tokens"]), seed=0, new_tokens=[3])
    assert attach(base, PartialMethod(modules=["embed_tokens", "lm_head"]), seed=0, new_tokens=[3])
