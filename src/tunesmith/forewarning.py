"""What is said of a session before anything is trained: what stands in the way of a verdict, and which rows are not used.

Takes the recipe, its tasks and the session's prepared data; gives sentences.
"""

from __future__ import annotations

from pathlib import Path

from .evaluate.run import GUARDED
from .evaluate.verdict import gate_name
from .recipe import Gate, Recipe
from .score import minimum_items
from .session import Session
from .tasks import Tasks

SHOWN = 3  # quarantined rows and unknown labels named in a line


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
    sides = _gate_sides(gate)
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


def _gate_sides(gate: Gate) -> list[str]:
    """The two candidates that a gate compares."""
    return [gate.candidate, gate.better_than or gate.not_worse_than or ""]
