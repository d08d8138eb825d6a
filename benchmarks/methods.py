"""Every tuning method on two tasks, three seeds, each at its own best learning rate: what it costs, what it reaches, what it forgets.

    python benchmarks/methods.py --banking banking77 --write docs/methods

One method after another: first a sweep finds its rate, by validation loss, on the quickstart's task and one seed, going on beyond an end
of its grid that turns out best; then a few updates and answers are timed, which wants an idle machine; then it runs on both tasks with
each seed.
Every finished job is a line of the results file (`--results`), so that an interrupted series goes on where it stopped. `--only lora,full`
and `--phases sweep,costs,runs` take parts. `--write` makes the tables and the picture from what is there.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _measure import answer, child_spec, machine, run_child, say
from _methods_page import TIMED, WARM_UP, write_page

ROOT = Path(__file__).resolve().parents[1]
METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "partial": {"type": "partial", "last_layers": 4},
    "lora": {"type": "lora", "r": 16},
    "dora": {"type": "lora", "r": 16, "use_dora": True},
    "pissa": {"type": "lora", "r": 16, "init_lora_weights": "pissa"},
    "qlora": {"type": "lora", "r": 16},  # on a base of four bits
    "ia3": {"type": "ia3"},
    "houlsby": {"type": "bottleneck", "architecture": "houlsby"},
    "pfeiffer": {"type": "bottleneck", "architecture": "pfeiffer"},
    "parallel": {"type": "bottleneck", "architecture": "parallel"},
    "prefix": {"type": "prefix"},
    "prompt": {"type": "prompt"},
    "p_tuning": {"type": "p_tuning"},
}
RATES = {
    "full": [3e-5, 1e-4, 3e-4],
    "partial": [1e-4, 3e-4, 1e-3],
    "ia3": [1e-3, 5e-3, 2e-2],
    "prefix": [1e-3, 1e-2, 5e-2],
    "prompt": [1e-3, 1e-2, 1e-1],
    "p_tuning": [3e-4, 1e-3, 3e-3],
}
USUAL_RATES = [2e-4, 5e-4, 1.5e-3]
SEEDS = (0, 1, 2)
BEYOND, FURTHER = 2, 3.0  # rates tried beyond a grid whose end is best, at most, and how many times further each is
NEARLY_BEST = 0.03  # of the best loss: the lowest rate that comes so near is the method's default (src/tunesmith/train/rates.py)
PHASES = ("sweep", "costs", "runs")
SWEEP_EPOCHS = 1  # of a run that only chooses the rate
BANKING_ROWS, BANKING_TEST = 1000, 500
TASKS = ("quickstart", "banking77")


def main() -> None:
    """Runs what is missing, and writes the page."""
    spec = child_spec()
    if spec is not None:
        answer(_costs(spec) if spec["steps"] else _run(spec))
        return
    wanted = _arguments()
    results = Path(wanted.results)
    done = _read(results)
    while jobs := _jobs(wanted, done):
        job = jobs[0]
        say(f"{job['key']} (then {len(jobs) - 1} known)")
        done[job["key"]] = run_child(__file__, job, threads=wanted.threads) | {"machine": machine(wanted.threads)}
        _write(results, done)
    if wanted.write:
        rates, defaults = ({name: found(done, name) for name in METHODS} for found in (rates_of, default_rate))
        write_page(Path(wanted.write), done, METHODS, rates, defaults)
    if wanted.json:
        print(json.dumps({"jobs": len(done), "rates": {name: best_rate(done, name) for name in METHODS}}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--banking", help="the folder of Banking77's train.csv and test.csv; without it that task is left out")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--phases", type=lambda text: text.split(","), default=list(PHASES))
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=list(SEEDS))
    parser.add_argument("--out", default="runs/methods", help="the folder of the runs")
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results" / "methods.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="sets", help="a setting of every run, for a quick look")
    parser.add_argument("--write", help="the page, without its ending")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _read(results: Path) -> dict[str, Any]:
    return json.loads(results.read_text())["jobs"] if results.is_file() else {}


def _write(results: Path, done: dict[str, Any]) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    temporary = results.with_suffix(".part")
    temporary.write_text(json.dumps({"jobs": done}, indent=1, sort_keys=True) + "\n")
    temporary.replace(results)


def _jobs(wanted: argparse.Namespace, done: dict[str, Any]) -> list[dict[str, Any]]:
    """What is not done yet, of the phases whose earlier ones are: the sweep first, then the costs, then the runs."""
    jobs: list[dict[str, Any]] = []
    for name in wanted.only:
        rates = rates_of(done, name)
        sweep = [_job(wanted, f"sweep {name} rate={rate:g}", name, rate, epochs=SWEEP_EPOCHS) for rate in rates]
        missing = [job for job in sweep if job["key"] not in done]
        if "sweep" in wanted.phases and missing:
            jobs += missing
            continue
        rate = best_rate(done, name)
        if rate is None:
            continue
        if "costs" in wanted.phases:
            jobs.append(_job(wanted, f"costs {name}", name, rate, steps=WARM_UP + TIMED))
        if "runs" in wanted.phases:
            tasks = [task for task in TASKS if task != "banking77" or wanted.banking]
            jobs += [
                _job(wanted, f"{task} {name} seed={seed}", name, rate, task=task, seed=seed) for seed in wanted.seeds for task in tasks
            ]
    return [job for job in jobs if job["key"] not in done]


def _job(wanted: argparse.Namespace, key: str, name: str, rate: float, **what: Any) -> dict[str, Any]:
    """A job's specification. what: its task and seed, or else the quickstart's and 0; epochs or steps of a job that only trains."""
    what = {"task": TASKS[0], "seed": 0, "epochs": None, "steps": None} | what
    out = str(Path(wanted.out) / key.replace(" ", "-"))
    return {"system": key, "key": key, "out": out, "method": name, "rate": rate, **what, "banking": wanted.banking, "sets": wanted.sets}


def rates_of(done: dict[str, Any], name: str) -> list[float]:
    """The rates of a method's sweep: its grid, and while the best of what was tried is at an end, one more beyond that end."""
    rates = RATES.get(name, USUAL_RATES)
    for _ in range(BEYOND):
        losses = _losses(done, name, rates)
        if None in losses or min(losses) not in (losses[0], losses[-1]):
            return rates
        further = rates[-1] * FURTHER if losses[-1] < losses[0] else rates[0] / FURTHER
        rates = sorted([*rates, float(f"{further:.2g}")])
    return rates


