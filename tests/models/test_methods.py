"""Methods: targets match, results read back, load strictly, on their own base, new tokens, ties."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.fresh import in_new_process
from tests.toys import Rows, batch_of, loaded, make_rows, make_stage, model_folder, stage_inputs, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from tunesmith.data.template import load_template
from tunesmith.errors import AdapterError, RecipeError
from tunesmith.models.load import LoadedModel, load_model
from tunesmith.models.methods import attach, load_adapter, save_result, saving, target_modules
from tunesmith.models.policy import Policy
from tunesmith.models.result import CARD
from tunesmith.objectives import SFT
from tunesmith.recipe import FullMethod, LoraMethod, ModelSection
from tunesmith.rundir import RunDirectory, verify_folder
from tunesmith.train.optimiser import Optimiser
from tunesmith.train.signals import StopRequest
from tunesmith.train.stage import add_new_tokens, resolve_method, run_stage
from tunesmith.train.window import run_window

LORA = LoraMethod(r=4)
ROWS = make_rows(6)


@pytest.mark.parametrize("wanted", [["q_proj", "v_proj", "up_porj"], ["up_porj"], ["q_proj", "up_porj"]])
def test_a_target_that_matches_nothing_is_refused_with_the_nearest_names_though_others_match(wanted):
    with pytest.raises(RecipeError, match=r"`up_porj` matches no linear layer[\s\S]*up_proj"):
        target_modules(tiny_model("llama"), wanted)
    stage = make_stage(method={"type": "lora", "target_modules": wanted})
    with pytest.raises(RecipeError) as caught:
        resolve_method(stage, loaded(tiny_model("llama")))
    assert caught.value.exit_status == 2


def test_targets_match_by_last_parts_or_by_full_name_and_are_every_linear_layer_of_the_backbone_by_default():
    model = tiny_model("llama")
    assert target_modules(model, None) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    for wanted in (["q_proj"], ["layers.1.mlp.up_proj"], ["self_attn.k_proj"]):
        tuned = attach(loaded(tiny_model("llama")), LORA.model_copy(update={"target_modules": wanted}), seed=0)
        trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
        assert trained
        assert all(f".{wanted[0]}.lora_" in name for name in trained)


def test_an_adapter_trains_in_fp32_on_a_frozen_bf16_base():
    model = attach(loaded(tiny_model("llama", dtype=torch.bfloat16)), LORA, seed=0, new_tokens=[1, 2])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_fresh_adapter_is_a_function_of_the_seed():
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in attach(loaded(tiny_model("llama")), LORA, seed=seed).parameters() if p.requires_grad])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def base(folder: Path) -> LoadedModel:
    return load_model(ModelSection(name=str(folder), dtype="float32"))


def train_steps(model: torch.nn.Module, rows: list, steps: int = 3) -> Policy:
    policy = Policy(model)
    optimiser = Optimiser(policy.named_parameters(), make_stage())
    for _ in range(steps):
        optimiser.zero_grad()
        run_window(policy, SFT(), [batch_of(rows)])
        optimiser.step(1e-2, optimiser.grad_norm())
    return policy


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path, torch.Tensor]:
    """A base's folder, the folder of an adapter trained on it, and the tuned log-probabilities of ROWS."""
    root = tmp_path_factory.mktemp("saved")
    origin = base(model_folder(root / "base"))
    policy = train_steps(attach(origin, LORA, seed=0), ROWS)
    (root / "adapter").mkdir()
    save_result(policy.model, origin, root / "adapter", {"template_sha256": None})
    return root / "base", root / "adapter", policy(batch_of(ROWS).forest).logprobs.detach()


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[1], tmp_path / "adapter"))


def test_a_saved_adapter_loads_and_gives_the_trained_models_log_probabilities(saved):
    folder, adapter, want = saved
    model = load_adapter(base(folder), adapter)
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(Policy(model)(batch_of(ROWS).forest).logprobs, want)


