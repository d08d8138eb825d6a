"""Two processes that hold half of the base each (FSDP2): the same curve as one process, on shards that really are."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from tests.distributed import processes
from tests.distributed.processes import stage_of, together, trained, values
from tests.distributed.work import WORK, furthest, stage_for
from tests.toys import tiny_model
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor

from tunesmith.models.policy import Policy
from tunesmith.rundir import rank
from tunesmith.train import loop, updates
from tunesmith.train import stage as stage_module
from tunesmith.train.masters import Apart
from tunesmith.train.updates import Moment
from tunesmith.train.updates.adamw import AdamW


def sharded_run(kind, path, **settings):
    """One process's part in a sharded stage; gives what it held of the base and of all that trains when training began, in bytes."""
    seen = {}

    def watched(job):
        base = [p for name, p in job.policy.named_parameters() if ".lora_" not in name and not name.startswith("heads.")]
        assert all(isinstance(parameter, DTensor) for parameter in base)
        seen["base"] = sum(p.to_local().numel() * p.element_size() for p in base)
        seen["lora"] = [job.policy.fast_paths.used.get("lora"), job.policy.fast_paths.refused.get("lora")]
        return plain(job)

    plain, stage_module.train = stage_module.train, watched
    rows = WORK[kind][1]
    stage_of(stage_for(kind, **settings), path, rows, validation=rows, processes=2, strategy="fsdp")
    return seen


@pytest.mark.parametrize("kind", ["sft", "full", "dpo", "ppo"])
def test_two_processes_with_half_the_base_each_have_the_loss_curve_and_the_weights_of_one(alone, kind, tmp_path):
    seen = values(together(2, lambda: sharded_run(kind, tmp_path / "2"), tmp_path / "said"))
    one, two = alone(kind), trained(tmp_path / "2")
    assert two.losses == pytest.approx(one.losses, rel=1e-5, abs=1e-6)
    assert two.norms == pytest.approx(one.norms, rel=1e-4)
    assert two.evaluated == pytest.approx(one.evaluated, rel=1e-5)
    assert furthest(one.path, two.path) < 1e-4
    whole = sum(p.numel() * p.element_size() for p in tiny_model("llama").parameters())
    assert sum(process["base"] for process in seen) == whole
    assert max(process["base"] for process in seen) < 0.52 * whole
    if kind == "sft":
        assert seen[0]["lora"] == [None, "under a strategy that shards, one product of both would hold the base whole once more"]


def test_a_sharded_run_goes_on_unsharded_on_one_process_and_sharded_on_two_to_the_same_weights(alone, tmp_path):
    stage, rows = stage_for("full"), WORK["full"][1]
    unbroken = alone("full")
    for count, step in ((2, 2), (1, 4), (2, 5)):

        def part(step=step):
            return stage_of(stage, tmp_path / "run", rows, processes=2, strategy="fsdp", report=stopped_at(step))

        ended = together(count, part, tmp_path / "said")
        assert all(one.status == 0 if step == 5 else one.value.startswith("Interrupted") for one in ended), ended
        files = {file.name for file in (tmp_path / f"run/stages/sft/checkpoints/step-{step}").iterdir()}
        assert ("state.1.safetensors" in files) == (count == 2)
    assert trained(tmp_path / "run").losses == pytest.approx(unbroken.losses, rel=1e-5)
    assert furthest(tmp_path / "run", unbroken.path) < 1e-4


