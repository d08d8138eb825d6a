"""The page of a sweep: its settings side by side, and the way to each run's own report. Takes sweep.json's content, gives HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from ._page import environment
from ._words import METRICS, NOT_MEASURED
from .charts import Interval, interval_chart


def render_sweep(title: str, summary: Mapping[str, Any]) -> str:
    """The page of a sweep that is done or under way; self-contained but for the links to its runs' reports."""
    axes, runs = summary["axes"], summary["runs"]
    planned = 1
    for values in axes.values():
        planned *= len(values)
    names = list(dict.fromkeys(name for one in summary["settings"] for name in one["metrics"]))
    return (
        environment()
        .get_template("sweep.html")
        .render(
            title=title,
            done=len(runs),
            planned=planned,
            axes="; ".join(f"{key} = {', '.join(values)}" for key, values in axes.items()),
            best=None if summary["best"] is None else _label(summary["best"]),
            why=summary["why"],
            metrics=[_metric(name) for name in names],
            settings=[_setting(one, names) for one in summary["settings"]],
            charts=[{"name": _metric(name), "svg": _chart(name, runs)} for name in names if name in METRICS and METRICS[name].share],
            runs=[_run(one) for one in runs],
            failed=[{"label": one["name"], **one["error"]} for one in summary["failed"]],
            NOT_MEASURED=NOT_MEASURED,
        )
    )


def _label(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in settings.items()) or "the recipe as it is"


def _metric(name: str) -> str:
    return METRICS[name].label if name in METRICS else name


def _number(value: Mapping[str, float | None] | None) -> str:
    if value is None:
        return NOT_MEASURED
    spread = "" if value["sd"] is None else f" ± {value['sd']:.2g}"
    return f"{value['mean']:.4g}{spread}"


def _setting(one: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    cells = [_number(one["metrics"].get(name)) for name in names]
    return {"label": _label(one["settings"]), "n": one["n"], "loss": _number(one["validation_loss"]), "cells": cells}


def _chart(name: str, runs: list[dict[str, Any]]) -> Any:
    rows = []
    for run in runs:
        found = run["metrics"].get(name, {"value": None, "low": None, "high": None, "n": 0})
        note = NOT_MEASURED if found["value"] is None else f"{found['value']:.1%} (n = {found['n']})"
        rows.append(Interval(run["name"], found["value"], found["low"], found["high"], note))
    return interval_chart(rows, name=_metric(name), share=True)


def _run(one: Mapping[str, Any]) -> dict[str, str]:
    loss = one["validation_loss"]
    return {
        "label": one["name"],
        "link": f"{quote(one['name'])}/report.html",
        "verdict": one["verdict"] or NOT_MEASURED,
        "loss": NOT_MEASURED if loss is None else f"{loss:.4f}",
        "minutes": f"{one['seconds'] / 60:.1f}",
        "memory": f"{one['peak_memory_bytes'] / 1e9:.2f} GB",
    }
