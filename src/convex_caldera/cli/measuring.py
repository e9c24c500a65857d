"""The command that measures a compressed directory for its report: measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convex_caldera.cli import options as opt


def add_commands(app: typer.Typer) -> None:
    """Register this file's command on the application."""
    app.command()(measure)


def measure(
    directory: Annotated[Path, typer.Argument(help="The output folder of a compression.")],
    model: Annotated[
        str | None, typer.Option(help="The original; what the folder names unless given.")
    ] = None,
    dataset: opt.Dataset = None,
    text: Annotated[
        str, typer.Option(help="Held-out text: a file, or bundled[:split].")
    ] = "bundled:test",
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Score so many tokens per layer.")] = 8 * 512,
    hessians: Annotated[
        Path | None, typer.Option(help="Statistics of `calibrate`, else collected again.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Layers at a time; does not change the result.")
    ] = None,
    json: opt.Json = None,
) -> None:
    """Add spectra, the KL of every layer alone and error by rank and bits, for `report`."""
    from convex_caldera.workflow.measuring import measure_directory
    from convex_caldera.workflow.progress import shown

    with shown() as progress:
        result = measure_directory(
            directory, model=model, dataset=dataset, text=text, window=window,
            max_tokens=max_tokens, hessians=hessians, progress=progress, workers=workers,
        )  # fmt: skip
    print(result.text())
    opt.write_json(json, result.to_dict())
