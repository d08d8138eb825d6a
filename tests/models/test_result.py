"""A result's folder: what kind it is, and that what is damaged in it is named."""

from __future__ import annotations

import json

import pytest

from tunesmith.errors import AdapterError
from tunesmith.models.result import ADAPTER_CONFIG, CARD, is_adapter, is_model, read_adapter_config, read_card


def test_a_folder_is_an_adapter_a_whole_model_or_neither(tmp_path):
    assert (is_adapter(tmp_path), is_model(tmp_path)) == (False, False)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "heads.safetensors").write_bytes(b"")
    assert (is_adapter(tmp_path), is_model(tmp_path)) == (False, False)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert (is_adapter(tmp_path), is_model(tmp_path)) == (False, True)
    (tmp_path / ADAPTER_CONFIG).write_text("{}")
    assert (is_adapter(tmp_path), is_model(tmp_path)) == (True, True)


@pytest.mark.parametrize("name, read", [(CARD, read_card), (ADAPTER_CONFIG, read_adapter_config)])
@pytest.mark.parametrize("content", [b'{"torn', b"[]", b"\xff\xfe"])
def test_a_damaged_card_or_adapter_config_is_an_adapter_error_that_names_it(tmp_path, name, read, content):
    (tmp_path / name).write_text(json.dumps({"r": 8}))
    assert read(tmp_path) == {"r": 8}
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterError, match=f"{name} is damaged") as caught:
        read(tmp_path)
    assert caught.value.where == str(tmp_path)


def test_a_folder_of_another_tool_has_an_empty_card(tmp_path):
    assert read_card(tmp_path) == {}
