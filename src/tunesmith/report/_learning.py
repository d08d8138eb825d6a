"""How each stage learned, and where tokens, time and memory went.

Takes `RunFiles`; gives two dictionaries, for templates/learning.html and templates/costs.html. A resumed run's repeated steps
count once: the last line of a step is the one that the weights went through.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import _words as words
from ._curves import Series, curves_view, known, series
from ._read import RunFiles
from ._rollouts import counts_sentence, hacking_sentence, reward_model_words, samples_view, stop_sentences
from ._words import Limits, capital, mapping, number, rows, text
from .charts import Bar, Line, bar_chart, line_chart

_MOST_STAGES = 6
EN_DASH = "\N{EN DASH}"
SHOWN_PHASES = 40  # of the plan, the first


def learning_view(run: RunFiles, limits: Limits) -> dict[str, Any]:
    """One entry per stage: loss, learning rate and the curves of its objective, with captions in words; what stopped it; samples."""
    stages = stage_events(run)
    settings = stage_settings(run)
    shown = [_stage(name, events, settings.get(name, {}), limits) for name, events in list(stages.items())[:_MOST_STAGES]]
    return {"stages": [stage for stage in shown if stage], "left_out": max(0, len(stages) - _MOST_STAGES)}


def stage_events(run: RunFiles) -> dict[str, list[dict[str, Any]]]:
    """The events that have a step, by the name of their stage, in the order of the run."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for event in run.events or []:
        if number(event.get("step")) is not None:
            stages.setdefault(str(event.get("stage") or "train"), []).append(event)
    return stages


def stage_settings(run: RunFiles) -> dict[str, dict[str, Any]]:
    """The recipe's stages by name."""
    return {str(stage.get("name")): stage for stage in rows(run.recipe.get("stages"))}


def _stage(name: str, events: list[dict[str, Any]], settings: dict[str, Any], limits: Limits) -> dict[str, Any] | None:
    train, validation, rate = (series(events, key) for key in ("loss", "eval_loss", "learning_rate"))
    if not (train or validation or rate):
        return None
    samples = any("eval_reward" in event for event in events)  # its eval_loss is the negative reward, which has a curve of its own
    if samples:
        validation = []
    shown = text(name, limits.names)
    marks = [(float(event["step"]), "resumed") for event in events if event.get("event") == "resumed"][:5]
    lines = [Line("training loss", train), Line("validation loss", validation, "validation")]
    loss = line_chart(lines, name=f"Loss of stage {shown}", x_label="step", y_label=_loss_label(settings), marks=marks)
    schedule = line_chart(
        [Line("learning rate", rate, "rate")],
        name=f"Learning rate of stage {shown}",
        x_label="step",
        y_label="learning rate",
        marks=marks,
    )
    lost = sum(value is None for _, value in train + validation)
    judged = next((event for event in reversed(events) if event.get("event") == "reward_model"), None)
    curves = curves_view(shown, events, settings, marks)
    return {
        "name": shown,
        "judged": reward_model_words(judged) if judged else [],
        "loss": loss,
        "validated": bool(validation),
        "rate": schedule,
        "caption": _loss_words(train, None if samples else validation),
        "steps": len(train),
        "not_finite": lost,
        "stops": stop_sentences(events, settings),
        "hacked": hacking_sentence(events),
        "counts": counts_sentence(events, settings),
        "curves": curves[: limits.curves],
        "curves_left_out": max(0, len(curves) - limits.curves),
        "samples": samples_view(events, limits),
    }


def _loss_label(settings: dict[str, Any]) -> str:
    """The loss's unit: only cross-entropy is in nats per token."""
    objective = settings.get("objective")
    kind = mapping(objective).get("type") if isinstance(objective, dict) else objective
    if kind in ("sft", "best_of_n"):
        return "loss, nats per token"
    return f"loss of {text(kind, 30)}" if kind else "loss"


def _loss_words(train: Series, validation: Series | None) -> str:
    """The loss in words; validation None: the stage is measured by its reward."""
    said = []
    for label, points in (("Training loss", train), *((("validation loss", validation),) if validation is not None else ())):
        there = known(points)
        if not there:
            said.append(f"{label}: {words.NOT_MEASURED}")
        else:
            ends = there[:1] if len(there) == 1 else [there[0], there[-1]]
            said.append(f"{label} " + ", ".join(f"{words.plain(value)} at step {words.count(step)}" for step, value in ends))
    if validation is None:
        return "; ".join(said) + ". The loss of a stage that learns from its own answers says little; read the reward."
    held = [(value, step) for step, value in known(validation)]
    best = min(held, default=None)
    low = ""
    if best and best not in (held[0], held[-1]):
        low = f"; lowest validation loss {words.plain(best[0])} at step {words.count(best[1])}"
    elif len(held) > 1:
        low = f", the {'first' if best == held[0] else 'last'} the lowest"
    return "; ".join(said) + low + "."


def costs_view(run: RunFiles, limits: Limits) -> dict[str, Any]:
    """Bars for tokens and for seconds a phase, and predicted against measured."""
    plan = mapping(run.plan)
    predicted, measured = mapping(plan.get("predicted")), mapping(plan.get("measured"))
    compared = {str(row.get("name")): row for row in rows(plan.get("compared"))}
    return {
        "tokens": _tokens(run),
        "phases": _phases(run, limits),
        "phases_sum": _phases_sum(run),
        "plan": [
            _planned("Peak memory", compared.get("peak_memory_bytes"), words.size),
            _planned("Time", compared.get("seconds"), words.duration),
            *_planned_phases(predicted, compared, limits),
            _planned("Tokens", compared.get("tokens"), words.count),
            *([_planned("Cost", compared["cost"], words.cost)] if "cost" in compared else []),
        ],
        "memory": [
            (capital(text(name, limits.names)), words.size(number(size)))
            for name, size in list(mapping(predicted.get("memory")).items())[:SHOWN_PHASES]
            if size
        ],
        "has_plan": run.plan is not None,
        "bound": [
            (label, text(part.get("bound_by"), limits.names))
            for label, part in (("predicted", predicted), ("measured", measured))
            if part.get("bound_by")
        ],
    }


