"""What a stage optimises. One settings class each; a new objective adds its class to the union."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ._base import PathText, Section
from .rewards import Reward

Coefficient = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]


class SFTObjective(Section):
    """Supervised fine-tuning: cross-entropy on the answers' tokens."""

    type: Literal["sft"] = "sft"
    """The objective's name."""
    train_on: Literal["all", "last"] = "all"
    """Which assistant turns carry loss: all of a conversation's, or the last; a message's own `weight` wins."""


class DPOObjective(Section):
    """Direct preference optimisation on pairs (Rafailov et al. 2023, arXiv:2305.18290)."""

    type: Literal["dpo"] = "dpo"
    """The objective's name."""
    loss: Literal["sigmoid", "ipo", "robust"] = "sigmoid"
    """sigmoid is DPO's own; ipo (arXiv:2310.12036) on mean log-ratios; robust (arXiv:2403.00409) undoes a known share of flipped labels."""
    beta: Positive = 0.1
    """How strongly the policy is held to the reference."""
    label_smoothing: Smoothing = 0.0
    """The share of labels taken to be flipped: conservative DPO with sigmoid, the flip rate of robust; ipo has none."""
    length_normalised: bool = False
    """Divide each answer's log-ratio by its number of tokens; ipo always does."""
    reference: PathText = "start"
    """What log-ratios are taken against: `start`, the model that the stage starts from (its name does as well), or `none`."""
    sft_coef: Coefficient = 0.0
    """Weight of cross-entropy on the chosen answers, beside the preference loss."""

    @model_validator(mode="after")
    def _ipo_flips_no_labels(self) -> DPOObjective:
        if self.loss == "ipo" and self.label_smoothing > 0:
            raise ValueError("label_smoothing: ipo has no flipped labels; leave it out, or take loss sigmoid or robust")
        return self


class SimPOObjective(Section):
    """SimPO: mean log-probability with a target margin, no reference (Meng et al. 2024, arXiv:2405.14734)."""

    type: Literal["simpo"] = "simpo"
    """The objective's name."""
    beta: Positive = 2.0
    """Scale of the difference in mean log-probability."""
    simpo_gamma: Coefficient = 1.0
    """The target margin."""
    sft_coef: Coefficient = 0.0
    """Weight of cross-entropy on the chosen answers."""


class ORPOObjective(Section):
    """ORPO: cross-entropy and an odds ratio, no reference (Hong et al. 2024, arXiv:2403.07691)."""

    type: Literal["orpo"] = "orpo"
    """The objective's name."""
    beta: Positive = 0.1
    """Weight of the odds-ratio term."""


class CPOObjective(Section):
    """Contrastive preference optimisation, no reference (Xu et al. 2024, arXiv:2401.08417)."""

    type: Literal["cpo"] = "cpo"
    """The objective's name."""
    beta: Positive = 0.1
    """Scale of the difference in log-probability."""
    label_smoothing: Smoothing = 0.0
    """The share of labels taken to be flipped."""
    sft_coef: Coefficient = 1.0
    """Weight of cross-entropy on the chosen answers."""


class KTOObjective(Section):
    """KTO on unpaired answers with a label (Ethayarajh et al. 2024, arXiv:2402.01306)."""

    type: Literal["kto"] = "kto"
    """The objective's name."""
    beta: Positive = 0.1
    """How strongly the policy is held to the reference."""
    desirable_weight: Coefficient = 1.0
    """Weight of the good answers."""
    undesirable_weight: Coefficient = 1.0
    """Weight of the bad answers."""


class RankingObjective(Section):
    """DPO on K-way rankings."""

    type: Literal["ranking"] = "ranking"
    """The objective's name."""
    loss: Literal["plackett_luce", "all_pairs"] = "plackett_luce"
    """Plackett-Luce over the whole order (Rafailov et al. 2023, appendix A.3), or the mean over all pairs (Ouyang et al. 2022)."""
    beta: Positive = 0.1
    """How strongly the policy is held to the reference."""
    reference: PathText = "start"
    """As in dpo."""
    sft_coef: Coefficient = 0.0
    """Weight of cross-entropy on the best answer."""


