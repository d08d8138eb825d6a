"""Sampling against transformers' `generate`: new tokens a processor-second, at temperature 1, in batches of 32 and 64.

    python benchmarks/generate_vs_transformers.py [--json] [--data PATH] [--new-tokens N] [--runs N] [--threads N] [--write FILE]

Same model, same prompts, same length of answer (no token ends one), bf16 on CPU. transformers' side is its own `generate`: SDPA attention,
its default cache, prompts padded on the left. Ours is what rollouts and evaluation call. The prompts are chats up to the last turn; those
of the project share their system turn, which ours computes once: the steps after the first token are shown apart.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from _measure import answer, child_spec, machine, medians, peak_bytes, run_child, say, table

ROWS = Path(__file__).parents[1] / "recipes" / "helpdesk" / "train.jsonl"
MODEL = "smollm2-135m-instruct"
BATCHES = (32, 64)  # prompts at once
SYSTEMS = ("tunesmith", "transformers")
SEED = 0


# ---- parent ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs both systems in turns and prints the tables, and with --json one last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(ROWS), help='rows of {"messages": [...]}; each is asked up to its last turn')
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of each answer; at least 2")
    parser.add_argument("--runs", type=int, default=3, help="runs of each system; the median counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each run")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--write", metavar="FILE", help="write the tables to a file as well")
    options = parser.parse_args()
    if options.new_tokens < 2:
        parser.error("--new-tokens is at least 2")
    runs: dict[str, list[dict]] = {system: [] for system in SYSTEMS}
    with tempfile.TemporaryDirectory() as folder:
        spec = {"prompts": str(Path(folder) / "prompts.json"), "new_tokens": options.new_tokens}
        shape = run_child(__file__, {**spec, "system": "prompts", "data": options.data}, threads=1)
        for number in range(options.runs):
            for system in SYSTEMS:
                runs[system].append(run_child(__file__, {**spec, "system": system, "seed": SEED + number}, threads=options.threads))
                speeds = ", ".join(f"{runs[system][-1][f'{size}_speed']:.0f}" for size in BATCHES)
                say(f"{number + 1}/{options.runs} {system}: {speeds} tokens/CPU-s in batches of {BATCHES}")
    ours, theirs = (medians(runs[system], tuple(f"{size}_speed" for size in BATCHES)) for system in SYSTEMS)
    ratios = {f"batch_{size}": round(ours[f"{size}_speed"] / theirs[f"{size}_speed"], 3) for size in BATCHES}
    text = report(runs, ratios, shape, options)
    print(text)
    if options.write:
        Path(options.write).write_text(text + "\n")
    if options.json:
        print(json.dumps(ratios))


def report(runs: dict[str, list[dict]], ratios: dict[str, float], shape: dict, options: argparse.Namespace) -> str:
    """The tables in Markdown."""
    middle = {system: medians(results, tuple(key for key in results[0] if key != "peak_bytes")) for system, results in runs.items()}
    speed_rows, number_rows = [], []
    for size in BATCHES:
        ours, theirs = (middle[system] for system in SYSTEMS)
        parts = [theirs[f"{size}_{part}"] / ours[f"{size}_{part}"] for part in ("first", "steps")]
        speed_rows.append([str(size), f"{ratios[f'batch_{size}']:.2f}", *(f"{part:.2f}" for part in parts)])
        for system, results in runs.items():
            speeds = sorted(result[f"{size}_speed"] for result in results)
            spread = f"{middle[system][f'{size}_speed']:.0f} ({speeds[0]:.0f}-{speeds[-1]:.0f})"
            seconds = [f"{middle[system][f'{size}_{part}']:.2f}" for part in ("first", "steps")]
            number_rows.append([str(size), system, spread, *seconds])
    source = "the project's own prompts" if Path(options.data).resolve() == ROWS.resolve() else Path(options.data).name
    command = " ".join(["python", "benchmarks/generate_vs_transformers.py", *sys.argv[1:]])
    memory = " against ".join(f"{medians(runs[system], ('peak_bytes',))['peak_bytes'] / 2**20:.0f} MiB" for system in SYSTEMS)
    return "\n\n".join(
        [
            f"    {command}",
            f"{MODEL}, {source} ({shape['tokens']} tokens each on average, of which the first {shape['shared']} are common to all), "
            f"{options.new_tokens} new tokens each, temperature 1, bf16; {machine(options.threads)}; median of {options.runs} interleaved "
            f"runs in processes of their own. Peak memory {memory}.",
            table(["batch", "speed over transformers'", "to the first token", "steps after it"], speed_rows),
            table(["batch", "system", "new tokens/CPU-s (range)", "CPU-s to the first token", "CPU-s of the steps"], number_rows),
        ]
    )


# ---- children --------------------------------------------------------------------------------------------------


def write_prompts(spec: dict) -> dict:
    """Renders the prompts with the model's own template and writes them with the model's folder. Returns their lengths."""
    from tunesmith.generate.engine import shared_prefix_length
    from tunesmith.models.load import load_model
    from tunesmith.recipe import ModelSection

    loaded = load_model(ModelSection(name=MODEL))
    chats = [json.loads(line)["messages"] for line in Path(spec["data"]).read_text(encoding="utf-8").splitlines()[: max(BATCHES)]]
    if len(chats) < max(BATCHES):
        raise SystemExit(f"{spec['data']} holds {len(chats)} rows, {max(BATCHES)} are wanted")
    prompts = [loaded.tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False) for chat in chats]
    Path(spec["prompts"]).write_text(json.dumps({"folder": loaded.identity.folder, "prompts": prompts}))
    return {"tokens": round(sum(map(len, prompts)) / len(prompts)), "shared": shared_prefix_length(prompts)}


def run(spec: dict) -> dict:
    """One system: for each batch size the processor seconds to the first token and after it, and new tokens a second."""
    import torch

    stored = json.loads(Path(spec["prompts"]).read_text())
    model, generate = {"tunesmith": tunesmith, "transformers": transformers}[spec["system"]](stored["folder"], spec["seed"])
    laps: list[float] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: laps.append(time.process_time()))
    torch.manual_seed(spec["seed"])
    generate(stored["prompts"][:2], 3)  # the warm-up, our check against the plain model included
    result: dict[str, float] = {}
    for size in BATCHES:
        laps.clear()
        start = time.process_time()
        lengths = generate(stored["prompts"][:size], spec["new_tokens"])
        end = time.process_time()
        if lengths != [spec["new_tokens"]] * size:
            raise SystemExit(f"answers of {set(lengths)} tokens, {spec['new_tokens']} were asked for")
        result[f"{size}_first"], result[f"{size}_steps"] = laps[0] - start, end - laps[0]
        result[f"{size}_speed"] = size * spec["new_tokens"] / (end - start)
    return {**result, "peak_bytes": peak_bytes()}


def tunesmith(folder: str, seed: int):
    """Our model, and a function of prompts and length that gives the answers' lengths."""
    from tunesmith.generate import LocalGenerator, Sampling
    from tunesmith.models.load import load_model
    from tunesmith.recipe import ModelSection

    loaded = load_model(ModelSection(name=folder, dtype="bfloat16"))
    generator = LocalGenerator(loaded.model, loaded.tokenizer, batch_size=max(BATCHES))
    generator.stop_ids = frozenset()  # no token ends an answer

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        generations = generator.generate(prompts, max_new_tokens=new_tokens, sampling=Sampling(temperature=1.0, seed=seed), logprobs=True)
        return [len(generation.logprobs) for generation in generations]

    return loaded.model, generate


def transformers(folder: str, seed: int):
    """transformers' model, and the same function by its generate."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config = GenerationConfig()  # no token ends an answer, and nothing of the model's own settings applies

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
        said = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return [said.shape[1] - longest] * len(prompts)

    return model, generate


if __name__ == "__main__":
    asked = child_spec()
    if asked is None:
        main()
    else:
        answer(write_prompts(asked) if asked["system"] == "prompts" else run(asked))
