"""Direct preference optimisation against TRL's DPOTrainer: pairs a processor-second, peak memory, and the loss after the same pairs.

    python benchmarks/dpo_vs_trl.py [DATA] [--json] [--parts lora full] [--updates N] [--runs N] [--threads N] [--write FILE]

Same model, pairs, order, optimiser and schedule, updates of 8 pairs, bf16 on CPU, beta 0.1. Ours is what `tunesmith run` trains with:
the policy computes the reference's log-probabilities once, before its first update. TRL by default computes them in every step;
precomputed, once as ours, and with gradient checkpointing off, since that is faster. DATA: pairs in any format that tunesmith reads, by
default the project's own; the system turn, which all pairs share, is cut off. Losses: runs in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from _measure import Stopwatch, answer, child_spec, machine, medians, peak_bytes, run_child, say, table
from sft_vs_trl import MODEL, RANK, SEED, start_like_ours

PAIRS = Path(__file__).parents[1] / "recipes" / "replies" / "pairs.jsonl"
BATCH = 8  # pairs of an update, TRL's default
WARMUP = 1  # updates, and batches of the reference's pass, before the clock starts
BETA = 0.1
RATE = {"lora": 2e-4, "full": 2e-5}
LOSS_BATCH, LOSS_UPDATES = 4, 3  # of the fp32 runs
SYSTEMS = ("tunesmith", "trl_default", "trl_precomputed")


# ---- parent ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs the parts and prints the tables, and with --json one last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="?", default=str(PAIRS), help="preference pairs, in any format that tunesmith reads")
    parser.add_argument("--parts", nargs="+", choices=RATE, default=list(RATE), help="which methods to run")
    parser.add_argument("--updates", type=int, default=3, help="updates of each timed run, the first of which warms up; at least 2")
    parser.add_argument("--runs", type=int, default=3, help="runs of each system; the median counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each run")
    parser.add_argument("--checkpointing", action="store_true", help="leave TRL's checkpointing on where the reference is precomputed")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--write", metavar="FILE", help="write the tables to a file as well")
    options = parser.parse_args()
    if options.updates <= WARMUP:
        parser.error(f"--updates is at least {WARMUP + 1}")
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "pairs.json")
        shape = run_child(__file__, {"system": "pairs", "data": options.data, "count": options.updates * BATCH, "file": file}, threads=1)
        for part in options.parts:
            measured[part] = measure(part, file, options)
    results = {part: ratios(found) for part, found in measured.items()}
    text = report(measured, results, options, shape)
    print(text)
    if options.write:
        Path(options.write).write_text(text + "\n")
    if options.json:
        print(json.dumps(results))


def measure(part: str, file: str, options: argparse.Namespace) -> dict:
    """All runs of one part: {"runs": {system: [result, ...]}, "losses": {system: [loss of each update]}}."""
    spec = {"method": part, "pairs": file, "count": options.updates * BATCH, "batch": BATCH, "dtype": "bfloat16"}
    spec["checkpointing"] = options.checkpointing
    runs: dict[str, list[dict]] = {system: [] for system in SYSTEMS}
    for number in range(options.runs):
        for system in SYSTEMS:
            result = run_child(__file__, {**spec, "system": system}, threads=options.threads)
            runs[system].append(result)
            say(
                f"{part} {number + 1}/{options.runs} {system}: {result['update']:.3f} + {result['reference']:.3f} CPU-s a pair, "
                f"{result['peak_bytes'] / 2**20:.0f} MiB, loss {result['losses'][-1]:.4f}"
            )
    spec |= {"dtype": "float32", "batch": LOSS_BATCH, "count": min(spec["count"], LOSS_BATCH * LOSS_UPDATES)}
    losses = {}
    for system in SYSTEMS:
        losses[system] = run_child(__file__, {**spec, "system": system}, threads=options.threads)["losses"]
        say(f"{part} fp32 {system}: loss " + ", ".join(f"{loss:.6f}" for loss in losses[system]))
    return {"runs": runs, "losses": losses}


def middles(measured: dict) -> list[dict[str, float]]:
    """The medians of each system, in the order of SYSTEMS; `whole` is the time a pair takes in a run of one epoch."""
    return [medians(measured["runs"][system], ("update", "reference", "whole", "peak_bytes")) for system in SYSTEMS]


def ratios(measured: dict) -> dict[str, float]:
    """The part's line of JSON."""
    ours, default, precomputed = middles(measured)
    losses = measured["losses"]
    return {
        "vs_default": round(default["whole"] / ours["whole"], 3),
        "vs_precomputed": round(precomputed["update"] / ours["update"], 3),
        "memory": round(ours["peak_bytes"] / default["peak_bytes"], 3),
        "loss_difference": round(max(abs(losses["tunesmith"][-1] - losses[peer][-1]) for peer in SYSTEMS[1:]), 7),
    }


