"""The whole fault plan: kills, damage, full disks, signals and the like, each as often as the plan asks; prints what held, as a table.

    make test-faults
    python benchmarks/faults.py --write benchmarks/results/faults.md

Runs tests/faults with --whole, two tests at a time. The exit status is the tests' own: not 0 where a run did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from tests.faults.plan import PLAN  # noqa: E402


def main() -> int:
    """Runs the plan and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="tests at a time")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where to keep the table, beside printing it")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        account = Path(folder) / "account.json"
        words = ["tests/faults", "--whole", f"--account={account}", f"--numprocesses={options.processes}", "--dist=worksteal"]
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        status = subprocess.run(
            [sys.executable, "-m", "pytest", *words], cwd=ROOT, env=environment, stdout=sys.stderr, check=False
        ).returncode
        runs = json.loads(account.read_text()) if account.is_file() else {}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{(time.monotonic() - began) / 60:.0f} minutes, {(used.ru_utime + used.ru_stime) / 60:.0f} of one processor"
    page = table(runs, took, passed=status == 0)
    print(page, end="")
    if options.write:
        options.write.write_text(page)
    return status


def table(runs: dict[str, dict[str, int]], took: str, *, passed: bool) -> str:
    """The plan's rows with the runs that were made and that held. runs: by fault, {"made", "held"}; took: in words."""
    lines = ["# The fault plan", "", "    make test-faults", ""]
    lines += [f"{took}; {'every test passed' if passed else 'SOME TESTS FAILED'}.", ""]
    lines += ["| fault | asked | runs | held | which means |", "| --- | --- | --- | --- | --- |"]
    for name, fault in PLAN.items():
        made, held = (str(runs[name][what]) if name in runs else "NOT MEASURED" for what in ("made", "held"))
        lines.append(f"| {name} | {fault.runs} | {made} | {held} | {fault.held} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
