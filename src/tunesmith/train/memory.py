"""How much memory this process uses, keeping freed memory for the next step, and what is said when there is none."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ..errors import DoesNotFit

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # glibc's mallopt parameters
_NEVER = -1
_MAPPED, _LARGE = 65536, 1 << 25  # how many blocks may be mapped apart, and of what size on: glibc's own values, the largest
GROWN = 1.03  # times what an update holds that began without holes
_FREE_END = 2 * _LARGE  # of the heap, above which it is given back: what glibc makes of that size


def peak_memory_bytes() -> int:
    """The most memory held so far: of the GPU where there is one, else the process's resident set.

    Not getrusage's figure where the system has another: a child begins with what the program held that started it.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
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


def return_freed_memory() -> None:
    """Gives what nothing refers to any more back to the system, and has glibc do so with large blocks again, as before `keep_freed_memory`.

    To be called between phases whose blocks are of other sizes, where holes would stay.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # a C library without it
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_M_MMAP_MAX, _MAPPED)
        library.mallopt(_M_TRIM_THRESHOLD, _FREE_END)
        library.malloc_trim(0)


def keep_freed_memory() -> bool:
    """Tells glibc to keep blocks of any size that are freed from here on; returns whether the C library took it.

    Activations and gradients are otherwise page-faulted in anew each step. (A threshold of mapping blocks apart would not do: 32 MiB is its
    most, and the gradient of a head is larger.) To be called once the model and the optimiser stand.
    """
    return_freed_memory()
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


class Holes:
    """The heap's holes, which batches of ever other sizes leave between what is held; given back when they have grown.

    To give all back after each update would cost a tenth of it, since the next one faults its activations in anew.
    """

    def __init__(self) -> None:
        self.usual, self._given_back = 0, True

    def after_update(self) -> None:
        """Gives back what is free, where more than usual is held: what the largest update held that found no holes."""
        held = resident_bytes()
        if self._given_back:
            self.usual, self._given_back = max(self.usual, held), False
        elif held > GROWN * self.usual:
            self.give_back()

    def give_back(self) -> None:
        """Gives back what is free: also what an evaluation leaves, which is no update's."""
        self._given_back = _trim()


def _trim() -> bool:
    """Gives free memory back to the system, wherever it lies; whether the C library could."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


@contextmanager
def memory_may_run_out(stage: str) -> Iterator[None]:
    """Raises DoesNotFit in place of a device's or host's own error. Nothing is tried again smaller: the update would change unseen."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        raise DoesNotFit(
            f"memory ran out: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=f"stages.{stage}",
            mend="go on with --resume and gradient_checkpointing: true; or begin anew with a smaller per_device_train_batch_size and more "
            "gradient_accumulation_steps, which is the same update",
        ) from error
