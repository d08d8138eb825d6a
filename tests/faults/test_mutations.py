"""The fault plan tried on itself: with one defence of training, data or evaluation taken out, what it stands for no longer holds.

`test_storage_faults.py` does the same for the writing package.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluate.test_run import Setup
from tests.faults.harness import in_child
from tests.faults.stages import DATA, OPTIMISER, assert_each_step_logged_once, kill_at, newest_step
from tests.faults.test_learning_faults import assert_only_finite
from tests.pipeline.helpers import recipe
from tests.toys import make_items, model_folder

import tunesmith
from tunesmith.data import prepare
from tunesmith.data.batching import DatasetSource
from tunesmith.data.ledger import Ledger
from tunesmith.evaluate._work import Work
from tunesmith.rundir import RunDirectory, read_events
from tunesmith.train import checkpoint, loop, offline
from tunesmith.train.buffer import Rollouts
from tunesmith.train.signals import StopRequest


def check_resume(work: str, step: int, **settings: Any) -> Callable[..., None]:
    """Killed after a step's log line, a run ends as the unbroken one, with each step logged once."""

    def check(stages: Any, path: Path, remove: Callable[[], object]) -> None:
        stages.killed(path, work, report=kill_at("loss", step), **settings)
        ended = stages.ended(path, work, remove, **settings)
        assert ended.status == 0, ended
        assert ended.result == stages.unbroken(work), "other weights"
        assert_each_step_logged_once(path)

    return check


def check_other_rows(stages: Any, path: Path, remove: Callable[[], object]) -> None:
    """A run that was killed before its first checkpoint and goes on with other pairs measures the reference on those."""

    def others() -> None:
        DATA["dpo"] = make_items(7, seed=5), make_items(3, seed=6)

    def removed() -> None:
        others()
        remove()

    stages.killed(path, "dpo", report=kill_at("loss", 2), save_steps=6)
    fresh = stages.ended(path.with_name(f"{path.name} fresh"), "dpo", others, save_steps=6)
    ended = stages.ended(path, "dpo", removed, save_steps=6)
    assert fresh.status == 0
    assert (ended.status, ended.result) == (0, fresh.result), "sums of other rows"


def check_other_settings(stages: Any, path: Path, remove: Callable[[], object]) -> None:
    """A checkpoint of other settings is refused."""
    stages.killed(path, "sft", report=kill_at("loss", 3))
    ended = stages.ended(path, "sft", remove, learning_rate=3e-3)
    assert ended.status == 1, "went on with other settings"


def check_not_finite(stages: Any, path: Path, remove: Callable[[], object]) -> None:
    """A gradient that is no number ends the run before its update."""

    def poison() -> None:
        plain, count = loop.run_window, [0]

        def window(policy: Any, *args: Any, **kwargs: Any) -> Any:
            result = plain(policy, *args, **kwargs)
            count[0] += 1
            if count[0] == 3:
                next(p for p in policy.parameters() if p.grad is not None).grad.view(-1)[3] = float("nan")
            return result

        loop.run_window = window
        remove()

    ended = stages.ended(path, "sft", poison)
    assert ended.status == 1
    assert [event["step"] for event in read_events(path) if "loss" in event] == [1, 2], "an update was made from it"


def check_overflow(stages: Any, path: Path, remove: Callable[[], object]) -> None:
    """Weights that overflow are never on the disk."""
    stages.ended(path, "sft full", remove, learning_rate=1e38, max_grad_norm=None, weight_decay=1e30)
    assert_only_finite(path)


def check_signal(stages: Any, path: Path, remove: Callable[[], object]) -> None:
    """A signal within a step ends the run with that step's checkpoint."""

    def signalled() -> str:
        remove()
        plain, count = OPTIMISER.step, [0]

        def step(self: Any, *args: Any) -> None:
            count[0] += 1
            if count[0] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            plain(self, *args)

        OPTIMISER.step = step
        with StopRequest() as stop:
            return stages.work(path, "sft", stop=stop)

    assert in_child(signalled).status == 130
    assert newest_step(path) == 2, "the step in hand is lost"


def check_ledger(stages: Any, path: Path, remove: Callable[[], object]) -> None:
    """A row that a reader loses ends the run; it never just vanishes."""
    made = recipe(path, model_folder(path / "model"))

    def losing() -> None:
        remove()
        plain = prepare.read_records

        def lossy(*args: Any, **kwargs: Any) -> Any:
            result = plain(*args, **kwargs)
            result.records.pop()
            return result

        prepare.read_records = lossy
        tunesmith.plan(made)

    ended = in_child(losing)
    assert ended.status != 0, "a row vanished"
    assert ended.result["error"] == "InvariantViolated"


