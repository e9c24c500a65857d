"""Leading singular vectors against numpy, exactly and iteratively, under every kind of H."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convex_caldera.errors import NumericalError, RecipeError, ShapeError
from convex_caldera.linalg import svd
from convex_caldera.linalg.svd import top_left_singular, truncated_svd
from tests.examples import examples

TIGHT = 1e-9  # float64; spectra below have condition numbers up to ~1e4 before squaring
# The iterative way stops when a round adds < 1e-2 of the last wanted sigma^2 to the sum.
SETTLED_LOSS = 1e-3


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(n: int, kind: str, seed: int) -> Tensor | None:
    if kind == "identity":
        return None
    if kind == "diagonal":
        return torch.logspace(0, -2, n, dtype=torch.float64)
    X = random(2 * n, n, seed=seed + 1) * torch.logspace(0, -1, n, dtype=torch.float64)
    return X.T @ X / len(X) + 1e-3 * torch.eye(n, dtype=torch.float64)


def symmetric_root(H: Tensor | None, n: int) -> np.ndarray:
    if H is None:
        return np.eye(n)
    if H.dim() == 1:
        return np.diag(np.sqrt(H.numpy()))
    values, V = np.linalg.eigh(H.numpy())
    return (V * np.sqrt(values)) @ V.T


def remaining_loss(A: Tensor, U: Tensor, root: np.ndarray) -> float:
    """tr((A - U U^T A) H (A - U U^T A)^T)."""
    residual = A.double().numpy() - U.double().numpy() @ (U.double().T @ A.double()).numpy()
    return float(np.sum((residual @ root) ** 2))


KINDS = ("identity", "diagonal", "full")


@examples(40)
@given(
    m=st.integers(1, 15),
    n=st.integers(1, 15),
    kind=st.sampled_from(KINDS),
    data=st.data(),
)
def test_loss_is_the_sum_of_dropped_squares(m: int, n: int, kind: str, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, min(m, n)))
    A, H = random(m, n, seed=m * 31 + n), weight(n, kind, seed=n)
    root = symmetric_root(H, n)
    U = top_left_singular(A, H, rank)
    assert U.shape == (m, rank)
    assert torch.allclose(U.T @ U, torch.eye(rank).double(), atol=TIGHT)
    sigma = np.linalg.svd(A.numpy() @ root, compute_uv=False)
    expected = float(np.sum(sigma[rank:] ** 2))
    assert remaining_loss(A, U, root) == pytest.approx(expected, rel=TIGHT, abs=TIGHT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_columns_are_the_singular_vectors_in_order(kind: str, shape: tuple[int, int]) -> None:
    A, H = random(*shape, seed=3), weight(shape[1], kind, seed=4)
    U = top_left_singular(A, H, 5)
    oracle = np.linalg.svd(A.numpy() @ symmetric_root(H, shape[1]))[0][:, :5]
    assert np.allclose(np.abs(np.sum(oracle * U.numpy(), axis=0)), 1.0, atol=1e-7)


def test_no_perturbation_lowers_the_loss() -> None:
    A, H = random(12, 10, seed=0), weight(10, "full", seed=1)
    root = symmetric_root(H, 10)
    U = top_left_singular(A, H, 3)
    best = remaining_loss(A, U, root)
    for seed in range(20):
        other = torch.linalg.qr(U + 0.1 * random(12, 3, seed=seed + 50)).Q
        assert remaining_loss(A, other, root) >= best


def test_full_weight_beats_lesser_weights_under_itself() -> None:
    A, H = random(12, 10, seed=0), weight(10, "full", seed=1)
    assert H is not None
    root = symmetric_root(H, 10)
    full, diagonal, plain = (
        remaining_loss(A, top_left_singular(A, metric, 3), root)
        for metric in (H, H.diagonal(), None)
    )
    assert full <= diagonal and full <= plain


@pytest.fixture
def always_iterate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send small matrices the iterative way, and fail if it hands them to the exact one."""
    monkeypatch.setattr(svd, "EXACT_SIZE", 0)
    monkeypatch.setattr(svd, "EXACT_SHARE", 2.0)
    monkeypatch.delattr(svd, "_exact")


