"""What must hold of the writing package under each fault of the plan, as functions that raise AssertionError when it does not.

Each takes an empty folder to work in. They are run as they are, and again with one defence taken out, when they must fail.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.harness import Child, CountingStorage, KillingStorage, PowerCutStorage, copy_of, in_child, installed, tree

from tunesmith.errors import CheckpointError, OutputInUse
from tunesmith.rundir import RunDirectory, read_events, storage, verify_folder

STAGE = "sft"
STEPS = 3
REFUSED_WITHIN = 2  # seconds in which a second process must have ended


def fill(folder: Path, step: int) -> None:
    """A checkpoint's files as a library writes them: past `storage`, in a subfolder too."""
    (folder / "optimizer").mkdir()
    (folder / "optimizer" / "state.safetensors").write_bytes(bytes([step]) * 40)
    descriptor = storage.open(folder / "adapter.safetensors", os.O_WRONLY | os.O_CREAT)
    storage.write(descriptor, bytes([step]) * 64)
    os.close(descriptor)


def train(path: Path, *, until: int = STEPS, done: list[int] | None = None) -> int:
    """What a stage does with its run directory: resume at the newest valid checkpoint, then log, save and prune at each step."""
    with RunDirectory.open(path, resume=True) as run:
        newest, _ = run.newest_valid_checkpoint(STAGE)
        start = int(newest.name.removeprefix("step-")) if newest else 0
        run.rewind(STAGE, start)
        run.prune_checkpoints(STAGE, keep=1, best=None)  # a kill may have come between a checkpoint and its pruning
        for step in range(start + 1, until + 1):
            run.log({"stage": STAGE, "step": step, "loss": 1 / step})
            with run.checkpoint(STAGE, step) as folder:
                fill(folder, step)
            if done is not None:
                done.append(step)
            run.prune_checkpoints(STAGE, keep=1, best=None)
    return start


def started(path: Path) -> Path:
    """A run that was killed after step 2 was logged and before its checkpoint."""
    train(path, until=1)
    with RunDirectory.open(path, resume=True) as run:
        run.log({"stage": STAGE, "step": 2, "loss": 0.5})
    return path


def steps_logged(path: Path) -> list[int]:
    return [event["step"] for event in read_events(path) if "loss" in event]


def assert_complete_or_absent(path: Path) -> None:
    for checkpoint in sorted((path / "stages" / STAGE / "checkpoints").glob("step-*")):
        try:
            verify_folder(checkpoint)
        except CheckpointError as error:
            raise AssertionError(f"half a checkpoint is visible: {error}") from error


def leftovers(path: Path) -> list[str]:
    return [file.name for file in path.rglob(".*") if file.name != ".lock"]


def check_kills(folder: Path) -> int:
    """Killed at each call: what is visible is whole, one checkpoint at least is, and the next process ends as an unbroken run."""
    base = started(folder / "base")
    whole = copy_of(base, folder / "whole")
    with installed(CountingStorage()) as counting:
        train(whole)
    for call in range(1, len(counting.calls) + 1):
        path = copy_of(base, folder / f"kill-{call}")
        ended = in_child(lambda path=path, call=call: kill_while(lambda: train(path), call))
        assert ended.signal == signal.SIGKILL
        assert_complete_or_absent(path)
        with RunDirectory.open(path, resume=True) as run:
            newest, refused = run.newest_valid_checkpoint(STAGE)
            assert newest is not None, "no valid checkpoint is left"
            assert not refused
            assert not leftovers(path), "what the killed writer left is still there"
        train(path)
        assert steps_logged(path) == list(range(1, STEPS + 1)), "the log lacks lines"
        assert tree(path / "stages") == tree(whole / "stages")
    return len(counting.calls)


def kill_while(work: Callable[[], object], call: int) -> None:
    with installed(KillingStorage(call)):
        work()


def replace_only_checkpoint(path: Path) -> None:
    with RunDirectory.open(path, resume=True) as run, run.checkpoint(STAGE, 1) as folder:
        fill(folder, 9)


def check_replacement(folder: Path) -> int:
    """Killed, or the power cut, at each call while the only checkpoint is written anew: the old or the new one is there, whole."""
    base = folder / "base"
    train(base, until=1)
    whole = copy_of(base, folder / "whole")
    double = PowerCutStorage(whole, folder / "cuts", note=lambda: None)
    with contextlib.closing(double), installed(double):
        replace_only_checkpoint(whole)
        double.cut()
    left = [cut.folder for cut in double.cuts]
    for call in range(1, len(double.calls) + 1):
        left.append(copy_of(base, folder / f"kill-{call}"))
        ended = in_child(lambda path=left[-1], call=call: kill_while(lambda: replace_only_checkpoint(path), call))
        assert ended.signal == signal.SIGKILL
        assert_complete_or_absent(left[-1])
    for path in left:
        with installed(CountingStorage()), RunDirectory.open(path, resume=True) as run:
            newest, _ = run.newest_valid_checkpoint(STAGE)
        assert newest is not None, "no valid checkpoint is left"
        assert tree(path / "stages") in (tree(base / "stages"), tree(whole / "stages")), "neither the old nor the new checkpoint"
    assert tree(double.cuts[-1].folder / "stages") == tree(whole / "stages"), "a checkpoint that was done is lost"
    assert tree(double.cuts[-2].folder / "stages") == tree(whole / "stages"), "a checkpoint that was done is lost"
    return len(left)


