"""The ledger: the account of rows. No row disappears without a line in it.

rows in = trained + held out + dropped by reason. Only training data count, not the test file. The reasons used here are
"quarantined" (unusable, see data/quarantine.jsonl), "duplicate", "test_overlap" and "too_long".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import InvariantViolated


def _no_tokens() -> dict[str, int]:
    return {"total": 0, "supervised": 0, "truncated": 0}


@dataclass(slots=True)
class Ledger:
    """Counts of rows and tokens; `rows_trained` counts eligible rows, whether or not a short run reached them."""

    rows_in: int = 0
    rows_trained: int = 0
    rows_held_out: int = 0
    rows_dropped: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=_no_tokens)

    def drop(self, reason: str, n: int = 1) -> None:
        """Accounts for `n` rows that are not used, by reason; n = 0 leaves no line."""
        if n:
            self.rows_dropped[reason] = self.rows_dropped.get(reason, 0) + n

    def check(self) -> None:
        """Raises InvariantViolated when the rows do not add up or a count is negative."""
        dropped = sum(self.rows_dropped.values())
        accounted = self.rows_trained + self.rows_held_out + dropped
        if accounted != self.rows_in:
            raise InvariantViolated(
                f"the ledger does not balance: {self.rows_in} rows in, but {self.rows_trained} trained + "
                f"{self.rows_held_out} held out + {dropped} dropped = {accounted}",
                where="ledger",
                mend="this is a bug: a row was lost or counted twice; please report it with data/ledger.json",
            )
        counts = {"rows_trained": self.rows_trained, "rows_held_out": self.rows_held_out, **self.rows_dropped, **self.tokens}
        negative = [name for name, count in counts.items() if count < 0]
        if negative:
            raise InvariantViolated(
                f"the ledger holds a negative count: {', '.join(negative)}", where="ledger", mend="this is a bug; please report it"
            )

    def to_json(self) -> dict[str, Any]:
        """The shape of data/ledger.json. Raises InvariantViolated when it does not balance."""
        self.check()
        return {
            "rows_in": self.rows_in,
            "rows_trained": self.rows_trained,
            "rows_held_out": self.rows_held_out,
            "rows_dropped": dict(sorted(self.rows_dropped.items())),
            "tokens": dict(self.tokens),
        }
