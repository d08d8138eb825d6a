"""The certificate of a merge: how far the written model's next-token distributions are from the live one's, on the run's own rows.

KL(live || merged) in nats, mean and largest over every position of up to 200 rows, both computed in fp32; hidden states of the live model
are kept, never its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data.items import Rows
from ..data.store import TokenStore
from ..errors import AdapterError, CheckpointError, MissingFile
from ..models.dora import norms_kept
from ..models.head import logit_shape, shape_logits
from ..models.layout import backbone_of
from ..recipe import Recipe

PROMPTS = 200  # rows compared
MAX_KL = 1e-3  # nats a position, on average
POSITIONS = 256  # logits held at once, in rows of the vocabulary


@dataclass(frozen=True)
class Parity:
    """How far apart two models are. prompts, positions: what was compared; kl_mean, kl_max: nats a position."""

    prompts: int
    positions: int
    kl_mean: float
    kl_max: float


@dataclass
class States:
    """A model's last hidden states [T, H] of each row, and how its head makes logits of them."""

    rows: list[Tensor]
    weight_VH: Tensor | None = None
    bias_V: Tensor | None = None
    shape: tuple[float | None, float] = (None, 1.0)

    def keep_head(self, head: nn.Module) -> None:
        """Copies the head as it is now: merging changes the model in place."""
        inner = head
        merged = getattr(inner, "get_merged_weights", None)
        weight = inner.weight if merged is None else merged(inner.active_adapters)
        self.weight_VH = weight.detach().float().clone()
        bias = getattr(inner, "bias", None)
        self.bias_V = None if bias is None else bias.detach().float().clone()

    def logprobs(self, row: int, begin: int, end: int) -> Tensor:
        """log softmax [end - begin, V] in fp32."""
        raw = nn.functional.linear(self.rows[row][begin:end], self.weight_VH, self.bias_V)
        return torch.log_softmax(shape_logits(raw, *self.shape), -1)


def compared_rows(run: Path, stage: str | None, recipe: Recipe) -> list[np.ndarray]:
    """Token ids of up to PROMPTS training rows, evenly taken, as they were trained: cut, or left out, where they are too long. Raises
    MissingFile where the run holds none."""
    own = {one.name: one.data for one in recipe.stages if one.data is not None}
    places = [(run / "data" / stage, own[stage])] if stage in own else []
    for folder, section in [*places, (run / "data", recipe.data)]:
        try:
            store = TokenStore(folder / "tokens" / "train")
        except (OSError, CheckpointError):
            continue
        limit = section.max_length or int(store.lengths.max(initial=0))
        fitting = np.flatnonzero((store.lengths <= limit) | (section.too_long == "cut"))
        chosen = np.unique(np.linspace(0, len(fitting) - 1, min(PROMPTS, len(fitting))).round().astype(int))
        return [np.array(ids, dtype=np.int64) for ids, _ in Rows(store, fitting[chosen].tolist(), limit)]
    raise MissingFile("the run holds no rows to compare the merged model on", where=str(run / "data"), mend="export from the run itself")


def hidden_states(model: nn.Module, rows: Sequence[np.ndarray]) -> States:
    """The last hidden states of a model on each row alone, by its own forward; fp32."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone, found = backbone_of(causal), []
    with torch.no_grad(), norms_kept(model):
        for ids in rows:
            hidden = backbone(input_ids=torch.from_numpy(ids).to(causal.device)[None], use_cache=False).last_hidden_state
            found.append(hidden[0].float())
    return States(found, shape=logit_shape(causal.config.get_text_config()))


def measure(live: States, merged: nn.Module, rows: Sequence[np.ndarray]) -> Parity:
    """Compares kept states of the live model with a merged one, read back from what was written."""
    other = hidden_states(merged, rows)
    other.keep_head(merged.get_output_embeddings())
    total, largest, count = 0.0, 0.0, 0
    for row, hidden in enumerate(live.rows):
        for begin in range(0, len(hidden), POSITIONS):
            p, q = (states.logprobs(row, begin, begin + POSITIONS) for states in (live, other))
            kl = (p.exp() * (p - q)).sum(-1)
            total, largest, count = total + float(kl.sum()), max(largest, float(kl.max())), count + len(kl)
    return Parity(len(rows), count, total / max(1, count), largest)


def require_equal(parity: Parity, where: Path) -> None:
    """Raises AdapterError where the written model is not the live one; a number that is not finite is not equal."""
    if not parity.kl_mean <= MAX_KL:
        raise AdapterError(
            f"the model written does not say what the live one says: KL {parity.kl_mean:.3g} nats a token on {parity.prompts} rows "
            f"(at most {MAX_KL:g}); nothing was written",
            where=str(where),
            mend="in 16 bits a small update may be rounded away: write --dtype float32; an adapter leaves as it is by --to adapter",
        )
