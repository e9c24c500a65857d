"""Vision-language models by name on POPE: the original first, images from a folder."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convex_caldera.errors import CheckError, DataError, ModelError, RecipeError
from convex_caldera.evaluate.bootstrap import paired_bootstrap
from convex_caldera.evaluate.pope import (
    SPLITS,
    Question,
    find_split,
    parse_answer,
    read_questions,
    score_answers,
)
from convex_caldera.evaluate.table import plain_table
from convex_caldera.evaluate.vision import answer, load_vision_inputs, read_image
from convex_caldera.models.tokenizer import load_tokenizer
from convex_caldera.workflow.models import ModelRef, open_model
from convex_caldera.workflow.progress import Progress, Silent

INSTRUCTION = "Answer the question using a single word or phrase."
_HEADINGS = (
    "model", "split", "items", "accuracy", "precision", "recall", "F1", "yes-ratio", "unclear",
    "accuracy - original",
)  # fmt: skip


@dataclass(frozen=True)
class PopeOptions:
    """How POPE is asked.

    Attributes:
        questions: folder with one JSON-lines file per split.
        images: folder of the image files.
        splits: which of random, popular, adversarial.
        limit: questions per split.
        batch_size: questions at a time.
        max_new_tokens: of an answer.
        instruction: put after every question on a line of its own; "" for none.
        max_bad: share of questions whose image may be missing or corrupt.
    """

    questions: Path
    images: Path
    splits: tuple[str, ...] = SPLITS
    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int = 16
    instruction: str = INSTRUCTION
    max_bad: float = 0.01


@dataclass(frozen=True)
class PopeResult:
    """Scores per model and split, and the images that could not be used."""

    record: dict[str, Any]
    max_bad: float

    def to_dict(self) -> dict[str, Any]:
        return self.record

    def text(self) -> str:
        rows = [
            _row(model["name"], split, score)
            for model in self.record["models"]
            for split, score in model["splits"].items()
        ]
        lines = [plain_table(_HEADINGS, rows)]
        bad = self.record["bad_images"]
        if bad:
            lines.append(f"\n{len(bad)} images could not be used, {self.record['bad_items']} "
                         f"of {self.record['items']} questions left out:")  # fmt: skip
            lines += [f"  {reason}" for reason in bad.values()]
        return "\n".join(lines)

    def check(self) -> None:
        """Raises CheckError where more questions lack their image than may."""
        share = self.record["bad_items"] / self.record["items"]
        if share > self.max_bad:
            raise CheckError(
                f"{self.record['bad_items']} of {self.record['items']} questions lack a usable "
                f"image ({share:.1%}), more than --max-bad {self.max_bad:g}; the scores above "
                "leave them out"
            )


def evaluate_pope(
    names: Sequence[str],
    options: PopeOptions,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> PopeResult:
    """Ask every model every question; scores per split, original first.

    Raises:
        DataError: questions are malformed, or no image can be used.
        ModelError: a model reads no images.
        RecipeError: an option is out of range, or the first of several models is compressed.
        NumericalError: NaN logits; names model and question.

    Cost: one pass of tower and language model per question, one model in memory at a time.
    """
    models = [open_model(name) for name in names]
    _check(models, options)
    splits = {
        s: read_questions(find_split(options.questions, s))[: options.limit] for s in options.splits
    }
    bad = _bad_images(options.images, splits)
    usable = {s: [q for q in asked if q.image not in bad] for s, asked in splits.items()}
    if not any(usable.values()):
        raise DataError(
            f"{options.images} has none of the {len(bad)} images; give the folder that holds "
            f"{next(iter(bad))} with --images"
        )
    entries, first = [], {}
    for model in models:
        answers = _answers(model, usable, options, device, progress or Silent())
        gc.collect()
        entries.append({"name": model.name, **_sizes(model), "splits": {}})
        for split, questions in usable.items():
            right = [float(a == q.positive) for a, q in zip(answers[split], questions, strict=True)]
            score = score_answers(questions, answers[split]).to_dict()
            if split in first and questions:
                score["difference"] = paired_bootstrap(right, first[split]).to_dict()
            first.setdefault(split, right)
            entries[-1]["splits"][split] = score
    return PopeResult(
        {
            "models": entries,
            "items": sum(map(len, splits.values())),
            "bad_items": sum(map(len, splits.values())) - sum(map(len, usable.values())),
            "bad_images": bad,
            "instruction": options.instruction,
        },
        options.max_bad,
    )


def _answers(
    model: ModelRef,
    splits: dict[str, list[Question]],
    options: PopeOptions,
    device: str,
    progress: Progress,
) -> dict[str, list[bool | None]]:
    loaded = model.load(device)
    if not hasattr(loaded, "get_image_features"):
        raise ModelError(f"{model.name}: a {type(loaded).__name__} reads no images")
    inputs = load_vision_inputs(model.path, load_tokenizer(model.path))
    found: dict[str, list[bool | None]] = {}
    for split, questions in splits.items():
        progress.start(f"{model.name}: {split}", len(questions))
        found[split] = []
        for start in range(0, len(questions), options.batch_size):
            batch = questions[start : start + options.batch_size]
            texts = answer(
                model.name,
                loaded,
                inputs,
                [read_image(options.images / q.image) for q in batch],
                [f"{q.text}\n{options.instruction}".strip() for q in batch],
                max_new_tokens=options.max_new_tokens,
                first=start,
            )
            found[split] += [parse_answer(text) for text in texts]
            for _ in batch:
                progress.advance()
    return found


def _bad_images(folder: Path, splits: dict[str, list[Question]]) -> dict[str, str]:
    """Image file -> why it cannot be used; every image is opened once before any model is."""
    bad = {}
    for image in dict.fromkeys(q.image for asked in splits.values() for q in asked):
        try:
            read_image(folder / image)
        except DataError as error:
            bad[image] = str(error)
    return bad


def _sizes(model: ModelRef) -> dict[str, Any]:
    return {
        "file_bytes": model.file_bytes,
        "bits_per_compressed_weight": model.bits_per_compressed_weight,
        "bits_per_weight": model.bits_per_weight,
    }


def _row(name: str, split: str, score: dict[str, Any]) -> tuple[str, ...]:
    keys = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    figures = [f"{100 * score[key]:.2f} %" for key in keys]
    pair = score.get("difference")
    change = "-"
    if pair is not None:
        change = (
            f"{100 * pair['difference']:+.2f} [{100 * pair['low']:+.2f}, {100 * pair['high']:+.2f}]"
        )
    return (name, split, str(score["items"]), *figures, str(score["unclear"]), change)


def _check(models: list[ModelRef], options: PopeOptions) -> None:
    if not models or len({m.name for m in models}) < len(models):
        raise RecipeError("eval-pope needs models of different names")
    if models[0].compressed and len(models) > 1:
        raise RecipeError(f"{models[0].name} is compressed; name the original model first")
    if options.batch_size < 1 or options.max_new_tokens < 1 or not 0 <= options.max_bad <= 1:
        raise RecipeError("eval-pope needs batch size and new tokens >= 1 and 0 <= max-bad <= 1")
    if options.limit is not None and options.limit < 1:
        raise RecipeError(f"limit must be at least 1, got {options.limit}")
    for folder, option in ((options.questions, "--questions"), (options.images, "--images")):
        if not folder.is_dir():
            raise RecipeError(f"{option} {folder}: no such folder")
