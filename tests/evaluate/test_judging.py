"""What the evaluation compares answers by is what the objective that trained the model compares them by."""

from __future__ import annotations

import numpy as np
import pytest

from tests.objectives.cases import PAIRED, RANKED, make_case, random_outputs
from tests.toys import make_stage
from tunesmith.evaluate._judging import compared_numbers
from tunesmith.evaluation import compares
from tunesmith.models.policy import TokenOutputs
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives._pairs import row_sums
from tunesmith.recipe import objective as settings
from tunesmith.score.preferences import item_accuracy

MORE = {
    "online_dpo ipo": settings.OnlineDPOObjective.model_construct(loss="ipo", beta=0.1),
    "ipo without reference": settings.DPOObjective(loss="ipo", reference="none"),
}
COMPARED = {name: section for name, section in (PAIRED | RANKED | MORE).items() if section.type != "reward"}


@pytest.mark.parametrize("name", COMPARED)
def test_the_preference_accuracy_of_a_result_is_the_accuracy_that_its_objective_logs(name):
    section = COMPARED[name]
    case, objective = make_case("dpo" if name in MORE else name), OBJECTIVES[section.type](section)
    batch, found = case.batch(), compares(make_stage(objective=section))
    rows_I = [np.flatnonzero(batch.item_B == item) for item in range(len(batch.items))]

    def by_item(values_B):
        return [[float(values_B[row]) for row in rows] for rows in rows_I]

    lengths, reference, seen = by_item(np.bincount(batch.forest.row_S)), by_item(batch.columns["reference_B"]), set()
    for seed in range(30):
        random = random_outputs(batch, seed=seed)
        outputs = TokenOutputs(logprobs=random["logprobs"] + 3 * random["values"], entropy=random["entropy"])
        total, count = objective.metrics(outputs, batch)["rewards/accuracies"]
        numbers = compared_numbers(found, by_item(row_sums(outputs.logprobs, batch)), reference, lengths)
        assert np.mean(item_accuracy(numbers)) == pytest.approx(total / count)
        seen.add(round(total / count, 6))
    assert len(seen) > 1


def test_every_way_of_comparing_is_one_that_some_objective_needs():
    found = {compares(make_stage(objective=section)) for section in COMPARED.values()}
    assert found == {"log_ratio", "mean_log_ratio", "logprob", "mean_logprob"}
