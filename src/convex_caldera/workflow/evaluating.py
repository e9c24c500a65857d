"""Evaluate models by name on one text, the original first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from convex_caldera.calibrate.text import read_text
from convex_caldera.errors import RecipeError
from convex_caldera.evaluate.compare import Candidate, Evaluation, evaluate
from convex_caldera.evaluate.table import HEADINGS, plain_table, score_cells
from convex_caldera.models.tokenizer import load_tokenizer
from convex_caldera.workflow.models import ModelRef, open_model
from convex_caldera.workflow.precision import activation_bits
from convex_caldera.workflow.progress import Progress, Silent


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of several models, with bits per all weights beside those of the compressed ones."""

    evaluation: Evaluation
    models: tuple[ModelRef, ...]
    text_name: str

    def to_dict(self) -> dict[str, Any]:
        record = self.evaluation.to_dict()
        for entry, model in zip(record["models"], self.models, strict=True):
            entry["bits_per_weight"] = model.bits_per_weight
            entry["activations"] = model.activations
        return {**record, "text": self.text_name}

    def text(self) -> str:
        protocol = self.evaluation.protocol
        rows = [
            _with_activations(cells, model.activations)
            for cells, model in zip(score_cells(list(self.evaluation)), self.models, strict=True)
        ]
        return (
            f"{plain_table(HEADINGS, rows)}\n\n{self.text_name}: {protocol.tokens} tokens, "
            f"windows of {protocol.window}, stride {protocol.stride}, "
            f"{'with' if protocol.bos else 'without'} BOS; KL in nats against the first model; "
            "+- one standard error over windows"
        )


def evaluate_models(
    names: Sequence[str],
    text: str,
    *,
    window: int = 512,
    stride: int | None = None,
    bos: bool = True,
    max_tokens: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> EvaluationResult:
    """Perplexity, KL and agreement of each model on the same tokens.

    Raises:
        RecipeError: the first model is compressed, so there is nothing to compare with.
        DataError, ModelError, FormatError, NumericalError: as `evaluate` and `open_model`.
    """
    models = tuple(open_model(name) for name in names)
    if models[0].compressed and len(models) > 1:
        raise RecipeError(f"{names[0]} is compressed; name the original model first")
    progress = progress or Silent()
    bar = Meter(progress)
    evaluation = evaluate(
        [_candidate(model, device) for model in models],
        read_text(text),
        load_tokenizer(models[0].path),
        window=window,
        stride=stride,
        bos=bos,
        max_tokens=max_tokens,
        progress=bar,
    )
    return EvaluationResult(evaluation, models, text)


def _candidate(model: ModelRef, device: str) -> Candidate:
    return Candidate(
        model.name,
        lambda: model.load(device),
        model.file_bytes,
        model.bits_per_compressed_weight,
    )


def _with_activations(cells: tuple[str, ...], activations: str | None) -> tuple[str, ...]:
    """The bits column says "4.605 A8" where activations are rounded too."""
    column = HEADINGS.index("bits/weight")
    if activations is None:
        return cells
    shown = f"{cells[column]} A{activation_bits(activations)}"
    return (*cells[:column], shown, *cells[column + 1 :])


class Meter:
    """Turns (done, total, seconds left) into steps of a progress stage."""

    def __init__(self, progress: Progress):
        self._progress, self._done = progress, 0

    def __call__(self, done: int, total: int, left: float) -> None:
        del left
        if self._done == 0:
            self._progress.start("windows", total)
        for _ in range(done - self._done):
            self._progress.advance()
        self._done = done
