"""The one training loop, for every objective and method.

Takes a policy, an objective, a source of accumulation windows and a stage's settings; trains, logs, evaluates, checkpoints; gives a
`Progress`. It knows nothing of SFT: a batch is what the source makes and the objective reads, with a `.forest` that the policy computes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ..data.batching import Window
from ..errors import Interrupted, InvariantViolated, NonFinite
from ..models.policy import Policy
from ..objectives import Objective
from ..recipe import Stage
from ..rundir import RunDirectory, verify_folder, world
from .checkpoint import Progress, load_checkpoint, load_weights, other_random_numbers, read_state, save_checkpoint
from .devices import added, gather, of_first, sum_in_place, summed
from .invariants import starts_where_it_compares
from .memory import Holes, peak_memory_bytes
from .optimiser import Optimiser
from .schedule import learning_rate
from .signals import StopRequest
from .window import Between, WindowResult, run_window
from .zero import ZeroOptimiser


class Source(Protocol):
    """Where windows come from: a data set, or rollouts of the policy itself."""

    steps_per_epoch: int

    def window(self, step: int) -> Window:
        """The batches of update `step`: the same ones whenever it is asked again after a resume."""

    def state(self) -> Mapping[str, torch.Tensor]:
        """What a checkpoint must hold for the coming windows to be the same; empty where their numbers say it all."""

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes a checkpoint's state."""


@dataclass
class Job:
    """Everything one stage needs. The settings of `stage` are resolved: none that the loop reads is left to derive."""

    stage: Stage
    policy: Policy
    objective: Objective
    source: Source
    optimiser: Optimiser | ZeroOptimiser
    run: RunDirectory
    fingerprint: str
    """Of the settings and data that a checkpoint must share to be resumed from."""
    evaluate: Callable[[Between], WindowResult] | None = None
    """Measures what is held out, calling its argument now and then, which may raise; the lower the loss the better."""
    stop: StopRequest = field(default_factory=StopRequest)
    report: Callable[[dict[str, Any]], None] = lambda event: None
    """Gets every logged event, for the terminal and the trackers."""


def train(job: Job) -> Progress:
    """Trains to the end, from the newest valid checkpoint if the run is resumed.

    Raises NonFinite before a bad update is made, InvariantViolated when a trained tensor gets no gradient, or none does in any update,
    Interrupted after a signal, with a checkpoint of the current step written.
    """
    progress = _resume(job)
    job.stop.defer(True, lambda name: job.report({"event": "stopping", "stage": job.stage.name, "signal": name}))
    holes, begun = Holes(), progress.step
    while True:
        _stop_if_asked(job, progress)
        if _evaluation_is_due(job, progress):
            _evaluate(job, progress)
            holes.give_back()
            if progress.step == begun:  # its checkpoint knows nothing of it: after a kill it would be made and logged again
                _save(job, progress)
            _stop_if_asked(job, progress)
        finished = progress.step >= job.stage.max_steps or progress.stopped_early
        if progress.step and (finished or progress.step % job.stage.save_steps == 0):
            _save(job, progress)
        if finished:
            break
        _update(job, progress)
        holes.after_update()
    job.stop.defer(False)
    if not progress.learned:
        raise InvariantViolated(
            f"nothing was learned: none of {progress.step} updates had a gradient and a learning rate above 0",
            where=f"stage {job.stage.name}",
            mend="look at the rewards: no answer was better than another of its group; begin with a stage that is right now and then",
        )
    if job.stage.load_best_model_at_end and progress.best_step is not None:
        best = _folder(job, progress.best_step)
        verify_folder(best)
        load_weights(best, job.optimiser)
    return progress


def _stop_if_asked(job: Job, progress: Progress) -> None:
    """Answers a signal; an evaluation that is due or under way is left to the resumed run, so that the answer comes at once."""
    received = [name for name in gather(job.stop.received and job.stop.received.name) if name]
    if not received:
        return
    _save(job, progress)
    raise Interrupted(
        f"stopped by {received[0]} after step {progress.step}; a checkpoint of that step is written",
        where=f"stage {job.stage.name}",
        mend="run the same command with --resume to go on",
    )


