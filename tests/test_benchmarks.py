"""What a page of several seeds says of how it was made: the whole command, and nothing of the machine."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch):
    """The command that a page shows for these words."""
    spec = importlib.util.spec_from_file_location("seeds", ROOT / "benchmarks" / "seeds.py")
    seeds = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeds)

    def shown(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["seeds.py", *words])
        return shlex.split(seeds._command(seeds._arguments()))

    return shown


ASKED = ("--stage", "dpo", "--metric", "preference_accuracy")


def test_the_command_on_a_page_holds_every_word_that_decides_what_stands_there(command):
    given = [*ASKED, "--baseline", "shorter", "--curves", "rewards/accuracies,loss", "--seeds", "3,4", "--set", "data.validation=0.2"]
    shown = command("benchmarks/dpo_hh.yaml", *given, "--title", "Pairs", "--write", "docs/learning/dpo_hh")
    assert shown == ["python", "benchmarks/seeds.py", "benchmarks/dpo_hh.yaml", *given, "--write", "docs/learning/dpo_hh"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("data.train=/somewhere/of/mine/train.jsonl", "data.train=train.jsonl"),
        ("data.train=~/train.jsonl", "data.train=train.jsonl"),
        ("data.train=../train.jsonl", "data.train=train.jsonl"),
        ("data={train: /somewhere/train.jsonl, test: /somewhere/test.jsonl}", "data={train: train.jsonl, test: test.jsonl}"),
        (f"data.train={ROOT}/recipes/sums/sft.jsonl", "data.train=recipes/sums/sft.jsonl"),
        ("data.train=pairs/train.jsonl", "data.train=pairs/train.jsonl"),
        ("stages.0.rollout.server=http://localhost:8000", "stages.0.rollout.server=http://localhost:8000"),
    ],
)
def test_a_page_shows_no_path_of_the_machine(command, given, shown):
    words = command(str(ROOT / "benchmarks" / "dpo_hh.yaml"), *ASKED, "--set", given)
    assert words[2] == "benchmarks/dpo_hh.yaml"
    assert words[words.index("--set") + 1] == shown
