"""Supervised fine-tuning on one GPU against TRL's SFTTrainer: useful tokens a second, MFU, peak memory, the loss after the same updates.

    python benchmarks/sft_gpu.py [--json] [--runs N] [--cases NAME ...] [--write FILE]

Models of Llama's shape with random weights, rows of random tokens, bf16, updates of 16k tokens in one pass. TRL: padding-free batches
of the same rows (a pack that is full to its last token), variable-length attention by flash-attn, or by torch's own where that is not
installed, Liger's layers where it is installed, checkpointing off. Without a GPU the same tables say NOT MEASURED.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

from _measure import Stopwatch, answer, child_spec, medians, run_child, say, table

NOT_MEASURED = "NOT MEASURED"
RATES = {"lora": 2e-4, "full": 2e-5}
RANK, SEED = 16, 0
WARMUP, UPDATES = 3, 13  # updates before the clock starts, since kernels are compiled in them; and in all
THREADS = 8
_LLAMA = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 8192, "head_dim": 64}
SHAPES = {
    "1.2B": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "0.14B": _LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}
LENGTHS = [128, 256, 512, 1152] * 8  # of an update's rows: 16,384 tokens, the second half of each row supervised
SHARED, ANSWER = 500, 40
CASES = {  # case: (shape, method, lengths of an update's rows, tokens that all rows begin with, floor, aim)
    "1.2B LoRA": ("1.2B", "lora", LENGTHS, 0, "1.4x; or 1.05x at 0.25x its memory", "1.8x"),
    "1.2B full": ("1.2B", "full", LENGTHS, 0, "1.0x", "1.15x, MFU 50%"),
    "0.14B LoRA": ("0.14B", "lora", LENGTHS, 0, "2.7x", "4x"),
    "0.14B full": ("0.14B", "full", LENGTHS, 0, "1.9x", "3x"),
    "1.2B LoRA, one system prompt": ("1.2B", "lora", [SHARED + ANSWER] * 30, SHARED, "3x", "5x"),
}
SYSTEMS = ("tunesmith", "tunesmith_checkpointing", "trl")
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # dense bf16 FLOP/s by the maker's sheet; of others no MFU


# ---- parent ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs all cases, or none where there is no GPU, and prints the tables; with --json one last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each system; the median counts")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which cases to run")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--write", metavar="FILE", help="write the tables to a file as well")
    options = parser.parse_args()
    device = run_child(__file__, {"system": "device"}, threads=1, gpu=True)
    measured = {case: measure(case, options.runs) if device["gpu"] else None for case in options.cases}
    text = report(measured, device, options.runs, " ".join(["python", "benchmarks/sft_gpu.py", *sys.argv[1:]]))
    print(text)
    if options.write:
        Path(options.write).write_text(text + "\n")
    if options.json:
        print(json.dumps({case: None if runs is None else ratios(runs) for case, runs in measured.items()}))


def measure(case: str, count: int) -> dict[str, list[dict]]:
    """All runs of a case, by system."""
    shape, method, lengths, shared, *_ = CASES[case]
    spec = {"shape": SHAPES[shape], "method": method, "lengths": lengths, "shared": shared, "dtype": "bfloat16"}
    spec |= {"updates": UPDATES, "warmup": WARMUP}
    runs: dict[str, list[dict]] = {system: [] for system in SYSTEMS}
    for number in range(count):
        for system in SYSTEMS:
            result = run_child(__file__, {**spec, "system": system}, threads=THREADS, gpu=True)
            runs[system].append(result)
            speed, memory = result["tokens_per_second"], result["peak_bytes"] / 2**30
            say(f"{case} {number + 1}/{count} {system}: {speed:.0f} tokens/s, {memory:.1f} GiB, loss {result['losses'][-1]:.4f}")
    return runs


def ratios(runs: dict[str, list[dict]]) -> dict[str, float]:
    """A case's line of JSON: ours over TRL's, as it is fastest and with checkpointing."""
    middle = {system: medians(results, ("tokens_per_second", "peak_bytes")) for system, results in runs.items()}
    losses = {system: results[0]["losses"][-1] for system, results in runs.items()}
    found = {"loss_difference": abs(losses["tunesmith"] - losses["trl"]) / losses["trl"]}
    for name, system in (("", "tunesmith"), ("checkpointing_", "tunesmith_checkpointing")):
        found[f"{name}speed"] = middle[system]["tokens_per_second"] / middle["trl"]["tokens_per_second"]
        found[f"{name}memory"] = middle[system]["peak_bytes"] / middle["trl"]["peak_bytes"]
    return {key: round(value, 5) for key, value in found.items()}


def report(measured: dict[str, dict | None], device: dict, count: int, command: str) -> str:
    """The tables in Markdown; a case without runs has the same rows, and no figures."""
    summary, numbers = [], []
    for case, runs in measured.items():
        floor, aim = CASES[case][4:]
        names = ("speed", "memory", "checkpointing_speed", "checkpointing_memory")
        cells = [NOT_MEASURED] * 5
        if runs is not None:
            r = ratios(runs)
            cells = [f"{r[name]:.2f}" for name in names] + [f"{r['loss_difference']:.2%}"]
        summary.append([case, floor, aim, *cells])
        for system in SYSTEMS:
            numbers.append([case, system, *([NOT_MEASURED] * 5 if runs is None else figures(runs[system], device["gpu"]))])
    where = f"{device['gpu']}; median of {count} interleaved runs in processes of their own." if device["gpu"] else "No GPU was at hand."
    return "\n\n".join(
        [
            f"    {command}",
            f"{where} {device['versions']}. Random weights, bf16, updates of 16k tokens; {UPDATES - WARMUP} updates timed after {WARMUP}.",
            table(
                [
                    "work",
                    "floor",
                    "aim",
                    "speed over TRL",
                    "memory over TRL",
                    "speed, with checkpointing",
                    "memory, with checkpointing",
                    "loss difference",
                ],
                summary,
            ),
            table(["work", "system", "useful tokens/s (range)", "MFU", "peak GiB", "last loss", "paths"], numbers),
            "MFU: 6 FLOPs a weight and computed token, 4 where weights are frozen, attention not counted, over the device's dense bf16 "
            "peak. A token that rows share is useful in each and computed once by tunesmith.",
        ]
    )


def figures(runs: list[dict], gpu: str) -> list[str]:
    """The cells of one system: speed, MFU, memory, loss, and what computed it."""
    middle = medians(runs, ("tokens_per_second", "flops_per_second", "peak_bytes"))
    speeds = sorted(run["tokens_per_second"] for run in runs)
    peak = next((peak for name, peak in PEAKS.items() if name in gpu), None)
    return [
        f"{middle['tokens_per_second']:.0f} ({speeds[0]:.0f}-{speeds[-1]:.0f})",
        NOT_MEASURED if peak is None else f"{middle['flops_per_second'] / peak:.0%}",
        f"{middle['peak_bytes'] / 2**30:.1f}",
        f"{runs[0]['losses'][-1]:.4f}",
        runs[0]["paths"],
    ]


# ---- children --------------------------------------------------------------------------------------------------


def describe_device(_spec: dict) -> dict:
    """The GPU's name, or None, and the versions that count."""
    import torch
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": name, "versions": f"torch {torch.__version__}, transformers {transformers.__version__}"}


