"""Cells of the tables of zero-shot scores, from benchmarks/results/zero_shot.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def score_rows(record: Mapping[str, Any], perplexity: str) -> list[list[str]]:
    """Name, bits, KL, both accuracies in percent, and perplexity in that format, of every model."""
    return [
        [
            name,
            f"{score['bits_per_compressed_weight']:.3f}",
            f"{score['kl']:.4f}",
            percent(score["blimp"]["acc"]),
            percent(score["lambada"]["acc"]),
            format(score["lambada"]["perplexity"]["value"], perplexity),
        ]
        for name, score in record["models"].items()
    ]


def percent(figure: Mapping[str, float]) -> str:
    """A share with its standard error."""
    return f"{100 * figure['value']:.2f} ± {100 * figure['stderr']:.2f}"


def difference(pair: Mapping[str, Any], scale: float, form: str) -> str:
    """A paired difference with its interval; a star where that is without zero."""
    low, high = (format(scale * pair[key], form) for key in ("low", "high"))
    star = " *" if pair["significant"] else ""
    return f"{scale * pair['difference']:{form}} [{low}, {high}]{star}"
