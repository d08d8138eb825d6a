"""Merged weights are the live model's, and where they are not nothing is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.pipeline.helpers import read_json, recipe, stage, write_rows
from tests.toys import model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith
from tunesmith.errors import AdapterError, CheckpointError, MissingFile, OutputInUse, RecipeError
from tunesmith.export import _parity
from tunesmith.models.load import load_model
from tunesmith.models.opening import open_result
from tunesmith.recipe import ModelSection, load_recipe
from tunesmith.rundir import verify_folder

LORA = {"type": "lora", "r": 4}
PROMPT = torch.arange(5, 60)[None]


def logits_of(folder) -> torch.Tensor:
    """By transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(PROMPT).logits


def live_logits(run, tiny) -> torch.Tensor:
    model = open_result(run / "model", load_model(ModelSection(name=str(tiny), dtype="float32")))
    with torch.no_grad():
        return model(PROMPT).logits


def test_transformers_alone_loads_the_merged_model_and_gives_the_live_models_logits(train, tiny, tmp_path):
    run = train(LORA)
    done = tunesmith.export(run, out=tmp_path / "merged")
    want, base = live_logits(run, tiny), logits_of(tiny)
    torch.testing.assert_close(logits_of(done.path), want, rtol=1e-4, atol=1e-4)
    assert (want - base).abs().max() > 0.1  # the tuning moved it
    assert done.parity.kl_mean <= 1e-6
    assert done.parity.prompts == 20  # every row, the held-out ones too
    assert AutoTokenizer.from_pretrained(done.path).chat_template
    verify_folder(done.path)


