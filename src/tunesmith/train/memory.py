"""How much memory this process uses, and keeping freed memory for the next step."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's mallopt parameters
_NEVER = 2**31 - 1  # bytes


def peak_memory_bytes() -> int:
    """The most memory held so far: of the GPU where there is one, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """The resident set now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def held_bytes() -> int:
    """What is held now: of the GPU where there is one, else the resident set."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident_bytes()


def keep_freed_memory() -> bool:
    """Returns what is free by now to the system, and tells glibc to keep large blocks that are freed from here on.

    Activations are otherwise page-faulted in anew each step. To be called once the model and the optimiser stand: the holes that loading
    leaves are of other sizes than a step's blocks and would stay empty. Returns whether the C library took it.
    """
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim(0)
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 25)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
