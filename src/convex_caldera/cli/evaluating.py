"""Commands that measure models: eval, eval-pope, bench, compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convex_caldera.cli import options as opt
from convex_caldera.cli.groups import spelled_out

if TYPE_CHECKING:
    from convex_caldera.workflow.pope import PopeResult

CHECK_FAILED = 4

Models = Annotated[list[str], typer.Argument(help="The original first, then compressed ones.")]
Out = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", help="Tables in four forms, and parts to resume from."),
]


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands on the application."""
    app.command("eval")(spelled_out(evaluate))
    app.command("eval-pope")(evaluate_pope)
    app.command()(bench)
    app.command()(compare)


@dataclass(frozen=True)
class TextScoring:
    """The held-out text and how it is cut into windows."""

    text: Annotated[str, typer.Option(help="Held-out text: a file, or bundled[:split].")] = (
        "bundled:test"
    )
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512
    stride: Annotated[
        int | None, typer.Option(help="Tokens between windows; the window unless given.")
    ] = None
    bos: Annotated[bool, typer.Option(help="Begin each window with the BOS token.")] = True
    max_tokens: Annotated[int | None, typer.Option(help="Score at most so many tokens.")] = None


@dataclass(frozen=True)
class TaskScoring:
    """The tasks and how they are scored."""

    tasks: Annotated[
        str | None,
        typer.Option(
            help="wikitext2,c4,winogrande,rte,piqa,arc_challenge,arc_easy,blimp, ..., pope."
        ),
    ] = None
    task_data: Annotated[
        list[str] | None,
        typer.Option(help="Folder of task files, TASK=FILE, or `hub`. May be repeated."),
    ] = None
    limit: Annotated[int | None, typer.Option(help="Items per task (of each part).")] = None
    protocol: Annotated[
        str, typer.Option(help="Perplexity tasks per `token` (papers), `word` (lm-eval) or `both`.")
    ] = "token"
    batch_size: Annotated[
        str, typer.Option(help="Inputs at a time; auto bounds memory instead.")
    ] = "auto"
    images: Annotated[Path | None, typer.Option(help="Folder of the image files, for pope.")] = None


def evaluate(
    models: Models,
    scoring: TextScoring,
    scored: TaskScoring,
    output_dir: Out = None,
    device: opt.Device = None,
    json: opt.Json = None,
) -> None:
    """Perplexity, KL, agreement and zero-shot tasks of several models, the original first."""
    if scored.tasks is None:
        _only_with_tasks(
            task_data=scored.task_data,
            limit=scored.limit,
            images=scored.images,
            output_dir=output_dir,
        )
        opt.write_json(json, _score_text(models, scoring, device or "cpu"))
        return
    tasks = [name.strip() for name in scored.tasks.split(",") if name.strip()]
    record: dict[str, Any] = {}
    if tasks != ["pope"]:
        rest = tuple(name for name in tasks if name != "pope")
        record = _score_tasks(models, scoring, scored, rest, output_dir, device or "cpu")
    if "pope" not in tasks:
        opt.write_json(json, record)
        return
    questions, images = _pope_folders(scored)
    size = _batch_size(scored.batch_size)
    found = _ask(
        models, device, questions=questions, images=images, limit=scored.limit,
        **({} if size is None else {"batch_size": size}),
    )  # fmt: skip
    opt.write_json(json, {**record, "pope": found.to_dict()})
    found.check()


def _score_text(models: list[str], scoring: TextScoring, device: str) -> dict[str, Any]:
    from convex_caldera.workflow.evaluating import evaluate_models
    from convex_caldera.workflow.progress import shown

    with shown() as progress:
        result = evaluate_models(models, **vars(scoring), device=device, progress=progress)
    print(result.text())
    return result.to_dict()


def _score_tasks(
    models: list[str],
    scoring: TextScoring,
    scored: TaskScoring,
    tasks: tuple[str, ...],
    output_dir: Path | None,
    device: str,
) -> dict[str, Any]:
    from convex_caldera.workflow.progress import shown
    from convex_caldera.workflow.zero_shot import TaskOptions, evaluate_tasks

    options = TaskOptions(
        tasks=tasks, task_data=tuple(scored.task_data or ()),
        limit=scored.limit, protocol=scored.protocol,
        batch_size=_batch_size(scored.batch_size), **vars(scoring),
    )  # fmt: skip
    with shown() as progress:
        record = evaluate_tasks(
            models, options, output_dir=output_dir, device=device, progress=progress
        )
    _print_tables(record, output_dir)
    return record


