"""Supervised fine-tuning against TRL's SFTTrainer: useful tokens a processor-second, peak memory, and the loss after the same examples.

    python benchmarks/sft_vs_trl.py [--json] [--data PATH] [--rows N] [--runs N] [--threads N] [--write FILE]

Same model, rows, order, optimiser and schedule, batches of 8 rows, bf16 on CPU. Ours is what `tunesmith run` trains with.
TRL's defaults: fp32 weights under bf16 autocast, gradient checkpointing, padded batches. TRL's packing: the fastest of its
strategies on CPU, see PACKINGS. Four parts: LoRA and full tuning on rows that share nothing (the system turn is cut off), LoRA on the
rows as they are ("shared_prefix", a system turn of 148 tokens), and LoRA under a system turn of 500 tokens ("long_prefix"), which is theirs
with other rows as examples in it. Losses: short runs of
their own in fp32 and in bf16, in which TRL's adapter starts from the values of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from _measure import Stopwatch, answer, child_spec, machine, medians, peak_bytes, run_child, say, table

ROWS = Path(__file__).parents[1] / "recipes" / "helpdesk" / "train.jsonl"
MODEL = "smollm2-135m-instruct"
BATCH = 8  # rows of an update
WARMUP = 1  # updates before the clock starts
RATE, RANK, SEED = 2e-4, 16, 0
FULL_RATE = 2e-5
LOSS_BATCH = 4  # rows of an update in the runs that compare losses
LOSS_UPDATES = 3
PARTS: dict[str, tuple[str, int | None, int]] = {  # part: (method, tokens of the common system turn, updates of a timed run)
    "lora": ("lora", 0, 3),
    "full": ("full", 0, 3),
    "shared_prefix": ("lora", None, 2),  # as many as it has
    "long_prefix": ("lora", 500, 2),
}
SYSTEMS = ("tunesmith", "trl_default", "trl_packing")
PACKINGS = {  # TRL's strategies, with its checkpointing off, since that is faster; a step takes as many tokens as 8 rows have on average
    "wrapped": "the fastest on CPU; cuts rows, and lets them attend to the rows before them",
    "bfd": "keeps rows whole and apart by a T x T mask; slower on CPU, the slower the longer the pack",
}
WRAPPED_BLOCKS = 4  # of a wrapped step


# ---- parent ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs all parts and prints the table, and with --json one last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(ROWS), help="rows to train on, in any format that tunesmith reads")
    parser.add_argument("--rows", type=int, help="rows of each timed run, a multiple of 8; at least 16")
    parser.add_argument("--runs", type=int, default=3, help="runs of each system; the median counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each run")
    parser.add_argument("--packing", choices=PACKINGS, default="wrapped", help="TRL's packing strategy")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which parts to run")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--write", metavar="FILE", help="write the table to a file as well")
    options = parser.parse_args()
    if options.rows is not None and (options.rows < 2 * BATCH or options.rows % BATCH):
        parser.error(f"--rows is a multiple of {BATCH}, at least {2 * BATCH}")
    results, measured = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            measured[part] = measure(part, options, Path(folder))
            results[part] = ratios(measured[part])
    command = " ".join(["python", "benchmarks/sft_vs_trl.py", *sys.argv[1:]])
    text = report(measured, results, options, command)
    print(text)
    if options.write:
        Path(options.write).write_text(text + "\n")
    if options.json:
        print(json.dumps(results))


def measure(part: str, options: argparse.Namespace, folder: Path) -> dict:
    """All runs of one part: {"runs": {system: [result, ...]}, "losses": {dtype: {system: [loss of each update]}}}."""
    method, system_tokens, updates = PARTS[part]
    rows_file = str(folder / f"{part}.json")
    count = options.rows or updates * BATCH
    about = {"data": options.data, "system_tokens": system_tokens, "count": count, "file": rows_file}
    run_child(__file__, {"system": "rows", **about}, threads=1)
    spec = {"method": method, "rows": rows_file, "count": count, "batch": BATCH, "dtype": "bfloat16", "packing": options.packing}
    runs: dict[str, list[dict]] = {system: [] for system in SYSTEMS}
    for number in range(options.runs):
        for system in SYSTEMS:
            result = run_child(__file__, {**spec, "system": system}, threads=options.threads)
            runs[system].append(result)
            speed, memory = result["tokens_per_second"], result["peak_bytes"] / 2**20
            say(f"{part} {number + 1}/{options.runs} {system}: {speed:.0f} tokens/CPU-s, {memory:.0f} MiB, loss {result['losses'][-1]:.4f}")
    spec |= {"same_start": True, "batch": LOSS_BATCH, "count": min(count, LOSS_BATCH * LOSS_UPDATES)}
    losses: dict[str, dict[str, list[float]]] = {}
    for dtype in ("float32", "bfloat16"):
        losses[dtype] = {}
        for system in ("tunesmith", "trl_default"):
            found = run_child(__file__, {**spec, "system": system, "dtype": dtype}, threads=options.threads)["losses"]
            losses[dtype][system] = found
            say(f"{part} {dtype} {system}: loss " + ", ".join(f"{loss:.6f}" for loss in found))
    spec |= {"dtype": "float32", "count": LOSS_BATCH}  # one update, on the same rows as the others' first
    losses["float32"]["trl_packing"] = run_child(__file__, {**spec, "system": "trl_packing"}, threads=options.threads)["losses"]
    return {"runs": runs, "losses": losses}


def ratios(measured: dict) -> dict[str, float]:
    """The part's line of JSON."""
    middle = {system: medians(runs, ("tokens_per_second", "peak_bytes")) for system, runs in measured["runs"].items()}
    ours, default, packing = (middle[system] for system in SYSTEMS)
    exact, short = measured["losses"]["float32"], measured["losses"]["bfloat16"]
    reference = exact["trl_default"][-1]
    return {
        "vs_default": round(ours["tokens_per_second"] / default["tokens_per_second"], 3),
        "vs_packing": round(ours["tokens_per_second"] / packing["tokens_per_second"], 3),
        "memory": round(ours["peak_bytes"] / default["peak_bytes"], 3),
        "loss_difference": round(abs(exact["tunesmith"][-1] - reference), 7),
        "bf16_off": round(abs(short["tunesmith"][-1] / reference - 1), 6),
        "trl_bf16_off": round(abs(short["trl_default"][-1] / reference - 1), 6),
    }


