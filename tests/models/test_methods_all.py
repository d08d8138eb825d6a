"""What holds of every method: what trains is counted right, results come back in a new process, a start is gone on with, new tokens train."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter
from tests.models.method_cases import ADAPTER_CASES, METHOD_CASES
from tests.toys import loaded, tiny_model

from tunesmith.models.methods import attach, resolve, trainable_count
from tunesmith.recipe import Method


def method(settings: dict[str, Any]) -> Method:
    return TypeAdapter(Method).validate_python(settings)


def each(cases: dict[str, dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("settings", cases.values(), ids=cases)


@each(METHOD_CASES)
def test_what_a_method_trains_is_counted_without_attaching_it(settings):
    base = loaded(tiny_model("llama"))
    given = resolve(base.model, method(settings))
    counted = trainable_count(base.model, given)
    model = attach(base, given, seed=0)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_new_tokens_of_an_adapter_whose_config_has_no_field_for_them_train_and_are_there_again(tmp_path):
    from peft import IA3Config

    from tunesmith.models.methods.saving import load_adapter, put_adapter, save_result
    from tunesmith.models.methods.tokens import with_new_tokens

    base = loaded(tiny_model("llama"))
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    model = put_adapter(base.model, with_new_tokens(config, base.model, [3, 5]))
    trained = {name: p for name, p in model.named_parameters() if "trainable_tokens" in name and p.requires_grad}
    assert [tuple(p.shape) for p in trained.values()] == [(2, 32)] * 2
    for parameter in trained.values():
        parameter.data += 1
    save_result(model, base, tmp_path, {})
    again = load_adapter(loaded(tiny_model("llama")), tmp_path)
    held = dict(again.named_parameters())
    assert all((held[name] == p).all() for name, p in trained.items())
    assert ADAPTER_CASES
