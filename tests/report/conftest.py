"""A realistic fake run directory: `build_run(folder)` writes every file a report reads, with the numbers of a believable quickstart.

The numbers are made by plain arithmetic from the sample scores, so that table, samples and verdict agree.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

N = 150
SYSTEM = "Turn a support message into a JSON ticket with intent, product, urgency and summary."
HERE = Path(__file__).parent
MESSAGES = [json.loads(line) for line in (HERE / "messages.jsonl").read_text(encoding="utf-8").splitlines()]
FIELDS = ("intent", "product", "urgency")
WRONG = {"intent": "defect", "product": "app", "urgency": "normal"}


def build_run(folder: Path) -> Path:
    """Writes a whole run directory as `folder`, and gives it; what does not depend on the samples lies in quickstart/."""
    shutil.copytree(HERE / "quickstart", folder)
    samples = {name: candidate_samples(name) for name in ("zero_shot", "few_shot", "classical", "tuned")}
    for name, lines in samples.items():
        write_lines(folder / "samples" / f"task.{name}.jsonl", lines)
    write_lines(folder / "events.jsonl", events())
    (folder / "evaluation.json").write_text(json.dumps(evaluation(samples), indent=1), encoding="utf-8")
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def candidate_samples(name: str) -> list[dict[str, Any]]:
    """150 sample lines of a candidate that gets each field right with its own probability."""
    chance = {"zero_shot": (0.3, 0.35, 0.5), "few_shot": (0.42, 0.48, 0.52), "classical": (0.8, 0.88, 0.78), "tuned": (0.91, 0.95, 0.85)}[
        name
    ]
    rng = random.Random(name)
    return [sample(name, position, [rng.random() < share for share in chance], rng.random()) for position in range(N)]


def sample(name: str, position: int, right: list[bool], draw: float) -> dict[str, Any]:
    """One line of samples/task.NAME.jsonl."""
    reference = dict(MESSAGES[position % len(MESSAGES)])
    message, summary = reference.pop("message"), reference["summary"]
    answer = {field: reference[field] if good else WRONG[field] for field, good in zip(FIELDS, right, strict=True)}
    if name != "classical":
        answer["summary"] = summary if draw > 0.8 and name == "tuned" else " ".join(summary.split()[: 4 + int(5 * draw)])
    hits = {f"field_accuracy.{field}": float(answer[field] == reference[field]) for field in FIELDS}
    torn = name in ("zero_shot", "few_shot") and draw < 0.05
    output = json.dumps(answer, ensure_ascii=False)
    output = output[: len(output) // 2] if torn else output
    scores = {"json_validity": float(not torn), "exact_match": float(all(hits.values()) and not torn), **hits}
    scores["field_accuracy"] = sum(hits.values()) / 3
    if name != "classical":
        scores |= {"rougeL": 0.2 + 0.6 * draw * (name == "tuned"), "perplexity": 1.5 + draw, "nats": 40 * draw, "tokens": 40}
    return {
        "item_id": f"i{position:03d}",
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": message}],
        "reference": json.dumps(reference, ensure_ascii=False),
        "output": output,
        "finish_reason": None if name == "classical" else "length" if torn else "stop",
        "scores": scores,
    }


def measure(values: list[float], spread: float | None = None) -> dict[str, float]:
    """A mean with the normal interval of its standard error."""
    mean = sum(values) / len(values)
    error = spread if spread is not None else math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)
    return {"value": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error, "n": len(values)}


def evaluation(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """evaluation.json of the samples."""
    scores = {name: [line["scores"] for line in lines] for name, lines in samples.items()}
    candidates = {name: candidate(name, rows) for name, rows in scores.items()}
    general = {
        "zero_shot": {"metrics": {"perplexity": {"value": 14.21, "low": 13.02, "high": 15.55, "n": 60}}},
        "tuned": {"metrics": {"perplexity": {"value": 14.52, "low": 13.27, "high": 15.9, "n": 60}}},
    }
    compared = [
        difference(scores, metric, baseline)
        for metric in ("exact_match", "field_accuracy", "rougeL")
        for baseline in ("few_shot", "zero_shot", "classical")
        if metric in scores[baseline][0]
    ]
    guard = {
        "task": "general",
        "metric": "perplexity",
        "candidate": "tuned",
        "baseline": "zero_shot",
        "difference": 0.0218,
        "low": 0.0121,
        "high": 0.0319,
    }
    main = compared[0]
    shown = f"exact_match {main['difference']:+.3f}, 95% interval [{main['low']:+.3f}, {main['high']:+.3f}], n = 150"
    return {
        "tasks": {
            "task": {"hash": "5e0c" * 16, "n": N, "skipped": {}, "candidates": candidates, "not_measured": {}},
            "general": {"hash": "91ab" * 16, "n": 60, "candidates": general},
        },
        "comparisons": [*compared, {**guard, "minimum_detectable": 0.014, "n": 60, "unit": "ratio minus 1"}],
        "gates": [
            {
                "name": "tuned better than few_shot in exact_match on task",
                "result": "PASS",
                "reason": f"tuned against few_shot, {shown}; the whole interval is better than 0.",
            },
            {
                "name": "tuned not worse than zero_shot by over 0.05 in perplexity on general",
                "result": "PASS",
                "reason": "tuned against zero_shot, perplexity ratio +2.2%, 95% interval [+1.2%, +3.2%], n = 60; "
                "the whole interval is within the margin of 0.05.",
            },
        ],
        "recommendation": {
            "candidate": "tuned",
            "reason": f"tuned has the best exact_match: {candidates['tuned']['metrics']['exact_match']['value']:.3f} on 150 items; "
            f"tuned against few_shot, {shown}.",
        },
        "verdict": "PASS",
        "few_shot": {
            "selected": {
                "k": 4,
                "set": 1,
                "row_ids": ["r91ab02cd33f0", "r00fe12aa0911", "r7d2b55c0e1aa", "r3c9d00b1f2e4"],
                "metric": "exact_match",
                "value": 0.125,
                "n": 40,
            },
            "table": [
                {"k": k, "set": one, "examples": k, "metric": "exact_match", "value": value, "n": 40}
                for k, one, value in ((2, 0, 0.05), (2, 1, 0.075), (4, 0, 0.1), (4, 1, 0.125), (8, 0, 0.1), (8, 1, 0.075))
            ],
        },
        "classical": {
            "C": 10.0,
            "trials": [{"C": C, "exact_match": value, "n": 40} for C, value in ((1.0, 0.4), (10.0, 0.55), (100.0, 0.525))],
        },
        "confidence": 0.95,
    }


def candidate(name: str, rows: list[dict[str, float]]) -> dict[str, Any]:
    """One candidate's entry: every metric of its item scores, macro F1 and perplexity made up near them."""
    metrics = {metric: measure([row[metric] for row in rows]) for metric in rows[0] if metric not in ("nats", "tokens", "perplexity")}
    metrics["macro_f1"] = measure([row["field_accuracy"] - 0.03 for row in rows])
    if name == "classical":
        del metrics["json_validity"]
        missing = {
            "json_validity": "it fills label fields and writes no JSON",
            "rougeL": "it cannot write summary",
            "perplexity": "it gives no probability to a text",
        }
        return {"metrics": metrics, "not_measured": missing}
    metrics["perplexity"] = measure([{"zero_shot": 6.8, "few_shot": 3.1, "tuned": 1.62}[name]] * N, spread=0.12)
    how = "free" if name == "tuned" else "constrained"
    return {
        "metrics": metrics,
        "decoding": how,
        "mean_output_tokens": 38.4,
    }


