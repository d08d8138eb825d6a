"""The lines of a run's event log: how one is written, and which of a file's are whole.

Takes events.jsonl, or its bytes; gives (line, event) pairs. Only the last line can be torn by a kill.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import CheckpointError

from ._storage import plain

EVENTS = "events.jsonl"


def read_events(run_path: Path) -> list[dict[str, Any]]:
    """The events of a run directory, for readers that do not hold it; a torn last line is left out, no log gives an empty list.

    Raises CheckpointError naming the line when any other is damaged.
    """
    path = Path(run_path) / EVENTS
    return [event for _, event in event_lines(bytes_of(path), path)]


def bytes_of(path: Path) -> bytes:
    """A file's content; none where there is no file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def event_line(event: Mapping[str, Any]) -> bytes:
    """An event as a line of the log, with the time."""
    content = plain({"time": round(time.time(), 3), **event})
    return (json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def event_lines(raw: bytes, path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """(line with its end, event) of each whole line. Only the last one can be torn by a kill; what a power cut leaves there may be
    zero bytes."""
    result = []
    lines = raw.split(b"\n")
    last = max((number for number, line in enumerate(lines) if line), default=0)
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            event = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict):
            result.append((line + b"\n", event))
        elif number < last:
            raise CheckpointError("the event log is damaged here", where=f"{path}:{number + 1}", mend="remove the line")
    return result


def is_after(event: Mapping[str, Any], stage: str, step: int) -> bool:
    """Whether an event is of a later step of the stage."""
    at = event.get("step")
    return event.get("stage") == stage and isinstance(at, int) and at > step
