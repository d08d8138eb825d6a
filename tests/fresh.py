"""A new process without the price of its libraries: forked from a server that has imported those and nothing of tunesmith."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import sys
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

LIBRARIES = ["torch", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "bitsandbytes", "scipy.stats"]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(LIBRARIES)


class Ended(NamedTuple):
    """How the code ended: 1 if it raised; what it wrote, the traceback among it."""

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
    out, err, status = io.StringIO(), io.StringIO(), 0
    sys.argv = words
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            assert not {"tunesmith", "peft"} & sys.modules.keys()
            exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
    answer.send((status, out.getvalue(), err.getvalue()))
