"""A new process without the price of its libraries: forked from a server that has imported those and nothing of tunesmith."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

LIBRARIES = ["torch", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "bitsandbytes", "scipy.stats"]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(LIBRARIES)


class Ended(NamedTuple):
    """How the code ended: its exit status (1 if it raised), and what it wrote, the traceback among it."""

    returncode: int
    stdout: str
    stderr: str


def in_new_process(code: str, *words: object) -> Ended:
    """Runs Python code with words as its arguments in a process in which neither tunesmith nor PEFT has been imported yet."""
    mine, its = _SERVER.Pipe(duplex=False)
    process = _SERVER.Process(target=_run, args=(its, code, ["-c", *map(str, words)]))
    process.start()
    its.close()
    try:
        return Ended(*mine.recv())
    finally:
        process.join()


def _run(answer: Connection, code: str, words: list[str]) -> None:
    assert not {"tunesmith", "peft"} & sys.modules.keys()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        status = _status(code, words)
        sys.stdout.flush(), sys.stderr.flush()
        answer.send((status, *(os.pread(part.fileno(), os.fstat(part.fileno()).st_size, 0).decode() for part in (out, err))))


def _status(code: str, words: list[str]) -> int:
    sys.argv = words
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return end.code or 0  # our command line ends with numbers
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
