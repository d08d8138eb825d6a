"""Bases in nf4 and int8 against the dense model that their bits stand for: outputs, gradients, rows apart; QLoRA's results and refusals."""

from __future__ import annotations

import copy
import json
import logging
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from tests.families import tiny_model
from tests.generate.helpers import generator, plain_greedy, prompts_with_prefix, tokens_of
from tests.toys import batch_of, make_items, make_rows, make_stage, model_folder, tiny_tokenizer, train_stage
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.errors import AdapterError, ModelError, RecipeError
from tunesmith.models import quantised
from tunesmith.models.load import LoadedModel, load_model
from tunesmith.models.methods import attach, load_adapter, resolve, save_result, trainable_count
from tunesmith.models.opening import load
from tunesmith.models.policy import Policy
from tunesmith.models.quantised import dense_weight, is_quantised
from tunesmith.models.result import CARD
from tunesmith.models.reward import Scored, Separate, Shared, open_reward_model
from tunesmith.recipe import FullMethod, Ia3Method, LoraMethod, ModelSection, PartialMethod
from tunesmith.rundir import read_events
from tunesmith.train.invariants import no_leak

KINDS = ["nf4", "int8"]
ROWS, PAIRS = make_rows(6), make_items(6)
IDS = torch.tensor([[5, 9, 40, 77, 12, 80, 66, 33]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


def base(folder: Path, kind: str | None, dtype: str = "float32") -> LoadedModel:
    return load_model(ModelSection(name=str(folder), dtype=dtype, quantization=kind))


def stands_for(layer: nn.Module) -> torch.Tensor:
    """The dense weight of a quantised layer; four bits by hand: two numbers a byte, looked up, times the scale of their block."""
    if isinstance(layer, Linear4bit):
        state, bits = layer.weight.quant_state, layer.weight.data.view(-1)
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        numbers = torch.stack([bits >> 4, bits & 15], 1).view(-1).long()
        return (state.code[numbers] * scales.repeat_interleave(state.blocksize)[: len(numbers)]).view(state.shape)
    return int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)


def dense_twin(folder: Path, held: nn.Module) -> nn.Module:
    """The dense model whose weights are those that the quantised one's bits stand for."""
    twin = base(folder, None).model
    for name, layer in held.named_modules():
        if isinstance(layer, Linear4bit | Linear8bitLt):
            twin.get_submodule(name).weight.data = stands_for(layer).float()
    return twin


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_the_dense_weights_does_not_stay_in_memory(folder, kind):
    dense = base(folder, None)
    assert str(folder) in Path("/proc/self/maps").read_text()
    del dense
    held = base(folder, kind)
    assert is_quantised(held.model)
    assert str(folder) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_computes_what_its_bits_stand_for_forwards_and_backwards(folder, kind):
    held = base(folder, kind)
    assert (held.quantization, is_quantised(held.model)) == (kind, True)
    layers = [m for m in held.model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]
    assert len(layers) == 14
    assert held.model.lm_head.weight.dtype == held.model.model.embed_tokens.weight.dtype == torch.float32
    twin, policies, gradients, outputs = dense_twin(folder, held.model), [], [], []
    for model in (held.model, twin):
        policy, forest = Policy(model), batch_of(ROWS).forest
        inputs = policy.backbone.get_input_embeddings()(torch.from_numpy(forest.tokens_T)[None]).detach().requires_grad_()
        logprobs = policy(forest, embeddings=inputs).logprobs
        gradients += torch.autograd.grad(logprobs.sum(), inputs)
        outputs.append(logprobs.detach())
        policies.append(policy)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    original = Policy(base(folder, None).model)(batch_of(ROWS).forest).logprobs
    assert (original - outputs[0]).abs().max() > 1e-3, "it is quantised indeed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fused_lora_on_a_quantised_base_gives_what_pefts_own_layers_give(tmp_path, family, kind):
    tiny_model(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    policy, forest, found = Policy(attach(base(tmp_path, kind), LoraMethod(r=4), seed=0)), batch_of(ROWS).forest, []
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    assert policy.fast_paths.used["lora"] == len(trained) / 2
    for layers in (nullcontext(), policy.plain()):
        with layers:
            logprobs = policy(forest).logprobs
            found.append((logprobs.detach(), *torch.autograd.grad(logprobs.sum(), list(trained.values()))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_a_quantised_base_makes_a_layers_output_once(folder, kind):
    """PEFT makes four more of its size for a moment; the holes that they left in the heap were 0.5 GB of a 135M QLoRA."""
    model, made = attach(base(folder, kind), LoraMethod(r=4), seed=0), []
    Policy(model)
    layer = model.get_base_model().model.layers[0].mlp.gate_proj

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() == 7 * layer.out_features:
                made.append(result)
            return result

    with Watch():
        layer(torch.randn(7, layer.in_features, requires_grad=True))
    assert len({tensor.untyped_storage().data_ptr() for tensor in made}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_in_any_company_and_after_a_pass_without_gradients(folder, kind):
    policy = Policy(base(folder, kind).model)
    no_leak(policy, 97)
    with torch.no_grad():
        together = policy(batch_of(ROWS).forest).logprobs
        alone = torch.cat([policy(batch_of([row]).forest).logprobs for row in ROWS])
    torch.testing.assert_close(torch.sort(together).values, torch.sort(alone).values, rtol=1e-5, atol=1e-5)
    forest = batch_of(ROWS).forest
    inputs = policy.backbone.get_input_embeddings()(torch.from_numpy(forest.tokens_T)[None]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(policy(forest, embeddings=inputs).logprobs.sum(), inputs)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings", [LoraMethod(r=4), LoraMethod(r=4, init_lora_weights="pissa"), Ia3Method()], ids=["lora", "pissa", "ia3"]
)
def test_an_adapter_trains_on_a_quantised_base_and_comes_back_on_it(tmp_path, folder, kind, settings):
    origin = base(folder, kind)
    model = train_stage(origin, make_stage(method=settings.model_dump(), max_steps=4, learning_rate=2e-2), tmp_path / "run", ROWS)
    losses = [event["loss"] for event in read_events(tmp_path / "run") if "loss" in event]
    assert losses[-1] < losses[0]
    result = tmp_path / "run" / "stages" / "sft" / "model"
    assert json.loads((result / CARD).read_text())["quantization"] == kind
    want = Policy(model)(batch_of(ROWS).forest).logprobs
    again = load_adapter(base(folder, kind), result)
    torch.testing.assert_close(Policy(again)(batch_of(ROWS).forest).logprobs, want, rtol=1e-6, atol=1e-6)
    opened = load(result, dtype="float32").model
    torch.testing.assert_close(Policy(opened)(batch_of(ROWS).forest).logprobs, want, rtol=1e-6, atol=1e-6)
    for other in (None, *({*KINDS} - {kind})):
        with pytest.raises(AdapterError, match=f"held in {kind}, and this one") as caught:
            load_adapter(base(folder, other), result)
        assert f"model.quantization: {kind}" in caught.value.mend


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_of_a_quantised_base_scores_beside_a_policy_of_any_method(tmp_path, folder, kind):
    train_stage(base(folder, kind), make_stage(objective="reward", method="lora", max_steps=2), tmp_path / "run", PAIRS)
    saved, scores = tmp_path / "run" / "stages" / "sft" / "model", []
    for settings in (LoraMethod(r=4), Ia3Method()):
        origin = base(folder, kind)
        model = attach(origin, settings, seed=0)
        reward = open_reward_model(saved, origin, model, "reward_0")
        if isinstance(reward, Shared):
            reward.policy = Policy(model)
        scores.append((type(reward), reward.scores([Scored((), "", ids) for ids, _ in PAIRS.rows])))
    assert [found for found, _ in scores] == [Shared, Separate]
    np.testing.assert_allclose(scores[1][1], scores[0][1], rtol=1e-5, atol=1e-5)


def test_an_adapter_of_a_dense_base_is_refused_on_a_quantised_one(tmp_path, folder):
    origin = base(folder, None)
    save_result(attach(origin, LoraMethod(r=4), seed=0), origin, tmp_path, {})
    with pytest.raises(AdapterError, match="held in its dtype, and this one is held in nf4") as caught:
        load_adapter(base(folder, "nf4"), tmp_path)
    assert "model.quantization: null" in caught.value.mend


@pytest.mark.parametrize("settings", [FullMethod(), PartialMethod(last_layers=1)])
def test_a_method_that_changes_the_bases_weights_is_refused_on_a_quantised_one_before_training(folder, settings):
    with pytest.raises(RecipeError, match="in too few bits for an update") as caught:
        resolve(base(folder, "nf4").model, settings)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("settings", [LoraMethod(r=4), LoraMethod(r=4, use_dora=True), Ia3Method()], ids=["lora", "dora", "ia3"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_on_a_quantised_base_is_counted_without_attaching_it(folder, kind, settings):
    origin = base(folder, kind)
    given = resolve(origin.model, settings)
    counted = trainable_count(origin.model, given)
    assert counted == sum(p.numel() for p in attach(origin, given, seed=0).parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_on_a_quantised_base_starts_at_ln_2(tmp_path, folder, kind):
    stage = make_stage(objective="dpo", method={"type": "lora", "r": 4}, max_steps=2, rows=5, warmup_steps=0)
    train_stage(base(folder, kind), stage, tmp_path / "run", make_items(5))
    losses = [event["loss"] for event in read_events(tmp_path / "run") if "loss" in event]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_lie_turned_are_quantised_too(tmp_path, kind):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    held = base(tmp_path, kind)
    layers = {name: m for name, m in held.model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}
    assert layers
    for name, layer in layers.items():
        want = model.get_submodule(name).weight.T
        error = (dense_weight(layer) - want).abs().max() / want.abs().max()
        assert error < (0.2 if kind == "nf4" else 0.01)
    tuned = attach(held, LoraMethod(r=2), seed=0)
    with torch.no_grad():
        assert tuned(input_ids=IDS, use_cache=False).logits.isfinite().all()


def test_a_quantised_base_computes_in_bf16(folder):
    model = attach(base(folder, "nf4", "bfloat16"), LoraMethod(r=4), seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    logprobs = Policy(model)(batch_of(ROWS).forest).logprobs
    exact = Policy(base(folder, "nf4").model)(batch_of(ROWS).forest).logprobs
    assert (logprobs - exact).abs().mean() < 0.1
    logprobs.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_scores_on_a_quantised_base_are_those_of_a_plain_full_forward(folder, kind):
    model = attach(base(folder, kind), LoraMethod(r=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    prompts = prompts_with_prefix(5)
    ours = generator(model, batch_size=3)
    greedy = tokens_of(ours.generate(prompts, max_new_tokens=6))
    assert greedy == [plain_greedy(model, prompt, 6) for prompt in prompts]
    assert ours.notes == []


def test_a_copy_of_a_quantised_model_computes_the_same(folder):
    model = base(folder, "nf4").model
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_without_bitsandbytes_it_is_said_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs bitsandbytes") as caught:
        quantised.quantization_config("nf4", torch.float32)
    assert caught.value.mend == "pip install tunesmith[quant]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(10, 16), (96, 32), (64, 48), (64, 64), (30, 80), (7, 592)], ids=str)
def test_four_bits_stand_for_what_the_blocks_and_their_scales_say(shape, dtype):
    """Whatever a row's length, and the processor: a kernel of bitsandbytes takes wrong scales where rows are no whole blocks."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = Linear4bit(shape[1], shape[0], bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=64).to("cpu")
    assert (stands_for(layer) - weight.float()).abs().max() < 0.2 * weight.float().abs().max()
    torch.testing.assert_close(dense_weight(layer).float(), stands_for(layer), rtol=1e-2, atol=1e-2)


def test_bitsandbytes_does_not_warn_of_a_kernel_that_nothing_here_uses():
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert not log.isEnabledFor(logging.WARNING)
    assert log.isEnabledFor(logging.ERROR)
