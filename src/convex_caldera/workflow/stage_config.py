"""Read a staged configuration, apply overrides, and compile it to the settings of one run.

What comes out is one `Settings`, so that a staged run writes the same directory as
`convex-caldera compress` with the options that its model card names.
"""

from __future__ import annotations

import ast
import copy
import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from convex_caldera.errors import RecipeError
from convex_caldera.models.patterns import match
from convex_caldera.recipes.formats import DENSE
from convex_caldera.workflow.settings import Settings, make_settings
from convex_caldera.workflow.stage_checks import (
    approximators,
    check_agreement,
    disagree,
    format_text,
    group_of,
)
from convex_caldera.workflow.stage_schema import (
    METHODS,
    WITHOUT_EFFECT,
    Approximator,
    StagedConfig,
)

# Names that LQER's templates use, as the data sets that they mean.
DATASETS = {
    "slim_pajama_6b": "DKYoon/SlimPajama-6B:train",
    "wikitext2": "Salesforce/wikitext@wikitext-2-raw-v1:test",
}
AST = ":ast:"

Document = dict[str, Any]


# --- reading and overriding -----------------------------------------------------------------


def read_document(path: Path) -> Document:
    """The TOML of a file with "NA" values left out and ":ast:" texts evaluated.

    Raises:
        RecipeError: no such file, not TOML, or a text after ":ast:" that is no literal.
    """
    try:
        return cleaned(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise RecipeError(f"there is no file {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error


def cleaned(value: Any) -> Any:
    """A copy without "NA" and with literals for ":ast:" texts."""
    if isinstance(value, dict):
        return {k: cleaned(v) for k, v in value.items() if v != "NA"}
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    if isinstance(value, str) and value.startswith(AST):
        try:
            return ast.literal_eval(value.removeprefix(AST))
        except (ValueError, SyntaxError) as error:
            raise RecipeError(f"{value!r} holds no literal after {AST}") from error
    return value


def overridden(document: Document, overrides: Iterable[str]) -> Document:
    """A copy with `section.key=value` texts applied, values as TOML or plain text.

    LQER's form `--section:key=value` is read too. Tables on the way are made.

    Raises:
        RecipeError: a text of another form, or a key below something that is no table.
    """
    result = copy.deepcopy(document)
    for text in overrides:
        key, equals, value = text.partition("=")
        path = re.split(r"[.:]", key.removeprefix("--"))
        if not equals or not all(path):
            raise RecipeError(f"override {text!r} must read section.key=value")
        put(result, path, cleaned(literal(value)))
    return result


def put(document: Document, path: list[str], value: Any) -> None:
    """Set a nested key, in place; None removes it."""
    table = document
    for depth, part in enumerate(path[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            where = ".".join(path[: depth + 1])
            raise RecipeError(f"{'.'.join(path)}: {where} is a value, not a table")
    if value is None or value == "NA":
        table.pop(path[-1], None)
    else:
        table[path[-1]] = value


def literal(text: str) -> Any:
    """A TOML value, or the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def make_config(document: Document) -> StagedConfig:
    """A checked configuration.

    Raises:
        RecipeError: an unknown key, a wrong type, or two keys that contradict each other; the
            message names them.
    """
    try:
        config = StagedConfig(**document)
    except ValidationError as error:
        raise RecipeError("; ".join(_readable(item) for item in error.errors())) from error
    check_agreement(config)
    return config


def without_effect(document: Document) -> list[str]:
    """Keys that were given and change nothing here."""
    found = []
    for section, keys in WITHOUT_EFFECT.items():
        table: Any = document
        for part in section.split(".") if section else []:
            table = table.get(part, {}) if isinstance(table, dict) else {}
        found += [f"{section}.{key}".strip(".") for key in keys if key in table]
    return found


def _readable(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), _all_keys(StagedConfig), 2, 0.6)
        return f"unknown key {where!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    return f"{where}: {item['msg']} (got {str(item['input'])[:60]!r})"


def _all_keys(model: type[BaseModel]) -> set[str]:
    """Names of all keys of a schema, at any depth."""
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        keys.add(name)
        stack = [field.annotation]
        while stack:
            hint: Any = stack.pop()
            stack += list(getattr(hint, "__args__", ()))
            if isinstance(hint, type) and issubclass(hint, BaseModel):
                keys |= _all_keys(hint)
    return keys


# --- compiling ------------------------------------------------------------------------------


def settings_of(config: StagedConfig) -> Settings:
    """The options of `convex-caldera compress` that this file means.

    Raises:
        RecipeError: as `make_settings`, or approximators that differ in more than numbers.
    """
    method = "no-lqer" if config.evaluate.disable_lqer else METHODS[config.approximate.name]
    default, place = config.approximate.default, "approximate.default"
    weights = format_text(default.W_quantizer, f"{place}.W_quantizer")
    if weights is None:
        raise RecipeError(f"{place}.W_quantizer passes through; there is nothing to approximate")
    values: dict[str, Any] = {
        "model": config.model_name,
        "method": method,
        "format": weights,
        "activations": _activations(config),
        "dataset": DATASETS.get(config.profile.dataset, config.profile.dataset),
        "nsamples": config.profile.num_samples,
        "seqlen": config.profile.max_length,
        "seed": config.profile.seed,
        "dtype": config.profile.dtype,
        "device": config.profile.device,
        "allow_short": config.profile.allow_short,
        "ignore": tuple(config.approximate.ignore),
        "pin": tuple(_pins(config, method)),
    }
    if method != "no-lqer":
        factors = format_text(default.A_quantizer, f"{place}.A_quantizer") or DENSE
        values |= {"rank": default.rank, "factor_format": factors}
    return make_settings(**{key: value for key, value in values.items() if value is not None})


def _activations(config: StagedConfig) -> str | None:
    """The text of `recipes.activations`, or None where all pass through."""
    linear, products = config.q_config.linear, config.q_config.matmul or config.q_config.bmm
    inputs = format_text(linear and linear.x_quantizer, "q_config.linear.x_quantizer")
    attention = format_text(products and products.x_quantizer, "q_config.matmul.x_quantizer")
    if inputs is None and attention is None:
        return None
    layout = products.layout if products is not None and attention is not None else "contraction"
    return f"{inputs or 'none'},attention:{attention or 'none'},layout:{layout}"


def _pins(config: StagedConfig, method: str) -> list[str]:
    """One pin per pattern with an approximator of its own."""
    default = config.approximate.default
    pins = []
    for place, entry in approximators(config)[1:]:
        pattern = place.removeprefix("approximate.approximator.")
        mine, theirs = entry.W_quantizer, default.W_quantizer
        for key in ("name", "exponent_width"):
            if getattr(mine, key) != getattr(theirs, key):
                disagree(
                    f"{place}.W_quantizer.{key}",
                    getattr(mine, key),
                    f"approximate.default.W_quantizer.{key}",
                    getattr(theirs, key),
                )
        _same_factors(place, entry, default)
        numbers: Mapping[str, Any] = {
            "bits": mine.width,
            "group": group_of(mine, f"{place}.W_quantizer"),
            "rank": None if method == "no-lqer" else entry.rank,
        }
        given = ",".join(f"{key}:{value}" for key, value in numbers.items() if value is not None)
        pins.append(f"{layer_pattern(ast.literal_eval(pattern))}={given}")
    return pins


def _same_factors(place: str, entry: Approximator, default: Approximator) -> None:
    mine = format_text(entry.A_quantizer, f"{place}.A_quantizer")
    theirs = format_text(default.A_quantizer, "approximate.default.A_quantizer")
    if mine != theirs:
        disagree(f"{place}.A_quantizer", mine, "approximate.default.A_quantizer", theirs)


def check_patterns(config: StagedConfig, layers: Iterable[str]) -> None:
    """Every layer must fit exactly one pattern of approximate.approximator, if there is any.

    Raises:
        RecipeError: naming the layer and what it fits.
    """
    patterns = config.approximate.approximator
    if patterns is None:
        return
    for layer in layers:
        fitting = [pattern for pattern in patterns if match((layer_pattern(pattern),), layer)]
        if len(fitting) != 1:
            found = " and ".join(map(repr, fitting)) or "none"
            raise RecipeError(
                f"{layer} fits {found} of approximate.approximator; every layer needs exactly one "
                "pattern (approximate.ignore leaves layers out)"
            )


def layer_pattern(pattern: str) -> str:
    """A pattern of LQER, which fits names of weights in full, as one of ours for layers."""
    return f"re:^(?:{pattern.removesuffix('.weight').removesuffix(chr(92))})$"
