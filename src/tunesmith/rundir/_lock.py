"""A folder's one writer: a lock that lasts as long as the process that holds it, however that ends.

>>> import tempfile, pathlib
>>> with tempfile.TemporaryDirectory() as folder, sole_writer(pathlib.Path(folder) / "export") as mine:
...     (mine / LOCK).is_file()
True
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputInUse
from ._events import bytes_of
from ._storage import make_folder, storage, storage_failures, sweep

LOCK = ".lock"
_HOLDER_PATIENCE = 1.0  # seconds in which the lock's holder must have written its pid, which it does at once
_HOLDER_POLL = 0.02  # seconds


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[Path]:
    """Be a folder's one writer, which is made if it is missing: what killed ones left in it goes. Raises OutputInUse and StorageFailed."""
    make_folder(path)
    lock = take_lock(path)
    try:
        sweep(path)
        yield path
    finally:
        give_back(lock)


def take_lock(path: Path) -> int:
    """Lock the folder for as long as the descriptor stays open, which ends with the process however that ends."""
    file = path / LOCK
    with storage_failures(file):
        descriptor = storage.open(file, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            storage.truncate(descriptor, 0)
            storage.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
        except BlockingIOError:
            os.close(descriptor)
            raise _in_use(path) from None
        except OSError:
            os.close(descriptor)
            raise
    return descriptor


def give_back(lock: int) -> None:
    """The lock's file stays, empty: removing it would let two processes hold two files of one name."""
    with contextlib.suppress(OSError):  # only the note of our pid; the lock itself goes with the descriptor
        storage.truncate(lock, 0)
    os.close(lock)


def refuse_locked(path: Path) -> None:
    """Raises OutputInUse where another process holds the lock of a folder that is there."""
    file = path / LOCK
    with storage_failures(file):
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(path) from None
        finally:
            os.close(descriptor)  # gives the lock back


def _in_use(path: Path) -> OutputInUse:
    return OutputInUse(
        f"{_holder(path / LOCK)} is writing to this folder",
        where=str(path),
        mend="wait for it to end or stop it, or give another folder with --out",
    )


def _holder(file: Path) -> str:
    """Who has the lock. A pid left by a killed process may stand there until the new holder has written its own."""
    deadline = time.monotonic() + _HOLDER_PATIENCE
    while time.monotonic() < deadline:
        pid, _, host = bytes_of(file).decode("utf-8", "replace").strip().partition(" ")
        if pid.isdecimal() and host and host != socket.gethostname():
            return f"another process (pid {pid} on {host})"
        if pid.isdecimal() and _is_alive(int(pid)):
            return f"another process (pid {pid})"
        time.sleep(_HOLDER_POLL)
    return "another process"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
