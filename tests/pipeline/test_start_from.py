"""Going on from a result: a template's new tokens, a run that was moved, and adapters that PEFT wrote with a head of their own."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.pipeline.helpers import conversations, read_json, recipe, stage, write_rows
from tests.toys import model_folder
from transformers import AutoModelForCausalLM

import tunesmith
from tunesmith.errors import RecipeError

IDS = torch.arange(40, 60)[None]
LORA = {"type": "lora", "r": 2}
ONLY_TUNED = {"candidates": ["tuned"], "gates": []}


def chatml(folder, base, stages, *, template: str = "chatml", **changed):
    """A recipe on a base that has neither a chat template nor its tokens."""
    made = recipe(folder, base, stages=stages, evaluate=ONLY_TUNED, **changed)
    return made | {"model": made["model"] | {"chat_template": template}}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A base without a chat template and its tokens."""
    return model_folder(tmp_path_factory.mktemp("bare") / "base", template=None, markers=False, tied=False)


@pytest.fixture(scope="module", params=["full", "lora"])
def on_texts(request, bare, tmp_path_factory):
    """(a run on documents, which needs no template; its method)."""
    folder = tmp_path_factory.mktemp("texts")
    made = recipe(folder, bare, stages=[stage(method=request.param)])
    rows = [{"text": row["messages"][0]["content"]} for row in conversations(12)]
    made["data"] = {"train": str(write_rows(folder / "texts.jsonl", rows)), "format": "text", "validation": 0.0}
    return tunesmith.train(made, out=folder / "run").path, request.param


def test_after_texts_a_chat_templates_tokens_train_on_a_whole_model_and_an_adapter_without_them_is_refused(bare, on_texts, tmp_path):
    start, method = on_texts
    if method == "lora":
        with pytest.raises(RecipeError, match="brings tokens that the adapter of start_from has no rows for") as caught:
            tunesmith.train(chatml(tmp_path, bare, [stage(start_from=str(start))]), out=tmp_path / "run")
        assert caught.value.where == "stages.sft.start_from"
        return
    for tuned in ("full", "lora"):
        made = chatml(tmp_path, bare, [stage(start_from=str(start), method=LORA if tuned == "lora" else None)])
        run = tunesmith.run(made, out=tmp_path / tuned).path
        result = tunesmith.load(run, dtype="float32")
        new = result.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        assert not torch.equal(*result.model.get_input_embeddings().weight[new])
        merged = AutoModelForCausalLM.from_pretrained(tunesmith.export(run).path)
        torch.testing.assert_close(logits(merged), logits(result.model), rtol=1e-4, atol=1e-4)
        assert tunesmith.Chat(run, max_new_tokens=2).ask("hello") is not None
        assert read_json(run / "evaluation.json")["tasks"]["task"]["candidates"]["tuned"]["metrics"]["perplexity"]["value"] > 1


def test_an_adapter_that_has_rows_for_the_templates_tokens_goes_on(bare, tmp_path):
    stages = [stage("one", method=LORA), stage("two", start_from="one")]
    run = tunesmith.train(chatml(tmp_path, bare, stages), out=tmp_path / "run").path
    one, two = (load_file(run / "stages" / name / "model" / "adapter_model.safetensors") for name in ("one", "two"))
    moved = [name for name in one if "token_adapter" in name and not torch.equal(one[name], two[name])]
    assert len(moved) == 2  # in the embeddings and in the head


def test_a_whole_model_with_other_tokens_than_the_rows_is_refused(bare, tmp_path):
    other = tmp_path / "other.jinja"
    other.write_text(
        "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    start = tunesmith.train(chatml(tmp_path, bare, [stage(method="full")], template=str(other)), out=tmp_path / "one").path
    with pytest.raises(RecipeError, match="other tokens than the recipe's base"):
        tunesmith.train(chatml(tmp_path, bare, [stage(start_from=str(start))]), out=tmp_path / "two")


def test_an_adapter_on_an_earlier_stages_whole_model_is_loaded_and_exported_after_its_run_was_moved(tiny, tmp_path):
    stages = [stage("another", method="full", seed=1), stage("one", method="full"), stage("two", start_from="one", method=LORA)]
    run = tunesmith.train(recipe(tmp_path, tiny, stages=stages), out=tmp_path / "run").path
    want = logits(tunesmith.load(run, dtype="float32").model)
    moved = shutil.move(run, tmp_path / "moved")
    torch.testing.assert_close(logits(tunesmith.load(moved, dtype="float32").model), want, rtol=0, atol=0)
    merged = AutoModelForCausalLM.from_pretrained(tunesmith.export(moved).path)
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-4)


def peft_adapter(base, folder, **settings):
    """An adapter as PEFT alone writes it, with random weights."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False, **settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def test_a_stage_that_goes_on_with_an_adapter_stands_on_the_whole_model_that_it_was_trained_on(tiny, tmp_path):
    quick = {"max_steps": 1, "learning_rate": 1e-2}
    stages = [
        stage("one", method="full", **quick),
        stage("two", method=LORA, start_from="one", **quick),
        stage("three", start_from="two", **quick),
    ]
    made = recipe(tmp_path, tiny, stages=stages, evaluate=ONLY_TUNED)
    run = tunesmith.run(made, out=tmp_path / "run").path
    results = [run / "stages" / name / "model" for name in ("one", "two", "three")]
    cards = [read_json(folder / "tunesmith.json") for folder in results]
    assert cards[1]["base"]["sha256"] == cards[2]["base"]["sha256"] != cards[0]["base"]["sha256"]
    two, three = (load_file(folder / "adapter_model.safetensors") for folder in results[1:])
    assert any(not torch.equal(two[name], three[name]) for name in two)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(results[0]), results[2]).eval()
    torch.testing.assert_close(logits(tunesmith.load(run, dtype="float32").model), logits(theirs), atol=1e-5, rtol=1e-5)
    assert tunesmith.run(made, out=run, resume=True).path == run  # its stages are those of this recipe


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_an_adapter_with_a_head_of_its_own_trains_on_and_is_saved_as_peft_reads_it(tmp_path, objective):
    base = model_folder(tmp_path / "base", tied=False)
    start = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    made = recipe(tmp_path, base, stages=[stage(start_from=str(start), objective=objective)])
    if objective == "dpo":
        pairs = [{"prompt": row["messages"][0]["content"], "chosen": "red", "rejected": "blue"} for row in conversations(12)]
        made["data"] = {"train": str(write_rows(tmp_path / "pairs.jsonl", pairs)), "validation": 0.0}
    run = tunesmith.train(made, out=tmp_path / "run").path
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, run / "model"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "model")
    torch.testing.assert_close(logits(tunesmith.load(run, dtype="float32").model), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [None, "lora"])
def test_an_adapter_whose_low_rank_update_is_of_the_head_is_refused_by_its_folder(tmp_path, method):
    base = model_folder(tmp_path / "base", tied=False)
    start = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(RecipeError, match="`lm_head` matches no linear layer") as caught:
        tunesmith.train(recipe(tmp_path, base, stages=[stage(start_from=str(start), method=method)]), out=tmp_path / "run")
    assert caught.value.where == str(start)
