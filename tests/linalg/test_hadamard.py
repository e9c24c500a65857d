"""Hadamard matrices of every order asked for are orthogonal exactly; rotate applies them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.errors import ShapeError
from convex_caldera.linalg import hadamard
from convex_caldera.linalg.hadamard import (
    base_matrix,
    base_order,
    hartley,
    paley1,
    paley2,
    rotate,
    sylvester,
)
from tests.examples import examples
from tests.oracles import paley as oracle

# Widths of published models that other packages refuse, small odd ones, and the rule's choice.
CHOICES = {
    1: ("sylvester", 1),
    2: ("sylvester", 1),
    3: ("hartley", 3),
    6: ("hartley", 3),
    7: ("hartley", 7),
    12: ("paley1", 12),
    28: ("paley1", 28),
    48: ("paley1", 12),
    96: ("paley1", 12),
    171: ("hartley", 171),
    288: ("paley2", 36),
    800: ("paley2", 100),
    896: ("paley1", 28),
    3584: ("paley1", 28),
    4096: ("sylvester", 1),
    4864: ("paley2", 76),
    5632: ("paley1", 44),
    10920: ("hartley", 1365),  # Paley II would be 5460, beyond the cap
    10944: ("paley1", 684),
    11008: ("paley1", 344),
    13696: ("hartley", 107),
    13824: ("paley1", 108),
    29568: ("paley2", 924),
}
TIGHT = 1e-12  # float64 rounding of a few hundred products, norms near 1


def dense(n: int) -> torch.Tensor:
    """T_n written out by the rule, without the fast path."""
    B = base_matrix(n, torch.float64)
    rest = n // len(B)
    return torch.kron(B, torch.from_numpy(sylvester(rest)).double() / rest**0.5)


@pytest.mark.parametrize(("n", "choice"), CHOICES.items())
def test_base_order_follows_the_rule(n: int, choice: tuple[str, int]) -> None:
    assert base_order(n) == choice


@pytest.mark.parametrize("q", [3, 7, 11, 19, 23, 27, 31, 43, 83, 243, 343, 683])
def test_paley1_is_hadamard(q: int) -> None:
    B = paley1(q).astype(float)  # exact: integers far below 2^53
    assert (np.abs(B) == 1).all()
    assert np.array_equal(B @ B.T, (q + 1) * np.eye(q + 1))
    assert np.array_equal(B + B.T, 2 * np.eye(q + 1))  # I + skew


@pytest.mark.parametrize("q", [5, 9, 13, 17, 25, 29, 37, 49, 81, 121, 125, 169, 461])
def test_paley2_is_hadamard_and_symmetric(q: int) -> None:
    B = paley2(q).astype(float)
    assert (np.abs(B) == 1).all()
    assert np.array_equal(B @ B.T, 2 * (q + 1) * np.eye(2 * (q + 1)))
    assert np.array_equal(B, B.T)


@examples(30)
@given(order=st.integers(1, 200))
def test_hartley_is_symmetric_orthogonal_and_flat(order: int) -> None:
    C = hartley(order)
    assert np.array_equal(C, C.T)
    assert np.allclose(C @ C, np.eye(order), atol=TIGHT)
    assert np.abs(C).max() <= np.sqrt(2 / order) + TIGHT


def test_first_paley_matrices_by_hand() -> None:
    # q = 3: squares {1}; Q[i, j] = chi(i - j).
    assert paley1(3).tolist() == [[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]]
    # q = 5: squares {1, 4}; row 1 of C is [1, 0, 1, -1, -1, 1].
    assert paley2(5)[2].tolist() == [1, 1, 1, -1, 1, 1, -1, -1, -1, -1, 1, 1]


@pytest.mark.parametrize(("r", "k"), [(3, 1), (7, 1), (43, 1), (3, 3), (7, 3)])
def test_paley1_equals_the_literal_rule(r: int, k: int) -> None:
    assert paley1(r**k).tolist() == oracle.paley1(r, k)


@pytest.mark.parametrize(("r", "k"), [(5, 1), (17, 1), (3, 2), (5, 2), (7, 2), (3, 4), (5, 3)])
def test_paley2_equals_the_literal_rule(r: int, k: int) -> None:
    assert paley2(r**k).tolist() == oracle.paley2(r, k)


def test_field_of_nine_is_pinned() -> None:
    # x^2 + 1 is the first irreducible over GF(3): x^2 = 2, (1+x)^2 = 2x, (1+2x)^2 = x, so the
    # squares are 1, 2, x, 2x, that is elements 1, 2, 3 and 6.
    row = paley2(9)[2:, 0].reshape(9, 2)[:, 0]  # column 0 of C below the border, all ones
    assert row.tolist() == [1] * 9
    chi = paley2(9)[2:, 2].reshape(9, 2)[1:, 0]  # chi(element i - element 0)
    assert chi.tolist() == [1, 1, 1, -1, -1, 1, -1, -1]


@pytest.mark.parametrize("n", [n for n in CHOICES if n <= 1000])
def test_rotate_applies_the_dense_matrix(n: int) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).double()
    T = dense(n)
    assert torch.allclose(rotate(x), x @ T.T, atol=TIGHT, rtol=0)
    assert torch.allclose(rotate(x, inverse=True), x @ T, atol=TIGHT, rtol=0)


@pytest.mark.parametrize("n", CHOICES)
def test_rotate_is_inverted_and_preserves_length(n: int) -> None:
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(n)).double()
    y = rotate(x)
    assert torch.allclose(rotate(y, inverse=True), x, atol=TIGHT, rtol=0)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1), rtol=TIGHT)


@examples(60)
@given(n=st.integers(1, 260), seed=st.integers(0, 9))
def test_rotate_is_orthogonal_at_any_order(n: int, seed: int) -> None:
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed)).double()
    for y in (rotate(rotate(x), inverse=True), rotate(rotate(x, inverse=True))):
        assert torch.allclose(y, x, atol=TIGHT, rtol=0)


@pytest.mark.parametrize("n", [64, 96, 171, 896, 4096])
def test_one_channel_spreads_over_all(n: int) -> None:
    x = torch.zeros(n)
    x[n // 3] = 1.0
    largest = rotate(x).abs().max().item()
    flat = 2.0 if base_order(n)[0] == "hartley" else 1.0
    assert largest <= (flat / n) ** 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rotate_keeps_dtype_and_argument(dtype: torch.dtype) -> None:
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = x.clone()
    y = rotate(x)
    assert y.dtype == dtype and torch.equal(x, kept)
    exact = rotate(x.double())
    assert torch.allclose(y.double(), exact, atol=4 * torch.finfo(dtype).eps, rtol=1e-2)


@pytest.mark.parametrize("inverse", [False, True])
def test_rotate_is_differentiable_even_if_first_used_in_inference(inverse: bool) -> None:
    hadamard._base_tensor.cache_clear()
    hadamard._sylvester_tensor.cache_clear()
    with torch.inference_mode():
        rotate(torch.ones(44, dtype=torch.float64))
    x = torch.randn(2, 44, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotate, (x, inverse))
    assert torch.autograd.gradgradcheck(rotate, (x, inverse))


def test_rotate_of_a_strided_view_equals_that_of_its_copy() -> None:
    x = torch.randn(28, 5, generator=torch.Generator().manual_seed(0)).double().T
    assert torch.equal(rotate(x), rotate(x.contiguous()))


@pytest.mark.parametrize("x", [torch.ones(3, 0), torch.tensor(1.0)])
def test_empty_axis_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="at least one channel"):
        rotate(x)
