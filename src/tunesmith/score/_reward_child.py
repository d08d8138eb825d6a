"""The process in which a user's reward function, a regular expression or a JSON Schema meets what a model wrote.

Run as a script by _reward_process.py, which kills it when a call takes too long; it imports the standard library only, and
structured.py where the job is a JSON Schema. stdin and stdout carry messages of 4 bytes of length (big-endian) and JSON. First the
job: {"kind": "python", "file", "function"}, {"kind": "regex", "pattern"} or {"kind": "json_schema", "schema", "column"}; the reply is
{"ready": {"required": columns the function names, "taken": names that no column may have}} or {"error": "load", "message"}. Then
calls: {"prompts", "completions", "columns"}; the reply is {"values": [a number, or the reason why there is none as text]},
{"error": "raised", "message"} or {"error": "shape", "message"}. What the function prints goes to stderr.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import json
import math
import os
import re
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

LONGEST_MESSAGE = 500  # characters of an error passed on
PR_SET_PDEATHSIG = 1  # prctl(2)

Call = Callable[[list[str], list[str], dict[str, list]], Any]


class LoadError(ValueError):
    """The job cannot be done at all."""


def load(job: dict[str, Any]) -> tuple[Call, dict[str, list[str]]]:
    """What scores, and the columns it needs and refuses."""
    if job["kind"] == "regex":
        return load_regex(job["pattern"]), {"required": [], "taken": []}
    if job["kind"] == "json_schema":
        return load_schema(job["schema"], job["column"]), {"required": [], "taken": []}
    return load_function(Path(job["file"]), job["function"])


def load_regex(pattern: str) -> Call:
    found = re.compile(pattern).search
    return lambda prompts, completions, columns: [float(found(completion) is not None) for completion in completions]


def load_schema(schema: Any, column: str | None) -> Call:
    """1.0 for JSON that the schema allows, or the share of the reference's fields that are equal; raises for a row without one."""
    sys.path.append(str(Path(__file__).parents[2]))
    from tunesmith.score.structured import OutputFields, canonical, parse_output

    fields = OutputFields.from_schema(schema)

    def score(completion: str, reference: Any) -> float:
        parsed = json.loads(reference) if isinstance(reference, str) else reference
        if not isinstance(parsed, dict) or not parsed:
            raise ValueError(f"the row's {column} is no JSON object with fields")
        answer = parse_output(completion, fields)
        if answer is None:
            return 0.0
        return sum(name in answer and canonical(answer[name]) == canonical(value) for name, value in parsed.items()) / len(parsed)

    def call(prompts: list[str], completions: list[str], columns: dict[str, list]) -> list[float]:
        if column is None:
            return [float(parse_output(completion, fields) is not None) for completion in completions]
        return [score(*pair) for pair in zip(completions, columns[column], strict=True)]

    return call


def load_function(file: Path, name: str) -> tuple[Call, dict[str, list[str]]]:
    """The function of that name as a reward; raises LoadError where it cannot be called as one."""
    function = find_function(file, name)
    if inspect.iscoroutinefunction(function):
        raise LoadError(f"{name} is async, and a reward is an ordinary function")
    return lambda prompts, completions, columns: function(prompts, completions, **columns), check_signature(function, name)


def find_function(file: Path, name: str) -> Callable[..., Any]:
    """What a Python file calls by that name, the file's folder first on sys.path. Raises LoadError where nothing there can be called."""
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise LoadError("the file is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        functions = sorted(key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_"))
        raise LoadError(f"it has no function {name}; it has {', '.join(functions) or 'none'}")
    return function


def check_signature(function: Callable[..., Any], name: str) -> dict[str, list[str]]:
    parameters = list(inspect.signature(function).parameters.values())
    ordered = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_two = len(ordered) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    nameless = any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in ordered[2:])
    if not takes_two or nameless or not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise LoadError(f"{name}{inspect.signature(function)} cannot take (prompts, completions, **columns)")
    named = [p for p in ordered[2:] + [p for p in parameters if p.kind is p.KEYWORD_ONLY] if p.default is p.empty]
    taken = [p.name for p in ordered[:2] if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {"required": [p.name for p in named], "taken": taken}


def clean(value: Any) -> float | str:
    """A finite float, or the reason why the value is none. numpy's and torch's scalars are numbers."""
    if value is None:
        return "returned None"
    if not isinstance(value, bool | int | float) and callable(getattr(value, "item", None)):
        value = value.item()
    if not isinstance(value, bool | int | float):
        return f"returned a {type(value).__name__} instead of a number"
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return "returned inf"
    return float(value) if math.isfinite(value) else f"returned {float(value)}"


def answer(call: Call, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one call. Whatever the function raises becomes a message, SystemExit too."""
    wanted = len(request["completions"])
    try:
        values = call(request["prompts"], request["completions"], request["columns"])
        if isinstance(values, str | bytes | dict | set) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
            return failure("shape", f"returned a {type(values).__name__} instead of a list")
        if len(values) != wanted:
            return failure("shape", f"returned {len(values)} scores for {wanted} answers")
        return {"values": [clean(value) for value in values]}
    except BaseException as error:  # a reward function can raise any type; its name goes to the user
        return failure("raised", f"raised {type(error).__name__}: {error}")


def failure(kind: str, message: str) -> dict[str, str]:
    return {"error": kind, "message": message[:LONGEST_MESSAGE]}


def end_with_parent() -> None:
    """Asks Linux to kill this process when the thread that started it ends, also in the middle of an endless call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def own_streams() -> tuple[BinaryIO, BinaryIO]:
    """The protocol's streams, taken away from what user code reads and prints: that gets no input, and stderr to print to."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def receive(requests: BinaryIO) -> dict[str, Any] | None:
    head = requests.read(4)
    return json.loads(requests.read(struct.unpack(">I", head)[0])) if len(head) == 4 else None


def send(replies: BinaryIO, reply: dict[str, Any]) -> None:
    body = json.dumps(reply).encode()
    replies.write(struct.pack(">I", len(body)) + body)
    replies.flush()


def main() -> None:
    end_with_parent()
    requests, replies = own_streams()
    job = receive(requests)
    if job is None:
        return
    try:
        call, columns = load(job)
    except BaseException as error:  # the user's file can raise any type while it is imported; its name goes to the user
        kind = "" if isinstance(error, LoadError) else f"{type(error).__name__}: "
        send(replies, failure("load", f"{kind}{error}"))
        return
    send(replies, {"ready": columns})
    while (request := receive(requests)) is not None:
        send(replies, answer(call, request))


if __name__ == "__main__":
    main()
