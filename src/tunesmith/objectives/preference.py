"""Learning from pairs: DPO with its variants, SimPO, ORPO, CPO, and DPO on sampled pairs.

Each loss is a pure function of one number an answer, what the two answers are compared by, [I] items; the classes say which number that is.
The loss is the mean over pairs; cross-entropy on the chosen answers, where it is asked for, is a term of its own over its tokens' weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..data.batching import Batch
from ..models.policy import TokenOutputs
from ..recipe.objective import CPOObjective, DPOObjective, OnlineDPOObjective, ORPOObjective, SimPOObjective
from ._base import Term
from ._pairs import best_cross_entropy, best_weight, entropy_metric, log_ratios, pair_rows, preference_metrics, row_sums


def sigmoid_loss(difference_I: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(d) - e log sigmoid(-d), [I], with e the share of labels taken to be flipped.

    d is beta times the difference of log-ratios: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with e, Mitchell 2023's conservative DPO.
    """
    return -(1 - label_smoothing) * logsigmoid(difference_I) - label_smoothing * logsigmoid(-difference_I)


def robust_loss(difference_I: Tensor, *, flip_rate: float) -> Tensor:
    """(-(1 - e) log sigmoid(d) + e log sigmoid(-d)) / (1 - 2e), [I]: unbiased where a share e of labels is flipped.

    Chowdhury et al. 2024, arXiv:2403.00409, eq. 10.
    """
    return (-(1 - flip_rate) * logsigmoid(difference_I) + flip_rate * logsigmoid(-difference_I)) / (1 - 2 * flip_rate)


def ipo_loss(difference_I: Tensor, *, beta: float) -> Tensor:
    """(d - 1 / (2 beta))^2, [I], with d the difference of mean log-ratios: Azar et al. 2023, arXiv:2310.12036, eq. 17."""
    return (difference_I - 1 / (2 * beta)).square()


def simpo_loss(difference_I: Tensor, *, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta d - gamma), [I], with d the difference of mean log-probabilities: Meng et al. 2024, arXiv:2405.14734, eq. 6."""
    return -logsigmoid(beta * difference_I - gamma)


def log_odds(mean_logprob_I: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean log-probability), [I]; an answer that is certain counts as one just short of it."""
    logprob_I = mean_logprob_I.clamp(max=-torch.finfo(mean_logprob_I.dtype).eps)
    near_I = logprob_I > -math.log(2)  # each form of log(1 - p) is taken where it is exact, and kept finite where it is not
    far_I = torch.log1p(-torch.exp(torch.where(near_I, -1.0, logprob_I)))
    close_I = torch.log(-torch.expm1(torch.where(near_I, logprob_I, -0.1)))
    return logprob_I - torch.where(near_I, close_I, far_I)


def odds_ratio_loss(chosen_I: Tensor, rejected_I: Tensor) -> Tensor:
    """-log sigmoid(log odds(chosen) - log odds(rejected)), [I], of mean log-probabilities: Hong et al. 2024, arXiv:2403.07691, eq. 7."""
    return -logsigmoid(log_odds(chosen_I) - log_odds(rejected_I))


class PairObjective(ABC):
    """What pair losses share; each says by what answers are compared (`compared`) and the loss of two of them (`losses`)."""

    needs = frozenset({"logprobs", "entropy"})
    term = "preference"
    coefficient = 1.0
    """Weight of the pair loss."""
    beta: float
    """What a compared number is multiplied by to be an implicit reward."""
    sft_coef = 0.0
    """Weight of cross-entropy on the chosen answers."""

    @abstractmethod
    def compared(self, logprobs_S: Tensor, batch: Batch) -> Tensor:
        """The number by which answers are compared, [B] float64."""

    @abstractmethod
    def losses(self, chosen_I: Tensor, rejected_I: Tensor) -> Tensor:
        """Each pair's loss, [I]."""

    def divisors(self, batch: Batch) -> Mapping[str, float]:
        """The number of pairs; the chosen answers' weights."""
        divisors = {self.term: float(len(batch.items))}
        return divisors | ({"cross_entropy": float(best_weight(batch).sum(dtype="float64"))} if self.sft_coef else {})

    def terms(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, Term]:
        """The sum over pairs, and that of the chosen answers' cross-entropy."""
        chosen, rejected = pair_rows(batch)
        compared_B = self.compared(outputs.logprobs, batch)
        terms = {self.term: Term(self.losses(compared_B[chosen], compared_B[rejected]).sum(), self.coefficient)}
        return terms | ({"cross_entropy": best_cross_entropy(outputs.logprobs, batch, self.sft_coef)} if self.sft_coef else {})

    def metrics(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, tuple[float, float]]:
        """Implicit rewards (beta times what is compared) and log-probabilities of the chosen and the rejected; entropy."""
        logprobs_S = outputs.logprobs.detach()
        rewards_B = self.beta * self.compared(logprobs_S, batch)
        return {**preference_metrics(rewards_B, row_sums(logprobs_S, batch), *pair_rows(batch)), **entropy_metric(outputs)}


