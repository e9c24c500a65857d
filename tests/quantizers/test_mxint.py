"""MXINT and minifloats: golden distortions, both exponent rules, and what forged files hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.errors import FormatError, RecipeError
from convex_caldera.quantizers import Minifloat, MXInt
from convex_caldera.quantizers.distortion import gaussian_distortion
from convex_caldera.quantizers.minifloat import magnitudes

# Mean squared error on N(0, 1) by bits, at blocks of 16, 32 and 128.
GOLDEN = {
    2: (0.2325, 0.2865, 0.3368),
    3: (0.0558, 0.0708, 0.0850),
    4: (0.01371, 0.01755, 0.02125),
    6: (8.46e-4, 1.09e-3, 1.33e-3),
    8: (5.3e-5, 6.8e-5, 8.3e-5),
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_mxint_distortion_is_the_published_one(bits: int) -> None:
    for block, expected in zip((16, 32, 128), GOLDEN[bits], strict=True):
        error, stored = gaussian_distortion(MXInt(bits, block))
        assert error == pytest.approx(expected, rel=0.02)
        assert stored == pytest.approx(bits + 8 / block, abs=1e-9)


def test_power_of_two_scales_cost_twice_at_four_bits() -> None:
    from convex_caldera.quantizers import Uniform

    real = Uniform(4, 32, symmetric=True, search=False, legacy_levels=True, scale_dtype="float32")
    assert gaussian_distortion(MXInt(4, 32))[0] == pytest.approx(
        gaussian_distortion(real)[0] * 0.01755 / 0.00942, rel=0.03
    )


@given(st.integers(2, 8), st.integers(-100, 100))
def test_rules_differ_at_powers_of_two_only(bits: int, exponent: int) -> None:
    """There the legacy rule saturates: 12.5 percent at 4 bits, 50 at 2."""
    W = torch.tensor([[2.0**exponent, 2.0**exponent / 2]])
    ocp, legacy = MXInt(bits, 2), MXInt(bits, 2, exponent_rule="legacy")
    fitted, saturated = ocp.fit(W), legacy.fit(W)
    assert fitted.decode(fitted.encode(W))[0, 0] == W[0, 0]
    lost = 1 - (saturated.decode(saturated.encode(W)) / W)[0, 0].item()
    assert lost == pytest.approx(2.0 ** (1 - bits), rel=1e-6)
    V = W * 1.25
    one, other = ocp.fit(V), legacy.fit(V)
    assert torch.equal(one.decode(one.encode(V)), other.decode(other.encode(V)))


def test_short_exponents_keep_the_largest_blocks() -> None:
    W = torch.randn(8, 64) * torch.logspace(-12, 0, 64, base=2).repeat_interleave(1)
    wide, short = MXInt(4, 8).fit(W), MXInt(4, 8, exponent_bits=2).fit(W)
    assert torch.equal(short.exponents.max(), wide.exponents.max())
    assert int(short.exponents.max() - short.exponents.min()) <= 3
    kept = wide.exponents >= short.exponents.min()
    assert torch.equal(short.exponents[kept], wide.exponents[kept])


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 3e38])
def test_extreme_scales_stay_finite(scale: float) -> None:
    W = torch.tensor([[1.0, -0.5, 0.25, 0.0]]) * scale
    for rule in ("ocp", "legacy"):
        fitted = MXInt(8, 4, exponent_rule=rule).fit(W)
        values = fitted.decode(fitted.encode(W))
        assert torch.isfinite(values).all()
        assert (values - W).abs().max() <= 0.01 * scale


def test_constant_blocks_have_one_value() -> None:
    fitted = MXInt(4, 3).fit(torch.full((2, 8), -0.7))
    assert fitted.decode(fitted.encode(torch.full((2, 8), -0.7))).unique().numel() == 1


def test_impossible_codes_and_exponents_are_refused() -> None:
    quantizer = MXInt(4, 4)
    fitted = quantizer.fit(torch.randn(1, 4))
    with pytest.raises(FormatError, match=r"0 \.\. 14"):
        fitted.unpack(torch.full((2,), 255, dtype=torch.uint8))
    with pytest.raises(FormatError, match="127"):
        quantizer.restore((1, 4), {"exponents": torch.tensor([255], dtype=torch.uint8)})
    short = MXInt(4, 4, exponent_bits=4)
    high = {
        name: torch.tensor([v], dtype=torch.uint8) for name, v in (("exponents", 15), ("base", 250))
    }
    with pytest.raises(FormatError, match="127"):
        short.restore((1, 4), high)


@pytest.mark.parametrize(
    "options",
    [{"bits": 1}, {"bits": 9}, {"group_size": -2}, {"exponent_bits": 9}, {"exponent_rule": "up"}],
)
def test_mxint_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(RecipeError, match="got"):
        MXInt(**{"bits": 4, **options})


def test_minifloat_levels_are_those_of_the_ocp_formats() -> None:
    assert magnitudes(4, 2).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # E2M1
    assert magnitudes(6, 2).tolist()[-1] == 7.5 and magnitudes(6, 3).tolist()[-1] == 28
    assert magnitudes(8, 4).tolist()[1] == 2.0**-9
    for options in ({"bits": 2}, {"bits": 4, "exponent_bits": 4}, {"exponent_bits": 0}):
        with pytest.raises(RecipeError):
            Minifloat(**options)


def test_minifloat_never_writes_minus_zero() -> None:
    W = torch.tensor([[-1e-9, 1.0, -1.0, 0.0]])
    fitted = Minifloat(4, 2, 4).fit(W)
    codes = fitted.encode(W)
    assert codes[0, 0] == codes[0, 3] == 0
    assert fitted.decode(torch.full((1, 4), 8, dtype=torch.uint8)).eq(0).all()
