"""The fault plan for training, in its short form: a resumed run ends bit for bit as the unbroken one; the rest is a named error."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.harness import Child, FailingStorage, copy_of, in_child, installed
from tests.toys import Rows, loaded, make_rows, make_stage, tiny_model, train_stage

from tunesmith.errors import Interrupted, NonFinite, StorageFailed
from tunesmith.objectives import OBJECTIVES, SFT
from tunesmith.rundir import read_events, verify_folder
from tunesmith.train.optimiser import Optimiser
from tunesmith.train.signals import StopRequest

STEPS = 9
METHODS = {"lora": {"type": "lora", "r": 4, "lora_dropout": 0.1}, "full": {"type": "full"}}
ROWS, HELD_OUT = make_rows(7), make_rows(3, seed=1)
UNLIKE = Rows([(ids[::-1].copy(), weights) for ids, weights in HELD_OUT])  # the better the training rows are known, the worse these


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(1)
    return loaded(tiny_model("llama"))


def work(
    base, path: Path, method: str, *, held_out: Rows = HELD_OUT, report=lambda event: None, stop: StopRequest | None = None, **settings: Any
) -> str:
    """Trains to the end, going on from what is there; gives the hash of the result's weights."""
    chosen = {"max_steps": STEPS, "save_steps": 2, "eval_steps": 3, "load_best_model_at_end": False} | settings
    stage = make_stage(method=METHODS[method], **chosen)
    train_stage(base, stage, path, ROWS, validation=held_out, stop=stop, report=report)
    return result_hash(path)


def result_hash(path: Path) -> str:
    (weights,) = (path / "stages" / "sft" / "model").glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory):
    """The hash of the result of a run that nothing disturbed, by method."""
    folder = tmp_path_factory.mktemp("unbroken")
    return {method: in_child(lambda method=method: work(base, folder / method, method)).result for method in METHODS}


def resumed(base, path: Path, method: str, **settings: Any) -> str:
    ended = in_child(lambda: work(base, path, method, **settings))
    assert ended.status == 0, ended.result
    return ended.result


