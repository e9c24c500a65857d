"""Values out of JSON that somebody else wrote: the right type, or one FormatError."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convex_caldera.errors import FormatError
from convex_caldera.storage.shard import parse_json

MAX_FILE_BYTES = 200_000_000


@dataclass(frozen=True)
class Table:
    """A JSON object and where it stands; every getter raises FormatError naming file and key."""

    record: Mapping[str, Any]
    where: str

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.record.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        if not math.isfinite(value):
            raise self.wrong(key, "finite")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        """A finite number, or None where the key is absent or null."""
        return None if self.record.get(key) is None else self.number(key)

    def count(self, key: str) -> int:
        """An integer >= 0."""
        value = self.record.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong(key, "an integer >= 0")
        return value

    def count_or_none(self, key: str) -> int | None:
        return None if self.record.get(key) is None else self.count(key)

    def text(self, key: str, default: str | None = None) -> str:
        """A string; `default`, if given, where the key is absent or null."""
        value = self.record.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self.record.get(key)
        if not isinstance(value, list) or not all(_finite(item) for item in value):
            raise self.wrong(key, "a list of finite numbers")
        return tuple(float(item) for item in value)

    def shape(self, key: str) -> tuple[int, int]:
        """Two integers >= 1."""
        value = self.record.get(key)
        if isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value):
            if min(value) >= 1:
                return value[0], value[1]
        raise self.wrong(key, "two integers >= 1")

    def table(self, key: str) -> Table:
        """An object inside this one."""
        value = self.record.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Table(value, f"{self.where}: {_short(key)}")

    def table_or_none(self, key: str) -> Table | None:
        return None if self.record.get(key) is None else self.table(key)

    def tables(self, key: str) -> tuple[Table, ...]:
        """A list of objects."""
        value = self.record.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.wrong(key, "a list of objects")
        return tuple(Table(v, f"{self.where}: {_short(key)}[{i}]") for i, v in enumerate(value))

    def wrong(self, key: str, wanted: str) -> FormatError:
        found = "missing" if key not in self.record else f"{self.record[key]!r:.60}"
        return FormatError(f"{self.where}: {_short(key)!r} must be {wanted}, it is {found}")


def read_table(path: Path, name: str | None = None) -> Table:
    """A JSON file whose top is an object.

    Args:
        path: the file.
        name: how messages call it; by default its path.

    Raises:
        FormatError: missing, unreadable, too large, not JSON, or not an object.
    """
    name = name or str(path)
    value = parse_json(_bytes(path, name), name)
    if not isinstance(value, dict):
        raise FormatError(f"{name}: must hold one JSON object, not a {type(value).__name__}")
    return Table(value, name)


def read_toml(path: Path, name: str) -> dict[str, Any]:
    """A TOML file as a plain dict. Raises FormatError if it is missing or malformed."""
    try:
        return tomllib.loads(_bytes(path, name).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{name}: not valid TOML ({error})") from error


def _bytes(path: Path, name: str) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise FormatError(f"{name}: larger than {MAX_FILE_BYTES} bytes; not a report of ours")
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{name}: cannot be read ({error.strerror})") from error


def _finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _short(key: str) -> str:
    return key if len(key) <= 120 else key[:117] + "..."