def _evaluation_is_due(job: Job, progress: Progress) -> bool:
    if job.evaluate is None or not progress.step or progress.evaluated_step == progress.step:
        return False
    return progress.step % job.stage.eval_steps == 0 or progress.step >= job.stage.max_steps or progress.stopped_early


def _folder(job: Job, step: int) -> Path:
    return job.run.path / "stages" / job.stage.name / "checkpoints" / f"step-{step}"


def _resume(job: Job) -> Progress:
    newest, refused = of_first(partial(_newest, job))
    for name, reason in refused:
        _log(job, {"event": "checkpoint_refused", "checkpoint": name, "reason": reason})
    if newest is None:
        if job.run.resumed:
            job.run.rewind(job.stage.name, 0)
        return Progress()
    folder = _folder(job, newest)
    progress, state = load_checkpoint(folder, job.optimiser, job.fingerprint)
    job.source.load(state)
    job.run.rewind(job.stage.name, progress.step)
    job.report({"event": "resumed", "stage": job.stage.name, "step": progress.step})
    if note := other_random_numbers(folder):
        _log(job, {"event": "note", "step": progress.step, "note": note})
    return progress


def _newest(job: Job) -> tuple[int | None, list[tuple[str, str]]]:
    """The step of the newest checkpoint that is whole, and the name of each that was refused, with the reason."""
    folder, refused = job.run.newest_valid_checkpoint(job.stage.name)
    step = None if folder is None else int(folder.name.removeprefix("step-"))
    return step, [(checkpoint.path.name, checkpoint.reason) for checkpoint in refused]


def _update(job: Job, progress: Progress) -> None:
    stage, optimiser, step = job.stage, job.optimiser, progress.step
    began = time.perf_counter()
    window = job.source.window(step)
    if window.stop is not None:
        progress.stopped_early = True
        _log(job, {"event": "stopped", "step": step, **window.stop})
        if step:
            _save(job, progress, anew=True)
        return
    if not window.batches:  # nothing sampled could be learned from
        progress.step += 1
        progress.seconds += time.perf_counter() - began
        _log(job, {"event": "nothing_learned", "step": progress.step, **window.metrics})
        return
    if not progress.tokens:  # the first update; windows with nothing to learn from may have come before it
        starts_where_it_compares(job.policy, window.batches)
    rate = learning_rate(step, total=stage.max_steps, warmup=stage.warmup_steps, peak=stage.learning_rate, kind=stage.lr_scheduler_type)
    result, norm = _learn(job, progress, window, rate)
    scale = optimiser.scale
    if optimiser.loss_scale is not None:
        optimiser.loss_scale.held()
    size = _size(window)
    seconds = time.perf_counter() - began
    tokens = int(size["tokens"])
    progress.step += 1
    progress.seconds += seconds
    progress.tokens += tokens
    progress.learned = progress.learned or (rate > 0 and norm > 0)
    if progress.step % stage.logging_steps == 0 or progress.step in (1, stage.max_steps):
        _log(
            job,
            {
                "step": progress.step,
                "total_steps": stage.max_steps,
                "epoch": progress.step / job.source.steps_per_epoch,
                "loss": result.loss,
                **({f"loss/{name}": value for name, value in result.terms.items()} if len(result.terms) > 1 else {}),
                **result.metrics,
                **window.metrics,
                "learning_rate": rate,
                "grad_norm": norm,
                **({"loss_scale": scale} if optimiser.loss_scale is not None else {}),
                "tokens": tokens,
                "computed_tokens": int(size["computed"]),
                "tokens_per_second": tokens / seconds,
                "peak_memory_bytes": peak_memory_bytes(),
                "fraction_changed": optimiser.fraction_changed(),
            },
        )


