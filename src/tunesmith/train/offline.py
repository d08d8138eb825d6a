"""Windows from a data set for objectives that compare: the reference's log-probabilities, computed once, beside each item's rows.

The reference is the model that the stage starts from, so it is the policy itself before the first update: no second model is held, with an
adapter or in full. Its sums are kept in stages/NAME/reference and read from there when a run is resumed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from ..data.batching import Batch, DatasetSource, Row, Share, Window, deal
from ..data.forest import build_forest
from ..data.items import Items
from ..errors import CheckpointError
from ..models.policy import Policy
from ..objectives import Objective, kto_z0
from ..recipe import Stage
from ..rundir import atomic_folder, rank, verify_folder, world
from ..score.preferences import item_accuracy, reward_model_json
from .devices import in_order, of_first
from .window import Between, WindowResult, evaluate_loss, nothing

SUMS, KEY = "sums.safetensors", "key.json"
ITEM_COLUMNS = ("margin", "label")


def compares_with_reference(stage: Stage) -> bool:
    """Whether the objective takes log-ratios to the stage's start from fixed data."""
    objective = stage.objective
    return objective.type == "kto" or getattr(objective, "reference", "none") != "none"


def row_sums(policy: Policy, batches: Iterable[Batch], between: Between = nothing) -> np.ndarray:
    """The log-probability of each row's supervised tokens, in nats, float64 [rows], rows in the batches' order; without gradients.

    batches: this process's share; what is returned is of all of them.
    between: called before each batch; what it raises ends the work.
    """
    sums = []
    with torch.no_grad(), policy.deterministic():
        for batch in batches:
            between()
            logprobs = policy(batch.forest).logprobs.double().cpu().numpy()
            if batch.counts:
                sums.append(np.bincount(batch.forest.row_S, weights=logprobs, minlength=len(batch.forest.lengths_B)).tolist())
    return np.array([one for part in in_order(sums) for one in part])


def judge_reward_model(policy: Policy, items: Items | None, batch_size: int) -> dict[str, Any]:
    """Accuracy on held-out items, each item's counting once, and what scores depend on besides: see `score.preferences`."""
    if items is None:
        return {"accuracy": {"value": None, "n": 0}}
    scores, lengths = [], []
    source = DatasetSource(items, batch_size=batch_size, accumulation=1, seed=0, trim=True)
    with torch.no_grad(), policy.deterministic():
        for batch in source.once():
            found = policy(batch.forest, {"scores"}).scores.double().cpu().numpy()
            tokens = np.bincount(batch.forest.row_S, minlength=len(found)).astype(float)
            cuts = np.flatnonzero(np.diff(batch.item_B)) + 1
            scores += [part.tolist() for part in np.split(found, cuts)]
            lengths += [part.tolist() for part in np.split(tokens, cuts)]
    right = item_accuracy(scores)
    return {"accuracy": {"value": float(np.mean(right)), "n": len(right)}, **reward_model_json(scores, lengths)}


def evaluate_rows(policy: Policy, objective: Objective, source: DatasetSource, between: Between) -> WindowResult:
    """The loss over every item of a source, as one window; `between` is called before each forward pass, those of KTO's estimate too."""
    batches = source.once(between) if isinstance(source, KTOSource) else source.once()
    return evaluate_loss(policy, objective, batches, between=between)