def evaluate_pope(
    models: Models,
    questions: Annotated[Path, typer.Option(help="Folder with one .jsonl file per split.")],
    images: Annotated[Path, typer.Option(help="Folder of the image files.")],
    splits: Annotated[str, typer.Option(help="Of random,popular,adversarial.")] = (
        "random,popular,adversarial"
    ),
    limit: Annotated[int | None, typer.Option(help="Questions per split.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 16,
    max_bad: Annotated[
        float, typer.Option(help="Share of questions whose image may be missing or corrupt.")
    ] = 0.01,
    device: opt.Device = None,
    json: opt.Json = None,
) -> None:
    """POPE on vision-language models: accuracy, precision, recall, F1 and yes-ratio per split."""
    result = _ask(
        models, device, questions=questions, images=images,
        splits=tuple(s.strip() for s in splits.split(",") if s.strip()), limit=limit,
        batch_size=batch_size, max_new_tokens=max_new_tokens, max_bad=max_bad,
    )  # fmt: skip
    opt.write_json(json, result.to_dict())
    result.check()


def _ask(models: list[str], device: str | None, **options: Any) -> PopeResult:
    """POPE's scores, printed."""
    from convex_caldera.workflow.pope import PopeOptions
    from convex_caldera.workflow.pope import evaluate_pope as ask
    from convex_caldera.workflow.progress import shown

    with shown() as progress:
        result = ask(models, PopeOptions(**options), device=device or "cpu", progress=progress)
    print(result.text())
    return result


def _pope_folders(scored: TaskScoring) -> tuple[Path, Path]:
    """Folders of POPE's questions and images."""
    from convex_caldera.errors import RecipeError

    folders = [Path(source) for source in scored.task_data or () if Path(source).is_dir()]
    asked = [folder for folder in folders if any(folder.glob("*pope*.json*"))]
    if not asked or scored.images is None:
        raise RecipeError(
            "task pope: give --task-data DIR with its questions (*pope*_random.jsonl and so on) "
            "and --images DIR"
        )
    return asked[0], scored.images


def bench(
    models: Models,
    batches: Annotated[str, typer.Option(help="Batch sizes, such as 1,8,64.")] = "1,8,64",
    prompt_tokens: Annotated[int, typer.Option(help="Of every prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Decoded after every prompt.")] = 32,
    repeats: Annotated[int, typer.Option(help="Medians over so many runs.")] = 3,
    device: opt.Device = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    json: opt.Json = None,
) -> None:
    """Throughput beside the original: prefill, decode, memory, share of the bandwidth roofline."""
    from convex_caldera.errors import RecipeError
    from convex_caldera.workflow.benching import BenchOptions, bench_models
    from convex_caldera.workflow.progress import shown

    sizes = [part.strip() for part in batches.split(",") if part.strip()]
    if not sizes or not all(part.isdecimal() for part in sizes):
        raise RecipeError(f"--batches {batches!r} is not a list of numbers such as 1,8,64")
    options = BenchOptions(
        tuple(map(int, sizes)), prompt_tokens, new_tokens, repeats, device or "cpu", dtype
    )
    with shown() as progress:
        result = bench_models(models, options, progress=progress)
    print(result.text())
    opt.write_json(json, result.to_dict())


def compare(
    directories: Annotated[list[Path], typer.Argument(help="Output folders of compressions.")],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Where report.html and tables go.")
    ] = Path("comparison"),
    evaluation: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="JSON files of `eval` or `compress`; may be repeated."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run the independent checker on each.")
    ] = True,
    json: opt.Json = None,
) -> None:
    """The tables of zero-shot scores and of efficiency with certificates, and one page over all."""
    from convex_caldera.certify import verify
    from convex_caldera.report.comparison import verdict_of, write_comparison

    checked = {d: verdict_of(verify(d)) for d in directories} if check else {}
    files = write_comparison(directories, output_dir, evaluation or [], checked)
    for name in ("zero-shot", "efficiency"):
        table = output_dir / f"mission-{name}.txt"
        if table in files:
            print(table.read_text(encoding="utf-8"))
    print(f"{len(files)} files, {output_dir / 'report.html'}")
    verdicts = {str(d): {"ok": c.ok, "sentence": c.sentence} for d, c in checked.items()}
    opt.write_json(json, {"files": [str(file) for file in files], "checked": verdicts})
    if any(not verdict.ok for verdict in checked.values()):
        raise typer.Exit(CHECK_FAILED)


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
