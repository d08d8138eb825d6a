"""What must hold before the first update; each failure is an InvariantViolated that says what, where and the mend.

Run on the stage's own model and first batch: every row carries loss, answers end, texts begin once, what is computed is the model's own
function, packed rows do not see each other, a fresh adapter changes nothing, the fast paths agree with the plain ones, something trains.
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
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batching import Batch
from ..data.forest import build_forest
from ..errors import InvariantViolated
from ..models.adapters import POLICY, active_adapter, adapter_parameters
from ..models.load import LoadedModel
from ..models.policy import Policy
from ..objectives import Objective
from ..recipe import Stage
from ..rundir import world
from .devices import gather

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
GRADIENT_KINDS = (INPUTS, "lora_A", "lora_B")  # what does not share its size of gradients with the rest
START = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # nats a token; rows in other company round otherwise
OWN_LOGPROBS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}  # nats a token
OWN_GRADIENT = {torch.float32: 0.01, torch.bfloat16: 0.5, torch.float16: 0.2}  # relative
FRESH = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.02}  # nats a token
STARTS = ("base", "dtype", "adapter to start from", "setting, row, tokenizer or template")  # what processes may begin with otherwise
SAME_START = 1e-3  # of an adapter's norm: how far apart two processes' may lie; decompositions round, and a turned sign shows
SELDOM = 1 / 32  # of a rounding: an update of 0 that was computed as 1e-7 turns few of a layer's outputs to the next number
PROBE_B = 0.002
PROBE_TOKENS = 24
PROBE_WINDOW = 8  # of sliding attention while it is compared: two short rows are to show it


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


def starts_alike(stage: Stage, fingerprint: str, loaded: LoadedModel, model: nn.Module) -> None:
    """All processes begin with one base, adapter, dtype, rows and settings: gradients of different models would be added up in silence.

    model: not yet sharded. Raises InvariantViolated in all of them, naming one that differs from the first, and in what.
    """
    if world() == 1:
        return
    draw, along, squares = torch.Generator().manual_seed(0), 0.0, 0.0
    for tensor in adapter_parameters(model, POLICY).values() if isinstance(model, PeftModel) else ():
        flat = tensor.detach().float().cpu().flatten()
        along, squares = along + float(flat @ torch.randn(len(flat), generator=draw)), squares + float(flat @ flat)
    first, *others = gather([loaded.identity.sha256, str(loaded.dtype), along, fingerprint, squares])
    apart = SAME_START * first[4] ** 0.5  # one limit for all: all refuse, or none
    for number, other in enumerate(others, 1):
        same = [other[0] == first[0], other[1] == first[1], abs(other[2] - first[2]) <= apart, other[3] == first[3]]
        if not all(same):
            raise InvariantViolated(
                f"process {number} does not begin as process 0 does: it has another {STARTS[same.index(False)]}",
                where=f"stage {stage.name}",
                mend="give all machines the same files, versions and kind of processor, or name model.dtype",
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


def computes_the_models_own(policy: Policy) -> None:
    """Log-probabilities and gradients, of two rows that share a beginning, are those of the model's own forward, a row at a time.

    Compared are our attention, head and shared beginnings, on the bare base, whose sliding windows are narrow for the while, with
    transformers' plain attention.
    """
    causal, embed, generator = policy.causal, policy.backbone.get_input_embeddings(), np.random.default_rng(0)
    half = PROBE_TOKENS // 2
    ids = generator.integers(0, embed.weight.shape[0], 2 * PROBE_TOKENS)
    weights = np.r_[0, np.ones(PROBE_TOKENS + half - 1)].astype(np.float32)
    rows = [np.r_[ids[:PROBE_TOKENS], tail] for tail in np.split(ids[PROBE_TOKENS:], 2)]
    forest, known = build_forest([(row, weights) for row in rows]), np.unique(ids)
    with torch.enable_grad(), policy.deterministic(), active_adapter(policy.model, None), _narrow_windows(causal), policy.plain():
        weight = causal.get_output_embeddings().weight  # the base's: an adapter may bring a head of its own (PEFT's modules_to_save)
        head = [weight] if weight.requires_grad and weight.is_leaf else []  # what wraps it for new tokens makes its weight anew each time
        table = embed(torch.from_numpy(known).to(causal.device)).detach().requires_grad_()

        def looked_up(tokens: np.ndarray) -> Tensor:
            return table[torch.from_numpy(np.searchsorted(known, tokens)).to(causal.device)][None]

        found_S = policy(forest, embeddings=looked_up(forest.tokens_T)).logprobs
        ours = torch.cat([found_S[torch.from_numpy(forest.row_S == row).to(causal.device)] for row in range(len(rows))])
        gradients = torch.autograd.grad(ours.sum(), [table, *head])
        causal.set_attn_implementation("eager")  # policy.plain() puts ours back
        own = torch.cat([_own_logprobs(causal, embed, row, looked_up(row), policy.temperature) for row in rows])
        own_gradients = torch.autograd.grad(own.sum(), [table, *head])
    nats = float((ours - own).detach().abs().mean())
    pairs = zip(gradients, own_gradients, strict=True)
    apart = [float((mine.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-12)) for mine, theirs in pairs]
    if not (nats <= OWN_LOGPROBS[causal.dtype] and all(one <= OWN_GRADIENT[causal.dtype] for one in apart)):
        sizes = " and ".join(f"{one:.2g}" for one in apart)
        raise InvariantViolated(
            f"log-probabilities are {nats:.2g} nats a token from those of the model's own forward, gradients {sizes} of their size",
            where=type(causal).__name__,
            mend="this model computes something that training would leave out; tune another, or report it",
        )


def _own_logprobs(causal: PreTrainedModel, embed: torch.nn.Module, row: np.ndarray, embeddings_1TH: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [T - 1] of a row's tokens by the model as transformers runs it, from the given embeddings of its ids."""
    ids = torch.from_numpy(row).to(causal.device)[None]
    hook = embed.register_forward_hook(lambda module, inputs, output: embeddings_1TH)
    try:
        logits_TV = causal(input_ids=ids, use_cache=False).logits[0, :-1].float() / temperature
    finally:
        hook.remove()
    return torch.log_softmax(logits_TV, -1).gather(-1, ids[0, 1:, None])[:, 0]


