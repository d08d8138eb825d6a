"""Reward models at work: the trained score comes back after a save, is read at the answer's last token in whatever company, and a result
without a head, on another base or altered is an error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.toys import loaded, make_items, make_stage, model_folder, tiny_model, tiny_tokenizer, train_stage
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tunesmith.data.batching import DatasetSource
from tunesmith.data.forest import build_forest
from tunesmith.data.records import Message
from tunesmith.data.template import load_template
from tunesmith.errors import AdapterError, CheckpointError, ModelError
from tunesmith.models.heads import HEADS, make_head, save_heads
from tunesmith.models.load import load_model
from tunesmith.models.methods import attach, save_result
from tunesmith.models.policy import Policy
from tunesmith.models.reward import Foreign, Scored, Separate, Shared, open_reward_model
from tunesmith.objectives import OBJECTIVES
from tunesmith.recipe import FullMethod, LoraMethod, ModelSection, RewardObjective
from tunesmith.rundir import atomic_folder, read_events
from tunesmith.train import stage as module
from tunesmith.train.loop import train
from tunesmith.train.stage import add_new_tokens
from tunesmith.train.window import run_window

PAIRS = make_items(12)
ANSWERS = [Scored((Message("user", f"q{i}"),), f"a{i}", ids) for i, (ids, _) in enumerate(PAIRS.rows)]
LORA = LoraMethod(r=4)


def trained(path: Path, method: LoraMethod | FullMethod = LORA, base=None) -> tuple[Policy, Path]:
    """A reward model after some updates, as it is in memory, and its folder."""
    kept = {}
    stage = make_stage(name="reward", objective="reward", method=method, max_steps=12, rows=len(PAIRS), learning_rate=2e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", lambda job: kept.update(policy=job.policy) or train(job))
        train_stage(base or loaded(tiny_model("llama")), stage, path, PAIRS)
    return kept["policy"], path / "stages" / "reward" / "model"


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A trained reward model on a LoRA: (in memory, folder)."""
    return trained(tmp_path_factory.mktemp("reward") / "run")


def in_memory(policy: Policy, rows) -> np.ndarray:
    """Each row's score, alone."""
    with torch.no_grad(), policy.deterministic():
        return np.array([float(policy(build_forest([row]), {"scores"}).scores[0]) for row in rows])


def opened(folder: Path, *, settings: LoraMethod = LORA) -> tuple[Shared, Policy]:
    """A reward model beside a policy's own adapter, which is not fresh."""
    base = loaded(tiny_model("llama"))
    model = attach(base, settings, seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(5))
    shared = open_reward_model(folder, base, model, "reward_0")
    shared.policy = Policy(model)
    return shared, shared.policy


def test_a_reward_model_learns_its_pairs(reward):
    policy, folder = reward
    scores = in_memory(policy, PAIRS.rows).reshape(-1, 2)
    assert (scores[:, 0] > scores[:, 1]).mean() == 1
    lines = [event for event in read_events(folder.parents[2]) if "loss" in event]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["accuracy"] == 1


def test_a_saved_reward_model_beside_another_adapter_scores_as_it_did_in_memory(reward):
    policy, folder = reward
    shared, beside = opened(folder)
    assert isinstance(shared, Shared)
    want = in_memory(policy, PAIRS.rows)
    before = in_memory_logprobs(beside)
    np.testing.assert_allclose(shared.scores(ANSWERS), want, rtol=1e-4, atol=1e-4)
    assert want.std() > 0.1
    assert torch.equal(in_memory_logprobs(beside), before)
    assert all(".default." in name for name, parameter in beside.named_parameters() if parameter.requires_grad)


