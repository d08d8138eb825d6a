"""A policy trained by DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): each process holds its share of gradients, masters and
moments (`zero2`), or of the weights too (`zero3`). The loop, the losses and the checkpoints stay ours.

    optimiser = ZeroOptimiser(policy, stage, level=3)   # in place of an Optimiser; the policy is sharded by it

DeepSpeed sums gradients as they come, clips, and has torch's AdamW move fp32 masters; a bf16 weight is its master's nearest value. A
checkpoint holds every process's share of each tensor's rows under its name, so that another number of processes, or in fp32 another
strategy, goes on from it.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, RecipeError
from ..models.policy import Policy
from ..recipe import Stage
from ..rundir import rank, world
from .optimiser import SAMPLE, Reduce, decays

BUCKET = 50_000_000  # numbers of gradients that are sent at once, in a buffer of as many
MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}
"""torch's names of what AdamW remembers, by the checkpoint's."""


def require_deepspeed(strategy: str) -> None:
    """Raises RecipeError where a strategy of DeepSpeed's cannot work here."""
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            f"{strategy} needs DeepSpeed, which is not installed",
            where="launch.strategy",
            mend="pip install 'tunesmith[deepspeed]', or take fsdp, which shards as zero3 does and needs nothing else",
        )


def require_one_type(stage: Stage, trained: set[torch.dtype], held: set[torch.dtype]) -> torch.dtype:
    """The type of the weights that train. held: of all weights. Raises RecipeError where they are of several, as DeepSpeed trains none."""
    dtypes = trained | held if torch.bfloat16 in trained else trained  # it casts all other numbers of such a model
    if len(dtypes) > 1:
        raise RecipeError(
            f"DeepSpeed trains models of one type in 16 bits, and this stage's is of {' and '.join(sorted(map(str, dtypes)))}",
            where=f"stages.{stage.name}",
            mend="launch.strategy: fsdp, model.dtype: float32, or an adapter, which is fp32 on a base of any type",
        )
    return next(iter(trained))


