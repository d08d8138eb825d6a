"""Every method, with settings for a tiny Llama: what the tests that hold for all methods loop over."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from tunesmith.recipe import WHOLE, Method

METHOD_CASES: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "partial modules": {"type": "partial", "modules": ["mlp.up_proj", "norm"]},
    "partial layers": {"type": "partial", "last_layers": 1},
    "lora": {"type": "lora", "r": 4},
    "rslora": {"type": "lora", "r": 4, "use_rslora": True},
    "dora": {"type": "lora", "r": 4, "use_dora": True},
    "pissa": {"type": "lora", "r": 4, "init_lora_weights": "pissa"},
    "pissa dora rslora": {"type": "lora", "r": 4, "init_lora_weights": "pissa", "use_dora": True, "use_rslora": True},
    "orthogonal": {"type": "lora", "r": 4, "init_lora_weights": "orthogonal"},
    "ia3": {"type": "ia3"},
    "prefix": {"type": "prefix", "num_virtual_tokens": 4},
    "prefix projection": {"type": "prefix", "num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 8},
    "prompt": {"type": "prompt", "num_virtual_tokens": 4},
    "prompt from text": {"type": "prompt", "num_virtual_tokens": 4, "prompt_tuning_init_text": "Answer in JSON."},
    "p_tuning": {"type": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 8},
    "p_tuning lstm": {"type": "p_tuning", "num_virtual_tokens": 4, "encoder_reparameterization_type": "LSTM"},
    "houlsby": {"type": "bottleneck", "architecture": "houlsby", "bottleneck_size": 4},
    "pfeiffer": {"type": "bottleneck", "architecture": "pfeiffer", "bottleneck_size": 4},
    "parallel": {"type": "bottleneck", "architecture": "parallel", "bottleneck_size": 4},
}
ADAPTER_CASES = {name: settings for name, settings in METHOD_CASES.items() if settings["type"] not in WHOLE}


def method(settings: dict[str, Any]) -> Method:
    """A case's settings as the recipe reads them."""
    return TypeAdapter(Method).validate_python(settings)
