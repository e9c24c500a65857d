"""Commands that make something: compress, plan, calibrate, demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convex_caldera.cli import options as opt
from convex_caldera.cli.groups import (
    CalibrationOptions,
    CurvatureOptions,
    LayerOptions,
    RecipeOptions,
    spelled_out,
)

if TYPE_CHECKING:
    from convex_caldera.workflow.settings import Settings

Out = Annotated[Path, typer.Option("--output-dir", "-o", help="Written to exactly this folder.")]


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands on the application."""
    app.command()(spelled_out(compress))
    app.command()(spelled_out(plan))
    app.command()(spelled_out(calibrate))
    app.command()(allocate)
    app.command()(demo)


def compress(
    model: opt.Model,
    output_dir: Out,
    *,
    recipe: RecipeOptions,
    lossless: opt.Lossless = None,
    activations: opt.Activations = None,
    text: CalibrationOptions,
    layers: LayerOptions,
    curvature: CurvatureOptions,
    allow_short: opt.AllowShort = None,
    config: opt.Config = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Layers at a time; does not change the result.")
    ] = None,
    hessians: Annotated[
        Path | None,
        typer.Option(help="Statistics of `calibrate` to use; collected into it where missing."),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(help="Options measured for other budgets to use; new ones stay there."),
    ] = None,
    json: opt.Json = None,
) -> None:
    """Compress a model within a budget of bits per weight or bytes; resumes what was cut short."""
    from convex_caldera.workflow.compress import compress_to
    from convex_caldera.workflow.progress import shown

    settings = _settings(
        config,
        opt.given(
            model=model, lossless=lossless, activations=activations, allow_short=allow_short,
            **vars(recipe), **vars(text), **vars(layers), **vars(curvature),
        ),
    )  # fmt: skip
    with shown() as progress:
        summary = compress_to(
            settings, output_dir, progress=progress, workers=workers, hessians=hessians,
            measured=measured,
        )  # fmt: skip
    print(summary.text())
    opt.write_json(json, summary.to_dict())


def plan(
    model: opt.Model,
    recipe: RecipeOptions,
    nsamples: opt.NSamples = None,
    seqlen: opt.SeqLen = None,
    ignore: opt.Ignore = None,
    pin: opt.Pin = None,
    curvature: opt.Curvature = None,
    targets: opt.Targets = None,
    modules: opt.Modules = None,
    diag_hessians: opt.DiagHessians = None,
    config: opt.Config = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print every layer.")] = False,
    json: opt.Json = None,
) -> None:
    """Dry run from shapes alone: bits per layer, disk and peak memory, before a weight is read."""
    from convex_caldera.workflow.estimate import estimate

    settings = _settings(
        config,
        opt.given(
            model=model, nsamples=nsamples, seqlen=seqlen, ignore=ignore, pin=pin,
            curvature=curvature, targets=targets, modules=modules, diag_hessians=diag_hessians,
            **vars(recipe),
        ),
    )  # fmt: skip
    result = estimate(settings)
    print(result.text(layers=layers))
    opt.write_json(json, result.to_dict())


def calibrate(
    model: opt.Model,
    output_dir: Out,
    text: CalibrationOptions,
    curvature: Annotated[
        str | None,
        typer.Option(
            "--curvature",
            help="What to collect: input (second moments, the default), kronecker (of the "
            "model's loss, what the default method uses) or guided.",
        ),
    ] = None,
    modules: opt.Modules = None,
    images: opt.Images = None,
    embeddings: opt.Embeddings = None,
    allow_short: opt.AllowShort = None,
    json: opt.Json = None,
) -> None:
    """Collect the curvature of every layer once, to compress with and to verify with."""
    from convex_caldera.workflow.calibrating import calibrate_to
    from convex_caldera.workflow.progress import shown

    settings = _settings(
        None,
        opt.given(
            model=model, curvature=curvature, modules=modules, images=images,
            embeddings=embeddings, allow_short=allow_short, **vars(text),
        ),
    )  # fmt: skip
    with shown() as progress:
        record = calibrate_to(settings, output_dir, progress=progress)
    print(
        f"{record['curvature']} curvature of {record['layers']} layers, {record['sites']} input "
        f"sites, {record['tokens']} tokens -> {output_dir}"
    )
    opt.write_json(json, record)


def allocate(
    curves: Annotated[Path, typer.Argument(help="Saved curves, JSON (docs/certificate.md).")],
    budget: Annotated[int | None, typer.Option("--budget", help="Total stored bits.")] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Every plan of the frontier.")
    ] = False,
    json: opt.Json = None,
) -> None:
    """The solver alone: one option per layer from saved curves, with a bound anyone can recheck."""
    from convex_caldera.workflow.solving import solve_curves

    result = solve_curves(curves, budget, frontier)
    print(result.text())
    opt.write_json(json, result.to_dict())


def demo(
    output_dir: Out = Path("runs/demo"),
    bits: Annotated[float, typer.Option(help="Stored bits per compressed weight.")] = 2.2,
    json: opt.Json = None,
) -> None:
    """Compress the bundled model, reload it in a fresh process, compare it with the original."""
    from convex_caldera.workflow.demo import run_demo
    from convex_caldera.workflow.progress import shown

    with shown() as progress:
        result = run_demo(output_dir, bits, progress=progress)
    print(result.text())
    opt.write_json(json, result.to_dict())


def _settings(config: Path | None, given: dict[str, Any]) -> Settings:
    from convex_caldera.workflow.settings import make_settings, read_settings

    return make_settings(**given) if config is None else read_settings(config, **given)
