"""The plan of a session: what each phase will cost, from its own batches and the machine's measured speeds. Raises DoesNotFit."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from .errors import DoesNotFit
from .evaluate import Task, TemplateEncoder
from .evaluate.candidates import ANSWER_ROOM, CHECKED_ALONE, CHECKED_TOKENS, encode_items, is_checked_alone
from .evaluate.inputs import TUNED
from .evaluate.run import GUARDED
from .fitting import (
    Update,
    memory_room,
    nearest_that_fits,
    probe_work,
    processes_there,
    prompt_tokens,
    sampled,
    stage_footprint,
    update_of,
)
from .generate.engine import BATCH_TOKENS, LOGIT_ELEMENTS
from .models.costs import MethodCost, method_cost
from .models.footprint import KERNELS_IN_16_BITS, MOMENTS, Footprint, generation_bytes
from .models.load import slow_arithmetic
from .models.machine import Machine, measure_machine
from .models.roofline import (
    MASTER_BYTES,
    Phase,
    Shape,
    Tokens,
    decode_phase,
    forward_phase,
    model_shape,
    on_cpu_in_16_bits,
    phase_json,
    reading_phase,
    start_phase,
    storage_phase,
    together,
    train_phase,
)
from .recipe import Recipe, Stage
from .session import Session
from .train.offline import compares_with_reference
from .train.samplers import ROLLOUT_BATCH
from .train.scoring import named_models
from .train.shaping import Shaping
from .train.work import learns_from_answers

UNMODELLED = ("classical", "shorter")  # candidates that take next to no time
SAMPLED_ROWS = 32  # looked at to know what all rows begin with
CHECKS = 15  # forward passes over the probed rows that take as long as what is checked before the first update
FOLDER_SECONDS = 0.5  # what a checkpoint, and the result, take to be written whatever they hold


def make_plan(session: Session, *, evaluates: bool = True) -> dict[str, Any]:
    """plan.json's `predicted`: peak memory and its parts, seconds, tokens, cost, what binds, and each phase; and notes on this machine.

    evaluates: whether the stages are followed by the evaluation.
    """
    shape, room = model_shape(session.loaded), memory_room(session)
    footprints = [_fitting_footprint(session, shape, stage, room) for stage in session.stages]
    if evaluates:
        footprints.append(_evaluation_footprint(session, shape, footprints[-1]))
    largest = max(footprints, key=lambda parts: sum(parts.values()))
    peak = sum(largest.values())
    notes = [note for note in [slow_arithmetic(session.loaded.dtype)] if note]
    if peak > room:
        notes.append(f"the evaluation may need {peak / 1e9:.1f} GB, this machine has {room / 1e9:.1f}: lower evaluate.batch_size")
    if processes_there(session.recipe) > 1:
        notes.append(f"launch.strategy {session.recipe.launch.strategy}: what processes send each other takes time that is not in the plan")
    machine = measure_machine(session.loaded.dtype, announce=lambda text: session.report({"event": "note", "note": text}))
    phases, tokens = _spent(session), 0.0
    for stage in session.stages:
        cost = method_cost(session.loaded.model, stage.method)
        update = update_of(session, stage, cost)
        tokens += update.tokens * stage.max_steps * session.recipe.launch.processes
        phases += _stage_phases(session, shape, machine, stage, cost, update)
    phases += _evaluation(session, shape, machine) if evaluates else []
    seconds = sum(phase.seconds for phase in phases)
    return {
        "processes": session.recipe.launch.processes,
        "peak_memory_bytes": peak,
        "memory": largest,
        "seconds": seconds,
        "tokens": int(tokens),
        "cost": cost_of(session.recipe, seconds),
        "bound_by": max(phases, key=lambda phase: phase.seconds).bound_by,
        "phases": [phase_json(phase) for phase in phases],
        "machine": asdict(machine),
        "notes": notes,
    }


def cost_of(recipe: Recipe, seconds: float) -> float | None:
    """What so much time costs, where the recipe says what an hour does."""
    return None if recipe.price_per_hour is None else recipe.price_per_hour * seconds / 3600


def compare_plan(predicted: dict[str, Any] | None, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """plan.json's `compared`: memory, time, tokens, cost, each phase's seconds, and the prediction's error as a share of what was measured.

    What only one of the two knows is null in the other, and so is its error.
    """
    before = predicted or {}
    rows = [(name, before.get(name), measured.get(name)) for name in ("peak_memory_bytes", "seconds", "tokens", "cost")]
    sides = [{phase["name"]: phase["seconds"] for phase in side.get("phases", [])} for side in (before, measured)]
    rows += [(name, *(side.get(name) for side in sides)) for name in dict.fromkeys([*sides[0], *sides[1]])]
    return [
        {"name": name, "predicted": guess, "measured": real, "error": guess / real - 1 if guess is not None and real else None}
        for name, guess, real in rows
        if (guess, real) != (None, None)
    ]


def _fitting_footprint(session: Session, shape: Shape, stage: Stage, room: int) -> Footprint:
    """A stage's parts of memory. Raises DoesNotFit with the nearest settings that fit."""
    parts = stage_footprint(session, shape, stage)
    if sum(parts.values()) > room:
        raise DoesNotFit(
            f"stage {stage.name} needs {sum(parts.values()) / 1e9:.2f} GB of memory, this machine has {room / 1e9:.2f} GB to give",
            where=f"stages.{stage.name}",
            mend=nearest_that_fits(session, stage, room),
        )
    return parts


