"""What a stage optimises: pure functions from a policy's outputs and a batch to sums with their divisors."""

from collections.abc import Callable, Mapping
from typing import Any

from ._advantages import (
    GroupAdvantages,
    adaptive_kl,
    gae,
    group_advantages,
    leave_one_out,
    sequence_rewards,
    token_rewards,
    whiten,
    without_spread,
)
from ._base import Objective, Term
from .grpo import GRPO, RLOO
from .kto import KTO, kto_z0
from .ppo import PPO
from .preference import CPO, DPO, ORPO, OnlineDPO, SimPO
from .ranking import Ranking
from .reward import RewardLoss
from .sft import SFT, BestOfN

OBJECTIVES: Mapping[str, Callable[[Any], Objective]] = {
    "sft": SFT,
    "dpo": DPO,
    "simpo": SimPO,
    "orpo": ORPO,
    "cpo": CPO,
    "kto": KTO,
    "ranking": Ranking,
    "reward": RewardLoss,
    "ppo": PPO,
    "grpo": GRPO,
    "rloo": RLOO,
    "online_dpo": OnlineDPO,
    "best_of_n": BestOfN,
}
"""The class of each objective that a recipe can name, made with that objective's settings."""

__all__ = [
    "CPO",
    "DPO",
    "GRPO",
    "KTO",
    "OBJECTIVES",
    "ORPO",
    "PPO",
    "RLOO",
    "SFT",
    "BestOfN",
    "GroupAdvantages",
    "Objective",
    "OnlineDPO",
    "Ranking",
    "RewardLoss",
    "SimPO",
    "Term",
    "adaptive_kl",
    "gae",
    "group_advantages",
    "kto_z0",
    "leave_one_out",
    "sequence_rewards",
    "token_rewards",
    "whiten",
    "without_spread",
]
