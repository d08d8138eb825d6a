"""What can go wrong, as types a caller can catch: what is wrong, where (file, row, key), and the mend.

The exit status of the command line is the error's own: 1 failure while running, 2 recipe or usage error,
3 data refused, 4 does not fit this machine, 5 the verdict is not PASS and `--gate` was given, 130 interrupted.
"""

from __future__ import annotations

from typing import Any


class TunesmithError(Exception):
    """Base of every named error.

    what: one sentence on what is wrong. where: the file, row or key it is about. mend: what to do.
    """

    exit_status = 1

    def __init__(self, what: str, *, where: str | None = None, mend: str | None = None):
        self.what, self.where, self.mend = what, where, mend
        super().__init__(what)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}" + (f"\n  mend: {self.mend}" if self.mend else "")

    def to_json(self) -> dict[str, Any]:
        """The error as plain JSON."""
        return {"kind": type(self).__name__, "what": self.what, "where": self.where, "mend": self.mend}

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.what, self.where, self.mend)


def _rebuild(kind: type[TunesmithError], what: str, where: str | None, mend: str | None) -> TunesmithError:
    return kind(what, where=where, mend=mend)


class RecipeError(TunesmithError):
    """The recipe, or a word on the command line, is not usable."""

    exit_status = 2


class OtherSettings(RecipeError):
    """What the run directory holds was made with other settings or data."""


class MissingFile(TunesmithError):
    """A file or folder that was named is not there or cannot be read."""

    exit_status = 2


class ModelError(TunesmithError):
    """The model folder, file or name cannot be used."""

    exit_status = 2


class TemplateError(ModelError):
    """The chat template raised, ran too long, took too much memory or is ambiguous."""


class OutputInUse(TunesmithError):
    """The run directory holds a run already, or another process writes to it."""

    exit_status = 2


class DataRefused(TunesmithError):
    """The data cannot be trained on as they are."""

    exit_status = 3


class DoesNotFit(TunesmithError):
    """The plan, or an update, needs more memory than this machine has."""

    exit_status = 4


class GateFailed(TunesmithError):
    """The verdict is not PASS and the caller asked for a gate."""

    exit_status = 5


class Interrupted(TunesmithError):
    """A signal stopped the run; a checkpoint of the current step was written."""

    exit_status = 130


class InvariantViolated(TunesmithError):
    """A step-0 invariant does not hold; nothing was trained."""


class NonFinite(TunesmithError):
    """A loss, gradient or weight became NaN or infinite; nothing of it was saved."""


class RolloutFailed(TunesmithError):
    """Sampled answers cannot be learned from: too few have a reward, or sampler and trainer differ."""


class CheckpointError(TunesmithError):
    """A checkpoint is torn, altered, or belongs to another run."""


class AdapterError(TunesmithError):
    """An adapter's weights do not match the model they are loaded into."""


class HubFailed(TunesmithError):
    """A hub could not be reached, or failed itself; what was to be sent there is kept."""


class PeerLost(TunesmithError):
    """Another of the processes that train together ended; its own error says why."""


class RunsFailed(TunesmithError):
    """Some runs of a sweep failed; the others are whole."""


class StorageFailed(TunesmithError):
    """The disk refused a write; what was there before is intact."""
