"""`write_report`: one run directory in, one self-contained `report.html` out.

The page needs no network, no script and no font; its content security policy forbids all three. Every text that comes from
data, models or errors passes jinja2's autoescape. The page stays under a megabyte: texts are cut where it says so.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from ..errors import MissingFile
from ..rundir import write_text
from . import _words as words
from ._account import findings_view, ledger_view, repeat_view
from ._candidates import candidates_view
from ._examples import examples_view
from ._learning import costs_view, learning_view
from ._read import RunFiles, read_run
from ._verdict import verdict_view
from ._words import Limits, mapping, text

# A page that a mail server carries and a phone opens at once.
MAX_BYTES = 1_000_000
# Each try holds a third of the one before; the last is a few kilobytes of text whatever the run holds.
_TRIES = 6
# What every run leaves within its first second or, copied in part, is worth a page; recipe.yaml alone may be anybody's.
_OF_A_RUN = ("events.jsonl", "evaluation.json", "plan.json", "data/ledger.json")


def write_report(run_path: Path) -> Path:
    """Writes `report.html` into the run directory `run_path` from the files it holds, and gives its path.

    Files that are missing read NOT MEASURED. Raises MissingFile, with nothing written, when there is no such folder or nothing
    in it is a run's, StorageFailed when the disk refuses the write.
    """
    if Path(run_path).is_dir() and not any((Path(run_path) / name).is_file() for name in _OF_A_RUN):
        raise MissingFile("this is no run directory", where=str(run_path), mend="give the folder that `tunesmith run` wrote")
    target = Path(run_path) / "report.html"
    write_text(target, render_report(Path(run_path)))
    return target


def render_report(run_path: Path) -> str:
    """The page of the run directory `run_path` as HTML; less than MAX_BYTES when encoded as UTF-8."""
    if not run_path.is_dir():
        raise MissingFile("there is no run directory", where=str(run_path), mend="give the folder that `tunesmith run` wrote")
    run, limits = read_run(run_path), Limits()
    for _ in range(_TRIES):
        page = _render(run, limits)
        if len(page.encode()) < MAX_BYTES:
            break
        limits = limits.smaller()
    return page


def _render(run: RunFiles, limits: Limits) -> str:
    return (
        environment()
        .get_template("report.html")
        .render(
            title=text(run.recipe.get("name") or run.path.resolve().name or "run", limits.names),
            model=text(_model_name(run), limits.names),
            description=words.excerpt(mapping(run.recipe.get("task")).get("description"), limits.text),
            verdict=verdict_view(run, limits),
            candidates=candidates_view(run, limits),
            learning=learning_view(run, limits),
            costs=costs_view(run, limits),
            examples=examples_view(run, limits),
            ledger=ledger_view(run, limits),
            findings=findings_view(run, limits),
            repeat=repeat_view(run, limits),
            problems=[text(problem, 300) for problem in dict.fromkeys(run.problems)][:20],
            evaluated=run.evaluation is not None,
            NOT_MEASURED=words.NOT_MEASURED,
        )
    )


def _model_name(run: RunFiles) -> Any:
    model = run.recipe.get("model")
    return mapping(model).get("name") or (model if isinstance(model, str) else None)


@cache
def environment() -> jinja2.Environment:
    """The templates; every value is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("tunesmith.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
