"""Rate-distortion curves: what each layer may be stored as, at what size and what loss.

A *group* is one weight matrix (or several counted as one) with a menu of *options*; an option is
a label, its total stored bits and its distortion (predicted nats of KL per token, or any other
additive loss). A *tie* lists groups that must receive the same label.

File format, strict JSON (docs/certificate.md section 2):

    {"groups": [{"name": "layers.0.q", "weights": 4096,
                 "options": [{"label": "2b", "bits": 8192, "distortion": 0.125}]}],
     "ties": [["layers.0.q", "layers.0.k"]]}

Unknown and repeated keys are errors; numbers survive a round trip exactly, because both the
plan's bound and its checker read the stored doubles as rationals.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convex_caldera.errors import DataError, RecipeError

MOST_BITS = 2**53  # larger integers do not survive every JSON reader


@dataclass(frozen=True)
class Option:
    """One way to store a group: `bits` in total (not per weight), and the distortion it costs."""

    label: str
    bits: int
    distortion: float

    def __post_init__(self) -> None:
        if not isinstance(self.label, str) or not self.label:
            raise DataError(f"an option's label must be a non-empty string, got {self.label!r}")
        _check_count(self.bits, f"option {self.label!r}: bits")
        value = self.distortion
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"option {self.label!r}: distortion must be a number, got {value!r}")
        if not math.isfinite(value) or value < 0:
            raise DataError(
                f"option {self.label!r}: distortion is {value}; it must be finite and >= 0, "
                "measure the option again or leave it out"
            )
        object.__setattr__(self, "distortion", float(value))


@dataclass(frozen=True)
class Group:
    """A weight matrix of `weights` entries and its menu; labels are unique within the menu."""

    name: str
    weights: int
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        if not isinstance(self.name, str) or not self.name:
            raise DataError(f"a group's name must be a non-empty string, got {self.name!r}")
        _check_count(self.weights, f"group {self.name!r}: weights")
        if not self.options:
            raise DataError(f"group {self.name!r} has no options; give it at least one")
        repeated = _first_repeated([option.label for option in self.options])
        if repeated is not None:
            raise DataError(f"group {self.name!r} has the label {repeated!r} twice")

    def option(self, label: str) -> Option:
        """The option of that label; RecipeError names what there is instead."""
        for option in self.options:
            if option.label == label:
                return option
        known = ", ".join(option.label for option in self.options[:12])
        raise RecipeError(f"group {self.name!r} has no option {label!r}; it has {known}")


@dataclass(frozen=True)
class Curves:
    """All groups of a model and the ties between them; names unique, a group in one tie at most."""

    groups: tuple[Group, ...]
    ties: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        object.__setattr__(self, "ties", tuple(tuple(tie) for tie in self.ties))
        if not self.groups:
            raise DataError("the curves have no groups; there is nothing to allocate")
        names = [group.name for group in self.groups]
        repeated = _first_repeated(names)
        if repeated is not None:
            raise DataError(f"two groups are called {repeated!r}")
        tied = [name for tie in self.ties for name in tie]
        unknown = sorted(set(tied) - set(names))
        if unknown:
            raise RecipeError(f"a tie names {unknown[0]!r}, which is not a group")
        if any(not tie for tie in self.ties):
            raise RecipeError("a tie lists no group")
        repeated = _first_repeated(tied)
        if repeated is not None:
            raise RecipeError(f"{repeated!r} is in two ties (or twice in one); join them")
        if math.isinf(sum(max(o.distortion for o in g.options) for g in self.groups)):
            raise DataError("the largest distortions add up to more than a double can hold")

    @property
    def weights(self) -> int:
        """Number of original weights of all groups."""
        return sum(group.weights for group in self.groups)

    def group(self, name: str) -> Group:
        """The group of that name; RecipeError if there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise RecipeError(f"there is no group {name!r}; the first is {self.groups[0].name!r}")


def curves_from_dict(record: Any) -> Curves:
    """Curves from parsed JSON. Raises DataError for wrong shapes, RecipeError for wrong ties."""
    _check_keys(record, {"groups"}, {"ties"}, "the curves")
    groups = []
    for i, item in enumerate(_list(record["groups"], "groups")):
        where = f"groups[{i}]"
        _check_keys(item, {"name", "weights", "options"}, set(), where)
        options = []
        for j, entry in enumerate(_list(item["options"], f"{where}.options")):
            _check_keys(entry, {"label", "bits", "distortion"}, set(), f"{where}.options[{j}]")
            try:
                options.append(Option(**entry))
            except DataError as error:
                raise DataError(f"{where} ({item['name']!r}): {error}") from None
        groups.append(Group(item["name"], item["weights"], tuple(options)))
    ties = [tuple(_list(tie, "a tie")) for tie in _list(record.get("ties", []), "ties")]
    for name in (name for tie in ties for name in tie):
        if not isinstance(name, str):
            raise DataError(f"ties list names of groups, got {name!r}")
    return Curves(tuple(groups), tuple(ties))


def curves_to_dict(curves: Curves) -> dict[str, Any]:
    """The JSON-able record; `curves_from_dict` gives the same curves back, bit for bit."""
    groups = [
        {
            "name": group.name,
            "weights": group.weights,
            "options": [
                {"label": o.label, "bits": o.bits, "distortion": o.distortion}
                for o in group.options
            ],
        }
        for group in curves.groups
    ]
    return {"groups": groups, "ties": [list(tie) for tie in curves.ties]}


def loads_curves(text: str, source: str = "the curves") -> Curves:
    """Curves from JSON text; NaN, Infinity and repeated keys are refused by name."""
    try:
        record = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}: not JSON ({error}); the format is in docs/certificate.md"
        ) from None
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    return curves_from_dict(record)


def read_curves(path: str | Path) -> Curves:
    """Curves from a file. Raises DataError if it is missing, malformed or not finite."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read curves from {path}: {error}") from None
    return loads_curves(text, str(path))


def write_curves(curves: Curves, path: str | Path) -> None:
    """Write the file that `read_curves` reads."""
    Path(path).write_text(json.dumps(curves_to_dict(curves), indent=1) + "\n", encoding="utf-8")


def _check_count(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{what} must be an integer, got {value!r}")
    if not 0 <= value <= MOST_BITS:
        raise DataError(f"{what} must lie between 0 and 2^53, got {value}")


def _first_repeated(names: list[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _check_keys(record: Any, needed: set[str], optional: set[str], where: str) -> None:
    if not isinstance(record, dict):
        raise DataError(f"{where} must be an object, got {type(record).__name__}")
    missing = sorted(needed - set(record))
    unknown = sorted(set(record) - needed - optional)
    if missing:
        raise DataError(f"{where} lacks {missing[0]!r}")
    if unknown:
        raise DataError(f"{where} has the unknown key {unknown[0]!r}")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where} must be a list, got {type(value).__name__}")
    return value


def _refuse(constant: str) -> float:
    raise DataError(f"{constant} is not a number a curve can have; measure that option again")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = _first_repeated([key for key, _ in pairs])
    if repeated is not None:
        raise DataError(f"the key {repeated!r} appears twice in one object")
    return dict(pairs)
