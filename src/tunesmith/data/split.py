"""The validation split: which training rows are held out for choices made on the way.

A row's place is decided by the hash of (seed, prompt), of a text by that of (seed, row_id), never by its position: reordering the file,
or running on another machine, holds out the same rows, and identical rows always fall on the same side. A held-out answer is never one
to a prompt that was trained on, and stages that read one file in different ways, as conversations and as prompts, hold out the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from .preference import AnyRecord, prompt_of
from .records import Conversation, Document, canonical


def split_validation(records: Sequence[AnyRecord], share: float, seed: int) -> tuple[list[AnyRecord], list[AnyRecord]]:
    """(rows to train on, rows held out), both in the order given.

    round(share * n) rows are held out, at least one where the share is above 0 and there are two prompts to split; more only where the
    last one has a twin, or another answer to its prompt. A prompt whose rows would make that more than twice as many is passed over,
    unless no other is there. A training row always remains. Conversations of one prompt alone are drawn by their rows.
    """
    draws = [_draw(_prompt(record), seed) for record in records]
    if len(set(draws)) == 1 and all(isinstance(record, Conversation) for record in records):
        draws = [_draw(record.row_id, seed) for record in records]
    wanted = max(1, round(share * len(records))) if share > 0 else 0
    size = Counter(draws)
    if wanted == 0 or len(size) < 2:
        return list(records), []
    order = sorted(size)
    taken: set[bytes] = set()
    count = 0
    for draw in [draw for draw in order if size[draw] <= 2 * wanted] or [min(order, key=lambda draw: (size[draw], draw))]:
        if count >= wanted or len(taken) == len(size) - 1:
            break
        if count + size[draw] <= 2 * wanted or not taken:
            taken.add(draw)
            count += size[draw]
    kept = [record for record, draw in zip(records, draws, strict=True) if draw not in taken]
    held_out = [record for record, draw in zip(records, draws, strict=True) if draw in taken]
    return kept, held_out


def _prompt(record: AnyRecord) -> str:
    """What rows are drawn by: the prompt, whatever its turns weigh; a text's own id."""
    if isinstance(record, Document):
        return record.row_id
    return canonical([replace(message, weight=None).as_given() for message in prompt_of(record)])


def _draw(group: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{group}".encode()).digest()