def _learn(job: Job, progress: Progress, window: Window, rate: float) -> tuple[WindowResult, float]:
    """Forward and backward over a window, and the update; gives the gradients' norm. Computed again with half the loss scale while
    gradients overflow."""
    optimiser, where = job.optimiser, (job.stage.name, progress.step + 1)
    while True:
        optimiser.zero_grad()
        result = run_window(job.policy, job.objective, window.batches, backward=optimiser.backward)
        _require_finite({"loss": result.loss}, "no update was made from it", *where)
        if world() > 1:
            sum_in_place(optimiser.gradients())
        _require_gradients(job, progress)
        norm = optimiser.update(rate, added)
        if math.isfinite(norm) or optimiser.loss_scale is None:
            _require_finite({"gradient norm": norm}, "no update was made from it", *where)
            return result, norm
        optimiser.loss_scale.overflowed(f"stage {where[0]}, step {where[1]}")
        _log(job, {"event": "overflowed", "step": progress.step + 1, "loss_scale": optimiser.scale})


def _size(window: Window) -> dict[str, float]:
    """The tokens of an update's rows, and those that are computed, shared ones once; of all processes."""
    learned = [batch.forest for batch in window.batches if batch.counts]
    return summed({"tokens": sum(int(f.lengths_B.sum()) for f in learned), "computed": sum(len(f.tokens_T) for f in learned)})


def _require_finite(values: dict[str, float], consequence: str, stage: str, step: int) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise NonFinite(
                f"the {name} is {value}; {consequence}",
                where=f"stage {stage}, step {step}",
                mend="lower learning_rate, or look at the rows of this step; the newest checkpoint is finite",
            )


def _require_gradients(job: Job, progress: Progress) -> None:
    """By the first update after one with a positive rate, every trained tensor has had a gradient; an update without any tells nothing."""
    if progress.saw_gradients or not progress.learned:
        return
    silent = job.optimiser.without_gradient(added)
    if len(silent) == len(job.optimiser.names):
        return
    if silent:
        raise InvariantViolated(
            f"{len(silent)} trained tensors get no gradient, {silent[0]} among them",
            where=f"stage {job.stage.name}, step {progress.step + 1}",
            mend="train fewer modules, or switch gradient_checkpointing off",
        )
    progress.saw_gradients = True


def _evaluate(job: Job, progress: Progress) -> None:
    result = job.evaluate(partial(_stop_if_asked, job, progress))
    _require_finite({"validation loss": result.loss}, "nothing was saved after it", job.stage.name, progress.step)
    progress.evaluated_step = progress.step
    better = progress.best_loss is None or result.loss < progress.best_loss
    if better:
        progress.best_loss, progress.best_step, progress.evaluations_without_gain = result.loss, progress.step, 0
    else:
        progress.evaluations_without_gain += 1
    patience = job.stage.early_stopping_patience
    progress.stopped_early |= patience is not None and progress.evaluations_without_gain >= patience  # the source may have said stop
    measured = {f"eval_{name}": value for name, value in result.metrics.items()}
    samples = {"samples": result.samples} if result.samples else {}
    _log(job, {"event": "evaluated", "step": progress.step, "eval_loss": result.loss, **measured, **samples})
    if better and job.stage.load_best_model_at_end:
        _save(job, progress)


def _save(job: Job, progress: Progress, *, anew: bool = False) -> None:
    """Writes the step's checkpoint unless there is one that knows of its evaluation; `anew`: also then, what it should hold has changed."""
    if anew or not of_first(partial(_is_written, job, progress)):
        save_checkpoint(job.run, job.stage.name, progress, job.optimiser, job.fingerprint, job.source.state())
        _log(job, {"event": "checkpoint", "step": progress.step})
    best = None
    if job.stage.load_best_model_at_end and progress.best_step is not None:
        best = _folder(job, progress.best_step)
    job.run.prune_checkpoints(job.stage.name, job.stage.save_total_limit, best)


def _is_written(job: Job, progress: Progress) -> bool:
    newest, _ = _newest(job)
    return newest == progress.step and read_state(_folder(job, newest))[1].evaluated_step == progress.evaluated_step


def _log(job: Job, event: dict[str, Any]) -> None:
    event = {"stage": job.stage.name, **event}
    job.run.log(event)
    job.report(event)