def report(measured: dict, results: dict, options: argparse.Namespace, shape: dict) -> str:
    """The tables in Markdown."""
    ratio_rows, rows = [], []
    for part, found in measured.items():
        ours, _, precomputed = middles(found)
        r = results[part]
        both = precomputed["whole"] / ours["whole"]
        ratio_rows.append(
            [
                part,
                f"{r['vs_default']:.2f}",
                f"{r['vs_precomputed']:.2f}",
                f"{both:.2f}",
                f"{r['memory']:.2f}",
                f"{r['loss_difference']:.1e}",
            ]
        )
        for system, middle in zip(SYSTEMS, middles(found), strict=True):
            runs = found["runs"][system]
            speeds = sorted(1 / run["whole"] for run in runs)
            speed = f"{1 / middle['whole']:.3f} ({speeds[0]:.3f}-{speeds[-1]:.3f})"
            reference = f"{middle['reference']:.3f}" if middle["reference"] else "in the update"
            memory, loss = f"{middle['peak_bytes'] / 2**20:.0f}", f"{found['losses'][system][-1]:.6f}"
            rows.append([part, system, speed, f"{middle['update']:.3f}", reference, memory, loss])
    source = "the project's own pairs" if Path(options.data).resolve() == PAIRS.resolve() else Path(options.data).name
    heads = ["part", "over TRL's defaults", "over precomputed, updates alone", "over precomputed, both passes counted"]
    heads += ["memory over TRL's defaults", "loss difference, fp32"]
    columns = ["part", "system", "pairs/CPU-s, one epoch (range)", "CPU-s a pair: update", "reference", "peak MiB", "last loss, fp32"]
    return "\n\n".join(
        [
            "    " + " ".join(["python", "benchmarks/dpo_vs_trl.py", *sys.argv[1:]]),
            f"{MODEL}, {source} ({shape['prompt']:.0f} tokens of prompt and {shape['answer']:.0f} of each answer on average), "
            f"{options.updates} updates of {BATCH} pairs of which {WARMUP} is a warm-up, bf16; {machine(options.threads)}; "
            f"median of {options.runs} interleaved runs in processes of their own; TRL {shape['trl']}, torch {shape['torch']}.",
            table(heads, ratio_rows),
            table(columns, rows),
        ]
    )


# ---- children --------------------------------------------------------------------------------------------------


def make_pairs(spec: dict) -> dict:
    """Renders the pairs as tunesmith does and writes them as {"prompt_ids", "chosen_ids", "rejected_ids"}, each without its first turn."""
    from importlib.metadata import version

    from tunesmith.data.items import render_items
    from tunesmith.data.read import read_records
    from tunesmith.data.template import load_template
    from tunesmith.errors import TemplateError
    from tunesmith.models.load import load_model
    from tunesmith.recipe import DataSection, ModelSection

    section = ModelSection(name=MODEL)
    loaded = load_model(section)
    found = read_records(spec["data"], DataSection(train=spec["data"]), system=None, quarantine=[], kinds=("pair",))
    start = loaded.tokenizer.convert_tokens_to_ids("<|im_start|>")
    pairs = []
    for rows in render_items(found.records[: 2 * spec["count"]], load_template(loaded.tokenizer, section), loaded.tokenizer, "last"):
        if isinstance(rows, TemplateError):
            continue
        first, cut = int(rows[0].weights.argmax()), rows[0].ids.tolist().index(start, 1)
        ends = [int(row.weights.nonzero()[0][-1]) + 1 for row in rows]  # what follows the last supervised token changes nothing
        chosen, rejected = (row.ids[first:end].tolist() for row, end in zip(rows, ends, strict=True))
        pairs.append({"prompt_ids": rows[0].ids[cut:first].tolist(), "chosen_ids": chosen, "rejected_ids": rejected})
    if len(pairs) < spec["count"]:
        raise SystemExit(f"{spec['data']} gives {len(pairs)} pairs, {spec['count']} are wanted: set --updates")
    pairs = pairs[: spec["count"]]
    Path(spec["file"]).write_text(json.dumps({"folder": loaded.identity.folder, "pairs": pairs}))
    tokens = {name: sum(len(pair[f"{name}_ids"]) for pair in pairs) / len(pairs) for name in ("prompt", "chosen", "rejected")}
    versions = {"trl": version("trl"), "torch": version("torch")}
    return {"prompt": tokens["prompt"], "answer": (tokens["chosen"] + tokens["rejected"]) / 2, **versions}


def read_pairs(spec: dict) -> tuple[str, list[dict]]:
    """The model's folder and the pairs."""
    stored = json.loads(Path(spec["pairs"]).read_text())
    return stored["folder"], stored["pairs"][: spec["count"]]


