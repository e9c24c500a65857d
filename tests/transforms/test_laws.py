"""Law T3 for every transform of the table: inverse, loss and layer output are preserved."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.core.protocols import FittedTransform, Transform
from convex_caldera.errors import FormatError, RecipeError, ShapeError
from convex_caldera.transforms import TABLE, ActOrder, ColumnScale, Diagonal, RandomizedHadamard
from tests.examples import examples

TRANSFORMS: tuple[Transform, ...] = (
    RandomizedHadamard(),
    RandomizedHadamard(outputs=False),
    RandomizedHadamard(inputs=False),
    ColumnScale(),
    ColumnScale(exponent=1.0, statistic="mean_abs"),
    ActOrder(),
    Diagonal(),
    Diagonal(inputs=False),
    Diagonal(outputs=False),
)
IDS = [repr(t) for t in TRANSFORMS]
TIGHT = 1e-10  # float64; scales reach 1e-4 .. 1e2
SHAPES = st.tuples(st.integers(1, 41), st.integers(1, 41))


def data(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Hessian]:
    """W and the H of channels of very different sizes, one of them dead if there are several."""
    rng = torch.Generator().manual_seed(seed)
    m, n = shape
    X = torch.randn(2 * n + 1, n, generator=rng).double() * torch.logspace(0, 1, n).double()
    X = X[:, torch.randperm(n, generator=rng)]
    if n > 2:
        X[:, n // 2] = 0.0
    W = torch.randn(m, n, generator=rng).double()
    return W, Hessian(X.T @ X / len(X), 0.01, "site", {"mean_abs": X.abs().mean(0)})


def fit(transform: Transform, W: Tensor, hessian: Hessian) -> FittedTransform:
    return transform.fit(W, hessian, seed=3, layer="q_proj", site="attention")


def test_table_names_each_kind_once() -> None:
    assert {kind: cls.kind for kind, cls in TABLE.items()} == {kind: kind for kind in TABLE}
    assert {type(t) for t in TRANSFORMS} == set(TABLE.values())
    assert all(isinstance(t, Transform) for t in TRANSFORMS)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=IDS)
@examples(25)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_transform_preserves_problem_and_output(
    transform: Transform, shape: tuple[int, int], seed: int
) -> None:
    W, hessian = data(shape, seed)
    fitted = fit(transform, W, hessian)
    inner = fitted.apply(W)
    assert torch.allclose(fitted.invert(inner), W, atol=TIGHT, rtol=0)
    assert torch.allclose(fitted.apply(fitted.invert(W)), W, atol=TIGHT, rtol=0)

    W_hat = W + torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    outer_loss = Problem(W, hessian).loss(W_hat)
    problem = Problem(inner, fitted.apply_hessian(hessian))
    assert problem.loss(fitted.apply(W_hat)) == pytest.approx(outer_loss, rel=TIGHT)

    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(seed)).double()
    y = fitted.outputs(fitted.inputs(x) @ inner.T)
    assert torch.allclose(y, x @ W.T, atol=TIGHT, rtol=0)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=IDS)
def test_hessian_is_that_of_the_transformed_inputs(transform: Transform) -> None:
    W, hessian = data((5, 13))
    fitted = fit(transform, W, hessian)
    A = fitted.inputs(torch.eye(13).double()).T
    moved = fitted.apply_hessian(hessian)
    assert torch.allclose(moved.matrix, A @ hessian.matrix @ A.T, atol=TIGHT, rtol=0)
    assert (moved.damping, moved.name) == (hessian.damping, hessian.name)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=IDS)
def test_two_sided_loss_is_preserved(transform: Transform) -> None:
    W, hessian = data((7, 13))
    Y = torch.randn(20, 7, generator=torch.Generator().manual_seed(1)).double()
    output = Hessian(Y.T @ Y / 20, name="output")
    fitted = fit(transform, W, hessian)
    inner = Problem(
        fitted.apply(W), fitted.apply_hessian(hessian), "W", fitted.apply_output(output)
    )
    outer = Problem(W, hessian, "W", output)
    W_hat = torch.randn(7, 13, generator=torch.Generator().manual_seed(2)).double()
    assert inner.loss(fitted.apply(W_hat)) == pytest.approx(outer.loss(W_hat), rel=TIGHT)
    assert fitted.apply_output(output) is fitted.apply_output(output)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=IDS)
@pytest.mark.parametrize("shape", [(1, 1), (8, 16), (9, 23)])
def test_layout_is_that_of_the_tensors(transform: Transform, shape: tuple[int, int]) -> None:
    tensors = fit(transform, *data(shape)).tensors()
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert transform.layout(shape) == found


@pytest.mark.parametrize("transform", TRANSFORMS, ids=IDS)
def test_restored_transform_is_the_same(transform: Transform) -> None:
    W, hessian = data((11, 21))
    fitted = fit(transform, W, hessian)
    again = transform.restore((11, 21), fitted.tensors())
    assert isinstance(again, FittedTransform)
    assert torch.equal(again.apply(W), fitted.apply(W))
    assert again.apply_hessian(hessian) is fitted.apply_hessian(hessian)
    for name, tensor in fitted.tensors().items():
        assert tensor.is_contiguous() and torch.equal(again.tensors()[name], tensor)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=IDS)
def test_layers_of_one_site_share_the_hessian(transform: Transform) -> None:
    W, hessian = data((11, 21))
    q, k = (
        transform.fit(W, hessian, seed=0, layer=layer, site="attention") for layer in ("q", "k")
    )
    assert q.apply_hessian(hessian) is k.apply_hessian(hessian)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=IDS)
def test_all_dead_channels_are_survived(transform: Transform) -> None:
    hessian = Hessian(torch.zeros(6, 6), statistics={"mean_abs": torch.zeros(6)})
    W = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    fitted = fit(transform, W, hessian)
    assert torch.allclose(fitted.invert(fitted.apply(W)), W, atol=TIGHT, rtol=0)
    assert torch.equal(fitted.apply_hessian(hessian).matrix, torch.zeros(6, 6).double())


@pytest.mark.parametrize("transform", TRANSFORMS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept_and_arguments_left_alone(transform: Transform, dtype: torch.dtype) -> None:
    W, hessian = data((8, 12))
    W = W.to(dtype)
    kept, H = W.clone(), hessian.matrix.clone()
    fitted = fit(transform, W, hessian)
    fitted.apply_hessian(hessian)
    for moved in (fitted.apply(W), fitted.invert(W), fitted.inputs(W), fitted.outputs(W.T)):
        assert moved.dtype == dtype
    assert torch.equal(W, kept) and torch.equal(hessian.matrix, H)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=IDS)
def test_wrong_shapes_are_refused(transform: Transform) -> None:
    W, hessian = data((8, 12))
    fitted = fit(transform, W, hessian)
    for use in (fitted.apply, fitted.invert):
        with pytest.raises(ShapeError, match=r"fitted for \(8, 12\), got \(12, 8\)"):
            use(W.T)
    with pytest.raises(ShapeError, match="fitted for"):
        fitted.apply_hessian(Hessian.identity(5))
    with pytest.raises(ShapeError, match="fitted for"):
        fitted.apply_output(Hessian.identity(5))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=IDS)
def test_damaged_tensors_are_refused(transform: Transform) -> None:
    W, hessian = data((16, 24))
    tensors = fit(transform, W, hessian).tensors()
    name = next(iter(tensors))
    for damaged in (
        {},
        {**tensors, "more": torch.ones(1)},
        {**tensors, name: tensors[name][:-1]},
        {**tensors, name: tensors[name].float()},
    ):
        with pytest.raises(FormatError, match=transform.kind):
            transform.restore((16, 24), damaged)


def test_recipes_refuse_what_contradicts_itself() -> None:
    for make in (
        lambda: RandomizedHadamard(inputs=False, outputs=False),
        lambda: Diagonal(inputs=False, outputs=False),
        lambda: ColumnScale(exponent=1.5),
        lambda: ColumnScale(statistic="median"),  # type: ignore[arg-type]
    ):
        with pytest.raises(RecipeError):
            make()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=IDS)
def test_transform_is_plain_comparable_data(transform: Transform) -> None:
    assert dataclasses.is_dataclass(transform)
    fields = {f.name: getattr(transform, f.name) for f in dataclasses.fields(transform)}
    assert type(transform)(**fields) == transform
    assert all(isinstance(value, bool | int | float | str) for value in fields.values())
