"""What a person sees while a verb works: bars with an ETA on a terminal, plain lines in a pipe, JSON lines for machines."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 10.0  # seconds between training lines in a pipe


class Display:
    """Shows events. as_json: each event as a line of JSON on standard error, so that standard output stays the result's."""

    def __init__(self, *, as_json: bool = False):
        self.as_json = as_json
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        """Shows one event."""
        if self.as_json:
            print(json.dumps(event, default=str), file=sys.stderr, flush=True)
        elif "loss" in event:
            self._step(event)
        else:
            text = _words(event)
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
        (self._bar.console if self._bar else self.console).print(text, highlight=False, markup=False)

    def _step(self, event: dict[str, Any]) -> None:
        numbers = f"loss {event['loss']:.4f}  lr {event['learning_rate']:.2e}  {event['tokens_per_second']:,.0f} tok/s  {event['peak_memory_bytes'] / 1e9:.2f} GB"
        if not self.console.is_terminal:
            now = time.monotonic()
            if now - self._last_line >= LINE_EVERY or event["step"] in (1, event["total_steps"]):
                self._last_line = now
                self._say(f"{event['stage']} step {event['step']}/{event['total_steps']}  {numbers}")
            return
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            self._bar = Progress(*columns, console=self.console, transient=False)
            self._bar.start()
            self._task = self._bar.add_task(event["stage"], total=event["total_steps"], completed=event["step"] - 1, numbers=numbers)
        self._bar.update(self._task, completed=event["step"], numbers=numbers)


def _words(event: dict[str, Any]) -> str | None:
    """An event in words; None for those that only the log needs."""
    kind = event.get("event")
    if kind == "phase_started":
        return f"{event['name']} …"
    if kind == "phase":
        return f"{event['name']} done in {duration(event['seconds'])}"
    if kind == "plan":
        return plan_words(event)
    if kind == "evaluated":
        return f"  step {event['step']}: validation loss {event['eval_loss']:.4f}"
    if kind == "evaluating":
        return f"  {event['what']}"
    if kind == "resumed":
        return f"resumed {event['stage']} at step {event['step']}"
    if kind == "checkpoint_refused":
        return f"checkpoint {event['checkpoint']} refused: {event['reason']}"
    if kind == "fast_paths_dropped":
        return f"fast paths disagree with the plain layers and are off: {', '.join(event['paths'])}"
    return None


def plan_words(plan: dict[str, Any]) -> str:
    """The plan and the ledger in two or three lines."""
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
    lines.append(f"plan: about {duration(plan['seconds'])}, {memory:.1f} GB at most, bound by {plan['bound_by']}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"
