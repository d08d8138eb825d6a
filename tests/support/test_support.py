"""Each green cell of docs/support.md: a method and what it works with, on a tiny Llama."""

from __future__ import annotations

import signal
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from tests.distributed.processes import together, values
from tests.pipeline.helpers import recipe
from tests.pipeline.helpers import stage as one_stage
from tests.support.cells import CAPABILITIES, GREEN, METHODS, reason
from tests.toys import batch_of, make_rows, make_stage, model_folder, stage_inputs, train_stage

import tunesmith
from tunesmith.errors import Interrupted, RecipeError
from tunesmith.models.layout import layers_of
from tunesmith.models.load import LoadedModel, load_model
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.objectives import SFT
from tunesmith.recipe import Method, ModelSection
from tunesmith.rundir import RunDirectory, rank, read_events
from tunesmith.train import zero
from tunesmith.train.devices import of_first
from tunesmith.train.signals import StopRequest
from tunesmith.train.stage import run_stage
from tunesmith.train.window import run_window

ROWS = make_rows(12, seed=3)
LOSS_APART = {"bf16": 0.02, "fp16": 0.01}  # relative, of the mean loss over the steps, to fp32's


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return model_folder(tmp_path_factory.mktemp("support") / "llama")


def base(folder: Path, name: str, dtype: str = "float32") -> LoadedModel:
    return load_model(ModelSection(name=str(folder), dtype=dtype, quantization="nf4" if name == "qlora" else None))


def stage(name: str, **changed):
    return make_stage(**{"method": METHODS[name], "max_steps": 4, "save_steps": 1, "rows": len(ROWS)} | changed)


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in read_events(run) if "loss" in event]


def weights(run: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((run / "stages" / "sft" / "model").glob("*.safetensors"))]


def fresh(folder: Path, name: str, seed: int = 0, **how) -> Policy:
    """A policy whose method is no longer as it began."""
    model = attach(base(folder, name), TypeAdapter(Method).validate_python(METHODS[name]), seed=seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and METHODS[name]["type"] not in ("full", "partial"):
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return Policy(model, **how)


@cache
def trains(folder: Path, name: str, dtype: str) -> list[float]:
    """Losses of four updates from the same rows, of which the last is the lowest."""
    run = folder.parent / "trained" / name / dtype
    train_stage(base(folder, name, dtype), stage(name, per_device_train_batch_size=len(ROWS)), run, ROWS)
    found = losses(run)
    changed = [event["fraction_changed"] for event in read_events(run) if "fraction_changed" in event]
    assert len(found) == 4
    assert all(map(np.isfinite, found))
    assert changed[-1] > 0.5
    assert found[-1] == min(found) < found[0]
    return found


def check_fp32(folder, name, tmp_path):
    trains(folder, name, "float32")


def check_bf16(folder, name, tmp_path):
    narrow, wide = trains(folder, name, "bfloat16"), trains(folder, name, "float32")
    assert np.mean(narrow) == pytest.approx(np.mean(wide), rel=LOSS_APART["bf16"])


def check_fp16(folder, name, tmp_path):
    narrow, wide = trains(folder, name, "float16"), trains(folder, name, "float32")
    assert np.mean(narrow) == pytest.approx(np.mean(wide), rel=LOSS_APART["fp16"])


def check_checkpointing(folder, name, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        policy = fresh(folder, name, gradient_checkpointing=checkpointing)
        calls = []
        for layer in layers_of(policy.backbone):
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        run_window(policy, SFT(), [batch_of(ROWS[:4])])
        again = 1 if name == "partial" else 2  # of two layers, those that the backward pass goes through
        assert len(calls) == 2 + (again if checkpointing else 0)
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    for key, gradient in plain.items():
        assert gradient.any(), key
        torch.testing.assert_close(recomputed[key], gradient, rtol=1e-5, atol=1e-6)


def check_packed(folder, name, tmp_path):
    policy = fresh(folder, name)
    with torch.no_grad():
        together = policy(batch_of(ROWS[:5]).forest).logprobs
        alone = torch.cat([policy(batch_of([row]).forest).logprobs for row in ROWS[:5]])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def check_resume(folder, name, tmp_path):
    train_stage(base(folder, name), stage(name), tmp_path / "whole", ROWS)
    stop = StopRequest()

    def ask(event):
        if event.get("step") == 2 and "loss" in event:
            stop.received = signal.SIGTERM

    with pytest.raises(Interrupted):
        train_stage(base(folder, name), stage(name), tmp_path / "cut", ROWS, stop=stop, report=ask)
    train_stage(base(folder, name), stage(name), tmp_path / "cut", ROWS)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def check_merge(folder, name, tmp_path):
    model = fresh(folder, name).model
    ids = torch.arange(5, 40)[None]
    live = attach_plain(model)(input_ids=ids, use_cache=False).logits
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(input_ids=ids, use_cache=False).logits, live, rtol=1e-4, atol=1e-4)


def attach_plain(model):
    """The model with transformers' own attention: the policy's is for forests."""
    model.get_base_model().set_attn_implementation("sdpa")
    return model


def part(folder: Path, name: str, path: Path, **given) -> None:
    """One process's part in a stage."""
    inputs = stage_inputs(base(folder, name), ROWS, path.parent / f"stores{rank()}", processes=2, **given)
    with StopRequest() as stop:
        opened = RunDirectory.open(path, resume=True) if rank() == 0 else None
        resumed = of_first(lambda: opened.resumed)
        with opened or RunDirectory.follow(path, resumed=resumed) as run:
            run_stage(stage(name, per_device_train_batch_size=2, save_steps=4), inputs, run, stop=stop, report=lambda event: None)


@cache
def curve_of_one(folder: Path, name: str, path: Path) -> list[float]:
    values(together(1, partial(part, folder, name, path / name / "run"), path / name / "said"))
    return losses(path / name / "run")


def curves_agree(folder: Path, name: str, tmp_path: Path, **given) -> None:
    values(together(2, partial(part, folder, name, tmp_path / "2", **given), tmp_path / "said"))
    one, two = curve_of_one(folder, name, folder.parent / "alone"), losses(tmp_path / "2")
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-5, abs=1e-6)


