"""Reading untrusted JSON: nothing repeated, nothing infinite, nothing of the wrong type.

Every function raises FormatError naming the place; what passes has exactly the asked keys and
types, so that the checks themselves can be written without fear.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convex_caldera.errors import FormatError

MAX_JSON_BYTES = 100_000_000
MOST = 1 << 53  # larger integers do not survive every JSON reader


def short(value: Any) -> str:
    """A value for a message: ASCII, at most sixty characters, no walk through deep nesting."""
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_bytes(path: Path, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
    """All bytes of a regular file of at most `limit` bytes."""
    if not path.is_file():
        raise FormatError(f"{name}: missing")
    if path.stat().st_size > limit:
        raise FormatError(f"{name}: {path.stat().st_size} bytes, more than {limit}")
    return path.read_bytes()


def parse(text: bytes, name: str) -> Any:
    """JSON without repeated keys, NaN, infinities, numbers that overflow, or absurd depth."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            raise FormatError(f"{name}: a JSON key appears twice")
        return record

    def refuse(constant: str) -> None:
        raise FormatError(f"{name}: {constant} is not a JSON number")

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise FormatError(f"{name}: {digits[:40]} is more than a double can hold")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: not valid JSON ({ascii(str(error))[:120]})") from error


def read_table(path: Path, name: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON file whose top is an object."""
    value = parse(read_bytes(path, name, limit), name)
    if not isinstance(value, dict):
        raise FormatError(f"{name}: must be a JSON object, got {short(value)}")
    return value


def table(
    value: Any, keys: Iterable[str], where: str, optional: Iterable[str] = ()
) -> dict[str, Any]:
    """An object with exactly these keys, and none but the optional ones beside them."""
    if not isinstance(value, dict):
        raise FormatError(f"{where}: must be an object, got {short(value)}")
    needed = set(keys)
    odd = (needed - set(value)) | (set(value) - needed - set(optional))
    if odd:
        raise FormatError(f"{where}: the key {short(sorted(odd)[0])} is missing or unknown")
    return value


def listing(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"{where}: must be a list, got {short(value)}")
    return value


def string(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise FormatError(f"{where}: must be non-empty text, got {short(value)}")
    return value


def natural(value: Any, where: str, most: int = MOST) -> int:
    """An integer 0 .. most; true and 1.0 are not integers here."""
    if type(value) is not int or not 0 <= value <= most:
        raise FormatError(f"{where}: must be an integer 0 .. {most}, got {short(value)}")
    return value


def number(value: Any, where: str, least: float = -math.inf) -> float:
    """A finite number >= least, as a double; integers must be exact."""
    if type(value) is int and abs(value) <= MOST:
        value = float(value)
    if type(value) is not float or not math.isfinite(value) or value < least:
        raise FormatError(f"{where}: must be a finite number >= {least}, got {short(value)}")
    return value