def in_memory_logprobs(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy(build_forest(PAIRS.rows[:4])).logprobs


def test_a_fully_tuned_reward_model_scores_as_it_did_in_memory_with_the_policys_tokens(tmp_path):
    folder = model_folder(tmp_path / "base")
    base = load_model(ModelSection(name=str(folder), dtype="float32"))
    policy, result = trained(tmp_path / "run", FullMethod(), base)
    want = in_memory(policy, PAIRS.rows)
    found = open_reward_model(result, load_model(ModelSection(name=str(folder), dtype="float32")), None, "reward")
    assert isinstance(found, Separate)
    assert found.writer is None
    assert not found.policy.fast_paths.used
    np.testing.assert_allclose(found.scores(ANSWERS), want, rtol=1e-4, atol=1e-4)


def test_a_score_does_not_depend_on_what_is_packed_beside_the_row(reward):
    policy, folder = reward
    shared, _ = opened(folder)
    alone = np.array([float(shared.scores([answer])[0]) for answer in ANSWERS])
    np.testing.assert_allclose(shared.scores(ANSWERS), alone, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shared.scores(ANSWERS[::-1])[::-1], alone, rtol=1e-4, atol=1e-4)
    long = [(np.r_[np.arange(1, 31), ids], weights) for ids, weights in PAIRS.rows[:6]]  # so long a beginning is held once
    long = [(ids, np.r_[np.zeros(30), weights].astype(np.float32)) for ids, weights in long]
    together = build_forest(long)
    assert len(together.tokens_T) < sum(len(ids) for ids, _ in long)
    with torch.no_grad():
        np.testing.assert_allclose(policy(together, {"scores"}).scores.numpy(), in_memory(policy, long), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", [1, 3])
def test_an_end_of_text_inside_a_row_is_not_taken_for_its_end(reward, place):
    policy, folder = reward
    shared, _ = opened(folder)
    rows = [(np.r_[ids[:place], 0, ids[place:]], None) for ids, _ in PAIRS.rows[:6]]  # 0 is end of text and padding of these models
    answers = [Scored((), "", ids) for ids, _ in rows]
    states = tiny_states(policy, rows)
    np.testing.assert_allclose(shared.scores(answers), states, rtol=1e-4, atol=1e-4)


def tiny_states(policy: Policy, rows) -> np.ndarray:
    """The head on the last token's hidden state by the backbone's own plain forward, each row alone."""
    plain = Policy(policy.model, fast=False)
    found = []
    with torch.no_grad(), plain.plain():
        for ids, _ in rows:
            hidden = plain.hidden(
                plain.backbone.get_input_embeddings()(torch.from_numpy(ids)[None]), build_forest([(ids, np.zeros(len(ids)))])
            )
            found.append(float(policy.heads["score"](hidden[-1])))
    return np.array(found)


def test_the_score_that_trains_is_read_at_the_answers_last_token_though_the_row_goes_on(reward):
    """As where a template writes a line break after the end of turn: a stage of rewards cuts rows there."""
    policy, _ = reward
    longer = [tuple((np.r_[ids, 7, 8], np.r_[weights, 0, 0].astype(np.float32)) for ids, weights in item) for item in PAIRS]
    source = DatasetSource(longer, batch_size=4, accumulation=1, seed=0, trim=True)
    objective = OBJECTIVES["reward"](RewardObjective())
    want = run_window(policy, objective, list(DatasetSource(PAIRS, batch_size=4, accumulation=1, seed=0).once()), backward=None)
    found = run_window(policy, objective, list(source.once()), backward=None)
    assert found.loss == pytest.approx(want.loss, rel=1e-6)
    assert found.metrics == pytest.approx(want.metrics, rel=1e-5)


def copied(folder: Path, target: Path, change) -> Path:
    """A result saved anew with a change, so that its manifest fits."""
    with atomic_folder(target) as temporary:
        for file in folder.iterdir():
            if file.name != "manifest.json":
                (temporary / file.name).write_bytes(file.read_bytes())
        change(temporary)
    return target


def test_a_result_without_a_score_head_is_an_error(reward, tmp_path):
    folder = copied(reward[1], tmp_path / "no-head", lambda path: (path / HEADS).unlink())
    with pytest.raises(AdapterError, match="no score head"):
        opened(folder)


def test_an_altered_reward_model_is_an_error(reward, tmp_path):
    folder = copied(reward[1], tmp_path / "altered", lambda path: None)
    data = bytearray((folder / HEADS).read_bytes())
    data[-1] ^= 1
    (folder / HEADS).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=HEADS):
        opened(folder)


def test_a_reward_adapter_of_another_base_never_joins_the_policys(reward, tmp_path):
    base = loaded(tiny_model("llama"))
    other = replace(base, identity=replace(base.identity, sha256="1" * 64))
    with pytest.raises(AdapterError, match="base that it was trained on is not there"):
        open_reward_model(reward[1], other, attach(other, LORA, seed=0), "reward_0")

    def lie(path: Path) -> None:  # what names this base as its own, though its file is of another
        config = json.loads((path / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(model_folder(tmp_path / "base"))
        (path / "adapter_config.json").write_text(json.dumps(config))

    folder = copied(reward[1], tmp_path / "lying", lie)
    with pytest.raises(AdapterError, match="trained on another base"):
        open_reward_model(folder, other, attach(loaded(tiny_model("llama")), LORA, seed=0), "reward_0")


def test_a_reward_adapter_on_a_base_of_its_own_with_other_tokens_reads_the_answers_text(tmp_path):
    folder = model_folder(tmp_path / "base", seed=3)
    base = load_model(ModelSection(name=str(folder), dtype="float32"))
    policy, result = trained(tmp_path / "run", LORA, base)
    asking = loaded(tiny_model("llama"), tiny_tokenizer(markers=False, template=None))
    found = open_reward_model(result, asking, attach(asking, LORA, seed=0), "reward_0")
    assert isinstance(found, Separate)
    assert found.writer is not None
    text = "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\na0<|im_end|>"
    ids = np.array(base.tokenizer(text, add_special_tokens=False).input_ids)
    want = in_memory(policy, [(ids, np.r_[0, np.ones(len(ids) - 1)])])
    np.testing.assert_allclose(found.scores([ANSWERS[0], ANSWERS[1]])[0], want[0], rtol=1e-4, atol=1e-4)


OTHER = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}"
OTHER += "<|im_start|>assistant: {% endif %}"  # the same tokens in another order


@pytest.mark.parametrize("named", [OTHER, None], ids=["of another template", "of the policy's"])
@pytest.mark.parametrize("beside", [True, False])
def test_a_reward_model_reads_answers_as_its_own_training_rows_were_written_on_a_base_of_the_same_tokens(tmp_path, beside, named):
    """Its base's folder holds chatml, its result's folder what it was trained with."""
    folder = model_folder(tmp_path / "base", seed=3)
    base = load_model(ModelSection(name=str(folder), dtype="float32"))
    base.tokenizer.chat_template = named or base.tokenizer.chat_template
    policy, result = trained(tmp_path / "run", LORA, base)
    asking = load_model(ModelSection(name=str(folder), dtype="float32"))
    model = attach(asking, LORA, seed=0) if beside else asking.model
    found = open_reward_model(result, asking, model, "reward_0")
    assert isinstance(found, Shared if beside else Separate)
    if beside:
        found.policy = Policy(model)
    if named is None:
        assert found.writer is None
        want = in_memory(policy, PAIRS.rows[:3])
    else:
        texts = [f"<|im_start|>user: q{i}<|im_end|><|im_start|>assistant: a{i}<|im_end|>" for i in range(3)]
        rows = [np.array(base.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        want = in_memory(policy, [(ids, np.r_[0, np.ones(len(ids) - 1)]) for ids in rows])
    np.testing.assert_allclose(found.scores(ANSWERS[:3]), want, rtol=1e-4, atol=1e-4)


def test_a_base_without_a_template_is_asked_in_the_one_its_reward_adapter_was_trained_with(tmp_path):
    folder = model_folder(tmp_path / "base", seed=3, template=None, markers=False)
    base = load_model(ModelSection(name=str(folder), dtype="float32"))
    chatml = load_template(base.tokenizer, ModelSection(name="base", chat_template="chatml"))
    new = add_new_tokens(base, chatml)
    assert new
    inner = replace(base, model=attach(base, LORA, seed=0, new_tokens=new))
    with torch.no_grad():
        for name, parameter in inner.model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.2)
    policy = Policy(inner.model)
    policy.heads["score"] = make_head(32, seed=0)
    with atomic_folder(tmp_path / "reward") as temporary:
        save_result(policy.model, base, temporary, {}, policy.heads)
    asking = load_model(ModelSection(name=str(folder), dtype="float32"))
    asking.tokenizer.chat_template = OTHER
    for beside in (attach(asking, LORA, seed=0), None):  # neither has a row for the tokens that chatml brings
        found = open_reward_model(tmp_path / "reward", asking, beside, "reward_0")
        assert isinstance(found, Separate)
        ids = base.tokenizer("<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\na0<|im_end|>", add_special_tokens=False).input_ids
        assert set(new) <= set(ids)
        want = in_memory(policy, [(np.array(ids), np.r_[0, np.ones(len(ids) - 1)])])
        np.testing.assert_allclose(found.scores(ANSWERS[:1]), want, rtol=1e-4, atol=1e-4)


def test_what_a_call_left_in_a_tokenizer_does_not_make_it_another(reward):
    base = loaded(tiny_model("llama"))
    base.tokenizer(["a", "long one"], padding=True, truncation=True, max_length=3)
    assert open_reward_model(reward[1], base, attach(base, LORA, seed=0), "reward_0").writer is None


def test_a_row_longer_than_the_reward_models_positions_has_no_score(tmp_path):
    _, folder = trained(tmp_path / "run", LORA, loaded(tiny_model("gpt2")))
    base = loaded(tiny_model("gpt2"))
    model = attach(base, LORA, seed=0)
    found = open_reward_model(folder, base, model, "reward_0")
    found.policy = Policy(model)
    long = [ANSWERS[0], Scored((), "", np.ones(129, dtype=np.int64)), Scored((), "", np.ones(128, dtype=np.int64))]
    assert np.isnan(found.scores(long)).tolist() == [False, True, False]


def classifier(path: Path, *, labels: int = 1, template: str | None = "chatml") -> Path:
    """A sequence-classification model that another tool might have written, with a tokenizer of its own."""
    tokenizer = tiny_tokenizer(template=template, markers=template is not None)
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=labels, pad_token_id=tokenizer.pad_token_id, **shape)
    LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("template", ["chatml", None])
def test_a_foreign_classifier_reads_the_text_in_its_own_tokens(tmp_path, template):
    folder = classifier(tmp_path / "foreign", template=template)
    found = open_reward_model(folder, loaded(tiny_model("llama")), None, "reward_0")
    assert isinstance(found, Foreign)
    text = "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\na0<|im_end|>\n" if template else "q0\na0"
    ids = torch.tensor([tiny_tokenizer(template=template, markers=template is not None)(text, add_special_tokens=False).input_ids])
    want = AutoModelForSequenceClassification.from_pretrained(folder)(input_ids=ids).logits.item()
    scores = found.scores(ANSWERS[:3])
    assert scores[0] == pytest.approx(want, rel=1e-4)
    assert len(set(scores.tolist())) == 3
    np.testing.assert_allclose(found.scores(ANSWERS[2::-1])[::-1], scores, rtol=1e-6)


def test_a_foreign_model_with_several_outputs_or_without_weights_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="gives 3 numbers"):
        open_reward_model(classifier(tmp_path / "three", labels=3), loaded(tiny_model("llama")), None, "reward_0")
    folder = classifier(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        open_reward_model(folder, loaded(tiny_model("llama")), None, "reward_0")


def test_a_model_without_a_trained_score_is_not_taken_for_a_reward_model(tmp_path):
    """transformers gives it a random head and a warning."""
    folder = model_folder(tmp_path / "causal")
    with pytest.raises(ModelError, match="gives 2 numbers"):
        open_reward_model(folder, loaded(tiny_model("llama")), None, "reward_0")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "score"}, "label2id": {"score": 0}}))
    with pytest.raises(ModelError, match=r"lacks score\.weight"):
        open_reward_model(folder, loaded(tiny_model("llama")), None, "reward_0")


