"""Learned tokens before every row: packed as PEFT computes each row alone, on every model layout, and everything that goes on with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from tests.families import FAMILIES, tiny_model
from tests.fresh import in_new_process
from tests.models.method_cases import METHOD_CASES
from tests.models.test_packing import _rows
from tests.toys import Rows, batch_of, loaded, make_rows, make_stage, model_folder, tiny_tokenizer, train_stage
from transformers import AutoModelForCausalLM

from tunesmith.data.forest import build_forest
from tunesmith.errors import AdapterError, ModelError
from tunesmith.models.adapters import REFERENCE, copy_policy
from tunesmith.models.heads import make_head
from tunesmith.models.load import LoadedModel, load_model
from tunesmith.models.methods import attach, load_adapter, method_of, save_result
from tunesmith.models.policy import Policy
from tunesmith.models.virtual import NETWORK
from tunesmith.recipe import Method, ModelSection, PrefixMethod, PromptMethod, PTuningMethod
from tunesmith.rundir import read_events

ROWS = make_rows(6)
LEARNED = {name: settings for name, settings in METHOD_CASES.items() if settings["type"] in ("prefix", "prompt", "p_tuning")}
NETWORKS = ["prefix projection", "p_tuning", "p_tuning lstm"]
LONG = {"prefix longer than the window": {"type": "prefix", "num_virtual_tokens": 13}}


def method(settings: dict) -> Method:
    return TypeAdapter(Method).validate_python(settings)


def tuned(case: str, family: str = "llama", **changed) -> PeftModel:
    """A tiny model with learned tokens far from where they start."""
    base = loaded(tiny_model(family), folder="tiny")
    return moved(attach(base, method((LEARNED | LONG)[case]), seed=0, **changed))


def moved(model: PeftModel, by: float = 0.5) -> PeftModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    return model


def alone(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """Log-probabilities of the supervised tokens by PEFT's own forward, each row by itself."""
    found = []
    for ids, weights in rows:
        row = torch.from_numpy(ids)[None]
        logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -len(ids) :].float()
        logprobs = torch.log_softmax(logits[:-1], -1).gather(1, row[0, 1:, None])[:, 0]
        found.append(logprobs[torch.from_numpy(weights[1:] != 0)])
    return torch.cat(found)


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def logprobs(policy: Policy) -> torch.Tensor:
    return policy(batch_of(ROWS).forest).logprobs.detach()


def under(policy: Policy, adapter: str | None) -> torch.Tensor:
    with policy.using(adapter):
        return logprobs(policy)


