"""The peak learning rate of a stage that names none, of its method, the model's width and its objective.

A method's rate is what a sweep on SmolLM2-135M found (`benchmarks/methods.py`): the lowest whose validation loss is within 3% of the
sweep's best. A wider model takes less of it, as its hidden size is larger, which is how rates transfer across widths under AdamW (Yang et
al. 2022, arXiv:2203.03466, table 3); a narrower one takes no more. Objectives that start from what a model does already, and move it by
comparisons or rewards, take a tenth.
"""

from __future__ import annotations

import math

from ..recipe.method import Method
from ..recipe.objective import Objective

WIDTH = 576  # hidden size of the model that was swept
SWEPT = {
    "full": 3e-4,
    "partial": 1e-3,
    "lora": 1.5e-3,
    "dora": 1.5e-3,
    "pissa": 5e-4,
    "qlora": 4.5e-3,
    "ia3": 2e-2,
    "houlsby": 1.5e-3,
    "pfeiffer": 1.5e-3,
    "parallel": 4.5e-3,
    "prefix": 1.5e-1,
    "prompt": 1e-2,
    "p_tuning": 3e-3,
}
SUPERVISED = ("sft", "best_of_n", "reward")
OTHERWISE = 0.1  # of a method's rate, in preferences and reinforcement


def usual_rate(method: Method, objective: Objective, *, width: int, quantised: bool) -> float:
    """A peak rate for AdamW, to two digits. width: the model's hidden size. quantised: whether its weights are held in bits."""
    rate = SWEPT[swept_as(method, quantised=quantised)] * min(1.0, WIDTH / width)
    if method.type == "lora":  # what trains fastest goes at the swept rate: rsLoRA's scale is so much larger, LoRA+'s B so much faster
        rate /= method.loraplus_lr_ratio * (math.sqrt(method.r) if method.use_rslora else 1.0)
    return float(f"{rate if objective.type in SUPERVISED else OTHERWISE * rate:.2g}")


def swept_as(method: Method, *, quantised: bool) -> str:
    """The method's name in the sweep; what was not swept goes by what is nearest to it."""
    if method.type == "bottleneck":
        return method.architecture
    if method.type != "lora":
        return method.type
    if method.init_lora_weights == "pissa":
        return "pissa"
    return "dora" if method.use_dora else "qlora" if quantised else "lora"
