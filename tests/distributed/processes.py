"""Several processes at one stage, forked from this warm one with torchrun's environment, and what became of each."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tests.toys import loaded, stage_inputs, tiny_model

from tunesmith.recipe import Stage
from tunesmith.rundir import RunDirectory, rank, read_events
from tunesmith.train.devices import of_first, process_group
from tunesmith.train.signals import StopRequest
from tunesmith.train.stage import run_stage

SECONDS = 120  # in which processes that work take more than
WORKING = 0.01  # of a processor, of a busy machine too; those that only wait for each other took up to 0.005
PATIENCE = 10  # times those seconds, at most


class Ended(NamedTuple):
    """How a process ended: its exit status, minus the signal where one killed it; and what its work gave, or the error's name."""

    status: int
    value: Any


def together(count: int, work: Callable[[], Any], folder: Path) -> list[Ended]:
    """Runs `work` in `count` processes; each gives plain JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(number, count, port, work, folder / f"{number}.json") for number in range(count)]
    statuses: dict[int, int] = {}
    began = looked = time.monotonic()
    spent = 0.0
    while len(statuses) < count:
        running = set(children) - statuses.keys()
        if time.monotonic() > looked + SECONDS:
            before, spent, looked = spent, sum(map(_processor_seconds, running)), time.monotonic()
            if 0 <= spent - before < WORKING * SECONDS or looked > began + PATIENCE * SECONDS:
                for child in running:
                    os.kill(child, signal.SIGKILL)
                raise AssertionError(f"{len(running)} of {count} processes hang")
        for child in running:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                statuses[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    said = [folder / f"{number}.json" for number in range(count)]
    return [Ended(statuses[c], json.loads(f.read_text()) if f.is_file() else None) for c, f in zip(children, said, strict=True)]


def _processor_seconds(process: int) -> float:
    """What a process and its threads have spent so far."""
    of_all = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(of_all[11]) + int(of_all[12])) / os.sysconf("SC_CLK_TCK")


def _fork(number: int, count: int, port: int, work: Callable[[], Any], answer: Path) -> int:
    answer.unlink(missing_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()})
        torch.set_num_threads(1)  # OpenMP's threads are not forked with this one, and what waits for them hangs
        with process_group():
            answer.write_text(json.dumps(work()))
        status = 0
    except BaseException as error:
        answer.write_text(json.dumps(f"{type(error).__name__}: {error}"))
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def values(ended: list[Ended]) -> list[Any]:
    """What each gave, if all ended well."""
    assert [one.status for one in ended] == [0] * len(ended), ended
    return [one.value for one in ended]


class Trained(NamedTuple):
    """A stage's run: each step's line, the evaluations' losses, and the folder."""

    lines: list[dict[str, Any]]
    evaluated: list[float]
    path: Path

    @property
    def losses(self) -> list[float]:
        """Of each update."""
        return [line["loss"] for line in self.lines]

    @property
    def norms(self) -> list[float]:
        """Of each update's gradient: AdamW itself would not tell a mean over processes from a sum."""
        return [line["grad_norm"] for line in self.lines]


def train(count: int, stage: Stage, path: Path, rows: Any, *, processes: int = 2, **given: Any) -> Trained:
    """A stage in a run directory of its own, by as many processes; `processes` share an update."""
    values(together(count, lambda: stage_of(stage, path, rows, processes=processes, **given), path.parent / f"{path.name}.said"))
    return trained(path)


def trained(path: Path) -> Trained:
    """What a run directory says."""
    events = read_events(path)
    return Trained([one for one in events if "loss" in one], [one["eval_loss"] for one in events if "eval_loss" in one], path)


def stage_of(stage: Stage, path: Path, rows: Any, *, report: Callable[[dict], None] = lambda event: None, **given: Any) -> None:
    """One process's part in a stage."""
    inputs = stage_inputs(loaded(tiny_model("llama")), rows, path.parent / f"stores{rank()}", **given)
    with StopRequest() as stop:
        opened = RunDirectory.open(path, resume=True) if rank() == 0 else None
        resumed = of_first(lambda: opened.resumed)
        with opened or RunDirectory.follow(path, resumed=resumed) as run:
            run_stage(stage, inputs, run, stop=stop, report=report)
