"""What a person sees while a verb works: bars with an ETA on a terminal, plain lines in a pipe, JSON lines for machines.

Takes the events of a run, one dict each; everything here goes to standard error, so that standard output stays the result's.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from .rundir import plain

LINE_EVERY = 10.0  # seconds between training lines in a pipe
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but tab and line end; bidirectional overrides too
_SAMPLED = {"reward": 3, "kl": 2, "length": 1}  # of a stage that samples, beside the loss; with their digits
_LIBRARIES = ("transformers", "huggingface_hub", "accelerate", "peft")  # those that bring their own handlers


class Display:
    """Shows events. as_json: each event as a line of JSON on standard error, and so are warnings and log lines of libraries."""

    def __init__(self, *, as_json: bool = False):
        self.as_json = as_json
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        """Shows one event."""
        if self.as_json:
            print_event(event)
        elif "loss" in event:
            self._step(event)
        else:
            text = event_words(event)
            if text:
                self._say(text)
            if event.get("event") in ("stage_finished", "phase"):
                self.close()

    def close(self) -> None:
        """Takes the bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, text: str) -> None:
        bar = self._bar  # a signal is said from a thread of its own
        (bar.console if bar else self.console).print(visible(text), highlight=False, markup=False, soft_wrap=True)

    def _step(self, event: dict[str, Any]) -> None:
        memory = event["peak_memory_bytes"] / 1e9
        speed = f"{event['tokens_per_second']:,.0f} tok/s"
        sampled = "".join(f"{name} {event[name]:.{digits}f}  " for name, digits in _SAMPLED.items() if name in event)
        numbers = f"loss {event['loss']:.4f}  {sampled}lr {event['learning_rate']:.2e}  {speed}  {memory:.2f} GB"
        if not self.console.is_terminal:
            now = time.monotonic()
            if now - self._last_line >= LINE_EVERY or event["step"] in (1, event["total_steps"]):
                self._last_line = now
                self._say(f"{event['stage']} step {event['step']}/{event['total_steps']}  {numbers}")
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(event["stage"], total=event["total_steps"], completed=event["step"] - 1, numbers=numbers)
        self._bar.update(self._task, completed=event["step"], numbers=numbers)


def event_words(event: dict[str, Any]) -> str | None:
    """An event in words; None for those that only the log needs."""
    kind = event.get("event")
    if kind == "phase_started":
        return f"{event['name']} …"
    if kind == "phase":
        return f"{event['name']} done in {duration(event['seconds'])}"
    if kind == "plan":
        return plan_words(event)
    if kind == "evaluated" and "eval_reward" in event:
        return f"  step {event['step']}: held-out reward {event['eval_reward']:.4f}"
    if kind == "stopped":
        return (
            f"{event['stage']} stopped after step {event['step']}: {event['rule']} is {event['value']:.4g}, its limit {event['limit']:.4g}"
        )
    if kind == "nothing_learned":
        return f"  step {event['step']}: nothing to learn from: no answer was better than another to its prompt"
    if kind == "note":
        return f"note: {event['note']}"
    if kind == "evaluated":
        return f"  step {event['step']}: validation loss {event['eval_loss']:.4f}"
    if kind in ("evaluating", "exporting"):
        return f"  {event['what']}"
    if kind == "sweeping":
        return f"run {event['number']} of {event['of']}: {event['run']}"
    if kind == "run_failed":
        return f"run {event['run']} failed: {event['error']}"
    if kind == "stopping":
        return f"{event['signal']}: stopping with a checkpoint when this step is done"
    if kind == "resumed":
        return f"resumed {event['stage']} at step {event['step']}"
    if kind == "checkpoint_refused":
        return f"checkpoint {event['checkpoint']} refused: {event['reason']}"
    if kind == "fast_paths_dropped":
        return "computed plainly, and slower: " + "; ".join(f"{path} ({event['reasons'][path]})" for path in event["paths"])
    return None


