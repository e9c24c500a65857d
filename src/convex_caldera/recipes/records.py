"""Recipes as plain dictionaries, JSON and TOML; strict in both directions.

A record is a dict of scalars, lists and records. Every record names its class with `kind`,
found in literal tables (the quantizers', the transforms', and the steps below), so reading a
record never imports what it names. All fields are written, None alone is left out; unknown
keys, unknown kinds and wrong types are errors.

    from_record(to_record(recipe)) == recipe          from_toml(to_toml(record)) == record
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import tomllib
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal, Union, cast, get_args, get_origin, get_type_hints

from convex_caldera import coding, quantizers, transforms
from convex_caldera.core.protocols import Coder, Quantizer, Transform
from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe
from convex_caldera.errors import RecipeError

Record = dict[str, Any]

STEPS: dict[str, type] = {"quantize": Quantize, "fit_low_rank": FitLowRank}
OTHERS: dict[str, type] = {"recipe": Recipe, "factor_coding": FactorCoding}


def to_record(value: Any) -> Record:
    """A recipe, step, quantizer or transform as a plain dict. Raises RecipeError if unknown.

    Equal values have one text: where a field takes floats, 2 is written as 2.0.
    """
    record: Record = {"kind": _kind(type(value))}
    hints = _fields(type(value))
    for field in dataclasses.fields(value):
        item, (hint, _) = getattr(value, field.name), hints[field.name]
        if item is not None:
            record[field.name] = _plain(item, hint, f"{record['kind']}.{field.name}")
        elif field.default is not None:
            raise RecipeError(f"{record['kind']}.{field.name} is None, which has no record")
    return record


def from_record(record: Any, among: Mapping[str, type] | None = None) -> Any:
    """Inverse of `to_record`; fields that have a default may be missing.

    Args:
        record: what `to_record` returns, or the same read from JSON or TOML.
        among: the kinds that will do, such as `quantizers.TABLE`; all known ones by default.

    Raises:
        RecipeError: not a record, an unknown kind or key, a wrong type, a missing field, or
            values that the class itself refuses; the message gives the path.
    """
    return _build(record, _classes() if among is None else among, "record")


def canonical_json(value: Any) -> str:
    """The one JSON text of a plain value: sorted keys, no spaces, ASCII, no NaN."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"not representable as JSON: {error}") from error


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of the canonical JSON of the recipe's record, in hexadecimal."""
    return hashlib.sha256(canonical_json(to_record(recipe)).encode()).hexdigest()


# --- classes and fields ---------------------------------------------------------------------


def _classes() -> dict[str, type]:
    return {**quantizers.TABLE, **transforms.TABLE, **coding.TABLE, **STEPS, **OTHERS}


def _kind(cls: type) -> str:
    for kind, known in _classes().items():
        if known is cls:
            return kind
    raise RecipeError(f"{cls.__name__} is in no table of quantizers, transforms or steps")


def _plain(value: Any, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value):
        return to_record(value)
    if isinstance(value, tuple):
        return [_plain(item, hint, where) for item in value]
    if type(value) is int and _takes_floats(hint):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where} is {value}; only finite numbers can be stored")
    if isinstance(value, bool | int | float | str):
        return value
    raise RecipeError(f"{where} is a {type(value).__name__}, which has no record")


def _takes_floats(hint: Any) -> bool:
    """Whether whole numbers in a field of this type, or in its tuple, stand for floats."""
    hints = {hint, *get_args(hint)}
    return float in hints and int not in hints


@cache
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    """Field name -> (type, required)."""
    hints = get_type_hints(cls)
    return {
        f.name: (
            hints[f.name],
            f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING,
        )
        for f in dataclasses.fields(cls)
        if get_origin(hints[f.name]) is not ClassVar
    }