def assert_each_step_logged_once(path: Path, steps: int = STEPS) -> None:
    events = [event for event in read_events(path) if event.get("stage") == "sft"]
    assert [event["step"] for event in events if "loss" in event] == list(range(1, steps + 1))
    evaluated = [event["step"] for event in events if event.get("event") == "evaluated"]
    assert evaluated == sorted(set(evaluated)) == [step for step in range(1, steps + 1) if step % 3 == 0 or step == steps]


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def checkpoints(path: Path) -> list[Path]:
    folder = path / "stages" / "sft" / "checkpoints"
    return sorted(folder.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def test_a_signal_outside_training_ends_the_run_at_once():
    def outside() -> None:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    ended = in_child(outside)
    assert (ended.status, ended.result["error"]) == (130, "Interrupted")


def test_a_signal_that_comes_while_the_last_step_runs_is_answered_too():
    with StopRequest() as stop:
        stop.defer(True)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            stop.defer(False)


def test_a_signal_that_waits_for_its_steps_end_is_said_at_once_and_once():
    said: queue.SimpleQueue[tuple[str, threading.Thread]] = queue.SimpleQueue()
    with StopRequest() as stop:
        stop.defer(True, lambda name: said.put((name, threading.current_thread())))
        os.kill(os.getpid(), signal.SIGINT)
        name, thread = said.get(timeout=60)
        assert name == "SIGINT"
        assert thread is not threading.main_thread(), "a handler may come amid a print"
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            stop.defer(False)
    assert said.empty()


def test_where_no_thread_can_be_started_the_signal_is_answered_all_the_same(monkeypatch):
    def none(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    with StopRequest() as stop:
        stop.defer(True, lambda name: None)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            stop.defer(False)


class PoisonedLoss(SFT):
    """SFT whose loss is not a number from the fifth window on."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.seen = 0

    def terms(self, outputs: Any, batch: Any) -> Any:
        terms = super().terms(outputs, batch)
        self.seen += outputs.logprobs.requires_grad
        poison = float("nan") if self.seen > 4 else 1.0
        return {name: term._replace(sum=term.sum * poison) for name, term in terms.items()}


def poison_gradient(value: float) -> None:
    """From the fifth update on one gradient is not finite, while the loss is."""
    plain, count = Optimiser.grad_norm, [0]

    def norm(self: Optimiser, *given: Any) -> float:
        count[0] += 1
        if count[0] == 5:
            self.flat_gradient[3] = value
        return plain(self, *given)

    Optimiser.grad_norm = norm


@pytest.mark.parametrize("what", ["loss", "gradient nan", "gradient inf"])
@pytest.mark.parametrize("method", METHODS)
def test_a_number_that_is_not_finite_ends_the_run_before_its_update(base, unbroken, method, what, fault, tmp_path):
    def poisoned() -> str:
        if what == "loss":
            OBJECTIVES["sft"] = PoisonedLoss
        else:
            poison_gradient(float(what.split()[1]))
        return work(base, tmp_path, method)

    for _ in fault("NaN or infinity in loss, gradient, reward").over([what]):
        ended = in_child(poisoned)
        assert (ended.status, ended.result["error"]) == (1, "NonFinite")
        assert "step 5" in ended.result["text"]
        assert_only_finite(tmp_path)
        assert [event["step"] for event in read_events(tmp_path) if "loss" in event] == [1, 2, 3, 4]
        assert not (tmp_path / "stages" / "sft" / "model").exists()
        assert resumed(base, tmp_path, method) == unbroken[method]


def assert_only_finite(path: Path) -> None:
    from safetensors.torch import load_file

    for file in path.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.isfinite(tensor).all() or not tensor.is_floating_point(), f"{name} in {file}"


def test_a_validation_loss_that_is_not_finite_ends_the_run(base, tmp_path):
    def poisoned() -> str:
        class Poisoned(SFT):
            def terms(self, outputs: Any, batch: Any) -> Any:
                terms = super().terms(outputs, batch)
                return terms if outputs.logprobs.requires_grad else {k: t._replace(sum=t.sum * float("inf")) for k, t in terms.items()}

        OBJECTIVES["sft"] = Poisoned
        return work(base, tmp_path, "lora")

    ended = in_child(poisoned)
    assert (ended.status, ended.result["error"]) == (1, NonFinite.__name__)
    assert "validation loss" in ended.result["text"]


def test_weights_that_overflow_are_never_written(base, tmp_path):
    ended = in_child(lambda: work(base, tmp_path, "full", learning_rate=1e38, max_grad_norm=None, save_steps=1, weight_decay=1e30))
    assert (ended.status, ended.result["error"]) == (1, "NonFinite")
    assert not (tmp_path / "stages" / "sft" / "model").exists()
    assert_only_finite(tmp_path)


def stopped_after(base, path: Path, method: str, step: int, **settings: Any) -> Path:
    """A run killed after a step was logged."""
    die = lambda event: kill_myself() if event.get("step") == step and "loss" in event else None  # noqa: E731
    assert in_child(lambda: work(base, path, method, report=die, **settings)).signal == signal.SIGKILL
    return path


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))


def test_a_damaged_checkpoint_at_a_step_that_is_saved_again_is_replaced(base, tmp_path):
    def until_five() -> str:
        with StopRequest() as stop:
            return work(
                base,
                tmp_path,
                "lora",
                stop=stop,
                report=lambda event: os.kill(os.getpid(), signal.SIGTERM) if event.get("step") == 5 else None,
            )

    assert in_child(until_five).status == 130  # step 5 is no step at which one saves or prunes
    for _ in range(2):
        stopped_after(base, tmp_path, "lora", 7)
        assert [folder.name for folder in checkpoints(tmp_path)] == ["step-6", "step-5"]
        verify_folder(checkpoints(tmp_path)[0])
        flip(checkpoints(tmp_path)[0] / "state.safetensors")


def test_a_damaged_best_checkpoint_is_never_taken_for_the_result(base, tmp_path):
    def damaging(event: dict[str, Any]) -> None:
        if event.get("step") == STEPS and "loss" in event:
            for folder in checkpoints(tmp_path):
                flip(folder / "state.safetensors")

    settings = {"load_best_model_at_end": True, "held_out": UNLIKE}
    ended = in_child(lambda: work(base, tmp_path, "lora", report=damaging, **settings))
    assert (ended.status, ended.result["error"]) == (1, "CheckpointError"), ended.result
    assert not (tmp_path / "stages" / "sft" / "model").exists()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_while_saving_leaves_the_older_checkpoint_and_a_run_that_goes_on(base, unbroken, fault, error, tmp_path):
    stopped = stopped_after(base, tmp_path / "stopped", "lora", 5)
    for operation in fault("disk full, read-only folder, error on fsync").over(("write", "fsync", "rename", "mkdir"), short=2):
        path = copy_of(stopped, tmp_path / operation)

        def refused(path: Path = path, operation: str = operation) -> str:
            def report(event: dict[str, Any]) -> None:
                if event.get("step") == 6 and event.get("event") == "evaluated":
                    faults.enter_context(installed(FailingStorage(error, operation=operation)))

            with contextlib.ExitStack() as faults:
                return work(base, path, "lora", report=report)

        ended = in_child(refused)
        assert (ended.status, ended.result["error"]) == (1, StorageFailed.__name__), ended
        assert os.strerror(error) in ended.result["text"]
        assert checkpoints(path)[0].name == "step-4"
        verify_folder(checkpoints(path)[0])
        assert resumed(base, path, "lora") == unbroken["lora"]


def test_of_two_processes_in_one_run_directory_the_second_is_refused(base, unbroken, tmp_path):
    read, write = os.pipe()

    def first() -> str:
        def report(event: dict[str, Any]) -> None:
            if event.get("step") == 3 and "loss" in event:
                os.write(write, b"x")
                time.sleep(0.5)  # the second comes now

        return work(base, tmp_path, "lora", report=report)

    running = Child(first)
    os.read(read, 1)
    second = in_child(lambda: work(base, tmp_path, "lora"))
    assert (second.status, second.result["error"]) == (2, "OutputInUse")
    assert f"pid {running.pid}" in second.result["text"]
    assert running.wait().result == unbroken["lora"]
    assert_each_step_logged_once(tmp_path)
    os.close(read)
    os.close(write)


def test_a_checkpoint_of_other_settings_is_not_resumed_from(base, tmp_path):
    stopped_after(base, tmp_path, "lora", 5)
    ended = in_child(lambda: work(base, tmp_path, "lora", learning_rate=3e-3))
    assert (ended.status, ended.result["error"]) == (1, "CheckpointError")
    assert "other settings" in ended.result["text"]


def test_the_best_checkpoint_outlives_a_kill(base, tmp_path):
    settings = {"load_best_model_at_end": True, "held_out": UNLIKE, "save_total_limit": 1}
    whole = in_child(lambda: work(base, tmp_path / "whole", "lora", **settings)).result
    best = read_events(tmp_path / "whole")[-1]["best_step"]
    for step in (4, 7, 8):
        stopped_after(base, tmp_path / str(step), "lora", step, **settings)
        assert resumed(base, tmp_path / str(step), "lora", **settings) == whole
    assert best < STEPS, "the test wants a best step that is not the last"
