"""What the checker must know of a kind of quantizer or transform, and how records are checked.

A record is {"kind": ..., option: value, ...} with every option written out. Options that only
steer the encoder are checked and otherwise ignored; an unknown one is refused, since it might
change what the codes mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.strict import short
from convex_caldera.errors import FormatError

Array = NDArray[Any]
Record = Mapping[str, Any]
Shape = tuple[int, int]
Layout = dict[str, tuple[str, tuple[int, ...]]]  # field -> dtype as in safetensors, shape
Option = Callable[[Any], bool]

SCALE_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class QuantizerFormat:
    """Options, stored tensors and values of one kind of quantizer.

    `layout(record, shape)` gives every stored tensor, the packed codes as "codes";
    `decode(record, shape, tensors)` the (m, n) float32 values.
    """

    options: Mapping[str, Option]
    layout: Callable[[Record, Shape], Layout]
    decode: Callable[[Record, Shape, Mapping[str, Array]], NDArray[np.float32]]


@dataclass(frozen=True)
class TransformFormat:
    """Options, stored tensors and inverse of one kind of transform; `invert` is in float64."""

    options: Mapping[str, Option]
    layout: Callable[[Record, Shape], Layout]
    invert: Callable[[Record, NDArray[np.float64], Mapping[str, Array]], NDArray[np.float64]]


def integer(low: int, high: float = math.inf) -> Option:
    return lambda value: type(value) is int and low <= value <= high


def real(low: float, high: float) -> Option:
    return lambda value: type(value) is float and low <= value <= high


def one_of(*texts: str) -> Option:
    return lambda value: isinstance(value, str) and value in texts


def boolean(value: Any) -> bool:
    return type(value) is bool


def check_record(record: Any, options: Mapping[str, Option], where: str) -> None:
    """FormatError unless the record has exactly `kind` and these options, in range."""
    if not isinstance(record, dict) or set(record) != {"kind", *options}:
        raise FormatError(f"{where}: a record needs exactly {sorted(options)} and its kind")
    for name, fits in options.items():
        if not fits(record[name]):
            raise FormatError(f"{where}: {name} = {short(record[name])} is not possible")


def finite(array: Array, what: str) -> Array:
    """The array, if it has no NaN and no infinity."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise FormatError(f"{what} holds NaN or infinite numbers")
    return array