@pytest.mark.parametrize(
    "method",
    [
        {"type": "lora", "r": 4, "use_dora": True},
        {"type": "lora", "r": 4, "init_lora_weights": "pissa"},
        {"type": "lora", "r": 4, "use_rslora": True},
        {"type": "ia3"},
    ],
    ids=lambda method: "-".join(map(str, method.values())),
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_method_that_merges_gives_the_live_models_logits_with_new_tokens_too(method, tied, tmp_path):
    base = model_folder(tmp_path / "base", tied=tied, template=None, markers=False)
    given = recipe(tmp_path, base, stages=[stage(method=method, learning_rate=0.05)])
    given["model"]["chat_template"] = "chatml"  # which brings two tokens
    run = tunesmith.train(given, out=tmp_path / "run").path
    done = tunesmith.export(run, out=tmp_path / "merged")
    live = tunesmith.load(run, dtype="float32").model
    ids = torch.tensor([[257, 5, 60, 258, 257, 9, 80]])
    merged = AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, live(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert merged.get_input_embeddings().weight.shape[0] == 259


def test_an_adapter_on_another_stages_whole_model_leaves_merged_and_not_alone(tiny, tmp_path):
    stages = [stage("first", method={"type": "full"}), stage("second", start_from="first", method=LORA, learning_rate=0.05)]
    run = tunesmith.train(recipe(tmp_path, tiny, stages=stages), out=tmp_path / "run").path
    with pytest.raises(RecipeError, match="whole model of another stage"):
        tunesmith.export(run, "adapter", out=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert tunesmith.export(run, out=tmp_path / "merged").parity.kl_mean <= 1e-6


def test_a_reward_models_head_leaves_with_it(tiny, tmp_path):
    rows = [{"prompt": f"word {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(12)]
    reward = stage("reward", objective="reward", method=LORA, data={"train": str(write_rows(tmp_path / "pairs.jsonl", rows))})
    run = tunesmith.train(recipe(tmp_path, tiny, stages=[reward]), out=tmp_path / "run").path
    done = tunesmith.export(run, out=tmp_path / "merged")
    held, left = (load_file(folder / "heads.safetensors") for folder in (run / "model", done.path))
    assert held.keys() == left.keys() == {"score.weight"}
    assert torch.equal(held["score.weight"], left["score.weight"])


def test_the_certificate_is_written_with_the_model(train, tmp_path):
    done = tunesmith.export(train(LORA), out=tmp_path / "merged")
    card = read_json(done.path / "tunesmith.json")
    assert card["export"]["parity"] == {
        "prompts": done.parity.prompts,
        "positions": done.parity.positions,
        "kl_mean": done.parity.kl_mean,
        "kl_max": done.parity.kl_max,
    }
    text = (done.path / "README.md").read_text()
    assert "library_name: transformers" in text
    assert f"on {done.parity.prompts} rows" in text


def test_the_divergence_is_the_kl_of_the_two_models(train, tiny, tmp_path):
    """By hand, from whole logits: the base against the tuned model."""
    run = train(LORA)
    rows = _parity.compared_rows(run, None, load_recipe(run / "recipe.yaml"))[:3]
    model = load_model(ModelSection(name=str(tiny), dtype="float32")).model
    before = _parity.hidden_states(model, rows)
    before.keep_head(model.get_output_embeddings())
    tuned = AutoModelForCausalLM.from_pretrained(tunesmith.export(run, out=tmp_path / "merged").path, dtype=torch.float32)
    found = _parity.measure(before, tuned, rows)
    values = []
    for ids in rows:
        with torch.no_grad():
            p, q = (torch.log_softmax(one(torch.from_numpy(ids)[None]).logits[0], -1) for one in (model, tuned))
        values.append((p.exp() * (p - q)).sum(-1))
    assert found.kl_mean == pytest.approx(float(torch.cat(values).mean()), rel=1e-4)
    assert found.kl_max == pytest.approx(float(torch.cat(values).max()), rel=1e-4)
    assert found.positions == sum(map(len, rows))


def test_a_merge_that_is_not_the_live_model_writes_nothing(train, tmp_path, monkeypatch):
    run = train(LORA)
    plain = _parity.hidden_states

    def elsewhere(model, rows):
        found = plain(model, rows)
        if not hasattr(model, "peft_config"):  # the merged one
            found.rows = [hidden + 0.5 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)) for hidden in found.rows]
        return found

    monkeypatch.setattr(_parity, "hidden_states", elsewhere)
    with pytest.raises(AdapterError, match="nothing was written"):
        tunesmith.export(run, out=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_there_stays_when_a_new_one_fails(train, tmp_path, monkeypatch):
    run = train(LORA)
    first = tunesmith.export(run, out=tmp_path / "merged").path
    held = {file.name: file.read_bytes() for file in first.iterdir()}
    monkeypatch.setattr(_parity, "MAX_KL", -1.0)
    with pytest.raises(AdapterError):
        tunesmith.export(run, out=tmp_path / "merged", force=True)
    assert {file.name: file.read_bytes() for file in first.iterdir()} == held


def test_an_export_that_is_there_is_replaced_by_force_alone(train, tmp_path):
    first = tunesmith.export(train(LORA), "adapter", out=tmp_path / "adapter").path
    (first / "model.gguf").write_text("made of it")
    with pytest.raises(OutputInUse, match="an export is there already") as refused:
        tunesmith.export(train(LORA), "adapter", out=first)
    assert "--force" in refused.value.mend
    assert (first / "model.gguf").exists()
    tunesmith.export(train(LORA), "adapter", out=first, force=True)
    assert not (first / "model.gguf").exists()


def test_a_narrow_dtype_is_held_against_the_live_model_too(train, tmp_path):
    done = tunesmith.export(train(LORA), out=tmp_path / "merged", dtype="bfloat16")
    tensors = load_file(done.path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((done.path / "config.json").read_text())["dtype"] == "bfloat16"
    assert 0 < done.parity.kl_mean <= 1e-3


def test_an_altered_result_is_not_exported(train, tmp_path):
    run = shutil.copytree(train(LORA), tmp_path / "run", symlinks=True)
    weights = run / "stages" / "sft" / "model" / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(CheckpointError):
        tunesmith.export(run, out=tmp_path / "merged")


def test_an_adapter_is_not_merged_into_another_base(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    run = tunesmith.train(recipe(tmp_path, base, stages=[stage(method=LORA)]), out=tmp_path / "run").path
    tensors = {name: tensor + 0.01 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="trained on another base"):
        tunesmith.export(run, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_whole_model_is_copied_byte_for_byte(train, tmp_path):
    run = train({"type": "full"})
    done = tunesmith.export(run, out=tmp_path / "merged")
    assert (done.path / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    assert done.parity is None
    assert "a whole model already" in done.notes[0]


def test_a_whole_model_is_cast_to_the_dtype_that_is_asked_for_and_held_against_its_own(train, tmp_path):
    run = train({"type": "full"})
    assert tunesmith.export(run, out=tmp_path / "same", dtype="float32").parity is None  # it is in that dtype
    done = tunesmith.export(run, out=tmp_path / "cast", dtype="bfloat16")
    held, left = (load_file(folder / "model.safetensors") for folder in (run / "model", done.path))
    assert held.keys() == left.keys()
    assert all(torch.equal(left[name], held[name].bfloat16()) for name in held)
    assert json.loads((done.path / "config.json").read_text())["dtype"] == "bfloat16"
    assert 0 < done.parity.kl_mean <= 1e-3
    assert "The weights are cast (bfloat16)" in (done.path / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(done.path).chat_template


@pytest.mark.parametrize("method", [LORA, {"type": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize(
    "to, dtype, words", [("merged", "int3", "no dtype is called int3"), ("adapter", "bfloat16", "an adapter leaves in")]
)
def test_a_dtype_that_is_none_or_that_an_adapter_is_asked_for_is_refused(train, tmp_path, method, to, dtype, words):
    with pytest.raises(RecipeError, match=words):
        tunesmith.export(train(method), to, out=tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_leaves_with_its_bases_name_and_no_path_of_this_machine(train, tiny, tmp_path):
    run = train(LORA)
    done = tunesmith.export(run, "adapter", out=tmp_path / "adapter")
    assert read_json(done.path / "adapter_config.json")["base_model_name_or_path"] == "tiny-llama"
    assert (done.path / "adapter_model.safetensors").read_bytes() == (run / "model" / "adapter_model.safetensors").read_bytes()
    for file in done.path.iterdir():
        if file.suffix != ".safetensors":
            assert str(tiny) not in file.read_text()
            assert str(run) not in file.read_text()


@pytest.mark.parametrize(
    "how, error, words",
    [
        ({"to": "gguf"}, RecipeError, "nothing is exported to `gguf`"),
        ({"stage": "ppo"}, MissingFile, "stages with a result: sft"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_what_can(train, tmp_path, how, error, words):
    with pytest.raises(error) as caught:
        tunesmith.export(train(LORA), out=tmp_path / "merged", **how)
    assert words in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_a_folder_of_something_else_is_never_replaced(train, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds something else"):
        tunesmith.export(train(LORA), out=tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(MissingFile, match="no run directory"):
        tunesmith.export(tmp_path)


@pytest.mark.parametrize(("too_long", "lengths"), [("cut", {40}), ("drop", set())])
def test_models_are_compared_on_rows_as_they_were_trained(train, too_long, lengths, monkeypatch):
    """Rows beyond the limit lie whole in the store, and one of them may be longer than the model's context."""
    run = train(LORA)
    given = load_recipe(run / "recipe.yaml")
    section = given.data.model_copy(update={"max_length": 40, "too_long": too_long})
    whole, fitted = (_parity.compared_rows(run, None, given.model_copy(update={"data": data})) for data in (given.data, section))
    assert min(map(len, whole)) > 40
    assert {len(ids) for ids in fitted} == lengths
    assert all((ids == other[:40]).all() for ids, other in zip(fitted, whole, strict=False))
