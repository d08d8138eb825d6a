"""The plan held to account: predicted against measured memory and time, over every tuning method and some other shapes of a run.

    python benchmarks/plan.py --write benchmarks/results/plan.md        # on an idle machine

Each run is the quickstart's data on SmolLM2-135M for a few updates, in a fresh process. First the machine's speed is measured anew.
Memory is the process's peak, libraries and loading included; time is that of the phases that the plan predicts, reading left out. One run
is evaluated as well.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _measure import answer, child_spec, machine, run_child, say, table
from methods import METHODS, ROOT, USUAL_RATES, recipe_of

STEPS = 8  # updates of a run
MEMORY, TIME = 0.15, 0.25  # errors that are aimed at
ROWS_JOINED = 8  # quickstart's dialogues in one of the longer rows
READ = ("load", "data")  # phases that are over when the plan is made
SHAPES: dict[str, tuple[str, list[str]]] = {  # what is run (a method, or a recipe's file), and its settings
    "full, checkpointing": ("full", ["stages.0.gradient_checkpointing=true"]),
    "lora, checkpointing": ("lora", ["stages.0.gradient_checkpointing=true"]),
    "lora, selective checkpointing": ("lora", ["stages.0.gradient_checkpointing=selective"]),
    "lora, accumulation 4 x 2 rows": ("lora", ["stages.0.per_device_train_batch_size=2", "stages.0.gradient_accumulation_steps=4"]),
    "full, accumulation 4 x 2 rows": ("full", ["stages.0.per_device_train_batch_size=2", "stages.0.gradient_accumulation_steps=4"]),
    "lora, 32 rows": ("lora", ["stages.0.per_device_train_batch_size=32", "stages.0.max_steps=3"]),
    "lora, rows 8 times as long": ("lora", ["stages.0.per_device_train_batch_size=2"]),
    "lora, evaluated": ("lora", ["evaluate.candidates=[zero_shot,few_shot,tuned]", "evaluate.few_shot_sets=1"]),
    "sft, dpo": ("dpo.yaml", ["stages.0.max_steps=4", "stages.1.max_steps=4"]),
    "sft, grpo": ("grpo.yaml", ["stages.0.max_steps=4", "stages.1.max_steps=4"]),
}


def main() -> None:
    """Runs all, and writes the page."""
    spec = child_spec()
    if spec is not None:
        answer(_measure_machine() if spec["system"] == "machine" else _run(spec))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = {name: (name, [f"stages.0.max_steps={STEPS}"]) for name in METHODS}
    runs |= {name: (what, sets if "max_steps" in str(sets) else [*runs[what][1], *sets]) for name, (what, sets) in SHAPES.items()}
    parser.add_argument("--only", type=lambda text: text.split(";"), default=list(runs), help="runs, parted by semicolons")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="a setting of every run, for a quick look")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path, help="where to keep the page")
    parser.add_argument("--json", action="store_true", help="one more line: all figures")
    wanted = parser.parse_args()
    run_child(__file__, {"system": "machine"}, threads=wanted.threads)
    found = {}
    for name in wanted.only:
        what, sets = runs[name]
        with tempfile.TemporaryDirectory() as folder:
            about = {"long": "long" in name, "evaluates": "evaluated" in name}
            spec = {"system": name, "what": what, "sets": [*sets, *wanted.sets], "out": folder, **about}
            found[name] = run_child(__file__, spec, threads=wanted.threads)
        say(" | ".join(_cells(name, found[name])))
        text = page(found, machine(wanted.threads), shlex.join(["python", "benchmarks/plan.py", *sys.argv[1:]]))
        if wanted.write:  # after each, so that a series that is broken off leaves what it measured
            wanted.write.write_text(text)
    print(text, end="")
    if wanted.json:
        print(json.dumps(found))


def page(found: dict[str, dict[str, Any]], where: str, command: str) -> str:
    """The table and what it comes to. found: by run, `memory` and `seconds`, each [predicted, measured]."""
    header = ["run", "predicted GB", "measured GB", "error", "predicted s", "measured s", "error"]
    lines = ["# The plan held to account", "", f"    {command}", "", f"{where}.", ""]
    lines += [table(header, [_cells(name, run) for name, run in found.items()]), ""]
    for what, aim, title in (("memory", MEMORY, "Memory"), ("seconds", TIME, "Time")):
        errors = {name: _error(run[what]) for name, run in found.items()}
        missed = [name for name, error in errors.items() if abs(error) > aim]
        typical = median(map(abs, errors.values()))
        said = f"{title}: {len(errors) - len(missed)} of {len(errors)} runs within {aim:.0%}, the median error {typical:.0%}"
        lines.append(f"- {said}{'; missed: ' + '; '.join(missed) if missed else ''}.")
    return "\n".join(lines) + "\n"


def _error(pair: list[float]) -> float:
    return pair[0] / pair[1] - 1


def _cells(name: str, run: dict[str, Any]) -> list[str]:
    memory, seconds = run["memory"], run["seconds"]
    sizes, times = (f"{one / 1e9:.2f}" for one in memory), (f"{one:.1f}" for one in seconds)
    return [name, *sizes, f"{_error(memory):+.0%}", *times, f"{_error(seconds):+.0%}"]


def _measure_machine() -> dict[str, Any]:
    """In a child: forgets what this machine's speed was, and measures it."""
    import torch

    from tunesmith.models.load import cache_folder, has_fast
    from tunesmith.models.machine import measure_machine

    (cache_folder() / "machine.json").unlink(missing_ok=True)
    measure_machine(torch.bfloat16 if has_fast(torch.bfloat16) else torch.float32)
    return {}


