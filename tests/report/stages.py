"""Events of a stage that samples its own answers, as a run logs them, and a run directory that holds them."""

from __future__ import annotations

import json
import math
import random

import yaml

from tunesmith.report._read import read_run


def ppo_events(steps=40, *, gold=lambda x: 0.3 + 0.35 * x - 0.7 * x * x, stop=None):
    """Events of a PPO stage of two updates a rollout, evaluated at every tenth step; the reward rises, gold is a function of progress."""
    rng, lines = random.Random(3), []
    for step in range(1, steps + 1):
        x = (step - 1) / steps
        lines.append(
            {
                "stage": "ppo",
                "step": step,
                "loss": 0.05 * rng.random(),
                "loss/policy": 0.01 * rng.random(),
                "loss/value": 0.7 * math.exp(-3 * x) + 0.02 * rng.random(),
                "iteration": float((step - 1) // 2),
                "kl": 9 * x + 0.2 * rng.random(),
                "entropy": 2.4 - 1.4 * x + 0.1 * rng.random(),
                "reward": -0.2 + 2.1 * x + 0.1 * rng.random(),
                "reward_std": 0.9 - 0.5 * x,
                "gold_reward": gold(x) + 0.02 * rng.random(),
                "unscorable": 1.0 if step in (5, 6) else 0.0,
                "groups_without_spread": 2.0,
                "mismatch": 0.03 + 0.005 * rng.random(),
                "mismatch_max": 0.15 + 0.05 * rng.random(),
                "length": 21 + 14 * x + rng.random(),
                "finished": 0.9 - 0.6 * x,
                "distinct": 1.0 - 0.6 * x,
                "repetition": 0.02 + 0.3 * x,
                "kl_coef": 0.05,
                "clip_ratio/region_mean": 0.05 + 0.1 * x,
                "value_clip_ratio": 0.01,
                "learning_rate": 2e-4 * (1 - x),
            }
        )
        if step % 10 == 0 or step == 1:
            answers = {"where is my lamp?": "It is on its way.", "it is broken": "Oh."} if step == 1 else HACKED
            samples = [{"prompt": one, "answer": answer, "reward": 0.1 + step / 10} for one, answer in answers.items()]
            held = {"eval_reward": 2 * x, "eval_gold_reward": gold(x), "eval_length": 21 + 14 * x, "samples": samples}
            lines.append({"stage": "ppo", "event": "evaluated", "step": step, "eval_loss": -2 * x, **held})
    if stop:
        lines.append({"stage": "ppo", "event": "stopped", "step": steps, **stop})
    return lines


HACKED = {
    "where is my lamp?": "Thank you! Thank you! Thank you! Please! Thank you!",
    "it is broken": "Thank you! Please! Thank you! Please!",
}
PPO = {
    "name": "ppo",
    "objective": {"type": "ppo", "reward_model": "reward", "num_generations": 4},
    "rollout": {"prompts_per_step": 12},
    "watch": {"max_kl": 10.0},
}


def put(run_path, events, *stages):
    (run_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    recipe = yaml.safe_load((run_path / "recipe.yaml").read_text())
    (run_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "stages": list(stages)}))
    return read_run(run_path)
