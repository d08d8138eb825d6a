"""What this machine really does: a measurement of some ten seconds, kept in the cache folder for next time.

    machine = measure_machine(torch.float32)    # at once where it was measured before

Each speed is the median of many short trials, by the clock: threads that wait for each other take processor time and do nothing with it,
and a run of minutes gets what is usual, not what is best.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..rundir import storage_failures, write_json
from .load import cache_folder

SECONDS = 10.0  # of the whole measurement
TRIAL = 0.02  # seconds of one trial, of which the median counts, so that another program's short work counts little
PRODUCTS = ((1024, 576, 1536), (512, 2048, 2048), (2048, 576, 576))  # rows, inputs, outputs: what layers of small models compute
TAKEN = "medians by the clock, alone"  # how speeds are measured: what was measured otherwise is not used
LAYER = (1536, 576)  # outputs, inputs of one of the weights that a decoding step reads
STREAMED, CACHED = 1 << 25, 1 << 20  # numbers: more than any cache holds, and about one layer's activations
STORED = 1 << 26  # bytes written to measure the storage
BESIDE = 0.1  # share of the time waited for a processor, above which speeds are not kept: they are also another program's doing


@dataclass(frozen=True)
class Machine:
    """Speeds in one dtype with the present threads."""

    flops_per_second: float
    """Matrix products of many rows, as in training."""
    weight_bytes_per_second: float
    """Weights that a product with one row reads from memory, as a decoding step does."""
    attention_flops_per_second: float
    """Causal attention within short segments."""
    bytes_per_second: float
    """Read and written by elementwise work on what no cache holds."""
    cached_bytes_per_second: float
    """The same on as much as one layer's activations."""
    call_seconds: float
    """One operation on next to nothing."""
    storage_bytes_per_second: float
    """Written to the disk for good, and hashed."""


def measure_machine(dtype: torch.dtype, *, announce: Callable[[str], None] = lambda text: None) -> Machine:
    """The machine's speeds in this dtype and with the present threads, kept unless this process had to wait for a processor meanwhile.

    announce: told before it is measured anew, and why it is not kept. Raises StorageFailed where the cache folder cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path, name = cache_folder() / "machine.json", machine_name(dtype, device)
    known = _known_machines(path)
    if set(known.get(name, ())) != {field.name for field in fields(Machine)}:
        announce(f"measuring this machine's speed for the plan, about {SECONDS:.0f} s")
        waited, began = _waited(), time.perf_counter()
        known[name] = asdict(_measure(dtype, device, path.parent))
        if (share := (_waited() - waited) / (time.perf_counter() - began)) > BESIDE:
            announce(f"{min(share, 1):.0%} of that time no processor was free: the plan holds beside such work, the next measures again")
        else:
            write_json(path, known)
    return Machine(**known[name])


def _waited() -> float:
    """Seconds that threads of this process were ready and had no processor, as Linux counts them; 0 where they are more than processors."""
    if not hasattr(os, "sched_getaffinity") or torch.get_num_threads() > len(os.sched_getaffinity(0)):
        return 0.0
    waited = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, IndexError, ValueError):  # it has ended, or the system does not count
            waited += int(thread.read_text().split()[1])
    return waited / 1e9


def machine_name(dtype: torch.dtype, device: torch.device) -> str:
    """What a measurement holds for: another processor, torch, number of threads or dtype is measured anew."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{_processor()}-{torch.get_num_threads()} threads"
    return f"{where}-{torch.__version__}-{str(dtype).removeprefix('torch.')}-{TAKEN}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _known_machines(path: Path) -> dict[str, dict[str, float]]:
    """What was measured before; nothing where the note is torn."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {name: speeds for name, speeds in known.items() if isinstance(speeds, dict)} if isinstance(known, dict) else {}


def _measure(dtype: torch.dtype, device: torch.device, folder: Path) -> Machine:
    """All speeds, each in its share of the time."""

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def rate(work: float, run: Callable[[], Any], share: float) -> float:
        return work / _usual(run, device, share * SECONDS)

    def product(rows: int, inputs: int, outputs: int, share: float) -> float:
        a, b = numbers(rows, inputs), numbers(outputs, inputs)
        return rate(2.0 * rows * inputs * outputs, lambda: torch.nn.functional.linear(a, b), share)

    with torch.inference_mode():
        q = numbers(1, 9, 128, 64)
        large, small, tiny, row = numbers(STREAMED), numbers(CACHED), numbers(1), numbers(1, LAYER[1])
        out, near = torch.empty_like(large), torch.empty_like(small)
        layers = large[: large.numel() // math.prod(LAYER) * math.prod(LAYER)].view(-1, *LAYER)
        attend = torch.nn.functional.scaled_dot_product_attention
        return Machine(
            flops_per_second=len(PRODUCTS) / sum(1 / product(*shape, 0.1) for shape in PRODUCTS),
            weight_bytes_per_second=rate(layers.nbytes, lambda: [torch.nn.functional.linear(row, layer) for layer in layers], 0.1),
            attention_flops_per_second=rate(4.0 * 9 * 128 * 128 * 64 / 2, lambda: attend(q, q, q, is_causal=True), 0.1),
            bytes_per_second=rate(3.0 * large.numel() * dtype.itemsize, lambda: torch.add(large, large, out=out), 0.2),
            cached_bytes_per_second=rate(3.0 * small.numel() * dtype.itemsize, lambda: torch.mul(small, small, out=near), 0.1),
            call_seconds=_usual(lambda: tiny.add_(1), device, 0.1 * SECONDS),
            storage_bytes_per_second=_storage(folder),
        )


def _usual(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of one call, by the median of the trials that fit in `seconds`."""

    def spent(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    end = time.monotonic() + seconds
    spent(1)  # the first call warms up
    trials = [spent(1)]
    calls = max(1, int(TRIAL / max(trials[0], 1e-7)))
    while time.monotonic() < end:
        trials.append(spent(calls) / calls)
    return max(median(trials), 1e-9)


def _storage(folder: Path) -> float:
    """Bytes a second written, flushed and hashed, as a checkpoint is; of three times the best. The file has no name that another run,
    which measures too, could take. Raises StorageFailed."""
    with storage_failures(folder):
        folder.mkdir(parents=True, exist_ok=True)
    content, best = bytes(STORED), 0.0
    for _ in range(3):
        with storage_failures(folder, STORED), tempfile.TemporaryFile(dir=folder) as file:
            began = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            hashlib.sha256(file.read())
            best = max(best, STORED / (time.perf_counter() - began))
    return best
