"""Learning curves, and where tokens, time and memory went.

Takes `RunFiles`; gives two dictionaries, for templates/learning.html and templates/costs.html. A resumed run's repeated steps
count once: the last line of a step is the one that the weights went through.
"""

from __future__ import annotations

from typing import Any

from . import _words as words
from ._read import RunFiles
from ._words import Limits, mapping, number, rows, text
from .charts import Bar, Line, bar_chart, line_chart

_MOST_STAGES = 6
_VALIDATION_KEYS = ("validation_loss", "eval_loss")


def learning_view(run: RunFiles, limits: Limits) -> dict[str, Any]:
    """One entry per stage: its loss and its learning-rate chart, each with a caption in words."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for event in run.events or []:
        if number(event.get("step")) is not None:
            stages.setdefault(text(event.get("stage") or "train", limits.names), []).append(event)
    shown = [_stage(name, events) for name, events in list(stages.items())[:_MOST_STAGES]]
    return {"stages": [stage for stage in shown if stage], "left_out": max(0, len(stages) - _MOST_STAGES)}


def _stage(name: str, events: list[dict[str, Any]]) -> dict[str, Any] | None:
    train, validation, rate = (_series(events, keys) for keys in (("loss",), _VALIDATION_KEYS, ("learning_rate",)))
    if not (train or validation or rate):
        return None
    marks = [(number(event["step"]), "resumed") for event in events if event.get("event") == "resumed"]
    lines = [Line("training loss", train), Line("validation loss", validation, "validation")]
    loss = line_chart(lines, name=f"Loss of stage {name}", x_label="step", y_label="loss, nats per token", marks=marks[:5])
    schedule = line_chart(
        [Line("learning rate", rate, "rate")],
        name=f"Learning rate of stage {name}",
        x_label="step",
        y_label="learning rate",
        marks=marks[:5],
    )
    lost = sum(value is None for _, value in train + validation)
    return {
        "name": name,
        "loss": loss,
        "rate": schedule,
        "caption": _loss_words(train, validation),
        "steps": len(train),
        "not_finite": lost,
    }


def _series(events: list[dict[str, Any]], keys: tuple[str, ...]) -> list[tuple[float, float | None]]:
    """The values under any of `keys` by step; a value that is there but not finite is kept as None."""
    found: dict[float, float | None] = {}
    for event in events:
        for key in keys:
            if key in event and (event[key] is not None or "event" not in event):
                found[float(event["step"])] = number(event[key])
    return sorted(found.items())


def _loss_words(train: list[tuple[float, float | None]], validation: list[tuple[float, float | None]]) -> str:
    said = []
    for label, series in (("Training loss", train), ("validation loss", validation)):
        known = [(step, value) for step, value in series if value is not None]
        if not known:
            said.append(f"{label}: {words.NOT_MEASURED}")
        else:
            said.append(
                f"{label} {words.plain(known[0][1])} at step {words.count(known[0][0])}, {words.plain(known[-1][1])} at step {words.count(known[-1][0])}"
            )
    best = min(((value, step) for step, value in validation if value is not None), default=None)
    low = f"; lowest validation loss {words.plain(best[0])} at step {words.count(best[1])}" if best else ""
    return "; ".join(said) + low + "."


def costs_view(run: RunFiles, limits: Limits) -> dict[str, Any]:
    """Bars for tokens and for seconds a phase, and predicted against measured."""
    predicted, measured = mapping(mapping(run.plan).get("predicted")), mapping(mapping(run.plan).get("measured"))
    return {
        "tokens": _tokens(run, measured),
        "phases": _phases(run, limits),
        "phases_sum": _phases_sum(run),
        "plan": [
            _planned("Peak memory", predicted, measured, "peak_memory_bytes", words.size),
            _planned("Time", predicted, measured, "seconds", words.duration),
            _planned("Tokens", predicted, measured, "tokens", lambda value: words.count(value)),
        ],
        "has_plan": run.plan is not None,
        "bound": [
            (label, text(part.get("bound_by"), limits.names))
            for label, part in (("predicted", predicted), ("measured", measured))
            if part.get("bound_by")
        ],
    }


def _tokens(run: RunFiles, measured: dict[str, Any]) -> Any:
    account = mapping(mapping(run.ledger).get("tokens"))
    total, supervised = number(account.get("total")), number(account.get("supervised"))
    shared = next(
        (number(part.get(key)) for part in (account, measured) for key in ("shared", "tokens_shared", "shared_tokens") if key in part), None
    )
    bars = [Bar("All tokens of the training rows", total, words.count(total))]
    for label, value in (("Supervised: carry loss", supervised), ("Shared: computed once for many rows", shared)):
        part = f" ({100 * value / total:.0f}%)" if value is not None and total else ""
        bars.append(Bar(label, value, words.count(value) + part, accent=label.startswith("Supervised")))
    return bar_chart(bars, name="Tokens")


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
    phases = _by_phase(run)
    total = sum(phases.values()) or 1.0
    shown, rest = list(phases.items())[:20], list(phases.values())[20:]
    if rest:
        shown.append((f"{len(rest)} more phases", sum(rest)))
    bars = [
        Bar(text(words.humane(name), limits.names), seconds, f"{words.duration(seconds)}, {100 * seconds / total:.0f}%")
        for name, seconds in shown
    ]
    return bar_chart(bars, name="Seconds a phase")


def phase_seconds(run: RunFiles, ending: str) -> float | None:
    """The seconds of the phases whose name ends with the word `ending`, e.g. `evaluate task.tuned`; None where there is none."""
    found = [
        number(event.get("seconds"))
        for event in run.events or []
        if event.get("event") == "phase" and str(event.get("name")).split()[-1:] == [ending]
    ]
    known = [seconds for seconds in found if seconds is not None]
    return sum(known) if known else None


def _planned(label: str, predicted: dict[str, Any], measured: dict[str, Any], key: str, say: Any) -> dict[str, str]:
    before, after = number(predicted.get(key)), number(measured.get(key))
    ratio = f"{after / before:.2f} times" if before and after is not None else words.NOT_MEASURED
    return {"label": label, "predicted": say(before), "measured": say(after), "ratio": ratio}


def resumed_words(run: RunFiles) -> list[str]:
    """One sentence for each time that the run was resumed."""
    resumed = [event for event in rows(run.events or []) if event.get("event") == "resumed"]
    return [
        f"Resumed in stage {text(event.get('stage') or 'train', 80)} at step {words.count(event.get('step'))}." for event in resumed[:10]
    ]