def best_rate(done: dict[str, Any], name: str) -> float | None:
    """The rate with the lowest validation loss, once all of a method's have been tried."""
    rates = rates_of(done, name)
    losses = _losses(done, name, rates)
    return None if None in losses else rates[losses.index(min(losses))]


def default_rate(done: dict[str, Any], name: str) -> float | None:
    """The rate that a stage takes which names none: the lowest that is nearly best, once all of a method's have been tried."""
    rates = rates_of(done, name)
    losses = _losses(done, name, rates)
    return None if None in losses else next(r for r, loss in zip(rates, losses, strict=True) if loss <= (1 + NEARLY_BEST) * min(losses))


def _losses(done: dict[str, Any], name: str, rates: list[float]) -> list[float | None]:
    """Validation losses of a method's sweep, None where a rate is yet to be tried; infinite where the loss did not stay finite."""
    found = [done.get(f"sweep {name} rate={rate:g}") for rate in rates]
    return [None if job is None else math.inf if job["validation_loss"] is None else job["validation_loss"] for job in found]


def recipe_of(spec: dict[str, Any]) -> dict[str, Any]:
    """A job's recipe. Settings of both tasks were fixed before any test row was read."""
    name, task, epochs, steps = spec["method"], spec["task"], spec["epochs"], spec.get("steps")
    stage = {"name": "sft", "objective": "sft", "method": METHODS[name], "learning_rate": spec["rate"], "num_train_epochs": 2}
    general = str(ROOT / "recipes" / "helpdesk" / "general.jsonl")
    candidates = ["tuned", "zero_shot"] if (name, spec["seed"]) == ("lora", 0) else ["tuned"]
    whole: dict[str, Any] = {
        "name": "methods",
        "seed": spec["seed"],
        "model": {"name": "smollm2-135m-instruct", **({"quantization": "nf4"} if name == "qlora" else {})},
        "stages": [stage],
        "evaluate": {"candidates": candidates, "general": general},
    }
    if task == "quickstart":
        helpdesk = ROOT / "recipes" / "helpdesk"
        whole["task"] = {
            "description": "Turn a support message into a JSON ticket (intent, product, urgency, summary).",
            "output_schema": str(helpdesk / "ticket.schema.json"),
            "metrics": ["exact_match", "field_accuracy"],
        }
        whole["data"] = {"train": str(helpdesk / "train.jsonl"), "test": str(helpdesk / "test.jsonl")}
        whole["evaluate"]["max_new_tokens"] = 64
    else:
        folder = _banking(Path(spec["banking"]), Path(spec["out"]).parent / "banking77")
        whole["task"] = {"description": "Name the intent of a bank customer's question.", "metrics": ["exact_match"], "labels": "auto"}
        columns = {"prompt": "text", "completion": "category"}
        files = {part: str(folder / f"{part}.csv") for part in ("train", "test")}
        whole["data"] = {**files, "columns": columns, "test_overlap": "drop"}
        stage |= {"num_train_epochs": 3, "per_device_train_batch_size": 16}
    if epochs or steps:
        stage |= {"max_steps": steps} if steps else {"num_train_epochs": epochs}
        whole["evaluate"] = {"candidates": ["tuned"]}
    return whole


