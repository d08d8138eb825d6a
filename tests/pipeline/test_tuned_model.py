"""On a real model: what was trained is what is saved, loaded, evaluated and talked to, and it stops."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from tests.pipeline.helpers import read_json, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith
from tunesmith.data.forest import build_forest
from tunesmith.data.read import read_records
from tunesmith.data.records import Message
from tunesmith.data.render import encode_prompt, render, stop_tokens
from tunesmith.data.template import load_template
from tunesmith.evaluate import TemplateEncoder
from tunesmith.evaluation import open_result
from tunesmith.generate import LocalGenerator
from tunesmith.models.load import load_model
from tunesmith.recipe import DataSection, ModelSection
from tunesmith.train import stage as stage_module

PAIRS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "pig": "oink", "sheep": "baa", "horse": "neigh", "lion": "roar",
    "owl": "hoot", "bee": "buzz", "frog": "croak", "snake": "hiss", "crow": "caw", "mouse": "squeak", "hen": "cluck", "wolf": "howl",
    "goat": "maa", "bird": "tweet", "bear": "growl", "donkey": "hee-haw",
}  # fmt: skip
STEPS = 50
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
UPPER = [f"layers.{layer}.{name}" for layer in range(20, 30) for name in LINEAR]  # below them the backward pass has nothing to do


def question(animal: str) -> str:
    return f"Sound of a {animal}?"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """SmolLM2-135M-Instruct taught 20 short answers by heart; with what the trainer's own policy says of them at the end."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = [{"messages": [{"role": "user", "content": question(a)}, {"role": "assistant", "content": s}]} for a, s in PAIRS.items()]
    train = write_rows(folder / "train.jsonl", rows)
    recipe = {
        "name": "sounds",
        "model": {"name": "smollm2-135m-instruct"},
        "data": {"train": str(train), "validation": 0.0},
        "stages": [
            {
                "name": "sft",
                "objective": "sft",
                "method": {"type": "lora", "r": 8, "target_modules": UPPER},
                "learning_rate": 2e-3,
                "max_steps": STEPS,
                "per_device_train_batch_size": 4,
                "save_steps": STEPS,
            }
        ],
        "evaluate": {"max_new_tokens": 12},
    }
    kept = SimpleNamespace()

    def train_and_ask(job):
        progress = plain_train(job)
        kept.rows = [job.source.source.items[i][0] for i in range(len(PAIRS))]
        forest = build_forest(kept.rows)
        with torch.no_grad(), job.policy.deterministic():
            logprobs_S = job.policy(forest).logprobs.numpy()
        kept.logprobs = [logprobs_S[forest.row_S == row] for row in range(len(kept.rows))]
        return progress

    plain_train = stage_module.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "train", train_and_ask)
        kept.run = tunesmith.train(recipe, out=folder / "run").path
    kept.records = read_records(str(train), DataSection(train=str(train))).records
    kept.base = load_model(ModelSection(name="smollm2-135m-instruct"))
    kept.template = load_template(kept.base.tokenizer, ModelSection(name="smollm2-135m-instruct"))
    kept.prompts = [encode_prompt(record.prompt(), kept.template, kept.base.tokenizer).tolist() for record in kept.records]
    kept.answers = [TemplateEncoder(kept.template, kept.base.tokenizer).answer(r.prompt(), r.answer).tolist() for r in kept.records]
    kept.of_base = LocalGenerator(kept.base.model, kept.base.tokenizer).logprobs(kept.prompts, kept.answers)
    kept.model = open_result(kept.run / "model", load_model(ModelSection(name="smollm2-135m-instruct")))
    stops = stop_tokens(kept.template, kept.base.tokenizer)
    kept.generator = LocalGenerator(kept.model, kept.base.tokenizer, stop_ids=stops)
    return kept


def test_after_fifty_steps_of_overfitting_all_twenty_prompts_stop_at_the_end_of_turn(tuned):
    made = tuned.generator.generate(tuned.prompts, max_new_tokens=12)
    (end,) = stop_tokens(tuned.template, tuned.base.tokenizer)
    assert tuned.base.tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"
    assert [one.finish_reason for one in made] == ["stop"] * 20
    assert [one.token_ids[-1] for one in made] == [end] * 20
    assert [one.text for one in made] == list(PAIRS.values())


def test_training_evaluation_and_chat_see_the_same_prompt_ids_and_no_token_that_the_template_did_not_write(tuned, monkeypatch):
    tokenizer = tuned.base.tokenizer
    for record, prompt, answer in zip(tuned.records, tuned.prompts, tuned.answers, strict=True):
        rendered = render(record, tuned.template, tokenizer)
        assert rendered.ids[: rendered.prompt_length].tolist() == prompt
        assert TemplateEncoder(tuned.template, tokenizer).prompt(record.prompt()).tolist() == prompt
        assert rendered.ids[rendered.prompt_length : rendered.prompt_length + len(answer)].tolist() == answer
        assert np.flatnonzero(rendered.weights).tolist() == list(range(rendered.prompt_length, rendered.prompt_length + len(answer)))
        text = tokenizer.apply_chat_template([m.to_hf() for m in record.messages], tokenize=False)
        assert rendered.ids.tolist().count(tokenizer.bos_token_id) == text.count(tokenizer.bos_token)
        assert tokenizer.decode(rendered.ids) == text
    chat = tunesmith.Chat(tuned.run)
    asked = []
    answer_to = chat.generator.generate
    monkeypatch.setattr(chat.generator, "generate", lambda prompts, **how: asked.extend(prompts) or answer_to(prompts, **how))
    assert chat.ask(question("cat")) == "meow"
    assert asked == [tuned.prompts[0]]
    assert chat.answer([Message("user", question("cow"))]) == "moo"
    assert chat.ask(question("dog"))
    assert asked[-1][: len(tuned.prompts[0])] == tuned.prompts[0]
    chat.reset()
    assert chat.ask(question("dog")) == "woof"
    assert asked[-1] == tuned.prompts[1]


def test_the_reloaded_adapter_gives_the_log_probs_of_the_trainers_policy_and_not_those_of_the_base(tuned):
    reloaded = tuned.generator.logprobs(tuned.prompts, tuned.answers)
    by_ids = {tuple(prompt + answer): i for i, (prompt, answer) in enumerate(zip(tuned.prompts, tuned.answers, strict=True))}
    tolerance = 1e-3 if tuned.base.dtype == torch.float32 else 0.1
    for (ids, weights), trainer in zip(tuned.rows, tuned.logprobs, strict=True):
        i = by_ids[tuple(int(token) for token in ids[: int(np.flatnonzero(weights)[-1]) + 1])]
        np.testing.assert_allclose(reloaded[i], trainer, atol=tolerance)
    assert min(float(np.sum(after - before)) for after, before in zip(reloaded, tuned.of_base, strict=True)) > 1


def test_plain_peft_and_transformers_load_the_run_and_give_the_same_logits(tuned):
    folder = tuned.run / "model"
    base_folder = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=tuned.base.dtype)
    plain = PeftModel.from_pretrained(base, folder).eval()
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": question("cat")}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert ids[0].tolist() == tuned.prompts[0]
    with torch.no_grad():
        theirs, ours = plain(ids).logits, tuned.model(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-4)


def test_the_card_names_the_base_by_its_public_name_and_hash_and_no_path(tuned):
    text = (tuned.run / "model" / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in text
    assert tuned.base.identity.sha256 in text
    assert tuned.base.identity.folder not in text
    assert str(tuned.run) not in text
    assert read_json(tuned.run / "model" / "tunesmith.json")["base"]["name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