def _spent(session: Session) -> list[Phase]:
    """Reading model and data, which the plan itself rests on: what it took in this part of the run."""
    took = {}
    for event in session.run.events():
        if event.get("event") == "phase":
            took[event["name"]] = event["seconds"]
    return [Phase(name, took[name], 0.0, 0.0, "storage") for name in ("load", "data") if name in took]


def _stage_phases(session: Session, shape: Shape, machine: Machine, stage: Stage, cost: MethodCost, update: Update) -> list[Phase]:
    """What a stage computes: its updates, and what comes before and between them. A phase's name is that of the run's own account."""
    name, steps = stage.name, stage.max_steps
    train = train_phase(shape, machine, stage, cost, update.work.times(steps))
    checkpoints, state = math.ceil(steps / stage.save_steps), (MASTER_BYTES + MOMENTS[stage.optim]) * cost.trainable
    save = storage_phase(f"save {name}", machine, checkpoints * state + MASTER_BYTES * cost.trainable)  # the result's weights, last
    save = replace(save, seconds=save.seconds + FOLDER_SECONDS * (checkpoints + 1))
    start = start_phase(f"start {name}", shape, machine, probe_work(session, stage, cost).times(CHECKS))
    if learns_from_answers(stage):
        return [start, _sampling(session, shape, machine, stage, update), train, save]

    def pass_over(what: str, updates: float) -> Phase:
        """A forward pass over as many rows as so many updates have."""
        return forward_phase(f"{what} {name}", shape, machine, update.work.times(updates))

    data, phases = session.data_of(stage), [train, save]
    rows, held_out = (0.0 if part is None else float(part.lengths.sum()) / max(update.tokens, 1) for part in (data.train, data.validation))
    passes = 2 if stage.objective.type == "kto" else 1  # its estimate of the KL takes a pass over as many other rows
    if compares_with_reference(stage):
        start = together(start.name, [start, pass_over("start", (rows + held_out) * passes)])
    if passes > 1:
        phases.append(pass_over("sample", steps))
    if held_out:
        phases.append(pass_over("validate", held_out * passes * max(1, steps // stage.eval_steps)))
    return [start, *phases]


def _sampling(session: Session, shape: Shape, machine: Machine, stage: Stage, update: Update) -> Phase:
    """What a stage that samples computes besides its updates: answers, a pass of each reward model over them, and of policy and reference
    over those that are learned from."""
    shaping, new, answers = Shaping.of(stage), stage.rollout.max_new_tokens, sampled(stage)
    iterations = math.ceil(stage.max_steps / shaping.updates)
    judges, prompt = len(named_models(stage.objective)), prompt_tokens(session, stage)
    asked = Tokens(stage.rollout.prompts_per_step * prompt + answers * new, 0.0)
    seen = update.work.times(2 * shaping.parts * iterations)
    return together(
        f"sample {stage.name}",
        [
            decode_phase(
                "answers", shape, machine, items=answers * iterations, new_tokens=new, batch=min(answers, ROLLOUT_BATCH), context=prompt
            ),
            forward_phase("log-probabilities", shape, machine, seen),
            forward_phase("judges", shape, machine, asked.times(judges * iterations)),
        ],
    )


def _evaluation(session: Session, shape: Shape, machine: Machine) -> list[Phase]:
    """The candidates' answers and perplexities; prompts and answers are taken to be as long as the training rows'."""
    section, task = session.recipe.evaluate, session.tasks.task
    phases = []
    if task is not None:
        sides = {side for gate in section.gates for side in (gate.candidate, gate.better_than, gate.not_worse_than)}
        asked = dict.fromkeys([*section.candidates, *(stage.name for stage in session.stages if stage.name in sides)])
        phases = [_candidate(session, shape, machine, name) for name in asked if name not in UNMODELLED]
    guarded = len({*GUARDED}.intersection(section.candidates))
    if session.tasks.general is not None and guarded:
        phases.append(_scored(session, shape, machine, "evaluate general", session.tasks.general, passes=guarded))
    return phases


def _candidate(session: Session, shape: Shape, machine: Machine, name: str) -> Phase:
    """One candidate on the task: answers, then a pass over the references. few_shot answers the validation items too, once for each set."""
    section, task, what = session.recipe.evaluate, session.tasks.task, f"evaluate {name}"
    items = len(task.items)
    answer = session.data.ledger.tokens["supervised"] / max(1, session.data.ledger.rows_trained)
    shared = _shared_beginning(session)
    own = max(1.0, session.data.lengths["mean"] - answer - shared)

    def rows(count: float, before: float, length: float, supervised: float) -> Tokens:
        """So many rows after `before` tokens that all begin with, which are computed once."""
        pairs = count * length * (before + length / 2) + before**2 / 2
        return Tokens(before + count * length, count * supervised, pairs, math.ceil(count / section.batch_size))

    def answers(count: int, before: float, limit: int = section.max_new_tokens) -> list[Phase]:
        """That many prompts, read and answered."""
        said = min(answer, limit)
        longest = said if count == 1 else min(ANSWER_ROOM * answer, limit)
        how = {"items": count, "new_tokens": said, "batch": section.batch_size, "context": before + own, "longest": longest}
        return [reading_phase(what, shape, machine, rows(count, before, own, 1)), decode_phase(what, shape, machine, **how)]

    if task.is_text:
        return _scored(session, shape, machine, what, task)
    if not task.wants_answers:  # each of two answers is scored, by the model and by what it is compared with
        return reading_phase(what, shape, machine, rows(4 * items, shared, own + answer, answer))
    ks = section.few_shot_k if name == "few_shot" else [0]
    before = [shared + k * (own + answer) for k in ks]
    parts = []
    if name == "few_shot" and session.tasks.validation is not None:
        held = len(session.tasks.validation.items)
        parts += [phase for length in before for phase in section.few_shot_sets * answers(held, length)]
    usual = sum(before) / len(before)
    if name == TUNED and is_checked_alone(task, section, str(session.loaded.dtype).removeprefix("torch.")):
        parts += [*CHECKED_ALONE * answers(1, shared, CHECKED_TOKENS), *answers(CHECKED_ALONE, shared, CHECKED_TOKENS)]
    return together(what, [*parts, *answers(items, usual), reading_phase(what, shape, machine, rows(items, usual, own + answer, answer))])


def _scored(session: Session, shape: Shape, machine: Machine, what: str, task: Task, passes: int = 1) -> Phase:
    """Passes over the references of a task, row by row."""
    encoder = TemplateEncoder(session.template, session.loaded.tokenizer)
    asked = encode_items(task, encoder, max_new_tokens=0, context_length=session.context)
    prompts, references = (np.array([len(ids) for ids in part], float) for part in (asked.prompts, asked.references))
    batches = math.ceil(len(prompts) / session.recipe.evaluate.batch_size)
    work = Tokens((prompts + references).sum(), references.sum(), ((prompts + references) ** 2).sum() / 2, batches)
    return reading_phase(what, shape, machine, work.times(passes))


def _evaluation_footprint(session: Session, shape: Shape, trained: Footprint) -> Footprint:
    """The parts of the evaluation's peak: what training held is given back by then, libraries and kernels apart."""
    kernels = KERNELS_IN_16_BITS if on_cpu_in_16_bits(shape) else 0
    kept = {"weights": shape.weights, "answers": _evaluation_bytes(session, shape), "libraries": trained["libraries"] + kernels}
    return dict.fromkeys(trained, 0) | kept


def _evaluation_bytes(session: Session, shape: Shape) -> int:
    """What answering and scoring take; as if prompts were as long as training's."""
    items = len(session.data.test_records)
    if not items:
        return 0
    return generation_bytes(
        shape,
        items=items,
        batch_size=session.recipe.evaluate.batch_size,
        prompt_tokens=max(1.0, float(session.data.train.lengths.max()) - _shared_beginning(session)),
        new_tokens=session.recipe.evaluate.max_new_tokens,
        batch_tokens=BATCH_TOKENS,
        logit_elements=LOGIT_ELEMENTS,
    )


def _shared_beginning(session: Session) -> int:
    """The tokens that the first rows all begin with: a system message that all have in common."""
    rows = [session.data.train[i][0] for i in range(min(SAMPLED_ROWS, len(session.data.train)))]
    shortest = min(len(row) for row in rows)
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(np.argmin(same))
