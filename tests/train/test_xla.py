"""The loop's step on an XLA device, in an environment of its own (docs/scale.md): torch-xla's last release needs torch 2.9."""

from __future__ import annotations

import pytest

torch_xla = pytest.importorskip("torch_xla", reason="torch-xla 2.9 stands beside torch 2.9 alone")

import torch  # noqa: E402
from tests.models.method_cases import METHOD_CASES, method  # noqa: E402
from tests.toys import batch_of, loaded, make_rows, tiny_model  # noqa: E402

from tunesmith.models.methods import attach  # noqa: E402
from tunesmith.models.policy import Policy  # noqa: E402
from tunesmith.objectives import SFT  # noqa: E402
from tunesmith.train.window import run_window  # noqa: E402

BATCH = batch_of(make_rows(6, shared=20))


def two_updates(name: str, device: torch.device | str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses, and what trained, after two windows and their updates."""
    model = attach(loaded(tiny_model("llama")), method(METHOD_CASES[name]), seed=0).to(device)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    policy, optimiser, losses = Policy(model), torch.optim.AdamW(trained.values(), lr=1e-3), []
    for _ in range(2):
        losses.append(run_window(policy, SFT(), [BATCH]).loss)
        optimiser.step()
        optimiser.zero_grad()
        torch_xla.sync()  # else the next window's graph would hold this one's too
    return losses, {key: p.detach().cpu() for key, p in trained.items()}


@pytest.mark.parametrize("name", ["full", "lora"])
def test_two_updates_on_an_xla_device_are_those_of_the_processor(name):
    losses, weights = two_updates(name, torch_xla.device())  # first: torch makes its backward threads for the devices known by then
    plain, expected = two_updates(name, "cpu")
    assert losses[1] < losses[0]
    assert losses == pytest.approx(plain, rel=1e-5)
    for key, weight in expected.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-4, atol=1e-5, msg=key)
