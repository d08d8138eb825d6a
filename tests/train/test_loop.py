"""The loop: the right best step and early stopping on a known curve, logs, and gradients by the second step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.toys import batch_of, items_of, loaded, make_job, make_rows, make_stage, tiny_model

from tunesmith.data.batching import DatasetSource, Window
from tunesmith.errors import Interrupted, InvariantViolated
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.objectives import SFT
from tunesmith.recipe import FullMethod, LoraMethod
from tunesmith.rundir import RunDirectory
from tunesmith.train import checkpoint, loop
from tunesmith.train.loop import train
from tunesmith.train.signals import StopRequest
from tunesmith.train.window import WindowResult

ROWS = make_rows(8)
CURVE = {2: 3.0, 4: 2.0, 6: 1.0, 8: 1.5, 10: 1.2, 12: 1.1}  # the least at step 6, though the last evaluations fall again


def follow_curve(curve: dict[int, float]) -> Callable[[Any], WindowResult]:
    """An evaluation that gives the curve's next value each time."""
    values = iter(curve.values())
    return lambda between: WindowResult(next(values), {}, {})


def run_curve(tmp_path, **settings):
    policy = Policy(tiny_model("llama"))
    stage = make_stage(max_steps=12, eval_steps=2, save_steps=3, save_total_limit=1, **settings)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        job = make_job(policy, stage, run, ROWS, evaluate=follow_curve(CURVE))
        return job, train(job)


def test_the_best_step_is_the_one_with_the_lowest_validation_loss_and_its_weights_are_taken(tmp_path, monkeypatch):
    weights = {}

    def remember(job: Any, event: dict[str, Any]) -> None:
        if "loss" in event:
            weights[event["step"]] = job.optimiser.flat.clone()

    monkeypatch.setattr(loop, "_log", remember)
    job, progress = run_curve(tmp_path, load_best_model_at_end=True)
    assert (progress.best_step, progress.best_loss, progress.step) == (6, 1.0, 12)
    assert torch.equal(job.optimiser.flat, weights[6])
    assert not torch.equal(job.optimiser.flat, weights[12])
    assert torch.equal(dict(job.policy.named_parameters())[job.optimiser.names[0]], job.optimiser.masters[0])


def test_without_load_best_the_last_weights_stay(tmp_path):
    job, progress = run_curve(tmp_path)
    newest = job.run.checkpoints("sft")[0]
    assert (newest.name, progress.best_step) == ("step-12", 6)
    kept = load_file(newest / "state.safetensors")
    assert torch.equal(kept[f"weight.{job.optimiser.names[0]}"], job.optimiser.masters[0])


@pytest.mark.parametrize("patience, stop", [(1, 8), (2, 10), (3, 12), (4, 12)])
def test_training_stops_after_as_many_evaluations_without_gain_as_the_recipe_says(tmp_path, patience, stop):
    _, progress = run_curve(tmp_path, early_stopping_patience=patience)
    assert progress.step == stop
    assert progress.stopped_early == (patience < 4)


def test_a_run_that_stopped_early_stays_stopped_when_it_is_resumed(tmp_path):
    run_curve(tmp_path, early_stopping_patience=1)
    stage = make_stage(max_steps=12, eval_steps=2, save_steps=3, save_total_limit=1, early_stopping_patience=1)
    with RunDirectory.open(tmp_path / "run", resume=True) as run:
        assert train(make_job(Policy(tiny_model("llama")), stage, run, ROWS, evaluate=follow_curve(CURVE))).step == 8


def test_the_last_step_is_always_evaluated_and_saved(tmp_path):
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        stage = make_stage(max_steps=5, eval_steps=3, save_steps=3)
        train(make_job(Policy(tiny_model("llama")), stage, run, ROWS, validation=ROWS))
        assert [path.name for path in run.checkpoints("sft")] == ["step-5", "step-3"]
        assert [event["step"] for event in run.events() if event.get("event") == "evaluated"] == [3, 5]


def test_lines_come_every_logging_steps_and_at_both_ends(tmp_path):
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        train(make_job(Policy(tiny_model("llama")), make_stage(max_steps=8, logging_steps=3), run, ROWS))
        lines = [event for event in run.events() if "loss" in event]
    assert [line["step"] for line in lines] == [1, 3, 6, 8]
    wanted = {"time", "stage", "step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes"}
    assert all(wanted <= line.keys() for line in lines)


