"""LoRA's variants against PEFT's own on the same batch, in fp32: start, one step, what is saved; which layers are targets."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tests.toys import batch_of, loaded, make_rows, make_stage, model_folder, tiny_model, train_stage
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from tunesmith.errors import AdapterError, RecipeError
from tunesmith.models.load import load_model
from tunesmith.models.methods import (
    attach,
    continue_adapter,
    learning_rate_scales,
    load_adapter,
    method_of,
    resolve,
    save_result,
    target_modules,
)
from tunesmith.models.methods.starts import lora_layers, principal_part, start_orthogonal
from tunesmith.models.policy import Policy
from tunesmith.recipe import LoraMethod, ModelSection

IDS = torch.tensor([[5, 9, 40, 77, 12, 80, 66, 33]])
TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def loss(model: nn.Module) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(input_ids=IDS, use_cache=False).logits[0, :-1], IDS[0, 1:])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[0]


def step(model: nn.Module, kind: type[torch.optim.Optimizer], steps: int = 1, **settings: Any) -> nn.Module:
    optimiser = kind([p for p in model.parameters() if p.requires_grad], **settings)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model).backward()
        optimiser.step()
    return model


def ours(**settings: Any) -> nn.Module:
    return attach(loaded(tiny_model("llama")), LoraMethod(r=4, **settings), seed=0)


def pefts(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=TARGETS, **settings))


def copy_start(source: nn.Module, target: nn.Module) -> None:
    """The same adapter on the other model: the two draw it in another order."""
    held = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(held[name])


ADAM = (torch.optim.Adam, {"lr": 1e-3})
SGD = (torch.optim.SGD, {"lr": 0.01})


@pytest.mark.parametrize(("kind", "settings"), [SGD, ADAM])
@pytest.mark.parametrize("rslora", [False, True])
def test_steps_of_pissa_are_those_of_pefts_though_the_base_is_not_touched(kind, settings, rslora):
    mine, theirs = ours(init_lora_weights="pissa", use_rslora=rslora), pefts(init_lora_weights="pissa", use_rslora=rslora)
    plain = tiny_model("llama")
    torch.testing.assert_close(logits(theirs), logits(plain), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(mine), logits(plain)), "a fresh one changes nothing, to the bit"
    before = logits(plain)
    for _ in range(2):
        step(mine, kind, **settings), step(theirs, kind, **settings)
        torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-4, atol=1e-4)
    assert (logits(mine) - before).abs().max() > 0.01
    for one, other in zip(lora_layers(mine), lora_layers(theirs), strict=True):
        want = other.get_base_layer().weight + other.get_delta_weight("default")
        torch.testing.assert_close(one.get_base_layer().weight + one.get_delta_weight("default"), want, rtol=1e-5, atol=1e-5)
    with mine.disable_adapter():
        assert torch.equal(logits(mine), before)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_the_principal_part_is_that_of_the_singular_values(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    a, b = principal_part(weight, 3, 2.0)
    torch.testing.assert_close(2 * b @ a, left[:, :3] * sizes[:3] @ right[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-5, atol=1e-5)
    a, b = principal_part(torch.zeros(4, 3), 2, 1.0)
    assert torch.isfinite(a).all()
    assert not (b @ a).any()


def test_pissa_trains_r_ranks_and_weight_decay_draws_to_the_base():
    model = ours(init_lora_weights="pissa")
    plain = logits(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(p.numel() for p in ours().parameters() if p.requires_grad)
    step(model, torch.optim.SGD, lr=0.2)
    near = (logits(model) - plain).abs().max()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 0.1
    assert (logits(model) - plain).abs().max() < 0.5 * near


def test_pissa_is_saved_as_a_plain_lora_that_peft_loads_and_merges(tmp_path):
    folder = model_folder(tmp_path / "base")
    origin = load_model(ModelSection(name=str(folder), dtype="float32"))
    model = step(attach(origin, LoraMethod(r=4, init_lora_weights="pissa"), seed=0), torch.optim.SGD, lr=0.1, steps=2)
    (tmp_path / "out").mkdir()
    save_result(model, origin, tmp_path / "out", {})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16.0, True)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out").eval()
    torch.testing.assert_close(logits(peft), logits(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(peft.merge_and_unload()), logits(model), rtol=1e-4, atol=1e-4)
    assert method_of(tmp_path / "out") == LoraMethod(r=8, lora_alpha=16.0, target_modules=TARGETS), "without our card it is what it is"


def test_pissa_starts_the_same_each_time_and_the_start_is_kept_when_it_goes_on(tmp_path):
    model, again = ours(init_lora_weights="pissa"), ours(init_lora_weights="pissa")
    for one, other in zip(lora_layers(model), lora_layers(again), strict=True):
        assert torch.equal(one.lora_A["default"].weight, other.lora_A["default"].weight)
    step(model, torch.optim.SGD, lr=0.1, steps=2)
    save_result(model, loaded(tiny_model("llama")), tmp_path, {})
    later = continue_adapter(loaded(tiny_model("llama")), LoraMethod(r=4, init_lora_weights="pissa"), tmp_path)
    step(model, torch.optim.SGD, lr=0.1), step(later, torch.optim.SGD, lr=0.1)
    torch.testing.assert_close(logits(later), logits(model), rtol=1e-5, atol=1e-5)


def test_a_young_change_of_pissa_is_not_lost_in_bf16():
    model = attach(loaded(tiny_model("llama", dtype=torch.bfloat16)), LoraMethod(r=4, init_lora_weights="pissa"), seed=0)
    policy, batch = Policy(model), batch_of(make_rows(4)).forest
    assert policy.fast_paths.used["lora"]
    with torch.no_grad():
        fresh = policy(batch).logprobs
        with policy.using(None):
            torch.testing.assert_close(policy(batch).logprobs, fresh, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "orthogonal"}])
def test_a_step_of_a_variant_is_pefts(settings):
    mine, theirs = ours(**settings), pefts(**settings)
    copy_start(mine, theirs)
    torch.testing.assert_close(logits(mine), logits(theirs))
    start = logits(mine)
    step(mine, *SGD[:1], **SGD[1]), step(theirs, *SGD[:1], **SGD[1])
    torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(mine) - start).abs().max() > 0.01


def test_the_orthogonal_start_is_the_one_that_peft_draws():
    mine, theirs = ours(init_lora_weights="orthogonal"), pefts()
    torch.manual_seed(7)
    start_orthogonal(mine)
    torch.manual_seed(7)
    for layer in lora_layers(theirs):
        layer.orthogonal_init("default")
    for one, other in zip(lora_layers(mine), lora_layers(theirs), strict=True):
        assert torch.equal(one.lora_A["default"].weight, other.lora_A["default"].weight)
        assert torch.equal(one.lora_B["default"].weight, other.lora_B["default"].weight)
    with pytest.raises(ValidationError, match="3 is odd; write 4"):
        LoraMethod(r=3, init_lora_weights="orthogonal")


def test_doras_layers_keep_their_own_forward():
    policy = Policy(ours(use_dora=True))
    assert "lora" not in policy.fast_paths.used
    assert "not a plain LoRA layer" in policy.fast_paths.refused["lora"]
    batch = batch_of(make_rows(4)).forest
    torch.testing.assert_close(policy(batch).logprobs, Policy(tiny_model("llama"))(batch).logprobs, rtol=1e-5, atol=1e-5)


def test_lora_plus_gives_b_the_rate_that_peft_gives_it():
    model = ours(loraplus_lr_ratio=16.0)
    optimiser = create_loraplus_optimizer(pefts(), torch.optim.SGD, lr=1.0, loraplus_lr_ratio=16.0)
    rates = sorted(group["lr"] for group in optimiser.param_groups for _ in group["params"])
    scales = learning_rate_scales(model, LoraMethod(loraplus_lr_ratio=16.0))
    assert sorted(scales.get(name, 1.0) for name, p in model.named_parameters() if p.requires_grad) == rates
    assert all(".lora_B." in name for name in scales)
    assert learning_rate_scales(ours(), LoraMethod()) == {}
    assert len(learning_rate_scales(ours(init_lora_weights="pissa"), LoraMethod(loraplus_lr_ratio=2.0))) == 14


def test_a_stage_moves_b_at_its_own_rate(tmp_path):
    moved = {}
    for ratio in (1.0, 8.0):
        settings = {"type": "lora", "r": 4, "loraplus_lr_ratio": ratio}
        stage = make_stage(method=settings, max_steps=1, warmup_steps=0, max_grad_norm=None)
        train_stage(loaded(tiny_model("llama")), stage, tmp_path / str(ratio), make_rows(4))
        moved[ratio] = load_file(tmp_path / str(ratio) / "stages" / "sft" / "model" / "adapter_model.safetensors")
    for name, tensor in moved[8.0].items():
        torch.testing.assert_close(tensor, moved[1.0][name] * (8 if "lora_B" in name else 1), rtol=1e-4, atol=1e-6)


def test_pissa_of_more_ranks_than_a_weight_has_is_refused():
    with pytest.raises(RecipeError, match="no principal part of rank 17"):
        resolve(tiny_model("llama"), LoraMethod(r=17, init_lora_weights="pissa"))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_foreign_adapter_whose_start_changed_its_base_is_refused(tmp_path, start):
    pefts(init_lora_weights=start).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=f"init_lora_weights: {start}"):
        load_adapter(loaded(tiny_model("llama")), tmp_path)


def moe(**settings: Any) -> nn.Module:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts_per_tok": 1}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=32, **shape, **experts, **settings))


def test_all_linear_leaves_routers_out_and_a_router_that_is_named_is_refused():
    model = moe()
    assert target_modules(model, "all-linear") == sorted(TARGETS)
    with pytest.raises(RecipeError, match="mixture-of-experts router"):
        target_modules(model, ["q_proj", "shared_expert_gate"])
    model.model.layers[0].mlp.gate = nn.Linear(16, 3, bias=False)  # as families have it whose router is a linear layer
    assert target_modules(model, None) == sorted(TARGETS)
    with pytest.raises(RecipeError, match="mixture-of-experts router"):
        target_modules(model, ["mlp.gate"])
    tuned = attach(loaded(model), LoraMethod(r=2), seed=0)
    assert not [name for name, _ in tuned.named_parameters() if "lora" in name and ".gate." in name]


def test_a_layer_that_bears_a_routers_name_is_a_target_by_its_full_name():
    model = moe()
    model.model.layers[0].mlp.up = nn.Linear(16, 3, bias=False)
    model.model.layers[0].self_attn.up = nn.Linear(16, 16, bias=False)
    assert target_modules(model, None) == sorted([*TARGETS, "layers.0.self_attn.up"])


def test_a_dense_model_has_no_router():
    model = tiny_model("llama")
    model.model.layers[0].mlp.narrow = nn.Linear(32, 1)
    assert "narrow" in target_modules(model, None)


def test_a_file_of_another_rank_does_not_fill_pissa(tmp_path):
    save_result(ours(init_lora_weights="pissa"), loaded(tiny_model("llama")), tmp_path, {})
    tensors = {
        name: tensor[:4].clone() if "lora_A" in name else tensor
        for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="shape"):
        continue_adapter(loaded(tiny_model("llama")), LoraMethod(r=4, init_lora_weights="pissa"), tmp_path)
