"""Layers that are an input embedding or an output head, and what weighs their errors.

The report's "embeddings" names them with their uses, "lookup", "head" or both of a tied matrix. A
head is weighed by the second moment of the final hidden state, whose statistics lie in a folder of
their own inside those of the layers; a lookup alone has H = I. Where the statistics were not
saved, the error of a head cannot be recomputed, and what is said counts it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from convex_caldera.certify.reader import Output
from convex_caldera.certify.statistics import Sides, Statistics
from convex_caldera.certify.strict import listing, short
from convex_caldera.errors import CheckError, FormatError

KEY = "embeddings"
USES = ("lookup", "head")


def uses_of(output: Output) -> Mapping[str, tuple[str, ...]]:
    """Embeddings that are stored -> their uses; no use twice, so at most two layers."""
    record = output.report.get(KEY, {})
    if not isinstance(record, dict):
        raise FormatError(f"report: {KEY} must be an object")
    found = {name: tuple(listing(uses, f"report: {KEY}")) for name, uses in record.items()}
    all_uses = [use for uses in found.values() for use in uses]
    if not all(found.values()) or len(set(all_uses)) < len(all_uses) or set(all_uses) - set(USES):
        raise CheckError(f"report: {KEY}: {short(all_uses)} are not uses of one model")
    unknown = sorted(set(found) - set(output.layers))
    if unknown:
        raise CheckError(f"report: {KEY}: {short(unknown[0])} is not stored")
    return found


def unseen_heads(output: Output, statistics: Statistics) -> frozenset[str]:
    """Output heads whose statistics were not saved."""
    return frozenset(n for n in uses_of(output) if sides_of(output, statistics, n) is None)


def sides_of(output: Output, statistics: Statistics, name: str) -> Sides | None:
    """What weighs the error of a layer; None of a head whose statistics were not saved.

    A layer that the statistics know is weighed by them, whatever the report calls it.
    """
    site, (m, n) = output.report["layers"][name]["input_site"], output.layers[name].spec.shape
    uses = uses_of(output).get(name)
    if uses is None or statistics.known(name, site):
        return statistics.sides(name, site, m)
    if "head" not in uses:
        return Sides(np.eye(n))
    heads = statistics.heads
    return heads.sides(name, site, m) if heads is not None and heads.known(name, site) else None
