"""The fault plan for learning from preferences, in its short form: a run killed anywhere, inside rollouts and between the updates that are
made from them too, ends bit for bit as the unbroken one."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.harness import CountingStorage, KillingStorage, in_child, installed
from tests.toys import loaded, make_items, make_prompts, make_stage, tiny_model, train_stage

from tunesmith.rundir import read_events, verify_folder
from tunesmith.train import offline, scoring
from tunesmith.train.optimiser import Optimiser
from tunesmith.train.rollouts import RolloutSource

STEPS = 6
LORA = {"type": "lora", "r": 4, "lora_dropout": 0.1}
PAIRS, PAIRS_HELD_OUT = make_items(7), make_items(3, seed=1)
LABELLED, LABELLED_HELD_OUT = make_items(7, answers=1), make_items(3, answers=1, seed=1)
PROMPTS, PROMPTS_HELD_OUT = make_prompts(6), make_prompts(2, seed=1)
ROLLOUT = {"prompts_per_step": 3, "max_new_tokens": 5, "temperature": 0.8}

ROWS: dict[str, dict[str, Any]] = {
    "dpo": {"objective": {"type": "dpo"}},
    "dpo full": {"objective": {"type": "dpo", "sft_coef": 0.2}, "method": {"type": "full"}},
    "kto": {"objective": {"type": "kto"}},
    "reward": {"objective": {"type": "reward"}},
    "ppo": {"objective": {"type": "ppo", "num_ppo_epochs": 2, "target_kl": 0.5, "whiten_rewards": True}, "rollout": ROLLOUT},
    "grpo": {"objective": {"type": "grpo", "num_generations": 3, "num_iterations": 2, "kl_coef": 0.1}, "rollout": ROLLOUT},
}
SAMPLED = ("ppo", "grpo")


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(1)
    return loaded(tiny_model("llama"))


@pytest.fixture(scope="module")
def scored_by(tmp_path_factory) -> str:
    """The folder of a reward model on the same base."""
    path = tmp_path_factory.mktemp("reward") / "run"
    stage = make_stage(name="reward", objective="reward", method=LORA, max_steps=6, learning_rate=2e-2, rows=len(PAIRS))
    ended = in_child(lambda: train_stage(loaded(tiny_model("llama")), stage, path, PAIRS) and None)
    assert ended.status == 0, ended
    return str(path / "stages" / "reward" / "model")


def work(base, scored_by: str, path: Path, row: str, *, report=lambda event: None) -> str:
    """Trains to the end, going on from what is there; gives the hash of the result's weights, heads among them."""
    settings = {"method": LORA, "save_steps": 1, "eval_steps": 3, "max_steps": STEPS, "warmup_steps": 0} | ROWS[row]
    objective = dict(settings.pop("objective"))
    if objective["type"] == "ppo":
        objective["reward_model"] = scored_by
    if objective["type"] == "grpo":
        objective["rewards"] = [{"type": "model", "model": scored_by}]
    rows, held_out = {"kto": (LABELLED, LABELLED_HELD_OUT), "ppo": (PROMPTS, PROMPTS_HELD_OUT), "grpo": (PROMPTS, PROMPTS_HELD_OUT)}.get(
        row, (PAIRS, PAIRS_HELD_OUT)
    )
    stage = make_stage(name="learn", objective=objective, rows=len(rows), load_best_model_at_end=False, **settings)
    train_stage(base, stage, path, rows, validation=held_out, report=report)
    files = sorted((path / "stages" / "learn" / "model").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.fixture(scope="module")
def unbroken(base, scored_by, tmp_path_factory):
    """The hash of the result of a run that nothing disturbed, by row."""
    folder = tmp_path_factory.mktemp("unbroken")
    ended = {row: in_child(lambda row=row: work(base, scored_by, folder / row, row)) for row in ROWS}
    assert all(end.status == 0 for end in ended.values()), ended
    return {row: end.result for row, end in ended.items()}


def kill_myself(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(function) -> None:
    ended = in_child(function)
    assert ended.signal == signal.SIGKILL, ended


def resumed(base, scored_by: str, path: Path, row: str) -> str:
    ended = in_child(lambda: work(base, scored_by, path, row))
    assert ended.status == 0, ended.result
    return ended.result


def assert_each_step_logged_once(path: Path) -> None:
    events = [event for event in read_events(path) if event.get("stage") == "learn"]
    assert [event["step"] for event in events if "loss" in event] == list(range(1, STEPS + 1))
    assert [event["step"] for event in events if event.get("event") == "evaluated"] == [3, 6]


def test_rows_are_of_different_work(unbroken):
    assert len(set(unbroken.values())) == len(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_a_run_killed_after_any_step_ends_as_the_unbroken_run(base, scored_by, unbroken, row, tmp_path):
    for step in (1, 2, 3, 5):  # of rollouts that two updates are made from, 1, 3 and 5 lie between the two
        path = tmp_path / str(step)
        die = lambda event, step=step: kill_myself() if event.get("event") == "checkpoint" and event["step"] == step else None  # noqa: E731
        killed(lambda path=path, die=die: work(base, scored_by, path, row, report=die))
        assert resumed(base, scored_by, path, row) == unbroken[row], f"killed after step {step}"
        assert_each_step_logged_once(path)


@pytest.mark.parametrize("row", ROWS)
def test_a_run_killed_again_and_again_in_the_middle_of_updates_ends_as_the_unbroken_run(base, scored_by, unbroken, row, tmp_path):
    draw = random.Random(row)

    def until_killed(update: int) -> str:
        plain, count = Optimiser.step, [0]

        def step(self: Optimiser, rate: float, norm: float) -> None:
            count[0] += 1
            if count[0] == update:
                self.masters[0].mul_(2)  # half of the update is made
                kill_myself()
            plain(self, rate, norm)

        Optimiser.step = step
        return work(base, scored_by, tmp_path, row)

    for _ in range(3):
        if in_child(lambda: until_killed(draw.randint(1, 3))).signal != signal.SIGKILL:
            break
    assert resumed(base, scored_by, tmp_path, row) == unbroken[row]
    assert_each_step_logged_once(tmp_path)


@pytest.mark.parametrize("row", ROWS)
def test_a_run_killed_at_a_call_of_the_writing_package_ends_as_the_unbroken_run(base, scored_by, unbroken, row, tmp_path):
    def counted() -> list[str]:
        with installed(CountingStorage()) as counting:
            work(base, scored_by, tmp_path / "whole", row)
        return counting.calls

    calls = in_child(counted).result
    for call in sorted(random.Random(row).sample(range(1, len(calls) + 1), 3)):
        path = tmp_path / str(call)

        def at_call(path: Path = path, call: int = call) -> str:
            with installed(KillingStorage(call)):
                return work(base, scored_by, path, row)

        killed(at_call)
        for folder in (path / "stages" / "learn" / "checkpoints").glob("step-*"):
            verify_folder(folder)
        assert resumed(base, scored_by, path, row) == unbroken[row], f"killed at call {call} ({calls[call - 1]})"
        assert_each_step_logged_once(path)


PLACES = {"sampling": (RolloutSource, "_sample"), "scoring": (scoring.StageScorer, "__call__"), "looking": (RolloutSource, "_look")}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("row", SAMPLED)
def test_a_run_killed_inside_rollouts_ends_as_the_unbroken_run(base, scored_by, unbroken, row, place, tmp_path):
    owner, name = PLACES[place]

    def until_killed() -> str:
        plain, count = getattr(owner, name), [0]

        def call(*args: Any, **kwargs: Any) -> Any:
            made = plain(*args, **kwargs)
            count[0] += 1
            if count[0] == 2:
                kill_myself()
            return made

        setattr(owner, name, call)
        return work(base, scored_by, tmp_path, row)

    killed(until_killed)
    assert resumed(base, scored_by, tmp_path, row) == unbroken[row]
    assert_each_step_logged_once(tmp_path)


@pytest.mark.parametrize("row", SAMPLED)
def test_a_run_killed_between_two_updates_from_the_same_rollouts_takes_them_from_its_checkpoint(base, scored_by, unbroken, row, tmp_path):
    die = lambda event: kill_myself() if event.get("event") == "checkpoint" and event["step"] == 3 else None  # noqa: E731
    killed(lambda: work(base, scored_by, tmp_path, row, report=die))

    def collected() -> list[Any]:
        plain, iterations = RolloutSource._collect, []
        RolloutSource._collect = lambda self, iteration: iterations.append(iteration) or plain(self, iteration)
        return [work(base, scored_by, tmp_path, row), iterations]

    assert in_child(collected).result == [unbroken[row], [2]]  # those of updates 5 and 6: those of 3 and 4 were held


@pytest.mark.parametrize("row", ["dpo", "kto"])
def test_a_damaged_file_of_the_references_sums_is_measured_anew_and_the_sound_one_read(base, scored_by, unbroken, row, tmp_path):
    die = lambda event: kill_myself() if event.get("event") == "checkpoint" and event["step"] == 2 else None  # noqa: E731
    killed(lambda: work(base, scored_by, tmp_path, row, report=die))
    sums = tmp_path / "stages" / "learn" / "reference" / "train" / offline.SUMS
    data = bytearray(sums.read_bytes())

    def measured() -> list[Any]:
        plain, folders = offline.kept_sums, []

        def kept(folder: Path, key: str, measure: Any) -> Any:
            return plain(folder, key, lambda: folders.append(folder.name) or measure())

        offline.kept_sums = kept
        return [work(base, scored_by, tmp_path, row), folders]

    data[-5] ^= 8
    sums.write_bytes(bytes(data))
    assert in_child(measured).result == [unbroken[row], ["train"]]
