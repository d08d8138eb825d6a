"""What must hold before the first update; each failure is an InvariantViolated that says what, where and the mend.

Run on the stage's own model and first batch: every row carries loss, answers end, texts begin once, packed rows do not see each
other, a fresh adapter changes nothing, the fast paths agree with the plain ones, something trains.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from ..data.batching import Batch
from ..data.forest import build_forest
from ..errors import InvariantViolated
from ..models.policy import Policy
from ..objectives import Objective

LEAK = {
    torch.float32: 1e-4,
    torch.bfloat16: 0.75,
    torch.float16: 0.1,
}  # largest difference in hidden states over their spread
FAST_LOSS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative, of the mean over LOSS_TOKENS or more
LOSS_TOKENS = 64  # over fewer, rounding cancels less: 6 tokens of a 135M Llama in bf16 differed by up to 3.7e-2
FAST_GRADIENT = {
    torch.float32: 0.014,
    torch.bfloat16: 0.25,
    torch.float16: 0.1,
}  # relative; rounding a 135M Llama to bf16 makes 0.05 to 0.1
INPUTS = "input embeddings"
KINDS = (INPUTS, "lora_A", "lora_B")  # what does not share its size of gradients with the rest
START = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # nats a token; rows in other company round otherwise
PROBE_B = 0.002
PROBE_TOKENS = 24


def every_row_carries_loss(rows: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str]) -> None:
    """At least one supervised token in every row kept."""
    empty = [names[i] for i, (_, weights) in enumerate(rows) if not np.any(weights)]
    if empty:
        raise InvariantViolated(
            f"{len(empty)} rows carry no loss: {', '.join(empty[:5])}", where="data", mend="give each an answer, or set data.too_long: drop"
        )


def every_answer_ends_with_a_stop(rows: Iterable[tuple[np.ndarray, np.ndarray]], names: Sequence[str], stops: Sequence[int]) -> None:
    """The last supervised token of every whole conversation is an end of turn, so that the model learns to stop."""
    endless = [name for name, (ids, weights) in zip(names, rows, strict=True) if ids[np.flatnonzero(weights)[-1]] not in stops]
    if endless:
        raise InvariantViolated(
            f"the end of turn carries no loss in {len(endless)} rows: {', '.join(endless[:5])}",
            where="model.chat_template",
            mend="use a template that ends each answer with a special token, such as chatml",
        )


def one_start_of_text(rows: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str], bos: int | None) -> None:
    """No row begins with two BOS tokens: the template's and one that the tokenizer added."""
    twice = [] if bos is None else [names[i] for i, (ids, _) in enumerate(rows) if len(ids) > 1 and ids[0] == ids[1] == bos]
    if twice:
        raise InvariantViolated(
            f"{len(twice)} rows begin with two BOS tokens: {', '.join(twice[:5])}",
            where="model.chat_template",
            mend="take the BOS out of the rows or out of the template",
        )


def starts_where_it_compares(policy: Policy, batches: Sequence[Batch]) -> None:
    """The policy of the first update is the one that its log-probabilities are compared with: DPO starts at ln 2, a first ratio is 1."""
    for batch in batches:
        compared = {
            what: _row_means(batch, batch.columns[name])
            for name, what in (("old_S", "the policy that sampled"), ("reference_S", "the reference"))
            if name in batch.columns
        }
        if "reference_B" in batch.columns:
            compared["the reference"] = batch.columns["reference_B"] / _row_tokens(batch)
        if not compared:
            return
        with torch.no_grad(), policy.deterministic():
            mine = _row_means(batch, policy(batch.forest).logprobs.double().cpu().numpy())
        for what, theirs in compared.items():
            difference = float(np.abs(mine - theirs).mean())
            if not difference <= START[policy.causal.dtype]:
                raise InvariantViolated(
                    f"the policy starts {difference:.3g} nats a token away from {what}, not at it",
                    where="the first update",
                    mend="start the stage from what it is compared with",
                )


def _row_tokens(batch: Batch) -> np.ndarray:
    return np.bincount(batch.forest.row_S, minlength=len(batch.forest.lengths_B)).clip(min=1)


def _row_means(batch: Batch, value_S: np.ndarray) -> np.ndarray:
    return np.bincount(batch.forest.row_S, weights=value_S, minlength=len(batch.forest.lengths_B)) / _row_tokens(batch)


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
    """Compares loss and gradients on a batch with the plain layers; if they differ the fast paths are taken out. Gives what was."""
    if not policy.fast_paths.used:
        return []
    with _adapters_that_change_something(policy):
        loss, gradients = _loss_and_gradients(policy, objective, batch)
        with policy.plain():
            plain_loss, plain_gradients = _loss_and_gradients(policy, objective, batch)
    dtype = policy.causal.dtype
    differences = _differences(gradients, plain_gradients)
    allowed = FAST_LOSS[dtype] * math.sqrt(max(1.0, LOSS_TOKENS / max(1, len(batch.forest.target_S))))
    if abs(loss - plain_loss) <= allowed * abs(plain_loss) and all(d <= FAST_GRADIENT[dtype] for d in differences.values()):
        return []
    taken = sorted(policy.fast_paths.used)
    policy.make_plain()
    return taken


@contextmanager
def _adapters_that_change_something(policy: Policy) -> Iterator[None]:
    """For a while, every LoRA B holds small random numbers: where it is 0, so is the gradient towards A."""
    held = {p: p.detach().clone() for name, p in policy.named_parameters() if ".lora_B." in name}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in held:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * PROBE_B)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in held.items():
                parameter.copy_(value)


def _differences(ours: dict[str, Tensor | None], plain: dict[str, Tensor | None]) -> dict[str, float]:
    """By kind of parameter, how far the gradients are apart, relative to the plain ones."""
    apart: dict[str, float] = defaultdict(float)
    whole: dict[str, float] = defaultdict(float)
    for name, reference in plain.items():
        if reference is None and ours[name] is None:  # an expert that no token went to
            continue
        reference = torch.zeros_like(ours[name]) if reference is None else reference
        mine = torch.zeros_like(reference) if ours[name] is None else ours[name]
        kind = next((kind for kind in KINDS if kind in name), "matrix" if reference.dim() >= 2 else "vector")
        apart[kind] += float(torch.linalg.vector_norm(mine.float() - reference.float())) ** 2
        whole[kind] += float(torch.linalg.vector_norm(reference.float())) ** 2
    return {kind: math.sqrt(apart[kind] / whole[kind]) if whole[kind] else math.inf if apart[kind] else 0.0 for kind in apart}


def _loss_and_gradients(policy: Policy, objective: Objective, batch: Any) -> tuple[float, dict[str, Tensor | None]]:
    """The loss; its gradient towards the input embeddings, which every layer's backward pass has gone through, and towards what trains."""
    tokens = torch.from_numpy(batch.forest.tokens_T).to(policy.causal.device)[None]
    inputs = policy.backbone.get_input_embeddings()(tokens).detach().requires_grad_()
    divisors = objective.divisors(batch)
    terms = objective.terms(policy(batch.forest, objective.needs, embeddings=inputs), batch)
    loss = torch.stack([term.coefficient * term.sum / divisors[name] for name, term in terms.items() if divisors[name]]).sum()
    named = {INPUTS: inputs} | {name: p for name, p in policy.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return float(loss.detach()), dict(zip(named, gradients, strict=True))