def test_tokens_count_a_shared_token_once_for_each_row_that_holds_it(tmp_path):
    rows = make_rows(8, shared=30)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        train(make_job(Policy(tiny_model("llama")), make_stage(max_steps=2, per_device_train_batch_size=4), run, rows))
        lines = [event for event in run.events() if "loss" in event]
    assert sum(line["tokens"] for line in lines) == sum(len(ids) for ids, _ in rows)
    assert sum(line["computed_tokens"] for line in lines) == sum(len(ids) for ids, _ in rows) - 2 * 3 * 30


METHODS = {"full": FullMethod(), "lora": LoraMethod(r=4)}


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_every_trained_tensor_has_a_gradient_by_the_second_step(tmp_path, family, method, checkpointing):
    model = attach(loaded(tiny_model(family)), METHODS[method], seed=0)
    policy = Policy(model, gradient_checkpointing=checkpointing)
    assert policy.backbone.get_input_embeddings().weight.requires_grad == (method == "full")
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        job = make_job(policy, make_stage(max_steps=3, warmup_steps=0), run, ROWS)
        progress = train(job)
    assert progress.saw_gradients
    assert job.optimiser.without_gradient() == []
    assert job.optimiser.fraction_changed() > 0.5


def test_a_trained_tensor_without_a_gradient_is_named_at_the_second_step(tmp_path, monkeypatch):
    policy = Policy(attach(loaded(tiny_model("llama")), LoraMethod(r=4), seed=0))
    layer = policy.backbone.layers[1]
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda hidden, *args, **kwargs: plain(hidden, *args, **kwargs).detach() * 0 + hidden)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        with pytest.raises(InvariantViolated, match=r"layers\.1\..* among them"):
            train(make_job(policy, make_stage(max_steps=4, warmup_steps=0), run, ROWS))
        assert [event["step"] for event in run.events() if "loss" in event] == [1]


def test_a_warm_up_from_zero_does_not_count_as_a_first_update(tmp_path):
    policy = Policy(attach(loaded(tiny_model("llama")), LoraMethod(r=4), seed=0))
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        assert train(make_job(policy, make_stage(max_steps=3, warmup_steps=1), run, ROWS)).saw_gradients


@pytest.mark.parametrize("silent", [(0,), (1,), (0, 2)])
def test_an_update_without_a_gradient_is_not_taken_for_tensors_that_get_none(tmp_path, silent):
    class Silent(SFT):
        """Nothing to learn in some windows: the loss is there, its gradient is 0."""

        def terms(self, outputs: Any, batch: Any) -> Any:
            terms = super().terms(outputs, batch)
            step = len(lines())
            return {name: term._replace(sum=term.sum * 0) for name, term in terms.items()} if step in silent else terms

    policy = Policy(attach(loaded(tiny_model("llama")), LoraMethod(r=4), seed=0))
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        lines = lambda: [event for event in run.events() if "loss" in event]  # noqa: E731
        progress = train(make_job(policy, make_stage(max_steps=5, warmup_steps=0), run, ROWS, objective=Silent()))
        assert [event["step"] - 1 for event in lines() if event["grad_norm"] == 0] == list(silent)
    assert progress.saw_gradients


def test_a_stage_whose_updates_all_had_no_gradient_ends_with_an_error(tmp_path):
    class Silent(SFT):
        def terms(self, outputs: Any, batch: Any) -> Any:
            return {name: term._replace(sum=term.sum * 0) for name, term in super().terms(outputs, batch).items()}

    policy = Policy(attach(loaded(tiny_model("llama")), LoraMethod(r=4), seed=0))
    with (
        RunDirectory.open(tmp_path / "run", resume=False) as run,
        pytest.raises(InvariantViolated, match="nothing was learned: none of 3 updates had a gradient"),
    ):
        train(make_job(policy, make_stage(max_steps=3, warmup_steps=0), run, ROWS, objective=Silent()))


def test_a_stage_whose_only_gradient_came_at_a_rate_of_0_ends_with_an_error(tmp_path):
    class Silent(SFT):
        def terms(self, outputs: Any, batch: Any) -> Any:
            terms = super().terms(outputs, batch)
            return terms if not lines() else {name: term._replace(sum=term.sum * 0) for name, term in terms.items()}

    policy = Policy(attach(loaded(tiny_model("llama")), LoraMethod(r=4), seed=0))
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        lines = lambda: [event for event in run.events() if "loss" in event]  # noqa: E731
        with pytest.raises(InvariantViolated, match="nothing was learned: none of 3 updates had a gradient and a learning rate above 0"):
            train(make_job(policy, make_stage(max_steps=3, warmup_steps=1), run, ROWS, objective=Silent()))