def test_plain_peft_loads_the_adapters_folder_and_gives_equal_logits(saved):
    folder, adapter, want = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    got = []
    for ids, weights in ROWS:
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1]
        got.append(torch.log_softmax(logits, -1).gather(1, torch.from_numpy(ids)[1:, None])[weights[1:] != 0, 0])
    torch.testing.assert_close(torch.cat(got), want, rtol=1e-4, atol=1e-5)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert AutoTokenizer.from_pretrained(adapter).chat_template


def test_a_loaded_adapter_goes_on_training_where_it_is_asked_to(saved):
    folder, adapter, want = saved
    model = load_adapter(base(folder), adapter, trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7
    assert {p.dtype for p in trained} == {torch.float32}
    assert not torch.equal(train_steps(model, ROWS, 1)(batch_of(ROWS).forest).logprobs, want)


def rewrite(adapter: Path, change) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def rename_a_key(tensors):
    name = next(iter(tensors))
    tensors[name.replace("base_model.", "base.")] = tensors.pop(name)


def drop_a_key(tensors):
    del tensors[next(name for name in tensors if "lora_B" in name)]


def drop_all(tensors):
    tensors.clear()


def add_a_key(tensors):
    tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)


def other_rank(tensors):
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:2].clone()


@pytest.mark.parametrize("change", [rename_a_key, drop_a_key, drop_all, add_a_key, other_rank])
def test_an_adapter_whose_tensors_do_not_match_is_refused(saved, adapter, change):
    rewrite(adapter, change)
    with pytest.raises(AdapterError):
        load_adapter(base(saved[0]), adapter)