def make_source(stage: Stage, items: Items, policy: Policy, *, seed: int, accumulation: int, folder: Path, key: str) -> DatasetSource:
    """The windows of a stage that learns from fixed data, for a policy that stands at its start.

    folder: where the reference's sums lie, or are put. key: what they depend on.
    """
    columns = {f"{name}_I": items.columns[name] for name in ITEM_COLUMNS if name in items.columns}
    settings = {"batch_size": stage.per_device_train_batch_size, "accumulation": accumulation, "seed": seed}
    settings["share"] = Share(rank(), world())
    trim = stage.objective.type != "sft"
    if not compares_with_reference(stage):
        return DatasetSource(items, columns=columns, trim=trim, **settings)
    plain = DatasetSource(items, trim=trim, **settings)

    def measure() -> dict[str, np.ndarray]:
        found = {"reference_B": row_sums(policy, plain.once())}
        if stage.objective.type == "kto":
            found["mismatched"] = row_sums(policy, _chunks(Mismatched(items), plain.batch_size, range(len(items)), plain.share))
        return found

    held = kept_sums(folder, key, measure)
    columns["reference_B"] = held["reference_B"]
    if stage.objective.type == "kto":
        return KTOSource(items, policy, held["mismatched"], columns=columns, trim=trim, **settings)
    return DatasetSource(items, columns=columns, trim=trim, **settings)


def kept_sums(folder: Path, key: str, measure: Any) -> dict[str, np.ndarray]:
    """What lies whole in a folder and was made with this key, else what `measure` gives, which is then put there."""
    if of_first(lambda: _is_of(folder, key)):
        return load_file(folder / SUMS)
    found = measure()
    with atomic_folder(folder) as temporary:
        save_file(found, temporary / SUMS)
        (temporary / KEY).write_text(json.dumps(key))
    return found


def _is_of(folder: Path, key: str) -> bool:
    try:
        verify_folder(folder)
    except CheckpointError:
        return False
    return json.loads((folder / KEY).read_text()) == key


class Mismatched:
    """Each item's prompt with the next item's answer: what the KL of KTO is estimated on (arXiv:2402.01306, section 4.1).

    A long answer after a long prompt is cut so that no row is longer than the longest of the items, which the model has positions for.
    """

    def __init__(self, items: Items):
        self.items, self.longest = items, max((len(item[0][0]) for item in items), default=0)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Row]:
        (ids, weights), (other, other_weights) = self.items[index][0], self.items[(index + 1) % len(self.items)][0]
        begin, start = int(np.flatnonzero(weights)[0]), int(np.flatnonzero(other_weights)[0])
        end = min(int(np.flatnonzero(other_weights)[-1]) + 1, start + self.longest - begin)
        answer = other_weights[start:end]
        return ((np.concatenate([ids[:begin], other[start:end]]), np.concatenate([np.zeros(begin, dtype=answer.dtype), answer])),)


def _chunks(rows: Mismatched, size: int, chosen: Sequence[int], share: Share) -> Iterable[Batch]:
    for part, counts in deal([chosen[start : start + size] for start in range(0, len(chosen), size)], share):
        yield Batch(build_forest([rows[i][0] for i in part]), tuple(part), np.arange(len(part)), counts=counts)


class KTOSource(DatasetSource):
    """Adds KTO's estimate of the KL, which is a mean over the window cut at 0, to every batch of it.

    mismatched: the reference's sums on `Mismatched` rows, [items].
    """

    def __init__(self, items: Items, policy: Policy, mismatched: np.ndarray, **settings: Any):
        super().__init__(items, **settings)
        self.policy, self.mismatched, self.others = policy, mismatched, Mismatched(items)

    def window(self, step: int) -> Window:
        """As in a data set, with the column kto_z0."""
        return Window(self._with_z0(self.chosen(step)))

    def once(self, between: Between = nothing) -> Iterator[Batch]:
        """Every item once, with the estimate over all of them. between: called before each forward pass of the estimate."""
        return iter(self._with_z0(np.arange(len(self.items)), between))

    def _with_z0(self, chosen: np.ndarray, between: Between = nothing) -> list[Batch]:
        sums = row_sums(self.policy, _chunks(self.others, self.batch_size, chosen.tolist(), self.share), between)
        column = {"kto_z0": np.array([kto_z0(sums, self.mismatched[chosen])])}
        return [replace(batch, columns={**batch.columns, **column}) for batch in self._batches(chosen)]
