"""The fault plan: what is tried, how often, and what "nothing lost" means; and the account of the runs that a test makes.

`make test` makes few runs of each fault, `make test-faults` (pytest --whole) all of them; docs/trust.md has the table. Every run draws from
a seed of its own, which is a name and a number: the same run in both forms.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """runs: as many as the plan asks for. held: what must be so of each."""

    runs: int
    held: str


PLAN = {
    "kill -9 at a random step of SFT, DPO, reward model, PPO and GRPO, each with LoRA and in full": Fault(
        60, "the final weights' hash is the unbroken run's; each log line once a step"
    ),
    "kill -9 inside the checkpoint's writing, at every open, write, fsync and rename": Fault(
        40, "a valid checkpoint is there; resumes unaided to the unbroken run's hash"
    ),
    "kill -9 in data preparation, in evaluation, in export, and where a result is written": Fault(
        40, "the resumed output is byte-equal; nothing is scored twice; no half of anything is visible"
    ),
    "disk full, read-only folder, error on fsync": Fault(10, "a non-zero exit that names what is needed; the older checkpoint is intact"),
    "each checkpoint file deleted, truncated, one bit flipped": Fault(30, "detected and said; the older one is taken; hash equal"),
    "NaN or infinity in loss, gradient, reward": Fault(8, "ends with a named error before the update; nothing of it on disk"),
    "SIGTERM, SIGINT, a second signal": Fault(10, "a checkpoint of the step in hand, exit 130 within 5 s; hash equal"),
    "two processes in one run folder; a stale lock": Fault(20, "one runs, the others exit within 2 s naming it; a dead one stops none"),
    "the clock jumps a day": Fault(6, "hash equal"),
}


class Runs:
    """The runs of one fault in one test. A run has held when its turn of the loop came to its end."""

    def __init__(self, fault: str, name: str, *, whole: bool):
        if fault not in PLAN:
            raise KeyError(fault)
        self.fault, self.name, self.whole = fault, name, whole
        self.made = self.held = 0

    def drawn(self, *, short: int, whole: int) -> Iterator[random.Random]:
        """A source of random numbers a run."""
        for number in range(whole if self.whole else short):
            seed = f"{self.name} {number}"
            print(f"seed: {seed!r}")
            with self:
                yield random.Random(seed)

    def over(self, cases: Sequence[Any], *, short: int | None = None) -> Iterator[Any]:
        """Each case is a run; in the short form a sample of them, or all (None)."""
        if not self.whole and short is not None and short < len(cases):
            cases = random.Random(self.name).sample(list(cases), short)
        for case in cases:
            print(f"case: {case!r}")
            with self:
                yield case

    def __enter__(self) -> Runs:
        self.made += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.held += kind is None
