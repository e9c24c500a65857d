"""A layer's low-rank program: solved, written compactly, and enclosed by the checker."""

from __future__ import annotations

import base64
import functools

import numpy as np
import pytest
import torch

from convex_caldera.allocate.layer_program import layer_program
from convex_caldera.allocate.program import solve_program
from convex_caldera.certify.layer_programs import check_layer_program
from convex_caldera.errors import CheckError, FormatError
from tests.examples import first

LOSS, PRICE = 0.4, 2e-5


def data(seed=0, shape=(40, 24), spikes=3):
    """A weight with a few strong directions, and second moments of correlated inputs."""
    draw = np.random.default_rng(seed)
    m, n = shape
    W = 0.05 * draw.standard_normal(shape)
    W += draw.standard_normal((m, spikes)) @ draw.standard_normal((spikes, n))
    X = draw.standard_normal((3 * n, n)) @ draw.standard_normal((n, n))
    return W, X.T @ X / len(X)


def solved(W, H, loss=LOSS, price=PRICE):
    return layer_program(torch.from_numpy(W), torch.from_numpy(H), loss, price, 4)


@functools.cache
def _honest():
    W, H = data()
    return solved(W, H)


def honest():
    """The record of `data()`, which is solved once; a copy."""
    return dict(_honest())


@pytest.mark.parametrize("seed", first(1, range(3)))
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (16, 16), (7, 90)])
def test_program_is_enclosed_and_its_gap_is_small(shape, seed):
    W, H = data(seed, shape)
    record = solved(W, H)
    found = check_layer_program("x", record, W, H, LOSS, PRICE)
    assert record["rank"] > 0
    assert found.gap <= record["gap"] + 1e-9 <= 5e-6
    assert found.dual <= found.primal
    assert record["primal"] == pytest.approx(found.primal, rel=1e-6)


def test_program_is_that_of_the_solver():
    W, H = data()
    record = honest()
    damped = torch.from_numpy(H + record["ridge"] * np.eye(len(H)))
    constants = {key: record[key] for key in ("mu", "lam", "kappa")}
    exact = solve_program(
        [torch.from_numpy(W)], [damped], **constants, c=0.0, k=1.0, p=0.0, b_min=0.0, b_max=0.0,
        budget=0.0, tol=1e-10,
    )  # fmt: skip
    assert record["dual"] <= exact.primal <= record["primal"]
    assert exact.ranks == (record["rank"],)


def test_rank_falls_with_the_price_of_its_bits():
    W, H = data(spikes=6)
    ranks = [solved(W, H, price=price)["rank"] for price in (1e-7, 1e-5, 1e-3, 1e-1, 1e3)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[-1] == 0


def test_no_program_where_nothing_costs_anything():
    W, H = data()
    for W_, loss, price in ((W, 0.0, PRICE), (W, LOSS, 0.0), (0 * W, LOSS, PRICE)):
        assert solved(W_, H, loss, price) is None
        assert check_layer_program("x", None, W_, H, loss, price) is None
        with pytest.raises(CheckError, match="nothing costs"):
            check_layer_program("x", honest(), W_, H, loss, price)
    with pytest.raises(FormatError):
        check_layer_program("x", None, W, H, LOSS, PRICE)


@pytest.mark.parametrize("share", first(2, [1e-6, 3.0, 1e-13]))
def test_losses_of_any_size_have_a_program(share):
    W, H = data()
    loss = share * float(((W @ H) * W).sum())
    record = solved(W, H, loss, loss / W.size)
    found = check_layer_program("x", record, W, H, loss, loss / W.size)
    assert found.gap <= record["gap"] + 1e-9
    assert found.gap <= (1e-5 if share > 1e-9 else 0.1)


def test_singular_curvature_has_a_program():
    W, H = data()
    H[:, :5] = H[:5] = 0.0
    found = check_layer_program("x", solved(W, H), W, H, LOSS, PRICE)
    assert found.gap <= 2e-6


def test_a_worse_point_needs_a_larger_gap():
    W, H = data()
    record = honest()
    raw = np.frombuffer(base64.b64decode(record["factors"]), dtype="<f2")
    worse = {**record, "factors": base64.b64encode((raw * np.float16(0.9)).tobytes()).decode()}
    with pytest.raises(CheckError, match="claimed"):
        check_layer_program("x", worse, W, H, LOSS, PRICE)
    admitted = {**worse, "primal": 2 * record["primal"], "dual": 0.0, "gap": 1.0}
    found = check_layer_program("x", admitted, W, H, LOSS, PRICE)
    assert found.gap > 10 * record["gap"]
    assert found.dual <= record["primal"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"mu": 1.001}, CheckError),
        ({"kappa": 0.5}, CheckError),
        ({"ridge": 2.0}, CheckError),
        ({"lam": 2.0}, CheckError),
        ({"primal": 1 - 1e-5}, CheckError),
        ({"dual": 1 + 1e-5}, CheckError),
        ({"gap": 0.0}, CheckError),
    ],
    ids=str,
)
def test_changed_figures_are_refused(change, error):
    W, H = data()
    record = honest()
    for key, factor in change.items():
        record[key] *= factor
    with pytest.raises(error):
        check_layer_program("x", record, W, H, LOSS, PRICE)


@pytest.mark.parametrize("factors", ["", "!", 3, None, "AAAA", "fH9/" * 1000])
def test_damaged_factors_are_refused(factors):
    W, H = data()
    with pytest.raises(FormatError):
        check_layer_program("x", {**honest(), "factors": factors}, W, H, LOSS, PRICE)


def test_another_weight_curvature_or_price_is_refused():
    W, H = data()
    record = honest()
    for other in ((2 * W, H, LOSS, PRICE), (W, 2 * H, LOSS, PRICE), (W, H, LOSS, 2 * PRICE)):
        with pytest.raises(CheckError):
            check_layer_program("x", record, *other)