def _tokens(run: RunFiles) -> Any:
    """Tokens of the rows, and what training made of them: a token that many rows share is computed once."""
    account = mapping(mapping(run.ledger).get("tokens"))
    total, supervised = number(account.get("total")), number(account.get("supervised"))
    steps = {(str(event.get("stage")), event["step"]): event for event in run.events or [] if "loss" in event and number(event.get("step"))}
    read, computed = (_sum(steps.values(), key) for key in ("tokens", "computed_tokens"))
    all_steps = sum(max(step for stage, step in steps if stage == name) for name in {stage for stage, _ in steps})
    of = "all steps" if len(steps) == all_steps else f"{words.count(len(steps))} logged steps"
    bars = [
        Bar("Rows: all tokens", total, words.count(total)),
        Bar("Rows: supervised, they carry loss", supervised, words.count(supervised) + _share(supervised, total), accent=True),
        Bar(f"Training: tokens of {of}", read, words.count(read)),
        Bar("Training: computed, shared ones once", computed, words.count(computed) + _share(computed, read)),
    ]
    return bar_chart(bars, name="Tokens")


def _sum(events: Iterable[dict[str, Any]], key: str) -> float | None:
    """The sum of `key` over the events; None unless every one has it."""
    values = [number(event.get(key)) for event in events]
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _share(part: float | None, whole: float | None) -> str:
    return f" ({100 * part / whole:.0f}%)" if part is not None and whole else ""


def _by_phase(run: RunFiles) -> dict[str, float]:
    """Seconds by phase in the order of the events; a phase that a resumed run went through again counts both times."""
    phases: dict[str, float] = {}
    for event in run.events or []:
        seconds = number(event.get("seconds"))
        if event.get("event") == "phase" and seconds is not None and seconds >= 0:
            name = str(event.get("name") or "unnamed")
            phases[name] = phases.get(name, 0.0) + seconds
    return phases


def _phases_sum(run: RunFiles) -> str | None:
    phases = _by_phase(run)
    return words.duration(sum(phases.values())) if phases else None


def _phases(run: RunFiles, limits: Limits) -> Any:
    """A bar for each phase, and under it one for each of its parts."""
    phases = _by_phase(run)
    total = sum(phases.values()) or 1.0
    shown, rest = list(phases.items())[:20], list(phases.values())[20:]
    bars = []
    for name, seconds in shown:
        bars.append(Bar(capital(text(name, limits.names)), seconds, f"{words.duration(seconds)}, {100 * seconds / total:.0f}%"))
        bars += [Bar(f"{EN_DASH} {_part_words(part, limits)}", took, words.duration(took)) for part, took in _parts(run, name).items()][:20]
    if rest:
        bars.append(Bar(f"{len(rest)} more phases", sum(rest), words.duration(sum(rest))))
    return bar_chart(bars, name="Seconds a phase")


def _parts(run: RunFiles, phase: str | None) -> dict[str, float]:
    """Seconds by part of a phase (None: of any); of a part that a resumed run says again, the last word."""
    found = [event for event in run.events or [] if event.get("event") == "phase_part" and (phase is None or event.get("of") == phase)]
    seconds = {str(event.get("name")): number(event.get("seconds")) for event in found}
    return {name: value for name, value in seconds.items() if value is not None and value >= 0}


def _part_words(name: str, limits: Limits) -> str:
    """`task.few_shot` as `task, few-shot`."""
    task, _, candidate = name.partition(".")
    known = {"few_shot": "few-shot"}.get(task, task)
    return text(f"{known}, {words.candidate_label(candidate).lower()}" if candidate else known, limits.names)


def part_seconds(run: RunFiles, name: str) -> float | None:
    """The seconds of one part of a phase, such as `task.tuned` of the evaluation; None where nothing says it."""
    return _parts(run, None).get(name)


def _planned(label: str, row: dict[str, Any] | None, say: Any) -> dict[str, str]:
    before, after, error = (number(mapping(row).get(key)) for key in ("predicted", "measured", "error"))
    off = words.NOT_MEASURED if error is None else f"{100 * error:+.0f}%"
    return {"label": label, "predicted": say(before), "measured": say(after), "error": off}


def _planned_phases(predicted: dict[str, Any], compared: dict[str, dict[str, Any]], limits: Limits) -> list[dict[str, str]]:
    """A row for each phase that the plan names."""
    names = [str(phase.get("name")) for phase in rows(predicted.get("phases"))][:SHOWN_PHASES]
    return [_planned(f"{EN_DASH} {text(name, limits.names)}", compared.get(name), words.duration) for name in names]


def resumed_words(run: RunFiles) -> list[str]:
    """One sentence for each time that the run was resumed."""
    resumed = [event for event in rows(run.events or []) if event.get("event") == "resumed"]
    return [
        f"Resumed in stage {text(event.get('stage') or 'train', 80)} at step {words.count(event.get('step'))}." for event in resumed[:10]
    ]
