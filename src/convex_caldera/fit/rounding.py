"""Rounding with feedback: block LDLQ, of which GPTQ and nearest rounding are special cases.

With H = U D U^T, U unit upper in blocks of d columns, the loss of any rounding is

    tr((W - W^) H (W - W^)^T) = sum_j tr(e_j D_j e_j^T),   e = (W - W^) U,

so columns are rounded left to right, block j towards W_j + (W - W^)_{<j} U_{<j,j}: then e_j is
exactly the rounding error of block j. For d = 1 the codes are those of GPTQ in the same column
order (Chee et al., QuIP, arXiv 2307.13304, theorem 6); under a diagonal H feedback vanishes.
QuIP# (arXiv 2402.04396) writes the mirror image, last to first, with lower factors.

Refinement sweeps are Gauss-Seidel: block k is rounded to the minimiser over W^_k alone,
W^_k + (W - W^) H_k H_kk^-1, all others held. They never leave a better state behind than they
found only in exact arithmetic with a true nearest rounding under H_kk; so the driver, which
keeps the best state, is what guarantees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor

from convex_caldera.core.protocols import FittedQuantizer, RoundsPanels
from convex_caldera.errors import RecipeError
from convex_caldera.fit.tile_feedback import Place, TileFeedback, padded

# Columns whose feedback is applied one quantizer block at a time; beyond it one GEMM serves.
PANEL = 128


def round_nearest(W: Tensor, fitted: FittedQuantizer) -> tuple[Tensor, Tensor]:
    """Codes and values of W (m, n) without feedback."""
    codes = fitted.encode(W)
    return codes, fitted.decode(codes)


def round_ldlq(W: Tensor, fitted: FittedQuantizer, unit_upper: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and values of W (m, n), each column block fed the error of those before it.

    Args:
        W: the target, (out_features, in_features).
        fitted: column quantizer; its block d must be the one `unit_upper` was made for.
        unit_upper: U (n, n) with identity d x d diagonal blocks and H = U D U^T.

    Cost: m n^2 multiply-adds, almost all in panels of 128 columns, plus mn/d encodings.
    """
    U = unit_upper.to(W.dtype)
    error, codes = torch.empty_like(W), []
    for part in panels(W.shape[1], fitted):
        before = slice(0, part.start)
        target = W[:, part] + error[:, before] @ U[before, part]
        found, values = round_panel(target, W[:, part], U[part, part], fitted, part.start)
        codes.append(found)
        error[:, part] = W[:, part] - values
    return torch.cat(codes, dim=1), W - error