REFUSES_SYSTEM = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
REFUSES_SYSTEM += "{{ m['role'] + m['content'] }}{% endfor %}"


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, None])
def test_what_a_foreign_model_cannot_read_has_no_score_and_the_rest_has(tmp_path, template):
    folder = classifier(tmp_path / "foreign", template=None)
    tokenizer = tiny_tokenizer(template=None, markers=False)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    found = open_reward_model(folder, loaded(tiny_model("llama")), None, "reward_0")
    odd = [
        ANSWERS[0],
        Scored((Message("system", "be kind"), Message("user", "q")), "a", ANSWERS[0].ids),
        Scored((Message("user", "q"),), "a" * 41, ANSWERS[0].ids),
        Scored((Message("user", {1, 2}),), "a", ANSWERS[0].ids),
        ANSWERS[1],
    ]
    scores = found.scores(odd)
    assert np.isnan(scores).tolist() == [False, template is not None, True, True, False]
    np.testing.assert_allclose(scores[[0, 4]], found.scores(ANSWERS[:2]))


def test_a_foreign_models_template_is_rendered_outside_this_process(tmp_path):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
    folder = classifier(tmp_path / "foreign")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = endless
    tokenizer.save_pretrained(folder)
    found = open_reward_model(folder, loaded(tiny_model("llama")), None, "reward_0")
    assert np.isnan(found.scores(ANSWERS[:1])).all()


def test_positions_that_begin_after_the_padding_are_not_counted(tmp_path):
    tokenizer = tiny_tokenizer(template=None, markers=False)
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=20)
    config = RobertaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=1, **shape)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    found = open_reward_model(tmp_path / "roberta", loaded(tiny_model("llama")), None, "reward_0")
    scores = found.scores([Scored((), "a" * length, ANSWERS[0].ids) for length in (17, 18, 19, 20)])
    assert np.isnan(scores).tolist() == [False, False, True, True]


@pytest.mark.parametrize("ours", [True, False])
def test_a_reward_model_that_needs_code_of_its_own_is_an_error_that_says_so(tmp_path, ours):
    folder = classifier(tmp_path / "own-code")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "unheard-of"}
    names = ("AutoConfig", "AutoModelForSequenceClassification", "AutoModelForCausalLM")
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {name: "modeling.Own" for name in names}}))
    (folder / "modeling.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    if ours:
        save_heads(torch.nn.ModuleDict({"score": make_head(16, seed=0)}), folder)
    with pytest.raises(ModelError, match="brings code of its own"):
        open_reward_model(folder, loaded(tiny_model("llama")), None, "reward_0")
    assert not (tmp_path / "ran").exists()