class RewardObjective(Section):
    """A reward model from pairs or rankings: a linear head on the last token (Ouyang et al. 2022, arXiv:2203.02155). Where a pair has a
    `margin`, all_pairs asks that its rewards differ by that much (arXiv:2307.09288)."""

    type: Literal["reward"] = "reward"
    """The objective's name."""
    loss: Literal["all_pairs", "plackett_luce"] = "all_pairs"
    """Bradley-Terry over all pairs of an item (one pair: the usual loss), or Plackett-Luce over its order."""
    center_rewards_coefficient: Coefficient = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps rewards near zero (Eisenstein et al. 2023, arXiv:2312.09244)."""


class PPOObjective(Section):
    """Proximal policy optimisation against a reward, held near the reference (Schulman et al. 2017; Ouyang et al. 2022)."""

    type: Literal["ppo"] = "ppo"
    """The objective's name."""
    reward_model: PathText | list[PathText] | None = None
    """An earlier stage, a run or a model folder that scores answers; several are an ensemble, whose disagreement is logged."""
    ensemble: Literal["mean", "min"] = "mean"
    """How several reward models are made one score; min is wary of hacking (Coste et al. 2023, arXiv:2310.02743)."""
    rewards: list[Reward] = []
    """Rewards computed by programs, beside or in place of the reward model."""
    kl_coef: Coefficient = 0.05
    """Weight of the KL to the reference, taken off the reward token by token."""
    target_kl: Positive | None = None
    """Nats a sequence that an adaptive coefficient steers to (Ziegler et al. 2019, arXiv:1909.08593); null keeps kl_coef."""
    num_ppo_epochs: Annotated[int, Field(ge=1)] = 2
    """Passes over each batch of rollouts."""
    num_mini_batches: Annotated[int, Field(ge=1)] = 1
    """Parts that each pass is cut into, an update each."""
    num_generations: Annotated[int, Field(ge=1)] = 1
    """Answers sampled for each prompt."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """GAE's lambda (Schulman et al. 2015, arXiv:1506.02438)."""
    cliprange: Positive = 0.2
    """The policy's ratio is clipped to 1 +- this."""
    cliprange_value: Positive = 0.2
    """The value's change is clipped to +- this."""
    vf_coef: Positive = 0.1
    """Weight of the value loss."""
    value: Literal["detached", "shared"] = "detached"
    """The value head reads detached hidden states, or sends its gradient into the policy's adapter too."""
    whiten_rewards: bool = False
    """Scale rewards to unit deviation over the rollouts before advantages are taken."""
    missing_eos_penalty: Coefficient = 0.0
    """Taken off the reward of an answer that did not end by itself."""

    @model_validator(mode="after")
    def _some_reward(self) -> PPOObjective:
        if not self.reward_model and not self.rewards:
            raise ValueError("ppo needs a reward_model or rewards")
        return self


class GRPOObjective(Section):
    """Group-relative policy optimisation, without a value function (Shao et al. 2024, arXiv:2402.03300)."""

    type: Literal["grpo"] = "grpo"
    """The objective's name."""
    rewards: Annotated[list[Reward], Field(min_length=1)]
    """What scores an answer; several are added by weight."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers of a group, sampled for one prompt."""
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "dapo"
    """Whose length normalisation: each answer's own mean (grpo), a constant (dr_grpo, arXiv:2503.20783), all tokens alike (dapo)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation advantages are divided by."""
    epsilon: Positive = 0.2
    """The ratio is clipped below 1 - epsilon."""
    epsilon_high: Positive | None = None
    """The ratio is clipped above 1 + this (clip-higher, arXiv:2503.14476); null is epsilon."""
    kl_coef: Coefficient = 0.0
    """Weight of the KL to the reference in the loss."""
    num_iterations: Annotated[int, Field(ge=1)] = 1
    """Updates from each batch of rollouts."""
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    """Times that prompts whose groups have no spread are replaced by others before an update (arXiv:2503.14476)."""


class RLOOObjective(Section):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv:2402.14740); the KL is part of the reward."""

    type: Literal["rloo"] = "rloo"
    """The objective's name."""
    rewards: Annotated[list[Reward], Field(min_length=1)]
    """What scores an answer; several are added by weight."""
    num_generations: Annotated[int, Field(ge=2)] = 4
    """Answers sampled for each prompt."""
    kl_coef: Coefficient = 0.05
    """Weight of the KL to the reference, taken off the reward of the sequence."""
    epsilon: Positive = 0.2
    """The sequence's ratio is clipped to 1 +- epsilon."""
    num_iterations: Annotated[int, Field(ge=1)] = 1
    """Updates from each batch of rollouts."""


class OnlineDPOObjective(Section):
    """DPO on pairs of the policy's own answers, ranked by a reward (Guo et al. 2024, arXiv:2402.04792)."""

    type: Literal["online_dpo"] = "online_dpo"
    """The objective's name."""
    rewards: Annotated[list[Reward], Field(min_length=1)]
    """What ranks the answers: the best and the worst of a group are the pair."""
    num_generations: Annotated[int, Field(ge=2)] = 2
    """Answers sampled for each prompt."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """As in dpo."""
    beta: Positive = 0.1
    """As in dpo."""


class BestOfNObjective(Section):
    """Rejection-sampling tuning: cross-entropy on the best of n sampled answers (Touvron et al. 2023, arXiv:2307.09288)."""

    type: Literal["best_of_n"] = "best_of_n"
    """The objective's name."""
    rewards: Annotated[list[Reward], Field(min_length=1)]
    """What chooses the best."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers sampled for each prompt."""


Objective = Annotated[
    SFTObjective
    | DPOObjective
    | SimPOObjective
    | ORPOObjective
    | CPOObjective
    | KTOObjective
    | RankingObjective
    | RewardObjective
    | PPOObjective
    | GRPOObjective
    | RLOOObjective
    | OnlineDPOObjective
    | BestOfNObjective,
    Field(discriminator="type"),
]
