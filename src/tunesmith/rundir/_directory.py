"""The run directory: one writer, an event log that survives a kill, checkpoints newest first.

Takes a folder; gives `RunDirectory`, which holds its lock while it is open. docs/run-directory.md is the contract.
Nothing here depends on the order of times: checkpoints are ordered by the step in their name, events by their place in the log.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, NamedTuple

from tunesmith.errors import CheckpointError, OutputInUse, RecipeError

from ._events import EVENTS, bytes_of, event_line, event_lines, is_after, read_events
from ._lock import LOCK, give_back, refuse_locked, take_lock
from ._storage import (
    MANIFEST,
    atomic_folder,
    is_temporary,
    make_folder,
    remove_folder,
    storage,
    storage_failures,
    sweep,
    sync,
    verify_folder,
    write_bytes,
)
from ._writer import follow, is_writer, lead

RUN_MARKERS = frozenset({LOCK, "recipe.yaml", MANIFEST, EVENTS, "plan.json", "stages"})
_PREPARATION = frozenset({LOCK, "data", "recipe.yaml", MANIFEST, EVENTS, "plan.json"})  # what there is before a first step
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]*)")


class RefusedCheckpoint(NamedTuple):
    """A checkpoint that was not taken, and why."""

    path: Path
    reason: str


class RunDirectory:
    """A run's folder, written by this process alone until it is closed. `resumed` says whether it held a run when it was opened."""

    def __init__(self, path: Path, lock: int | None, *, resumed: bool):
        self.path = path
        self.resumed = resumed
        self._lock: int | None = lock
        self._log: int | None = None
        self._owner = os.getpid()
        self._verified: set[tuple[Path, int, int]] = set()

    @classmethod
    def open(cls, path: Path, *, resume: bool) -> RunDirectory:
        """Take a folder for a run: a missing one is made, one that is empty or whose run ended before its first step is taken with or
        without resume. Of such a run's files the log is dropped; the rest are written anew, or are rendered rows that say what of.

        Raises OutputInUse for a folder that holds a run (without resume), that holds anything else, or whose lock another process
        has, and StorageFailed.
        """
        path = Path(path).absolute()
        refuse_in_use(path, resume=resume)
        make_folder(path)
        held = _holds_run(path)  # a lock that lies there is an earlier run's; all is asked again below: another process may have begun one
        lock = take_lock(path)
        try:
            _refuse_content(path, resume=resume)
            run = cls(path, lock, resumed=held or _holds_run(path))
            sweep(path)
            if run.resumed:
                run._drop_torn_line()
            elif (path / EVENTS).exists():
                with storage_failures(path / EVENTS):
                    storage.unlink(path / EVENTS)
            return run
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def follow(cls, path: Path, *, resumed: bool) -> RunDirectory:
        """The folder that another process has opened for the run that both are of: here it is only read, until it is closed."""
        follow(Path(path).absolute())
        return cls(Path(path).absolute(), None, resumed=resumed)

    def close(self) -> None:
        """Give the lock back. The lock's file stays, empty: removing it would let two processes hold two files of one name."""
        lead(self.path)
        if self._log is not None:
            os.close(self._log)
            self._log = None
        if self._lock is not None:
            if self._owner == os.getpid():
                give_back(self._lock)
            else:  # a fork's copy of the descriptor: the note in the file is the holder's
                os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def file(self, rel: str) -> Path:
        """The path of a file or folder of the run. Raises RecipeError when it would lie outside, by its name or by a link."""
        parts = PurePosixPath(rel).parts
        if not parts or "\0" in rel or ".." in parts or parts[0] == "/":
            raise RecipeError(f"{rel!r} is not a path inside the run directory", where=str(self.path), mend="use plain names")
        path = self.path.joinpath(*parts)
        try:
            inside = path.resolve().is_relative_to(self.path.resolve())
        except (OSError, RuntimeError):  # a loop of links
            inside = False
        if not inside:
            raise RecipeError(
                "a link leads out of the run directory",
                where=str(path),
                mend="put the folder itself there, or move the whole run directory with --out",
            )
        return path

    def log(self, event: Mapping[str, Any]) -> None:
        """Append {"time" (seconds since 1970), **event} as one line to events.jsonl, where it survives the end of this process.

        Numbers that are not finite are written as strings, as by `write_json`. Raises StorageFailed, with the log as it was before.
        """
        path = self.file(EVENTS)
        if not is_writer(path):
            return
        line = event_line(event)
        with storage_failures(path, len(line)):
            if self._log is None:
                self._log = storage.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            size = os.fstat(self._log).st_size
            try:
                storage.write(self._log, line)
            except OSError:
                with contextlib.suppress(OSError):  # the first error is the one to report; a torn line is dropped on resume
                    storage.truncate(self._log, size)
                raise

    def sync(self) -> None:
        """Make the event log survive a power cut too; `checkpoint` does so, so that no step before a checkpoint lacks its line."""
        path = self.file(EVENTS)
        if self._log is not None:
            with storage_failures(path):
                storage.fsync(self._log, path)
                sync(self.path)

    def events(self) -> list[dict[str, Any]]:
        """The event log's lines, in order; a torn last one is left out. Raises CheckpointError for any other damaged line."""
        self.file(EVENTS)
        return read_events(self.path)

    def rewind(self, stage: str, step: int) -> None:
        """Go back to a step of a stage: its later log lines are dropped and {"event": "resumed"} added, in one step."""
        path = self.file(EVENTS)
        kept = [line for line, event in event_lines(bytes_of(path), path) if not is_after(event, stage, step)]
        kept.append(event_line({"event": "resumed", "stage": stage, "step": step}))
        self._replace_log(b"".join(kept))

    @contextlib.contextmanager
    def checkpoint(self, stage: str, step: int) -> Iterator[Path]:
        """`atomic_folder` for stages/STAGE/checkpoints/step-N; the event log is on the disk before the checkpoint appears."""
        if step < 0:
            raise ValueError(f"step is {step}; it counts from 0")
        with atomic_folder(self._checkpoint_folder(stage) / f"step-{step}") as temporary:
            yield temporary
            self.sync()

    def checkpoints(self, stage: str) -> list[Path]:
        """The stage's checkpoints, the highest step first; whether they are valid is not looked at."""
        folder = self._checkpoint_folder(stage)
        if not folder.is_dir():
            return []
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and _STEP_NAME.fullmatch(entry.name)]
        return [folder / name for name in sorted(names, key=_step, reverse=True)]

    def newest_valid_checkpoint(self, stage: str) -> tuple[Path | None, list[RefusedCheckpoint]]:
        """The checkpoint of the highest step that is whole, and the higher ones that were refused, with the reason for each."""
        refused = []
        for path in self.checkpoints(stage):
            try:
                self._verify(path)
            except CheckpointError as error:
                refused.append(RefusedCheckpoint(path, error.what))
            else:
                return path, refused
        return None, refused

    def prune_checkpoints(self, stage: str, keep: int, best: Path | None) -> None:
        """Remove all but the `keep` newest valid checkpoints and `best`; nothing is removed while none is valid."""
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint stays")
        if not is_writer(self.path):
            return
        everything = self.checkpoints(stage)
        valid: list[Path] = []
        for path in everything:
            if len(valid) < keep:
                with contextlib.suppress(CheckpointError):
                    self._verify(path)
                    valid.append(path)
        for path in everything if valid else []:
            if path not in valid and (best is None or path.name != best.name):
                remove_folder(path)

    def _checkpoint_folder(self, stage: str) -> Path:
        if not _STAGE_NAME.fullmatch(stage):
            raise RecipeError(f"{stage!r} is not a stage's name", where=str(self.path), mend="use letters, digits, _ and -")
        return self.file(f"stages/{stage}/checkpoints")

    def _verify(self, path: Path) -> None:
        """`verify_folder`, once for each checkpoint as it was put in place."""
        try:
            status = (path / MANIFEST).stat()
        except OSError:
            verify_folder(path)
            return
        key = (path, status.st_ino, status.st_mtime_ns)
        if key not in self._verified:
            verify_folder(path)
            self._verified.add(key)

    def _drop_torn_line(self) -> None:
        path = self.file(EVENTS)
        raw = bytes_of(path)
        whole = b"".join(line for line, _ in event_lines(raw, path))
        if whole != raw:
            self._replace_log(whole)

    def _replace_log(self, content: bytes) -> None:
        write_bytes(self.file(EVENTS), content)
        if self._log is not None:  # it is open on the file that was replaced
            os.close(self._log)
            self._log = None


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _content(path: Path) -> set[str]:
    with storage_failures(path):
        return {name for name in os.listdir(path) if not is_temporary(name)}