def make_rows(spec: dict) -> list[list[tuple[list[int], int]]]:
    """For each update its rows: (token ids, the first supervised one's place); the same for every system."""
    import numpy as np

    rng, updates = np.random.default_rng(SEED), []
    shared = rng.integers(1, spec["shape"]["vocab_size"], spec["shared"]).tolist()
    for _ in range(spec["updates"]):
        own = [rng.integers(1, spec["shape"]["vocab_size"], length - len(shared)).tolist() for length in spec["lengths"]]
        updates.append([(shared + ids, len(shared) or len(ids) // 2) for ids in own])
    return updates


def make_model(spec: dict):
    """The model with its method's parameters made trainable."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunesmith.models.load import LoadedModel, ModelIdentity
    from tunesmith.models.methods import attach
    from tunesmith.recipe import FullMethod, LoraMethod

    torch.manual_seed(SEED)
    config = AutoConfig.for_model(**spec["shape"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    full = spec["method"] == "full"
    # TRL's full tuning keeps fp32 weights under autocast, as its optimiser has no other masters
    dtype = torch.float32 if full and spec["system"] == "trl" else getattr(torch, spec["dtype"])
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", dtype).eval()
    loaded = LoadedModel(model, None, ModelIdentity("random", "0" * 64, ""), dtype)
    return attach(loaded, FullMethod() if full else LoraMethod(r=RANK), seed=SEED)


def stopwatch(spec: dict) -> Stopwatch:
    """Wall time, of the GPU's work done."""
    import torch

    def clock() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    return Stopwatch(spec["warmup"], clock)


def run_tunesmith(spec: dict) -> dict:
    """Our engine, as train/stage.py puts it together."""
    import numpy as np
    import torch

    from tunesmith.data.batching import Batch
    from tunesmith.data.forest import build_forest
    from tunesmith.models.policy import Policy
    from tunesmith.objectives import OBJECTIVES
    from tunesmith.recipe import FullMethod, LoraMethod, Stage
    from tunesmith.train.invariants import fast_paths_agree
    from tunesmith.train.optimiser import Optimiser
    from tunesmith.train.schedule import learning_rate
    from tunesmith.train.window import run_window

    def batch_of(rows: list[tuple[list[int], int]]) -> Batch:
        weighted = [(np.array(ids), (np.arange(len(ids)) >= first).astype(np.float32)) for ids, first in rows]
        return Batch(build_forest(weighted), tuple(range(len(rows))), np.arange(len(rows)))

    updates, model = make_rows(spec), make_model(spec)
    method = FullMethod() if spec["method"] == "full" else LoraMethod(r=RANK)
    stage = Stage(name="sft", objective="sft", method=method, learning_rate=RATES[spec["method"]])
    policy = Policy(model, gradient_checkpointing=spec["system"] == "tunesmith_checkpointing")
    objective = OBJECTIVES["sft"]()
    fast_paths_agree(policy, objective, batch_of(updates[0][:2]))
    optimiser = Optimiser(policy.named_parameters(), stage)
    torch.manual_seed(SEED)
    losses, computed, watch = [], 0, stopwatch(spec)
    for step, rows in enumerate(updates):
        batch = batch_of(rows)
        optimiser.zero_grad()
        result = run_window(policy, objective, [batch])
        rate = learning_rate(step, total=len(updates), warmup=0, peak=stage.learning_rate, kind="cosine")
        optimiser.step(rate, optimiser.grad_norm())
        losses.append(result.loss)
        computed += len(batch.forest.tokens_T) * (step >= spec["warmup"])
        watch.lap()
    paths = [*policy.fast_paths.used, *(f"not {name}: {reason}" for name, reason in policy.fast_paths.refused.items())]
    return result_of(spec, model, watch, computed, losses, "; ".join(paths))


def run_trl(spec: dict) -> dict:
    """TRL's SFTTrainer on the same rows from the same weights, an update's rows as one padding-free batch."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    updates, model = make_rows(spec), make_model(spec)
    attention = "sdpa"
    if torch.cuda.is_available():
        attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else torch_varlen()
        model.set_attn_implementation(attention)
    rows = [{"input_ids": ids, "labels": [-100] * first + ids[first:]} for update in updates for ids, first in update]
    liger = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
    watch = stopwatch(spec)

    class Laps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            watch.lap()

    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                output_dir=output,
                learning_rate=RATES[spec["method"]],
                lr_scheduler_type="cosine",
                warmup_steps=0,
                num_train_epochs=1,
                seed=SEED,
                train_sampling_strategy="sequential",
                per_device_train_batch_size=len(spec["lengths"]),
                max_length=None,
                padding_free=True,
                gradient_checkpointing=False,
                use_liger_kernel=liger,
                bf16=spec["dtype"] == "bfloat16",
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>", eos_token="<pad>"
            ),
            callbacks=[Laps()],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    computed = sum(spec["lengths"]) * (spec["updates"] - spec["warmup"])
    return result_of(spec, model, watch, computed, losses, f"{attention}, {'Liger' if liger else 'no Liger'}")


def torch_varlen() -> str:
    """Registers torch's own variable-length attention with transformers; gives its name."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface

    def attend(module, query, key, value, attention_mask, scaling=None, **more):
        q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # under autocast positions are applied in fp32
        ends = (more["cu_seq_lens_q"], more["cu_seq_lens_k"], more["max_length_q"], more["max_length_k"])
        return varlen_attn(q, k, v, *ends, scale=scaling, window_size=(-1, 0), enable_gqa=True)[None], None

    AttentionInterface.register("torch_varlen", attend)
    return "torch_varlen"


def result_of(spec: dict, model, watch: Stopwatch, computed: int, losses: list[float], paths: str) -> dict:
    """What a child answers. computed: tokens of the timed updates that were computed."""
    from tunesmith.train.memory import peak_memory_bytes

    useful = sum(spec["lengths"]) * (spec["updates"] - spec["warmup"])
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name)
    return {
        "tokens_per_second": useful / watch.seconds,
        "computed": computed,
        "flops_per_second": (6 if spec["method"] == "full" else 4) * weights * computed / watch.seconds,
        "peak_bytes": peak_memory_bytes(),
        "losses": losses,
        "laps": len(watch.laps),
        "paths": paths,
    }


if __name__ == "__main__":
    asked = child_spec()
    if asked is None:
        main()
    else:
        answer({"device": describe_device, "trl": run_trl}.get(asked["system"], run_tunesmith)(asked))
