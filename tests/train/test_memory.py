"""Memory that is kept for the next update, and given back after the last."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from tests.distributed.processes import together, values

from tunesmith.train.memory import keep_freed_memory, return_freed_memory

MIB = 2**20
C = ctypes.CDLL(None)
C.malloc.argtypes, C.malloc.restype, C.free.argtypes, C.free.restype = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p], None


def faults(size: int) -> int:
    """Pages that the system brings in while a new block is filled."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(size, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def seen(work: Callable[[], list[int]], folder: Path) -> list[int]:
    """What a process of its own counts, its C library's settings being its own."""

    def keeping() -> list[int]:
        return work() if keep_freed_memory() else []

    (found,) = values(together(1, keeping, folder / "said"))
    if not found:
        pytest.skip("this C library takes no such setting")
    return found


UPDATES, FIRST = (
    40,
    10,
)  # glibc keeps up to seven of an aligned block's margins for small blocks: so many may lack the room to be used again


def fresh(found: list[int], size: int) -> int:
    """How many updates had a tenth or more of their block brought in anew."""
    return sum(pages >= size / resource.getpagesize() / 10 for pages in found)


@pytest.mark.parametrize("size", [1, 24, 56, 80])
def test_a_freed_block_of_any_size_is_there_for_the_next_update(size, tmp_path):
    found = seen(lambda: [faults(size * MIB) for _ in range(UPDATES)], tmp_path)
    assert fresh(found, size * MIB) <= FIRST
    assert fresh(found[-FIRST:], size * MIB) == 0


def heap_end() -> int:
    """Blocks that are mapped apart lie beyond it."""
    C.sbrk.argtypes, C.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    return cast(int, C.sbrk(0))


def test_large_blocks_are_on_the_heap_in_training_and_mapped_apart_afterwards(tmp_path):
    def work() -> list[int]:
        kept = torch.empty(56 * MIB, dtype=torch.uint8).data_ptr() < heap_end()
        return_freed_memory()
        return [kept, torch.empty(1024 * MIB, dtype=torch.uint8).data_ptr() < heap_end()]  # larger than any hole

    assert seen(work, tmp_path) == [True, False]


@pytest.mark.parametrize("again", [False, True])
def test_the_heaps_free_end_is_kept_in_training_and_given_back_afterwards(again, tmp_path):
    def work() -> list[int]:
        if again:
            return_freed_memory()
        for _ in range(2):
            blocks = [C.malloc(4 * MIB) for _ in range(100)]
            end = heap_end()
            for block in blocks:
                C.free(block)
        return [end - heap_end()]

    (fell,) = seen(work, tmp_path)
    assert fell > 100 * MIB if again else fell == 0