class ZeroOptimiser:
    """What the loop asks of an `Optimiser`, by DeepSpeed. Every method that reads or writes tensors is to be called by all processes.

    level: ZeRO's stage, 2 or 3. scales: how many times the stage's learning rate a parameter moves at, by name. Raises RecipeError for
    weights of several types, which DeepSpeed does not train together.
    """

    loss_scale = None
    scale = 1.0

    def __init__(self, policy: Policy, stage: Stage, *, level: int, scales: Mapping[str, float] | None = None):
        named = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self.level, self.updates = level, 0
        held = {parameter.dtype for parameter in policy.parameters() if parameter.is_floating_point()}
        dtype = require_one_type(stage, {parameter.dtype for parameter in self.parameters}, held)
        for parameter in policy.parameters():
            parameter.data = parameter.data.contiguous()  # PiSSA's are not, and DeepSpeed sends their bytes
        scales = scales or {}
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, parameter in named:
            groups.setdefault((decays(name, parameter), scales.get(name, 1.0)), []).append(parameter)
        self._adamw = torch.optim.AdamW(
            [{"params": held, "weight_decay": stage.weight_decay if decay else 0.0} for (decay, _), held in groups.items()],
            betas=(stage.adam_beta1, stage.adam_beta2),
            eps=stage.adam_epsilon,
            fused=True,
        )
        self._scales = [scale for _, scale in groups]
        bucket = min(BUCKET, sum(map(Tensor.numel, self.parameters)))
        self._engine = _engine(policy, self._adamw, level, stage.max_grad_norm, dtype, bucket)
        self._remember()
        self._reached = [torch.zeros((), dtype=torch.bool) for _ in named]
        self._watches = [p.register_hook(_reaching(reached)) for p, reached in zip(self.parameters, self._reached, strict=True)]
        self._learned = False
        self._stride = max(1, sum(map(Tensor.numel, self._masters)) // SAMPLE)
        self._start = self._sample()
        if level == 3:
            policy.whole = self._whole

    def zero_grad(self) -> None:
        """An update takes all gradients, and one that was not made has thrown them away; zero3 keeps those of what is not reached again."""
        self._learned = False
        if self.level == 3:
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()

    def backward(self, loss: Tensor) -> None:
        """Adds a loss's gradients to what there is. DeepSpeed takes the mean over the processes, where ours is a sum."""
        self._engine.optimizer.clear_backward_seen_flag()  # as the engine's own forward does: else zero3 keeps the last batch's alone
        self._engine.backward(loss * world(), scale_wrt_gas=False)
        self._learned = True

    def gradients(self) -> list[Tensor]:
        """None is left to be summed over the processes."""
        return []

    def update(self, learning_rate: float, reduce: Reduce | None = None) -> float:
        """One update, and the norm of its gradients before they were clipped; where that is not finite, nothing moves."""
        if not self._learned:
            return 0.0
        for group, scale in zip(self._adamw.param_groups, self._scales, strict=True):
            group["lr"] = learning_rate * scale
        self._engine.step()
        if not self._engine.was_step_applied():
            return math.inf
        self.updates += 1
        return float(self._engine.get_global_grad_norm())

    def without_gradient(self, reduce: Reduce) -> list[str]:
        """Names of tensors whose gradient was exactly 0 everywhere so far. reduce: sums over processes which shards have one, [names]."""
        has = reduce(torch.stack(self._reached).float().to(self.parameters[0].device)).tolist()
        silent = [name for name, one in zip(self.names, has, strict=True) if not one]
        if not silent:
            for watch in self._watches:
                watch.remove()
        return silent

    def fraction_changed(self) -> float:
        """The share of (sampled) weights of this process that differ from where the stage began."""
        return float((self._sample() != self._start).float().mean())

    @property
    def sharded(self) -> set[str]:
        """Names of tensors of which a checkpoint holds each process's part: all that have rows."""
        return {name for name, shape in zip(self.names, self._shapes(), strict=True) if len(shape)}

    def state(self) -> dict[str, Tensor]:
        """Everything an update depends on: of every weight, in fp32, and of its moments, this process's rows."""
        rows = {key: _mine(tensor).clone() for key, tensor in self._tensors()}
        return {"updates": torch.tensor(float(self.updates))} | rows

    def parts(self) -> dict[str, int]:
        """How many rows this process takes from a checkpoint, of those of which it takes a part: none, DeepSpeed cuts whole tensors."""
        return {}

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts a saved state's weights in place, and nothing else."""
        self._let_go()
        for name, parameter in zip(self.names, self.parameters, strict=True):
            self._put(parameter, tensors[f"weight.{name}"])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts a saved state in place. Raises CheckpointError if it is of other tensors, or of weights that are not held in fp32."""
        want = {"updates"} | {f"{kind}.{name}" for kind in ("weight", *MOMENTS) for name in self.names}
        if odd := sorted(want ^ set(tensors)):
            raise CheckpointError(
                f"the checkpoint's weights are not those that DeepSpeed holds: {odd[0]}",
                mend="resume with the launch.strategy that the run began with",
            )
        self.load_weights(tensors)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for kind, key in MOMENTS.items():
                self._put(parameter, tensors[f"{kind}.{name}"], key)
        self.updates = int(tensors["updates"])
        for held in self._adamw.state.values():
            held["step"].fill_(self.updates)

    def close(self) -> None:
        """Gives back what DeepSpeed holds of the policy, whose weights under zero3 are gone with it."""
        from deepspeed.runtime.zero import parameter_offload
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

        self._engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()  # it, and caches of methods, would keep the model for good
        for method in vars(PartitionedParameterCoordinator).values():
            for held in (cell.cell_contents for cell in getattr(method, "__closure__", None) or ()):
                getattr(held, "cache_clear", int)()
        for watch in self._watches:
            watch.remove()
        del self._engine, self._adamw
        gc.collect()

    @property
    def _masters(self) -> list[Tensor]:
        """The fp32 numbers that lie in this process, flat."""
        zero = self._engine.optimizer
        return zero.single_partition_of_fp32_groups if self.level == 2 else zero.fp32_partitioned_groups_flat

    def _sample(self) -> Tensor:
        return torch.cat([master.detach()[:: self._stride] for master in self._masters])

    def _remember(self) -> None:
        """Has AdamW remember from the start, which it would from the first update on: a checkpoint is put there before it."""
        for master in self._masters:
            moments = {key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS.values()}
            self._adamw.state[master] = {"step": torch.zeros((), device=master.device), **moments}
        if self.level == 2:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()  # at the first update otherwise

    def _shapes(self) -> list[torch.Size]:
        return [getattr(parameter, "ds_shape", parameter.shape) for parameter in self.parameters]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight and moment, whole, one at a time."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in zip(self.names, self.parameters, strict=True):
            yield f"weight.{name}", safe_get_full_fp32_param(parameter)
            for kind, key in MOMENTS.items():
                yield f"{kind}.{name}", safe_get_full_optimizer_state(parameter, key)

    def _put(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Sets a master, and the weight with it, or a moment, from the whole tensor."""
        from deepspeed import utils
        from deepspeed.runtime.zero import GatheredParameters

        value = value.to(self.parameters[0].device, torch.float32)
        if self.level == 2:
            own, moment, master = value, utils.safe_set_full_optimizer_state, utils.safe_set_full_fp32_param
        else:
            each = -(-value.numel() // world())  # the last process's part is filled up
            own = F.pad(value.flatten(), (0, each * world() - value.numel()))[each * rank() : each * (rank() + 1)]
            moment, master = utils.safe_set_local_optimizer_state, utils.safe_set_local_fp32_param
        if key is not None:
            moment(parameter, own, key)
            return
        master(parameter, own)
        with GatheredParameters([parameter], modifier_rank=0, enabled=self.level == 3), torch.no_grad():
            parameter.copy_(value)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """`Policy.whole`: all weights gathered, and no hook that takes them away again after a layer, or waits for the other processes."""
        from deepspeed.runtime.zero import GatheredParameters

        self._let_go()
        offload = self._engine.optimizer.parameter_offload
        with GatheredParameters(list(self._engine.module.parameters())):
            for hook in (offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                begin = offload.get_param_coordinator().reset_step
                offload.fwd_pre_hook = offload.module.register_forward_pre_hook(lambda *_: begin())
                offload._register_deepspeed_module(offload.module)

    def _let_go(self) -> None:
        """Waits for weights that a pass over them has asked for beforehand, and gives them back."""
        if self.level == 3:
            self._engine.optimizer._partition_all_parameters()


def _reaching(reached: Tensor) -> Any:
    def hook(gradient: Tensor) -> None:
        if not reached:
            reached.logical_or_(gradient.any().cpu())

    return hook


def _mine(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that all hold whole, as `torch.chunk` cuts them; a number stays."""
    if not tensor.dim():
        return tensor
    parts = tensor.chunk(world())
    return parts[rank()] if rank() < len(parts) else tensor[:0]


def _deepspeed() -> Any:
    """The library, without what it does at each start for others."""
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
    import deepspeed

    if not torch.cuda.is_available():  # a collective that only inference uses, and that would be compiled for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _engine(policy: Policy, adamw: torch.optim.Optimizer, level: int, max_grad_norm: float | None, dtype: torch.dtype, bucket: int) -> Any:
    """DeepSpeed's engine over a policy, which sums gradients in fp32 and leaves it to the caller when an update is due. bucket: numbers
    that are sent at once."""
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # only counted
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": level, "overlap_comm": False, "reduce_bucket_size": bucket},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "steps_per_print": None,
    }
    engine, *_ = _deepspeed().initialize(model=policy, optimizer=adamw, config=settings, dist_init_required=False)
    return engine
