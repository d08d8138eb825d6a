"""A stage as a whole: what it checks and in which order, what its fingerprint covers, and the foreign models it may start from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.toys import Rows, loaded, make_rows, make_stage, model_folder, stage_inputs, tiny_model, tiny_tokenizer, train_stage

from tunesmith.data.records import Conversation, Document, Message, Source
from tunesmith.data.template import load_template
from tunesmith.errors import AdapterError, DoesNotFit, InvariantViolated, RecipeError
from tunesmith.models.load import load_model
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.recipe import FullMethod, LoraMethod, ModelSection
from tunesmith.rundir import RunDirectory, read_events
from tunesmith.train import stage as module
from tunesmith.train.signals import StopRequest
from tunesmith.train.stage import derive_stage, run_stage, stage_fingerprint

ROWS = make_rows(6)
SOURCE = Source("rows.jsonl", 1)


def test_a_stage_in_which_nothing_trains_ends_before_its_first_update(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "build_model", lambda base, *args: base.model.requires_grad_(False))
    with pytest.raises(InvariantViolated, match="no parameter trains"):
        train_stage(loaded(tiny_model("llama")), make_stage(method="full", max_steps=2), tmp_path / "run", ROWS)


def test_freed_memory_is_kept_from_when_model_and_optimiser_stand(tmp_path, monkeypatch):
    order = []
    for name in ("build_model", "Optimiser", "keep_freed_memory", "train"):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, plain=plain, **kwargs: order.append(name) or plain(*args, **kwargs))
    train_stage(loaded(tiny_model("llama")), make_stage(method="full", max_steps=1), tmp_path / "run", ROWS)
    assert order == ["build_model", "Optimiser", "keep_freed_memory", "train"]


def no_memory_on_the_host():
    torch.empty(1 << 58)


def no_memory_on_the_device():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


@pytest.mark.parametrize("allocate", [no_memory_on_the_host, no_memory_on_the_device])
def test_memory_that_runs_out_in_an_update_ends_the_run_named_and_no_update_is_made_smaller(tmp_path, monkeypatch, allocate):
    stage = make_stage(method="full", max_steps=3, save_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2, rows=6)
    base = model_folder(tmp_path / "base")

    def train(name):
        run = tmp_path / name
        train_stage(load_model(ModelSection(name=str(base), dtype="float32")), stage, run, ROWS)
        steps = [(event["step"], event["tokens"]) for event in read_events(run) if "loss" in event]
        return steps, (run / "stages/sft/model/model.safetensors").read_bytes()

    unbroken = train("unbroken")
    plain = Policy.forward

    def forward(self, *args, **kwargs):
        if any(event.get("step") == 2 and "loss" in event for event in read_events(tmp_path / "run")):
            allocate()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Policy, "forward", forward)
    with pytest.raises(DoesNotFit, match="memory ran out") as ended:
        train("run")
    assert ended.value.exit_status == 4
    assert [event["step"] for event in read_events(tmp_path / "run") if "loss" in event] == [1, 2]
    monkeypatch.setattr(Policy, "forward", plain)
    assert train("run") == unbroken


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_fingerprint_covers_what_the_token_stores_were_made_from(tmp_path, part):
    base, stage, prints = loaded(tiny_model("llama")), make_stage(), set()
    for system in ("answer briefly", "answer at length"):
        data = stage_inputs(base, make_rows(6), tmp_path, validation=make_rows(3, seed=1)).data
        getattr(data, part).keep(tmp_path / part, json.dumps({"settings": {"system": system}}))
        prints.add(stage_fingerprint(stage, base, data, None, None, 0, tmp_path))
    assert len(prints) == 2


@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {"save_steps": 7}])
def test_a_run_may_go_on_with_other_settings_that_change_no_weight(tmp_path, setting):
    base = loaded(tiny_model("llama"))
    data = stage_inputs(base, make_rows(6), tmp_path).data
    stages = make_stage(), make_stage(**setting), make_stage(learning_rate=0.5)
    plain, other, changed = (stage_fingerprint(stage, base, data, None, None, 0, tmp_path) for stage in stages)
    assert plain == other != changed


@pytest.mark.parametrize("warmup", [3, 5])
def test_a_warm_up_that_outlasts_the_updates_is_refused(warmup):
    with pytest.raises(RecipeError, match=f"rises for {warmup} updates, and the stage has 3") as caught:
        make_stage(max_steps=3, warmup_steps=warmup)
    assert caught.value.where == "stages.sft.warmup_steps"
    assert make_stage(max_steps=3, warmup_steps=2).warmup_steps == 2


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_rows_and_the_heads_are_tables_and_what_lies_between_is_not(tmp_path, tied):
    base = load_model(ModelSection(name=str(model_folder(tmp_path / "base", tied=tied)), dtype="float32"))
    policy = Policy(attach(base, LoraMethod(r=2), seed=0, new_tokens=[5, 6]))
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained & module._tables(policy) == {name for name in trained if "lora" not in name}
    assert any("embed_tokens" in name for name in trained & module._tables(policy))


def chat_stage(tmp_path, weights: list[float], *, record: str = "conversation", limit: int = 99, start: tuple[int, ...] = ()) -> None:
    """Trains one step on one row `hi<|im_end|>` of a chatml model, as if it were rendered so."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    base = loaded(tiny_model("llama"), tokenizer)
    base.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = np.array([*start, *tokenizer("hi", add_special_tokens=False).input_ids, tokenizer.eos_token_id])
    rows = Rows([(ids, np.array([0.0] * len(start) + weights, dtype=np.float32))])
    inputs = stage_inputs(base, rows, tmp_path / "stores", template=load_template(tokenizer, ModelSection(name="tiny")))
    turns = (Message("user", "x"), Message("assistant", "hi"))
    inputs.data.records[:] = [Conversation(turns, "r1", SOURCE) if record == "conversation" else Document("hi", "r1", SOURCE)]
    rows.limit = limit
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        stage = make_stage(method="lora", max_steps=1, rows=1)
        run_stage(stage, inputs, run, stop=StopRequest(), report=lambda event: None)


