"""Calling the command line in this process, and the small project that its tests run on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

from tunesmith.cli import main

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could steer a terminal
TEXTS = {"defect": "the lamp is broken", "delivery": "where is my parcel", "refund": "i want my money back"}


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


def call(*words: object, stdin: str = "") -> Done:
    """`tunesmith WORDS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["tunesmith", *map(str, words)], io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv, sys.stdin = before
    return Done(status, out.getvalue(), err.getvalue())


def environment() -> dict[str, str]:
    """The environment of a child that imports the source tree."""
    root = Path(__file__).parents[1]
    return os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}


def row(number: int) -> dict:
    """One conversation of a classification task; every number is another one."""
    label = list(TEXTS)[number % 3]
    text = f"{TEXTS[label]}, order {number * 7919 % 1000} of {['May', 'June', 'July', 'March'][number % 4]}"
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": label}]}


def write_rows(path: Path, rows) -> Path:
    """JSON Lines; a str is a line as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows), encoding="utf-8")
    return path


def write_project(folder: Path, model: Path, **changes) -> Path:
    """A folder with data and a recipe that trains two updates of a tiny model; gives the recipe's path."""
    write_rows(folder / "train.jsonl", map(row, range(24)))
    write_rows(folder / "test.jsonl", map(row, range(100, 106)))
    recipe = {
        "name": "tiny",
        "model": {"name": str(model), "dtype": "float32"},
        "task": {"labels": "auto"},
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "stages": [
            {"name": "sft", "objective": "sft", "method": {"type": "lora", "r": 2}, "learning_rate": 1e-3, "max_steps": 2, "save_steps": 1}
        ],
        "evaluate": {
            "candidates": ["zero_shot", "few_shot", "tuned"],
            "few_shot_k": [1],
            "few_shot_sets": 1,
            "max_new_tokens": 4,
            "gates": [{"metric": "exact_match", "better_than": "few_shot"}],
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe | changes), encoding="utf-8")
    return path
