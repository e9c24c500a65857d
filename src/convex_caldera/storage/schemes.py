"""Specs as they are written: every record once, schemes as short lists of numbers.

    scheme   [m, n, [transform, ...], [term, ...]]
    term     k                    coded by record k
             [k, [c, bytes]]      the same, its codes entropy-coded by record c in so many bytes
             [rank, left, right]  low rank; each factor as a coded term, or null if dense

A plan that gives every layer its own rank so costs some 25 header bytes per layer and not 850.
What each kind stores for a matrix of given shape follows from its record (`layout`), so dtypes
and shapes are not written. docs/format.md, section 2, is normative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convex_caldera.errors import FormatError, RecipeError
from convex_caldera.recipes.records import Record, canonical_json, from_record, to_record
from convex_caldera.storage.spec import (
    CODES,
    MAX_FEATURES,
    TABLES,
    Spec,
    coded_spec,
    transform_spec,
)

# No quantizer stores less than an eighth of a bit per weight; more is a hostile shape. Entropy
# coding may do with nothing but a header.
MAX_WEIGHTS_PER_BYTE = 64
MAX_CODED_WEIGHTS_PER_BYTE = 1 << 20


def compact(specs: Sequence[Spec]) -> tuple[list[Record], list[Any]]:
    """Records in the order of their first use, and one scheme per spec."""
    records: list[Record] = []
    numbers: dict[str, int] = {}

    def number(record: Record) -> int:
        text = canonical_json(record)
        if text not in numbers:
            numbers[text] = len(records)
            records.append(record)
        return numbers[text]

    def coded(item: Spec) -> Any:
        quantizer = number(item["quantizer"])
        if "coder" not in item:
            return quantizer
        (num_bytes,) = item["tensors"][CODES][1]
        return [quantizer, [number(item["coder"]), num_bytes]]

    def factor(item: Spec) -> Any:
        return None if item["kind"] == "dense" else coded(item)

    def term(item: Spec) -> Any:
        if item["kind"] == "coded":
            return coded(item)
        return [item["rank"], factor(item["left"]), factor(item["right"])]

    schemes = [
        [
            *spec["shape"],
            [number(item["transform"]) for item in spec["transforms"]],
            [term(item) for item in spec["terms"]],
        ]
        for spec in specs
    ]
    return records, schemes


def expand(records: Any, schemes: Any, num_bytes: int) -> list[Spec]:
    """Inverse of `compact` for what was read from a file of `num_bytes`.

    Raises FormatError for anything that `compact` could not have written: unknown kinds or keys,
    records that are repeated, unused or not in canonical form, and absurd shapes.
    """
    owners = [_owner(record) for record in _list(records, "records")]
    if len({canonical_json(record) for record in records}) != len(records):
        raise FormatError("a record is written twice")
    reader = _Reader(owners, num_bytes)
    specs = [reader.spec(scheme) for scheme in _list(schemes, "schemes")]
    if reader.used != set(range(len(owners))):
        raise FormatError("a record is used by no scheme")
    return specs


class _Reader:
    """Expands schemes, remembering which records they use."""

    def __init__(self, owners: list[tuple[str, Any]], file_bytes: int):
        self.owners = owners
        self.file_bytes = file_bytes
        self.used: set[int] = set()

    def spec(self, scheme: Any) -> Spec:
        if not isinstance(scheme, list) or len(scheme) != 4:
            raise FormatError(f"a scheme is [m, n, transforms, terms], got {_short(scheme)}")
        shape = (scheme[0], scheme[1])
        if not all(type(size) is int and 0 < size < MAX_FEATURES for size in shape):
            raise FormatError(f"shape {_short(shape)} is not two positive sizes")
        terms = [self._term(item, shape) for item in _list(scheme[3], "terms")]
        if not terms:
            raise FormatError("a layer without terms would decode to zeros")
        numbers = _list(scheme[2], "transforms")
        transforms = [transform_spec(self._get(k, "transform"), shape) for k in numbers]
        return {"shape": list(shape), "transforms": transforms, "terms": terms}

    def _term(self, item: Any, shape: tuple[int, int]) -> Spec:
        if not isinstance(item, list) or len(item) == 2:
            return self._coded(item, shape)
        if len(item) != 3 or type(item[0]) is not int or not 0 < item[0] <= min(shape):
            raise FormatError(f"a low-rank term is [rank, left, right], got {_short(item)}")
        rank = item[0]
        sides = {"left": (item[1], (rank, shape[0])), "right": (item[2], (rank, shape[1]))}
        factors = {
            side: {"kind": "dense"} if number is None else self._coded(number, size)
            for side, (number, size) in sides.items()
        }
        return {"kind": "low_rank", "rank": rank, **factors}

    def _coded(self, item: Any, shape: tuple[int, int]) -> Spec:
        if not isinstance(item, list):
            self._check_size(shape, MAX_WEIGHTS_PER_BYTE)
            return coded_spec(self._get(item, "quantizer"), shape)
        if len(item) != 2 or not isinstance(item[1], list) or len(item[1]) != 2:
            raise FormatError(f"a coded term is k or [k, [coder, bytes]], got {_short(item)}")
        self._check_size(shape, MAX_CODED_WEIGHTS_PER_BYTE)
        number, (coder, num_bytes) = item
        if type(num_bytes) is not int or not 0 <= num_bytes <= self.file_bytes:
            raise FormatError(f"codes of {_short(num_bytes)} bytes cannot be in this file")
        quantizer = self._get(number, "quantizer")
        return coded_spec(quantizer, shape, self._get(coder, "coder"), num_bytes)

    def _check_size(self, shape: tuple[int, int], weights_per_byte: int) -> None:
        if shape[0] * shape[1] > weights_per_byte * self.file_bytes:
            raise FormatError(f"a coded matrix {shape} cannot be in a file of this size")

    def _get(self, number: Any, role: str) -> Any:
        if type(number) is not int or not 0 <= number < len(self.owners):
            raise FormatError(f"record {_short(number)} of {len(self.owners)}")
        if self.owners[number][0] != role:
            raise FormatError(f"record {number} is no {role}")
        self.used.add(number)
        return self.owners[number][1]


def _owner(record: Any) -> tuple[str, Any]:
    """("quantizer", "transform" or "coder", the object) of a record in canonical form."""
    kind = record.get("kind") if isinstance(record, dict) else None
    role = next((r for r, table in TABLES.items() if isinstance(kind, str) and kind in table), None)
    if role is None:
        raise FormatError(f"unknown kind of record {_short(record)}")
    try:
        owner = from_record(record, TABLES[role])
    except RecipeError as error:
        raise FormatError(str(error)) from error
    if canonical_json(to_record(owner)) != canonical_json(record):
        raise FormatError(f"the record {_short(record)} is not in canonical form")
    return role, owner


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"{what} must be a list")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