@pytest.mark.parametrize("shape", [(13, 5), (301, 77)])
def test_each_processs_part_of_a_bf16_weight_is_rounded_as_it_is_in_the_whole(shape, tmp_path):
    """So that a checkpoint of two processes' halves, of which weights and lower bits are kept, gives one process the same masters."""

    def moved(mesh=None):
        draw = torch.Generator().manual_seed(0)
        value, gradient = (torch.randn(shape, generator=draw).bfloat16() for _ in range(2))
        value = value if mesh is None else distribute_tensor(value, mesh, [Shard(0)])
        gradient = gradient if mesh is None else distribute_tensor(gradient, mesh, [Shard(0)])
        weights = torch.nn.Parameter(value)
        unit = Apart("weight", weights, AdamW(stage_for("full")))
        for step in range(3):
            unit.gradient = gradient.to_local() if mesh is not None else gradient
            unit.move(1.0, Moment(step + 1, 1e-3, 0.0))
        held = [weights.full_tensor() if mesh is not None else weights.data, unit.masters[0]]
        return [tensor.float().flatten().tolist() for tensor in held]

    weights, whole = moved()
    (first, upper), (second, lower) = values(together(2, lambda: moved(DeviceMesh("cpu", [0, 1])), tmp_path / "said"))
    assert first == second == weights
    assert upper + lower == whole
    assert torch.tensor(weights).view(torch.int32).bitwise_and(0xFFFF).count_nonzero() == 0
    assert weights != whole


@pytest.fixture(params=[97, 112])
def vocabulary(request, monkeypatch):
    """Rows of the embedding, of 32 numbers: half of 97 is no whole blocks of 256, half of 112 is seven. Every matrix gets 8-bit moments."""
    model = tiny_model("llama")
    model.resize_token_embeddings(request.param, mean_resizing=False)
    monkeypatch.setattr(processes, "tiny_model", lambda family: model)
    monkeypatch.setattr(updates, "SMALLEST", 500)
    return request.param


def test_8_bit_moments_go_on_sharded_bit_for_bit_and_on_another_number_of_processes_if_no_block_is_cut(vocabulary, tmp_path):
    stage, rows = stage_for("full", optim="adamw_8bit"), WORK["full"][1]

    def part(name, step=5, strategy="fsdp"):
        return lambda: stage_of(stage, tmp_path / name, rows, processes=2, strategy=strategy, report=stopped_at(step))

    values(together(2, part("unbroken"), tmp_path / "said"))
    for again in (2, 1):
        together(2, part(f"{again}", 3), tmp_path / "said")
        tensors = load_file(tmp_path / f"{again}/stages/sft/checkpoints/step-3/state.1.safetensors")
        assert "first_scale.model.model.embed_tokens.weight" in tensors
        ended = together(again, part(f"{again}", strategy="fsdp" if again == 2 else "ddp"), tmp_path / "said")
        if again == 1 and vocabulary == 97:
            assert ended[0].value.startswith("CheckpointError")
            assert "8-bit moments of `model.lm_head.weight` share scales in blocks of 256" in ended[0].value
            assert "resume on 2 processes with launch.strategy: fsdp, as it was" in ended[0].value
        else:
            values(ended)
            assert furthest(tmp_path / f"{again}", tmp_path / "unbroken") <= (0 if again == 2 else 1e-5)


@pytest.mark.parametrize("kind, strategy", [("full", "ddp"), ("full", "fsdp"), ("sft", "fsdp"), ("full", "zero2"), ("full", "zero3")])
def test_a_process_killed_within_an_update_is_named_by_the_one_that_waits_for_its_numbers(kind, strategy, tmp_path, monkeypatch):
    update = loop._update

    def second_update_is_the_last(job, progress):
        if rank() == 1 and progress.step == 1:
            monkeypatch.setattr(Policy, "forward", lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL))
        update(job, progress)

    monkeypatch.setattr(loop, "_update", second_update_is_the_last)
    stage, rows = stage_for(kind, save_steps=5), WORK[kind][1]
    first, second = together(2, lambda: stage_of(stage, tmp_path / "run", rows, processes=2, strategy=strategy), tmp_path / "said")
    assert second.status == -signal.SIGKILL
    assert first.value.startswith("PeerLost: rank 0 of 2: another process of this run ended")


def stopped_at(step):
    """What is reported to a process, which is asked to stop when the step is logged."""

    def report(event):
        if event.get("step") == step < 5 and "loss" in event:
            os.kill(os.getpid(), signal.SIGTERM)

    return report
