"""A killable process that scores answers: started once, asked over pipes, killed when a call takes too long and started again.

Takes a job for _reward_child.py (a Python function, a regular expression, a JSON Schema) and the seconds one call may take; gives
each answer's score, or the reason why it has none as an `Unscorable`. Never raises for what the job does once it is loaded.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from ..errors import RecipeError

START_SECONDS = 120.0  # to import the user's file, which may import torch, on a busy machine
CHUNK_BYTES = 2**16  # of one read or write
PATIENCE = 3  # deaths of the process in one call, after which the rest of its answers are not tried
MEND = {
    "python": "name a file that can be imported and a function in it, def reward(prompts, completions, **columns), that returns a list",
    "regex": "write a regular expression as Python's re module takes it",
    "json_schema": "check that jsonschema can be imported by this Python",
}
CHILD = Path(__file__).with_name("_reward_child.py")


class Unscorable(NamedTuple):
    """An answer without a score, and why."""

    reason: str


Outcome = float | Unscorable


class _Running(NamedTuple):
    process: subprocess.Popen[bytes]
    requests: IO[bytes]
    replies: IO[bytes]


class _TooLong(Exception):
    """No reply within the limit."""


class _Gone(Exception):
    """The child closed its end."""


class RewardProcess:
    """One job in a process of its own.

    job: see _reward_child.py. seconds: limit of one call. singly: each answer is a call of its own (a job that judges every answer
    by itself). where: for errors. Raises RecipeError where the job cannot be loaded.
    """

    def __init__(self, job: dict[str, Any], *, seconds: float, singly: bool, where: str):
        self.job, self.seconds, self.singly, self.where = job, seconds, singly, where
        self._running: _Running | None = None
        self._lock, self._owner = threading.Lock(), os.getpid()
        ready = self._started()
        self.required: list[str] = ready["required"]
        self.taken: list[str] = ready["taken"]

    def score(self, prompts: list[str], completions: list[str], columns: dict[str, list]) -> list[Outcome]:
        """One outcome an answer, in order. A call that raises is tried again answer by answer, so that one does not take the others
        with it; one that hangs, or gives no list of as many scores, is unscorable as a whole."""
        with self._lock:
            if self.singly:
                return [self._call([p], [c], _at(columns, i))[0][0] for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]
            outcomes, error = self._call(prompts, completions, columns)
            return outcomes if error not in ("raised", "died") or len(completions) < 2 else self._one_by_one(prompts, completions, columns)

    def _one_by_one(self, prompts: list[str], completions: list[str], columns: dict[str, list]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        deaths = 0
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            outcome, error = self._call([prompt], [completion], _at(columns, index))
            outcomes += outcome
            deaths += error == "died"
            if error == "time" or deaths >= PATIENCE:
                return outcomes + outcome * (len(completions) - len(outcomes))
        return outcomes

    def _call(self, prompts: list[str], completions: list[str], columns: dict[str, list]) -> tuple[list[Outcome], str | None]:
        """The outcomes and the kind of error, None where the call as such went well."""
        try:
            body = json.dumps({"prompts": prompts, "completions": completions, "columns": columns}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            return _all(f"the rows cannot be passed on as JSON: {error}", len(completions)), "shape"
        try:
            self._started()
            reply = self._exchange(body, self.seconds)
        except RecipeError as error:
            return _all(f"could not be started again: {error.what}", len(completions)), "died"
        except _TooLong:
            self._end()
            return _all(f"took longer than {self.seconds:g} s and was ended", len(completions)), "time"
        except (_Gone, OSError):
            return _all(f"its process ended (exit status {self._end()})", len(completions)), "died"
        except BaseException:  # an interrupt, say: what the child still writes must not be taken for the next call's reply
            self._end()
            raise
        if "error" in reply:
            return _all(reply["message"], len(completions)), reply["error"]
        return [Unscorable(value) if isinstance(value, str) else float(value) for value in reply["values"]], None

    def _started(self) -> dict[str, Any]:
        """Starts the process if there is none; what the job says of itself. Raises RecipeError where it does not load."""
        if self._running is not None:
            return {}
        process = subprocess.Popen(
            [sys.executable, "-P", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # the same scores in every process
            start_new_session=True,  # Ctrl-C at the terminal is for us, and the group can be killed whole
        )
        atexit.register(self.close)
        self._running = _Running(process, cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout))
        for stream in self._running[1:]:
            os.set_blocking(stream.fileno(), False)
        mend = MEND[self.job["kind"]]
        try:
            reply = self._exchange(json.dumps(self.job).encode(), START_SECONDS)
        except _TooLong as error:
            self._end()
            raise RecipeError(f"the reward took longer than {START_SECONDS:g} s to load", where=self.where, mend=mend) from error
        except (_Gone, OSError) as error:
            what = f"the reward's process ended while it was loaded (exit status {self._end()})"
            raise RecipeError(what, where=self.where, mend=mend) from error
        except BaseException:
            self._end()
            raise
        if "error" in reply:
            self._end()
            raise RecipeError(f"the reward cannot be used: {reply['message']}", where=self.where, mend=mend)
        return reply["ready"]

    def _exchange(self, body: bytes, seconds: float) -> dict[str, Any]:
        """Sends one message and waits for its reply; raises _TooLong, _Gone or OSError."""
        deadline = time.monotonic() + seconds
        if self._running is None:
            raise _Gone
        requests, replies = self._running.requests, self._running.replies
        with selectors.DefaultSelector() as selector:
            selector.register(requests, selectors.EVENT_WRITE)
            unsent = memoryview(struct.pack(">I", len(body)) + body)
            while unsent:
                _wait(selector, deadline)
                unsent = unsent[os.write(requests.fileno(), unsent[:CHUNK_BYTES]) :]
            selector.unregister(requests)
            selector.register(replies, selectors.EVENT_READ)
            (length,) = struct.unpack(">I", _receive(replies.fileno(), 4, selector, deadline))
            try:
                return json.loads(_receive(replies.fileno(), length, selector, deadline))
            except ValueError as error:  # user code wrote to our pipe: what follows cannot be told from replies
                raise _Gone from error

    def _end(self) -> int | None:
        """Kills the process and all it started; its exit status, None where there was none."""
        running, self._running = self._running, None
        if running is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        status = running.process.wait()
        for stream in running[1:]:
            with contextlib.suppress(BrokenPipeError):  # what was not sent to a dead process
                stream.close()
        return status

    def close(self) -> None:
        """Ends the process; a later call starts it again. Does nothing in a process forked from the one that started it."""
        if os.getpid() == self._owner:
            atexit.unregister(self.close)
            self._end()


def _at(columns: dict[str, list], index: int) -> dict[str, list]:
    return {name: [values[index]] for name, values in columns.items()}


def _all(reason: str, count: int) -> list[Outcome]:
    return [Unscorable(reason)] * count


def _wait(selector: selectors.BaseSelector, deadline: float) -> None:
    if not selector.select(max(0.0, deadline - time.monotonic())):
        raise _TooLong


def _receive(descriptor: int, count: int, selector: selectors.BaseSelector, deadline: float) -> bytes:
    """Exactly so many bytes."""
    parts: list[bytes] = []
    while count:
        _wait(selector, deadline)
        part = os.read(descriptor, min(count, CHUNK_BYTES))
        if not part:
            raise _Gone
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