def _banking(source: Path, folder: Path) -> Path:
    """1,000 training and 500 test rows, drawn once by a fixed seed."""
    for part, count in (("train", BANKING_ROWS), ("test", BANKING_TEST)):
        if (folder / f"{part}.csv").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with open(source / f"{part}.csv", encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        chosen = random.Random(0).sample(rows, count)
        with open(folder / f"{part}.csv", "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, ["text", "category"])
            writer.writeheader()
            writer.writerows(chosen)
    return folder


def _run(spec: dict[str, Any]) -> dict[str, Any]:
    """In a child: the run, or only its training where it chooses a rate."""
    import tunesmith
    from tunesmith.errors import NonFinite
    from tunesmith.rundir import read_events

    recipe, out = recipe_of(spec), Path(spec["out"])
    try:
        result = (tunesmith.train if spec["epochs"] else tunesmith.run)(recipe, out=out, sets=spec["sets"], resume=True)
    except NonFinite as error:
        if not spec["epochs"]:
            raise
        return {"validation_loss": None, "rate": spec["rate"], "reason": str(error)}
    held_out = [event["eval_loss"] for event in read_events(out) if event.get("event") == "evaluated"]
    metrics = (result.evaluation or {}).get("tasks", {})
    return {
        "validation_loss": held_out[-1],
        "seconds": result.plan["measured"]["seconds"],
        "rate": spec["rate"],
        "scores": {
            task: {name: candidate["metrics"] for name, candidate in found["candidates"].items()} for task, found in metrics.items()
        },
    }


def _costs(spec: dict[str, Any]) -> dict[str, Any]:
    """In a child: some updates, and answers of what they make."""
    import tunesmith
    from tunesmith.models.load import load_model
    from tunesmith.models.methods import resolve, trainable_count
    from tunesmith.rundir import read_events

    out = Path(spec["out"])
    shutil.rmtree(out, ignore_errors=True)  # a broken-off one's updates and this one's kernels would be mixed
    tunesmith.train(recipe_of(spec), out=out, sets=spec["sets"])
    steps = [event for event in read_events(out) if "loss" in event]
    timed = steps[WARM_UP:]
    resolved = tunesmith.load_recipe(out / "recipe.yaml")
    model = load_model(resolved.model).model
    return {
        "trainable": trainable_count(model, resolve(model, resolved.stages[0].method)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_second": sum(event["tokens"] for event in timed) / sum(event["tokens"] / event["tokens_per_second"] for event in timed),
        "peak_memory_bytes": max(event["peak_memory_bytes"] for event in steps),
        "result_bytes": sum(file.stat().st_size for file in (out / "model").glob("*.safetensors")),
        "token_milliseconds": _latency(out),
    }


PROMPTS, NEW_TOKENS, ROUNDS = 4, 32, 3  # of the timing: prompts, each alone, answers of equal length, median of the rounds


def _latency(run: Path) -> dict[str, float]:
    """Milliseconds a token of a run's result, live and merged where that is possible, and of its base, taking turns."""
    import time
    from statistics import median

    import tunesmith
    from tunesmith.errors import RecipeError
    from tunesmith.generate import LocalGenerator, Sampling
    from tunesmith.models.load import load_model
    from tunesmith.recipe import ModelSection

    section = tunesmith.load_recipe(run / "recipe.yaml").model
    base = load_model(section)
    live = tunesmith.load(run)
    systems = {"base": LocalGenerator(base.model, base.tokenizer), "live": LocalGenerator(live.model, live.tokenizer)}
    try:
        merged = load_model(ModelSection(name=str(tunesmith.export(run, force=True).path), dtype=section.dtype))
        systems["merged"] = LocalGenerator(merged.model, merged.tokenizer)
    except RecipeError:  # it cannot be merged
        pass
    prompts = [base.tokenizer.encode(f"A customer writes for the {i}th time about a lamp that does not work.") for i in range(PROMPTS)]
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(ROUNDS + 1):  # the first is a warm-up
        for name, system in systems.items():
            began, made = time.process_time(), 0
            for i, prompt in enumerate(prompts):
                (found,) = system.generate([prompt], max_new_tokens=NEW_TOKENS, sampling=Sampling(temperature=1.0), seeds=[i])
                made += len(found.token_ids)
            times[name].append(1000 * (time.process_time() - began) / made)
    return {name: median(found[1:]) for name, found in times.items()}


if __name__ == "__main__":
    main()
