"""A checkpoint: written from where the state lies, whole, and only if all of it is finite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.toys import make_stage, tiny_model

from tunesmith.errors import CheckpointError, NonFinite
from tunesmith.models.policy import Policy
from tunesmith.rundir import RunDirectory
from tunesmith.train import checkpoint
from tunesmith.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from tunesmith.train.optimiser import Optimiser


def optimiser_of(dtype: torch.dtype) -> Optimiser:
    policy = Policy(tiny_model("llama", dtype=dtype))
    return Optimiser(policy.named_parameters(), make_stage(method="full", max_steps=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_written_without_a_copy_of_the_state_and_comes_back_bit_for_bit(tmp_path, monkeypatch, dtype):
    optimiser = optimiser_of(dtype)
    for name, held in optimiser.state().items():
        if name.startswith(("first.", "second.")):
            held.uniform_()
    real, given = checkpoint.save_file, {}
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, path: (given.update(tensors), real(tensors, path)))
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        folder = save_checkpoint(run, "sft", Progress(step=1), optimiser, "f", {})
    state = optimiser.state()
    assert all(given[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())
    before = {name: tensor.clone() for name, tensor in state.items()}
    for tensor in state.values():
        tensor.zero_()
    assert load_checkpoint(folder, optimiser, "f") == (Progress(step=1), {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimiser.state().items())


@pytest.mark.parametrize("more, gone", [({"had_gradient": True}, ""), ({}, "tokens"), ({}, "fingerprint")])
def test_a_checkpoint_of_a_version_that_remembers_other_things_is_refused_by_name(tmp_path, more, gone):
    optimiser = optimiser_of(torch.float32)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        folder = save_checkpoint(run, "sft", Progress(step=1), optimiser, "f", {})
    state = json.loads((folder / "state.json").read_text()) | more
    (folder / "state.json").write_text(json.dumps({name: value for name, value in state.items() if name != gone}))
    with pytest.raises(CheckpointError, match="made by another version"):
        load_checkpoint(folder, optimiser, "f")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, -1])
def test_a_state_with_one_number_that_is_not_finite_is_never_written(tmp_path, monkeypatch, bad, place):
    monkeypatch.setattr(checkpoint, "CHECKED", 100)
    optimiser = optimiser_of(torch.bfloat16)
    [*optimiser.state().values()][-1].flatten()[place] = bad
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        with pytest.raises(NonFinite, match=r"second\."):
            save_checkpoint(run, "sft", Progress(step=1), optimiser, "f", {})
        assert run.checkpoints("sft") == []


def test_the_random_state_of_a_gpu_is_kept_beside_the_processors_where_there_is_one(tmp_path, monkeypatch):
    """Through stand-ins for torch.cuda: that dropout on a GPU goes on from it is not shown here."""
    put = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.arange(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: put.append(state.tolist()))
    optimiser = optimiser_of(torch.float32)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        for step, (there, held) in enumerate([(True, [[*range(16)]]), (False, [])], start=1):
            with monkeypatch.context() as patch:
                patch.setattr(torch.cuda, "is_available", lambda there=there: there)
                folder = save_checkpoint(run, "sft", Progress(step=step), optimiser, "f", {})
            put.clear()
            with monkeypatch.context() as patch:  # one of a processor alone can be gone on from on a GPU
                patch.setattr(torch.cuda, "is_available", lambda: True)
                load_checkpoint(folder, optimiser, "f")
            assert put == held


def test_what_was_read_of_a_checkpoint_leaves_memory_at_once(tmp_path, monkeypatch):
    """The whole of a mapped file would count as the process's peak beside the state that it is copied to."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc here")
    weights = [(f"layers.{i}.weight", torch.nn.Parameter(torch.rand(1000, 1000))) for i in range(8)]
    optimiser = Optimiser(weights, make_stage(method="full", max_steps=2))
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        folder = save_checkpoint(run, "sft", Progress(step=1), optimiser, "f", {})
    mapped, real = [], Optimiser.load_weights

    def load_weights(own, tensors):
        mapped.append(int(status.read_text().partition("RssFile:")[2].split()[0]) << 10)
        real(own, tensors)

    monkeypatch.setattr(Optimiser, "load_weights", load_weights)
    before = int(status.read_text().partition("RssFile:")[2].split()[0]) << 10
    load_checkpoint(folder, optimiser, "f")
    assert mapped[0] - before < (folder / "state.safetensors").stat().st_size / 4