def _holds_run(path: Path) -> bool:
    """Whether there is anything that a new run would lose: not where one was refused, or stopped, before its first step.

    A folder without a lock is a copy, or somebody's own.
    """
    content = _content(path)
    if LOCK in content and content <= _PREPARATION:
        return EVENTS in content and b'"step"' in bytes_of(path / EVENTS)
    return bool(content - {LOCK})


def refuse_in_use(path: Path, *, resume: bool) -> None:
    """Raises OutputInUse for a folder that holds a run (without resume) or anything else, or whose lock another process has; changes
    nothing, so it can be asked early."""
    path = Path(path).absolute()
    _refuse_foreign(path)
    refuse_locked(path)
    _refuse_content(path, resume=resume)


def _refuse_content(path: Path, *, resume: bool) -> None:
    _refuse_foreign(path)
    if not resume and path.is_dir() and _holds_run(path):
        raise OutputInUse(
            "the folder holds a run already",
            where=str(path),
            mend="add --resume to go on with it, or give another folder with --out",
        )


def _refuse_foreign(path: Path) -> None:
    """Refuse a path that is or leads through a file, and a folder that holds something which is no run; nothing is touched."""
    for place in (path, *path.parents):
        if os.path.lexists(place):
            if not os.path.isdir(place):
                raise OutputInUse("it is not a folder", where=str(place), mend="give another folder with --out")
            break
    if os.path.isdir(path):
        content = _content(path)
        if content and not content & RUN_MARKERS:
            raise OutputInUse(
                f"the folder holds {len(content)} files or folders that are not a run's, {min(content)} among them",
                where=str(path),
                mend="give a new or an empty folder with --out",
            )
