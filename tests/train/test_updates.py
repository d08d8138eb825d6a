"""Each update rule against its reference library on one shared sequence of gradients, and what holds of all of them in training."""

from __future__ import annotations

import math

import pytest
import torch
from tests.toys import batch_of, is_a_neighbour, make_rows, make_stage, tiny_model
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

from tunesmith.errors import RecipeError
from tunesmith.models.policy import Policy
from tunesmith.objectives import SFT
from tunesmith.recipe import Stage
from tunesmith.train import masters
from tunesmith.train.optimiser import Optimiser
from tunesmith.train.updates import AdamW8bit, require_optimiser
from tunesmith.train.updates.muon import orthogonalised
from tunesmith.train.window import run_window

OPTIMS = ("adamw_torch_fused", "adamw_8bit", "adafactor", "muon")
SHAPES = {"matrix": (96, 48), "tall": (80, 64), "vector": (7,)}
RATES = (1e-3, 3e-3, 2e-3, 5e-4)


def parameters() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape) * 0.1) for name, shape in SHAPES.items()}


def gradients() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{name: torch.randn(shape) * 10.0 ** -(step % 3) for name, shape in SHAPES.items()} for step in range(len(RATES))]


def ours(optim: str, *, decay: float = 0.1, scales=None, **settings) -> dict[str, torch.nn.Parameter]:
    """The tensors after four updates."""
    held = parameters()
    optimiser = Optimiser(held.items(), make_stage(optim=optim, weight_decay=decay, max_grad_norm=None, **settings), scales=scales)
    for rate, given in zip(RATES, gradients(), strict=True):
        optimiser.zero_grad()
        for name, gradient in given.items():
            held[name].grad.add_(gradient)
        optimiser.step(rate, optimiser.grad_norm())
    return held


def theirs(make, held: dict[str, torch.nn.Parameter], *, decay: float = 0.1) -> None:
    """Lets a library's optimiser do the same; decay of matrices only."""
    optimiser = make([{"params": [p], "weight_decay": decay if p.dim() > 1 else 0.0} for p in held.values()])
    for rate, given in zip(RATES, gradients(), strict=True):
        for group in optimiser.param_groups:
            group["lr"] = rate
        for name, p in held.items():
            p.grad = given[name].clone()
        optimiser.step()


def assert_equal(mine, reference, **bounds) -> None:
    for name, p in reference.items():
        torch.testing.assert_close(mine[name].data, p.data, msg=lambda text, name=name: f"{name}: {text}", **bounds)


def test_adafactor_makes_the_updates_of_transformers():
    from transformers.optimization import Adafactor

    reference = parameters()
    theirs(lambda groups: Adafactor(groups, lr=1.0, scale_parameter=False, relative_step=False, warmup_init=False), reference)
    assert_equal(ours("adafactor"), reference, rtol=1e-5, atol=1e-7)


def test_adafactor_makes_the_updates_of_torch_whose_rate_is_relative_to_the_weights_size():
    reference, mine = parameters(), parameters()
    optimisers = {name: torch.optim.Adafactor([p], lr=1.0) for name, p in reference.items()}
    for step, given in enumerate(gradients(), 1):
        for name, p in reference.items():
            relative = max(1e-3, float(p.detach().norm()) / math.sqrt(p.numel())) * min(1.0, 1 / math.sqrt(step))
            if step == 1:
                alone = Optimiser([(name, mine[name])], make_stage(optim="adafactor", max_grad_norm=None))
                mine[name].alone = alone
            mine[name].alone.zero_grad()
            mine[name].grad.add_(given[name])
            mine[name].alone.step(relative, 1.0)
            p.grad = given[name].clone()
            optimisers[name].step()
    assert_equal(mine, reference, rtol=1e-4, atol=1e-6)


