"""Memory that is kept for the next step."""

from __future__ import annotations

import resource

import pytest
import torch
from tests.distributed.processes import together, values

from tunesmith.train.memory import keep_freed_memory

MIB = 2**20


@pytest.mark.parametrize("size", [1, 24, 56])
def test_a_freed_block_of_any_size_is_there_for_the_next_step(size, tmp_path):
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(size * MIB, dtype=torch.uint8).fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def work() -> list[int]:
        if not keep_freed_memory():
            return []
        return [faults() for _ in range(4)]

    (seen,) = values(together(1, work, tmp_path / "said"))
    if not seen:
        pytest.skip("this C library takes no such setting")
    pages = size * MIB // resource.getpagesize()
    assert seen[0] > pages / 2, "its first touch"
    assert seen[-1] < pages / 10
