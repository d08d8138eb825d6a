"""Learning from sampled answers: GRPO steps a processor-second and peak memory against TRL's GRPOTrainer; PPO's own figure beside it.

    python benchmarks/grpo_vs_trl.py [PROMPTS] [--json] [--steps N] [--runs N] [--threads N] [--write FILE]

A step is sampling, scoring, and the updates from it. Same model, LoRA, prompts and order, 4 prompts x 8 answers of 40 tokens a step,
8 rows in a forward pass, temperature 1, beta 0, loss DAPO's, bf16 on CPU. Answers do not end by themselves: TRL gets min_new_tokens,
ours no stop tokens. TRL samples by transformers' generate; its other settings are its defaults. TRL has no PPO any more: ours stands
alone, with the same answers, a value head, a KL in the reward, and two updates a step. The reward is a cheap function of the text.
The system turn, which all prompts share, is cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _measure import Stopwatch, answer, child_spec, machine, medians, peak_bytes, run_child, say, table
from sft_vs_trl import MODEL, RANK, SEED

PROMPTS = Path(__file__).parents[1] / "recipes" / "replies" / "prompts.jsonl"
ASKED, ANSWERS, LENGTH = 4, 8, 40  # prompts of a step, answers to each, their tokens
ROWS = 8  # of a forward pass
WARMUP = 1  # steps before the clock starts
RATE = 1e-4
SYSTEMS = ("tunesmith", "trl_default", "tunesmith_ppo")


def variety(text: str) -> float:
    """The reward: distinct characters over characters."""
    return len(set(text)) / max(1, len(text))


# ---- parent ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs all systems and prints the tables, and with --json one last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompts", nargs="?", default=str(PROMPTS), help="rows to ask, in any prompt format that tunesmith reads")
    parser.add_argument("--steps", type=int, default=2, help="steps of each run, the first of which warms up; at least 2")
    parser.add_argument("--runs", type=int, default=3, help="runs of each system; the median counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each run")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--write", metavar="FILE", help="write the tables to a file as well")
    options = parser.parse_args()
    if options.steps <= WARMUP:
        parser.error(f"--steps is at least {WARMUP + 1}")
    runs: dict[str, list[dict]] = {system: [] for system in SYSTEMS}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "prompts.json")
        spec = {"prompts": file, "steps": options.steps}
        shape = run_child(__file__, {**spec, "system": "prompts", "data": options.prompts}, threads=1)
        for number in range(options.runs):
            for system in SYSTEMS:
                result = run_child(__file__, {**spec, "system": system}, threads=options.threads)
                runs[system].append(result)
                say(
                    f"{number + 1}/{options.runs} {system}: {result['step']:.2f} CPU-s a step, {result['sampling']:.2f} of it sampling, "
                    f"{result['peak_bytes'] / 2**20:.0f} MiB, answers of {result['length']:.1f} tokens, reward {result['reward']:.3f}"
                )
    middle = {system: medians(found, ("step", "sampling", "peak_bytes")) for system, found in runs.items()}
    ours, peer = middle["tunesmith"], middle["trl_default"]
    ratios = {"vs_default": round(peer["step"] / ours["step"], 3), "memory": round(ours["peak_bytes"] / peer["peak_bytes"], 3)}
    text = report(runs, middle, ratios, options, shape)
    print(text)
    if options.write:
        Path(options.write).write_text(text + "\n")
    if options.json:
        print(json.dumps({"lora": ratios}))


def report(runs: dict, middle: dict, ratios: dict, options: argparse.Namespace, shape: dict) -> str:
    """The tables in Markdown."""
    rows = []
    for system, found in runs.items():
        speeds, mine = sorted(1 / run["step"] for run in found), middle[system]
        speed = f"{1 / mine['step']:.4f} ({speeds[0]:.4f}-{speeds[-1]:.4f})"
        learning = mine["step"] - mine["sampling"]
        rows.append([system, speed, f"{mine['sampling']:.2f}", f"{learning:.2f}", f"{mine['peak_bytes'] / 2**20:.0f}"])
    ours, peer = middle["tunesmith"], middle["trl_default"]
    sampling = peer["sampling"] / ours["sampling"]
    learning = (peer["step"] - peer["sampling"]) / (ours["step"] - ours["sampling"])
    source = "the project's own prompts" if Path(options.prompts).resolve() == PROMPTS.resolve() else Path(options.prompts).name
    return "\n\n".join(
        [
            "    " + " ".join(["python", "benchmarks/grpo_vs_trl.py", *sys.argv[1:]]),
            f"{MODEL}, {source} ({shape['prompt']:.0f} tokens on average), {ASKED} prompts x {ANSWERS} answers of {LENGTH} tokens, "
            f"{options.steps} steps of which {WARMUP} is a warm-up, bf16; {machine(options.threads)}; "
            f"median of {options.runs} interleaved runs in processes of their own; TRL {shape['trl']}, torch {shape['torch']}.",
            table(
                ["GRPO, LoRA", "over TRL's defaults"],
                [
                    ["steps a CPU-second", f"{ratios['vs_default']:.2f}"],
                    ["of which sampling", f"{sampling:.2f}"],
                    ["of which the rest", f"{learning:.2f}"],
                    ["memory", f"{ratios['memory']:.2f}"],
                ],
            ),
            table(["system", "steps/CPU-s (range)", "CPU-s a step: sampling", "the rest", "peak MiB"], rows),
        ]
    )


# ---- children --------------------------------------------------------------------------------------------------


def make_prompts(spec: dict) -> dict:
    """Renders the prompts as tunesmith does and writes those whose text gives the same ids again, each without its first turn."""
    from importlib.metadata import version

    from tunesmith.data.items import render_items
    from tunesmith.data.read import read_records
    from tunesmith.data.template import load_template
    from tunesmith.errors import TemplateError
    from tunesmith.models.load import load_model
    from tunesmith.recipe import DataSection, ModelSection

    section = ModelSection(name=MODEL)
    loaded = load_model(section)
    tokenizer, wanted = loaded.tokenizer, spec["steps"] * ASKED
    found = read_records(spec["data"], DataSection(train=spec["data"]), system=None, quarantine=[], kinds=("prompt",))
    start, prompts = tokenizer.convert_tokens_to_ids("<|im_start|>"), []
    for rows in render_items(found.records[: 2 * wanted], load_template(tokenizer, section), tokenizer):
        if isinstance(rows, TemplateError):
            continue
        ids = rows[0].ids.tolist()
        ids = ids[ids.index(start, 1) :]
        text = tokenizer.decode(ids)
        if tokenizer(text)["input_ids"] == ids:
            prompts.append({"prompt": text, "ids": ids})
    if len(prompts) < wanted:
        raise SystemExit(f"{spec['data']} gives {len(prompts)} prompts, {wanted} are wanted: set --steps")
    prompts = prompts[:wanted]
    Path(spec["prompts"]).write_text(json.dumps({"folder": loaded.identity.folder, "prompts": prompts}))
    mean = sum(len(prompt["ids"]) for prompt in prompts) / wanted
    return {"prompt": mean, "trl": version("trl"), "torch": version("torch")}


def run_tunesmith(spec: dict) -> dict:
    """Our engine, as train/work.py and train/loop.py put it together, with a sampler that has no stop tokens."""
    import torch

    from tunesmith.models.heads import make_head
    from tunesmith.models.load import load_model
    from tunesmith.models.methods import attach
    from tunesmith.models.policy import Policy
    from tunesmith.objectives import OBJECTIVES
    from tunesmith.recipe import LoraMethod, ModelSection, Stage
    from tunesmith.train.memory import keep_freed_memory
    from tunesmith.train.optimiser import Optimiser
    from tunesmith.train.schedule import learning_rate
    from tunesmith.train.window import run_window

    stored = json.loads(Path(spec["prompts"]).read_text())
    kind = "ppo" if spec["system"] == "tunesmith_ppo" else "grpo"
    reward = {"type": "regex", "pattern": "."}  # the settings want one; the scorer below takes its place
    stage = Stage(
        name=kind,
        objective={"type": kind, "rewards": [reward], "num_generations": ANSWERS},
        method=LoraMethod(r=RANK),
        learning_rate=RATE,
        per_device_train_batch_size=ROWS,
        rollout={"prompts_per_step": ASKED, "max_new_tokens": LENGTH},
        watch={"min_distinct_ratio": None},
    )
    loaded = load_model(ModelSection(name=stored["folder"], dtype="bfloat16"))
    policy = Policy(attach(loaded, stage.method, seed=SEED))
    policy.model.eval()
    if kind == "ppo":
        policy.heads["value"] = make_head(loaded.width, seed=None)
    objective, optimiser = OBJECTIVES[kind](stage.objective), Optimiser(policy.named_parameters(), stage)
    keep_freed_memory()
    torch.manual_seed(SEED)
    sampling, lengths, rewards = [], [], []
    source = make_source(stage, policy, loaded, stored["prompts"], sampling)
    total, watch = spec["steps"] * source.updates, Stopwatch(WARMUP)
    for step in range(total):
        window = source.window(step)
        optimiser.zero_grad()
        run_window(policy, objective, window.batches)
        optimiser.step(learning_rate(step, total=total, warmup=0, peak=RATE, kind="cosine"), optimiser.grad_norm())
        if (step + 1) % source.updates == 0:
            watch.lap()
            lengths.append(window.metrics["length"])
            rewards.append(window.metrics["reward"])
    return result_of(spec, watch, sampling, lengths, rewards)


def make_source(stage: Any, policy: Any, loaded: Any, prompts: list[dict], spent: list[float]) -> Any:
    """The windows of the prompts in their order; each sampling's processor seconds are appended to `spent`."""
    import numpy as np

    from tunesmith.data.batching import epoch_order
    from tunesmith.data.preference import PromptOnly
    from tunesmith.data.records import Message, Source
    from tunesmith.generate import LocalGenerator
    from tunesmith.score.rewards import Scores
    from tunesmith.train.rollouts import Parts, RolloutSource
    from tunesmith.train.scoring import Prompt

    generator = LocalGenerator(policy.model, loaded.tokenizer, batch_size=64)
    generator.stop_ids = frozenset()

    def sample(asked, *, max_new_tokens, sampling, seeds, iteration):
        return timed(lambda: generator.generate(asked, max_new_tokens=max_new_tokens, sampling=sampling, seeds=seeds, logprobs=True))

    def timed(make: Callable[[], list]) -> list:
        began = time.process_time()
        made = make()
        spent.append(time.process_time() - began)
        return made

    def score(answers):
        total = np.array([variety(one.generation.text) for one in answers])
        return Scores(total, {"variety": total}, 0, {})

    def reference(forest):
        with policy.using(None):
            return policy(forest).logprobs

    order = epoch_order(SEED, 0, len(prompts))
    arranged = [prompts[i] for i in np.argsort(order)]  # what the source's order puts back
    asked = [
        Prompt(
            PromptOnly((Message("user", prompt["prompt"]),), {}, str(number), Source("prompts", number)),
            np.array(prompt["ids"], dtype=np.int64),
        )
        for number, prompt in enumerate(arranged)
    ]
    return RolloutSource(stage, Parts(policy, sample, score, reference), asked, [], seed=SEED)