def test_a_stage_whose_answers_do_not_end_is_refused_though_documents_and_rows_that_were_cut_need_no_end(tmp_path):
    with pytest.raises(InvariantViolated, match="end of turn carries no loss"):
        chat_stage(tmp_path / "a", [0, 1, 0])
    chat_stage(tmp_path / "b", [0, 1, 1])
    chat_stage(tmp_path / "c", [0, 1, 0], record="document")
    chat_stage(tmp_path / "d", [0, 1, 0], limit=2)


def test_a_stage_whose_rows_begin_twice_is_refused(tmp_path):
    bos = tiny_tokenizer().convert_tokens_to_ids("<|endoftext|>")
    chat_stage(tmp_path / "a", [0, 1, 1], start=(bos,))
    with pytest.raises(InvariantViolated, match="two BOS"):
        chat_stage(tmp_path / "b", [0, 1, 1], start=(bos, bos))


def test_another_base_is_loaded_as_the_recipes_model_section_says(tmp_path, monkeypatch):
    folder, asked = model_folder(tmp_path / "other"), []
    monkeypatch.setattr(module, "load_model", lambda section: asked.append(section) or load_model(section))
    base = loaded(tiny_model("llama"))
    section = ModelSection(name="owner/name", revision="main", trust_remote_code=True)
    inputs = SimpleNamespace(loaded=base, section=section, start=folder, template=None)
    assert module._base(inputs).identity.folder == str(folder)
    assert asked == [section.model_copy(update={"name": str(folder), "revision": None, "dtype": "float32"})]


@pytest.mark.parametrize("pattern", ["all-linear", r".*\.(q|up)_proj"])
def test_a_foreign_adapter_with_a_pattern_for_its_targets_gives_those_of_its_weights(tmp_path, pattern):
    names = ["base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.mlp.up_proj"]
    save_file({f"{name}.lora_{m}.weight": torch.ones(1) for name in names for m in "AB"}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": pattern}))
    stage = make_stage().model_copy(update={"method": None})
    assert derive_stage(stage, 12, start=tmp_path).method == LoraMethod(r=8, lora_alpha=16.0, target_modules=["q_proj", "up_proj"])
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        derive_stage(stage, 12, start=tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert derive_stage(stage, 12, start=tmp_path).method == FullMethod()
