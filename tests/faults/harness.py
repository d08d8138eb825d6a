"""Faults for the one object that writes: errors at the n-th call, a kill at the n-th call, a power cut before every call.

Takes nothing but `tunesmith.rundir.storage`, whose calls it replaces while `installed(double)` is entered, and forks children from this
(warm) process; gives what the child returned or how it died, and the folders that a power cut would have left.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.errors import TunesmithError
from tunesmith.rundir import Storage, storage

OPERATIONS = ("open", "write", "fsync", "truncate", "rename", "mkdir", "unlink", "rmtree")


class CountingStorage(Storage):
    """Counts its calls; `before` runs before each, and may raise or not return, `after` after it.

    fsync is counted and not done: no test takes the real power away, and waiting for the disk is most of the time.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before(self, operation: str, arguments: tuple[Any, ...]) -> None:
        """Nothing: counting is all."""

    def after(self, operation: str, arguments: tuple[Any, ...]) -> None:
        """Nothing: counting is all."""


def _counted(operation: str) -> Callable[..., Any]:
    original = getattr(Storage, operation)

    def call(self: CountingStorage, *arguments: Any) -> Any:
        self.calls.append(operation)
        self.before(operation, arguments)
        result = None if operation == "fsync" else original(self, *arguments)
        self.after(operation, arguments)
        return result

    return call


for _operation in OPERATIONS:
    setattr(CountingStorage, _operation, _counted(_operation))


@contextlib.contextmanager
def installed(double: Storage) -> Iterator[Any]:
    """Let every call to `tunesmith.rundir.storage` go to the double, whoever holds the object."""
    for operation in OPERATIONS:
        setattr(storage, operation, getattr(double, operation))
    try:
        yield double
    finally:
        for operation in OPERATIONS:
            delattr(storage, operation)


class FailingStorage(CountingStorage):
    """Raises OSError(error) at the n-th call of an operation (of any: None), in the call's middle where it has one; counts from 1."""

    def __init__(self, error: int, *, operation: str | None = None, at_call: int = 1):
        super().__init__()
        self.error, self.operation, self.at_call = error, operation, at_call

    def before(self, operation: str, arguments: tuple[Any, ...]) -> None:
        if self.operation in (None, operation):
            self.at_call -= 1
            if self.at_call == 0:
                _do_half(operation, arguments)
                raise OSError(self.error, os.strerror(self.error))


class KillingStorage(CountingStorage):
    """Kills this process with SIGKILL at the n-th call (from 1), in the call's middle where it has one; for children only."""

    def __init__(self, at_call: int):
        super().__init__()
        self.at_call = at_call

    def before(self, operation: str, arguments: tuple[Any, ...]) -> None:
        if len(self.calls) == self.at_call:
            _do_half(operation, arguments)
            os.kill(os.getpid(), signal.SIGKILL)


def _do_half(operation: str, arguments: tuple[Any, ...]) -> None:
    """The part of a call that is done when the fault comes in its middle: half of the bytes, the first of a folder's files."""
    if operation == "write":
        descriptor, data = arguments
        os.write(descriptor, data[: len(data) // 2])
    elif operation == "rmtree":
        for file in sorted(path for path in arguments[0].rglob("*") if path.is_file())[:1]:
            file.unlink()


class Cut(NamedTuple):
    """What one power cut left: after how many calls, under which of the two extremes, where, and what `note` said then."""

    calls: int
    mode: str
    folder: Path
    note: Any


class PowerCutStorage(CountingStorage):
    """Records what fsync has put on the disk below `root`, and before each call writes into `out` what a power cut would leave.

    A file has the bytes of its last fsync, none if there was none. Of names, POSIX promises only those of a folder's last fsync: the
    two extremes are kept, "lazy" (nothing else survives: renames, new and removed names are undone) and "eager" (every change of a
    name survives at once). What lies under `root` at the start is on the disk. `note` is called at each cut.
    """

    def __init__(self, root: Path, out: Path, note: Callable[[], Any]):
        super().__init__()
        self.root, self.out, self.note = root, out, note
        self.cuts: list[Cut] = []
        self._data: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._held: dict[int, int] = {}
        for folder, _, files in os.walk(root):
            self._record(Path(folder))
            for name in files:
                self._record(Path(folder, name))

    def before(self, operation: str, arguments: tuple[Any, ...]) -> None:
        self.cut()

    def after(self, operation: str, arguments: tuple[Any, ...]) -> None:
        if operation == "fsync":
            self._record(arguments[1])

    def cut(self) -> None:
        """The power goes now: write down what is left."""
        calls = len(self.cuts) // 2
        for mode in ("lazy", "eager"):
            folder = self.out / f"{calls}-{mode}"
            folder.mkdir(parents=True)
            if mode == "lazy":
                self._write_lazy(os.stat(self.root).st_ino, folder)
            else:
                self._write_eager(self.root, folder)
            self.cuts.append(Cut(calls, mode, folder, self.note()))

    def close(self) -> None:
        """Let go of the inodes."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    def _record(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        status = os.fstat(descriptor)
        inode = status.st_ino
        if inode in self._held:
            os.close(descriptor)
        else:
            self._held[inode] = descriptor  # an open inode's number is not given to another file
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(path) as entries:
                self._names[inode] = {entry.name: entry.inode() for entry in entries}
        else:
            self._data[inode] = path.read_bytes()

    def _write_lazy(self, folder_inode: int, target: Path) -> None:
        for name, inode in self._names.get(folder_inode, {}).items():
            if inode in self._names:
                (target / name).mkdir()
                self._write_lazy(inode, target / name)
            else:
                (target / name).write_bytes(self._data.get(inode, b""))

    def _write_eager(self, folder: Path, target: Path) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    (target / entry.name).mkdir()
                    self._write_eager(Path(entry.path), target / entry.name)
                else:
                    (target / entry.name).write_bytes(self._data.get(entry.inode(), b""))


class Ended(NamedTuple):
    """How a child ended: its exit status (None if a signal ended it), the signal, and what its function returned (JSON)."""

    status: int | None
    signal: int | None
    result: Any


class Child:
    """A forked child that runs one function; a named error ends it with the error's exit status and {"error", "text"} as result."""

    def __init__(self, function: Callable[[], Any]):
        self.result_pipe, write = os.pipe()  # readable once the child has ended
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
            self.pid = os.fork()
        if self.pid == 0:
            _run_and_exit(function, write)
        os.close(write)

    def wait(self) -> Ended:
        """Wait for the child's end."""
        with os.fdopen(self.result_pipe, "rb") as pipe:
            told = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        result = json.loads(told) if told else None
        return Ended(None, -code, result) if code < 0 else Ended(code, None, result)


def in_child(function: Callable[[], Any]) -> Ended:
    """Run a function in a forked child and wait for its end."""
    return Child(function).wait()


def _run_and_exit(function: Callable[[], Any], write: int) -> None:
    status = 1
    try:
        try:
            result, status = function(), 0
        except TunesmithError as error:
            result, status = {"error": type(error).__name__, "text": str(error)}, error.exit_status
        os.write(write, json.dumps(result).encode())
    except BaseException:  # the child must not go on as a second test runner
        status = 1
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(status)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path, locks apart: what two runs must have in common."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def copy_of(folder: Path, target: Path) -> Path:
    """A copy of a folder."""
    shutil.copytree(folder, target, symlinks=True)
    return target