def check_ddp(folder, name, tmp_path):
    curves_agree(folder, name, tmp_path)


def check_fsdp2(folder, name, tmp_path):
    curves_agree(folder, name, tmp_path, strategy="fsdp")


def check_zero3(folder, name, tmp_path):
    zero._deepspeed()  # read once, before the processes are forked
    curves_agree(folder, name, tmp_path, strategy="zero3")


CHECKS = {
    "fp32": check_fp32,
    "bf16": check_bf16,
    "fp16": check_fp16,
    "checkpointing": check_checkpointing,
    "packed": check_packed,
    "resume": check_resume,
    "merge": check_merge,
    "ddp": check_ddp,
    "fsdp2": check_fsdp2,
    "zero3": check_zero3,
}


@pytest.mark.parametrize("name, capability", GREEN, ids=[f"{name}-{capability}" for name, capability in GREEN])
def test_works(folder, name, capability, tmp_path):
    CHECKS[capability](folder, name, tmp_path)


GREY = [(method, capability) for method in METHODS for capability in CAPABILITIES if reason(method, capability) is not None]
SHARDING = {"fsdp2": "fsdp", "zero3": "zero3"}
WHOLE_RESULTS = [("full", "merge"), ("partial", "merge")]  # nothing is refused there: the export copies


@pytest.mark.parametrize("name, capability", [cell for cell in GREY if cell not in WHOLE_RESULTS])
def test_what_cannot_work_is_refused_with_the_reason(folder, name, capability, tmp_path):
    quantised = {"quantization": "nf4"} if name == "qlora" else {}
    whole = recipe(tmp_path, folder, stages=[one_stage(method=METHODS[name])])
    whole["model"] |= quantised
    if capability in SHARDING:
        with pytest.raises(RecipeError, match="does not shard a quantised base"):
            tunesmith.load_recipe(whole | {"launch": {"strategy": SHARDING[capability]}})
        return
    run = tunesmith.train(whole, out=tmp_path / "run").path
    with pytest.raises(RecipeError) as caught:
        tunesmith.export(run, "merged")
    assert reason(name, capability) in str(caught.value)
    assert caught.value.exit_status == 2
    assert not (run / "export").exists()


def test_the_grey_cells_are_the_ones_that_are_tried_and_the_whole_results():
    assert len(GREY) == 11
    assert set(WHOLE_RESULTS) <= set(GREY)
