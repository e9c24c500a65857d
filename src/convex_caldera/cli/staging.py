"""Commands that carry out configuration files: stages, sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convex_caldera.cli import options as opt

Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="section.key=value, replacing what the file says. Repeatable."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Layers at a time; does not change the result.")
]
USAGE = 2  # a cell was refused
_LQER_STYLE = {"allow_extra_args": True, "ignore_unknown_options": True}


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands on the application."""
    app.command(context_settings=_LQER_STYLE)(stages)
    app.command()(sweep)


def stages(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="A TOML file, or a shipped one: lqer, lqer_int.")],
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Folder of all stages; checkpoint_path if absent."),
    ] = None,
    override: Set = None,
    workers: Workers = None,
    json: opt.Json = None,
) -> None:
    """Profile, approximate, quantize, evaluate as a TOML file says; done stages are not redone.

    LQER's way to override, --section:key=value, is read as well.
    """
    from convex_caldera.errors import RecipeError
    from convex_caldera.workflow.progress import shown
    from convex_caldera.workflow.stage_config import (
        make_config,
        overridden,
        read_document,
        without_effect,
    )
    from convex_caldera.workflow.stages import Stages
    from convex_caldera.workflow.templates import find

    document = overridden(read_document(find(config)), [*(override or []), *context.args])
    checked = make_config(document)
    out = output_dir or (checked.checkpoint_path and Path(checked.checkpoint_path))
    if not out:
        raise RecipeError("give --output-dir, or checkpoint_path in the file")
    idle = without_effect(document)
    if idle:
        print(f"without effect here: {', '.join(idle)}")
    with shown() as progress:
        results = Stages(checked, Path(out), progress=progress, workers=workers).run()
    for stage, result in results.items():
        figures = {k: v for k, v in result.items() if not isinstance(v, dict) and v is not None}
        print(f"{stage:12s}" + ", ".join(f"{key} {_shown(v)}" for key, v in figures.items()))
    opt.write_json(json, results)


def sweep(
    file: Annotated[str, typer.Argument(help="A TOML file, or a shipped one: sweep_lqer_act, ...")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of all cells.")],
    config: Annotated[
        str | None, typer.Option("--config", help="Another configuration than the file names.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Short for --set model_name=.")
    ] = None,
    axis: Annotated[
        list[str] | None, typer.Option("--axis", help='Other values: "rank=[16, 32]". Repeatable.')
    ] = None,
    override: Set = None,
    plot: Annotated[bool, typer.Option(help="Draw sweep.png; needs matplotlib.")] = True,
    workers: Workers = None,
    json: opt.Json = None,
) -> None:
    """Run a grid of configurations, resuming cell by cell; ends in one table and one plot."""
    from convex_caldera.workflow.progress import shown
    from convex_caldera.workflow.sweep import read_sweep, run_sweep, table_text

    overrides = [*(override or []), *([] if model is None else [f'model_name="{model}"'])]
    grid = read_sweep(file, template=config, axes=axis or [], overrides=overrides)
    with shown() as progress:
        record = run_sweep(grid, output_dir, progress=progress, workers=workers)
    print(table_text(record))
    opt.write_json(json, record)
    if plot:
        from convex_caldera.report.sweep import plot_sweep

        plot_sweep(record, output_dir)
    if any("error" in cell for cell in record["cells"]):
        raise typer.Exit(USAGE)


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