def test_muon_makes_the_updates_of_torch_for_matrices_and_adamws_for_the_rest():
    reference = parameters()
    matrices = {name: p for name, p in reference.items() if p.dim() == 2}
    theirs(lambda groups: torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw"), matrices)
    theirs(lambda groups: torch.optim.AdamW(groups), {"vector": reference["vector"]})
    assert_equal(ours("muon"), reference, rtol=1e-2, atol=2e-4)  # the iteration is in bf16: sums in another order


def test_muon_leaves_embeddings_and_heads_to_adamw():
    held, plain = parameters(), ours("adamw_torch_fused")
    optimiser = Optimiser(held.items(), make_stage(optim="muon", weight_decay=0.1, max_grad_norm=None), tables={"tall"})
    for rate, given in zip(RATES, gradients(), strict=True):
        optimiser.zero_grad()
        for name, gradient in given.items():
            held[name].grad.add_(gradient)
        optimiser.step(rate, 1.0)
    assert torch.equal(held["tall"], plain["tall"])
    assert not torch.allclose(held["matrix"], plain["matrix"])


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (3, 12, 12)])
def test_orthogonalised_matrices_have_singular_values_about_1_and_the_same_singular_vectors(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    found = orthogonalised(matrix).float()
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.4
    assert singular.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    along = u.mT @ found @ v.mT
    assert (along - torch.diag_embed(along.diagonal(dim1=-2, dim2=-1))).abs().max() < 0.1


def test_adamw_in_8_bits_makes_the_updates_of_bitsandbytes():
    from bitsandbytes.optim import AdamW8bit

    reference = parameters()
    theirs(lambda groups: AdamW8bit(groups, betas=(0.9, 0.999), eps=1e-8), reference)
    assert_equal(ours("adamw_8bit"), reference, rtol=1e-5, atol=1e-6)
    optimiser = Optimiser(parameters().items(), make_stage(optim="adamw_8bit"))
    assert {name: held.dtype for name, held in optimiser.state().items() if name.startswith("first.")} == {
        "first.matrix": torch.uint8,
        "first.tall": torch.uint8,
        "first.vector": torch.float32,  # too small for blocks of 256
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_in_8_bits_are_moved_a_block_at_a_time_to_the_same_bits(monkeypatch, dtype):
    """Whole tensors in fp32 beside them, the kernel's own copies included, would take more than the moments save."""

    def moved(block: int) -> tuple[dict[str, torch.Tensor], int]:
        monkeypatch.setitem(masters.UPDATE_BLOCK, "cpu", block)
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(60, 90).to(dtype))
        optimiser, largest, real = Optimiser([("weight", weight)], make_stage(optim="adamw_8bit")), 0, AdamW8bit.update

        def update(self, master, *rest):
            nonlocal largest
            largest = max(largest, master.numel())
            real(self, master, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(AdamW8bit, "update", update)
            for seed in range(3):
                optimiser.zero_grad()
                torch.manual_seed(seed)
                (weight * torch.randn(60, 90).to(dtype)).sum().backward()
                optimiser.step(1e-2, 1.0)  # the norm itself is summed by blocks
        return {name: held.clone() for name, held in optimiser.state().items()}, largest

    (whole, at_once), (cut, most) = moved(1 << 18), moved(1024)
    assert (at_once, most) == (5400, 1024)
    assert all(torch.equal(cut[name], held) for name, held in whole.items())


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_parameters_rate_is_its_scale_times_the_stages(optim):
    """With 16 times the rate on one tensor it moves as if the stage's rate were 16 times as high, and the others do not notice."""
    plain, scaled, start = ours(optim, decay=0.0), ours(optim, decay=0.0, scales={"tall": 16.0}), parameters()
    assert torch.equal(plain["matrix"], scaled["matrix"])
    moved = (scaled["tall"] - start["tall"]).norm() / (plain["tall"] - start["tall"]).norm()
    assert float(moved) == pytest.approx(16, rel=0.05)


def policy_of(dtype: torch.dtype, seed: int = 0) -> Policy:
    return Policy(tiny_model("llama", dtype=dtype, seed=seed))


def steps(policy: Policy, optimiser: Optimiser, count: int, rate: float) -> None:
    rows = make_rows(8)
    for _ in range(count):
        optimiser.zero_grad()
        run_window(policy, SFT(), [batch_of(rows[:4]), batch_of(rows[4:])])
        optimiser.step(rate, optimiser.grad_norm())


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_16_bit_weights_more_than_nine_tenths_move_and_each_is_its_master_rounded(optim, dtype):
    policy = policy_of(dtype)
    optimiser = Optimiser(policy.named_parameters(), make_stage(optim=optim))
    steps(policy, optimiser, 100 if dtype == torch.bfloat16 else 5, 1e-5)
    assert optimiser.fraction_changed() > 0.9
    for parameter, master in zip(optimiser.parameters, optimiser.masters, strict=True):
        assert master.dtype == torch.float32
        nearest = parameter.data - master.to(dtype)
        assert nearest.count_nonzero() == 0 if dtype == torch.float16 else is_a_neighbour(parameter.data, master)


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_state_saved_and_loaded_goes_on_bit_for_bit(optim, dtype):
    first, second = policy_of(dtype), policy_of(dtype)
    one, two = (Optimiser(p.named_parameters(), make_stage(optim=optim)) for p in (first, second))
    steps(first, one, 3, 1e-3)
    two.load({name: tensor.clone() for name, tensor in one.state().items()})
    steps(first, one, 2, 1e-3)
    steps(second, two, 2, 1e-3)
    assert all(torch.equal(tensor, two.state()[name]) for name, tensor in one.state().items())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert one.fraction_changed() == two.fraction_changed()


@pytest.mark.parametrize("optim", OPTIMS)
def test_the_loss_falls_under_every_rule(optim):
    policy, rows = policy_of(torch.float32), make_rows(8)
    began = run_window(policy, SFT(), [batch_of(rows)], backward=None).loss
    steps(policy, Optimiser(policy.named_parameters(), make_stage(optim=optim)), 30, 3e-3)
    assert run_window(policy, SFT(), [batch_of(rows)], backward=None).loss < 0.7 * began


def test_every_process_gives_the_same_list_of_gradients_whether_or_not_a_batch_reached_a_tensor():
    policy = policy_of(torch.bfloat16)
    optimiser = Optimiser(policy.named_parameters(), make_stage())
    idle = optimiser.gradients()
    steps(policy, optimiser, 1, 1e-3)
    busy = optimiser.gradients()
    assert [(g.shape, g.dtype) for g in idle] == [(g.shape, g.dtype) for g in busy]
    norm = optimiser.grad_norm()
    for gradient in busy:
        gradient.mul_(2)  # as the sum of two equal processes: the optimiser sees it
    assert optimiser.grad_norm() == pytest.approx(2 * norm, rel=1e-6)


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_parameter_moves_through_its_shard_as_a_whole_one_does(mesh, dtype):
    torch.manual_seed(0)
    value, x = torch.randn(12, 8).to(dtype), torch.randn(5, 8).to(dtype)
    plain = torch.nn.Parameter(value.clone())
    shard = torch.nn.Parameter(distribute_tensor(value.clone(), mesh, [Shard(0)]))
    optimisers = [Optimiser([("w", p)], make_stage(weight_decay=0.1)) for p in (plain, shard)]
    for p, optimiser in zip((plain, shard), optimisers, strict=True):
        for _ in range(3):
            optimiser.zero_grad()
            whole = p.full_tensor() if p is shard else p
            (x @ whole.T).float().square().sum().backward()
            optimiser.step(1e-2, optimiser.grad_norm(lambda squares: squares))
    assert torch.equal(optimisers[0].masters[0], optimisers[1].masters[0])
    assert torch.equal(plain.data, shard.full_tensor())
    assert optimisers[1].gradients() == []
    assert optimisers[1].without_gradient() == []
    assert optimisers[1].grad_norm(lambda squares: 4 * squares) == pytest.approx(2 * optimisers[0].grad_norm(), rel=1e-6)
    assert {name: t.shape for name, t in optimisers[0].state().items()} == {name: t.shape for name, t in optimisers[1].state().items()}


@pytest.mark.parametrize("optim", ["adafactor", "muon"])
def test_what_moves_whole_matrices_is_refused_for_shards(mesh, optim):
    shard = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0)]))
    with pytest.raises(RecipeError, match="`w` is sharded"):
        Optimiser([("w", shard)], make_stage(optim=optim))


def test_paged_moments_are_refused_where_there_is_no_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="paged_adamw_8bit needs a CUDA device, and this machine has none"):
        require_optimiser(make_stage(optim="paged_adamw_8bit"))


def test_a_number_that_the_rule_does_not_have_is_refused():
    with pytest.raises(ValueError, match="adam_beta2: optim: adafactor has no such number"):
        Stage(name="a", objective="sft", optim="adafactor", adam_beta2=0.95)
    Stage(name="a", objective="sft", optim="muon", adam_beta2=0.95)
