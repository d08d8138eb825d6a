"""Rollouts: how answers are sampled while training, and when a run that goes astray is stopped."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ._base import Section

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class RolloutSection(Section):
    """Sampling of the policy's answers. An update takes all rollouts, or its part of them; the batch size is that of a pass."""

    prompts_per_step: Annotated[int, Field(ge=1)] = 16
    """Prompts of one batch of rollouts."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Longest answer in tokens."""
    temperature: Positive = 1.0
    """Logits are divided by it, in sampling and in training alike."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The smallest set of tokens whose probability reaches it; 1 is all. Below 1 no KL can be measured: what uses it refuses."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """The most probable tokens; 0 is all; above 0 as for top_p."""
    server: str | None = None
    """An OpenAI-compatible vLLM server to sample from, which must allow adapters to be loaded at run time; null samples here."""
    server_model: str | None = None
    """The name under which the server serves the base; derived as the model's own."""
    importance_cap: Positive | None = 2.0
    """Where sampler and trainer differ, a token's weight is their ratio, at most this; null corrects nothing."""
    max_mismatch: Positive = 0.15
    """Mean absolute difference of sampler's and trainer's log-probabilities above which the run stops with an error."""
    max_unscorable: Share = 0.5
    """The share of answers without a reward above which the run stops with an error."""


class WatchSection(Section):
    """Stop rules: the stage ends where one is met, and the report says so. null switches a rule off."""

    max_kl: Positive | None = None
    """KL to the reference in nats a sequence."""
    max_length_ratio: Positive | None = None
    """Mean answer length over that of the first rollouts."""
    min_distinct_ratio: Share | None = 0.1
    """Share of prompts that get an answer of their own, over that of the first rollouts: below it the policy says one thing to all."""
    min_entropy: Positive | None = None
    """Mean entropy in nats a token."""
