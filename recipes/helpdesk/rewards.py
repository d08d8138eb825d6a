"""Rewards for a ticket: how many of its three labels are right."""

from __future__ import annotations

import json

LABELS = ("intent", "product", "urgency")


def labels(prompts: list[str], completions: list[str], answer: list[str], **columns: list) -> list[float]:
    """1 where all labels equal the row's, half the share of those that do where not all; 0 for what is no JSON object."""
    return [_score(completion, json.loads(reference)) for completion, reference in zip(completions, answer, strict=True)]


def _score(completion: str, reference: dict) -> float:
    try:
        ticket = json.loads(completion)
    except ValueError:
        return 0.0
    if not isinstance(ticket, dict):
        return 0.0
    right = sum(ticket.get(name) == reference[name] for name in LABELS) / len(LABELS)
    return 1.0 if right == 1.0 else right / 2
