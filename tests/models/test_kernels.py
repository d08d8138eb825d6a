"""The compiled loops compute what torch does, whatever the number of threads, and nothing uses them where they do not."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.distributed.processes import together, values
from tests.toys import loaded, tiny_model

from tunesmith.models import kernels
from tunesmith.models.fused import _RMSNorm, _SwiGLU
from tunesmith.models.head import token_logprobs
from tunesmith.models.kernels import build, trial
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.recipe import FullMethod
from tunesmith.rundir import rank
from tunesmith.train.devices import same_loops_everywhere

STEP = 2**-8  # of bf16, relative


@pytest.fixture
def torch_alone(monkeypatch):
    def switch(off: bool = True) -> None:
        monkeypatch.setattr(kernels, "unavailable", lambda: "switched off" if off else None)

    return switch


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def results_of(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What it gives, and its gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, numbers(*out.shape, seed=9).to(out.dtype))]


def test_the_loops_are_in_use_here():
    assert kernels.unavailable() is None


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_layers_give_what_torch_gives_in_fp64(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, gate, up, weight = numbers(300, 401), 3 * numbers(300, 401, seed=1), numbers(300, 401, seed=2), numbers(401, seed=3)
        for fast, exact, inputs, steps in (
            (_SwiGLU.apply, lambda g, u: F.silu(g) * u, (gate, up), 1),
            (lambda x, w: _RMSNorm.apply(x, w, 1e-5), lambda x, w: F.rms_norm(x, (401,), w, 1e-5), (x, weight), 2),
        ):
            found, wanted = results_of(fast, *inputs), results_of(exact, *(t.double() for t in inputs))
            for got, want in zip(found, wanted, strict=True):
                assert got.dtype == torch.bfloat16
                assert ((got.double() - want).abs() <= steps * STEP * (want.abs() + STEP * want.abs().max())).all()
    finally:
        torch.set_num_threads(before)


def test_nothing_depends_on_the_number_of_threads():
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        norm = results_of(lambda x, w: _RMSNorm.apply(x, w, 1e-5), numbers(700, 97), numbers(97, seed=1))
        swiglu = results_of(_SwiGLU.apply, numbers(700, 97), numbers(700, 97, seed=1))
        head = results_of(lambda h, w: token_logprobs(h, w, torch.arange(70))[0], numbers(70, 32), numbers(1000, 32, seed=1))
        found.append([*norm, *swiglu, *head, kernels.square(numbers(500, 1000))])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_the_head_gives_log_softmax_its_entropy_and_gradient(scale, trained):
    hidden, weight, targets = numbers(21, 32).requires_grad_(), numbers(5000, 32, seed=1).requires_grad_(trained), torch.arange(21) * 7
    logprobs, entropy = token_logprobs(hidden, weight, targets, scale=scale, entropy=True)
    logp = torch.log_softmax(scale * F.linear(hidden, weight).detach().double(), -1)  # of the rounded products, as they are
    assert torch.allclose(logprobs.double(), logp.gather(1, targets[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(entropy.double(), -(logp.exp() * logp).sum(-1), atol=1e-4)
    asked = [hidden, weight] if trained else [hidden]
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    exact = torch.log_softmax(scale * F.linear(h, w), -1).gather(1, targets[:, None]).sum()
    for got, want in zip(torch.autograd.grad(logprobs.sum(), asked), torch.autograd.grad(exact, [h, w][: len(asked)]), strict=True):
        assert (got.double() - want).norm() <= 0.01 * want.norm()


@pytest.mark.parametrize("place", [0, 499, 3000])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_lost(value, place):
    x = numbers(8, 500)
    x.view(-1)[place] = value
    row = place // 500
    assert not _SwiGLU.apply(x, x).view(-1)[place].isfinite()
    assert not _RMSNorm.apply(x, numbers(500), 1e-5)[row].isfinite().all()
    logprobs, _ = kernels.token_logprobs(x.clone(), torch.zeros(8, dtype=torch.long), 1.0, entropy=False, slope=False)
    assert not logprobs[row].isfinite()
    assert logprobs.isfinite().sum() == 7
    assert not kernels.square(x).isfinite()
    weight, low, first, second = numbers(4000), torch.zeros(4000, dtype=torch.int16), torch.zeros(4000), torch.zeros(4000)
    kernels.adamw(weight, low, x.view(-1), first, second, **STEP_OF_ADAMW)
    assert not weight[place].isfinite()
    assert weight.isfinite().sum() == 3999


@pytest.mark.parametrize("bits", [0x7FC0, 0x7FFF, 0xFFC0, 0xFFFF, 0x7F81])
def test_a_nan_of_any_kind_stays_one(bits):
    x = numbers(8, 500)
    x.view(torch.int16)[3, 7] = bits - (bits >> 15 << 16)
    assert x[3, 7].isnan()
    assert kernels.swiglu(x, x)[3, 7].isnan()
    assert kernels.rms_norm(x, numbers(500), 1e-5)[0][3].isnan().all()
    scores = x[None, :, :32].contiguous()
    kernels.softmax(scores, np.array([8]), np.array([32]), 1, 1.0, 0)
    assert scores[0, 3].isnan().all()
    assert scores.isnan().sum() == 32


def test_no_part_of_a_loop_still_writes_when_another_has_ended_it(monkeypatch):
    written = []

    def loop(begin, end):
        if not begin.value:
            raise KeyboardInterrupt
        time.sleep(0.2)
        written.append((begin.value, end.value))

    monkeypatch.setattr(kernels, "_library", lambda: SimpleNamespace(loop=loop))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with pytest.raises(KeyboardInterrupt):
        kernels._spread("loop", 9, 1)
    assert sorted(written) == [(3, 6), (6, 9)]


def test_a_gradient_of_any_nan_makes_the_weight_none():
    for bits in (0x7FFFFFFF, 0x7FC00000, -0x400000):  # CUDA's, and a processor's of either sign
        gradient = numbers(4000).float()
        gradient.view(torch.int32)[::7] = bits
        weight, low, first, second = numbers(4000), torch.zeros(4000, dtype=torch.int16), torch.zeros(4000), torch.zeros(4000)
        kernels.adamw(weight, low, gradient, first, second, **STEP_OF_ADAMW)
        assert torch.equal(weight.isnan(), gradient.isnan())


STEP_OF_ADAMW = {
    "factor": 1.0,
    "rate": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "decay": 0.0,
    "correction1": 0.1,
    "correction2": math.sqrt(0.001),
}


@pytest.mark.parametrize("name", ["swiglu", "swiglu_backward", "rms_norm", "rms_norm_backward", "token_logprobs", "square", "adamw"])
def test_a_loop_that_computes_something_else_is_found_and_nothing_uses_them(name, monkeypatch):
    right = getattr(kernels, name)

    def wrong(*given, **named):
        found = right(*given, **named)
        several = found if isinstance(found, tuple) else (found,)
        several = (given[0] if several == (None,) else several[0], *several[1:])
        several[0].mul_(1.01)
        return several if isinstance(found, tuple) else several[0]

    monkeypatch.setattr(kernels, name, wrong)
    assert trial.wrong_loop() == name
    monkeypatch.setattr(kernels, "_reason", kernels._reason.__wrapped__)
    assert name in kernels.unavailable()
    paths = Policy(attach(loaded(tiny_model("llama", dtype=torch.bfloat16)), FullMethod(), seed=0)).fast_paths
    assert "kernels" not in paths.used
    assert name in paths.refused["kernels"]


@pytest.mark.parametrize(
    "compiler, said",
    [
        ("no-such-compiler", "no-such-compiler is not installed"),
        ('"gcc', "cannot be compiled"),
        ("false", "does not compile the loops"),
        (None, "no C compiler"),
    ],
)
def test_without_a_compiler_the_run_says_so_and_torch_computes(compiler, said, monkeypatch, tmp_path):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    if compiler is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(kernels, "_library", build.load)
    monkeypatch.setattr(kernels, "_reason", kernels._reason.__wrapped__)
    paths = Policy(attach(loaded(tiny_model("llama", dtype=torch.bfloat16)), FullMethod(), seed=0)).fast_paths
    assert said in paths.refused["kernels"]
    assert "kernels" not in paths.used


def test_the_library_is_compiled_once_and_anew_for_another_source(monkeypatch, tmp_path):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    build.load()
    (first,) = (tmp_path / "kernels").glob("*.so")
    made = first.stat().st_mtime_ns
    build.load()
    other = tmp_path / "loops.c"
    other.write_text(build.SOURCE.read_text() + "\n/* changed */\n")
    monkeypatch.setattr(build, "SOURCE", other)
    build.load()
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 2
    assert first.stat().st_mtime_ns == made


@pytest.mark.parametrize("damage", ["emptied", "cut", "writable by others", "no hash"])
def test_a_damaged_or_foreign_library_is_compiled_anew(damage, monkeypatch, tmp_path):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    build.load()
    (kept,) = (tmp_path / "kernels").glob("*.so")
    whole = kept.read_bytes()
    other = tmp_path / "other"  # a loaded file must not change
    other.write_bytes({"emptied": b"", "cut": whole[:4096]}.get(damage, whole))
    other.replace(kept)
    if damage == "writable by others":
        kept.chmod(0o777)
    if damage == "no hash":
        kept.with_suffix(".sha256").unlink()
    monkeypatch.setattr(build, "_compile", lambda *given, right=build._compile: (compiled.append(given), right(*given)))
    compiled: list = []
    assert build.load().swiglu
    assert len(compiled) == 1
    assert kept.read_bytes() == whole or damage in ("writable by others", "no hash")


def test_a_target_that_the_head_does_not_have_is_an_error():
    for target in (500, -1):
        with pytest.raises(IndexError, match="head's 500 tokens"):
            kernels.token_logprobs(numbers(3, 500), torch.tensor([0, 1, target]), 1.0, entropy=False, slope=True)


def test_a_second_moment_whose_beta_is_near_1_is_torchs():
    second, grad = torch.zeros(3000), numbers(3000)
    kernels.adamw(
        numbers(3000), torch.zeros(3000, dtype=torch.int16), grad, torch.zeros(3000), second, **STEP_OF_ADAMW | {"beta2": 0.99999}
    )
    torch.testing.assert_close(second.double(), (1 - 0.99999) * grad.double().square(), rtol=1e-6, atol=0)


def test_what_one_process_cannot_have_none_uses(monkeypatch, tmp_path):
    def said() -> list[str | bool]:
        monkeypatch.setattr(kernels, "_reason", lambda: "no C compiler here" if rank() == 1 else None)
        same_loops_everywhere()
        return [kernels.unavailable(), kernels.fit(numbers(3))]

    assert values(together(2, said, tmp_path / "said")) == [["no C compiler here", False]] * 2


def test_a_cache_that_cannot_be_written_is_no_obstacle(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    assert build.load().swiglu


def test_a_cache_from_which_nothing_may_be_loaded_is_no_obstacle(monkeypatch, tmp_path):
    """As a stand-in says of one mounted noexec; what is loaded lies elsewhere."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    assert build.load().swiglu
    plain, opened = os.statvfs, []
    flags = SimpleNamespace(f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(build.os, "statvfs", lambda path: flags if "cache" in Path(path).parts else plain(path))
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: opened.append(path) or SimpleNamespace(swiglu=True))
    assert build.load().swiglu
    assert opened
    assert not any("cache" in Path(path).parts for path in opened)


