"""The validation split: which training rows are held out for choices made on the way.

A row's place is decided by the hash of (seed, row_id), never by its position: reordering the file, or running on another
machine, holds out the same rows, and identical rows always fall on the same side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from .records import Record


def split_validation(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(rows to train on, rows held out), both in the order given.

    round(share * n) rows are held out, at least one where the share is above 0 and there are two different rows to split;
    more only where the last one has an identical twin. A training row always remains.
    """
    draws = [_draw(record.row_id, seed) for record in records]
    wanted = max(1, round(share * len(records))) if share > 0 else 0
    different = sorted(set(draws))
    if wanted == 0 or len(different) < 2:
        return list(records), []
    limit = min(sorted(draws)[min(wanted, len(draws)) - 1], different[-2])
    kept = [record for record, draw in zip(records, draws, strict=True) if draw > limit]
    held_out = [record for record, draw in zip(records, draws, strict=True) if draw <= limit]
    return kept, held_out


def _draw(row_id: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