def _run(spec: dict[str, Any]) -> dict[str, Any]:
    """In a child: the training, or the whole run, and what its plan.json compares."""
    import tunesmith

    out = Path(spec["out"])
    recipe: Any = ROOT / "recipes" / spec["what"]
    if spec["what"] in METHODS:
        words = {"method": spec["what"], "task": "quickstart", "seed": 0, "rate": USUAL_RATES[0], "epochs": 1}
        recipe = recipe_of(words)
        if not spec["evaluates"]:
            recipe["data"] = {"train": recipe["data"]["train"], "validation": 0.0}
            recipe["evaluate"] = {"candidates": []}
        if spec["long"]:
            recipe["data"]["train"] = str(_joined(Path(recipe["data"]["train"]), out / "long.jsonl"))
    verb = tunesmith.run if spec["evaluates"] else tunesmith.train
    plan = verb(recipe, out=out / "run", sets=spec["sets"]).plan
    rows = {row["name"]: (row["predicted"], row["measured"]) for row in plan["compared"] if row["error"] is not None}
    totals = {"peak_memory_bytes", "seconds", "tokens", "cost", *READ}
    phases = [pair for name, pair in rows.items() if name not in totals]
    return {
        "memory": rows["peak_memory_bytes"],
        "seconds": [sum(sides) for sides in zip(*phases, strict=True)],
        "parts": plan["predicted"]["memory"],
        "phases": {name: pair for name, pair in rows.items() if name not in totals},
    }


def _joined(source: Path, path: Path) -> Path:
    """Rows of several dialogues each, under the first one's system message."""
    rows = [json.loads(line)["messages"] for line in source.read_text(encoding="utf-8").splitlines()]
    with open(path, "w", encoding="utf-8") as stream:
        for i in range(0, len(rows) - ROWS_JOINED, ROWS_JOINED):
            turns = [turn for row in rows[i : i + ROWS_JOINED] for turn in row if turn["role"] != "system"]
            stream.write(json.dumps({"messages": [*(turn for turn in rows[i] if turn["role"] == "system"), *turns]}) + "\n")
    return path


if __name__ == "__main__":
    main()
