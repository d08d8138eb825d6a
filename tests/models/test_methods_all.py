"""What holds of every method: the count of what trains, results in a new process, later stages, references, new tokens, heads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fresh import in_new_process
from tests.models.method_cases import ADAPTER_CASES, METHOD_CASES, method
from tests.toys import batch_of, loaded, make_items, make_rows, make_stage, model_folder, stage_inputs, tiny_model, train_stage
from torch import nn

from tunesmith.data.template import load_template
from tunesmith.models.adapters import POLICY, REFERENCE, active_adapter, copy_policy
from tunesmith.models.heads import make_head
from tunesmith.models.load import LoadedModel, load_model
from tunesmith.models.methods import (
    add_adapter,
    attach,
    continue_adapter,
    method_of,
    resolve,
    save_result,
    starts_unchanged,
    trainable_count,
)
from tunesmith.models.policy import Policy
from tunesmith.recipe import WHOLE, ModelSection
from tunesmith.rundir import RunDirectory, read_events
from tunesmith.train.signals import StopRequest
from tunesmith.train.stage import add_new_tokens, run_stage

IDS = torch.tensor([[5, 9, 40, 77, 12, 258, 257, 33]])  # 257 and 258 are chatml's, new to the base
PAIRS = make_items(5)


def each(cases: dict[str, dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", cases)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] :]  # PEFT gives learned tokens' too


def learn(model: nn.Module, steps: int = 2) -> nn.Module:
    """Some plain steps, by hand, so that nothing of the method is as it was put there."""
    for _ in range(steps):
        out = model(input_ids=IDS, use_cache=False).logits[0, -IDS.shape[1] : -1]
        loss = torch.nn.functional.cross_entropy(out, IDS[0, 1:])
        parameters = list(trained(model).values())
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if grad is not None and grad.any():
                parameter.data -= 0.02 * grad / grad.norm() * math.sqrt(grad.numel())
    return model


def base(folder: Path) -> tuple[LoadedModel, list[int]]:
    """A base without a chat template, with the tokens that one brings."""
    section = ModelSection(name=str(folder), dtype="float32", chat_template="chatml")
    origin = load_model(section)
    return origin, add_new_tokens(origin, load_template(origin.tokenizer, section))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The base's folder, and of every method: its trained result's folder, settings, logits, and the score of a head."""
    root, found = tmp_path_factory.mktemp("methods"), {}
    folder = model_folder(root / "base", tied=False, template=None, markers=False)
    for name, settings in METHOD_CASES.items():
        origin, new = base(folder)
        given = resolve(origin.model, method(settings))
        model = learn(attach(origin, given, seed=0, new_tokens=[] if given.type == "partial" else new))
        heads = nn.ModuleDict({"score": make_head(32, seed=3)})
        path = root / name
        path.mkdir()
        save_result(model, origin, path, {"method": given.model_dump(mode="json")}, heads)
        with torch.no_grad():
            hidden = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1]
            score = heads["score"](hidden).item()
        found[name] = {"folder": path, "method": given, "logits": logits(model), "score": score, "names": sorted(trained(model))}
    return folder, found