def test_training_learns_what_there_is_to_learn(tmp_path):
    policy = Policy(tiny_model("llama"))
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        train(make_job(policy, make_stage(max_steps=60, learning_rate=1e-2, per_device_train_batch_size=8), run, ROWS))
        losses = [event["loss"] for event in run.events() if "loss" in event]
    assert losses[-1] < losses[0] / 20


def test_the_source_alone_decides_the_batches(tmp_path):
    asked = []

    class Rollouts:
        steps_per_epoch = 1

        def window(self, step: int) -> Window:
            asked.append(step)
            batch = batch_of(ROWS[step : step + 2])
            return Window([replace(batch, columns={"reward_B": np.full(2, step)})], {"reward": float(step)})

        def state(self) -> dict[str, torch.Tensor]:
            return {}

    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        train(make_job(Policy(tiny_model("llama")), make_stage(max_steps=3), run, ROWS, source=Rollouts()))
        lines = [event for event in run.events() if "loss" in event]
    assert asked == [0, 1, 2]
    assert [line["reward"] for line in lines] == [0, 1, 2]


class Growing(DatasetSource):
    """A data set whose windows depend on how many were made, and which may say that it is enough."""

    def __init__(self, *args: Any, enough: int = 99, **settings: Any):
        super().__init__(*args, **settings)
        self.made, self.enough = 0, enough

    def window(self, step: int) -> Window:
        self.made += 1
        stop = {"rule": "max_kl", "value": 2.0, "limit": 1.0} if self.made > self.enough else None
        return Window(super().window(self.made).batches, {"made": float(self.made)}, stop)

    def state(self) -> dict[str, torch.Tensor]:
        return {"made": torch.tensor(self.made)}

    def load(self, state: Any) -> None:
        self.made = int(state["made"])


def growing(**settings: Any) -> Growing:
    return Growing(items_of(ROWS), batch_size=2, accumulation=1, seed=0, **settings)


def test_a_sources_state_is_in_the_checkpoint_and_taken_up_by_the_resumed_run(tmp_path):
    stage, given, told = make_stage(max_steps=6, save_steps=2), [], []
    for until in (4, 6):
        with RunDirectory.open(tmp_path / "run", resume=True) as run:
            shorter = stage.model_copy(update={"max_steps": until})
            job = make_job(Policy(tiny_model("llama")), shorter, run, ROWS, source=growing(), report=told.append)
            train(job)
            given.append(job.source.made)
            lines = [event for event in run.events() if "loss" in event]
    assert given == [4, 6]
    assert [event for event in told if event.get("event") == "resumed"] == [{"event": "resumed", "stage": "sft", "step": 4}]
    assert [line["made"] for line in lines if line["step"] > 4] == [5, 6]


@pytest.mark.parametrize(
    "evaluate", [None, lambda between: WindowResult(1.0, {}, {})], ids=["without evaluation", "with an evaluation after it"]
)
@pytest.mark.parametrize("save_steps", [3, 9])
def test_a_source_that_says_stop_ends_the_stage_before_the_update_with_a_checkpoint_and_for_good(tmp_path, save_steps, evaluate):
    stage = make_stage(max_steps=9, save_steps=save_steps, early_stopping_patience=5)
    for _ in range(2):
        with RunDirectory.open(tmp_path / "run", resume=True) as run:
            job = make_job(Policy(tiny_model("llama")), stage, run, ROWS, source=growing(enough=3), evaluate=evaluate)
            progress = train(job)
            assert (progress.step, progress.stopped_early) == (3, True)
            stopped = [event for event in run.events() if event.get("event") == "stopped"]
            assert [path.name for path in run.checkpoints("sft")] == ["step-3"]
        assert [(event["step"], event["rule"], event["value"], event["limit"]) for event in stopped] == [(3, "max_kl", 2.0, 1.0)]


@pytest.mark.parametrize("before, after", [("cpu", "cpu and cuda"), ("cpu and cuda", "cpu")])
def test_a_resumed_run_says_where_the_checkpoint_lacks_the_random_state_of_a_kind_of_device(tmp_path, monkeypatch, before, after):
    def part(devices: str, max_steps: int) -> list[str]:
        states = {"cpu": torch.get_rng_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}
        monkeypatch.setattr(checkpoint, "_random_states", lambda: {kind: states[kind] for kind in devices.split(" and ")})
        with RunDirectory.open(tmp_path / "run", resume=True) as run:
            train(make_job(Policy(tiny_model("llama")), make_stage(max_steps=max_steps, save_steps=1), run, ROWS))
            return [event["note"] for event in run.events() if event.get("event") == "note"]

    assert part(before, 1) == []
    assert part(before, 2) == []
    (note,) = part(after, 3)
    assert f"holds the random state of {before}, and this machine has {after}:" in note


