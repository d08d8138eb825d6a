"""The plan of a session: what each phase will cost, from its own batches and the machine's measured speeds; and what stands in the way of a
verdict, said before anything is trained. Raises DoesNotFit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data.batching import DatasetSource
from .data.preference import AnyRecord, kind_of_record
from .errors import DoesNotFit
from .evaluate.run import GUARDED
from .evaluate.verdict import gate_name
from .generate.engine import BATCH_TOKENS, LOGIT_ELEMENTS
from .models.load import has_fast_bf16
from .models.plan import (
    Phase,
    Shape,
    available_memory,
    decode_phase,
    evaluation_memory,
    forward_phase,
    measure_machine,
    model_shape,
    phase_json,
    train_memory,
    train_phase,
)
from .recipe import FullMethod, Gate, Recipe, Stage
from .score import minimum_items
from .session import Session
from .tasks import Tasks
from .train.memory import peak_memory_bytes, resident_bytes
from .train.offline import compares_with_reference
from .train.samplers import ROLLOUT_BATCH
from .train.scoring import named_models
from .train.shaping import Shaping
from .train.work import learns_from_answers

SAMPLED_WINDOWS = 20  # updates looked at to know how many tokens are shared
SAMPLED_ROWS = 32
SLOW_PROCESSOR = "this processor has no bfloat16 arithmetic: the base is held in float32 and takes about twice the time"
SHOWN = 3  # quarantined rows and unknown labels named in a line


def make_plan(session: Session) -> dict[str, Any]:
    """plan.json's `predicted`: peak memory, seconds, tokens, what binds, and each phase; and notes on this machine."""
    shape, machine = model_shape(session.loaded), measure_machine(session.loaded.dtype)
    phases: list[Phase] = []
    peak, tokens = 0, 0
    for stage in session.stages:
        rows, computed, supervised, largest = _sample(session, stage)
        tokens += int(rows * stage.max_steps)
        phases.append(train_phase(shape, machine, stage, tokens=computed * stage.max_steps, supervised=supervised * stage.max_steps))
        need = train_memory(shape, stage, resident=peak_memory_bytes(), batch_tokens=largest, trainable=_trainable(session, stage))
        peak = max(peak, need)
        held_out = session.data_of(stage).validation
        if learns_from_answers(stage):
            peak = max(peak, _sampling_memory(session, shape, stage, need))
            phases += _answer_phases(session, shape, machine, stage)
        elif compares_with_reference(stage):
            once = session.data_of(stage).train.lengths.sum() * computed / max(rows, 1)
            phases.append(forward_phase(f"reference {stage.name}", shape, machine, tokens=float(once), heads=supervised))
        if held_out is not None and not learns_from_answers(stage):
            length = float(held_out.lengths.sum()) * computed / max(rows, 1)
            evaluations = max(1, stage.max_steps // stage.eval_steps)
            phases.append(forward_phase(f"validate {stage.name}", shape, machine, tokens=length * evaluations, heads=supervised))
    phases += _evaluation(session, shape, machine)
    room = available_memory() + resident_bytes()
    if peak > room:
        raise DoesNotFit(
            f"the plan needs {peak / 1e9:.1f} GB of memory, this machine has {room / 1e9:.1f} GB to give",
            where="stages",
            mend="smaller per_device_train_batch_size with more gradient_accumulation_steps, gradient_checkpointing: true, or method lora",
        )
    notes = [] if has_fast_bf16() else [SLOW_PROCESSOR]
    peak = max(peak, _evaluation_memory(session, shape, peak))
    if peak > room:
        notes.append(f"the evaluation may need {peak / 1e9:.1f} GB, this machine has {room / 1e9:.1f}: lower evaluate.batch_size")
    longest = max(phases, key=lambda phase: phase.seconds)
    return {
        "peak_memory_bytes": peak,
        "seconds": sum(phase.seconds for phase in phases),
        "tokens": tokens,
        "bound_by": longest.bound_by,
        "phases": [phase_json(phase) for phase in phases],
        "machine": {"flops_per_second": machine.flops_per_second, "bytes_per_second": machine.bytes_per_second},
        "notes": notes,
    }


def _sample(session: Session, stage: Stage) -> tuple[float, float, float, int]:
    """Per update: row tokens, computed tokens, supervised tokens (means over some updates), and the largest batch's computed tokens."""
    if learns_from_answers(stage):
        return _sample_answers(session, stage)
    source = DatasetSource(
        session.data_of(stage).items,
        batch_size=stage.per_device_train_batch_size,
        accumulation=stage.gradient_accumulation_steps,
        seed=session.recipe.seed,
    )
    windows = [source.window(step).batches for step in range(min(SAMPLED_WINDOWS, stage.max_steps))]
    totals = np.array(
        [
            [sum(int(b.forest.lengths_B.sum()) for b in w), sum(len(b.forest.tokens_T) for b in w), sum(len(b.forest.target_S) for b in w)]
            for w in windows
        ]
    )
    rows, computed, supervised = totals.mean(0)
    return float(rows), float(computed), float(supervised), max(len(batch.forest.tokens_T) for window in windows for batch in window)


def _sample_answers(session: Session, stage: Stage) -> tuple[float, float, float, int]:
    """As `_sample`, of answers yet to be sampled, each taken to be as long as it may; a prompt is computed once for its group."""
    prompt, new = float(session.data_of(stage).train.lengths.mean()), stage.rollout.max_new_tokens
    prompts, group = stage.rollout.prompts_per_step, stage.objective.num_generations
    answers = prompts * group
    batch = min(answers, stage.per_device_train_batch_size)
    largest = math.ceil(batch / group) * prompt + batch * new
    return answers * (prompt + new), prompts * prompt + answers * new, float(answers * new), int(largest)


def _sampling_memory(session: Session, shape: Shape, stage: Stage, resident: int) -> int:
    """Peak bytes while a stage samples, beside what its updates hold."""
    return evaluation_memory(
        shape,
        resident=resident,
        items=stage.rollout.prompts_per_step * stage.objective.num_generations,
        batch_size=ROLLOUT_BATCH,
        prompt_tokens=float(session.data_of(stage).train.lengths.max()),
        new_tokens=stage.rollout.max_new_tokens,
        batch_tokens=BATCH_TOKENS,
        logit_elements=LOGIT_ELEMENTS,
    )


def _evaluation_memory(session: Session, shape: Shape, resident: int) -> int:
    """Peak bytes of the evaluation, for which the process still holds what training has freed; as if prompts were as long as training's."""
    items = len(session.data.test_records)
    if not items:
        return 0
    return evaluation_memory(
        shape,
        resident=resident,
        items=items,
        batch_size=session.recipe.evaluate.batch_size,
        prompt_tokens=max(1.0, float(session.data.train.lengths.max()) - _shared_beginning(session)),
        new_tokens=session.recipe.evaluate.max_new_tokens,
        batch_tokens=BATCH_TOKENS,
        logit_elements=LOGIT_ELEMENTS,
    )


def _answer_phases(session: Session, shape: Any, machine: Any, stage: Stage) -> list[Phase]:
    """What a stage that samples computes besides its updates: answers, and passes of policy, reference and reward models over them."""
    _, computed, supervised, _ = _sample_answers(session, stage)
    iterations = math.ceil(stage.max_steps / Shaping.of(stage).updates)
    answers = stage.rollout.prompts_per_step * stage.objective.num_generations
    passes = 2 + len(named_models(stage.objective))
    return [
        decode_phase(
            f"sample {stage.name}", shape, machine, items=answers * iterations, new_tokens=stage.rollout.max_new_tokens, batch=ROLLOUT_BATCH
        ),
        forward_phase(f"score {stage.name}", shape, machine, tokens=computed * iterations * passes, heads=supervised * iterations * 2),
    ]


def _trainable(session: Session, stage: Stage) -> int:
    if isinstance(stage.method, FullMethod):
        return sum(p.numel() for p in session.loaded.model.parameters())
    wanted = set(stage.method.target_modules)
    modules = session.loaded.model.named_modules()
    return sum(stage.method.r * sum(m.weight.shape) for name, m in modules if any(name == w or name.endswith(f".{w}") for w in wanted))


def _evaluation(session: Session, shape: Any, machine: Any) -> list[Phase]:
    """The candidates' answers and perplexities; an answer is taken to be as long as the training answers."""
    section, items = session.recipe.evaluate, len(session.data.test_records)
    if not items:
        return []
    answer = session.data.ledger.tokens["supervised"] / max(1, session.data.ledger.rows_trained)
    shared = _shared_beginning(session)  # computed once a batch
    own = max(1.0, session.data.lengths["mean"] - answer - shared)
    held = len(session.data.validation_records)
    trials = len(section.few_shot_k) * section.few_shot_sets * held if "few_shot" in section.candidates else 0
    stages = {stage.name for stage in session.stages}
    asked = dict.fromkeys([*section.candidates, *(name for gate in section.gates for name in gate_sides(gate) if name in stages)])
    phases = []
    for name in asked:
        if name in ("classical", "shorter"):
            continue
        n = items + trials if name == "few_shot" else items
        if preferred(session.data.test_records):  # each of two answers, by the model and by what it is compared with
            phases.append(forward_phase(f"compare {name}", shape, machine, tokens=4 * items * (own + answer), heads=4 * items * answer))
            continue
        phases.append(forward_phase(f"read prompts {name}", shape, machine, tokens=n * own, heads=n))
        phases.append(decode_phase(f"answer {name}", shape, machine, items=n, new_tokens=answer, batch=section.batch_size))
        phases.append(forward_phase(f"perplexity {name}", shape, machine, tokens=items * (own + answer), heads=items * answer))
    return phases


def preferred(records: Sequence[AnyRecord]) -> bool:
    """Whether what is measured is which of several answers is preferred."""
    return bool(records) and kind_of_record(records[0]) in ("pair", "ranking")


def gate_sides(gate: Gate) -> list[str]:
    """The two candidates that a gate compares."""
    return [gate.candidate, gate.better_than or gate.not_worse_than or ""]


def _shared_beginning(session: Session) -> int:
    """The tokens that the first rows all begin with: a system message that all have in common."""
    rows = [session.data.train[i][0] for i in range(min(SAMPLED_ROWS, len(session.data.train)))]
    shortest = min(len(row) for row in rows)
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(np.argmin(same))


def verdict_warnings(recipe: Recipe, tasks: Tasks) -> list[str]:
    """Why the run cannot end in PASS or FAIL, which gates cannot be decided, and test labels that no training row has, in sentences.

    Empty where every gate can be decided: then only the measured numbers count.
    """
    gates = recipe.evaluate.gates
    never = "the verdict will be NOT MEASURED, neither PASS nor FAIL"
    found = []
    if not gates:
        found.append(f"{never}: evaluate.gates states no gate")
    if tasks.task is None and not any(gate.task == "task" for gate in gates):
        found.append(f"{f'{never}: ' if not gates else ''}there is no data.test, so nothing is measured on the task itself")
    reasons: dict[str, list[str]] = {}
    for gate in gates:
        if why := _why_undecided(gate, recipe, tasks):
            reasons.setdefault(why, []).append(gate_name(gate))
    undecided = sum(map(len, reasons.values()))
    head = never if undecided == len(gates) else "the verdict cannot be PASS"
    found += [f"{head}: {why}, so no result is possible of the gate {'; '.join(names)}" for why, names in reasons.items()]
    if tasks.task and not tasks.labels_hold:
        known = set(tasks.task.labels or ())
        odd = [item.reference.strip() for item in tasks.task.items if item.reference.strip() not in known]
        shown = ", ".join(repr(label[:40]) for label in sorted(set(odd))[:SHOWN]) + (" and others" if len(set(odd)) > SHOWN else "")
        found.append(
            f"{len(odd)} of {len(tasks.task.items)} test items have a label that no training row has ({shown}): wrong for every candidate"
        )
    return found


def _why_undecided(gate: Gate, recipe: Recipe, tasks: Tasks) -> str | None:
    """Why a gate can only read NOT MEASURED, whatever the run will measure; None where it can be decided."""
    sides = gate_sides(gate)
    known = {*recipe.evaluate.candidates, *(stage.name for stage in recipe.stages)}  # a stage is measured where a gate names it
    if gate.metric == "preference_accuracy":
        known.add("shorter")
    missing = [name for name in sides if name not in known]
    task = tasks.general if gate.task == "general" else tasks.task
    if task is None:
        return "evaluate.general names no file" if gate.task == "general" else "there is no data.test"
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not in evaluate.candidates"
    if gate.task == "general" and (strangers := [name for name in sides if name not in GUARDED]):
        return f"{' and '.join(strangers)} is not measured on the general set"
    if gate.metric == "perplexity" and "classical" in sides:
        return "classical has no perplexity"
    least = minimum_items(recipe.evaluate.confidence)
    if len(task.items) < least:
        return f"{len(task.items)} items are too few to show anything at {recipe.evaluate.confidence:.0%} (at least {least})"
    return None


def quarantine_notes(session: Session, folder: Path) -> list[str]:
    """How many rows are not used, the first of them, and the file of the run directory `folder` that lists them all; none where all are."""
    parts = {"data": session.data, **{f"data/{name}": data for name, data in session.stage_data.items()}}
    notes = []
    for part, data in parts.items():
        if rows := data.quarantine:
            first = "; ".join(f"{row['path']}:{row['line']}: {row['reason']}" for row in rows[:SHOWN])
            what = "1 row is" if len(rows) == 1 else f"{len(rows)} rows are"
            notes.append(f"{what} quarantined and not used, listed by a run in {folder / part / 'quarantine.jsonl'}; first: {first}")
    return notes
