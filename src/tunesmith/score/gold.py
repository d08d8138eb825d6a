"""The gold measure: a user's function that training never sees, as numbers for answers.

Takes `task.gold_reward`, file:function with `checks(prompt: str, answer: str) -> dict[str, float]`, each between 0 and 1; gives an
answer's checks and their mean. The function never runs in this process: each call starts a process of its own, which is killed when an
answer takes too long, so nothing has to be kept alive between calls and nothing that a call leaves behind reaches the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np

from ..errors import RecipeError
from ._reward_process import CHUNK_BYTES, PATIENCE, START_SECONDS, Unscorable

CHILD = Path(__file__).with_name("_gold_child.py")
SECONDS = 60.0  # of one answer: only an endless loop takes as long
WHERE = "task.gold_reward"
MEND = "write file:function, e.g. gold.py:checks, with def checks(prompt, answer): return {'polite': 1.0}"

Checks = dict[str, float]


@dataclass(frozen=True)
class Gold:
    """A gold measure, ready to be asked. sha256: of its file, on which scores depend. seconds: how long one answer may take."""

    file: Path
    function: str
    sha256: str
    seconds: float = SECONDS

    @property
    def name(self) -> str:
        """Which function it is, for a sentence: `gold.py:checks`."""
        return f"{self.file.name}:{self.function}"

    def checks(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Checks | Unscorable]:
        """Each answer's checks, or why it has none, in order; every answer has the checks of the first that has any.

        An answer on which the measure hangs or dies is passed over, and those after it are asked in a new process.
        """
        pairs = list(zip(prompts, answers, strict=True))
        found: list[Checks | Unscorable] = []
        failures = 0
        while len(found) < len(pairs):
            lines, failure = self._run(pairs[len(found) :])
            found += lines
            if failure is not None:
                failures += 1
                found += [failure] * (1 if failures < PATIENCE else len(pairs) - len(found))
        names = next((set(one) for one in found if isinstance(one, dict)), set())
        return [_of_names(one, names) for one in found]

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """The mean of each answer's checks, float64 [N]; NaN for an answer that has none."""
        return means_of_checks(self.checks(prompts, answers))

    def close(self) -> None:
        """Nothing is kept alive between calls; a caller may treat a gold measure as one treats rewards."""
        return

    def _run(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[Checks | Unscorable], Unscorable | None]:
        """What one process says of the pairs, in order, and why it stopped before the last. Raises RecipeError where it does not load."""
        process = subprocess.Popen(
            [sys.executable, "-P", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # the same scores in every process
            start_new_session=True,  # Ctrl-C at the terminal is for us, and the group can be killed whole
        )
        job = {"file": str(self.file), "function": self.function, "pairs": [list(pair) for pair in pairs]}
        sender = threading.Thread(target=_send, args=(process, json.dumps(job).encode()), daemon=True)  # a pipe holds only so much
        failure = None
        try:
            sender.start()
            out, seconds = _lines(process, len(pairs) + 1, self.seconds)
            if seconds is not None:
                failure = Unscorable(f"took longer than {seconds:g} s and was ended")
        finally:
            if process.poll() is None:  # it hangs, or an interrupt came
                _kill(process)
            sender.join()
            cast(IO[bytes], process.stdout).close()
        lines = [json.loads(line) for line in out]
        if not lines or "load" in lines[0]:
            why = lines[0]["load"] if lines else failure.reason if failure else f"its process ended (exit status {process.returncode})"
            raise RecipeError(f"the gold measure cannot be used: {why}", where=f"{WHERE}: {self.file}:{self.function}", mend=MEND)
        known: list[Checks | Unscorable] = [Unscorable(line["error"]) if "error" in line else line["checks"] for line in lines[1:]]
        if len(known) == len(pairs):
            return known, None
        return known, failure or Unscorable(f"its process ended (exit status {process.returncode})")


def means_of_checks(found: Sequence[Checks | Unscorable]) -> np.ndarray:
    """The mean of each answer's checks, float64 [N]; NaN for an answer that has none."""
    return np.array([np.nan if isinstance(one, Unscorable) else sum(one.values()) / len(one) for one in found], dtype=np.float64)


def lost_words(name: str, found: Sequence[Checks | Unscorable | str]) -> str | None:
    """How many answers a gold measure could not measure, and why it could not measure the first of them; None where it measured all.

    name: of the measure. found: what it said of each answer; a text is a reason.

    >>> lost_words("gold.py:checks", [{"polite": 1.0}, "raised KeyError: 3"])
    '1 of 2 answers could not be measured: gold.py:checks raised KeyError: 3'
    """
    lost = [one.reason if isinstance(one, Unscorable) else one for one in found if not isinstance(one, dict)]
    return f"{len(lost)} of {len(found)} answers could not be measured: {name} {_as_clause(lost[0])}" if lost else None


def _as_clause(reason: str) -> str:
    """A reason that follows the measure's name: one that is no predicate stands after a colon."""
    return reason if reason.startswith(("raised ", "returned ", "took ")) else f"said: {reason}"


def gold_function(setting: str, *, seconds: float = SECONDS) -> Gold:
    """The gold measure that a recipe's `task.gold_reward` names, loaded once to see that it can be.

    seconds: how long one answer may take. Raises RecipeError where there is no such file or function, or it cannot take (prompt, answer).
    """
    file, colon, function = setting.rpartition(":")
    if not colon or not file or not function.isidentifier():
        raise RecipeError("the gold measure names no function", where=f"{WHERE}: {setting}", mend=MEND)
    path = Path(file).absolute()
    if not path.is_file():
        raise RecipeError(f"the gold measure's file is not there: {path}", where=f"{WHERE}: {setting}", mend=MEND)
    gold = Gold(path, function, hashlib.sha256(path.read_bytes() + f":{function}".encode()).hexdigest(), seconds)
    gold._run([])
    return gold


def _of_names(found: Checks | Unscorable, names: set[str]) -> Checks | Unscorable:
    if isinstance(found, Unscorable) or set(found) == names:
        return found
    return Unscorable(f"its checks are {', '.join(sorted(found))}, and another answer's {', '.join(sorted(names))}")


def _send(process: subprocess.Popen[bytes], job: bytes) -> None:
    requests = cast(IO[bytes], process.stdin)
    with contextlib.suppress(BrokenPipeError):  # it ended before it had read all
        requests.write(job)
        requests.flush()
    with contextlib.suppress(BrokenPipeError):
        requests.close()


def _lines(process: subprocess.Popen[bytes], wanted: int, seconds: float) -> tuple[list[bytes], float | None]:
    """The process's first lines, as many as wanted or until it ends; and the limit in seconds, where a line took longer.

    seconds: of one line. The first comes when the measure is loaded, which has START_SECONDS.
    """
    replies = cast(IO[bytes], process.stdout)
    found: list[bytes] = []
    rest, limit = b"", START_SECONDS
    deadline = time.monotonic() + limit
    with selectors.DefaultSelector() as selector:
        selector.register(replies, selectors.EVENT_READ)
        while len(found) < wanted:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return found, limit
            part = os.read(replies.fileno(), CHUNK_BYTES)
            if not part:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    return found, limit
                break
            *lines, rest = (rest + part).split(b"\n")
            if lines:
                found += lines
                limit = seconds
                deadline = time.monotonic() + limit
    return found, None


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
