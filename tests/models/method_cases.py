"""Every method, with settings for a tiny Llama: what the tests that hold for all methods loop over."""

from __future__ import annotations

from typing import Any

from tunesmith.recipe import WHOLE

METHOD_CASES: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "lora": {"type": "lora", "r": 4},
}
ADAPTER_CASES = {name: settings for name, settings in METHOD_CASES.items() if settings["type"] not in WHOLE}
