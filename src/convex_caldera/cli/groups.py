"""Groups of options: a dataclass whose fields are options, each told once for all commands.

typer reads one option from each parameter of a command. A command that is `spelled_out` may have
parameters that are groups; typer sees their fields, the command gets the groups.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from convex_caldera.cli import options as opt


def spelled_out(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of its groups, in their place."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = [
        option
        for parameter in inspect.signature(command).parameters.values()
        for option in _options_of(parameter, hints[parameter.name])
    ]

    @functools.wraps(command)
    def called(**values: Any) -> None:
        gathered = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **gathered)

    told: Any = called  # what typer reads
    told.__signature__ = inspect.Signature(parameters)
    told.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


def _options_of(parameter: inspect.Parameter, hint: Any) -> Iterator[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    if not is_dataclass(hint):
        yield parameter.replace(kind=keyword, annotation=hint)
        return
    inner = get_type_hints(hint, include_extras=True)
    for field in fields(hint):
        yield inspect.Parameter(
            field.name, keyword, default=field.default, annotation=inner[field.name]
        )


@dataclass(frozen=True)
class RecipeOptions:
    """The method, its budget, and what it may be told to do."""

    method: opt.Method = None
    bits: opt.Bits = None
    size: opt.Size = None
    ratio: opt.Ratio = None
    rank: opt.Rank = None
    factor_bits: opt.FactorBits = None
    group_size: opt.GroupSize = None
    format: opt.Format = None
    factor_format: opt.FactorFormat = None
    bucket: opt.Bucket = None
    latent: opt.Latent = None
    order: opt.Order = None
    neural: opt.Neural = None
    code_bits: opt.CodeBits = None
    block_size: opt.BlockSize = None
    num_iters: opt.NumIters = None
    sample_size: opt.SampleSize = None
    clip_ratio: opt.ClipRatio = None
    coder: opt.Coder = None
    embeddings: opt.Embeddings = None


@dataclass(frozen=True)
class CalibrationOptions:
    """The calibration text and the pass over it."""

    dataset: opt.Dataset = None
    nsamples: opt.NSamples = None
    seqlen: opt.SeqLen = None
    seed: opt.Seed = None
    draws: opt.Draws = None
    device: opt.Device = None
    dtype: opt.DType = None


@dataclass(frozen=True)
class LayerOptions:
    """What holds for some layers only, and what an allocation may choose."""

    ignore: opt.Ignore = None
    pin: opt.Pin = None
    tie: opt.Tie = None
    bits_menu: opt.BitsMenu = None
    rank_menu: opt.RankMenu = None


@dataclass(frozen=True)
class CurvatureOptions:
    """What rounding sees, and of which layers."""

    curvature: opt.Curvature = None
    curvature_fallback: opt.CurvatureFallback = None
    shrinkage: opt.Shrinkage = None
    targets: opt.Targets = None
    remeasure: opt.Remeasure = None
    modules: opt.Modules = None
    images: opt.Images = None
    diag_hessians: opt.DiagHessians = None
