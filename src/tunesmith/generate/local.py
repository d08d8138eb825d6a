"""A transformers causal language model as a `Generator`: batched, each shared token computed once, exact.

Takes the model as it is (a PEFT model too) and its tokenizer. The first call checks the fast way (engine.py) against the plain model on
its own first prompt, and so does the first one after training has taken the compiled loops out of the model; a model that the engine
does not know, or that disagrees, is served by transformers' own generate (fallback.py), and `notes` says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import ModelError
from ..models.dora import norms_kept
from ..models.fused import is_kept_plain, taking
from ..models.layout import unpackable_reason
from ..models.virtual import virtual_count
from .attention import NAME, attention_implementation
from .engine import CHECK_TOLERANCE, CHECK_TOLERANCE_HALF, Engine, why_no_loops
from .fallback import Fallback
from .protocol import GREEDY, Constraint, Generation, Sampling
from .rows import check_lengths, make_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of the first prompt that the fast way is checked on.
CHECKED_TOKENS = 64
KEPT_PLAIN = "on the first batch of training the layers that take them disagreed with the plain ones"


class LocalGenerator:
    """Generates and scores with a model in this process.

    batch_size: most prompts run together. stop_ids: tokens that end an answer beside the end tokens of the tokenizer and of the model's
    generation_config (of which nothing else is ever read); give the chat template's end-of-turn token here. notes: what a user should know,
    such as why the slow way is taken. Results do not depend on the batch in float32; in bf16 near-ties may fall otherwise
    (`batch_disagreement` counts them). While it works the model's layers and attention are others: one thread at a time a model.

    >>> LocalGenerator(model, tokenizer).generate([prompt_ids], max_new_tokens=8)[0].text  # doctest: +SKIP
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 50, stop_ids: Sequence[int] | None = None
    ):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(base, PreTrainedModel) or base.config.is_encoder_decoder:
            raise ModelError("generation needs a transformers causal language model", where=type(base).__name__)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.notes: list[str] = []
        self.stop_ids = _stop_ids(base, tokenizer, stop_ids)
        self._base = base
        self._engine: Engine | None = None
        self._checked = False
        self._max_positions: int | None = getattr(base.config.get_text_config(), "max_position_embeddings", None)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        constraint: Constraint | None = None,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> list[Generation]:
        """One generation a prompt (token ids), in the asked order; a prompt that is given several times is computed once.

        seeds: one a prompt, each of which fully decides its row's random stream. logprobs: whether the generations carry those of their
        tokens. An answer ends at a stop token, when the constraint is complete, after max_new_tokens, or where the model's context ends.
        Raises ModelError for a prompt that is empty or does not fit the context.
        """
        if not len(prompts):
            return []
        virtual = virtual_count(self.model)
        how = {"virtual": virtual, "seeds": seeds, "logprobs": logprobs}
        rows = make_rows(prompts, max_new_tokens, sampling, constraint, self._max_positions, **how)
        stop_ids = self.stop_ids if constraint is None else self.stop_ids | constraint.stop_ids
        with self._ready(prompts) as way:
            way.generate(rows, sampling, stop_ids)
        return [row.generation(self.tokenizer) for row in rows]

    def logprobs(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Natural log-probability of every answer token given its prompt and the answer before it: float32 [len(answer)] a pair.

        Raises ModelError for a prompt that is empty, and for a pair that does not fit the model's context.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts, {len(answers)} answers")
        virtual = virtual_count(self.model)
        whole = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        for rows in (prompts, whole):
            check_lengths(rows, self._max_positions, room=0, virtual=virtual)
        if not len(prompts):
            return []
        with self._ready(prompts) as way:
            return way.logprobs(prompts, answers)

    @contextmanager
    def _ready(self, prompts: Sequence[Sequence[int]]) -> Iterator[Engine | Fallback]:
        """The way to generate, with the model in evaluation mode, without gradients, and with the attention it needs."""
        plain = _plain_attention(self._base)
        with torch.no_grad(), _evaluating(self.model), norms_kept(self.model):
            if not self._checked or (self._engine is not None and self._engine.loops and is_kept_plain(self._base)):
                self._engine = self._checked_engine(prompts[0], plain)
                self._checked = True
            with (
                attention_implementation(self._base, NAME if self._engine else plain),
                taking(self._engine.forwards if self._engine else {}),
            ):
                yield self._engine or Fallback(self.model, self.batch_size)

    def _checked_engine(self, prompt: Sequence[int], plain_attention: str) -> Engine | None:
        """The engine, if the model is of a kind that it knows and it agrees with the plain model on the prompt's first tokens."""
        reason = _unknown_layout(self._base)
        if reason is None:
            ids = (list(prompt) * 8)[: max(8, min(len(prompt), CHECKED_TOKENS))]
            engine, left_out = None, {}
            if self._base.dtype == torch.bfloat16 and self._base.device.type == "cpu":
                without = KEPT_PLAIN if is_kept_plain(self._base) else why_no_loops(self._base)
                if without is None:
                    engine, without = self._tried(ids, plain_attention, loops=True)
                left_out = {"loops": without} if without is not None else {}
            if engine is None:
                engine, reason = self._tried(ids, plain_attention, loops=False)
            if engine is not None:
                name = type(self._base).__name__
                for path, why in (left_out | engine.refused).items():
                    self.notes.append(f"{name}: answers come without the compiled {path}, which is slower: {why}")
                return engine
        note = f"{type(self._base).__name__}: generation falls back to plain forwards and transformers' generate, which is slower: {reason}"
        self.notes.append(note)
        warnings.warn(note, stacklevel=4)
        return None

    def _tried(self, ids: list[int], plain_attention: str, *, loops: bool) -> tuple[Engine | None, str | None]:
        """An engine that agrees with the plain model on the ids; else None, and why there is none."""
        try:
            engine = Engine(self._base, self.model, self.batch_size, loops=loops)
            difference = engine.difference(ids, plain_attention)
        except (ModelError, AttributeError, TypeError, IndexError, RuntimeError) as error:  # what another layout may trip over
            return None, f"{type(error).__name__}: {error}"
        tolerance = CHECK_TOLERANCE.get(self._base.dtype, CHECK_TOLERANCE_HALF)
        if difference <= tolerance:
            return engine, None
        return None, f"its logits differ from the plain model's by {difference:.2g} (allowed {tolerance:.2g})"


def batch_disagreement(generator: LocalGenerator, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> float:
    """Share of the prompts, 0 to 1, whose greedy tokens differ between the generator's batches and each prompt alone; 0 in float32."""
    together = generator.generate(prompts, max_new_tokens=max_new_tokens)
    alone = [generator.generate([prompt], max_new_tokens=max_new_tokens)[0] for prompt in prompts]
    return sum(a.token_ids != b.token_ids for a, b in zip(together, alone, strict=True)) / max(1, len(prompts))


def _stop_ids(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: Sequence[int] | None) -> frozenset[int]:
    """The generation_config's and the tokenizer's end tokens, and those given."""
    configured = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    configured = [configured] if isinstance(configured, int) else configured or []
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset([*configured, *own, *(given or [])])


def _plain_attention(base: PreTrainedModel) -> str:
    """transformers' own attention that knows all that the model asks for."""
    return "sdpa" if base._supports_sdpa else "eager"


def _unknown_layout(base: PreTrainedModel) -> str | None:
    """Why the engine cannot run the model, as far as its config says, or None."""
    reason = unpackable_reason(base.config)
    if reason:
        return reason
    if getattr(base, "_is_stateful", False):
        return "it keeps a recurrent state"
    return None


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for the while (no dropout); every module's own mode comes back after."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