def plan_words(plan: dict[str, Any]) -> str:
    """The plan and the ledger in a few lines, what stands in the way of a verdict last."""
    ledger = plan.get("ledger")
    lines = []
    if ledger:
        dropped = ", ".join(f"{n} {reason}" for reason, n in ledger["rows_dropped"].items()) or "none"
        tokens = ledger["tokens"]
        share = tokens["supervised"] / max(1, tokens["total"])
        lines.append(
            f"rows: {ledger['rows_in']} in = {ledger['rows_trained']} trained + {ledger['rows_held_out']} held out + dropped: {dropped};"
            f" {tokens['total']:,} tokens, {share:.0%} of them trained on"
        )
    lines += [f"note: {note}" for note in plan.get("notes", [])]
    memory = plan["peak_memory_bytes"] / 1e9
    cost = "" if plan.get("cost") is None else f", at a cost of {cost_words(plan['cost'])}"
    each = f" in each of {plan['processes']} processes" if plan["processes"] > 1 else ""
    lines.append(f"plan: about {duration(plan['seconds'])}, {memory:.1f} GB of memory{each}, bound by {plan['bound_by']}{cost}")
    if plan.get("memory"):
        lines.append("  memory: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan["memory"].items() if size) + " GB")
    lines += [f"  {phase['name']}: {duration(phase['seconds'])}, bound by {phase['bound_by']}" for phase in plan.get("phases", [])]
    lines += [f"warning: {warning}" for warning in plan.get("warnings", [])]
    return "\n".join(lines)


def check_words(result: dict[str, Any]) -> str:
    """What `data check` found, in lines; rows that are rejected for one reason stand on one."""
    from .data.read import rejections

    lines = [*result["notes"]]
    lines += [f"rejected: {line}" for line in rejections([(row["path"], row["line"], row["reason"]) for row in result["rejected"]])]
    lines += [f"dropped, {reason}: {count}" for reason, count in result["dropped"].items()]
    lines += [f"{finding['check']}: {finding['evidence']}\n  mend: {finding['mend']}" for finding in result["findings"]]
    return "\n".join([*lines, *(() if result["rejected"] or result["findings"] else ("nothing was found wrong",))])


def cost_words(cost: float) -> str:
    """A cost in the price's unit, with two digits, of which nought would say that it is free."""
    return f"{cost:,.2f}" if cost >= 0.01 or cost == 0 else "less than 0.01"


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    units = (("s", 1, 90), ("minutes", 60, 90), ("hours", 3600, 48), ("days", 86400, math.inf))
    unit, size, _ = next(one for one in units if seconds < one[1] * one[2])
    return f"{seconds / size:.1f} {unit}"


def visible(text: str) -> str:
    """Text whose control characters are written out, so that what came from data or a model cannot steer the terminal.

    >>> visible("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def supervised_spans(example: Text) -> list[tuple[int, int]]:
    """(start, end) in characters of what carries loss in a coloured example; what touches is one span."""
    spans: list[tuple[int, int]] = []
    for span in example.spans:
        if str(span.style) != "dim":
            start = spans.pop()[0] if spans and spans[-1][1] == span.start else span.start
            spans.append((start, span.end))
    return spans


def example_text(example: Text) -> Text:
    """A coloured example for a terminal: a control character is one replacement character, so that the colours stay where they are."""
    return Text(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", example.plain), spans=example.spans)


def example_words(example: Text) -> str:
    """A coloured example for a pipe: what carries loss stands between ⟦ and ⟧."""
    text, at, parts = example.plain, 0, []
    for start, end in supervised_spans(example):
        parts += [text[at:start], "⟦", text[start:end], "⟧"]
        at = end
    return visible("".join([*parts, text[at:]]))


def as_json_text(value: Any, *, indent: int | None = None) -> str:
    """A result as one JSON value; numbers that are not finite become text, a coloured example its text and spans."""
    if isinstance(value, dict) and isinstance(value.get("example"), Text):
        example = value["example"]
        value = value | {"example": {"text": example.plain, "supervised": supervised_spans(example)}}
    return json.dumps(plain(value), ensure_ascii=False, indent=indent, allow_nan=False)


def print_event(event: dict[str, Any]) -> None:
    """One event as a line of JSON on standard error."""
    print(as_json_text(event), file=sys.stderr, flush=True)


class _JsonLines(logging.Handler):
    """Log records as events."""

    def emit(self, record: logging.LogRecord) -> None:
        print_event({"event": "log", "level": record.levelname.lower(), "from": record.name, "text": record.getMessage()})


@contextmanager
def libraries_in_json() -> Iterator[None]:
    """For a while, what libraries warn of and log become lines of JSON too, so that standard error holds nothing else."""
    handler = _JsonLines(logging.WARNING)
    root = logging.getLogger()
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        root.addHandler(handler)
        for logger in loggers:
            logger.handlers, logger.propagate = [handler], False
        try:
            yield
        finally:
            root.removeHandler(handler)
            for logger, handlers, propagate in before:
                logger.handlers, logger.propagate = handlers, propagate


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object) -> None:
    print_event({"event": "warning", "kind": category.__name__, "text": str(message), "from": f"{filename}:{lineno}"})
