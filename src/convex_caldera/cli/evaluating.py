"""Commands that measure models: eval, eval-pope, bench, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from convex_caldera.cli import options as opt

Models = Annotated[list[str], typer.Argument(help="The original first, then compressed ones.")]
Out = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="Tables in four forms, and parts to resume from."),
]


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands on the application."""
    app.command("eval")(evaluate)


def evaluate(
    models: Models,
    text: Annotated[
        str, typer.Option(help="Held-out text: a file, or bundled[:split].")
    ] = "bundled:test",
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows; the window unless given.")
    ] = None,
    bos: Annotated[bool, typer.Option(help="Begin each window with the BOS token.")] = True,
    max_tokens: Annotated[int | None, typer.Option(help="Score at most so many tokens.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="wikitext2,c4,winogrande,rte,piqa,arc_challenge,arc_easy,blimp, ..."),
    ] = None,
    task_data: Annotated[
        list[str] | None,
        typer.Option(help="Folder of task files, TASK=FILE, or `hub`. May be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items per task (of each part).")] = None,
    protocol: Annotated[
        str, typer.Option(help="Perplexity tasks per `token` (papers), `word` (lm-eval) or `both`.")
    ] = "token",
    batch_size: Annotated[
        str, typer.Option(help="Inputs at a time; auto bounds memory instead.")
    ] = "auto",
    output_dir: Out = None,
    device: opt.Device = None,
    json: opt.Json = None,
) -> None:
    """Perplexity, KL, agreement and zero-shot tasks of several models, the original first."""
    from convex_caldera.workflow.progress import shown

    common: dict[str, Any] = {
        "window": window, "stride": stride, "bos": bos, "max_tokens": max_tokens
    }  # fmt: skip
    if tasks is None:
        _only_with_tasks(task_data=task_data, limit=limit, output_dir=output_dir)
        from convex_caldera.workflow.evaluating import evaluate_models

        with shown() as progress:
            result = evaluate_models(
                models, text, device=device or "cpu", progress=progress, **common
            )
        print(result.text())
        opt.write_json(json, result.to_dict())
        return
    from convex_caldera.workflow.zero_shot import TaskOptions, evaluate_tasks

    options = TaskOptions(
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        task_data=tuple(task_data or ()), limit=limit, protocol=protocol,
        batch_size=_batch_size(batch_size), text=text, **common,
    )  # fmt: skip
    with shown() as progress:
        record = evaluate_tasks(
            models, options, output_dir=output_dir, device=device or "cpu", progress=progress
        )
    _print_tables(record, output_dir)
    opt.write_json(json, record)


def _print_tables(record: dict[str, Any], output_dir: Path | None) -> None:
    from convex_caldera.report.tables import RENDERERS, plain
    from convex_caldera.report.zero_shot import differences_rows, zero_shot_rows

    rows, differences = zero_shot_rows(record), differences_rows(record)
    print(plain(rows))
    if differences is not None:
        print("Paired differences from the original (bootstrap over items):")
        print(plain(differences))
    if output_dir is not None:
        for suffix, render in RENDERERS.items():
            (output_dir / f"eval.{suffix}").write_text(render(rows), encoding="utf-8")
        opt.write_json(output_dir / "eval.json", record)


def _only_with_tasks(**given: object) -> None:
    from convex_caldera.errors import RecipeError

    extra = [name for name, value in given.items() if value]
    if extra:
        option = extra[0].replace("_", "-")
        raise RecipeError(f"--{option} goes with --tasks; without it there are no tasks to score")


def _batch_size(text: str) -> int | None:
    from convex_caldera.errors import RecipeError

    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise RecipeError(f"--batch-size {text!r} is neither auto nor a number above 0")
    return int(text)
