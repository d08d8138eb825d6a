"""Small recipes on a tiny model, and the rows they are about: what the pipeline's tests share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LABELS = ("red", "green", "blue")


def words(draw: random.Random, count: int = 5) -> str:
    """Random words, so that no two rows are alike."""
    return " ".join("".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(4)) for _ in range(count))


def conversations(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in the `messages` format: random words, answered with a colour."""
    draw = random.Random(seed)
    return [{"messages": [{"role": "user", "content": words(draw)}, {"role": "assistant", "content": LABELS[i % 3]}]} for i in range(count)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON lines; a str stands for itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def stage(name: str = "sft", **settings: Any) -> dict[str, Any]:
    """A stage of three updates."""
    given = {"name": name, "objective": "sft", "learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 4}
    return given | settings


def recipe(folder: Path, model: Path | str, **changed: Any) -> dict[str, Any]:
    """A whole recipe on 20 training and 6 test rows, which are written into `folder`."""
    data = {
        "train": str(write_rows(folder / "train.jsonl", conversations(20))),
        "test": str(write_rows(folder / "test.jsonl", conversations(6, seed=1))),
    }
    whole = {
        "name": "small",
        "model": {"name": str(model), "dtype": "float32"},
        "data": data,
        "stages": [stage()],
        "evaluate": {
            "candidates": ["zero_shot", "few_shot", "tuned"],
            "few_shot_k": [1],
            "few_shot_sets": 1,
            "max_new_tokens": 4,
            "bootstrap_resamples": 100,
            "gates": [{"metric": "exact_match", "better_than": "few_shot"}],
        },
    }
    for key, value in changed.items():
        whole[key] = whole[key] | value if isinstance(value, dict) and isinstance(whole.get(key), dict) else value
    return whole


def read_json(path: Path) -> Any:
    """A JSON file's content."""
    return json.loads(path.read_text(encoding="utf-8"))


def weights(run: Path, stage_name: str = "sft") -> bytes:
    """The bytes of a stage's saved weights."""
    (file,) = (run / "stages" / stage_name / "model").glob("*.safetensors")
    return file.read_bytes()


def announced(events: list[dict[str, Any]]) -> list[str]:
    """What the evaluation said it would do."""
    return [event["what"] for event in events if event.get("event") == "evaluating"]