@pytest.mark.parametrize("damage", ["empty weights", "truncated weights", "no weights", "no config", "torn config", "another method"])
def test_an_adapter_that_cannot_be_read_is_refused(saved, adapter, damage):
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if damage == "empty weights":
        weights.write_bytes(b"")
    elif damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "torn config":
        config.write_text("{")
    else:
        config.write_text(
            json.dumps({"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["k_proj"], "feedforward_modules": []})
        )
    with pytest.raises(AdapterError):
        load_adapter(base(saved[0]), adapter)


def test_an_adapter_of_another_base_is_refused_by_the_bases_hash(saved, tmp_path):
    other = base(model_folder(tmp_path / "other", seed=1))
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(other, saved[1])


def test_a_file_that_does_not_read_back_as_what_was_trained_is_an_error(tmp_path, monkeypatch):
    origin = base(model_folder(tmp_path / "base"))
    model = attach(origin, LORA, seed=0)
    (tmp_path / "out").mkdir()
    plain = saving.save_file

    def losing(tensors, *args, **kwargs):
        plain({name: tensor for name, tensor in list(tensors.items())[1:]}, *args, **kwargs)

    monkeypatch.setattr(saving, "save_file", losing)
    with pytest.raises(AdapterError, match="does not read back"):
        save_result(model, origin, tmp_path / "out", {})
    for how in (lambda n, t: (n, t + 1), lambda n, t: (f"other.{n}", t), lambda n, t: (n.replace("layers.0", "x"), t)):
        monkeypatch.setattr(saving, "save_file", lambda tensors, *a, how=how, **k: plain(dict(how(*one) for one in tensors.items()), *a))
        with pytest.raises(AdapterError, match="does not read back"):
            save_result(model, origin, tmp_path / "out", {})
    monkeypatch.setattr(saving, "save_file", plain)
    empty = {name: tensor[:0] for name, tensor in saving.trainable_state(model).items()}
    with pytest.raises(AdapterError, match="does not read back"):
        save_result(model, origin, tmp_path / "out", {}, state=empty)


def test_a_full_models_file_that_does_not_read_back_is_an_error(tmp_path, monkeypatch):
    origin = base(model_folder(tmp_path / "base"))
    model = attach(origin, FullMethod(), seed=0)
    (tmp_path / "out").mkdir()
    plain = model.save_pretrained

    def losing(folder, **how):
        plain(folder, **how)
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.embed_tokens.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(model, "save_pretrained", losing)
    with pytest.raises(AdapterError, match="does not read back"):
        save_result(model, origin, tmp_path / "out", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_fully_tuned_model_reloads_with_equal_logits_tied_or_not(tmp_path, tied, dtype):
    folder = model_folder(tmp_path / "base", tied=tied)
    origin = load_model(ModelSection(name=str(folder), dtype=str(dtype).removeprefix("torch.")))
    policy = train_steps(attach(origin, FullMethod(), seed=0), ROWS)
    want = policy(batch_of(ROWS).forest).logprobs
    (tmp_path / "out").mkdir()
    save_result(policy.model, origin, tmp_path / "out", {})
    again = load_model(ModelSection(name=str(tmp_path / "out"), dtype=str(dtype).removeprefix("torch.")))
    assert (again.model.lm_head.weight is again.model.model.embed_tokens.weight) == tied
    assert torch.equal(Policy(again.model)(batch_of(ROWS).forest).logprobs, want)
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert head.config._attn_implementation != "tunesmith_forest"


def test_a_model_whose_experts_are_written_apart_reads_back(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_local_experts=2, **shape))
    save_result(model, loaded(model), tmp_path, {})
    assert load_model(ModelSection(name=str(tmp_path), dtype="float32"))


def chat_rows(tokenizer, texts: list[str]) -> Rows:
    """Rows in chatml whose answers end with the end-of-turn token."""
    rows = []
    for text in texts:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        before, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + text.upper() + "<|im_end|>\n")["input_ids"]
        weights = np.zeros(len(ids), dtype=np.float32)
        weights[len(before) : -1] = 1  # not the line break after the end of turn
        rows.append((np.array(ids), weights))
    return Rows(rows)


RELOAD = """
import sys, json
import numpy as np, torch
from pathlib import Path
from tunesmith.models.load import load_model
from tunesmith.models.methods import load_adapter
from tunesmith.data.template import load_template
from tunesmith.recipe import ModelSection
from tunesmith.train.stage import add_new_tokens
base, folder, ids = sys.argv[1:]
section = ModelSection(name=base, dtype="float32", chat_template="chatml")
loaded = load_model(section)
new = add_new_tokens(loaded, load_template(loaded.tokenizer, section))
model = load_adapter(loaded, Path(folder))
logits = model(input_ids=torch.tensor([json.loads(ids)])).logits[0]
print(json.dumps({"new": new, "logits": logits[:, new].tolist()}))
"""


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_without_a_template_gets_chatml_whose_new_tokens_train_and_are_there_in_a_new_process(tmp_path, tied):
    folder = model_folder(tmp_path / "base", tied=tied, template=None, markers=False)
    section = ModelSection(name=str(folder), dtype="float32", chat_template="chatml")
    origin = load_model(section)
    rows_before = origin.model.get_input_embeddings().weight.shape[0]
    template = load_template(origin.tokenizer, section)
    new = add_new_tokens(origin, template)
    assert new == [rows_before, rows_before + 1]
    rows = chat_rows(origin.tokenizer, ["abc", "good day", "xyz"])
    stage = make_stage(method={"type": "lora", "r": 4}, max_steps=8, rows=3)
    inputs = stage_inputs(origin, rows, tmp_path / "stores", template=template, new_tokens=new)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        model = run_stage(stage, inputs, run, stop=StopRequest(), report=lambda event: None)
    verify_folder(tmp_path / "run" / "stages" / "sft" / "model")
    ids = torch.from_numpy(rows[1][0])[None]
    policy = Policy(model)
    want = policy(batch_of([rows[1]]).forest).logprobs
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens" in name}
    assert len(trained) == (1 if tied else 2)
    logits = plain_logits(model, ids)
    supervised = np.nonzero(rows[1][1])[0]
    plain = torch.log_softmax(logits, -1)[supervised - 1, rows[1][0][supervised]]
    torch.testing.assert_close(want, plain, rtol=1e-4, atol=1e-5)
    fresh = AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight.mean(0)
    moved = model.get_input_embeddings()(torch.tensor(new)) - fresh
    assert (moved.abs().max(-1).values > 1e-3).all(), "a new token's embedding did not train"
    done = in_new_process(RELOAD, folder, tmp_path / "run" / "stages" / "sft" / "model", json.dumps(ids[0].tolist()))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["new"] == new
    torch.testing.assert_close(torch.tensor(told["logits"]), logits[:, new].detach(), rtol=1e-5, atol=1e-5)
    peft = AutoModelForCausalLM.from_pretrained(folder)
    peft.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "run" / "stages" / "sft" / "model")))
    peft = PeftModel.from_pretrained(peft, tmp_path / "run" / "stages" / "sft" / "model").eval()
    torch.testing.assert_close(peft(input_ids=ids).logits[0, :, new], logits[:, new], rtol=1e-4, atol=1e-4)