class DPO(PairObjective):
    """Direct preference optimisation: sigmoid, conservative, robust, IPO, length-normalised, and without a reference."""

    def __init__(self, settings: DPOObjective):
        self.loss, self.beta, self.smoothing, self.sft_coef = settings.loss, settings.beta, settings.label_smoothing, settings.sft_coef
        self.mean = settings.length_normalised or settings.loss == "ipo"
        self.reference = settings.reference != "none"

    def compared(self, logprobs_S: Tensor, batch: Batch) -> Tensor:
        """Log-ratios to the reference, or bare log-probabilities; a token's mean with IPO and where normalised."""
        return log_ratios(logprobs_S, batch, reference=self.reference, mean=self.mean)

    def losses(self, chosen_I: Tensor, rejected_I: Tensor) -> Tensor:
        """The loss that the settings name."""
        difference_I = chosen_I - rejected_I
        if self.loss == "ipo":
            return ipo_loss(difference_I, beta=self.beta)
        if self.loss == "robust":
            return robust_loss(self.beta * difference_I, flip_rate=self.smoothing)
        return sigmoid_loss(self.beta * difference_I, label_smoothing=self.smoothing)


class OnlineDPO(DPO):
    """DPO on the best and the worst of the policy's own answers (Guo et al. 2024, arXiv:2402.04792), which the batch holds as pairs."""

    def __init__(self, settings: OnlineDPOObjective):
        super().__init__(DPOObjective(loss=settings.loss, beta=settings.beta))


class _WithoutReference(PairObjective):
    """Pairs compared by log-probabilities alone."""

    mean = False

    def compared(self, logprobs_S: Tensor, batch: Batch) -> Tensor:
        """Log-probabilities of the answers, or their means over tokens."""
        return log_ratios(logprobs_S, batch, reference=False, mean=self.mean)


class SimPO(_WithoutReference):
    """Mean log-probability with a target margin."""

    mean = True

    def __init__(self, settings: SimPOObjective):
        self.beta, self.gamma, self.sft_coef = settings.beta, settings.simpo_gamma, settings.sft_coef

    def losses(self, chosen_I: Tensor, rejected_I: Tensor) -> Tensor:
        """SimPO's."""
        return simpo_loss(chosen_I - rejected_I, beta=self.beta, gamma=self.gamma)


class ORPO(_WithoutReference):
    """Cross-entropy on the chosen answers plus beta times the odds-ratio loss."""

    term = "odds_ratio"
    mean = True
    sft_coef = 1.0

    def __init__(self, settings: ORPOObjective):
        self.beta = self.coefficient = settings.beta

    def losses(self, chosen_I: Tensor, rejected_I: Tensor) -> Tensor:
        """The odds ratio's."""
        return odds_ratio_loss(chosen_I, rejected_I)

    def metrics(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, tuple[float, float]]:
        """As for pairs; log_odds_chosen, the log of the odds ratio."""
        chosen, rejected = pair_rows(batch)
        odds_B = log_odds(self.compared(outputs.logprobs.detach(), batch))
        ratio = {"log_odds_chosen": (float((odds_B[chosen] - odds_B[rejected]).sum()), float(len(chosen)))}
        return {**super().metrics(outputs, batch), **ratio}


class CPO(_WithoutReference):
    """DPO's sigmoid with a uniform reference plus cross-entropy on the chosen: Xu et al. 2024, arXiv:2401.08417, eq. 3 and 4."""

    def __init__(self, settings: CPOObjective):
        self.beta, self.smoothing, self.sft_coef = settings.beta, settings.label_smoothing, settings.sft_coef

    def losses(self, chosen_I: Tensor, rejected_I: Tensor) -> Tensor:
        """DPO's, on bare log-probabilities."""
        return sigmoid_loss(self.beta * (chosen_I - rejected_I), label_smoothing=self.smoothing)
