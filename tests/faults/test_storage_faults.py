"""The fault plan for the writing package: kills, power cuts, disk errors, damage, two writers; and that each defence is
needed: with one taken out, the property it stands for no longer holds."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file
from tests.faults.checks import (
    CHECKS,
    STAGE,
    STEPS,
    assert_complete_or_absent,
    check_lock,
    fill,
    flipped,
    kill_while,
    leftovers,
    started,
    steps_logged,
    train,
)
from tests.faults.harness import CountingStorage, FailingStorage, copy_of, in_child, installed, tree

from tunesmith.errors import CheckpointError, StorageFailed
from tunesmith.rundir import RunDirectory, _directory, _storage, atomic_folder, storage, verify_folder, write_json

TWO_PROCESSES = "two processes in one run folder; a stale lock"


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_lost_under(check, tmp_path):
    CHECKS[check](tmp_path)


def test_of_four_processes_at_once_one_gets_the_run_directory(fault, tmp_path):
    for _ in fault(TWO_PROCESSES).drawn(short=1, whole=10):
        check_lock(tmp_path)


def test_a_run_killed_at_any_call_of_its_first_minute_goes_on_unaided(tmp_path):
    with installed(CountingStorage()) as counting:
        train(tmp_path / "whole")
    for call in range(1, len(counting.calls) + 1):
        path = tmp_path / str(call)
        assert in_child(lambda path=path, call=call: kill_while(lambda: train(path), call)).signal == signal.SIGKILL
        train(path)
        assert steps_logged(path) == list(range(1, STEPS + 1))
        assert tree(path / "stages") == tree(tmp_path / "whole" / "stages")


def test_the_kills_and_cuts_reach_every_kind_of_call(tmp_path):
    base = started(tmp_path / "run")
    with installed(CountingStorage()) as counting:
        train(base)
    assert {"open", "write", "fsync", "rename", "mkdir", "rmtree"} <= set(counting.calls)
    assert len(counting.calls) >= 40


class WithoutFsync:
    """The storage, but fsync reaches only files, or only folders."""

    def __init__(self, *, of_folders: bool):
        self.of_folders = of_folders

    def __getattr__(self, name: str) -> object:
        return getattr(storage, name)

    def fsync(self, descriptor: int, path: Path) -> None:
        if path.is_dir() is not self.of_folders:
            storage.fsync(descriptor, path)


@contextlib.contextmanager
def folder_written_in_place(final: Path) -> Iterator[Path]:
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir(parents=True)
    yield final
    _storage._seal(final)


def file_written_in_place(path: Path, data: bytes) -> None:
    descriptor = storage.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    storage.write(descriptor, data)
    os.close(descriptor)


def without_fsync(monkeypatch: pytest.MonkeyPatch, *, of_folders: bool) -> None:
    for module in (_storage, _directory):
        monkeypatch.setattr(module, "storage", WithoutFsync(of_folders=of_folders))


def without_fsync_of_a_checkpoints_files(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _storage.sync
    monkeypatch.setattr(_storage, "sync", lambda path: original(path) if path.is_dir() else None)


def sweep_that_brings_nothing_back(path: Path) -> None:
    for aside in path.rglob(".replaced-*"):
        shutil.rmtree(aside)
    _storage.sweep(path)


# the defence: the check that must fail without it, how it is taken out, what the check then says
MUTATIONS = {
    "fsync of files": ("power cuts", lambda patch: without_fsync(patch, of_folders=False), "is lost|lacks lines"),
    "fsync of folders": ("power cuts", lambda patch: without_fsync(patch, of_folders=True), "is lost"),
    "fsync of a checkpoint's files": ("power cuts", without_fsync_of_a_checkpoints_files, "no valid checkpoint|is lost"),
    "fsync of the log": ("power cuts", lambda patch: patch.setattr(RunDirectory, "sync", lambda self: None), "lacks lines"),
    "rename of a folder": ("kills", lambda patch: patch.setattr(_directory, "atomic_folder", folder_written_in_place), "half a checkpoint"),
    "rename of a file": ("kills", lambda patch: patch.setattr(_directory, "write_bytes", file_written_in_place), "lacks lines"),
    "rename before removal": (
        "kills",
        lambda patch: patch.setattr(_directory, "remove_folder", lambda path: storage.rmtree(path)),
        "half a",
    ),
    "sweep": ("kills", lambda patch: patch.setattr(_directory, "sweep", lambda path: None), "is still there"),
    "bringing back": (
        "replacement",
        lambda patch: patch.setattr(_directory, "sweep", sweep_that_brings_nothing_back),
        "no valid checkpoint",
    ),
    "sha256": ("damage", lambda patch: patch.setattr(_storage, "_sha256", lambda path: "0" * 64), "bit 0: not detected"),
    "verification": ("damage", lambda patch: patch.setattr(_directory, "verify_folder", lambda path: None), "not detected"),
    "lock": ("lock", lambda patch: patch.setattr(fcntl, "flock", lambda descriptor, operation: None), "two processes"),
}


@pytest.mark.parametrize("defence", MUTATIONS)
def test_without_its_defence_a_property_no_longer_holds(defence, tmp_path, monkeypatch):
    check, remove, said = MUTATIONS[defence]
    remove(monkeypatch)
    with pytest.raises(AssertionError, match=said):
        CHECKS[check](tmp_path)


@pytest.mark.parametrize(
    ("error", "needed"),
    [(errno.ENOSPC, "free more than|free some space"), (errno.EROFS, "make .* writable"), (errno.EIO, "check the disk")],
    ids=["disk full", "read-only", "input/output error"],
)
def test_a_disk_error_at_any_call_names_what_is_needed_and_leaves_the_older_checkpoint(error, needed, tmp_path):
    base = started(tmp_path / "base")
    with installed(CountingStorage()) as counting:
        train(copy_of(base, tmp_path / "whole"))
    failures = []
    for call in range(1, len(counting.calls) + 1):
        path = copy_of(base, tmp_path / str(call))
        failures.append(failure_of(lambda path=path: train(path), FailingStorage(error, at_call=call)))
        assert_complete_or_absent(path)
        with RunDirectory.open(path, resume=True) as run:
            newest, damaged = run.newest_valid_checkpoint(STAGE)
            assert newest is not None
            assert not damaged
        train(path)
        assert steps_logged(path) == list(range(1, STEPS + 1))
        assert tree(path / "stages") == tree(tmp_path / "whole" / "stages")
    told = [failure for failure in failures if failure is not None]
    assert len(told) >= len(failures) - counting.calls.count("truncate")  # emptying the lock's note of our pid may fail unsaid
    assert {failure.exit_status for failure in told} == {1}
    assert [failure for failure in told if not re.search(needed, failure.mend)] == []
    assert [failure for failure in told if str(tmp_path) not in failure.where] == []


def failure_of(work: Callable[[], object], double: FailingStorage) -> StorageFailed | None:
    try:
        with installed(double):
            work()
    except StorageFailed as failure:
        return failure
    return None


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_an_event_that_the_disk_refuses_is_a_storage_failure_and_leaves_no_torn_line(error, tmp_path):
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        run.log({"step": 1})
        with installed(FailingStorage(error, operation="write")), pytest.raises(StorageFailed) as failure:
            run.log({"step": 2})
        assert failure.value.where.endswith("events.jsonl")
        run.log({"step": 3})
        assert [event["step"] for event in run.events()] == [1, 3]


def test_a_failed_fsync_of_a_file_keeps_what_was_there(tmp_path):
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        file = run.file("plan.json")
        write_json(file, {"old": 1})
        with installed(FailingStorage(errno.EIO, operation="fsync")), pytest.raises(StorageFailed):
            write_json(file, {"new": 2})
        assert json.loads(file.read_text()) == {"old": 1}
        assert not leftovers(run.path)


def test_a_file_system_that_really_refuses_is_a_storage_failure_also_through_safetensors(tmp_path):
    weights = {"w": numpy.zeros(200_000, dtype=numpy.float32)}

    def write(save: Callable[[Path], object]) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with RunDirectory.open(tmp_path / "run", resume=True) as run, run.checkpoint(STAGE, 1) as folder:
            save(folder / "w.safetensors")
        return "written"

    for save in (lambda file: save_file(weights, str(file)), lambda file: file.write_bytes(bytes(200_000))):
        ended = in_child(lambda save=save: write(save))
        assert (ended.status, ended.result["error"]) == (StorageFailed.exit_status, "StorageFailed"), ended
    with RunDirectory.open(tmp_path / "run", resume=True) as run:
        assert run.checkpoints(STAGE) == []
        assert not leftovers(run.path)


def test_every_single_bit_of_a_manifest_is_guarded(tmp_path):
    folder = tmp_path / "whole"
    with atomic_folder(folder) as temporary:
        fill(temporary, 1)
    data = (folder / "manifest.json").read_bytes()
    verify_folder(folder)
    for bit in range(len(data) * 8):
        (folder / "manifest.json").write_bytes(flipped(data, bit))
        with pytest.raises(CheckpointError):
            verify_folder(folder)


def test_a_process_killed_while_it_holds_the_lock_leaves_a_stale_lock_that_stops_nobody(fault, tmp_path):
    def hold_and_die() -> None:
        RunDirectory.open(tmp_path / "run", resume=True)
        os.kill(os.getpid(), signal.SIGKILL)

    for _ in fault(TWO_PROCESSES).drawn(short=1, whole=10):
        assert in_child(hold_and_die).signal == signal.SIGKILL
        assert (tmp_path / "run" / ".lock").read_text()
        with RunDirectory.open(tmp_path / "run", resume=True) as run:
            run.log({"step": 1})


@pytest.mark.parametrize("jump", [-86_400, 86_400])
def test_a_clock_that_jumps_a_day_changes_nothing_but_the_times_written(jump, tmp_path, monkeypatch):
    train(tmp_path / "steady")
    train(tmp_path / "jumping", until=1)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    for path in (tmp_path / "jumping").rglob("*"):
        os.utime(path, (0, now() - jump))
    assert train(tmp_path / "jumping") == 1
    assert tree(tmp_path / "jumping" / "stages") == tree(tmp_path / "steady" / "stages")
    assert steps_logged(tmp_path / "jumping") == [1, 2, 3]
