"""SIGTERM and SIGINT: while steps run they are answered at the step's end with a checkpoint; elsewhere they end the run at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType

from ..errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A context in which the two signals mean "stop cleanly". A second signal changes nothing: stopping is under way."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferring = False
        self._heard: Callable[[str], None] | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self, deferring: bool, heard: Callable[[str], None] | None = None) -> None:
        """While deferring, a signal is only noted: the loop asks `received` at the end of each step.

        heard: told the name of the first one when it comes, in a thread of its own, since a handler may not print amid a print.
        """
        self._deferring, self._heard = deferring, heard
        if not deferring and self.received is not None:
            self._stop()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        self.received = self.received or signal.Signals(number)
        if first and not self._deferring:
            self._stop()
        if first and self._heard is not None:
            with contextlib.suppress(RuntimeError):  # no more threads: then it is said at the step's end
                threading.Thread(target=self._heard, args=(self.received.name,), daemon=True).start()

    def _stop(self) -> None:
        name = self.received.name if self.received else "signal"
        raise Interrupted(f"stopped by {name}", mend="run the same command again (a run goes on with --resume)")
