"""Stretched rotary positions: transformers' own frequencies, longer rows, and no adapter on other positions than it was trained on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tests.families import FAMILIES, tiny_model
from tests.toys import Rows, batch_of, make_rows, make_stage, model_folder, stage_inputs, tiny_tokenizer, train_stage
from transformers import AutoModelForCausalLM, LlamaConfig

import tunesmith
from tunesmith.errors import AdapterError, ModelError
from tunesmith.models.load import load_model
from tunesmith.models.methods import attach, load_adapter, save_result
from tunesmith.models.opening import open_result
from tunesmith.models.policy import Policy
from tunesmith.models.positions import scale_positions
from tunesmith.models.result import CARD
from tunesmith.recipe import LoraMethod, ModelSection, RopeScaling
from tunesmith.train.stage import stage_fingerprint

IDS = torch.tensor([[5, 9, 40, 77, 12, 80, 66, 33]])
SCALINGS = {"linear": RopeScaling(rope_type="linear", factor=4.0), "yarn": RopeScaling(rope_type="yarn", factor=2.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "llama")  # its context is 512


def base(folder, scaling: RopeScaling | None = None):
    return load_model(ModelSection(name=str(folder), dtype="float32", rope_scaling=scaling))


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_scaled_model_is_transformers_own_with_that_config(folder, kind):
    ours = base(folder, SCALINGS[kind])
    stored = json.loads((folder / "config.json").read_text())
    rope = {**stored["rope_parameters"], "rope_type": kind, "factor": SCALINGS[kind].factor}
    rope |= {"original_max_position_embeddings": 512} if kind == "yarn" else {}
    longer = int(512 * SCALINGS[kind].factor)
    config = LlamaConfig(**(stored | {"rope_parameters": rope, "max_position_embeddings": longer}))
    theirs = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    ids = torch.randint(97, (1, 700), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got, plain = (model(ids).logits for model in (theirs, ours.model, base(folder).model))
    assert torch.equal(got, want)
    assert (want - plain).abs().max() > 1e-2
    assert (ours.context, base(folder).context) == (longer, 512)


def test_rows_beyond_the_old_context_train_and_the_result_opens_with_the_same_positions(folder, tmp_path):
    row = np.arange(600) % 90, np.r_[0, np.ones(599)].astype(np.float32)
    origin = base(folder, SCALINGS["yarn"])
    rows = Rows([row])
    model = train_stage(origin, make_stage(method="lora", max_steps=2), tmp_path / "run", rows)
    result = tmp_path / "run" / "stages" / "sft" / "model"
    assert json.loads((result / CARD).read_text())["rope_scaling"] == {"rope_type": "yarn", "factor": 2.0}
    want = Policy(model)(batch_of(rows).forest).logprobs
    for again in (
        tunesmith.load(result, base=folder, dtype="float32").model,
        tunesmith.load(result, dtype="float32").model,
        open_result(result, base(folder, SCALINGS["yarn"])),
    ):
        torch.testing.assert_close(Policy(again)(batch_of(rows).forest).logprobs, want, rtol=1e-6, atol=1e-6)


def test_an_adapter_is_refused_on_other_positions_than_it_was_trained_on(folder, tmp_path):
    origin = base(folder, SCALINGS["yarn"])
    save_result(attach(origin, LoraMethod(r=4), seed=0), origin, tmp_path, {})
    for other in (None, SCALINGS["linear"], RopeScaling(rope_type="yarn", factor=3.0)):
        with pytest.raises(AdapterError, match=r"positions are scaled by .*yarn") as caught:
            load_adapter(base(folder, other), tmp_path)
        assert 'model.rope_scaling: {"factor": 2.0, "rope_type": "yarn"}' in caught.value.mend


def test_a_whole_result_has_the_scaling_in_its_config_and_is_not_scaled_twice(folder, tmp_path):
    origin = base(folder, SCALINGS["linear"])
    save_result(origin.model, origin, tmp_path, {})
    for asked in (None, SCALINGS["linear"]):
        again = base(tmp_path, asked)
        assert torch.equal(again.model(IDS).logits, origin.model(IDS).logits)
        assert (again.context, again.rope_scaling) == (2048, None)
    with pytest.raises(ModelError, match=r"scaled already \(linear, factor 4.0\)"):
        base(tmp_path, SCALINGS["yarn"])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_model_without_rotary_embeddings_is_refused(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no rotary position embeddings"):
        base(tmp_path, SCALINGS["linear"])


def test_of_layers_with_frequencies_of_their_own_those_without_a_window_are_scaled():
    config = FAMILIES["gemma3"]()
    assert scale_positions(config, SCALINGS["linear"])
    assert {name: part["rope_type"] for name, part in config.rope_parameters.items()} == {
        "full_attention": "linear",
        "sliding_attention": "default",
    }


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_scaling_that_depends_on_the_batch_is_refused_with_the_reason(kind):
    with pytest.raises(ValueError, match="longest row of a batch"):
        RopeScaling(rope_type=kind, factor=2.0)
    with pytest.raises(ValueError, match="greater than 1"):
        RopeScaling(rope_type="linear", factor=1.0)


def test_the_fingerprint_of_a_stage_covers_the_scaling(folder, tmp_path):
    prints = []
    for scaling in (None, *SCALINGS.values()):
        loaded = base(folder, scaling)
        inputs = stage_inputs(loaded, make_rows(4), tmp_path / "tokens")
        prints.append(stage_fingerprint(make_stage(), loaded, inputs.data, None, None, 0, tmp_path))
    assert len({*prints}) == 3