def check_power_cuts(folder: Path) -> int:
    """The power goes before each call and after the last: each checkpoint that was done is there, with the log up to it."""
    base = started(folder / "base")
    done = [1]
    double = PowerCutStorage(base, folder / "cuts", note=lambda: list(done))
    with contextlib.closing(double), installed(double):
        train(base, done=done)
        double.cut()
    for cut in double.cuts:
        with installed(CountingStorage()), RunDirectory.open(cut.folder, resume=True) as run:
            newest, _ = run.newest_valid_checkpoint(STAGE)
        assert newest is not None, f"no valid checkpoint is left ({cut.mode}, after {cut.calls} calls)"
        step = int(newest.name.removeprefix("step-"))
        assert step >= max(cut.note), f"a checkpoint that was done is lost ({cut.mode}, after {cut.calls} calls)"
        with installed(CountingStorage()):
            train(cut.folder)
        assert steps_logged(cut.folder) == list(range(1, STEPS + 1)), f"the log lacks lines ({cut.mode}, after {cut.calls} calls)"
    return len(double.cuts)


def damages(checkpoint: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Each file of a checkpoint deleted, truncated, emptied, lengthened, one bit flipped (at both ends and in between), and one added."""
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        name, data = file.relative_to(checkpoint), file.read_bytes()
        yield f"{name} deleted", lambda path, name=name: (path / name).unlink()
        for what, altered in (("truncated", data[:-1]), ("emptied", b""), ("lengthened", data + b"\n")):
            yield f"{name} {what}", lambda path, name=name, altered=altered: (path / name).write_bytes(altered)
        for bit in (0, len(data) * 4 + 3, len(data) * 8 - 1):
            altered = flipped(data, bit)
            yield f"{name} bit {bit}", lambda path, name=name, altered=altered: (path / name).write_bytes(altered)
        yield f"{name} made a link", lambda path, name=name: make_a_link(path / name)
    yield "a file added", lambda path: (path / "pytorch_model.bin").write_bytes(b"x")


def make_a_link(file: Path) -> None:
    outside = file.rename(file.parents[4] / "outside")
    file.symlink_to(outside)


def flipped(data: bytes, bit: int) -> bytes:
    altered = bytearray(data)
    altered[bit // 8] ^= 1 << bit % 8
    return bytes(altered)


def check_damage(folder: Path) -> int:
    """Every damage to the newest checkpoint is found, named, and the older one taken."""
    base = folder / "base"
    with RunDirectory.open(base, resume=False) as run:
        for step in (1, 2):
            with run.checkpoint(STAGE, step) as temporary:
                fill(temporary, step)
    kinds = list(damages(base / "stages" / STAGE / "checkpoints" / "step-2"))
    for number, (what, damage) in enumerate(kinds):
        path = copy_of(base, folder / str(number))
        damage(path / "stages" / STAGE / "checkpoints" / "step-2")
        with RunDirectory.open(path, resume=True) as run:
            newest, refused = run.newest_valid_checkpoint(STAGE)
        assert newest == path / "stages" / STAGE / "checkpoints" / "step-1", f"{what}: not detected"
        assert [entry.path.name for entry in refused] == ["step-2"]
        assert refused[0].reason
    return len(kinds)


def check_lock(folder: Path) -> None:
    """Of four processes that want one run directory at once, one gets it; the others end while it still holds it, and name it."""
    go_read, go_write = os.pipe()
    end_read, end_write = os.pipe()
    told_read, told_write = os.pipe()

    def compete() -> str:
        os.close(go_write)
        os.close(end_write)
        os.read(go_read, 1)  # returns when the parent closes its end: all start together
        with RunDirectory.open(folder / "run", resume=True):
            os.write(told_write, b"%d\n" % os.getpid())
            os.read(end_read, 1)
        return "ran"

    children = [Child(compete) for _ in range(4)]
    for descriptor in (go_read, end_read, told_write, go_write):
        os.close(descriptor)
    began = time.monotonic()
    try:
        winners = os.read(told_read, 100).split()
        assert len(winners) == 1, "two processes write to one run directory"
        winner = int(winners[0])
        for child in children:
            if child.pid != winner:
                readable, _, _ = select.select([told_read, child.result_pipe], [], [])
                assert told_read not in readable, "two processes write to one run directory"
        assert time.monotonic() - began < REFUSED_WITHIN, "the others wait"
    finally:
        os.close(end_write)
        endings = {child.pid: child.wait() for child in children}
        os.close(told_read)
    assert endings.pop(winner).result == "ran"
    assert [ending.status for ending in endings.values()] == [OutputInUse.exit_status] * 3
    for ending in endings.values():
        assert ending.result["error"] == "OutputInUse"
        assert f"pid {winner})" in ending.result["text"]


CHECKS = {
    "kills": check_kills,
    "replacement": check_replacement,
    "power cuts": check_power_cuts,
    "damage": check_damage,
    "lock": check_lock,
}
