"""What must hold before the first update; each failure is an InvariantViolated that says what, where and the mend.

Run on the stage's own model and first batch: every row carries loss, packed rows do not see each other, a fresh adapter changes nothing,
the fast paths agree with the plain ones, something trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from ..data.forest import build_forest
from ..errors import InvariantViolated
from ..models.policy import Policy
from ..objectives import Objective

LEAK = {torch.float32: 1e-4, torch.bfloat16: 0.75}  # largest difference in hidden states, relative to their spread: rounding, not attention
FAST_LOSS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative
FAST_GRADIENT = {torch.float32: 0.9999, torch.bfloat16: 0.99}  # cosine
PROBE_TOKENS = 24


def every_row_carries_loss(rows: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str]) -> None:
    """At least one supervised token in every row kept."""
    empty = [names[i] for i, (_, weights) in enumerate(rows) if not np.any(weights)]
    if empty:
        raise InvariantViolated(
            f"{len(empty)} rows carry no loss: {', '.join(empty[:5])}", where="data", mend="give each an answer, or set data.too_long: drop"
        )


def something_trains(policy: Policy) -> None:
    """The method matched at least one parameter."""
    if not any(p.requires_grad for p in policy.parameters()):
        raise InvariantViolated("no parameter trains", where="method", mend="name target_modules that the model has")


def no_leak(policy: Policy, vocabulary: int) -> None:
    """Two rows packed together give each row's own hidden states, and no gradient of the second's loss reaches the first."""
    generator = np.random.default_rng(0)
    weights = np.r_[0, np.ones(PROBE_TOKENS - 1)].astype(np.float32)
    # in the forest's order: a causal leak shows in the later row only
    ids = sorted(generator.integers(0, vocabulary, (2, PROBE_TOKENS)).tolist())
    rows = [(np.array(row), weights) for row in ids]
    embed = policy.backbone.get_input_embeddings()
    pair, second = build_forest(rows, min_shared=PROBE_TOKENS + 1), build_forest(rows[1:])
    node = next(n for n in pair.nodes if n.end - 1 == pair.last_B[1])
    with torch.enable_grad():
        inputs = embed(torch.from_numpy(pair.tokens_T).to(policy.causal.device)[None]).detach().requires_grad_()
        together = policy.hidden(inputs, pair)[node.start : node.end]
        (gradient,) = torch.autograd.grad(together.float().square().sum(), inputs)
    with torch.no_grad():
        alone = policy.hidden(embed(torch.from_numpy(second.tokens_T).to(policy.causal.device)[None]), second)
    outside = torch.ones(len(pair.tokens_T), dtype=torch.bool)
    outside[node.start : node.end] = False
    difference = float((together.detach() - alone).abs().max() / alone.float().std())
    if gradient[0][outside].any() or not difference <= LEAK[alone.dtype]:
        raise InvariantViolated(
            f"packed rows see each other (hidden states differ by {difference:.2g} of their spread)",
            where=policy.causal.config.model_type,
            mend="this model family cannot be packed; tune another, or report it",
        )


def fresh_adapter_changes_nothing(policy: Policy, batch: Any) -> None:
    """With a fresh adapter the log-probabilities are the base's."""
    if not isinstance(policy.model, PeftModel):
        return
    with torch.no_grad():
        tuned = policy(batch.forest).logprobs
        with policy.model.disable_adapter():
            base = policy(batch.forest).logprobs
    difference = float((tuned - base).abs().mean())
    if not difference <= (1e-5 if policy.causal.dtype == torch.float32 else 2e-2):
        raise InvariantViolated(
            f"a fresh adapter changes the log-probabilities by {difference:.2g} nats on average",
            where="method",
            mend="report it: the adapter starts wrong",
        )


def fast_paths_agree(policy: Policy, objective: Objective, batch: Any) -> list[str]:
    """Compares loss and gradient on a batch with the plain layers; if they differ the fast paths are taken out. Gives what was."""
    if not policy.fast_paths.used:
        return []
    loss, gradient = _loss_and_gradient(policy, objective, batch)
    with policy.plain():
        plain_loss, plain_gradient = _loss_and_gradient(policy, objective, batch)
    dtype = policy.causal.dtype
    cosine = float(torch.nn.functional.cosine_similarity(gradient, plain_gradient, dim=0))
    if abs(loss - plain_loss) <= FAST_LOSS[dtype] * abs(plain_loss) and cosine >= FAST_GRADIENT[dtype]:
        return []
    taken = sorted(policy.fast_paths.used)
    policy.make_plain()
    return taken


def _loss_and_gradient(policy: Policy, objective: Objective, batch: Any) -> tuple[float, Tensor]:
    """The loss and the gradient towards the input embeddings, which every layer's backward pass has gone through."""
    inputs = (
        policy.backbone.get_input_embeddings()(torch.from_numpy(batch.forest.tokens_T).to(policy.causal.device)[None])
        .detach()
        .requires_grad_()
    )
    divisors = objective.divisors(batch)
    terms = objective.terms(policy(batch.forest, objective.needs, embeddings=inputs), batch)
    loss = torch.stack([term.coefficient * term.sum / divisors[name] for name, term in terms.items() if divisors[name]]).sum()
    (gradient,) = torch.autograd.grad(loss, inputs)
    return float(loss.detach()), gradient.float().flatten()
