"""The rows of the report's tables, from runs and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convex_caldera.report.run import EvaluationFile, LayerRow, Run, Score
from convex_caldera.report.tables import MISSING, Rows

ORIGINAL = "original"
UNKNOWN_METHOD = "other"


@dataclass(frozen=True)
class Entry:
    """One model of the report: its run, if it is ours, and its score in every evaluation."""

    name: str
    method: str
    run: Run | None
    scores: tuple[Score | None, ...]

    @property
    def file_bytes(self) -> int | None:
        if self.run is not None and self.run.sizes is not None:
            return self.run.sizes.file_bytes
        return next((s.file_bytes for s in self.scores if s is not None), None)

    @property
    def bits(self) -> float | None:
        """Stored bits per compressed weight."""
        if self.run is not None and self.run.sizes is not None:
            return self.run.sizes.bits_per_compressed_weight
        return next((s.bits_per_compressed_weight for s in self.scores if s is not None), None)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits over all weights of the model."""
        sizes = None if self.run is None else self.run.sizes
        if sizes is not None and sizes.bits_per_weight is not None:
            return sizes.bits_per_weight
        return next((s.bits_per_weight for s in self.scores if s is not None), None)


def entries(runs: Sequence[Run], evaluations: Sequence[EvaluationFile]) -> list[Entry]:
    """Originals first, then the runs in their order, then models that are only evaluated.

    A score belongs to a run if it names its folder, and if both weigh the same: an evaluation
    of files that have been replaced since gets a line of its own.
    """
    owner: dict[tuple[int, int], int] = {}
    for e, evaluation in enumerate(evaluations):
        for s, score in enumerate(evaluation.scores):
            found = [r for r, run in enumerate(runs) if _is_score_of(score, run)]
            if len(found) == 1:
                owner.setdefault((e, s), found[0])
    result = []
    for r, run in enumerate(runs):
        scores = [
            next((sc for s, sc in enumerate(ev.scores) if owner.get((e, s)) == r), None)
            for e, ev in enumerate(evaluations)
        ]
        result.append(Entry(run.title, run.method, run, tuple(scores)))
    others: dict[tuple[str, str, int | None], list[Score | None]] = {}
    for e, evaluation in enumerate(evaluations):
        for s, score in enumerate(evaluation.scores):
            if (e, s) not in owner:
                method = ORIGINAL if s == 0 else UNKNOWN_METHOD
                key = (method, score.name, score.file_bytes)
                others.setdefault(key, [None] * len(evaluations))[e] = score
    strangers = [Entry(shown(n), m, None, tuple(sc)) for (m, n, _), sc in others.items()]
    originals = [entry for entry in strangers if entry.method == ORIGINAL]
    return originals + result + [entry for entry in strangers if entry.method != ORIGINAL]


def headline(runs: Sequence[Run], evaluations: Sequence[EvaluationFile]) -> Rows:
    """Sizes and quality of every model; one group of columns per evaluation."""
    headings = ["model", "method", "file bytes", "bits per compressed weight"]
    headings.append("bits per all weights")
    for evaluation in evaluations:
        where = f", {shown(evaluation.text)}" if len(evaluations) > 1 else ""
        headings += [f"perplexity{where}", f"KL, nats per token{where}", f"top-1, %{where}"]
    everything = entries(runs, evaluations)
    cells = []
    for entry in everything:
        row = [entry.name, entry.method, count(entry.file_bytes)]
        row += [fixed(entry.bits, 3), fixed(entry.bits_per_weight, 3)]
        for score in entry.scores:
            row += _quality(score, entry.method == ORIGINAL)
        cells.append(tuple(row))
    strong = frozenset(i for i, entry in enumerate(everything) if entry.method == ORIGINAL)
    return Rows(tuple(headings), tuple(cells), 2, strong)


def efficiency(runs: Sequence[Run]) -> Rows:
    """What each run was allowed, what it took, and how far its plan is from the bound."""
    headings = (
        "model",
        "method",
        "budget, bytes",
        "taken, bytes",
        "predicted loss",
        "bound",
        "plan gap, %",
        "price per bit",
        "mean relative loss",
        "seconds",
        "peak memory, MB",
    )
    cells = []
    for run in runs:
        c = run.certificate
        taken = None if run.sizes is None else run.sizes.compressed_bytes
        losses = [layer.relative_loss for layer in run.layers]
        cells.append(
            (
                run.title,
                run.method,
                count(run.budget_bytes),
                count(taken),
                MISSING if c is None else significant(c.distortion),
                MISSING if c is None else significant(c.bound),
                MISSING if c is None or c.plan_gap is None else f"{100 * c.plan_gap:.3g}",
                MISSING if c is None else significant(c.price),
                significant(sum(losses) / len(losses)),
                fixed(run.seconds, 1),
                MISSING if run.peak_memory_bytes is None else f"{run.peak_memory_bytes / 1e6:.0f}",
            )
        )
    return Rows(headings, tuple(cells), 2).without_empty_columns()


def layer_rows(run: Run) -> Rows:
    """The per-layer table of one run."""
    headings = (
        "layer",
        "option",
        "shape",
        "nominal bits",
        "entropy, bits",
        "bits",
        "rank",
        "relative loss",
        "gap to limit, bits",
        "gap of its program",
        "predicted KL, nats",
        "measured KL, nats",
    )
    rows = Rows(headings, tuple(_layer_cells(layer) for layer in run.layers), 3)
    if all(layer.label is None for layer in run.layers):
        keep = [i for i in range(len(headings)) if i != 1]
        cells = tuple(tuple(row[i] for i in keep) for row in rows.cells)
        rows = Rows(tuple(headings[i] for i in keep), cells, 2)
    return rows.without_empty_columns()


def count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def fixed(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def significant(value: float | None, digits: int = 4) -> str:
    return MISSING if value is None else f"{value:.{digits}g}"


def shown(name: str) -> str:
    """The last part of a path; hub ids and other names as they are."""
    return Path(name).name or name if name.startswith(("/", ".", "~")) else name


def _layer_cells(layer: LayerRow) -> tuple[str, ...]:
    return (
        layer.name,
        layer.label or MISSING,
        f"{layer.shape[0]}×{layer.shape[1]}",
        fixed(layer.nominal_bits, 3),
        fixed(layer.entropy_bits, 3),
        f"{layer.bits:.3f}",
        str(layer.rank),
        significant(layer.relative_loss),
        fixed(layer.gap_bits, 3),
        MISSING if layer.program_gap is None else f"{layer.program_gap:.1e}",
        significant(layer.predicted_kl),
        significant(layer.measured_kl),
    )


def _quality(score: Score | None, is_original: bool) -> list[str]:
    if score is None:
        return [MISSING] * 3
    perplexity = _with_error(score.perplexity, score.perplexity_stderr, 3)
    if is_original:
        return [perplexity, MISSING, MISSING]
    top1 = None if score.top1_stderr is None else 100 * score.top1_stderr
    kl = _with_error(score.kl, score.kl_stderr, 4)
    return [perplexity, kl, _with_error(100 * score.top1, top1, 2)]


def _with_error(value: float, stderr: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _is_score_of(score: Score, run: Run) -> bool:
    path = Path(score.name)
    named = path.name == run.directory.resolve().name
    if path.is_absolute() or path.exists():
        named = path.resolve() == run.directory.resolve()
    sizes = run.sizes
    same_size = sizes is None or score.file_bytes in (None, sizes.file_bytes)
    return named and same_size