def run_tunesmith(spec: dict) -> dict:
    """Our engine, as train/stage.py puts it together, with train/offline.py's reference."""
    import numpy as np
    import torch

    from tunesmith.data.batching import DatasetSource
    from tunesmith.models.load import load_model
    from tunesmith.models.methods import attach
    from tunesmith.models.policy import Policy
    from tunesmith.objectives import OBJECTIVES
    from tunesmith.recipe import FullMethod, LoraMethod, ModelSection, Stage
    from tunesmith.train.memory import keep_freed_memory
    from tunesmith.train.offline import row_sums
    from tunesmith.train.optimiser import Optimiser
    from tunesmith.train.schedule import learning_rate
    from tunesmith.train.window import run_window

    folder, pairs = read_pairs(spec)
    method = FullMethod() if spec["method"] == "full" else LoraMethod(r=RANK)
    settings = {"type": "dpo", "beta": BETA}
    stage = Stage(name="dpo", objective=settings, method=method, learning_rate=RATE[spec["method"]])
    policy = Policy(attach(load_model(ModelSection(name=folder, dtype=spec["dtype"])), method, seed=SEED))
    policy.model.eval()
    objective, optimiser = OBJECTIVES["dpo"](stage.objective), Optimiser(policy.named_parameters(), stage)
    keep_freed_memory()
    torch.manual_seed(SEED)
    items = [[_row(np, pair, name) for name in ("chosen_ids", "rejected_ids")] for pair in pairs]
    size = {"batch_size": spec["batch"], "accumulation": 1, "seed": SEED, "trim": True}
    passed, sums = Stopwatch(WARMUP), []
    for batch in DatasetSource(items, **size).once():
        sums.append(row_sums(policy, [batch]))
        passed.lap()
    source, losses, watch = DatasetSource(items, columns={"reference_B": np.concatenate(sums)}, **size), [], Stopwatch(WARMUP)
    for step, batch in enumerate(source.once()):
        optimiser.zero_grad()
        result = run_window(policy, objective, [batch])
        rate = learning_rate(step, total=source.steps_per_epoch, warmup=0, peak=stage.learning_rate, kind="cosine")
        optimiser.step(rate, optimiser.grad_norm())
        losses.append(result.loss)
        watch.lap()
    return result_of(spec, watch, passed, losses)


def _row(np, pair: dict, name: str) -> tuple:
    """(ids, weights) of the prompt with one of its answers."""
    ids = pair["prompt_ids"] + pair[name]
    return np.array(ids), np.repeat(np.float32([0, 1]), [len(pair["prompt_ids"]), len(pair[name])])


def run_trl(spec: dict) -> dict:
    """TRL's DPOTrainer on the same pairs. Its own argument defaults stand wherever nothing must be made the same."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    folder, pairs = read_pairs(spec)
    fp32, precomputed = spec["dtype"] == "float32", spec["system"] == "trl_precomputed"
    longest = max(len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs)
    same = {
        "learning_rate": RATE[spec["method"]],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "num_train_epochs": 1,
        "seed": SEED,
        "train_sampling_strategy": "sequential",
        "max_length": max(1024, longest),
        "per_device_train_batch_size": spec["batch"],
        "beta": BETA,
        "precompute_ref_log_probs": precomputed,
    }
    if precomputed and not spec["checkpointing"]:
        same["gradient_checkpointing"] = False
    silent = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    watch, passed = Stopwatch(WARMUP), Stopwatch(WARMUP)

    class Laps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            watch.lap()

    class Trainer(DPOTrainer):
        """On token ids, and timing the reference's pass where that is done beforehand."""

        def _prepare_dataset(self, dataset, *rest):
            return dataset

        def compute_ref_log_probs(self, *given):
            found = super().compute_ref_log_probs(*given)
            passed.lap()
            return found

    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            folder,
            args=DPOConfig(output_dir=output, bf16=not fp32, **same, **silent),
            train_dataset=Dataset.from_list(pairs),
            peft_config=None if spec["method"] == "full" else lora,
            callbacks=[Laps()],
        )
        if fp32:
            start_like_ours(trainer.model, spec, folder)
        trainer.train()
    return result_of(spec, watch, passed, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def result_of(spec: dict, watch: Stopwatch, passed: Stopwatch, losses: list[float]) -> dict:
    """What a child answers: processor seconds a pair of updates and of the reference's pass, each after its warm-up."""
    timed = spec["count"] - WARMUP * spec["batch"]
    update, reference = (clock.seconds / timed if clock.laps else 0.0 for clock in (watch, passed))
    spent = {"update": update, "reference": reference, "whole": update + reference}
    return {**spent, "losses": losses, "peak_bytes": peak_bytes()}


if __name__ == "__main__":
    asked = child_spec()
    if asked is None:
        main()
    else:
        children = {"pairs": make_pairs, "tunesmith": run_tunesmith}
        answer(children.get(asked["system"], run_trl)(asked))
