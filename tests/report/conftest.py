"""A realistic fake run directory: `build_run(folder)` writes every file a report reads, with the numbers of a believable quickstart.

The numbers are made by plain arithmetic from the sample scores, so that table, samples and verdict agree.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

N = 150
SYSTEM = "Turn a support message into a JSON ticket with intent, product, urgency and summary."
MESSAGES = [
    (
        "lamp dead since breakfast. tried 3 sockets. swap it pls",
        "defect",
        "lamp",
        "normal",
        "Lamp is dead in every socket and customer wants a swap",
    ),
    (
        "Good evening, my mother is 84 and her Varma has shown E7 since noon, the radiators are stone cold and it's minus eleven outside. "
        "Please somebody ring or write back, I'm two hours' drive away.",
        "defect",
        "thermostat",
        "high",
        "Elderly mother has no heating in frost with thermostat error E7",
    ),
    (
        "Does the Klokke work without wifi at all, say with just a chime in the hall?",
        "product_question",
        "doorbell",
        "low",
        "Asks whether the doorbell works without wifi",
    ),
    (
        "so i opened the box today and theres a LAMP in it. i ordered the robot. order 44-20913. when do i get mine 😂",
        "delivery",
        "vacuum",
        "normal",
        "Box held a lamp instead of the ordered robot vacuum",
    ),
    (
        "You have taken 39.90 from my card TWICE for the same order. I want it sorted.",
        "billing",
        "none",
        "high",
        "Card was charged twice for one order",
    ),
    (
        "Hallo, ich komme seit gestern nicht mehr in mein Konto, der Code kommt nie an.",
        "account_access",
        "app",
        "normal",
        "Two-factor code for the account never arrives",
    ),
    (
        "please cancel Oskelund Plus before it renews tonight!!",
        "cancel",
        "app",
        "high",
        "Wants the Plus subscription cancelled before tonight's renewal",
    ),
    (
        "The Dusti keeps circling the same chair leg. Third time I write. I am NOT amused.",
        "defect",
        "vacuum",
        "normal",
        "Robot vacuum circles one chair leg, third complaint",
    ),
    (
        "How do I tell the heating thing on the wall that we are on holiday for two weeks?",
        "setup_help",
        "thermostat",
        "normal",
        "Asks how to set holiday mode on the thermostat",
    ),
    (
        "Je voudrais rendre la sonnette, elle ne me plaît pas. Comment faire pour être remboursée ?",
        "refund",
        "doorbell",
        "normal",
        "Wants to return the doorbell and be refunded",
    ),
    (
        "there was a burning smell from the lamp base and a little spark, I pulled the plug",
        "defect",
        "lamp",
        "high",
        "Lamp sparked and smelled of burning",
    ),
    ("copy of invoice 2231 whenever you have time, no rush", "billing", "none", "low", "Asks for a copy of invoice 2231"),
    (
        "Parcel says delivered, nobody here has it, neighbours neither. It was the two lamps.",
        "delivery",
        "lamp",
        "normal",
        "Parcel with two lamps is marked delivered but missing",
    ),
    (
        "someone in Lisbon signed into my account, that was not me",
        "account_access",
        "app",
        "high",
        "Stranger signed into the customer's account",
    ),
    (
        "I'd like my money back for the vacuum. it was meant to be quiet. it isn't",
        "refund",
        "vacuum",
        "normal",
        "Wants a refund for a loud robot vacuum",
    ),
    ("will the new Lumo fit an E14 socket? just curious", "product_question", "lamp", "low", "Asks whether the lamp fits an E14 socket"),
    (
        "hi\npairing the bell\nlight goes orange then nothing\nwhat am i doing wrong",
        "setup_help",
        "doorbell",
        "normal",
        "Doorbell pairing stops at an orange light",
    ),
    (
        "Mi robot no carga desde la actualización, ¿lo reparan ustedes?",
        "defect",
        "vacuum",
        "normal",
        "Robot vacuum does not charge since the update",
    ),
]
FIELDS = ("intent", "product", "urgency")
WRONG = {"intent": "defect", "product": "app", "urgency": "normal"}


def build_run(folder: Path) -> Path:
    """Writes a whole run directory into `folder`, and gives it."""
    samples = {name: candidate_samples(name) for name in ("zero_shot", "few_shot", "classical", "tuned")}
    write_lines(folder / "events.jsonl", events())
    for name, lines in samples.items():
        write_lines(folder / "samples" / f"task.{name}.jsonl", lines)
    write(folder / "evaluation.json", evaluation(samples))
    write(folder / "manifest.json", MANIFEST)
    write(folder / "data" / "ledger.json", LEDGER)
    write(folder / "data" / "health.json", HEALTH)
    write(folder / "plan.json", PLAN)
    write_lines(folder / "data" / "quarantine.jsonl", QUARANTINE)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


def write(path: Path, value: Any) -> None:
    """One JSON document, as a run writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


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
    message, *labels, summary = MESSAGES[position % len(MESSAGES)]
    reference = dict(zip((*FIELDS, "summary"), (*labels, summary), strict=True))
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
        "zero_shot": {"metrics": {"perplexity": {"value": 14.21, "low": 13.02, "high": 15.55, "n": 60}}, "seconds": 11.0},
        "tuned": {"metrics": {"perplexity": {"value": 14.52, "low": 13.27, "high": 15.9, "n": 60}}, "seconds": 12.1},
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
                "reason": f"tuned against few_shot, exact_match {main['difference']:+.3f}, 95% interval [{main['low']:+.3f}, {main['high']:+.3f}], n = 150; "
                "the whole interval is better than 0.",
            },
            {
                "name": "tuned not worse than zero_shot by over 0.05 in perplexity on general",
                "result": "PASS",
                "reason": "tuned against zero_shot, perplexity ratio +2.2%, 95% interval [+1.2%, +3.2%], n = 60; the whole interval is within the margin of 0.05.",
            },
        ],
        "recommendation": {
            "candidate": "tuned",
            "reason": f"tuned has the best exact_match: {candidates['tuned']['metrics']['exact_match']['value']:.3f} on 150 items; "
            f"tuned against few_shot, exact_match {main['difference']:+.3f}, 95% interval [{main['low']:+.3f}, {main['high']:+.3f}], n = 150.",
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
        return {"metrics": metrics, "seconds": 1.9, "not_measured": missing}
    metrics["perplexity"] = measure([{"zero_shot": 6.8, "few_shot": 3.1, "tuned": 1.62}[name]] * N, spread=0.12)
    how = "free" if name == "tuned" else "constrained"
    return {
        "metrics": metrics,
        "decoding": how,
        "seconds": {"zero_shot": 58.2, "few_shot": 73.4, "tuned": 25.3}[name],
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
    """events.jsonl of a run that was resumed once."""
    rng, lines = random.Random(7), [{"event": "phase", "name": "data", "seconds": 3.2}, {"event": "phase", "name": "plan", "seconds": 6.1}]
    for step in range(1, steps + 1):
        loss = 2.1 * math.exp(-step / 22) + 0.28 + 0.1 * rng.random()
        rate = 5e-4 * min(step / 8, 0.5 * (1 + math.cos(math.pi * max(0, step - 8) / (steps - 8))))
        lines.append(
            {
                "time": 1e9 + step,
                "stage": "sft",
                "step": step,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": 1.1,
                "tokens_per_second": 410.0,
            }
        )
        if step % 27 == 0:
            lines.append(
                {
                    "time": 1e9 + step,
                    "stage": "sft",
                    "step": step,
                    "event": "evaluation",
                    "validation_loss": 2.0 * math.exp(-step / 22) + 0.42,
                }
            )
        if step == 80:
            lines.append({"time": 1e9 + step, "event": "resumed", "stage": "sft", "step": step})
    for name, seconds in (
        ("load model", 21.4),
        ("train sft", 236.0),
        ("evaluate task.zero_shot", 58.2),
        ("evaluate task.few_shot", 73.4),
        ("evaluate task.classical", 1.9),
        ("evaluate task.tuned", 25.3),
        ("evaluate general", 23.1),
    ):
        lines.append({"event": "phase", "name": name, "seconds": seconds})
    return lines


RECIPE = f"""\
name: quickstart
seed: 0
model:
  name: smollm2-135m-instruct
task:
  description: {SYSTEM}
  output_schema: ticket.schema.json
  metrics: [exact_match, field_accuracy, macro_f1, rougeL, json_validity]
data: {{train: helpdesk/train.jsonl, test: helpdesk/test.jsonl, validation: 0.1}}
stages:
- name: sft
  objective: {{type: sft}}
  method: {{type: lora, r: 16, lora_alpha: 32}}
  learning_rate: 5.0e-4
  num_train_epochs: 3
evaluate:
  candidates: [zero_shot, few_shot, classical, tuned]
  gates:
  - {{metric: exact_match, candidate: tuned, better_than: few_shot}}
  - {{task: general, metric: perplexity, candidate: tuned, not_worse_than: zero_shot, margin: 0.05}}
  confidence: 0.95
"""
MANIFEST = {
    "created": "2026-11-24T21:04:11+00:00",
    "versions": {"python": "3.12.8", "tunesmith": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0", "peft": "0.21.2", "xgrammar": None},
    "platform": "Linux-6.8-x86_64",
    "git": {"commit": "3f" * 20, "changed": False},
    "hardware": {"cpu": "A processor with 2 cores", "cores": 2, "usable_cores": 2, "memory_bytes": 8322187264, "bf16": True, "gpus": None},
    "seeds": {"recipe": 0, "split": 0, "bootstrap": 0},
    "model": {"name": "smollm2-135m-instruct", "sha256": "c0ffee" * 10, "revision": None},
    "data": {"helpdesk/train.jsonl": "12" * 32, "helpdesk/test.jsonl": "ab" * 32},
    "recipe": {"name": "quickstart"},
    "recipe_sha256": "77" * 32,
}
LEDGER = {
    "rows_in": 412,
    "rows_trained": 363,
    "rows_held_out": 40,
    "rows_dropped": {"duplicate": 5, "quarantined": 4},
    "tokens": {"total": 78112, "supervised": 15290, "truncated": 0, "shared": 55431},
}
HEALTH = {
    "findings": [
        {
            "check": "duplicate",
            "row_ids": ["r91ab02cd33f0", "r00fe12aa0911"],
            "related_ids": ["r1a2b3c4d5e6f"],
            "evidence": "train.jsonl:31 and train.jsonl:208 repeat train.jsonl:12",
            "mend": "nothing to do: the first is kept, the others are dropped",
        },
        {
            "check": "conflicting_answers",
            "row_ids": ["r7d2b55c0e1aa"],
            "related_ids": ["r3c9d00b1f2e4"],
            "evidence": 'the same prompt, 2 answers: train.jsonl:77 answers {"intent": "refund"}; train.jsonl:301 answers {"intent": "defect"}',
            "mend": "look at them and keep the right answer, if only one can be right",
        },
        {
            "check": "length_quantiles",
            "row_ids": [],
            "related_ids": [],
            "evidence": "tokens a row: half below 188, nine in ten below 226, longest 311 (n 408)",
            "mend": "nothing to do unless the longest rows are mistakes; data.max_length sets a limit",
        },
    ]
}
PLAN = {
    "predicted": {"peak_memory_bytes": 1_690_000_000, "seconds": 402.0, "tokens": 226_000, "bound_by": "compute"},
    "measured": {"peak_memory_bytes": 1_583_000_000, "seconds": 448.6, "tokens": 234_336, "bound_by": "compute"},
}
QUARANTINE = [
    {
        "path": "helpdesk/train.jsonl",
        "line": 17,
        "reason": "not valid JSON: Expecting ',' delimiter at column 41",
        "row": '{"messages": [{"role": "user" "content": "hi',
    },
    {
        "path": "helpdesk/train.jsonl",
        "line": 93,
        "reason": "the last message is not the assistant's",
        "row": {"messages": [{"role": "user", "content": "is anyone there"}]},
    },
    {"path": "helpdesk/train.jsonl", "line": 240, "reason": "not UTF-8 at byte 12", "row": '{"messages": \ufffd\ufffd'},
    {
        "path": "helpdesk/train.jsonl",
        "line": 388,
        "reason": "content holds an image part; only text parts are trained",
        "row": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    },
]


@pytest.fixture
def make_run():
    """The builder itself, for tests that change what it wrote."""
    return build_run


@pytest.fixture
def run_path(tmp_path):
    """A whole run directory."""
    return build_run(tmp_path / "quickstart")
