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

import torch
from torch import Tensor

from convex_caldera.core.protocols import FittedQuantizer
from convex_caldera.errors import RecipeError

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
    n, d = W.shape[1], fitted.quantizer.block
    panel = max(PANEL // d, 1) * d
    error, codes = torch.empty_like(W), []
    for a in range(0, n, panel):
        b = min(a + panel, n)
        target = W[:, a:b] + error[:, :a] @ U[:a, a:b]
        for j in range(a, b, d):
            cols = slice(j, min(j + d, b))
            goal = target[:, j - a : cols.stop - a] + error[:, a:j] @ U[a:j, cols]
            codes.append(fitted.encode(goal, j))
            error[:, cols] = W[:, cols] - fitted.decode(codes[-1], j).to(W.dtype)
    return torch.cat(codes, dim=1), W - error


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

    With O = P C P^T and H = U D U^T (unit upper, blocks of `rows` and d), the loss is
    sum_IJ tr(C_I e_IJ D_J e_IJ^T), e = P^T (W - W^) U, so tile (I, J) is rounded towards W_IJ
    plus the feedback of all tiles above and to the left: with P = I this is LDLQ. Tiles on one
    anti-diagonal do not see each other and are encoded together.

    Args:
        W: the target (m, n).
        fitted: quantizer with block d; its row_block divides `rows`.
        unit_upper: U (n, n), identity d x d diagonal blocks.
        output_upper: P (m, m), identity rows x rows diagonal blocks.
        rows: height of a tile.

    Source: the two-sided rounding of Tseng et al., YAQA, arXiv 2505.22988; anti-diagonals as in
    BaKron, arXiv 2608.06291. Cost: m n (m + n) / 2 multiply-adds in small products.
    """
    U, P = unit_upper.to(W.dtype), output_upper.to(W.dtype)
    (m, n), d = W.shape, fitted.quantizer.block
    heights = [slice(i, min(i + rows, m)) for i in range(0, m, rows)]
    widths = [slice(j, min(j + d, n)) for j in range(0, n, d)]
    error, carried = torch.zeros_like(W), torch.zeros_like(W)  # E, and E U of the tiles done
    codes: dict[tuple[int, int], Tensor] = {}
    for wave in range(len(heights) + len(widths) - 1):
        tiles = [(i, wave - i) for i in range(len(heights)) if 0 <= wave - i < len(widths)]
        goals = []
        for i, j in tiles:
            part, cols = heights[i], widths[j]
            left = error[part, : cols.start] @ U[: cols.start, cols]
            above = P[: part.start, part].T @ carried[: part.start, cols]
            carried[part, cols] = left
            goals.append(W[part, cols] + left + above)
        places = [(heights[i], widths[j]) for i, j in tiles]
        for tile, (part, cols), (code, values) in zip(
            tiles, places, encode_tiles(fitted, goals, places), strict=True
        ):
            codes[tile] = code
            error[part, cols] = W[part, cols] - values.to(W.dtype)
            carried[part, cols] += error[part, cols]
    count = range(len(widths))
    joined = [torch.cat([codes[i, j] for j in count], dim=1) for i in range(len(heights))]
    return torch.cat(joined), W - error


def encode_tiles(
    fitted: FittedQuantizer, goals: list[Tensor], places: list[tuple[slice, slice]]
) -> list[tuple[Tensor, Tensor]]:
    """(codes, values) of tiles at (rows, columns); in one call where the place does not matter."""
    alike = len({goal.shape for goal in goals}) == 1 and len(goals) > 1
    if not (alike and fitted.position_free):
        return [
            _encode_tile(fitted, goal, place) for goal, place in zip(goals, places, strict=True)
        ]
    height = goals[0].shape[0]
    stacked = fitted.take_rows(slice(0, height * len(goals)))
    codes = stacked.encode(torch.cat(goals), 0)
    values = stacked.decode(codes, 0)
    count = len(goals)
    return list(zip(codes.chunk(count), values.chunk(count), strict=True))


def _encode_tile(
    fitted: FittedQuantizer, goal: Tensor, place: tuple[slice, slice]
) -> tuple[Tensor, Tensor]:
    part, cols = place
    rows = fitted.take_rows(part)
    codes = rows.encode(goal, cols.start)
    return codes, rows.decode(codes, cols.start)


def refine(
    W: Tensor, codes: Tensor, W_hat: Tensor, fitted: FittedQuantizer, H: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """`sweeps` Gauss-Seidel passes over the column blocks of a finished rounding.

    Args:
        W, codes, W_hat: target (m, n), its codes and their values; not changed in place.
        H: damped, (n, n).

    Cost: 2 m n^2 multiply-adds and mn/d encodings per sweep.
    """
    H = H.to(W.dtype)
    n, d = W.shape[1], fitted.quantizer.block
    panel = max(PANEL // d, 1) * d
    codes, W_hat = codes.clone(), W_hat.clone()
    width = _code_width(codes, n, d)
    inverses = [torch.linalg.inv(H[j : j + d, j : j + d]) for j in range(0, n, d)]
    for _ in range(sweeps):
        for a in range(0, n, panel):
            b = min(a + panel, n)
            gradient = (W - W_hat) @ H[:, a:b]
            for j in range(a, b, d):
                cols, local = slice(j, min(j + d, b)), slice(j - a, min(j + d, b) - a)
                goal = W_hat[:, cols] + gradient[:, local] @ inverses[j // d]
                new = fitted.encode(goal, j)
                values = fitted.decode(new, j).to(W.dtype)
                gradient -= (values - W_hat[:, cols]) @ H[cols, a:b]
                W_hat[:, cols] = values
                codes[:, j // d * width : j // d * width + new.shape[1]] = new
    return codes, W_hat


def _code_width(codes: Tensor, n: int, block: int) -> int:
    """Columns of the code tensor that one full block of weights takes."""
    return codes.shape[1] // -(-n // block)
