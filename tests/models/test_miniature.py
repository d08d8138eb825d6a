"""A fast layer is held against the plain one in fp32 and in the model's dtype, whatever rounding would hide in the whole model."""

from __future__ import annotations

import pytest
import torch
from tests.toys import loaded, tiny_model

from tunesmith.models import fused
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.recipe import FullMethod, LoraMethod

LAYERS = {"lora", "swiglu", "rms_norm"}
ALL = {torch.float32: LAYERS, torch.bfloat16: LAYERS | {"kernels", "grouped_attention"}, torch.float16: LAYERS}
FAULTS = [  # (whose, which of its results, the path that must go)
    ("_LoraProduct", "forward", 0, "lora"),
    ("_LoraProduct", "backward", 0, "lora"),
    ("_LoraProduct", "backward", 3, "lora"),
    ("_LoraProduct", "backward", 4, "lora"),
    ("_SwiGLU", "forward", 0, "swiglu"),
    ("_SwiGLU", "backward", 0, "swiglu"),
    ("_SwiGLU", "backward", 1, "swiglu"),
    ("_RMSNorm", "forward", 0, "rms_norm"),
    ("_RMSNorm", "backward", 0, "rms_norm"),
]


def policy(dtype: torch.dtype) -> Policy:
    return Policy(attach(loaded(tiny_model("llama", dtype=dtype)), LoraMethod(r=3), seed=0))


def break_it(monkeypatch, function: str, method: str, place: int, *, factor: float, only_in_16_bits: bool) -> None:
    """One of a fast path's results becomes so many times what it should be."""
    right = getattr(getattr(fused, function), method)

    def wrong(ctx, given, *rest):
        results = right(ctx, given, *rest)
        several = list(results) if isinstance(results, tuple) else [results]
        if several[place] is not None and not (only_in_16_bits and given.dtype == torch.float32):
            several[place] = several[place] * factor
        return tuple(several) if isinstance(results, tuple) else several[0]

    monkeypatch.setattr(getattr(fused, function), method, staticmethod(wrong))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fast_layers_are_as_near_to_fp32_as_the_plain_ones(dtype):
    paths = policy(dtype).fast_paths
    assert (set(paths.used), paths.refused) == (ALL[dtype], {})


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}.{fault[1]}[{fault[2]}]")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fault_of_some_percent_takes_the_path_out_in_every_dtype(monkeypatch, dtype, fault):
    *whose, path = fault
    break_it(monkeypatch, *whose, factor=1.02, only_in_16_bits=False)
    paths = policy(dtype).fast_paths
    assert set(paths.used) == ALL[dtype] - {path}
    assert "computes something else" in paths.refused[path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_a_number_takes_the_path_out(monkeypatch, dtype):
    break_it(monkeypatch, "_RMSNorm", "backward", 0, factor=float("nan"), only_in_16_bits=False)
    assert set(policy(dtype).fast_paths.used) == ALL[dtype] - {"rms_norm"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}.{fault[1]}[{fault[2]}]")
def test_a_fault_that_only_16_bits_have_is_seen(monkeypatch, fault):
    *whose, path = fault
    break_it(monkeypatch, *whose, factor=1.03, only_in_16_bits=True)
    assert set(policy(torch.float32).fast_paths.used) == LAYERS
    assert set(policy(torch.bfloat16).fast_paths.used) == ALL[torch.bfloat16] - {path}


def test_gradients_of_what_trains_inside_a_layer_are_compared(monkeypatch):
    break_it(monkeypatch, "_RMSNorm", "backward", 1, factor=1.02, only_in_16_bits=False)
    model = attach(loaded(tiny_model("llama", dtype=torch.bfloat16)), FullMethod(), seed=0)
    assert set(Policy(model).fast_paths.used) == ALL[torch.bfloat16] - {"lora", "rms_norm"}


def test_the_model_is_as_it_was(monkeypatch):
    model = attach(loaded(tiny_model("llama")), LoraMethod(r=3), seed=0)
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    modules = dict(model.named_modules())
    Policy(model)
    assert dict(model.named_modules()) == modules
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor and torch.equal(after[name], value) for name, (tensor, value) in before.items())
