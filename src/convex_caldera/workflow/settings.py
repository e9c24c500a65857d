"""What a user asks of one compression, validated once; also what recipe.toml writes down.

Unknown keys are errors, contradictions name both keys. Paths stay as the user typed them,
but an absolute path is written down by its last part only, so that no machine's layout leaks
into what is published.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from convex_caldera.errors import RecipeError
from convex_caldera.models.image_parts import MODULES, parse_modules
from convex_caldera.recipes.activations import parse_activations

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


# Told apart by what they hold, not by where they lie.
PATHS = frozenset({"model", "dataset", "images", "diag_hessians"})
# Of which one may be given.
BUDGETS = ("bits", "size", "ratio")


class Settings(BaseModel):
    """One compression run; every field is an option of `convex-caldera compress`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    method: str = "convex-caldera"
    bits: Annotated[float, Field(gt=0, le=16, strict=True)] | None = None
    size: str | None = None
    ratio: str | None = None
    rank: Annotated[int, Field(ge=0)] | None = None
    factor_bits: Literal[2, 3, 4, 16] | None = None
    group_size: Annotated[int, Field(ge=-1)] | None = None
    format: str | None = None
    factor_format: str | None = None
    bucket: Literal[1, 2, 4, 8] | None = None
    latent: Literal["vq", "nf"] | None = None
    order: Literal["none", "strip"] | None = None
    neural: tuple[str, ...] = ()
    code_bits: Annotated[int, Field(ge=1, le=12)] | None = None
    block_size: Literal[1, 2, 4, 8] | None = None
    num_iters: Annotated[int, Field(ge=1)] | None = None
    sample_size: Annotated[int, Field(ge=1)] | None = None
    clip_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    coder: Literal["huffman", "rans"] | None = None
    lossless: bool = False
    embeddings: bool = False
    activations: str | None = None
    dataset: str = "bundled:calibration"
    nsamples: Annotated[int, Field(ge=1)] = 128
    seqlen: Annotated[int, Field(ge=8)] = 512
    seed: int = 42
    draws: Annotated[int, Field(ge=1)] = 1
    device: str = "cpu"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    ignore: tuple[str, ...] = ()
    pin: tuple[str, ...] = ()
    allow_short: bool = False
    curvature: Literal["auto", "none", "input", "kronecker", "guided"] = "auto"
    curvature_fallback: Literal["none", "input"] = "none"
    shrinkage: str = "auto"
    targets: Literal["auto", "original", "drift-corrected"] = "auto"
    remeasure: bool = False
    modules: str = "language"
    images: str | None = None
    diag_hessians: str | None = None
    tie: tuple[str, ...] = ()
    bits_menu: str | None = None
    rank_menu: str | None = None

    @model_validator(mode="after")
    def _one_budget(self) -> Settings:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one budget")
        if self.size is not None:
            parse_size(self.size)
        if self.ratio is not None:
            parse_ratio(self.ratio)
        if self.shrinkage != "auto":
            parse_shrinkage(self.shrinkage)
        if self.diag_hessians is not None:
            self._alone("diag_hessians", ("curvature", "images", "targets", "shrinkage"))
        for menu in (self.bits_menu, self.rank_menu):
            if menu is not None:
                parse_menu(menu)
        if self.rank is not None and self.rank_menu is not None:
            raise ValueError("rank and rank_menu exclude each other")
        if self.rank_menu is not None and any(r % 1 for r in parse_menu(self.rank_menu)):
            raise ValueError(f"rank_menu {self.rank_menu!r} holds a number that is no rank")
        return self

    def _alone(self, key: str, others: tuple[str, ...]) -> None:
        """Raise ValueError if one of the others is given too, which the first one would ignore."""
        for other in others:
            if getattr(self, other) != type(self).model_fields[other].default:
                raise ValueError(f"{key} and {other} exclude each other")

    @field_validator("modules")
    @classmethod
    def _ordered(cls, text: str) -> str:
        wanted = parse_modules(text)
        return ",".join(module for module in MODULES if module in wanted)

    @field_validator("activations")
    @classmethod
    def _canonical(cls, text: str | None) -> str | None:
        return None if text is None else parse_activations(text).name

    @property
    def bits_or_default(self) -> float:
        """Bits per compressed weight when no size is given: 4 unless stated."""
        return 4.0 if self.bits is None else self.bits

    def published(self) -> dict[str, Any]:
        """The settings as written into an output: no absolute paths, no defaults hidden."""
        record = self.model_dump(exclude_none=True)
        for key in PATHS & set(record):
            record[key] = Path(record[key]).name if Path(record[key]).is_absolute() else record[key]
        return record