def panels(n: int, fitted: FittedQuantizer) -> list[slice]:
    """Runs of columns, each a whole number of the quantizer's blocks unless the matrix ends."""
    width = max(PANEL // fitted.quantizer.block, 1) * fitted.quantizer.block
    return [slice(a, min(a + width, n)) for a in range(0, n, width)]


def round_panel(
    target: Tensor, base: Tensor, coupling: Tensor, fitted: FittedQuantizer, start: int
) -> tuple[Tensor, Tensor]:
    """Codes and values W^ of p columns, block j rounded towards T_j + (B - W^)_{<j} C_{<j,j}.

    Args:
        target, base: T and B, (m, p).
        coupling: C (p, p), of which what lies above its diagonal blocks is read.
        fitted: quantizer of the matrix.
        start: the panel's first column in it.
    """
    if isinstance(fitted, RoundsPanels) and _for_kernels(target):
        return fitted.round_panel(target, base, coupling, start)
    d, width = fitted.quantizer.block, target.shape[1]
    error, codes, values = torch.empty_like(base), [], []
    for j in range(0, width, d):
        cols = slice(j, min(j + d, width))
        goal = target[:, cols] + error[:, :j] @ coupling[:j, cols]
        codes.append(fitted.encode(goal, start + j))
        values.append(fitted.decode(codes[-1], start + j).to(base.dtype))
        error[:, cols] = base[:, cols] - values[-1]
    return torch.cat(codes, dim=1), torch.cat(values, dim=1)


def _for_kernels(x: Tensor) -> bool:
    """Whether kernels compiled for the CPU take it."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def round_row_groups(
    W: Tensor,
    fitted: FittedQuantizer,
    uppers: Sequence[Tensor],
    groups: Sequence[slice],
) -> tuple[Tensor, Tensor]:
    """Codes and values of W, every group of rows by LDLQ under a metric of its own.

    Args:
        W: the target (m, n).
        fitted: column quantizer, with its scales for all of W.
        uppers: U of every group's metric, as for `round_ldlq`.
        groups: rows of every group, beginning at multiples of the quantizer's row block.

    Raises:
        RecipeError: a group begins inside a block of rows that are coded together.

    Source: Kim et al., GuidedQuant, arXiv 2505.07004. Cost: that of `round_ldlq`.
    """
    astride = [rows.start for rows in groups if rows.start % fitted.row_block]
    if astride:
        raise RecipeError(
            f"a row group begins at row {astride[0]}, inside the {fitted.row_block} rows that "
            f"{fitted.quantizer.kind} codes together; use shorter chains or fewer groups"
        )
    parts = [
        round_ldlq(W[rows], fitted.take_rows(rows), upper)
        for rows, upper in zip(groups, uppers, strict=True)
    ]
    return torch.cat([codes for codes, _ in parts]), torch.cat([values for _, values in parts])


def round_two_sided(
    W: Tensor, fitted: FittedQuantizer, unit_upper: Tensor, output_upper: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Codes and values of W under a Kronecker curvature O (x) H, tile by tile.

    Tile (I, J) is rounded towards W_IJ plus the feedback of all tiles above and to the left
    (`fit.tile_feedback`): with P = I this is LDLQ. Tiles on one anti-diagonal do not see each
    other and are encoded together.

    Args:
        W: the target (m, n).
        fitted: quantizer with block d; its row_block divides `rows`.
        unit_upper: U (n, n), identity d x d diagonal blocks.
        output_upper: P (m, m), identity rows x rows diagonal blocks.
        rows: height of a tile.

    Source: the two-sided rounding of Tseng et al., YAQA, arXiv 2505.22988; anti-diagonals as in
    BaKron, arXiv 2608.06291. Cost: at most m n (m + n) multiply-adds in batched products, and
    m n / (rows d) encodings.
    """
    feedback = TileFeedback(W, unit_upper, output_upper, rows, fitted.quantizer.block)
    codes: list[list[Tensor]] = [[] for _ in range(feedback.high)]
    for wave in range(feedback.waves):
        goals, left = feedback.goals(wave)
        coded, values = encode_tiles(fitted, goals, feedback.places(wave))
        for row, code in zip(feedback.tiles(wave)[0].tolist(), coded, strict=True):
            codes[row].append(code)  # columns of tiles come from left to right
        feedback.settle(wave, left, values)
    return torch.cat([torch.cat(row, dim=1) for row in codes]), W - feedback.error()


def encode_tiles(
    fitted: FittedQuantizer, goals: Tensor, places: Sequence[Place]
) -> tuple[Sequence[Tensor], Tensor]:
    """Codes of tiles, and their values, in one call where the place does not matter.

    Args:
        goals: (tiles, rows, cols); tiles at the edges are cut to their places, and their values
            padded by zeros.
        places: rows and columns of each tile.
    """
    shapes = {(part.stop - part.start, cols.stop - cols.start) for part, cols in places}
    if len(places) == 1 or len(shapes) > 1 or not fitted.position_free:
        codes, values = zip(*map(_encode_tile, repeat(fitted), goals, places), strict=True)
        return codes, torch.stack([padded(v, *goals.shape[1:]) for v in values])
    ((high, wide),) = shapes
    stacked = fitted.take_rows(slice(0, high * len(goals)))
    together = stacked.encode(goals[:, :high, :wide].reshape(-1, wide), 0)
    found = stacked.decode(together, 0).to(goals.dtype).view(-1, high, wide)
    return together.chunk(len(goals)), padded(found, *goals.shape)


def _encode_tile(fitted: FittedQuantizer, goal: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    part, cols = place
    rows = fitted.take_rows(part)
    codes = rows.encode(goal[: part.stop - part.start, : cols.stop - cols.start], cols.start)
    return codes, rows.decode(codes, cols.start).to(goal.dtype)


def refine(
    W: Tensor, codes: Tensor, W_hat: Tensor, fitted: FittedQuantizer, H: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """`sweeps` Gauss-Seidel passes over the column blocks of a finished rounding.

    Args:
        W, codes, W_hat: target (m, n), its codes and their values; not changed in place.
        H: damped, (n, n).

    Cost: 2 m n^2 multiply-adds and mn/d encodings per sweep.
    """
    steps = _newton_steps(H.to(W.dtype), fitted.quantizer.block)
    W_hat = W_hat.clone()
    for _ in range(sweeps):
        found = []
        for part in panels(W.shape[1], fitted):
            base = W_hat[:, part].clone()
            target = base + (W - W_hat) @ steps[:, part]
            new, W_hat[:, part] = round_panel(target, base, steps[part, part], fitted, part.start)
            found.append(new)
        codes = torch.cat(found, dim=1)
    return codes, W_hat


def _newton_steps(H: Tensor, block: int) -> Tensor:
    """H_k H_kk^-1 of all column blocks k, side by side (n, n)."""
    columns = H.split(block, dim=1)
    corners = [H_k[k * block : (k + 1) * block] for k, H_k in enumerate(columns)]
    steps = [H_k @ torch.linalg.inv(H_kk) for H_k, H_kk in zip(columns, corners, strict=True)]
    return torch.cat(steps, dim=1)