def plain_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """A trained model's logits through its own forward with transformers' attention."""
    causal = model.get_base_model()
    causal.set_attn_implementation("eager")
    logits = model(input_ids=ids, use_cache=False).logits[0]
    causal.set_attn_implementation("tunesmith_forest")
    return logits


def test_new_rows_of_the_embeddings_are_the_same_in_every_process(tmp_path):
    folder = model_folder(tmp_path / "base", tied=False, template=None, markers=False)
    rows = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        section = ModelSection(name=str(folder), dtype="float32", chat_template="chatml")
        origin = load_model(section)
        new = add_new_tokens(origin, load_template(origin.tokenizer, section))
        rows.append((origin.model.model.embed_tokens.weight[new].detach(), origin.model.lm_head.weight[new].detach()))
    assert torch.equal(rows[0][0], rows[1][0])
    assert torch.equal(rows[0][1], rows[1][1])


def run_toy(path: Path, origin: LoadedModel, method: str, start: Path | None = None) -> Path:
    from tests.toys import train_stage

    train_stage(origin, make_stage(method=method, max_steps=3), path, ROWS, start=start)
    return path / "stages" / "sft" / "model"


def test_a_stage_that_starts_from_a_full_model_trains_on_that_model_and_names_it_as_its_base(tmp_path):
    folder = model_folder(tmp_path / "base")
    first = run_toy(tmp_path / "first", base(folder), "full")
    second = run_toy(tmp_path / "second", base(folder), "lora", start=first)
    card = json.loads((second / CARD).read_text())
    assert card["base"]["sha256"] == base(first).identity.sha256
    assert load_adapter(base(first), second)
    with pytest.raises(AdapterError, match="another base"):
        load_adapter(base(folder), second)


def test_a_stage_that_starts_from_an_adapter_continues_it(tmp_path):
    folder = model_folder(tmp_path / "base")
    first = run_toy(tmp_path / "first", base(folder), "lora")
    second = run_toy(tmp_path / "second", base(folder), "lora", start=first)
    fresh = run_toy(tmp_path / "fresh", base(folder), "lora")
    one, two, other = (load_file(path / "adapter_model.safetensors") for path in (first, second, fresh))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(RecipeError, match="full tuning cannot start from an adapter"):
        run_toy(tmp_path / "third", base(folder), "full", start=first)


def test_a_finished_stage_whose_result_was_damaged_is_not_taken_as_finished(tmp_path):
    from tunesmith.train.stage import is_finished

    result = run_toy(tmp_path / "run", base(model_folder(tmp_path / "base")), "lora")
    stage = make_stage(max_steps=3)
    with RunDirectory.open(tmp_path / "run", resume=True) as run:
        assert is_finished(run, stage)
        data = bytearray((result / "adapter_model.safetensors").read_bytes())
        data[-3] ^= 1
        (result / "adapter_model.safetensors").write_bytes(bytes(data))
        assert not is_finished(run, stage)
        assert run.events()[-1]["event"] == "result_refused"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_attaching_and_saving_write_nothing_to_the_terminal(tmp_path, method, capfd, recwarn):
    origin = base(model_folder(tmp_path / "base"))
    model = attach(origin, FullMethod() if method == "full" else LORA, seed=0)
    capfd.readouterr()
    (tmp_path / "result").mkdir()
    save_result(model, origin, tmp_path / "result", {})
    assert ("".join(capfd.readouterr()), [str(warning.message) for warning in recwarn]) == ("", [])
