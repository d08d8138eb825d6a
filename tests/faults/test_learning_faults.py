"""The fault plan for every objective: a run killed anywhere, inside rollouts and between the updates that are made from them too, ends bit
for bit as the unbroken one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.harness import Child, CountingStorage, KillingStorage, copy_of, in_child, installed
from tests.faults.stages import (
    OPTIMISER,
    PLANNED,
    SAMPLED,
    STEPS,
    WORKS,
    assert_each_step_logged_once,
    checkpoints,
    kill_at,
    kill_myself,
    newest_step,
    random_kill,
)

from tunesmith.rundir import read_events, verify_folder
from tunesmith.train import offline, scoring
from tunesmith.train.rollouts import RolloutSource
from tunesmith.train.signals import StopRequest

ANSWERED_WITHIN = 5  # seconds from a signal to the end of the process


def test_every_work_ends_with_other_weights(stages):
    assert len({stages.unbroken(work) for work in WORKS}) == len(WORKS)


@pytest.mark.parametrize("work", WORKS)
def test_a_run_killed_at_random_steps_ends_as_the_unbroken_run(stages, fault, work, tmp_path):
    """Each run is killed once, twice or three times: after a gradient, within an update, or after a log line or a checkpoint."""
    runs = fault("kill -9 at a random step of SFT, DPO, reward model, PPO and GRPO, each with LoRA and in full")
    for draw in runs.drawn(short=2, whole=6):
        path = tmp_path / str(runs.made)
        for _ in range(draw.randint(1, 3)):
            if newest_step(path) < STEPS:
                stages.killed(path, work, **random_kill(draw, newest_step(path) + 1))
        assert stages.resumed(path, work) == stages.unbroken(work)
        assert_each_step_logged_once(path)


def calls_of_a_checkpoint(stages, path: Path, work: str) -> list[tuple[int, str]]:
    """(number, kind) of each call that changes the disk from the third update's log line to the fourth's."""

    def counted() -> list[Any]:
        with installed(CountingStorage()) as counting:
            marks = []
            stages.work(path, work, report=lambda told: marks.append(len(counting.calls)) if "loss" in told else None)
            return [marks, counting.calls]

    (_, _, begin, end, *_), calls = in_child(counted).result
    return [(number, calls[number - 1]) for number in range(begin + 1, end + 1)]


@pytest.mark.parametrize("work", ["sft", "reward full", "ppo", "grpo full"])
def test_a_run_killed_at_any_call_of_a_checkpoints_writing_ends_as_the_unbroken_run(stages, fault, work, tmp_path):
    calls = calls_of_a_checkpoint(stages, tmp_path / "whole", work)
    assert {"open", "write", "fsync", "rename", "mkdir", "rmtree"} <= {kind for _, kind in calls}
    runs = fault("kill -9 inside the checkpoint's writing, at every open, write, fsync and rename")
    for call, _ in runs.over(calls, short=4):
        path = tmp_path / str(call)

        def until_killed(path: Path = path, call: int = call) -> str:
            with installed(KillingStorage(call)):
                return stages.work(path, work)

        assert in_child(until_killed).signal == signal.SIGKILL
        assert checkpoints(path), "no checkpoint is left"
        for folder in checkpoints(path):
            verify_folder(folder)
        assert stages.resumed(path, work) == stages.unbroken(work)
        assert_each_step_logged_once(path)


DAMAGES = {
    "deleted": lambda file: file.unlink(),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "flipped": lambda file: flip(file),
}


def flip(file: Path) -> None:
    """One bit in the middle is another."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("work", ["sft", "sft full", "dpo", "ppo full", "grpo"])
