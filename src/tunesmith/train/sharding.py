"""A policy whose weights are sharded over the processes, by torch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv:2304.11277).

What is large is sharded: the base, layer by layer, and with it gradients and optimiser state where it trains. Adapters and heads are
small: every process holds them whole, as without sharding. Gradients are summed, not averaged, since each term was divided by the whole
window's divisor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ..data.forest import build_forest
from ..models.adapters import MARKS
from ..models.layout import layers_of
from ..models.policy import Policy
from ..rundir import world


def shard(policy: Policy) -> None:
    """Shards a policy that stands whole on every process, the same on all. To be done before an optimiser takes its parameters."""
    mesh = init_device_mesh(policy.causal.device.type, (world(),))
    adapted = isinstance(policy.model, PeftModel)
    held = {
        parameter
        for name, parameter in policy.named_parameters()
        if name.startswith("heads.") or (adapted and (parameter.requires_grad or any(mark in name for mark in MARKS)))
    }
    for module in (*layers_of(policy.backbone), policy):
        sharded = fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
            ignored_params=held,
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    with torch.no_grad():  # which module is the root is decided by the first forward pass: it must be the policy's
        policy(build_forest([(np.zeros(2, dtype=np.int64), np.array([0, 1], dtype=np.float32))]))
    policy.whole = partial(_whole, policy)


@contextmanager
def _whole(policy: Policy) -> Iterator[None]:
    modules = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)
