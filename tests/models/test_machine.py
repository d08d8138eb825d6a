"""The machine is measured once and kept; how much memory it may give is the least of what is free and what its control groups leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tunesmith.errors import StorageFailed
from tunesmith.models import machine
from tunesmith.models.load import has_fast
from tunesmith.models.machine import Machine, measure_machine
from tunesmith.models.room import available_memory, control_group_room

SPEEDS = Machine(1e11, 5e10, 2e10, 1e10, 4e10, 1e-6, 1e9)


@pytest.fixture
def measured(tmp_path, monkeypatch) -> list[torch.dtype]:
    """The dtypes that were measured; each has the same speeds."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "SECONDS", 10.0)
    monkeypatch.setattr(machine, "BESIDE", 0.1)
    monkeypatch.setattr(machine, "_waited", lambda: 0.0)
    calls: list[torch.dtype] = []
    monkeypatch.setattr(machine, "_measure", lambda dtype, device, folder: calls.append(dtype) or SPEEDS)
    return calls


def test_the_machine_is_measured_once_for_each_dtype_and_number_of_threads_and_kept(measured, tmp_path):
    told: list[str] = []
    assert measure_machine(torch.float32, announce=told.append) == measure_machine(torch.float32, announce=told.append) == SPEEDS
    assert measured == [torch.float32]
    assert told == ["measuring this machine's speed for the plan, about 10 s"]
    measure_machine(torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        measure_machine(torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert measured == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert len(json.loads((tmp_path / "machine.json").read_text())) == 3


def test_a_torn_note_of_the_machine_or_an_older_one_is_measured_anew(measured, tmp_path):
    measure_machine(torch.float32)
    (name,) = json.loads((tmp_path / "machine.json").read_text())
    for torn in ('{"x', "[]", '{"x": 1}', json.dumps({name: {"flops_per_second": 1.0}})):
        (tmp_path / "machine.json").write_text(torn)
        assert measure_machine(torch.float32) == SPEEDS
    assert len(measured) == 5


def test_what_was_measured_beside_other_work_is_said_to_be_slow_and_not_kept(measured, tmp_path, monkeypatch):
    waited, told = iter([0.0, 3600.0, 3600.0, 3600.0]), []
    monkeypatch.setattr(machine, "_waited", lambda: next(waited))
    assert measure_machine(torch.float32, announce=told.append) == SPEEDS
    assert "no processor was free" in told[1]
    assert not (tmp_path / "machine.json").exists()
    measure_machine(torch.float32)
    measure_machine(torch.float32)
    assert len(measured) == 2
    assert (tmp_path / "machine.json").exists()


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="this system does not count how long a thread waits")
def test_a_thread_that_shares_its_processor_has_waited_for_it(monkeypatch):
    """Two processes more on the one processor that this one may use."""
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(ours)})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        before, began = machine._waited(), time.process_time()
        while time.process_time() - began < 0.3:
            pass
        assert machine._waited() - before > 0.15
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert machine._waited() == 0, "more threads than processors wait for each other"
    finally:
        os.sched_setaffinity(0, ours)
        for process in busy:
            process.kill()
            process.wait()


def test_the_measured_speeds_are_those_of_a_computer(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "SECONDS", 0.5)
    found = asdict(measure_machine(torch.float32))
    assert 1e-9 <= found.pop("call_seconds") < 1e-2
    assert all(1e6 < speed < 1e15 for speed in found.values()), found
    assert {file.name for file in tmp_path.iterdir()} <= {"machine.json"}


def test_two_runs_measure_one_storage_at_once(tmp_path, monkeypatch):
    def flush(descriptor):
        for file in tmp_path.iterdir():  # as the other run takes away what it wrote
            file.unlink()

    monkeypatch.setattr(machine, "STORED", 1000)
    monkeypatch.setattr(os, "fsync", flush)
    assert machine._storage(tmp_path) > 0


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match="cannot"):
        machine._storage(tmp_path / "file" / "cache")


def test_a_speed_is_taken_by_the_clock_whatever_the_threads_do_meanwhile():
    taken = machine._usual(lambda: time.sleep(0.002), torch.device("cpu"), 0.1)
    assert taken >= 0.002


@pytest.mark.parametrize("odd", [0.01, 10.0], ids=["one trial is quick", "one trial is slow"])
def test_a_speed_is_the_usual_one_neither_the_best_nor_the_worst(odd, monkeypatch):
    """A clock that only the work moves on: a second a call, but for one call."""
    now, calls = [0.0], []

    def work() -> None:
        calls.append(1)
        now[0] += odd if len(calls) == 4 else 1.0

    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(machine.time, "monotonic", lambda: now[0])
    assert machine._usual(work, torch.device("cpu"), 20.0) == 1.0


def test_available_memory_is_positive_and_no_more_than_the_machine_has():
    assert 0 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def group(folder: Path, limit: str, held: int, droppable: int, *, version: int) -> None:
    """A control group's files."""
    names = [("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), ("memory.max", "memory.current", "inactive_file")]
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names[version - 1], (limit, held), strict=False):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[version - 1][2]} {droppable}\n")


@pytest.mark.parametrize("version, below, line", [(2, "", "0::/a/b"), (1, "memory", "4:cpu,memory:/a/b")])
def test_the_least_room_of_a_control_group_and_those_that_hold_it_counts(version, below, line, tmp_path):
    listing = tmp_path / "cgroup"
    listing.write_text(f"9:name=systemd:/elsewhere\n{line}\n")
    root = tmp_path / "sys"
    assert control_group_room(root, listing) == 1 << 62
    group(root / below / "a" / "b", "max" if version == 2 else str(2**63 - 4096), 10, 0, version=version)
    assert control_group_room(root, listing) == 1 << 62
    group(root / below / "a", str(3 * 2**30), 2**30, 2**28, version=version)
    assert control_group_room(root, listing) == 2 * 2**30 + 2**28
    group(root / below / "a" / "b", str(2**30), 2**29, 0, version=version)
    assert control_group_room(root, listing) == 2**29
    group(root / below / "a" / "b", str(2**30), 2**31, 0, version=version)
    assert control_group_room(root, listing) == 0


def test_in_a_container_whose_group_is_not_to_be_seen_the_mounts_own_limit_counts(tmp_path):
    listing = tmp_path / "cgroup"
    listing.write_text("0::/docker/0123\n")
    group(tmp_path / "sys", str(2**30), 2**28, 0, version=2)
    assert control_group_room(tmp_path / "sys", listing) == 2**30 - 2**28


@pytest.mark.parametrize(
    "flags, fast",
    [("fpu avx512_bf16 f16c", {"bfloat16"}), ("avx512_fp16 amx_bf16", {"bfloat16", "float16"}), ("asimdhp", {"float16"}), ("f16c", set())],
)
def test_a_processor_is_fast_in_the_half_dtypes_that_its_flags_name(flags, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags\t: {flags}\n")
    assert {name for name in ("float32", "bfloat16", "float16") if has_fast(getattr(torch, name))} == fast | {"float32"}