def test_sums_are_made_of_the_blocks_that_the_source_says():
    source = build.SOURCE.read_text()
    assert f"ROW_BLOCK = {kernels.ROW_BLOCK} " in source
    assert f"SUM_BLOCK = 1 << {kernels.SUM_BLOCK.bit_length() - 1} " in source


def test_torch_alone_gives_the_same_up_to_rounding(torch_alone):
    inputs = 2 * numbers(130, 300), numbers(130, 300, seed=1)
    found = []
    for off in (False, True):
        torch_alone(off)
        norm = results_of(lambda x, w: _RMSNorm.apply(x, w, 1e-5), inputs[0], inputs[1][0])
        found.append([*norm, *results_of(_SwiGLU.apply, *inputs)])
    assert not all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "one of them was not what it is called"
    for a, b in zip(*found, strict=True):
        assert (a.float() - b.float()).norm() <= 0.01 * b.float().norm()


@pytest.mark.parametrize("tensor", [numbers(4, 6).T, numbers(4, 6).float(), numbers(4, 6).half()], ids=["strided", "fp32", "fp16"])
def test_what_the_loops_cannot_read_is_left_to_torch(tensor):
    assert not kernels.fit(tensor)
    assert torch.isfinite(_SwiGLU.apply(tensor, tensor)).all()
