"""Stages for the fault plan: every objective, with LoRA and in full, six updates long; how one is killed, resumed and looked at."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.harness import Ended, in_child
from tests.toys import make_items, make_prompts, make_rows, make_stage, train_stage

from tunesmith.models.load import LoadedModel
from tunesmith.rundir import read_events
from tunesmith.train.optimiser import Optimiser as OPTIMISER
from tunesmith.train.signals import StopRequest

STEPS = 6
STAGE = "learn"
LORA = {"type": "lora", "r": 4, "lora_dropout": 0.1}
FULL = {"method": {"type": "full"}}
ROLLOUT = {"prompts_per_step": 3, "max_new_tokens": 5, "temperature": 0.8}
ROWS, ROWS_HELD_OUT = make_rows(7), make_rows(3, seed=1)
PAIRS, PAIRS_HELD_OUT = make_items(7), make_items(3, seed=1)
LABELLED, LABELLED_HELD_OUT = make_items(7, answers=1), make_items(3, answers=1, seed=1)
PROMPTS, PROMPTS_HELD_OUT = make_prompts(6), make_prompts(2, seed=1)
DATA = {
    "sft": (ROWS, ROWS_HELD_OUT),
    "kto": (LABELLED, LABELLED_HELD_OUT),
    "ppo": (PROMPTS, PROMPTS_HELD_OUT),
    "grpo": (PROMPTS, PROMPTS_HELD_OUT),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"objective": {"type": "sft"}},
    "dpo": {"objective": {"type": "dpo", "sft_coef": 0.2}},
    "reward": {"objective": {"type": "reward"}},
    "ppo": {"objective": {"type": "ppo", "num_ppo_epochs": 2, "target_kl": 0.5, "whiten_rewards": True}, "rollout": ROLLOUT},
    "grpo": {"objective": {"type": "grpo", "num_generations": 3, "num_iterations": 2, "kl_coef": 0.1}, "rollout": ROLLOUT},
}
PLANNED = {**OBJECTIVES, **{f"{name} full": settings | FULL for name, settings in OBJECTIVES.items()}}
WORKS = {**PLANNED, "kto": {"objective": {"type": "kto"}}}
SAMPLED = ("ppo", "grpo")


class Stages:
    """Stages on one base, each in run directories of its own; what has to be made once is made when it is asked for."""

    def __init__(self, base: LoadedModel, folder: Path):
        self.base, self.folder = base, folder
        self._hashes: dict[str, str] = {}
        self._scored_by: str | None = None

    @property
    def scored_by(self) -> str:
        """The folder of a reward model on the same base."""
        if self._scored_by is None:
            path = self.folder / "reward-model" / "run"
            stage = make_stage(name="reward", objective="reward", method=LORA, max_steps=6, learning_rate=2e-2, rows=len(PAIRS))
            ended = in_child(lambda: train_stage(self.base, stage, path, PAIRS) and None)
            assert ended.status == 0, ended
            self._scored_by = str(path / "stages" / "reward" / "model")
        return self._scored_by

    def work(
        self, path: Path, work: str, *, report: Callable[[dict[str, Any]], object] = id, stop: StopRequest | None = None, **settings: Any
    ) -> str:
        """Trains to the end, going on from what is there; gives the hash of the result's weights, heads among them."""
        method = LORA if work in ("sft", "reward") else LORA | {"lora_dropout": 0.0}  # the others refuse it
        chosen = {"method": method, "save_steps": 1, "eval_steps": 3, "max_steps": STEPS, "warmup_steps": 0} | WORKS[work] | settings
        objective = dict(chosen.pop("objective"))
        if objective["type"] == "ppo":
            objective["reward_model"] = self.scored_by
        if objective["type"] == "grpo":
            objective.setdefault("rewards", [{"type": "model", "model": self.scored_by}])
        rows, held_out = DATA.get(objective["type"], (PAIRS, PAIRS_HELD_OUT))
        stage = make_stage(name=STAGE, objective=objective, rows=len(rows), load_best_model_at_end=False, **chosen)
        train_stage(self.base, stage, path, rows, validation=held_out, report=report, stop=stop)
        files = sorted((path / "stages" / STAGE / "model").glob("*.safetensors"))
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def unbroken(self, work: str) -> str:
        """The hash of the result of a run that nothing disturbed."""
        if work not in self._hashes:
            self._hashes[work] = self.resumed(self.folder / work.replace(" ", "-"), work)
        return self._hashes[work]

    def resumed(self, path: Path, work: str, **settings: Any) -> str:
        """The hash at the end of a run that goes on, in a process of its own."""
        ended = self.ended(path, work, **settings)
        assert ended.status == 0, ended
        return ended.result

    def ended(self, path: Path, work: str, before: Callable[[], object] = int, **settings: Any) -> Ended:
        """How a run ends in a process of its own, in which `before` is called first."""

        self.scored_by  # noqa: B018 - made in this process, so that every child finds it

        def run() -> str:
            before()
            return self.work(path, work, **settings)

        return in_child(run)

    def killed(self, path: Path, work: str, before: Callable[[], object] = int, **settings: Any) -> Path:
        """The folder of a run that was killed."""
        ended = self.ended(path, work, before, **settings)
        assert ended.signal == signal.SIGKILL, ended
        return path


def kill_myself(*args: Any, **kwargs: Any) -> None:
    """SIGKILL, now."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(event: str, step: int) -> Callable[[dict[str, Any]], None]:
    """A report function that kills this process once an event of a step is logged; "loss" is the event of an update."""
    return lambda told: kill_myself() if told.get("step") == step and event in (told.get("event"), *told) else None


PLACES = ("gradient", "half an update", "loss", "checkpoint")


def kill_in_update(place: str, step: int) -> None:
    """Kills this process in the middle of its update `step`: with the gradients computed, or with the update half made."""
    plain, count = OPTIMISER.step, [0]

    def moved(self: Any, *args: Any, **kwargs: Any) -> None:
        count[0] += 1
        if count[0] == step:
            if place == "half an update":
                self.flat.mul_(2)
            kill_myself()
        plain(self, *args, **kwargs)

    OPTIMISER.step = moved


def random_kill(draw: random.Random, first: int = 1) -> dict[str, Any]:
    """What makes a run that goes on at update `first` die at a random step and place, its checkpoints a random number of steps apart."""
    step, place, apart = draw.randint(first, STEPS), draw.choice(PLACES), draw.randint(1, 3)
    if place == "checkpoint":
        step = -(-step // apart) * apart
    if place in ("loss", "checkpoint"):
        return {"report": kill_at(place, step), "save_steps": apart}
    return {"before": lambda: kill_in_update(place, step - first + 1), "save_steps": apart}


def newest_step(path: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((int(folder.name.removeprefix("step-")) for folder in checkpoints(path)), default=0)


def checkpoints(path: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    folders = (path / "stages" / STAGE / "checkpoints").glob("step-*")
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")), reverse=True)


def assert_each_step_logged_once(path: Path) -> None:
    """Every update and every evaluation has one line, in order."""
    events = [event for event in read_events(path) if event.get("stage") == STAGE]
    steps = [event["step"] for event in events if "loss" in event]
    assert steps == list(range(1, STEPS + 1)), f"the log has the steps {steps}"
    assert [event["step"] for event in events if event.get("event") == "evaluated"] == [3, 6]
