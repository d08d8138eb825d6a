"""The validation split: which training rows are held out for choices made on the way.

A row's place is decided by the hash of (seed, row_id), never by its position: reordering the file, or running on another
machine, holds out the same rows, and identical rows always fall on the same side. Preferences and prompts are drawn by their
prompt, so that a held-out answer is never one to a prompt that was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from .preference import AnyRecord, prompt_of
from .records import Conversation, Document, canonical


def split_validation(records: Sequence[AnyRecord], share: float, seed: int) -> tuple[list[AnyRecord], list[AnyRecord]]:
    """(rows to train on, rows held out), both in the order given.

    round(share * n) rows are held out, at least one where the share is above 0 and there are two different rows to split;
    more only where the last one has an identical twin, or another answer to its prompt. A training row always remains.
    """
    draws = [_draw(_group(record), seed) for record in records]
    wanted = max(1, round(share * len(records))) if share > 0 else 0
    different = sorted(set(draws))
    if wanted == 0 or len(different) < 2:
        return list(records), []
    limit = min(sorted(draws)[min(wanted, len(draws)) - 1], different[-2])
    kept = [record for record, draw in zip(records, draws, strict=True) if draw > limit]
    held_out = [record for record, draw in zip(records, draws, strict=True) if draw <= limit]
    return kept, held_out


def _group(record: AnyRecord) -> str:
    if isinstance(record, Conversation | Document):
        return record.row_id
    return canonical([message.as_given() for message in prompt_of(record)])


def _draw(group: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{group}".encode()).digest()
