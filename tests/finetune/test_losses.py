"""Losses against their plain formulas."""

from __future__ import annotations

import pytest
import torch

from convex_caldera.finetune import losses
from convex_caldera.finetune.losses import divergence, next_token_loss, relative_error


def pair(shape: tuple[int, ...] = (2, 5, 11)) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return 2 * torch.randn(shape, generator=rng), 2 * torch.randn(shape, generator=rng)


@pytest.mark.parametrize("entries", [1, 30, 10**6])
def test_divergence_and_gradient_are_those_of_the_formula(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.SLICE_ENTRIES, "cpu", entries)
    q, p = pair()
    ours, plain = q.clone().requires_grad_(), q.clone().requires_grad_()
    found = divergence(ours, p)
    expected = torch.nn.functional.kl_div(
        plain.log_softmax(-1).flatten(0, 1),
        p.log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (3 * found).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-7)


def test_divergence_from_itself_is_zero_and_survives_what_is_ruled_out() -> None:
    q, p = pair()
    assert float(divergence(p, p)) == pytest.approx(0.0, abs=1e-6)
    p[..., 3] = -torch.inf
    q[..., 3] = -torch.inf
    assert torch.isfinite(divergence(q, p))
    q[0, 0, 0] = torch.nan
    assert torch.isnan(divergence(q, p))


def test_relative_error_is_scale_free() -> None:
    x, y = pair()
    assert float(relative_error(x, y)) == pytest.approx(float(relative_error(9 * x, 9 * y)))
    assert float(relative_error(0 * y, y)) == pytest.approx(1.0)


def test_next_token_loss_skips_the_first_token() -> None:
    logits, _ = pair((1, 4, 7))
    tokens = torch.tensor([[6, 1, 2, 3]])
    log_q = logits[0, :3].log_softmax(-1)
    expected = -(log_q[0, 1] + log_q[1, 2] + log_q[2, 3]) / 3
    assert float(next_token_loss(logits, tokens)) == pytest.approx(float(expected))


@pytest.mark.parametrize("tiles", [True, False])
def test_products_are_rounded_in_training_only_and_only_where_that_is_faster(
    tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles}, raising=False)
    x, w = torch.randn(3, 8), torch.randn(5, 8)
    with losses.mixed_precision(torch.device("cpu")):
        assert torch.nn.functional.linear(x, w).dtype == (
            torch.bfloat16 if tiles else torch.float32
        )
    with torch.no_grad(), losses.mixed_precision(torch.device("cpu")):
        assert torch.nn.functional.linear(x, w).dtype == torch.float32
