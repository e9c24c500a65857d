"""Commands that read: eval, inspect, generate, verify, report, export, methods."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from convex_caldera.cli import evaluating
from convex_caldera.cli import options as opt

Directory = Annotated[Path, typer.Argument(help="The output folder of a compression.")]
CHECK_FAILED = 4


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands on the application."""
    evaluating.add_commands(app)
    app.command()(inspect)
    app.command()(generate)
    app.command()(verify)
    app.command()(report)
    app.command()(export)
    app.command()(distortion)
    app.command()(methods)


def inspect(directory: Directory, json: opt.Json = None) -> None:
    """Per-layer table of a compressed model: bits, rank, error, terms, damping."""
    from convex_caldera.workflow.inspecting import inspect_directory

    result = inspect_directory(directory)
    print(result.text())
    opt.write_json(json, result.to_dict())


def generate(
    model: opt.Model,
    prompt: Annotated[str, typer.Option(help="Text to continue; standard input if absent.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="At most so many.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template; by default if there is one."),
    ] = None,
    device: opt.Device = None,
    json: opt.Json = None,
) -> None:
    """Continue a prompt with an original or a compressed model."""
    from convex_caldera.workflow.generating import generate_text

    prompt = prompt or sys.stdin.read()
    print(prompt, end="", flush=True)
    text = generate_text(
        model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        seed=seed, chat=chat, device=device or "cpu",
        on_text=lambda piece: print(piece, end="", flush=True),
    )  # fmt: skip
    print()
    opt.write_json(json, {"prompt": prompt, "text": text})


def verify(
    directory: Directory,
    model: Annotated[
        Path | None, typer.Option(help="The original model's directory, to recompute errors.")
    ] = None,
    hessians: Annotated[
        Path | None, typer.Option(help="Saved statistics of `calibrate`; needs --model.")
    ] = None,
    json: opt.Json = None,
) -> None:
    """Check a compressed model claim by claim; exit code 4 on the first that is false."""
    from convex_caldera.certify import verify as check

    result = check(directory, model, hessians)
    print(result.text())
    opt.write_json(json, result.to_dict())
    if not result.ok:
        raise typer.Exit(CHECK_FAILED)


def report(
    directories: Annotated[list[Path], typer.Argument(help="Output folders of compressions.")],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Where report.html and figures go.")
    ] = Path("report"),
    evaluation: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="JSON files of `eval` or `compress`; may be repeated."),
    ] = None,
    json: opt.Json = None,
) -> None:
    """One self-contained HTML page with figures over one or several compressed models."""
    from convex_caldera.report import write_report

    files = write_report(directories, output_dir, evaluation or [])
    print(f"{len(files)} files, {output_dir / 'report.html'}")
    opt.write_json(json, {"files": [str(file) for file in files]})


def export(
    directory: Directory,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="A new folder.")],
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Write plain weights that load anywhere, decoded from a compressed model."""
    from convex_caldera.workflow.exporting import export_directory

    note = export_directory(directory, output_dir, dtype)
    print(f"plain {dtype} weights -> {output_dir}" + (f"\n{note}" if note else ""))


def distortion(
    quantizer: Annotated[str, typer.Argument(help="uniform, normal_float, e8p, trellis, ...")],
    bits: Annotated[float, typer.Option(help="Bits per weight of its codes.")] = 2.0,
    size: Annotated[int, typer.Option(help="Gaussian weights to quantize.")] = 1 << 20,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option(help="Field of the quantizer: name=value. May be repeated.")
    ] = None,
    json: opt.Json = None,
) -> None:
    """Mean squared error of a quantizer on N(0, 1) beside the Shannon limit 2^(-2 bits)."""
    from convex_caldera.workflow.distorting import measure_distortion

    result = measure_distortion(quantizer, bits, size, seed, tuple(option or ()))
    print(result.text())
    opt.write_json(json, result.to_dict())


def methods(json: opt.Json = None) -> None:
    """The methods of this library, one sentence and the paper of each."""
    from convex_caldera.recipes.table import METHODS

    width = max(map(len, METHODS)) + 2
    for method in METHODS.values():
        print(f"{method.name:{width}s}{method.sentence}\n{'':{width}s}{method.paper}")
    rows = [{"name": m.name, "sentence": m.sentence, "paper": m.paper} for m in METHODS.values()]
    opt.write_json(json, {"methods": rows})
