"""Two processes that hold the whole model each: the same curve as one process, every row once, one that ends ends all."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext

import pytest
from tests.cli_tools import write_project
from tests.distributed import processes
from tests.distributed.processes import stage_of, together, train, trained, values
from tests.distributed.work import WORK, furthest, stage_for
from tests.toys import make_rows, model_folder, tiny_model

import tunesmith
from tunesmith import fitting, pipeline, preparation
from tunesmith.data.batching import DatasetSource, Share, deal
from tunesmith.rundir import rank
from tunesmith.train import stage as stage_module
from tunesmith.train.devices import gather

ROWS = WORK["sft"][1]


@pytest.mark.parametrize("kind", WORK)
def test_two_processes_have_the_loss_curve_and_the_weights_of_one(alone, kind, tmp_path):
    rows = WORK[kind][1]
    one, two = alone(kind), train(2, stage_for(kind), tmp_path / "2", rows, validation=rows)
    assert two.losses == pytest.approx(one.losses, rel=1e-5, abs=1e-6)
    assert two.norms == pytest.approx(one.norms, rel=1e-4)
    assert [line["tokens"] for line in two.lines] == [line["tokens"] for line in one.lines]
    assert two.evaluated == pytest.approx(one.evaluated, rel=1e-5)
    assert furthest(one.path, two.path) < 1e-4


def test_processes_that_wait_for_each_other_for_good_are_said_to_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "SECONDS", 2)
    with pytest.raises(AssertionError, match="2 of 2 processes hang"):
        together(2, lambda: gather(None) if rank() else time.sleep(1000), tmp_path)


@pytest.mark.parametrize("what", ["dtype", "adapter to start from", "setting, row"])
def test_processes_that_do_not_begin_alike_are_refused_and_what_differs_is_named(what, tmp_path, monkeypatch):
    def other(family):
        model = tiny_model(family)
        return model.bfloat16() if what == "dtype" and rank() else model

    def build(*given):
        model = plain(*given)
        if what == "adapter to start from" and rank():
            next(p for name, p in model.named_parameters() if "lora_A" in name).data.neg_()
        return model

    def part():
        stage_of(stage_for("sft"), tmp_path / "run", make_rows(9 if what == "setting, row" and rank() else 10), processes=2)

    plain = stage_module.build_model
    monkeypatch.setattr(processes, "tiny_model", other)
    monkeypatch.setattr(stage_module, "build_model", build)
    ended = together(2, part, tmp_path / "said")
    said = f"process 1 does not begin as process 0 does: it has another {what}"
    assert [said in str(one.value) for one in ended] == [True, True], ended


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_row_is_learned_from_once_an_epoch_whatever_the_number_of_processes(count):
    items = [(row,) for row in ROWS]
    shares = [DatasetSource(items, batch_size=2, accumulation=2, seed=0, share=Share(number, count)) for number in range(count)]
    for epoch in range(2):
        seen = []
        for step in range(epoch * 3, epoch * 3 + 3):
            windows = [source.window(step).batches for source in shares]
            assert len({len(batches) for batches in windows}) == 1, "every process computes as many batches"
            seen += [item for batches in windows for batch in batches if batch.counts for item in batch.items]
        assert sorted(seen) == list(range(len(ROWS)))
    assert deal([], Share(0, 2)) == []


def test_processes_with_unequal_room_make_their_batches_as_large_as_the_first_does(tmp_path, monkeypatch):
    recipe, chosen, plain = write_project(tmp_path, model_folder(tmp_path / "model")), [], preparation.fit_stages

    def fitted(session):
        stages = plain(session)
        chosen.extend((stage.per_device_train_batch_size, stage.gradient_accumulation_steps) for stage in stages)
        return stages

    def work():
        tunesmith.train(recipe, out=tmp_path / "run", sets=["launch.nproc_per_node=2", "stages.0.max_steps=1"])
        return chosen

    monkeypatch.setattr(pipeline, "process_group", nullcontext)  # they are in one
    monkeypatch.setattr(preparation, "fit_stages", fitted)
    monkeypatch.setattr(fitting, "stage_memory", lambda session, shape, stage: stage.per_device_train_batch_size)
    monkeypatch.setattr(fitting, "memory_room", lambda session: 100 if rank() == 0 else 5)
    assert values(together(2, work, tmp_path / "said")) == [[[8, 1]], [[8, 1]]]


def killed_at(step: int, number: int, how: signal.Signals):
    """What is reported to a process, which gets a signal when the step is logged."""

    def report(event):
        if rank() == number and event.get("step") == step and "loss" in event:
            os.kill(os.getpid(), how)

    return report


def test_a_killed_process_ends_the_others_and_the_run_goes_on_to_the_same_weights_on_one_process_and_on_two(tmp_path):
    stage, unbroken = stage_for("sft"), train(2, stage_for("sft"), tmp_path / "unbroken", ROWS)

    def part(report):
        return lambda: stage_of(stage, tmp_path / "run", ROWS, processes=2, report=report)

    first, second = together(2, part(killed_at(3, 1, signal.SIGKILL)), tmp_path / "said")
    assert second.status == -signal.SIGKILL
    assert first.status == 1
    assert first.value.startswith("PeerLost")
    (alone,) = together(1, part(killed_at(4, 0, signal.SIGTERM)), tmp_path / "said")
    assert alone.value.startswith("Interrupted")
    assert train(2, stage, tmp_path / "run", ROWS).losses == pytest.approx(unbroken.losses, rel=1e-5)
    assert furthest(tmp_path / "run", unbroken.path) < 1e-4


def test_a_signal_to_one_process_stops_all_with_a_checkpoint_of_the_same_step(tmp_path):
    def work():
        return stage_of(stage_for("sft"), tmp_path / "run", ROWS, processes=2, report=killed_at(3, 1, signal.SIGTERM))

    assert [one.value.split(";")[0] for one in together(2, work, tmp_path / "said")] == [
        "Interrupted: stage sft: stopped by SIGTERM after step 3"
    ] * 2
    assert trained(tmp_path / "run").path.joinpath("stages/sft/checkpoints/step-3").is_dir()