def report(measured: dict, results: dict, options: argparse.Namespace, command: str) -> str:
    """The tables in Markdown."""
    numbers, rows = [], []
    for part, parts in measured.items():
        for system, runs in parts["runs"].items():
            speeds = sorted(run["tokens_per_second"] for run in runs)
            middle = medians(runs, ("tokens_per_second", "peak_bytes"))
            spread = f"{middle['tokens_per_second']:.0f} ({speeds[0]:.0f}-{speeds[-1]:.0f})"
            numbers.append(
                [part, system, str(runs[0]["tokens"]), spread, f"{middle['peak_bytes'] / 2**20:.0f}", f"{runs[0]['losses'][-1]:.4f}"]
            )
        r, losses = results[part], parts["losses"]["float32"]
        packed = abs(losses["trl_packing"][0] - losses["tunesmith"][0])
        differences = [f"{r['loss_difference']:.1e}", f"{r['bf16_off']:.2%}", f"{r['trl_bf16_off']:.2%}", f"{packed:.1e}"]
        rows.append([part, f"{r['vs_default']:.2f}", f"{r['vs_packing']:.2f}", f"{r['memory']:.2f}", *differences])
    source = "the project's own rows" if Path(options.data).resolve() == ROWS.resolve() else Path(options.data).name
    return "\n\n".join(
        [
            f"    {command}",
            f"{MODEL}, {source}, batches of {BATCH} rows, bf16; {machine(options.threads)}; median of {options.runs} interleaved runs in "
            "processes of their own.",
            table(
                [
                    "part",
                    "speed over TRL's defaults",
                    "over TRL's packing",
                    "memory over TRL's defaults",
                    "loss difference, fp32",
                    "our bf16 off TRL's fp32",
                    "TRL's bf16 off its fp32",
                    "packing's, first update",
                ],
                rows,
            ),
            table(["part", "system", "tokens timed", "useful tokens/CPU-s (range)", "peak MiB", "last loss, timed"], numbers),
        ]
    )


