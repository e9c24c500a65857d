"""The trellis in torch finds the codes that the compiled one finds, and reads the same levels."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from convex_caldera.quantizers import trellis_bits, trellis_stream, trellis_torch, trellis_viterbi
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.quantizers.trellis_codes import Code, CodeName, computed_levels
from tests.quantizers.test_trellis import KINDS, gaussian, random_codes


def levels_along(symbols: np.ndarray, steps: np.ndarray, levels: np.ndarray, L: int) -> np.ndarray:
    """Levels of the states that symbols (count, T) walk through; closed walks start anywhere."""
    state = np.zeros(len(symbols), np.int64)
    for _ in range(2):  # the second turn starts where the first ended
        found = []
        for t, K in enumerate(steps):
            state = (state << K | symbols[:, t]) & ((1 << L) - 1)
            found.append(levels[state])
    return np.stack(found, 1)


@pytest.mark.parametrize("sixteenths", [16, 20, 24, 32, 40, 48, 64, 72, 80, 96, 112, 128])
@pytest.mark.parametrize("chained", [False, True])
def test_search_equals_the_compiled_one(sixteenths: int, chained: bool) -> None:
    L = 10 if sixteenths > 96 else 8 if sixteenths > 48 else 7
    size = 400 if chained else 64  # a chain is settled before it ends, a tile is not
    rng = np.random.default_rng(sixteenths)
    x = rng.standard_normal((5, size)).astype(np.float32)
    steps = trellis_stream.step_bits(sixteenths, size)
    levels = rng.standard_normal(1 << L).astype(np.float32)
    expected = trellis_viterbi.search(x, steps, levels, L, chained)
    found = trellis_torch.search(
        torch.from_numpy(x), steps, torch.from_numpy(levels), L, chained
    ).numpy()
    if not chained:
        losses = [
            float(((levels_along(s, steps, levels, L) - x) ** 2).sum()) for s in (found, expected)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert np.array_equal(found, expected)


def test_search_is_the_same_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(7, 64)
    steps, levels = trellis_stream.step_bits(32, 64), gaussian(1, 256, seed=1)[0]
    whole = trellis_torch.search(x, steps, levels, 8, False)
    monkeypatch.setattr(trellis_torch, "SEARCH_BYTES", 1)
    assert torch.equal(trellis_torch.search(x, steps, levels, 8, False), whole)


def test_search_keeps_to_its_bytes() -> None:
    """What is held at once, by the sizes of all live tensors, stays below what is promised."""
    count, size, L = 4, 64, 7
    x, steps = gaussian(count, size), trellis_stream.step_bits(32, size)
    held: list[int] = []
    most = 0

    def counted(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal most
        costs, winners = trellis_torch.advance(*args)  # type: ignore[arg-type]
        held.append(winners.numel())
        most = max(most, costs.numel() * costs.element_size())
        return costs, winners

    trellis_torch.search(x, steps, gaussian(1, 1 << L)[0], L, False, counted)
    window = 2 * 8 * L
    kept = max(sum(held[:window][window // 2 :]), sum(held[window:]))
    promised = count * ((size << (L - 2)) + (16 << L))
    assert kept + most <= promised


@pytest.mark.parametrize("name", get_args(CodeName))
def test_levels_are_the_formulas(name: CodeName) -> None:
    for L in (12,) if name == "table" else (16, 28):
        states = np.random.default_rng(L).integers(0, 1 << L, 4096).astype(np.uint32)
        stored = gaussian(1, 1 << L).half().numpy().tobytes() if name == "table" else b""
        code = Code(name, L, 0x95B42E2D if name == "weyl" else 0, stored)
        found = trellis_torch.levels_of(torch.from_numpy(states.astype(np.int64)), code)
        assert np.array_equal(found.numpy(), computed_levels(code, states))


@pytest.mark.parametrize("quantizer", KINDS, ids=repr)
@pytest.mark.parametrize("shape", [(64, 32), (50, 37), (1, 40), (33, 3), (1, 1)], ids=repr)
def test_decoding_equals_the_compiled_one(
    quantizer: Trellis, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = quantizer.fit(gaussian(*shape, seed=1))
    codes = random_codes(fitted, 2)
    expected = fitted.code.levels(fitted._states(codes.numpy(), shape))
    for weights in (1, 1 << 20):  # a tile row or chain at a time, and all at once
        monkeypatch.setattr(trellis_torch, "DECODE_WEIGHTS", weights)
        args = quantizer.sixteenths, fitted.code, quantizer.chain
        assert np.array_equal(trellis_torch.decode(codes, shape, *args).numpy(), expected)


@pytest.mark.parametrize("sixteenths", [16, 25, 40, 128])
def test_symbols_are_written_as_the_compiled_one_does(sixteenths: int) -> None:
    steps = trellis_stream.step_bits(sixteenths, 35)
    rng = np.random.default_rng(0)
    symbols = (rng.integers(0, 256, (6, 35)) & ((1 << steps) - 1)).astype(np.uint8)
    expected = np.zeros((6, 2 * sixteenths), np.uint8)
    trellis_bits.write_symbols(symbols, steps, expected)
    found = trellis_torch.write_symbols(torch.from_numpy(symbols), steps, 2 * sixteenths)
    assert np.array_equal(found.numpy(), expected)