RELOAD = """
import sys, json
import torch
from pathlib import Path
from tests.models.test_methods_all import IDS, base, logits
from tunesmith.models.heads import load_head
from tunesmith.models.load import load_model
from tunesmith.models.methods import load_adapter
from tunesmith.models.result import is_adapter
from tunesmith.recipe import ModelSection
told = {}
for folder in map(Path, sys.argv[2:]):
    if is_adapter(folder):
        model = load_adapter(base(Path(sys.argv[1]))[0], folder)
    else:
        model = load_model(ModelSection(name=str(folder), dtype="float32")).model
    with torch.no_grad():
        hidden = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1]
        told[folder.name] = {"logits": logits(model).tolist(), "score": load_head(folder, "score", 32)(hidden).item()}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def reloaded(results) -> dict[str, dict[str, Any]]:
    """What a new process makes of the results."""
    folder, found = results
    done = in_new_process(RELOAD, folder, *(one["folder"] for one in found.values()))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@each(METHOD_CASES)
def test_what_a_method_trains_is_counted_without_attaching_it(name):
    origin = loaded(tiny_model("llama"))
    given = resolve(origin.model, method(METHOD_CASES[name]))
    counted = trainable_count(origin.model, given)
    assert counted == sum(p.numel() for p in trained(attach(origin, given, seed=0)).values())


@each(METHOD_CASES)
def test_a_fresh_one_leaves_the_output_as_it_was_where_it_says_so(name):
    given = method(METHOD_CASES[name])
    fresh = logits(attach(loaded(tiny_model("llama")), given, seed=0), IDS[:, :5])
    plain = logits(tiny_model("llama"), IDS[:, :5])
    assert torch.allclose(fresh, plain, rtol=1e-5, atol=1e-5) == starts_unchanged(given)


@each(METHOD_CASES)
def test_a_result_gives_in_a_new_process_the_logits_and_the_score_that_it_gave_new_tokens_among_them(results, reloaded, name):
    want, told = results[1][name], reloaded[name]
    torch.testing.assert_close(torch.tensor(told["logits"]), want["logits"], rtol=1e-5, atol=1e-5)
    assert told["score"] == pytest.approx(want["score"], abs=1e-5)


@each(ADAPTER_CASES)
def test_new_tokens_train_beside_every_adapter(results, name):
    folder, found = results
    names = [one for one in found[name]["names"] if "trainable_tokens" in one]
    assert len(names) == 2, "the embeddings' rows, and those of a head of its own"
    without = logits(base(folder)[0].model)
    new = [257, 258]
    assert ((found[name]["logits"] - without)[:, new].abs().amax(0) > 1e-2).all()


@each(ADAPTER_CASES)
def test_a_later_stage_goes_on_with_what_the_earlier_one_trained(results, name):
    folder, found = results
    want = found[name]
    assert method_of(want["folder"]) == want["method"]
    model = continue_adapter(base(folder)[0], want["method"], want["folder"])
    torch.testing.assert_close(logits(model), want["logits"], rtol=1e-5, atol=1e-5)
    assert sorted(trained(model)) == want["names"]
    assert (logits(learn(model, 1)) - want["logits"]).abs().max() > 1e-3


@each(ADAPTER_CASES)
def test_a_reference_and_a_named_adapter_stay_what_they_are_while_the_policy_trains(results, name):
    folder, found = results
    want = found[name]
    origin = base(folder)[0]
    model = continue_adapter(origin, want["method"], want["folder"])
    copy_policy(model)
    add_adapter(model, origin, want["folder"], "other")
    assert sorted(trained(model)) == want["names"]
    learn(model)
    moved = logits(model)
    assert (moved - want["logits"]).abs().max() > 1e-3
    for other in (REFERENCE, "other"):
        with active_adapter(model, other):
            torch.testing.assert_close(logits(model), want["logits"], rtol=1e-5, atol=1e-5)
    with active_adapter(model, None):
        torch.testing.assert_close(logits(model), logits(base(folder)[0].model), rtol=1e-5, atol=1e-5)
    with active_adapter(model, POLICY):
        torch.testing.assert_close(logits(model), moved, rtol=1e-5, atol=1e-5)
    assert sorted(trained(model)) == want["names"]


@each(ADAPTER_CASES)
def test_dpo_starts_at_ln_2_from_a_trained_adapter_and_from_a_fresh_one(tmp_path, name):
    origin = loaded(tiny_model("llama"))
    given = resolve(origin.model, method(ADAPTER_CASES[name]))
    (tmp_path / "start").mkdir()
    model = attach(origin, given, seed=0)
    torch.manual_seed(1)
    for parameter in trained(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_result(model, origin, tmp_path / "start", {"method": given.model_dump(mode="json")})
    stage = make_stage(objective="dpo", method=given, max_steps=2, rows=len(PAIRS), warmup_steps=0)
    for run, start in (("fresh", None), ("trained", tmp_path / "start")):
        train_stage(loaded(tiny_model("llama")), stage, tmp_path / run, PAIRS, start=start)
        losses = [event["loss"] for event in read_events(tmp_path / run) if "loss" in event]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(losses[-1] - math.log(2)) > 1e-4


@pytest.mark.parametrize("tied", [False, True])
@each({name: ADAPTER_CASES[name] for name in ("lora", "ia3", "prefix", "prompt", "p_tuning", "houlsby")})
def test_where_scores_alone_are_learned_new_tokens_train_in_the_embeddings_and_not_in_a_head_of_its_own(tmp_path, name, tied):
    origin = load_model(ModelSection(name=str(model_folder(tmp_path / "base", tied=tied)), dtype="float32"))
    stage = make_stage(objective="reward", method=method(ADAPTER_CASES[name]), max_steps=3, rows=len(PAIRS), warmup_steps=0)
    new = sorted({int(ids[0]) for ids, _ in PAIRS.rows})  # they stand in the rows
    before = [layer.weight[new].detach().clone() for layer in (origin.model.get_input_embeddings(), origin.model.get_output_embeddings())]
    inputs = stage_inputs(origin, PAIRS, tmp_path / "stores", new_tokens=new)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        model = run_stage(stage, inputs, run, stop=StopRequest(), report=lambda event: None)
    causal = model.get_base_model()
    after = [layer.weight[new] for layer in (causal.get_input_embeddings(), causal.get_output_embeddings())]
    moved = [(one != other).any(1).all().item() for one, other in zip(before, after, strict=True)]
    assert moved == [True, tied]


@pytest.mark.parametrize("checkpointing", [False, True])
@each(METHOD_CASES)
def test_everything_that_trains_has_a_gradient_by_the_second_step(name, checkpointing):
    model = attach(loaded(tiny_model("llama")), method(METHOD_CASES[name]), seed=0)
    policy, batch = Policy(model, gradient_checkpointing=checkpointing), batch_of(make_rows(4)).forest
    for _ in range(2):
        policy.zero_grad()
        policy(batch).logprobs.sum().backward()
        for parameter in trained(policy).values():
            parameter.data += 1e-3 * parameter.grad
    without = [one for one, parameter in trained(policy).items() if not parameter.grad.any()]
    assert not without


def test_a_method_that_makes_a_whole_model_is_named_so():
    assert {settings["type"] for settings in METHOD_CASES.values()} >= set(WHOLE)