# ---- children --------------------------------------------------------------------------------------------------


def make_rows(spec: dict) -> dict:
    """Renders the rows as tunesmith does and writes them as {"ids", "labels"}, with a system turn of so many tokens; None: as it is."""
    from tunesmith.data.read import read_records
    from tunesmith.data.render import render_records
    from tunesmith.data.template import load_template
    from tunesmith.errors import TemplateError
    from tunesmith.models.load import load_model
    from tunesmith.recipe import DataSection, ModelSection

    section = ModelSection(name=MODEL)
    loaded = load_model(section)
    records = read_records(spec["data"], DataSection(train=spec["data"]), system=None, quarantine=[]).records
    rendered = render_records(records, load_template(loaded.tokenizer, section), loaded.tokenizer)
    start = loaded.tokenizer.convert_tokens_to_ids("<|im_start|>")
    rows = []
    for row in rendered:
        if isinstance(row, TemplateError):
            continue
        ids, labels = row.ids.tolist(), [int(i) if w else -100 for i, w in zip(row.ids, row.weights, strict=True)]
        end = ids.index(start, 1)
        if any(label != -100 for label in labels[end:]):
            rows.append((ids[:end], ids[end:], labels[end:]))
    if spec["system_tokens"]:  # rows that are not trained on go into the system turn, before its end and the line break after it
        others = loaded.tokenizer.encode("\n".join(loaded.tokenizer.decode(own) for _, own, _ in rows[spec["count"] :]))
        others = [token for token in others if token != start]
        rows = [(s[:-2] + others[: max(0, spec["system_tokens"] - len(s))] + s[-2:], *own) for s, *own in rows]
        if any(len(s) != spec["system_tokens"] for s, *_ in rows):
            raise SystemExit(
                f"{spec['data']} does not give system turns of {spec['system_tokens']} tokens: set --rows, or leave that part out"
            )
    elif spec["system_tokens"] == 0:
        rows = [([], *own) for _, *own in rows]
    rows = [{"input_ids": s + ids, "labels": [-100] * len(s) + labels} for s, ids, labels in rows]
    if len(rows) < spec["count"]:
        raise SystemExit(f"{spec['data']} holds {len(rows)} rows, {spec['count']} are wanted: set --rows")
    Path(spec["file"]).write_text(json.dumps({"folder": loaded.identity.folder, "rows": rows[: spec["count"]]}))
    return {}


def read_rows(spec: dict) -> tuple[str, list[dict]]:
    """The model's folder and the rows."""
    stored = json.loads(Path(spec["rows"]).read_text())
    return stored["folder"], stored["rows"][: spec["count"]]


def peak_rate(spec: dict) -> float:
    """The method's learning rate."""
    return FULL_RATE if spec["method"] == "full" else RATE


