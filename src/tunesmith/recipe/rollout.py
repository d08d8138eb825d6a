"""Rollouts: how answers are sampled while training, and when a run that goes astray is stopped."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ._base import Section

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class RolloutSection(Section):
    """Sampling of the policy's answers. An update takes all of a batch's rollouts; the stage's batch size is that of one forward pass."""

    prompts_per_step: Annotated[int, Field(ge=1)] = 16
    """Prompts of one batch of rollouts."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Longest answer in tokens."""
    temperature: Positive = 1.0
    """Logits are divided by it, in sampling and in training alike."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The smallest set of tokens whose probability reaches it; 1 is all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """The most probable tokens; 0 is all."""
    server: str | None = None
    """An OpenAI-compatible vLLM server to sample from, which must allow adapters to be loaded at run time; null samples here."""
    server_model: str | None = None
    """The name under which the server serves the base; derived as the model's own."""
    importance_cap: Positive | None = 2.0
    """Where sampler and trainer differ, a token's weight is their ratio, at most this; null corrects nothing."""
    max_mismatch: Positive = 0.5
    """Mean absolute difference of sampler's and trainer's log-probabilities above which the run stops with an error."""
    max_unscorable: Share = 0.5
    """The share of answers without a reward above which the run stops with an error."""


class WatchSection(Section):
    """Stop rules: the stage ends where one is met, and the report says so. null switches a rule off."""

    max_kl: Positive | None = None
    """KL to the reference in nats a sequence."""
    max_length_ratio: Positive | None = None
    """Mean answer length over that of the first rollouts."""
    min_distinct: Share | None = 0.05
    """Share of a batch's answers that differ from one another: below it the policy has collapsed."""
    min_entropy: Positive | None = None
    """Mean entropy in nats a token."""