def test_a_damaged_checkpoint_is_refused_and_the_older_one_taken(stages, fault, work, tmp_path):
    stopped = stages.killed(tmp_path / "stopped", work, report=kill_at("loss", 4))
    newest, older = checkpoints(stopped)
    assert (newest.name, older.name) == ("step-3", "step-2")
    cases = [(file.name, what) for file in sorted(newest.iterdir()) for what in DAMAGES]
    for name, what in fault("each checkpoint file deleted, truncated, one bit flipped").over(cases, short=4):
        path = copy_of(stopped, tmp_path / f"{name}-{what}")
        DAMAGES[what](checkpoints(path)[0] / name)
        assert stages.resumed(path, work) == stages.unbroken(work)
        assert_each_step_logged_once(path)
        refused = [event["checkpoint"] for event in read_events(path) if event.get("event") == "checkpoint_refused"]
        assert refused == ["step-3"], "it is not told"
        for folder in checkpoints(path):
            verify_folder(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("work", ["sft", "dpo full", "reward", "ppo", "grpo full"])
def test_a_signal_in_the_middle_of_a_step_ends_the_run_with_its_checkpoint(stages, fault, work, number, tmp_path):
    runs = fault("SIGTERM, SIGINT, a second signal")
    for second in runs.over([signal.SIGTERM + signal.SIGINT - number]):
        begun, begins = os.pipe()

        def signalled(begins: int = begins) -> str:
            plain, count = OPTIMISER.grad_norm, [0]

            def norm(self: Any, *given: Any) -> float:
                count[0] += 1
                if count[0] == 3:
                    os.write(begins, b"x")
                    time.sleep(0.2)  # both signals find the step at work
                return plain(self, *given)

            OPTIMISER.grad_norm = norm
            with StopRequest() as stop:
                return stages.work(tmp_path, work, stop=stop)

        running = Child(signalled)
        os.close(begins)
        assert os.read(begun, 1), running.wait()
        os.kill(running.pid, number)
        time.sleep(0.05)
        os.kill(running.pid, second)  # changes nothing
        sent = time.monotonic()
        ended = running.wait()
        assert time.monotonic() - sent < ANSWERED_WITHIN
        assert (ended.status, ended.result["error"]) == (130, "Interrupted")
        assert f"stopped by {number.name} after step 3" in ended.result["text"]
        assert newest_step(tmp_path) == 3
        verify_folder(checkpoints(tmp_path)[0])
        assert stages.resumed(tmp_path, work) == stages.unbroken(work)
        assert_each_step_logged_once(tmp_path)
        os.close(begun)


@pytest.mark.parametrize("work", SAMPLED)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_reward_that_is_not_finite_ends_the_run_before_its_update(stages, fault, work, value, tmp_path):
    def poisoned() -> None:
        plain, count = scoring.StageScorer.__call__, [0]

        def scored(self: Any, answers: Any) -> Any:
            count[0] += 1
            found = plain(self, answers)
            if count[0] > 1:
                found.total[:] = float(value)
            return found

        scoring.StageScorer.__call__ = scored

    for _ in fault("NaN or infinity in loss, gradient, reward").over([value]):
        ended = stages.ended(tmp_path, work, poisoned)
        assert (ended.status, ended.result["error"]) == (1, "RolloutFailed")
        assert "rollouts 1" in ended.result["text"]
        assert [event["step"] for event in read_events(tmp_path) if "loss" in event] == [1, 2]
        assert newest_step(tmp_path) == 2
        assert_only_finite(tmp_path)
        assert stages.resumed(tmp_path, work) == stages.unbroken(work)


def assert_only_finite(path: Path) -> None:
    """No tensor on the disk holds a NaN or an infinity."""
    from safetensors.torch import load_file

    for file in path.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.isfinite(tensor).all() or not tensor.is_floating_point(), f"{name} in {file}"


@pytest.mark.parametrize("days", [-1, 1])
@pytest.mark.parametrize("work", ["sft", "dpo", "grpo"])
def test_a_clock_that_jumps_a_day_changes_nothing(stages, fault, work, days, tmp_path):
    def jump(told: dict[str, Any]) -> None:
        if told.get("step") == 3 and "loss" in told:
            time.time = lambda now=time.time: now() + days * 86400
            os.utime(checkpoints(tmp_path)[0], (0, 0) if days > 0 else None)
        kill_at("loss", 5)(told)

    for _ in fault("the clock jumps a day").over([days]):
        stages.killed(tmp_path, work, report=jump)
        assert stages.resumed(tmp_path, work) == stages.unbroken(work)
        assert_each_step_logged_once(tmp_path)


PLACES = {"sampling": (RolloutSource, "_sample"), "scoring": (scoring.StageScorer, "__call__"), "looking": (RolloutSource, "_look")}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("work", SAMPLED)
def test_a_run_killed_inside_rollouts_ends_as_the_unbroken_run(stages, work, place, tmp_path):
    owner, name = PLACES[place]

    def arm() -> None:
        plain, count = getattr(owner, name), [0]

        def call(*args: Any, **kwargs: Any) -> Any:
            made = plain(*args, **kwargs)
            count[0] += 1
            if count[0] == 2:
                kill_myself()
            return made

        setattr(owner, name, call)

    stages.killed(tmp_path, work, arm)
    assert stages.resumed(tmp_path, work) == stages.unbroken(work)
    assert_each_step_logged_once(tmp_path)


@pytest.mark.parametrize("work", SAMPLED)
def test_a_run_killed_between_two_updates_from_the_same_rollouts_takes_them_from_its_checkpoint(stages, work, tmp_path):
    stages.killed(tmp_path, work, report=kill_at("checkpoint", 3))

    def collected() -> list[Any]:
        plain, iterations = RolloutSource._collect, []
        RolloutSource._collect = lambda self, iteration: iterations.append(iteration) or plain(self, iteration)
        return [stages.work(tmp_path, work), iterations]

    assert in_child(collected).result == [stages.unbroken(work), [2]]  # those of updates 5 and 6: those of 3 and 4 were held


@pytest.mark.parametrize("work", ["dpo", "kto"])
def test_a_damaged_file_of_the_references_sums_is_measured_anew_and_the_sound_one_read(stages, work, tmp_path):
    stages.killed(tmp_path, work, report=kill_at("checkpoint", 2))
    sums = next((tmp_path / "stages").glob(f"*/reference/train/{offline.SUMS}"))
    data = bytearray(sums.read_bytes())

    def measured() -> list[Any]:
        plain, folders = offline.kept_sums, []

        def kept(folder: Path, key: str, measure: Any) -> Any:
            return plain(folder, key, lambda: folders.append(folder.name) or measure())

        offline.kept_sums = kept
        return [stages.work(tmp_path, work), folders]

    data[-5] ^= 8
    sums.write_bytes(bytes(data))
    assert in_child(measured).result == [stages.unbroken(work), ["train"]]


def test_every_planned_objective_is_there_with_lora_and_in_full():
    assert len(PLANNED) == 10
    assert PLANNED.keys() <= WORKS.keys()
