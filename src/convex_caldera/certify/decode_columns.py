"""Transforms that treat channels one by one: a positive scale, another order, tuned diagonals.

scale     W was stored as W diag(s):      W = W' diag(1 / s)
permute   W was stored as W[:, order]:    W[:, order] = W'
diagonal  W was stored without them:      W = diag(b) W' diag(a)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.codec import (
    Array,
    Layout,
    Record,
    Shape,
    TransformFormat,
    boolean,
    one_of,
    real,
)
from convex_caldera.errors import FormatError

Floats = NDArray[np.float64]


def scale_layout(record: Record, shape: Shape) -> Layout:
    return {"scale": ("F16", (shape[1],))}


def unscale(record: Record, W: Floats, tensors: Mapping[str, Array]) -> Floats:
    scale = tensors["scale"].astype(np.float64)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise FormatError("a column scale is not positive and finite")
    return W / scale


def order_layout(record: Record, shape: Shape) -> Layout:
    return {"order": ("U16" if shape[1] <= 1 << 16 else "U32", (shape[1],))}


def unsort(record: Record, W: Floats, tensors: Mapping[str, Array]) -> Floats:
    order = tensors["order"].astype(np.int64)
    if not np.array_equal(np.sort(order), np.arange(W.shape[1])):
        raise FormatError("the stored order does not list every channel once")
    out = np.empty_like(W)
    out[:, order] = W
    return out


def diagonal_layout(record: Record, shape: Shape) -> Layout:
    sides = (("input_diagonal", shape[1], "inputs"), ("output_diagonal", shape[0], "outputs"))
    return {name: ("F16", (size,)) for name, size, wanted in sides if record[wanted]}


def stretch(record: Record, W: Floats, tensors: Mapping[str, Array]) -> Floats:
    if not (record["inputs"] or record["outputs"]):
        raise FormatError("a diagonal of neither side")
    for values in tensors.values():
        if not (np.isfinite(values) & (values != 0)).all():
            raise FormatError("an entry of a diagonal is zero or not finite")
    if record["inputs"]:
        W = W * tensors["input_diagonal"].astype(np.float64)
    if record["outputs"]:
        W = W * tensors["output_diagonal"].astype(np.float64)[:, None]
    return W


DIAGONAL = TransformFormat({"inputs": boolean, "outputs": boolean}, diagonal_layout, stretch)
SCALE = TransformFormat(
    {"exponent": real(0.0, 1.0), "statistic": one_of("rms", "mean_abs")}, scale_layout, unscale
)
PERMUTE = TransformFormat({}, order_layout, unsort)
