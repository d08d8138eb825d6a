"""SFT's loss is the weighted mean of negative log-likelihoods, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.toys import batch_of, make_rows, tiny_model

from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES, SFT
from tunesmith.recipe import Stage
from tunesmith.train.window import run_window


def test_the_loss_is_the_sum_of_weight_times_negative_log_likelihood_over_the_sum_of_weights():
    rows, model = make_rows(5, shared=20), tiny_model("llama")
    total = divisor = 0.0
    with torch.no_grad():
        for ids, weights in rows:
            logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].double()
            for t in np.nonzero(weights)[0]:
                total -= weights[t] * float(torch.log_softmax(logits[t - 1], -1)[ids[t]])
                divisor += weights[t]
    assert run_window(Policy(model), SFT(), [batch_of(rows)], backward=None).loss == pytest.approx(total / divisor, rel=1e-6)


def test_every_objective_that_a_recipe_can_name_is_there():
    stage = Stage(name="a", objective="sft", learning_rate=1e-3)
    assert stage.objective.type in OBJECTIVES
