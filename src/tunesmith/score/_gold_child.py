"""The process in which a user's gold measure meets what a model wrote.

Run as a script by gold.py, which kills it when it takes too long. stdin holds one message: {"file", "function", "pairs": [[prompt, answer]
...]}; to stdout goes one JSON line for {"ready": true} or {"load": message}, then one for each pair: {"checks": {name: value}} or
{"error": message}. Lines are written as they are found, so that an answer that hangs takes no other with it. What the measure prints
goes to stderr.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST_MESSAGE = 500  # characters of an error passed on


def sibling(name: str) -> Any:
    """A module of this folder, which is not put on sys.path: `statistics` there would stand in for the standard library's."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[name] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def check_call(function: Callable[..., Any], name: str) -> None:
    """Raises ValueError where the measure cannot be called with a prompt and an answer."""
    try:
        inspect.signature(function).bind("", "")
    except TypeError as error:
        raise ValueError(f"{name}{inspect.signature(function)} cannot take (prompt, answer)") from error


def measure(function: Callable[[str, str], Any], prompt: str, answer: str, clean: Callable[[Any], float | str]) -> dict[str, Any]:
    """The line of one answer. Whatever the measure raises becomes a message, SystemExit too."""
    try:
        found = function(prompt, answer)
        if not isinstance(found, dict) or not found:
            return {"error": f"returned {type(found).__name__ if found != {} else 'no check'} instead of {{name: 0 to 1}}"}
        values = {str(name): clean(value) for name, value in found.items()}
    except BaseException as error:  # a measure can raise any type; its name goes to the user
        return {"error": f"raised {type(error).__name__}: {error}"[:LONGEST_MESSAGE]}
    for name, value in values.items():
        if isinstance(value, str):
            return {"error": f"check {name} {value}"}
        if not 0 <= value <= 1:
            return {"error": f"check {name} is {value:g}, and not between 0 and 1"}
    return {"checks": values}


def main() -> None:
    """Loads the measure and answers every pair."""
    rewards = sibling("_reward_child")
    rewards.end_with_parent()
    requests, replies = rewards.own_streams()
    job = json.loads(requests.read())

    def tell(line: dict[str, Any]) -> None:
        replies.write(json.dumps(line).encode() + b"\n")
        replies.flush()

    try:
        function = rewards.find_function(Path(job["file"]), job["function"])
        check_call(function, job["function"])
    except BaseException as error:  # the user's file can raise any type while it is imported; its name goes to the user
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        tell({"load": f"{kind}{error}"[:LONGEST_MESSAGE]})
        return
    tell({"ready": True})
    for prompt, answer in job["pairs"]:
        tell(measure(function, prompt, answer, rewards.clean))


if __name__ == "__main__":
    main()