def test_a_signal_within_a_step_is_said_before_the_step_ends(tmp_path):
    policy, stop, said = Policy(tiny_model("llama")), StopRequest(), threading.Event()

    class Signalled(SFT):
        def terms(self, outputs: Any, batch: Any) -> Any:
            if outputs.logprobs.requires_grad:
                stop._handle(signal.SIGINT, None)
                assert said.wait(60)
            return super().terms(outputs, batch)

    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        job = make_job(policy, make_stage(max_steps=3), run, ROWS, objective=Signalled(), stop=stop)
        job.report = lambda event: said.set() if event.get("event") == "stopping" and event["signal"] == "SIGINT" else None
        with pytest.raises(Interrupted, match="after step 1"):
            train(job)


@pytest.mark.parametrize("batches_seen", [0, 1, 3, 4])
def test_a_signal_during_an_evaluation_is_answered_before_its_next_batch_and_the_resumed_run_evaluates_again(tmp_path, batches_seen):
    policy, stage = Policy(tiny_model("llama")), make_stage(max_steps=6, eval_steps=2, save_steps=6)
    stop, seen = StopRequest(), []

    class Signalled(SFT):
        def terms(self, outputs: Any, batch: Any) -> Any:
            if not outputs.logprobs.requires_grad:
                seen.append(batch)
                if len(seen) == batches_seen:
                    stop._handle(signal.SIGTERM, None)
            return super().terms(outputs, batch)

    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        job = make_job(policy, stage, run, ROWS, validation=ROWS, objective=Signalled(), stop=stop)
        plain = job.evaluate

        def first_batch_signals(between: Any) -> WindowResult:
            asked = []

            def first() -> None:
                asked.append(None)
                if not batches_seen and len(asked) == 2:  # while the batches are made, before any is computed
                    stop._handle(signal.SIGTERM, None)
                between()

            return plain(first)

        job.evaluate = first_batch_signals
        with pytest.raises(Interrupted, match="after step 2"):
            train(job)
        assert len(seen) == batches_seen
        assert [path.name for path in run.checkpoints("sft")] == ["step-2"]
        assert [event["step"] for event in run.events() if event.get("event") == "evaluated"] == ([2] if batches_seen == 4 else [])
    with RunDirectory.open(tmp_path / "run", resume=True) as run:
        train(make_job(Policy(tiny_model("llama")), stage, run, ROWS, validation=ROWS))
        assert [event["step"] for event in run.events() if event.get("event") == "evaluated"] == [2, 4, 6]


class Killed(Exception):
    """Where a process is killed."""


def test_an_evaluation_is_logged_once_though_its_steps_checkpoint_came_before_it_and_a_kill_after(tmp_path, monkeypatch):
    stage = make_stage(max_steps=6, eval_steps=2, save_steps=6)

    def part(resume: bool, stop_after: int | None = None, kill_in: str | None = None) -> list[int]:
        stop = StopRequest()
        with RunDirectory.open(tmp_path / "run", resume=resume) as run:
            job = make_job(Policy(tiny_model("llama")), stage, run, ROWS, validation=ROWS, stop=stop)
            plain = loop._update

            def update(job: loop.Job, progress: checkpoint.Progress) -> None:
                if kill_in == "update":
                    raise Killed
                plain(job, progress)
                if progress.step == stop_after:
                    stop._handle(signal.SIGTERM, None)

            with monkeypatch.context() as patched:
                patched.setattr(loop, "_update", update)
                with pytest.raises((Killed, Interrupted)) if stop_after or kill_in else nullcontext():
                    train(job)
            return [event["step"] for event in run.events() if event.get("event") == "evaluated"]

    assert part(False, stop_after=2) == []
    assert part(True, kill_in="update") == [2]
    assert part(True, kill_in="update") == [2]
    assert part(True) == [2, 4, 6]


def test_what_the_source_knows_of_an_update_is_logged_before_what_the_objective_measures_of_its_part(tmp_path):
    class Knowing(DatasetSource):
        def window(self, step: int) -> Window:
            return Window(super().window(step).batches, {"entropy": 7.0})

    class Measuring(SFT):
        def metrics(self, outputs: Any, batch: Any) -> Any:
            return {"entropy": (1.0, 1.0), "other": (2.0, 1.0)}

    source = Knowing(items_of(ROWS), batch_size=2, accumulation=1, seed=0)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        train(make_job(Policy(tiny_model("llama")), make_stage(max_steps=1), run, ROWS, source=source, objective=Measuring()))
        (event,) = [event for event in run.events() if "loss" in event]
    assert (event["entropy"], event["other"]) == (7.0, 2.0)
