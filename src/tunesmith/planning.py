"""The plan of a session: what each phase will cost, from its own batches and the machine's measured speeds. Raises DoesNotFit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from .data.preference import AnyRecord, kind_of_record
from .errors import DoesNotFit
from .fitting import (
    Update,
    memory_room,
    nearest_that_fits,
    prompt_tokens,
    sampled,
    stage_footprint,
    update_of,
)
from .generate.engine import BATCH_TOKENS, LOGIT_ELEMENTS
from .models.costs import MethodCost, method_cost
from .models.footprint import Footprint, generation_bytes
from .models.load import has_fast_bf16
from .models.machine import Machine, measure_machine
from .models.roofline import (
    Phase,
    Shape,
    Tokens,
    decode_phase,
    forward_phase,
    model_shape,
    phase_json,
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

SLOW_PROCESSOR = "this processor has no bfloat16 arithmetic: the model computes in float32 and takes about twice the time"
UNMODELLED = ("classical", "shorter")  # candidates that take next to no time
SAMPLED_ROWS = 32  # looked at to know what all rows begin with
STATE_BYTES = 12  # of a trained number in a checkpoint: master and two moments


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
    notes = [SLOW_PROCESSOR] if session.loaded.dtype == torch.float32 and not has_fast_bf16() else []
    if peak > room:
        notes.append(f"the evaluation may need {peak / 1e9:.1f} GB, this machine has {room / 1e9:.1f}: lower evaluate.batch_size")
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
    save = storage_phase(f"save {name}", machine, STATE_BYTES * cost.trainable * math.ceil(steps / stage.save_steps))
    if learns_from_answers(stage):
        return [_sampling(session, shape, machine, stage, update), train, save]

    def pass_over(what: str, updates: float) -> Phase:
        """A forward pass over as many rows as so many updates have."""
        return forward_phase(f"{what} {name}", shape, machine, update.work.times(updates))

    data, phases = session.data_of(stage), [train, save]
    rows, held_out = (0.0 if part is None else float(part.lengths.sum()) / max(update.tokens, 1) for part in (data.train, data.validation))
    passes = 2 if stage.objective.type == "kto" else 1  # its estimate of the KL takes a pass over as many other rows
    if compares_with_reference(stage):
        phases.insert(0, pass_over("start", (rows + held_out) * passes))
    if passes > 1:
        phases.append(pass_over("sample", steps))
    if held_out:
        phases.append(pass_over("validate", held_out * passes * max(1, steps // stage.eval_steps)))
    return phases


def _sampling(session: Session, shape: Shape, machine: Machine, stage: Stage, update: Update) -> Phase:
    """What a stage that samples computes besides its updates: answers, a pass of each reward model over them, and of policy and reference
    over those that are learned from."""
    shaping, new, answers = Shaping.of(stage), stage.rollout.max_new_tokens, sampled(stage)
    iterations = math.ceil(stage.max_steps / shaping.updates)
    judges = len(named_models(stage.objective))
    asked = Tokens(stage.rollout.prompts_per_step * prompt_tokens(session, stage) + answers * new, 0.0)
    seen = update.work.times(2 * shaping.parts * iterations)
    return together(
        f"sample {stage.name}",
        [
            decode_phase("answers", shape, machine, items=answers * iterations, new_tokens=new, batch=ROLLOUT_BATCH),
            forward_phase("log-probabilities", shape, machine, seen),
            forward_phase("judges", shape, machine, asked.times(judges * iterations)),
        ],
    )


def _evaluation(session: Session, shape: Shape, machine: Machine) -> list[Phase]:
    """The candidates' answers and perplexities; an answer is taken to be as long as the training answers."""
    section, items = session.recipe.evaluate, len(session.data.test_records)
    if not items:
        return []
    answer = session.data.ledger.tokens["supervised"] / max(1, session.data.ledger.rows_trained)
    shared = _shared_beginning(session)  # computed once a batch
    own = max(1.0, session.data.lengths["mean"] - answer - shared)
    held = len(session.data.validation_records)
    trials = len(section.few_shot_k) * section.few_shot_sets * held if "few_shot" in section.candidates else 0
    sides = {side for gate in section.gates for side in (gate.candidate, gate.better_than, gate.not_worse_than)}
    asked = dict.fromkeys([*section.candidates, *(stage.name for stage in session.stages if stage.name in sides)])

    def rows(count: float, length: float, supervised: float) -> Tokens:
        pairs = count * length * (shared + length / 2)
        return Tokens(count * length, count * supervised, pairs, math.ceil(count / section.batch_size))

    phases = []
    for name in (name for name in asked if name not in UNMODELLED):
        what, n = f"evaluate {name}", items + trials if name == "few_shot" else items
        if _preferred(session.data.test_records):  # each of two answers, by the model and by what it is compared with
            phases.append(forward_phase(what, shape, machine, rows(4 * items, own + answer, answer)))
            continue
        read = forward_phase(what, shape, machine, rows(n, own, 1))
        said = decode_phase(what, shape, machine, items=n, new_tokens=answer, batch=section.batch_size)
        phases.append(together(what, [read, said, forward_phase(what, shape, machine, rows(items, own + answer, answer))]))
    return phases


def _evaluation_footprint(session: Session, shape: Shape, trained: Footprint) -> Footprint:
    """The parts of the evaluation's peak: what training held is given back by then, libraries apart."""
    kept = {"weights": shape.weights, "rollouts": _evaluation_bytes(session, shape), "libraries": trained["libraries"]}
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


def _preferred(records: Sequence[AnyRecord]) -> bool:
    """Whether what is measured is which of several answers is preferred."""
    return bool(records) and kind_of_record(records[0]) in ("pair", "ranking")


def _shared_beginning(session: Session) -> int:
    """The tokens that the first rows all begin with: a system message that all have in common."""
    rows = [session.data.train[i][0] for i in range(min(SAMPLED_ROWS, len(session.data.train)))]
    shortest = min(len(row) for row in rows)
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(np.argmin(same))