@contextmanager
def _narrow_windows(causal: PreTrainedModel) -> Iterator[None]:
    """For a while, what is a sliding window of config or layers is PROBE_WINDOW tokens."""
    sliding = [one for one in (causal.config.get_text_config(), *causal.modules()) if isinstance(getattr(one, "sliding_window", None), int)]
    widths = [one.sliding_window for one in sliding]
    for one in sliding:
        one.sliding_window = PROBE_WINDOW
    try:
        yield
    finally:
        for one, width in zip(sliding, widths, strict=True):
            one.sliding_window = width


def no_leak(policy: Policy, vocabulary: int) -> None:
    """Two rows packed together give each row's own hidden states, and no gradient of the second's loss reaches the first.

    Gradients are compared with 0, in any dtype. Hidden states round otherwise alone: in 16 bits they are compared on the base without
    adapters, since a prefix's random keys make rounding as large as the states.
    """
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
    with torch.no_grad() if policy.causal.dtype == torch.float32 else policy.using(None):
        together = policy.hidden(inputs.detach(), pair)[node.start : node.end]
        alone = policy.hidden(embed(torch.from_numpy(second.tokens_T).to(policy.causal.device)[None]), second)
    outside = torch.ones(len(pair.tokens_T), dtype=torch.bool)
    outside[node.start : node.end] = False
    difference = float((together - alone).abs().max() / alone.float().std())
    if gradient[0][outside].any() or not difference <= LEAK[alone.dtype]:
        raise InvariantViolated(
            f"packed rows see each other (hidden states differ by {difference:.2g} of their spread)",
            where=policy.causal.config.model_type,
            mend="this model family cannot be packed; tune another, or report it",
        )


def fresh_adapter_changes_nothing(policy: Policy, batch: Any) -> None:
    """With a fresh adapter the log-probabilities are the base's; where rounding adds up in 16 bits, each layer's output is its base's."""
    if not isinstance(policy.model, PeftModel):
        return
    with torch.no_grad():
        tuned = policy(batch.forest).logprobs
        with policy.using(None):
            base = policy(batch.forest).logprobs
    difference = float((tuned - base).abs().mean())
    if difference <= FRESH[policy.causal.dtype]:
        return
    if policy.causal.dtype == torch.float32 or not _layers_only_round(policy, batch):
        raise InvariantViolated(
            f"a fresh adapter changes the log-probabilities by {difference:.2g} nats on average",
            where="method",
            mend="report it: the adapter starts wrong",
        )


def _layers_only_round(policy: Policy, batch: Any) -> bool:
    """Whether each LoRA layer, by its plain forward, gives what its base layer gives: a variant (DoRA) up to one rounding of the dtype."""
    one = torch.finfo(policy.causal.dtype).eps
    held: list[bool] = []

    def compare(layer: LoraLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        base = layer.get_base_layer()(*inputs)
        apart = float((output - base).float().norm() / base.float().norm().clamp_min(1e-12))
        held.append(apart <= (one if layer.lora_variant else SELDOM * one))  # NaN is not

    hooks = [module.register_forward_hook(compare) for module in policy.model.modules() if isinstance(module, LoraLayer)]
    try:
        with torch.no_grad(), policy.plain():
            policy(batch.forest)
    finally:
        for hook in hooks:
            hook.remove()
    return bool(held) and all(held)


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
        kind = next((kind for kind in GRADIENT_KINDS if kind in name), "matrix" if reference.dim() >= 2 else "vector")
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
