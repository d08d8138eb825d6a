"""From answers to statistics: one score for each item, parts of metrics, and what chance is."""

from __future__ import annotations

import math

import pytest
from sklearn.metrics import f1_score

from tunesmith.evaluate import freeze_task
from tunesmith.evaluate.perplexity import ReferenceNats
from tunesmith.evaluate.scoring import chance_values, generation_json, score_answers, score_references
from tunesmith.score import bootstrap_interval

from .helpers import SCHEMA, desk_rows, row, ticket

METRICS = ["exact_match", "field_accuracy", "macro_f1", "rougeL", "json_validity"]


@pytest.fixture
def task():
    return freeze_task("task", desk_rows(12), schema=SCHEMA, metrics=METRICS)


def value(scored, metric):
    return bootstrap_interval(scored.statistics[metric]).value


def test_every_metric_and_its_parts_have_a_value_an_interval_and_their_n(task):
    outputs = ["no json", *[item.reference for item in task.items[1:]]]
    nats = ReferenceNats(tuple(2.0 * count for count in range(1, 13)), tuple(range(1, 13)))
    found = score_answers(task, "tuned", outputs, nats, template_sha256="t").metrics_json(resamples=200, confidence=0.95, seed=0)
    assert list(found) == [
        "exact_match",
        "field_accuracy",
        "field_accuracy.intent",
        "field_accuracy.urgency",
        "macro_f1",
        "macro_f1.intent",
        "macro_f1.urgency",
        "rougeL",
        "json_validity",
        "perplexity",
    ]
    assert {metric: one["n"] for metric, one in found.items()} == dict.fromkeys(found, 12)
    assert all(one["low"] <= one["value"] <= one["high"] for one in found.values())
    assert found["exact_match"]["value"] == found["json_validity"]["value"] == pytest.approx(11 / 12)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(2.0))


def test_macro_f1_over_fields_is_the_mean_of_sklearns_with_invalid_answers_wrong(task):
    outputs = ["no json", ticket("cancel", "low"), *[item.reference for item in task.items[2:]]]
    scored = score_answers(task, "tuned", outputs, None, template_sha256="t")
    expected = []
    for field in task.label_fields:
        truth = [task.reference_labels(item.reference)[field] for item in task.items]
        ours = [task.score(output, item.reference).labels[field] or "(none)" for output, item in zip(outputs, task.items, strict=True)]
        expected.append(f1_score(truth, ours, average="macro", labels=sorted(set(truth)), zero_division=0))
        assert value(scored, f"macro_f1.{field}") == pytest.approx(expected[-1])
    assert value(scored, "macro_f1") == pytest.approx(sum(expected) / 2)


def test_perplexity_stands_in_each_items_scores_with_its_nats_and_tokens(task):
    nats = ReferenceNats((3.0,) * 12, (2,) * 12)
    scored = score_references(task, "zero_shot", nats, template_sha256="t")
    assert scored.item_scores[0] == {"nats": 3.0, "tokens": 2, "perplexity": pytest.approx(math.exp(1.5))}


def test_outputs_and_items_must_be_as_many(task):
    with pytest.raises(ValueError, match="12 items but 11"):
        score_answers(task, "tuned", ["x"] * 11, None, template_sha256="t")


def test_chance_is_the_best_constant_answer_and_writing_json_takes_skill():
    rows = [row(f"lamp {number}", ticket("defect", "low", f"s{number}")) for number in range(6)] + desk_rows(3)
    found = chance_values(freeze_task("task", rows, schema=SCHEMA, metrics=METRICS))
    assert found["exact_match"] == {"value": pytest.approx(6 / 9), "n": 9}
    assert found["json_validity"]["value"] == 0.0


def test_cut_answers_and_mean_tokens_are_counted_with_their_n():
    outputs = [{"tokens": 4, "finish_reason": "stop"}, {"tokens": 8, "finish_reason": "length"}]
    assert generation_json(outputs) == {"mean_output_tokens": 6.0, "cut_by_length": 1, "n": 2}
