"""Compiled layers, by a backend that runs what was traced as it is: traced whole, once for all layers, with the plain layers' gradients."""

from __future__ import annotations

import torch
from tests.families import FAMILIES, GROUPED, tiny_model
from tests.models.test_flex import backward_on_cpu  # noqa: F401
from tests.toys import batch_of, loaded, make_rows
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig

from tunesmith.models.compiled import COMPILED, CompiledLayer, compile_layers
from tunesmith.models.flex import use_flex
from tunesmith.models.layout import layers_of
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.objectives import SFT
from tunesmith.recipe import LoraMethod
from tunesmith.train.invariants import fast_paths_agree

BATCH = batch_of(make_rows(15, shared=20))


def flexible(monkeypatch, layers: int = 1) -> Policy:
    monkeypatch.setitem(FAMILIES, "llama", lambda: LlamaConfig(**(GROUPED | {"num_hidden_layers": layers})))
    policy = Policy(attach(loaded(tiny_model("llama")), LoraMethod(r=4), seed=0))
    use_flex(policy.causal, policy.fast_paths)
    return policy


def test_layers_are_traced_whole_and_not_each_and_learn_what_the_plain_ones_do(backward_on_cpu, monkeypatch):  # noqa: F811
    policy, counter = flexible(monkeypatch, layers=3), CompileCounterWithBackend("aot_eager")
    compile_layers(policy.backbone, policy.hidden, policy.plain, policy.fast_paths, backend=counter)
    assert policy.fast_paths.used[COMPILED] == 3
    assert {type(layer.forward) for layer in layers_of(policy.backbone)} == {CompiledLayer}
    before = counter.frame_count
    assert len(BATCH.forest.tokens_T) > 128
    assert fast_paths_agree(policy, SFT(), BATCH) == []
    assert COMPILED in policy.fast_paths.used
    policy(BATCH.forest).logprobs.sum().backward()
    assert before <= 2
    assert counter.frame_count <= 4, "whatever the number of layers; the first one's input has a gradient in the comparisons alone"


def test_layers_that_the_compiler_does_not_take_stay_plain_and_that_is_said(backward_on_cpu, monkeypatch):  # noqa: F811
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    policy = flexible(monkeypatch)
    compile_layers(policy.backbone, policy.hidden, policy.plain, policy.fast_paths, backend=broken)
    assert "no compiler here" in policy.fast_paths.refused[COMPILED]
    assert COMPILED not in policy.fast_paths.used
    policy(BATCH.forest).logprobs.sum().backward()


def test_layers_that_compute_something_else_stay_plain(backward_on_cpu, monkeypatch):  # noqa: F811
    def wrong(graph, inputs):
        return lambda *given: tuple(torch.tanh(x) if isinstance(x, torch.Tensor) else x for x in graph(*given))

    policy = flexible(monkeypatch)
    compile_layers(policy.backbone, policy.hidden, policy.plain, policy.fast_paths, backend=wrong)
    assert policy.fast_paths.refused[COMPILED] == "it computes something else"