def _build(record: Any, allowed: Mapping[str, type], where: str) -> Any:
    if not isinstance(record, Mapping) or not isinstance(record.get("kind"), str):
        raise RecipeError(f"{where}: expected a table with a text `kind`, got {_short(record)}")
    kind = record["kind"]
    if kind not in allowed:
        raise RecipeError(f"{where}: kind {kind!r} is not one of {', '.join(sorted(allowed))}")
    cls, fields = allowed[kind], _fields(allowed[kind])
    unknown = sorted(set(record) - set(fields) - {"kind"}, key=str)
    if unknown:
        known = ", ".join(fields) or "none"
        raise RecipeError(f"{where}: unknown key {unknown[0]!r} of {kind!r}; it has {known}")
    missing = [name for name, (_, required) in fields.items() if required and name not in record]
    if missing:
        raise RecipeError(f"{where}: {kind!r} needs {missing[0]!r}")
    values = {
        name: _read(record[name], fields[name][0], f"{where}.{name}")
        for name in fields
        if name in record
    }
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {kind!r} refuses these values: {error}") from error


def _read(value: Any, hint: Any, where: str) -> Any:
    """`value` checked against a field's type; lists become tuples, whole numbers floats."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _read_union(value, get_args(hint), where)
    if origin is Literal:
        if not any(type(value) is type(known) and value == known for known in get_args(hint)):
            raise RecipeError(f"{where}: {value!r} is not one of {get_args(hint)}")
        return value
    if origin is tuple:
        return _read_tuple(value, get_args(hint), where)
    if hint is Quantizer:
        return _build(value, quantizers.TABLE, where)
    if hint is Coder:
        return _build(value, coding.TABLE, where)
    if hint is Transform:
        return _build(value, transforms.TABLE, where)
    if dataclasses.is_dataclass(hint):
        return _build(value, {_kind(cast(type, hint)): cast(type, hint)}, where)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise RecipeError(f"{where}: expected {hint.__name__}, got {_short(value)}")
    return value


def _read_union(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    present = [hint for hint in hints if hint is not type(None)]
    named = [cast(type, hint) for hint in present if dataclasses.is_dataclass(hint)]
    classes = {_kind(cls): cls for cls in named}
    if len(classes) == len(present) > 1:
        return _build(value, classes, where)
    exact = [hint for hint in present if hint is type(value)]
    return _read(value, (exact or present)[0], where)


def _read_tuple(value: Any, hints: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise RecipeError(f"{where}: expected a list, got {_short(value)}")
    repeated = len(hints) == 2 and hints[1] is Ellipsis
    if not repeated and len(hints) != len(value):
        raise RecipeError(f"{where}: expected {len(hints)} items, got {len(value)}")
    each = [hints[0]] * len(value) if repeated else list(hints)
    pairs = enumerate(zip(value, each, strict=True))
    return tuple(_read(item, hint, f"{where}[{i}]") for i, (item, hint) in pairs)


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"


# --- TOML -----------------------------------------------------------------------------------


def to_toml(record: Mapping[str, Any]) -> str:
    """A plain dict as TOML: scalars first, then tables, then arrays of tables."""
    lines: list[str] = []
    _write_table(record, (), lines)
    return "\n".join(lines).strip("\n") + "\n"


def from_toml(text: str) -> Record:
    """TOML text as a plain dict. Raises RecipeError with the line if it is not TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not valid TOML: {error}") from error


def _write_table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    nested = {k: v for k, v in table.items() if isinstance(v, Mapping) or _is_array_of_tables(v)}
    for key, value in table.items():
        if key not in nested:
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
    for key, value in nested.items():
        here = (*path, _toml_key(key))
        heading = ".".join(here)
        for item in [value] if isinstance(value, Mapping) else value:
            lines += ["", f"[{heading}]" if isinstance(value, Mapping) else f"[[{heading}]]"]
            _write_table(item, here, lines)


def _is_array_of_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)


def _toml_key(key: Any) -> str:
    if not isinstance(key, str):
        raise RecipeError(f"TOML keys are text, got {_short(key)}")
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_string(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    raise RecipeError(f"not representable as TOML: {_short(value)}")


def _toml_string(text: str) -> str:
    # JSON and TOML basic strings share their escapes; only DEL must be escaped in TOML alone.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
