"""The loop: the right best step and early stopping on a known curve, logs, and gradients by the second step."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.toys import loaded, make_job, make_rows, make_stage, tiny_model

from tunesmith.errors import Interrupted, InvariantViolated
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.objectives import SFT
from tunesmith.recipe import FullMethod, LoraMethod
from tunesmith.rundir import RunDirectory
from tunesmith.train import loop
from tunesmith.train.loop import train
from tunesmith.train.signals import StopRequest
from tunesmith.train.window import WindowResult

ROWS = make_rows(8)
CURVE = {2: 3.0, 4: 2.0, 6: 1.0, 8: 1.5, 10: 1.2, 12: 1.1}  # the least at step 6, though the last evaluations fall again


def follow_curve(monkeypatch: pytest.MonkeyPatch, curve: dict[int, float]) -> list[int]:
    """Makes each evaluation give the curve's next value."""
    values, asked = iter(curve.values()), []

    def evaluate(policy: Any, objective: Any, batches: Any, between: Any) -> WindowResult:
        asked.append(len(asked))
        return WindowResult(next(values), {}, {})

    monkeypatch.setattr(loop, "evaluate_loss", evaluate)
    return asked


def run_curve(tmp_path, monkeypatch, curve=CURVE, **settings):
    follow_curve(monkeypatch, curve)
    policy = Policy(tiny_model("llama"))
    stage = make_stage(max_steps=12, eval_steps=2, save_steps=3, save_total_limit=1, **settings)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        job = make_job(policy, stage, run, ROWS, validation=ROWS)
        return job, train(job)


def test_the_best_step_is_the_one_with_the_lowest_validation_loss_and_its_weights_are_taken(tmp_path, monkeypatch):
    weights = {}

    def remember(job: Any, event: dict[str, Any]) -> None:
        if "loss" in event:
            weights[event["step"]] = job.optimiser.flat.clone()

    monkeypatch.setattr(loop, "_log", remember)
    job, progress = run_curve(tmp_path, monkeypatch, load_best_model_at_end=True)
    assert (progress.best_step, progress.best_loss, progress.step) == (6, 1.0, 12)
    assert torch.equal(job.optimiser.flat, weights[6])
    assert not torch.equal(job.optimiser.flat, weights[12])
    assert torch.equal(dict(job.policy.named_parameters())[job.optimiser.names[0]], job.optimiser.masters[0])


def test_without_load_best_the_last_weights_stay(tmp_path, monkeypatch):
    job, progress = run_curve(tmp_path, monkeypatch)
    newest = job.run.checkpoints("sft")[0]
    assert (newest.name, progress.best_step) == ("step-12", 6)
    kept = load_file(newest / "state.safetensors")
    assert torch.equal(kept[f"weight.{job.optimiser.names[0]}"], job.optimiser.masters[0])


@pytest.mark.parametrize("patience, stop", [(1, 8), (2, 10), (3, 12), (4, 12)])
def test_training_stops_after_as_many_evaluations_without_gain_as_the_recipe_says(tmp_path, monkeypatch, patience, stop):
    _, progress = run_curve(tmp_path, monkeypatch, early_stopping_patience=patience)
    assert progress.step == stop
    assert progress.stopped_early == (patience < 4)


def test_a_run_that_stopped_early_stays_stopped_when_it_is_resumed(tmp_path, monkeypatch):
    run_curve(tmp_path, monkeypatch, early_stopping_patience=1)
    follow_curve(monkeypatch, CURVE)
    stage = make_stage(max_steps=12, eval_steps=2, save_steps=3, save_total_limit=1, early_stopping_patience=1)
    with RunDirectory.open(tmp_path / "run", resume=True) as run:
        assert train(make_job(Policy(tiny_model("llama")), stage, run, ROWS, validation=ROWS)).step == 8


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


@pytest.mark.parametrize("checkpointing", [False, True])
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

        def window(self, step: int) -> list[Any]:
            from tests.toys import batch_of

            asked.append(step)
            batch = batch_of(ROWS[step : step + 2])
            return [SimpleNamespace(forest=batch.forest, reward=step)]

    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        train(make_job(Policy(tiny_model("llama")), make_stage(max_steps=3), run, ROWS, source=Rollouts()))
    assert asked == [0, 1, 2]


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
        held_out = job.validation

        def first_batch_signals() -> Any:
            for batch in held_out():
                yield batch
                if not batches_seen:
                    stop._handle(signal.SIGTERM, None)

        job.validation = first_batch_signals
        with pytest.raises(Interrupted, match="after step 2"):
            train(job)
        assert len(seen) == batches_seen
        assert [path.name for path in run.checkpoints("sft")] == ["step-2"]
        assert [event["step"] for event in run.events() if event.get("event") == "evaluated"] == ([2] if batches_seen == 4 else [])
    with RunDirectory.open(tmp_path / "run", resume=True) as run:
        train(make_job(Policy(tiny_model("llama")), stage, run, ROWS, validation=ROWS))
        assert [event["step"] for event in run.events() if event.get("event") == "evaluated"] == [2, 4, 6]
