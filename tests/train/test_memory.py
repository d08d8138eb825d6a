"""Memory that is kept for the next update, and given back after the last."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.cli_tools import environment
from tests.distributed.processes import together, values

from tunesmith.train import memory
from tunesmith.train.memory import Holes, keep_freed_memory, return_freed_memory

MIB = 2**20
C = ctypes.CDLL(None)
C.malloc.argtypes, C.malloc.restype, C.free.argtypes, C.free.restype = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p], None


def faults(size: int) -> int:
    """Pages that the system brings in while a new block is filled."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(size, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has getrusage's figure alone")
def test_the_peak_of_a_process_is_its_own_and_not_that_of_the_program_that_started_it():
    large = torch.empty(1 << 30, dtype=torch.uint8).fill_(1)
    words = "from tunesmith.train.memory import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", words], env=environment(), capture_output=True, text=True, check=True)
    assert 50 * MIB < int(done.stdout) < large.nbytes
    del large


def seen(work: Callable[[], list[int]], folder: Path) -> list[int]:
    """What a process of its own counts, its C library's settings being its own."""

    def keeping() -> list[int]:
        return work() if keep_freed_memory() else []

    (found,) = values(together(1, keeping, folder / "said"))
    if not found:
        pytest.skip("this C library takes no such setting")
    return found


@pytest.mark.parametrize("size", [1, 24, 56, 80])
def test_a_freed_block_of_any_size_is_there_for_the_next_update(size, tmp_path):
    def filled() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = C.malloc(size * MIB)
        ctypes.memset(block, 1, size * MIB)
        C.free(block)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    found = seen(lambda: [filled() for _ in range(4)], tmp_path)
    assert max(found[1:]) < min(1000, size * MIB / resource.getpagesize() / 10)


UPDATES, LATER = 40, 10


@pytest.mark.parametrize("size", [1, 24, 56, 80])
def test_a_freed_tensors_block_is_there_for_later_updates(size, tmp_path):
    """Not for the very next: tensors are aligned; glibc keeps some margins for small blocks, and without them a block is too small."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.is_file() and "[always]" in huge.read_text():
        pytest.skip("pages are as large as blocks")
    found = seen(lambda: [faults(size * MIB) for _ in range(UPDATES)], tmp_path)
    assert max(found[-LATER:]) < size * MIB / resource.getpagesize() / 10


def is_on_heap(address: int) -> bool:
    """Whether a block lies on the heap, and was not mapped apart."""
    heaps = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")]
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in heaps)


def test_large_blocks_are_on_the_heap_in_training_and_mapped_apart_afterwards(tmp_path):
    def work() -> list[int]:
        kept = is_on_heap(torch.empty(56 * MIB, dtype=torch.uint8).data_ptr())
        return_freed_memory()
        return [kept, is_on_heap(torch.empty(1024 * MIB, dtype=torch.uint8).data_ptr())]  # larger than any hole

    assert seen(work, tmp_path) == [True, False]


@pytest.mark.parametrize("afterwards", [False, True])
def test_the_heaps_free_end_is_kept_in_training_and_given_back_afterwards(afterwards, tmp_path):
    C.sbrk.argtypes, C.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p

    def work() -> list[int]:
        if afterwards:
            return_freed_memory()
        blocks, begin, count = [0] * 4096, C.sbrk(0), 0
        while C.sbrk(0) < begin + 200 * MIB:  # holes are filled first
            blocks[count] = C.malloc(4 * MIB)
            count += 1
        end = C.sbrk(0)
        for block in blocks[:count]:
            C.free(block)
        return [end - C.sbrk(0)]

    (fell,) = seen(work, tmp_path)
    assert fell > 100 * MIB if afterwards else fell == 0


def test_holes_are_given_back_once_they_have_grown_and_a_larger_batch_is_no_hole(monkeypatch):
    given_back = []
    monkeypatch.setattr(memory, "_trim", lambda: given_back.append(1) is None)
    holes = Holes()
    held = {  # after each update, and whether what is free is given back then
        100: False,  # the first says what is usual
        102: False,
        104: True,
        103: False,  # without holes it takes 103: that is usual from now on
        106: False,
        107: True,
    }
    for megabytes, expected in held.items():
        before = len(given_back)
        monkeypatch.setattr(memory, "resident_bytes", lambda megabytes=megabytes: megabytes * MIB)
        holes.after_update()
        assert (len(given_back) > before) == expected, megabytes


def test_what_is_given_back_lies_between_what_is_held(tmp_path):
    def work() -> list[int]:
        blocks = [C.malloc(MIB) for _ in range(200)]
        for block in blocks:
            ctypes.memset(block, 1, MIB)
        for block in blocks[::2]:
            C.free(block)
        before = memory.resident_bytes()
        assert memory._trim()
        return [before - memory.resident_bytes()]

    (fell,) = seen(work, tmp_path)
    assert fell > 80 * MIB
