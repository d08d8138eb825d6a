"""`tunesmith.load`: a result of any method comes back with its base, tokenizer and heads, in one call; what is not whole is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith
from tests.fresh import in_new_process
from tests.models.method_cases import METHOD_CASES
from tests.toys import make_items, make_rows, make_stage, model_folder, train_stage
from tunesmith.errors import AdapterError, CheckpointError, MissingFile, ModelError
from tunesmith.models.load import load_model
from tunesmith.recipe import ModelSection

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])


def trained(folder: Path, method: dict, **settings) -> tuple[Path, torch.Tensor]:
    """(a run of one stage, the tuned model's logits)."""
    base = load_model(ModelSection(name=str(model_folder(folder / "base")), dtype="float32"))
    rows = make_items(6) if settings.get("objective") == "reward" else make_rows(12)
    model = train_stage(base, make_stage(method=method, max_steps=2, **settings), folder / "run", rows)
    (folder / "run" / "recipe.yaml").write_text("name: tiny\n")
    (folder / "run" / "model").symlink_to("stages/sft/model")
    (model.get_base_model() if hasattr(model, "get_base_model") else model).set_attn_implementation("sdpa")
    with torch.no_grad():
        return folder / "run", model(IDS).logits


def logits(result) -> torch.Tensor:
    with torch.no_grad():
        return result.model(IDS).logits


@pytest.mark.parametrize("method", METHOD_CASES)
def test_a_run_a_stages_folder_and_an_adapters_folder_load_to_the_trained_models_logits(tmp_path, method):
    run, expected = trained(tmp_path, METHOD_CASES[method])
    shutil.copytree(run / "stages" / "sft" / "model", tmp_path / "elsewhere")
    for path in (run, str(run / "stages" / "sft" / "model"), tmp_path / "elsewhere"):
        result = tunesmith.load(path, dtype="float32")
        torch.testing.assert_close(logits(result), expected, rtol=0, atol=1e-5)
        assert not result.model.training
        assert result.tokenizer.chat_template
        assert len(result.heads) == 0


def test_in_a_new_process_the_logits_are_the_same_to_the_bit(tmp_path):
    run, _ = trained(tmp_path, METHOD_CASES["houlsby"])
    code = "import sys, torch, tunesmith\ntorch.set_num_threads(1)\n"
    code += "model = tunesmith.load(sys.argv[1], dtype='float32').model\nwith torch.no_grad():\n"
    code += f"    print(model(torch.tensor({IDS.tolist()})).logits.double().sum().item())"
    done = in_new_process(code, run)
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert float(done.stdout) == logits(tunesmith.load(run, dtype="float32")).double().sum().item()
    torch.set_num_threads(threads)


def test_a_reward_model_comes_with_its_score_head(tmp_path):
    run, _ = trained(tmp_path, METHOD_CASES["pfeiffer"], objective="reward")
    result = tunesmith.load(run, dtype="float32")
    saved = load_file(run / "model" / "heads.safetensors")
    assert torch.equal(result.heads["score"].weight, saved["score.weight"])


def test_a_base_that_was_moved_is_named_and_another_one_refused(tmp_path):
    run, expected = trained(tmp_path, METHOD_CASES["lora"])
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(AdapterError, match=r"its base model, base, is not where it was[\s\S]*base=FOLDER"):
        tunesmith.load(run)
    torch.testing.assert_close(logits(tunesmith.load(run, base=tmp_path / "moved", dtype="float32")), expected, rtol=0, atol=1e-5)
    with pytest.raises(AdapterError, match="trained on another base"):
        tunesmith.load(run, base=model_folder(tmp_path / "other", seed=1))


def test_an_adapter_that_another_tool_wrote_is_loaded_with_its_bases_tokenizer(tmp_path):
    run, expected = trained(tmp_path, METHOD_CASES["lora"])
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "model" / name, plain / name)
    result = tunesmith.load(plain, dtype="float32")
    torch.testing.assert_close(logits(result), expected, rtol=0, atol=1e-5)
    assert len(result.tokenizer) == result.model.get_input_embeddings().weight.shape[0]
    config = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="which has no name, is not where it was"):
        tunesmith.load(plain)


def test_what_holds_no_result_and_what_was_altered_is_refused(tmp_path):
    with pytest.raises(MissingFile, match="no result is here"):
        tunesmith.load(tmp_path / "absent")
    run, _ = trained(tmp_path, METHOD_CASES["parallel"])
    file = run / "model" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors was altered"):
        tunesmith.load(run)
    (run / "model").unlink()
    with pytest.raises(MissingFile, match="no result is here"):
        tunesmith.load(run)


def test_an_embedded_or_a_hubs_base_is_found_by_its_name(tmp_path, monkeypatch):
    run, _ = trained(tmp_path, METHOD_CASES["lora"])
    seen = []

    def look(section):
        seen.append((section.name, section.revision))
        raise ModelError("not here")

    monkeypatch.setattr("tunesmith.models.opening.load_model", look)
    for name, revision in (("HuggingFaceTB/SmolLM2-135M-Instruct", None), ("owner/model", "a" * 40)):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(run / "model", folder)
        (folder / "manifest.json").unlink()
        (folder / "tunesmith.json").unlink()
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name, "revision": revision}))
        with pytest.raises(ModelError, match="not here"):
            tunesmith.load(folder)
    assert seen == [("smollm2-135m-instruct", None), ("owner/model", "a" * 40)]
