"""Cholesky refuses usefully; H = U D U^T with the stated block structure."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.errors import NumericalError, ShapeError
from convex_caldera.linalg.factor import block_ldl, block_unit_upper, checked_cholesky
from tests.examples import examples

# Condition numbers below are at most ~1e4, so float64 leaves far less than this.
TIGHT = 1e-10


def positive_definite(n: int, seed: int) -> torch.Tensor:
    X = torch.randn(n, 2 * n + 3, generator=torch.Generator().manual_seed(seed)).double()
    return X @ X.T / X.shape[1] + 0.01 * torch.eye(n).double()


@examples(40)
@given(n=st.integers(1, 23), block=st.integers(1, 9), seed=st.integers(0, 99))
def test_block_ldl_reproduces_and_has_its_structure(n: int, block: int, seed: int) -> None:
    H = positive_definite(n, seed)
    U, D = block_ldl(H, block)
    owner = torch.arange(n) // block
    same, later = owner[:, None] == owner[None, :], owner[:, None] > owner[None, :]
    assert torch.equal(U[same], torch.eye(n).double()[same])
    assert (U[later] == 0).all() and (D[~same] == 0).all()
    assert torch.allclose(U @ D @ U.T, H, atol=TIGHT, rtol=0)
    assert torch.equal(block_unit_upper(H, block), U)


def test_block_unit_upper_matches_the_definition_with_inverses() -> None:
    H, block = positive_definite(12, 1), 4
    C = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    expected = C.clone()
    for j in range(0, 12, block):
        cols = slice(j, j + block)
        expected[:, cols] = C[:, cols] @ torch.linalg.inv(C[cols, cols])
    assert torch.allclose(block_unit_upper(H, block), expected, atol=TIGHT, rtol=0)


def test_one_block_is_the_identity() -> None:
    H = positive_definite(5, 0)
    U, D = block_ldl(H, 8)
    assert torch.equal(U, torch.eye(5).double())
    assert torch.allclose(D, H, atol=TIGHT, rtol=0)


def test_cholesky_is_float64_and_lower() -> None:
    A = positive_definite(6, 2)
    L = checked_cholesky(A.float(), "A")
    assert L.dtype == torch.float64
    assert torch.equal(L, L.tril())
    assert torch.allclose(L @ L.T, A.float().double(), atol=TIGHT, rtol=0)


def test_arguments_are_left_alone() -> None:
    H = positive_definite(7, 3)
    kept = H.clone()
    block_ldl(H, 2)
    block_unit_upper(H, 1)
    assert torch.equal(H, kept)


def test_indefinite_matrix_names_itself_its_eigenvalue_and_the_remedy() -> None:
    A = torch.diag(torch.tensor([2.0, 1.0, -0.5]).double())
    with pytest.raises(NumericalError, match=r"layer 3 q: .*-5\.000e-01.*raise damping") as error:
        checked_cholesky(A, "layer 3 q")
    advised = float(str(error.value).split("more than ")[1].split()[0])
    mean = A.diagonal().mean()
    checked_cholesky(A + 1.1 * advised * mean * torch.eye(3), "layer 3 q")


def test_nan_is_named_as_such() -> None:
    A = torch.eye(3).double()
    A[1, 1] = float("nan")
    with pytest.raises(NumericalError, match="NaN or infinite"):
        checked_cholesky(A, "A")


@pytest.mark.parametrize("shape", [(2, 3), (4,)])
def test_not_square_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="square"):
        block_unit_upper(torch.ones(shape), 1)


def test_block_below_one_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least 1"):
        block_unit_upper(torch.eye(3), 0)
