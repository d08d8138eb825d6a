"""The chunked head against log_softmax under autograd: values, gradients, entropy, in every variant."""

from __future__ import annotations

import pytest
import torch

from tunesmith.models import head
from tunesmith.models.head import token_logprobs

S, H, V = 23, 16, 301


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    return draw(S, H), draw(V, H), draw(V), torch.randint(0, V, (S,), generator=generator), torch.randn(S, generator=generator)


def reference(hidden, weight, bias, targets, softcap, scale):
    logits = torch.nn.functional.linear(hidden, weight, bias).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits, -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


VARIANTS = [(None, 1.0, False), (5.0, 1.0, False), (None, 0.25, False), (None, 1.0, True), (5.0, 0.5, True)]


@pytest.mark.parametrize("trains", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("softcap, scale, has_bias", VARIANTS)
@pytest.mark.parametrize("seed", range(8))
def test_values_and_gradients_are_those_of_log_softmax(seed, softcap, scale, has_bias, trains, monkeypatch):
    chunk, few, many = 4 * V * 3, 4 * V * 7, 4 * V * 7 * 16  # tokens of a chunk, of a product, and of one with all; the last ones ragged
    monkeypatch.setitem(head.ROOM, "cpu", head.Room(chunk, few, many if seed % 2 else few))  # gradients kept, or computed again
    hidden, weight, bias, targets, grad = inputs(seed)
    ours = [
        hidden.clone().requires_grad_(),
        weight.clone().requires_grad_(trains),
        bias.clone().requires_grad_(trains) if has_bias else None,
    ]
    theirs = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in ours]
    logprobs, entropy = token_logprobs(ours[0], ours[1], targets, bias_V=ours[2], softcap=softcap, scale=scale, entropy=True)
    want, want_entropy = reference(*theirs, targets, softcap, scale)
    torch.testing.assert_close(logprobs, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-4, atol=1e-5)
    assert not entropy.requires_grad
    (logprobs * grad).sum().backward()
    (want * grad).sum().backward()
    for mine, reference_ in zip(ours, theirs, strict=True):
        if mine is not None and mine.requires_grad:
            assert torch.nn.functional.cosine_similarity(mine.grad.flatten(), reference_.grad.flatten(), dim=0) > 0.9999
            torch.testing.assert_close(mine.grad, reference_.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trains", [True, False], ids=["trainable", "frozen"])
def test_in_bf16_the_gradient_points_where_the_exact_one_does(trains, monkeypatch):
    monkeypatch.setitem(head.ROOM, "cpu", head.Room(4 * V * 3, 4 * V * 7, 4 * V * 7))
    hidden, weight, _, targets, grad = inputs(0, torch.bfloat16)
    mine, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    (token_logprobs(mine, weight.clone().requires_grad_(trains), targets)[0] * grad).sum().backward()
    (torch.log_softmax(exact @ weight.double().T, -1).gather(1, targets[:, None])[:, 0] * grad).sum().backward()
    assert torch.nn.functional.cosine_similarity(mine.grad.double().flatten(), exact.grad.flatten(), dim=0) > 0.9999


@pytest.mark.parametrize("at_once, passes", [(1, 2), (16, 1)], ids=["computed again", "gradient kept"])
def test_the_full_logits_never_exist_in_fp32_beside_those_of_the_product(monkeypatch, at_once, passes):
    seen = []
    plain = head._logits
    monkeypatch.setitem(head.ROOM, "cpu", head.Room(4 * V * 5, 4 * V * 5, 4 * V * 5 * at_once))
    monkeypatch.setattr(head, "_logits", lambda h, *rest: seen.append(len(h)) or plain(h, *rest))
    hidden, weight, _, targets, _ = inputs(0)
    token_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets)[0].sum().backward()
    assert max(seen) == 5
    assert sum(seen) == passes * S


@pytest.mark.parametrize("trains, products", [(True, [15, 8]), (False, [10, 10, 3])], ids=["trainable", "frozen"])
def test_a_product_makes_as_many_logits_as_there_is_room_for(monkeypatch, trains, products):
    seen, plain = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda h, *rest: seen.append(len(h)) or plain(h, *rest))
    monkeypatch.setitem(head.ROOM, "cpu", head.Room(4 * V * 5, 4 * V * 10, 4 * V * 15))
    hidden, weight, _, targets, _ = inputs(0)
    token_logprobs(hidden.requires_grad_(), weight.requires_grad_(trains), targets)
    assert seen == products


def test_no_supervised_token_gives_no_logprobs_and_no_gradient():
    hidden, weight, _, targets, _ = inputs(0)
    hidden.requires_grad_()
    logprobs, _ = token_logprobs(hidden[:0], weight, targets[:0])
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    assert not hidden.grad.any()