def run_tunesmith(spec: dict) -> dict:
    """Our engine, as train/stage.py puts it together."""
    import numpy as np
    import torch

    from tunesmith.data.batching import Batch
    from tunesmith.data.forest import build_forest
    from tunesmith.models.load import load_model
    from tunesmith.models.methods import attach
    from tunesmith.models.policy import Policy
    from tunesmith.objectives import OBJECTIVES
    from tunesmith.recipe import FullMethod, LoraMethod, ModelSection, Stage
    from tunesmith.train.memory import Holes, keep_freed_memory
    from tunesmith.train.optimiser import Optimiser
    from tunesmith.train.schedule import learning_rate
    from tunesmith.train.window import run_window

    folder, rows = read_rows(spec)
    method = FullMethod() if spec["method"] == "full" else LoraMethod(r=RANK)
    stage = Stage(name="sft", objective="sft", method=method, learning_rate=peak_rate(spec))
    policy = Policy(attach(load_model(ModelSection(name=folder, dtype=spec["dtype"])), method, seed=SEED))
    objective, optimiser = OBJECTIVES["sft"](), Optimiser(policy.named_parameters(), stage)
    keep_freed_memory()
    rows = [(np.array(row["input_ids"]), np.array([label != -100 for label in row["labels"]], dtype=np.float32)) for row in rows]
    torch.manual_seed(SEED)
    size, losses, watch, holes = spec["batch"], [], Stopwatch(WARMUP), Holes()
    total = len(rows) // size
    for step in range(total):
        mine = range(step * size, (step + 1) * size)
        optimiser.zero_grad()
        result = run_window(policy, objective, [Batch(build_forest([rows[i] for i in mine]), tuple(mine), np.arange(len(mine)))])
        optimiser.step(learning_rate(step, total=total, warmup=0, peak=stage.learning_rate, kind="cosine"), optimiser.grad_norm())
        losses.append(result.loss)
        holes.after_update()
        watch.lap()
    tokens = sum(len(ids) for ids, _ in rows[WARMUP * size :])
    return result_of(watch, tokens, losses)


def run_trl(spec: dict) -> dict:
    """TRL's SFTTrainer on the same rows. Its own argument defaults stand wherever nothing must be made the same."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    folder, rows = read_rows(spec)
    lengths = [len(row["input_ids"]) for row in rows]
    packing = spec["system"] == "trl_packing"
    fp32 = spec["dtype"] == "float32"
    same = {
        "learning_rate": peak_rate(spec),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "num_train_epochs": 1,
        "seed": SEED,
        "train_sampling_strategy": "sequential",
        "max_length": max(1024, *lengths),
        "per_device_train_batch_size": spec["batch"],
    }
    if packing:
        blocks = WRAPPED_BLOCKS if spec["packing"] == "wrapped" else 1
        block = -(-sum(lengths) // (len(rows) // spec["batch"] * blocks))
        same |= {"max_length": block if blocks > 1 else max(block, *lengths), "per_device_train_batch_size": blocks}
        same |= {"packing": True, "packing_strategy": spec["packing"], "gradient_checkpointing": False}
    same |= spec.get("options", {})
    silent = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    watch = Stopwatch(WARMUP)

    class Laps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            watch.lap()

    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            folder,
            args=SFTConfig(output_dir=output, bf16=not fp32, **same, **silent),
            train_dataset=Dataset.from_list(rows),
            peft_config=None if spec["method"] == "full" else lora,
            callbacks=[Laps()],
        )
        if spec.get("same_start"):
            start_like_ours(trainer.model, spec, folder)
        trainer.train()
    size = same["per_device_train_batch_size"]
    tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"][WARMUP * size :])
    return result_of(watch, tokens, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def start_like_ours(model, spec: dict, folder: str) -> None:
    """Gives TRL's adapter the values that ours starts from."""
    if spec["method"] == "full":
        return
    from tunesmith.models.load import load_model
    from tunesmith.models.methods import attach
    from tunesmith.recipe import LoraMethod, ModelSection

    ours = attach(load_model(ModelSection(name=folder, dtype="float32")), LoraMethod(r=RANK), seed=SEED)
    start = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert start.keys() == trained.keys(), "the adapters differ in their layers"
    for name, parameter in trained.items():
        parameter.data.copy_(start[name].data)


def result_of(watch: Stopwatch, tokens: int, losses: list[float]) -> dict:
    """What a child answers. tokens: of the rows after the warm-up, each row counted whole."""
    seconds = watch.seconds if len(watch.laps) > WARMUP else 0.0
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "losses": losses,
        "peak_bytes": peak_bytes(),
        "laps": len(watch.laps),
    }


if __name__ == "__main__":
    asked = child_spec()
    if asked is None:
        main()
    else:
        children = {"rows": make_rows, "tunesmith": run_tunesmith}
        answer(children.get(asked["system"], run_trl)(asked))
