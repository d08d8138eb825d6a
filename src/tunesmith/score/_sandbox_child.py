"""Runs one answer's code and its tests inside the sandbox that _sandbox.py makes; the standard library only.

stdin: JSON {"code", "tests", "seconds", "nonce", "uid", "processes", "memory_bytes", "file_bytes"}. stdout: a line "NONCE started",
then "NONCE i 1" or "NONCE i 0" for test i, in order, then "NONCE done". The code is imported as module `answer`; each test is then
run in that module and passes unless it raises. The code shares its process with this driver: it can do no harm outside, but code
that goes looking for the nonce could report tests as passed.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import math
import os
import resource
import sys
from types import ModuleType

OPEN_FILES = 64


class Source(importlib.abc.InspectLoader):
    """A module whose text is at hand."""

    def __init__(self, text: str):
        self.text = text

    def get_source(self, fullname: str) -> str:
        return self.text


def drop_rights(job: dict) -> None:
    """Becomes the user of its own (where the sandbox was made by root) and sets the limits that no later call can raise."""
    limits = {
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NPROC: job["processes"],
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: math.ceil(job["seconds"]),
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])


def own_output() -> int:
    """The protocol's descriptor, taken away from what the code reads and prints."""
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    return report


def runs(text: str, module: ModuleType, owner: int) -> bool:
    """Whether the text runs in the module without raising. A copy of the process that the text forked off ends here."""
    try:
        Source(text).exec_module(module)
        passed = True
    except BaseException:  # the code's own errors, SystemExit among them, are what is counted
        passed = False
    if os.getpid() != owner:
        os._exit(0)
    return passed


def main() -> None:
    job = json.loads(sys.stdin.read())
    nonce, owner = job["nonce"], os.getpid()
    report = own_output()
    drop_rights(job)
    module = ModuleType("answer")
    sys.modules["answer"] = module
    os.write(report, f"{nonce} started\n".encode())
    loaded = runs(job["code"], module, owner)
    for index, test in enumerate(job["tests"]):
        passed = loaded and runs(test, module, owner)
        os.write(report, f"{nonce} {index} {int(passed)}\n".encode())
    os.write(report, f"{nonce} done\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