def check_scored_once(stages: Any, path: Path, remove: Callable[[], object]) -> None:
    """What an evaluation has finished is not asked again."""

    def twice() -> int:
        kept: dict[str, Any] = {}
        Setup().run(save=lambda unit, payload: kept.update({unit: json.loads(json.dumps(payload))}))
        remove()
        again = Setup()
        again.run(done=kept)
        return len(again.base.calls) + len(again.tuned.calls)

    assert in_child(twice).result == 0, "scored twice"


def forget(*names: str) -> Callable[[], None]:
    """Puts back what the optimiser held before it read a checkpoint, for tensors of its state of these kinds."""

    def remove() -> None:
        plain = OPTIMISER.load

        def load(self: Any, tensors: dict[str, torch.Tensor]) -> None:
            fresh = {name: held.clone() for name, held in self.state().items()}
            plain(self, tensors)
            plain(self, {**tensors, **{name: held for name, held in fresh.items() if any(kind in name for kind in names)}})

        OPTIMISER.load = load

    return remove


def put(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Replaces an attribute, in a process that ends with the check."""
    return lambda: setattr(owner, name, value)


def order_counted_from_the_resume() -> None:
    plain, first = DatasetSource.window, []

    def window(self: Any, step: int) -> Any:
        first.append(step)
        return plain(self, step - first[0])

    DatasetSource.window = window


def finished_units_forgotten() -> None:
    plain = Work.unit

    def unit(self: Any, *args: Any) -> Any:
        self.done.clear()
        return plain(self, *args)

    Work.unit = unit


def updates_from_anything() -> None:
    def update(self: Any, rate: float, reduce: Any) -> float:
        norm = self.grad_norm(reduce)
        self.step(rate, norm)
        return norm

    OPTIMISER.update, loop._require_finite = update, lambda *args: None


def any_fingerprint() -> None:
    plain = checkpoint.load_checkpoint

    def load(folder: Path, optimiser: Any, fingerprint: str) -> Any:
        return plain(folder, optimiser, json.loads((folder / checkpoint.STATE).read_text())["fingerprint"])

    loop.load_checkpoint = load


# the defence: the check that must fail without it, how it is taken out, what the check then says
MUTATIONS = {
    "weights in the checkpoint": (check_resume("sft", 3), forget("weight."), "other weights"),
    "the optimiser's first moments": (check_resume("sft", 3), forget("first"), "other weights"),
    "the optimiser's second moments": (check_resume("sft full", 3), forget("second"), "other weights"),
    "the count of updates": (check_resume("dpo", 3), forget("updates"), "other weights"),
    "the state of the random numbers": (check_resume("sft", 3), put(torch, "set_rng_state", lambda state: None), "other weights"),
    "the data's position": (check_resume("sft", 3), order_counted_from_the_resume, "other weights"),
    "rollouts in the checkpoint": (check_resume("grpo", 4), put(Rollouts, "load", lambda state, make: None), "other weights"),
    "the log is rewound": (
        check_resume("sft", 4, save_steps=3),
        put(RunDirectory, "rewind", lambda self, stage, step: None),
        "4, 4, 5",
    ),
    "the checkpoint's fingerprint": (check_other_settings, any_fingerprint, "other settings"),
    "the key of the reference's sums": (
        check_other_rows,
        put(offline, "_is_of", lambda folder, key: (folder / offline.KEY).is_file()),
        "sums of other rows",
    ),
    "numbers are looked at before an update": (check_not_finite, updates_from_anything, "an update was made"),
    "weights are looked at before they are saved": (
        check_overflow,
        put(checkpoint, "_is_finite", lambda tensor: True),
        "state.safetensors",
    ),
    "signals wait for the step's end": (check_signal, put(StopRequest, "defer", lambda self, deferring, heard=None: None), "is lost"),
    "the ledger": (check_ledger, put(Ledger, "check", lambda self: None), "a row vanished"),
    "finished units of an evaluation": (check_scored_once, finished_units_forgotten, "scored twice"),
}


@pytest.mark.parametrize("defence", MUTATIONS)
def test_with_its_defence_a_property_holds_and_without_it_no_longer(stages, defence, tmp_path):
    check, remove, said = MUTATIONS[defence]
    check(stages, tmp_path / "with", lambda: None)
    with pytest.raises(AssertionError, match=said):
        check(stages, tmp_path / "without", remove)
