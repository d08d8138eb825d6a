"""Memory that is kept for the next update, and given back after the last."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.distributed.processes import together, values

from tunesmith.train.memory import keep_freed_memory, return_freed_memory

MIB = 2**20


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


@pytest.mark.parametrize("size", [1, 24, 56])
def test_a_freed_block_of_any_size_is_there_for_the_next_update(size, tmp_path):
    found = seen(lambda: [faults(size * MIB) for _ in range(4)], tmp_path)
    assert found[-1] < size * MIB / resource.getpagesize() / 10


def test_after_training_large_blocks_are_the_systems_again(tmp_path):
    def work() -> list[int]:
        torch.set_num_threads(1)
        kept = [faults(56 * MIB) for _ in range(2)]
        return_freed_memory()
        return kept + [faults(56 * MIB) for _ in range(3)]

    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.is_file() and "[always]" in huge.read_text():
        pytest.skip("pages are as large as blocks")
    found = seen(work, tmp_path)
    assert found[1] < 1000 < found[-1]