def make_settings(**values: Any) -> Settings:
    """Settings from keyword arguments; RecipeError says which field is wrong and why."""
    try:
        return Settings(**values)
    except ValidationError as error:
        raise RecipeError(readable_errors(error, Settings.model_fields)) from error


def read_settings(path: Path, **overrides: Any) -> Settings:
    """Settings from a TOML file's [run] table (or its top level), options given on top winning."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"there is no file {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    table = document.get("run", document)
    if not isinstance(table, dict):
        raise RecipeError(f"{path}: [run] must be a table")
    # [[finetune]] of a tuned directory comes after a compression and is no part of it.
    beside = sorted(set(document) - {"run", "finetune"}) if "run" in document else []
    if beside:
        raise RecipeError(f"{path}: unknown key {beside[0]!r} beside [run]")
    if any(overrides.get(key) is not None for key in ("bits", "size", "ratio")):
        table = {k: v for k, v in table.items() if k not in ("bits", "size", "ratio")}
    return make_settings(**{**table, **{k: v for k, v in overrides.items() if v is not None}})


def parse_size(text: str) -> int:
    """Bytes of "1.5GB", "700 MiB" or a plain number.

    Raises:
        RecipeError: not a size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise RecipeError(f"size {text!r} is not a number of bytes such as 1.5GB or 700MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_menu(text: str) -> tuple[float, ...]:
    """The numbers of "2,2.5,3", sorted.

    Raises:
        RecipeError: not a list of numbers >= 0.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(re.fullmatch(r"[0-9]*\.?[0-9]+", part) for part in parts):
        raise RecipeError(f"menu {text!r} is not a list of numbers such as 2,2.5,3")
    return tuple(sorted({float(part) for part in parts}))


def parse_shrinkage(text: str) -> tuple[float, float] | None:
    """Shares of the input and the output side of "0.05,0.2" or "none"; None for "held-out".

    Raises:
        RecipeError: neither of these.
    """
    if text == "held-out":
        return None
    parts = ["0", "0"] if text == "none" else [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(re.fullmatch(r"0?\.[0-9]+|[01](\.0*)?", part) for part in parts):
        raise RecipeError(
            f"shrinkage {text!r} is not none, held-out or two shares from 0 to 1 such as 0.05,0.2"
        )
    return float(parts[0]), float(parts[1])


def parse_ratio(text: str) -> float:
    """The factor of "6x" or "6": original file bytes over compressed file bytes.

    Raises:
        RecipeError: not a ratio above 1.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*x?\s*", text)
    if match is None or float(match[1]) <= 1:
        raise RecipeError(f"ratio {text!r} is not a factor above 1 such as 6x")
    return float(match[1])


def readable_errors(error: ValidationError, known: Iterable[str]) -> str:
    """What is wrong with which field, and which known name an unknown one resembles."""
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "settings"
        if item["type"] == "extra_forbidden":
            parts.append(_unknown_key(where, known))
            continue
        shown = f" (got {item['input']!r})" if item["loc"] else ""
        parts.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{shown}")
    return "; ".join(parts)


def _unknown_key(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=2, cutoff=0.5)
    return f"unknown key {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
