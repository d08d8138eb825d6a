"""DeepSpeed's ZeRO by two processes: the curve of one process, on shares that really are, saved and taken up again without pickle."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file
from tests.distributed import processes
from tests.distributed.processes import stage_of, together, train, trained, values
from tests.distributed.test_shards import stopped_at
from tests.distributed.work import PPO, WORK, furthest, result, stage_for
from tests.toys import make_rows, tiny_model

from tunesmith.recipe import FullMethod
from tunesmith.rundir import rank
from tunesmith.train import stage as stage_module
from tunesmith.train import zero


@pytest.fixture(autouse=True, scope="module")
def library():
    """Read once, before the processes are forked."""
    return zero._deepspeed()


@pytest.fixture(autouse=True)
def small(library, monkeypatch):
    """Has a tiny model's weights sharded, given back after each use, fetched beforehand, and sent in several buckets, as a large one's."""
    sizes = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 3000}
    initialize = library.initialize

    def initialized(*, config, **given):
        return initialize(config=config | {"zero_optimization": config["zero_optimization"] | sizes}, **given)

    monkeypatch.setattr(library, "initialize", initialized)
    monkeypatch.setattr(zero, "BUCKET", 5000)


def zero_run(kind, path, strategy, **settings):
    """One process's part; gives the bytes of weights and of masters that it held when training began."""
    seen = {}

    def watched(job):
        base = [p for name, p in job.policy.named_parameters() if ".lora_" not in name and not name.startswith("heads.")]
        seen["base"] = sum((p.numel() or p.ds_tensor.numel()) * p.element_size() for p in base)
        seen["masters"] = sum(master.numel() for master in job.optimiser._masters)
        return plain(job)

    plain, stage_module.train = stage_module.train, watched
    rows = WORK[kind][1]
    stage_of(stage_for(kind, **settings), path, rows, validation=rows, processes=2, strategy=strategy)
    return seen


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.parametrize("kind", ["sft", "full", "dpo", "ppo"])
def test_two_processes_under_zero_have_the_loss_curve_and_the_weights_of_one(alone, kind, strategy, tmp_path):
    seen = values(together(2, lambda: zero_run(kind, tmp_path / "2", strategy), tmp_path / "said"))
    one, two = alone(kind), trained(tmp_path / "2")
    assert two.losses == pytest.approx(one.losses, rel=1e-5, abs=1e-6)
    assert two.norms == pytest.approx(one.norms, rel=1e-4)
    assert two.evaluated == pytest.approx(one.evaluated, rel=1e-5)
    assert furthest(one.path, two.path) < 1e-4
    whole = sum(p.numel() * p.element_size() for p in tiny_model("llama").parameters())
    assert max(process["base"] for process in seen) < (0.52 if strategy == "zero3" else 1.01) * whole
    assert len({process["masters"] for process in seen}) == 1
    if kind == "full":
        assert 4 * max(process["masters"] for process in seen) < 0.52 * whole


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_run_under_zero_goes_on_on_one_process_and_on_two_to_the_same_weights(alone, strategy, tmp_path):
    stage, rows = stage_for("full"), WORK["full"][1]
    for count, step in ((2, 2), (1, 4), (2, 5)):

        def part(step=step):
            return stage_of(stage, tmp_path / "run", rows, processes=2, strategy=strategy, report=stopped_at(step))

        ended = together(count, part, tmp_path / "said")
        assert all(one.status == 0 if step == 5 else one.value.startswith("Interrupted") for one in ended), ended
        files = {file.name for file in (tmp_path / f"run/stages/sft/checkpoints/step-{step}").iterdir()}
        assert ("state.1.safetensors" in files) == (count == 2)
        assert not any(file.suffix in (".pt", ".bin", ".pkl") for file in (tmp_path / "run").rglob("*"))
    unbroken = alone("full")
    assert trained(tmp_path / "run").losses == pytest.approx(unbroken.losses, rel=1e-5)
    assert furthest(tmp_path / "run", unbroken.path) < 1e-4


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_in_bf16_it_learns_as_in_fp32_and_goes_on_to_the_very_same_weights(strategy, tmp_path, monkeypatch):
    stage, rows = stage_for("full", learning_rate=1e-3), WORK["full"][1]
    monkeypatch.setattr(processes, "tiny_model", lambda family: tiny_model(family).bfloat16())

    def part(name, step=5):
        return lambda: stage_of(stage, tmp_path / name, rows, processes=2, strategy=strategy, report=stopped_at(step))

    values(together(2, part("unbroken"), tmp_path / "said"))
    together(2, part("run", 3), tmp_path / "said")
    held = load_file(tmp_path / "run/stages/sft/checkpoints/step-3/state.1.safetensors")
    assert {tensor.dtype for name, tensor in held.items() if name.startswith(("weight.", "first.", "second."))} == {torch.float32}
    values(together(2, part("run"), tmp_path / "said"))
    assert furthest(tmp_path / "run", tmp_path / "unbroken") == 0
    monkeypatch.undo()
    plain = train(1, stage, tmp_path / "plain", rows)
    assert trained(tmp_path / "unbroken").losses == pytest.approx(plain.losses, rel=0.02)
    assert plain.losses[-1] < 0.99 * plain.losses[0]


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_gradient_that_is_no_number_no_update_is_made(strategy, dtype, tmp_path, monkeypatch):
    backward, count = zero.ZeroOptimiser.backward, [0]

    def poisoned(self, loss):
        count[0] += 1
        backward(self, loss * (float("nan") if count[0] > 4 and rank() else 1.0))

    monkeypatch.setattr(zero.ZeroOptimiser, "backward", poisoned)
    monkeypatch.setattr(processes, "tiny_model", lambda family: tiny_model(family).to(dtype))
    stage, rows = stage_for("full"), WORK["full"][1]
    ended = together(2, lambda: stage_of(stage, tmp_path / "run", rows, processes=2, strategy=strategy), tmp_path / "said")
    assert all(one.value.startswith("NonFinite: stage sft, step ") for one in ended), ended
    assert all("gradient norm is inf; no update was made from it" in one.value for one in ended)
    for file in (tmp_path / "run").rglob("state*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values() if tensor.is_floating_point())


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_stage_that_has_ended_leaves_nothing_of_itself_and_the_next_one_begins(strategy, tmp_path):
    def two_stages():
        held = []

        def watched(job):
            held.append(weakref.ref(job.policy))
            held.extend(weakref.ref(parameter) for parameter in job.policy.parameters())
            return plain(job)

        plain, stage_module.train = stage_module.train, watched
        for name in ("first", "second"):
            stage_of(stage_for("full"), tmp_path / name, WORK["full"][1], processes=2, strategy=strategy)
            gc.collect()
        return sum(one() is not None for one in held)

    assert values(together(2, two_stages, tmp_path / "said")) == [0, 0]
    assert furthest(tmp_path / "first", tmp_path / "second") == 0


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.parametrize("kind, rows", [("sft", 14), ("full", 14)])
def test_all_batches_of_an_update_count(alone, kind, rows, strategy, tmp_path):
    """Three of a process in an update, and in the last of an epoch fewer."""
    settings, rows = {"gradient_accumulation_steps": 3}, make_rows(rows)

    def part():
        stage_of(stage_for(kind, **settings), tmp_path / "2", rows, validation=rows, processes=2, strategy=strategy)

    values(together(2, part, tmp_path / "said"))
    one, two = alone(kind, settings, rows=rows), trained(tmp_path / "2")
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.norms == pytest.approx(one.norms, rel=1e-4)
    assert furthest(one.path, two.path) < 1e-4


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.parametrize(
    "kind, settings",
    [
        ("ppo", {"rollout": {"prompts_per_step": 1, "max_new_tokens": 6}, "objective": PPO["objective"] | {"num_mini_batches": 1}}),
        ("ppo", {"method": FullMethod()}),
        ("full", {"load_best_model_at_end": True, "gradient_checkpointing": True}),
        ("kto", {}),
        ("dpo", {"objective": "reward"}),
        ("dpo", {"objective": "reward", "method": FullMethod()}),
    ],
)
def test_processes_with_fewer_batches_than_others_and_the_best_weights_at_the_end(alone, kind, settings, strategy, tmp_path):
    rows = WORK[kind][1]

    def part():
        stage_of(stage_for(kind, **settings), tmp_path / "2", rows, validation=rows, processes=2, strategy=strategy)

    values(together(2, part, tmp_path / "said"))
    one, two = alone(kind, settings), trained(tmp_path / "2")
    assert two.losses == pytest.approx(one.losses, rel=1e-4, abs=1e-5)
    assert furthest(one.path, two.path) < 1e-3


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_an_adapter_in_fp32_trains_on_a_base_in_bf16(strategy, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "tiny_model", lambda family: tiny_model(family).bfloat16())
    rows = WORK["sft"][1]
    values(together(2, lambda: stage_of(stage_for("sft"), tmp_path / "2", rows, processes=2, strategy=strategy), tmp_path / "said"))
    one, two = train(1, stage_for("sft"), tmp_path / "1", rows), trained(tmp_path / "2")
    assert two.losses == pytest.approx(one.losses, rel=0.01)
    assert {tensor.dtype for tensor in result(two.path).values()} == {torch.float32}
