"""The code on a model's card runs as it stands and gives the model that was trained; what it needs of the base is said."""

from __future__ import annotations

import re
import runpy
import shutil

import pytest
import torch
from tests.gguf_file import write_gguf
from tests.pipeline.helpers import recipe, stage
from tests.toys import model_folder

import tunesmith
from tunesmith.cli import _export_words
from tunesmith.models import load
from tunesmith.models.load import Embedded
from tunesmith.report._loading import loading_code

LORA = {"type": "lora", "r": 4}
PROMPT = torch.arange(5, 60)[None]
METHODS = [LORA, {"type": "bottleneck"}, {"type": "prefix", "num_virtual_tokens": 3}]


def card_logits(card, folder, monkeypatch) -> torch.Tensor:
    """Of the model that the card's code makes in a folder."""
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    (folder / "card.py").write_text(code)
    monkeypatch.chdir(folder)
    model = runpy.run_path("card.py")["model"].eval()
    with torch.no_grad():
        return model(input_ids=PROMPT).logits.float()


def live_logits(run, dtype="float32") -> torch.Tensor:
    with torch.no_grad():
        return tunesmith.load(run, dtype=dtype).model(input_ids=PROMPT).logits.float()


def same(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["type"])
def test_the_code_of_a_runs_card_and_of_its_adapters_gives_the_live_model(train, tiny, tmp_path, monkeypatch, method):
    run = train(method)
    want = live_logits(run)
    same(card_logits(run / "README.md", run, monkeypatch), want)
    done = tunesmith.export(run, "adapter", out=tmp_path / "mine")
    shutil.copytree(tiny, tmp_path / "tiny-llama")
    same(card_logits(done.path / "README.md", tmp_path, monkeypatch), want)


def test_the_code_of_a_whole_models_card_and_of_merged_weights_gives_the_live_model(train, tmp_path, monkeypatch):
    whole, run = train({"type": "full"}), train(LORA)
    same(card_logits(whole / "README.md", whole, monkeypatch), live_logits(whole))
    done = tunesmith.export(run, out=tmp_path / "merged")
    same(card_logits(done.path / "README.md", tmp_path, monkeypatch), live_logits(run))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_code_of_a_card_holds_the_base_in_the_bits_it_was_trained_on(tmp_path, monkeypatch, kind):
    # where a processor has bf16, bitsandbytes' own product rounds the blocks' scales to it; and its kernels want rows of whole blocks
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    base = model_folder(tmp_path / "base", hidden=128)
    given = recipe(tmp_path, base, stages=[stage(method=LORA, learning_rate=0.05)])
    given["model"]["quantization"] = kind
    run = tunesmith.train(given, out=tmp_path / "run").path
    want = live_logits(run, "float32" if kind == "nf4" else "auto")
    same(card_logits(run / "README.md", run, monkeypatch), want)
    done = tunesmith.export(run, "adapter", out=tmp_path / "adapter")
    same(card_logits(done.path / "README.md", tmp_path, monkeypatch), want)
    assert f"held in {kind}" in (run / "README.md").read_text()
    assert f"held in {kind}" in _export_words(done)


def test_an_adapter_with_new_tokens_is_loaded_with_rows_for_them(tmp_path, monkeypatch):
    base = model_folder(tmp_path / "base", template=None, markers=False)
    given = recipe(tmp_path, base, stages=[stage(method=LORA, learning_rate=0.05)])
    given["model"]["chat_template"] = "chatml"  # which brings two tokens
    run = tunesmith.train(given, out=tmp_path / "run").path
    done = tunesmith.export(run, "adapter", out=tmp_path / "adapter")
    same(card_logits(done.path / "README.md", tmp_path, monkeypatch), live_logits(run, "auto"))


@pytest.mark.parametrize("embedded", [True, False])
def test_the_base_that_was_a_gguf_file_is_said_and_the_cards_code_reads_that_file(tiny, tmp_path, monkeypatch, embedded):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "site" / "tiny_package" if embedded else tmp_path
    package.mkdir(parents=True, exist_ok=True)
    write_gguf(package / "small.gguf", tiny)
    if embedded:
        (package / "__init__.py").touch()
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.setitem(load.EMBEDDED, "tiny-embedded", Embedded("tiny_package", "small.gguf", "acme/Tiny", "pip install tiny"))
    name = "tiny-embedded" if embedded else package / "small.gguf"
    run = tunesmith.train(recipe(tmp_path, name, stages=[stage(method=LORA, learning_rate=0.05)]), out=tmp_path / "run").path
    want = live_logits(run)
    same(card_logits(run / "README.md", run, monkeypatch), want)
    done = tunesmith.export(run, "adapter", out=tmp_path / "adapter")
    same(card_logits(done.path / "README.md", tmp_path, monkeypatch), want)
    for text in ((run / "README.md").read_text(), (done.path / "README.md").read_text(), _export_words(done)):
        assert "the file small.gguf (GGUF), converted" in text
        assert "--to merged" in text
    assert "small.gguf" not in (tunesmith.export(run, out=tmp_path / "merged").path / "README.md").read_text()


def test_a_base_without_a_public_name_is_said_to_have_none(train, tmp_path):
    done = tunesmith.export(train(LORA), "adapter", out=tmp_path / "adapter")
    for text in ((done.path / "README.md").read_text(), _export_words(done)):
        assert "he base has no public name: it is the folder `tiny-llama`" in text


def test_a_base_of_the_hub_is_named_with_its_commit():
    base = {"name": "acme/small", "revision": "c" * 40}
    code = loading_code("me/tickets", {"name": "acme/small"}, base, {"peft_type": "LORA"}, published=True)
    assert f'from_pretrained("acme/small", revision="{"c" * 40}")' in code
    assert 'adapter = "me/tickets"' in code