def run_trl(spec: dict) -> dict:
    """TRL's GRPOTrainer on the same prompts. Its own argument defaults stand wherever nothing must be made the same."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    stored = json.loads(Path(spec["prompts"]).read_text())
    same = {
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "max_steps": spec["steps"],
        "seed": SEED,
        "shuffle_dataset": False,
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": ASKED * ANSWERS // ROWS,
        "num_generations": ANSWERS,
        "max_completion_length": LENGTH,
        "generation_kwargs": {"min_new_tokens": LENGTH},
        "beta": 0.0,
        "loss_type": "dapo",
    }
    silent = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    watch, sampling = Stopwatch(WARMUP), []

    class Laps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            watch.lap()

    class Trainer(GRPOTrainer):
        """Timing its sampling."""

        def _generate_single_turn(self, *given, **named):
            began = time.process_time()
            made = super()._generate_single_turn(*given, **named)
            sampling.append(time.process_time() - began)
            return made

    def reward(completions, **columns):
        return [variety(text) for text in completions]

    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            stored["folder"],
            reward_funcs=reward,
            args=GRPOConfig(output_dir=output, **same, **silent),
            train_dataset=Dataset.from_list([{"prompt": prompt["prompt"]} for prompt in stored["prompts"]]),
            peft_config=lora,
            callbacks=[Laps()],
        )
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    return result_of(spec, watch, sampling, [entry["completions/mean_length"] for entry in logged], [entry["reward"] for entry in logged])


def result_of(spec: dict, watch: Stopwatch, sampling: list[float], lengths: list[float], rewards: list[float]) -> dict:
    """What a child answers: processor seconds a step, and of its sampling, after the warm-up."""
    timed = spec["steps"] - WARMUP
    shares = {"step": watch.seconds / timed, "sampling": sum(sampling[WARMUP:]) / timed}
    return {**shares, "samplings": len(sampling), "length": lengths[-1], "reward": rewards[-1], "peak_bytes": peak_bytes()}


if __name__ == "__main__":
    asked = child_spec()
    if asked is None:
        main()
    else:
        children = {"prompts": make_prompts, "trl_default": run_trl}
        answer(children.get(asked["system"], run_tunesmith)(asked))
