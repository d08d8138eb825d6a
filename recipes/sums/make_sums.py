"""Writes the rows of recipes/grpo.yaml beside this file: two-digit sums, split so that no sum is in two files, not even turned round.

Takes nothing, gives sft.jsonl (conversations), prompts.jsonl and test.jsonl ({prompt, answer} rows); the same on every machine.
Run it:  python recipes/sums/make_sums.py
"""

from __future__ import annotations

import json
import random
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

SEED = 0
COUNTS = {"test": 200, "sft": 320, "prompts": 640}


def make_sums() -> dict[str, list[dict[str, Any]]]:
    """The rows of each file by its name: distinct unordered pairs of 10 to 99, each written in one of its two orders."""
    draw = random.Random(SEED)
    wanted = sum(COUNTS.values())
    pairs = draw.sample(list(combinations_with_replacement(range(10, 100), 2)), wanted)
    sums = [draw.sample(pair, 2) for pair in pairs]
    files: dict[str, list[dict[str, Any]]] = {}
    for name, count in COUNTS.items():
        taken, sums = sums[:count], sums[count:]
        files[name] = [_row(name, f"{a} + {b} =", str(a + b)) for a, b in taken]
    return files


def _row(name: str, question: str, answer: str) -> dict[str, Any]:
    asked = {"role": "user", "content": question}
    if name == "sft":
        return {"messages": [asked, {"role": "assistant", "content": answer}]}
    return {"prompt": [asked], "answer": answer}


if __name__ == "__main__":
    for name, rows in make_sums().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(__file__).parent / f"{name}.jsonl").write_text(text, encoding="utf-8")