def difference(scores: dict[str, list[dict[str, float]]], metric: str, baseline: str) -> dict[str, Any]:
    """tuned minus baseline on the same items."""
    got = measure([ours[metric] - theirs[metric] for ours, theirs in zip(scores["tuned"], scores[baseline], strict=True)])
    half = got["high"] - got["value"]
    return {
        "task": "task",
        "metric": metric,
        "candidate": "tuned",
        "baseline": baseline,
        "difference": got["value"],
        "low": got["low"],
        "high": got["high"],
        "minimum_detectable": half * 2.8 / 1.96,
        "n": N,
    }


def events(steps: int = 135) -> list[dict[str, Any]]:
    """events.jsonl of a run that was resumed once; of 1736 tokens a step, 504 are computed."""
    rng, lines = random.Random(7), [{"event": "phase", "name": "data", "seconds": 3.2}]
    for step in range(1, steps + 1):
        loss = 2.1 * math.exp(-step / 22) + 0.28 + 0.1 * rng.random()
        rate = 5e-4 * min(step / 8, 0.5 * (1 + math.cos(math.pi * max(0, step - 8) / (steps - 8))))
        more = {"grad_norm": 1.1, "tokens": 1736, "computed_tokens": 504, "tokens_per_second": 990.0}
        lines.append({"time": 1e9 + step, "stage": "sft", "step": step, "loss": loss, "learning_rate": rate, **more})
        if step % 27 == 0:
            held = 2.0 * math.exp(-step / 22) + 0.42
            lines.append({"time": 1e9 + step, "stage": "sft", "step": step, "event": "evaluated", "eval_loss": held})
        if step == 80:
            lines.append({"time": 1e9 + step, "event": "resumed", "stage": "sft", "step": step})
    lines.append({"event": "phase", "name": "train sft", "seconds": 236.0})
    parts = {"few_shot.selection": 48.0, "task.zero_shot": 58.2, "task.few_shot": 73.4, "task.classical": 1.9, "task.tuned": 25.3}
    for name, seconds in {**parts, "general.zero_shot": 11.0, "general.tuned": 12.1}.items():
        lines.append({"event": "phase_part", "of": "evaluate", "name": name, "seconds": seconds})
    lines.append({"event": "phase", "name": "evaluate", "seconds": 236.9})
    return lines


@pytest.fixture
def make_run():
    """The builder itself, for tests that change what it wrote."""
    return build_run


@pytest.fixture
def run_path(tmp_path):
    """A whole run directory."""
    return build_run(tmp_path / "quickstart")