@pytest.mark.parametrize("case", [*LEARNED, *LONG])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_and_their_gradient_are_those_of_pefts_forward_on_each_row_alone(family, case):
    model, rows = tuned(case, family), _rows()
    want = alone(model, rows)
    want.sum().backward()
    gradients = [p.grad for p in trained(model)]
    base = alone(model.get_base_model(), rows)
    assert (want - base).abs().max() > 0.05  # what is learned matters
    for checkpointing in (False, True):
        policy = Policy(copy.deepcopy(model), gradient_checkpointing=checkpointing)
        policy.zero_grad()
        got = policy(build_forest(rows)).logprobs
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        got.sum().backward()
        for ours, theirs in zip(trained(policy.model), gradients, strict=True):
            assert (ours.grad - theirs).norm() <= 1e-5 * theirs.norm()
        torch.testing.assert_close(under(policy, None), alone(model.get_base_model(), ROWS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", LEARNED)
def test_a_row_sees_learned_tokens_and_no_other_row(case):
    policy = Policy(tuned(case))
    forest = build_forest(_rows()[4:6], min_shared=10_000)
    embeddings = policy.backbone.get_input_embeddings()(torch.from_numpy(forest.tokens_T)[None]).detach().requires_grad_()
    node = next(n for n in forest.nodes if n.end - 1 == forest.last_B[1])
    hidden = policy.hidden(embeddings, forest)
    assert len(hidden) == len(forest.tokens_T)
    hidden[node.start : node.end].square().sum().backward()
    outside = torch.ones(len(forest.tokens_T), dtype=torch.bool)
    outside[node.start : node.end] = False
    assert embeddings.grad[0][outside].abs().max() == 0
    assert all(parameter.grad.abs().max() > 0 for parameter in trained(policy.model) if parameter.dim() > 1)


@pytest.mark.parametrize("case", LEARNED)
def test_heads_read_the_rows_own_tokens(case):
    policy = Policy(tuned(case))
    policy.heads["score"] = make_head(32, seed=0)
    together = policy(batch_of(ROWS).forest, ("scores",)).scores
    each = torch.cat([policy(batch_of([row]).forest, ("scores",)).scores for row in ROWS])
    torch.testing.assert_close(together, each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["ab", "a longer text than there are tokens"])
def test_a_start_from_text_is_pefts(tmp_path, text):
    tiny_tokenizer().save_pretrained(tmp_path)
    config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}
    vocabulary = {"vocab_size": len(tiny_tokenizer())}
    model = tiny_model("gemma3")
    model.resize_token_embeddings(**{"new_num_tokens": vocabulary["vocab_size"]}, mean_resizing=False)
    theirs = get_peft_model(copy.deepcopy(model), PromptTuningConfig(**config, tokenizer_name_or_path=str(tmp_path)))
    ours = attach(loaded(model), PromptMethod(num_virtual_tokens=5, prompt_tuning_init_text=text), seed=0)
    want = theirs.prompt_encoder["default"].embedding.weight
    assert torch.equal(ours.prompt_encoder["default"].embedding.weight, want)
    assert [parameter.dtype for parameter in trained(ours)] == [torch.float32]


def test_a_random_start_is_a_function_of_the_seed_and_learned_tokens_are_fp32_on_a_bf16_base():
    for case in LEARNED:
        if "text" in case:
            continue
        one, same, other = (attach(loaded(tiny_model("llama", dtype=torch.bfloat16)), method(LEARNED[case]), seed=s) for s in (1, 1, 2))
        assert {p.dtype for p in trained(one)} == {torch.float32}
        assert all(torch.equal(a, b) for a, b in zip(trained(one), trained(same), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(trained(one), trained(other), strict=True))
        assert logprobs(Policy(one)).isfinite().all()


@pytest.mark.parametrize("case", LEARNED)
def test_a_frozen_copy_is_the_reference_and_without_learned_tokens_the_base_answers_also_where_new_tokens_train(case):
    model = tuned(case, new_tokens=[3, 5])
    assert sum("trainable_tokens" in name for name, p in model.named_parameters() if p.requires_grad) == 2
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    copy_policy(model)
    policy = Policy(model)
    begin, base = logprobs(policy), logprobs(Policy(tiny_model("llama")))
    torch.testing.assert_close(alone(eager(model), ROWS), begin, rtol=1e-5, atol=1e-5)
    eager(model, "tunesmith_forest")
    torch.testing.assert_close(under(policy, REFERENCE), begin, rtol=1e-6, atol=1e-6)  # an LSTM rounds otherwise without gradients
    moved(model, 0.2)
    assert (logprobs(policy) - begin).abs().max() > 0.01
    torch.testing.assert_close(under(policy, REFERENCE), begin, rtol=1e-6, atol=1e-6)  # an LSTM rounds otherwise without gradients
    torch.testing.assert_close(under(policy, None), base, rtol=1e-5, atol=1e-5)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains


def eager(model: PeftModel, name: str = "eager") -> PeftModel:
    model.get_base_model().set_attn_implementation(name)
    return model


def base(folder: Path) -> LoadedModel:
    return load_model(ModelSection(name=str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("learned") / "base")


def saved(path: Path, folder: Path, case: str) -> tuple[Path, PeftModel]:
    origin = base(folder)
    model = moved(attach(origin, method(LEARNED[case]), seed=0))
    path.mkdir()
    save_result(model, origin, path, {})
    return path, model


ELSEWHERE = """
import json, sys, torch
from tests.models.test_prompts import base, load_adapter, logprobs, Policy
from pathlib import Path
torch.save = None
results = map(Path, sys.argv[2:])
print(json.dumps({path.name: logprobs(Policy(load_adapter(base(Path(sys.argv[1])), path))).tolist() for path in results}))
"""
IN_A_NEW_PROCESS = ("prompt", "p_tuning", "prefix projection")


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor, torch.Tensor]]:
    """Of each case its result's folder, its log-probabilities, and those that a new process gives."""
    root = tmp_path_factory.mktemp("results")
    made = {case: saved(root / case, folder, case) for case in IN_A_NEW_PROCESS}
    done = in_new_process(ELSEWHERE, folder, *(path for path, _ in made.values()))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    return {case: (path, alone(model, ROWS).detach(), torch.tensor(told[case])) for case, (path, model) in made.items()}


@pytest.mark.parametrize("case", IN_A_NEW_PROCESS)
def test_a_result_gives_equal_log_probabilities_in_a_new_process_and_in_plain_peft(results, folder, case):
    path, want, got = results[case]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), path).eval()
    torch.testing.assert_close(alone(plain, ROWS).detach(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", LEARNED)
def test_a_later_stage_goes_on_where_the_result_stands_with_the_method_that_made_it(tmp_path, folder, case):
    path, model = saved(tmp_path / "result", folder, case)
    again = load_adapter(base(folder), path, trainable=True)
    assert all(torch.equal(a, b) for a, b in zip(trained(again), trained(model), strict=True))
    told = method_of(path)
    assert {name: getattr(told, name) for name in LEARNED[case]} == LEARNED[case]
    assert (path / NETWORK).is_file() == (case in NETWORKS)


@pytest.mark.parametrize("case", NETWORKS)
@pytest.mark.parametrize("damage", ["no network", "another network", "torn network"])
def test_without_the_network_that_made_it_a_result_answers_but_trains_no_further(tmp_path, folder, case, damage):
    path, model = saved(tmp_path / "result", folder, case)
    if damage == "no network":
        (path / NETWORK).unlink()
    elif damage == "torn network":
        (path / NETWORK).write_bytes(b"torn")
    else:
        save_file({name: tensor + 0.1 for name, tensor in load_file(path / NETWORK).items()}, path / NETWORK)
    torch.testing.assert_close(logprobs(Policy(load_adapter(base(folder), path))), alone(model, ROWS).detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match="network"):
        load_adapter(base(folder), path, trainable=True)


@pytest.mark.parametrize("case", ["prompt", "p_tuning", "prefix projection"])
def test_a_stage_trains_learned_tokens_says_that_they_start_away_and_resumes_to_the_same_bits(tmp_path, folder, case):
    def results(name: str, *steps: int) -> dict[str, torch.Tensor]:
        for number, until in enumerate(steps):
            stage = make_stage(method=method(LEARNED[case]), max_steps=3, save_steps=1, gradient_checkpointing=True)
            run_until(base(folder), stage, tmp_path / name, until, resume=number > 0)
        return load_file(tmp_path / name / "stages" / "sft" / "model" / "adapter_model.safetensors")

    whole, resumed = results("whole", 3), results("resumed", 2, 3)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    notes = [event["note"] for event in read_events(tmp_path / "whole") if event.get("event") == "note"]
    assert len(notes) == 1
    assert "starts away from the base" in notes[0]
    losses = [event["loss"] for event in read_events(tmp_path / "whole") if "loss" in event]
    assert len(losses) == 3


def run_until(origin: LoadedModel, stage, path: Path, until: int, *, resume: bool) -> None:
    """A stage that is killed when it has logged update `until`, unless that is its last."""

    class Killed(Exception):
        pass

    def report(event: dict) -> None:
        if event.get("event") == "checkpoint" and event["step"] == until < stage.max_steps:
            raise Killed

    try:
        train_stage(origin, stage, path, ROWS, resume=resume, report=report)
    except Killed:
        return


def test_prefixes_are_refused_where_a_layer_has_no_keys_of_its_own_or_keys_of_another_shape():
    model = tiny_model("llama")
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ModelError, match="use those of another"):
        attach(loaded(model), PrefixMethod(num_virtual_tokens=3), seed=0)
    model = tuned("prefix")
    model.active_peft_config.num_attention_heads = 4
    with pytest.raises(ModelError, match="keys and values of 4 heads of 4, layer 0 has 2 of 8 and 8"):
        logprobs(Policy(model))


def test_a_setting_that_would_be_read_by_nothing_is_refused():
    with pytest.raises(ValidationError, match="prefix_projection"):
        PrefixMethod(encoder_hidden_size=8)
    with pytest.raises(ValidationError, match="LSTM"):
        PTuningMethod(encoder_num_layers=3)
    assert np.isfinite(PTuningMethod(encoder_reparameterization_type="LSTM", encoder_num_layers=3).encoder_num_layers)
