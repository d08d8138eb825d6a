"""What the benchmarks share: fresh child processes, interleaved; their processor time and peak memory; tables.

A benchmark is one file. Its parent imports neither torch nor transformers; each measured run is the same file called with `--child`, a
JSON specification on its command line and a JSON result as its last line on stdout.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

CHILD = "--child"


def run_child(file: str, spec: dict, *, threads: int, gpu: bool = False) -> dict:
    """Runs `file --child SPEC` in a process of its own with so many threads, on CPU unless `gpu`. Returns its last line, read as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
    source = str(Path(file).resolve().parents[1] / "src")
    environment["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, file, CHILD, json.dumps(spec)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{spec.get('system')} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def child_spec() -> dict | None:
    """In a child, what it is to do; else None."""
    return json.loads(sys.argv[2]) if sys.argv[1:2] == [CHILD] else None


def answer(result: dict) -> None:
    """In a child, gives the result to the parent."""
    print("\n" + json.dumps(result), flush=True)


def peak_bytes() -> int:
    """The most memory this process has held, nothing subtracted: not getrusage's figure, which a child inherits from its parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Stopwatch:
    """Seconds between the end of the warm-up and the last lap, by a clock: the processor time of all threads of this process."""

    def __init__(self, warmup: int, clock: Callable[[], float] = time.process_time):
        self.warmup, self.clock, self.laps = warmup, clock, []

    def lap(self) -> None:
        """Called after each step."""
        self.laps.append(self.clock())

    @property
    def seconds(self) -> float:
        """Of the steps after the warm-up."""
        return self.laps[-1] - self.laps[self.warmup - 1]


def medians(runs: list[dict], keys: tuple[str, ...]) -> dict[str, float]:
    """The median of each key over the runs."""
    return {key: median(run[key] for run in runs) for key in keys}


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def machine(threads: int) -> str:
    """The machine in a few words, for a table's heading."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flag = next(
        (f for f in ("amx_bf16", "avx512_bf16") if any(line.startswith("flags") and f" {f}" in line for line in lines)),
        "no bf16 in hardware",
    )
    return f"{name}, {flag}, {threads} thread{'s' if threads > 1 else ''}"
