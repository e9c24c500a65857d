"""The command that trains: finetune."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from convex_caldera.cli import options as opt
from convex_caldera.cli.groups import spelled_out


def add_commands(app: typer.Typer) -> None:
    """Register this file's command on the application."""
    app.command()(spelled_out(finetune))


@dataclass(frozen=True)
class TuneOptions:
    """What is trained, on what, how and for how long."""

    model: Annotated[
        str | None,
        typer.Option(help="The original, as the teacher; by default that of the recipe."),
    ] = None
    scope: Annotated[
        str | None, typer.Option(help="block, model, or both in turn. Default both.")
    ] = None
    train: Annotated[
        str | None,
        typer.Option(
            help="Parts, such as lowrank,signs: lowrank, lora, dora, signs, scales, codebooks, "
            "norms. Default scales,codebooks,norms: no byte more in the file."
        ),
    ] = None
    loss: Annotated[
        str | None, typer.Option(help="mse (blocks), kl (model), task. Default by scope.")
    ] = None
    rank_trainable: Annotated[
        int | None, typer.Option(help="Components that lora trains in each layer. Default 16.")
    ] = None
    dataset: Annotated[
        str | None,
        typer.Option(help="Text as for compress, or a task's .jsonl. Default bundled:train."),
    ] = None
    nsamples: Annotated[int | None, typer.Option(help="Windows of text. Default 256.")] = None
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window. Default 256.")] = None
    batch_size: Annotated[int | None, typer.Option(help="Windows per step. Default 8.")] = None
    lr: Annotated[float | None, typer.Option(help="Relative step size. Default 0.005.")] = None
    epochs: Annotated[float | None, typer.Option(help="Passes over the text. Default 2.")] = None
    block_epochs: Annotated[
        float | None, typer.Option(help="The same for blocks, if different.")
    ] = None
    warmup: Annotated[float | None, typer.Option(help="Share of the steps. Default 0.05.")] = None
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW. Default 0.")] = None
    evaluations: Annotated[
        int | None, typer.Option(help="Of the validation split, per epoch. Default 4.")
    ] = None
    patience: Annotated[
        int | None, typer.Option(help="Evaluations without a new best; 0: never stop. Default 4.")
    ] = None
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds of training, shared by the phases.")
    ] = None
    seed: opt.Seed = None
    device: opt.Device = None
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing", help="Recompute blocks: less memory.")
    ] = None
    allow_short: opt.AllowShort = None
    text_field: Annotated[
        list[str] | None, typer.Option(help="Task: a field of the text. May be repeated.")
    ] = None
    choice_field: Annotated[
        list[str] | None, typer.Option(help="Task: a field with a choice. May be repeated.")
    ] = None
    label_field: Annotated[
        str | None, typer.Option(help="Task: the field of the answer. Default label.")
    ] = None
    label_name: Annotated[
        list[str] | None,
        typer.Option(help="Task: a label's word, or name=word, in order. May be repeated."),
    ] = None
    prompt: Annotated[
        str | None,
        typer.Option(help='Task: text with "{field}" for fields, instead of --text-field.'),
    ] = None


def finetune(
    directory: Annotated[str, typer.Argument(help="The output folder of a compression.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="A new folder.")],
    wanted: TuneOptions,
    log: Annotated[
        Path | None, typer.Option(help="JSON lines of every step. Default OUT.log.jsonl.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard events, if it is installed.")
    ] = None,
    json: opt.Json = None,
) -> None:
    """Train the continuous parts of a compressed model; codes stay. Resumes what was cut short."""
    from convex_caldera.workflow.finetuning import finetune_to
    from convex_caldera.workflow.progress import shown
    from convex_caldera.workflow.tuning_settings import make_tune_settings

    options = opt.given(directory=directory, **vars(wanted))
    if wanted.train is not None:
        options["train"] = tuple(p.strip() for p in wanted.train.split(",") if p.strip())
    settings = make_tune_settings(**options)
    log = log or output_dir.with_name(output_dir.name + ".log.jsonl")
    with shown() as progress:
        summary = finetune_to(
            settings, output_dir, progress=progress, log=log, tensorboard=tensorboard
        )
    if summary is not None:
        print(summary.text())
        opt.write_json(json, summary.to_dict())