@pytest.mark.usefixtures("always_iterate")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(90, 120), (120, 90)])
@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_iteration_reaches_the_optimal_loss(
    kind: str, shape: tuple[int, int], signal: float
) -> None:
    m, n = shape
    A, H = random(m, n, seed=7), weight(n, kind, seed=8)
    A = A + signal * random(m, 8, seed=9) @ random(8, n, seed=10)
    root = symmetric_root(H, n)
    U = top_left_singular(A, H, 8)
    assert torch.allclose(U.T @ U, torch.eye(8).double(), atol=TIGHT)
    optimum = float(np.sum(np.linalg.svd(A.numpy() @ root, compute_uv=False)[8:] ** 2))
    assert optimum * (1 - TIGHT) <= remaining_loss(A, U, root) <= optimum * (1 + SETTLED_LOSS)


@pytest.mark.usefixtures("always_iterate")
def test_iteration_survives_a_massive_channel() -> None:
    A = random(80, 100, seed=1)
    H = torch.ones(100, dtype=torch.float64)
    H[17] = 1e7
    root = symmetric_root(H, 100)
    U = top_left_singular(A, H, 6)
    optimum = float(np.sum(np.linalg.svd(A.numpy() @ root, compute_uv=False)[6:] ** 2))
    assert remaining_loss(A, U, root) <= optimum * (1 + SETTLED_LOSS)


@pytest.mark.usefixtures("always_iterate")
@pytest.mark.parametrize("true_rank", [0, 3])
def test_iteration_handles_rank_deficiency(true_rank: int) -> None:
    A = random(60, true_rank, seed=1) @ random(true_rank, 70, seed=2)
    U = top_left_singular(A, None, 5)
    assert torch.allclose(U.T @ U, torch.eye(5).double(), atol=TIGHT)
    assert torch.allclose(U @ (U.T @ A), A, atol=1e-7)


@pytest.mark.usefixtures("always_iterate")
def test_warm_start_with_the_answer_keeps_it() -> None:
    A = random(70, 80, seed=1) + random(70, 4, seed=2) @ random(4, 80, seed=3)
    U = top_left_singular(A, None, 4)
    again = top_left_singular(A, None, 4, start=U)
    assert torch.allclose(again @ again.T, U @ U.T, atol=1e-6)


@pytest.mark.usefixtures("always_iterate")
def test_same_generator_same_answer() -> None:
    A = random(70, 80, seed=1)
    one, two = (
        top_left_singular(A, None, 4, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(one, two)


def test_unsettled_iteration_is_finished_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    A = random(60, 70, seed=1)
    expected = top_left_singular(A, None, 4)
    monkeypatch.setattr(svd, "EXACT_SIZE", 0)
    monkeypatch.setattr(svd, "EXACT_SHARE", 2.0)
    monkeypatch.setattr(svd, "MAX_ROUNDS", 1)
    assert torch.equal(top_left_singular(A, None, 4), expected)


@pytest.mark.parametrize("iterate", [False, True])
@pytest.mark.parametrize("shape", [(50, 60), (60, 50)])
def test_truncated_svd_matches_numpy(
    iterate: bool, shape: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    if iterate:
        request.getfixturevalue("always_iterate")
    # A gap after the fourth value, so that the leading triples are well defined.
    A = 0.01 * random(*shape, seed=2) + random(shape[0], 4, seed=3) @ random(4, shape[1], seed=4)
    U, S, Vh = truncated_svd(A, 4)
    P, sigma, Qt = np.linalg.svd(A.numpy(), full_matrices=False)
    assert np.allclose(S.numpy(), sigma[:4], rtol=1e-8)
    assert np.allclose(((U * S) @ Vh).numpy(), (P[:, :4] * sigma[:4]) @ Qt[:4], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept_and_arguments_left_alone(dtype: torch.dtype) -> None:
    A, H = random(8, 6, seed=0).to(dtype), weight(6, "full", seed=1)
    assert H is not None
    kept = A.clone(), H.clone()
    assert top_left_singular(A, H, 2).dtype == dtype
    assert all(t.dtype == dtype for t in truncated_svd(A, 2))
    assert torch.equal(A, kept[0]) and torch.equal(H, kept[1])


def test_bad_input_is_refused() -> None:
    A = torch.ones(3, 4)
    with pytest.raises(RecipeError, match="rank 4 is out of range for 3 x 4"):
        top_left_singular(A, None, 4)
    with pytest.raises(ShapeError, match="H must be"):
        top_left_singular(A, torch.ones(3), 1)
    with pytest.raises(ShapeError, match="start must have 3 rows"):
        truncated_svd(A, 1, start=torch.ones(4, 1))
    with pytest.raises(ShapeError, match="expected a matrix"):
        truncated_svd(torch.ones(3), 1)
    with pytest.raises(NumericalError, match="NaN"):
        truncated_svd(A * float("nan"), 1)
