"""The list of claims of an output directory, checked one after the other.

Without the original model: files and hashes, structure, ranks, exact bytes against the budget,
the plan and its bound in exact arithmetic, the surrogate's primal and dual values, and that
every layer decodes. With the model: that it is the one that was compressed, and that all other
tensors are its own to the byte. With the calibration statistics too: every layer's weighted
error, and the primal and dual values of its low-rank program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from convex_caldera.certify import plan_claims, surrogate
from convex_caldera.certify.claims import Claim, Verification
from convex_caldera.certify.decode_layer import decode
from convex_caldera.certify.reader import Output, check_manifest, read_output
from convex_caldera.certify.source import Source, check_rest, check_source, read_source
from convex_caldera.certify.statistics import Statistics, read_statistics
from convex_caldera.certify.tuned import KEY, check_tuned
from convex_caldera.certify.weighted import (
    check_losses,
    check_programs,
    check_statistics,
    identity,
)
from convex_caldera.errors import ConvexCalderaError, RecipeError

Check = tuple[str, Callable[[], str]]
# What a computation on damaged data can end in. A claim that cannot be evaluated is not proved.
UNPROVED = (
    ConvexCalderaError,
    OSError,
    ArithmeticError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    np.linalg.LinAlgError,
)
# Methods whose options a convex program proposed, so that one without its values is not accepted.
PROPOSED = ("convex-caldera",)
FILES = "files are those of the manifest"


def verify(
    directory: Path | str,
    model: Path | str | None = None,
    hessians: Path | str | None = None,
) -> Verification:
    """Check an output directory claim by claim; stops at the first false one.

    Args:
        directory: what `compress` wrote.
        model: directory of the original model.
        hessians: directory of the calibration statistics; needs `model`.

    Returns:
        The claims in order. Damage of any kind is a false claim, never an exception.

    Raises:
        RecipeError: statistics are given without the model.

    Cost: one SHA-256 over all files and one decoding of every layer; with statistics two
    products m x n x n a layer more. Memory: one layer at a time, about 40 bytes a weight.
    """
    if hessians is not None and model is None:
        raise RecipeError("weighted errors need the original weights too: give `model`")
    claims: list[Claim] = []
    for name, check in _checks(Path(directory), _path(model), _path(hessians)):
        try:
            claims.append(Claim(name, True, check()))
        except UNPROVED as error:
            kind = "" if isinstance(error, ConvexCalderaError) else f"{type(error).__name__}: "
            claims.append(Claim(name, False, kind + _readable(str(error))))
            break
    return Verification(tuple(claims))


def _path(value: Path | str | None) -> Path | None:
    return None if value is None else Path(value)


def _readable(text: str) -> str:
    """One line that any terminal can print."""
    return text.encode("ascii", "backslashreplace").decode().replace("\n", " ")[:500]


def _checks(directory: Path, model: Path | None, hessians: Path | None) -> Iterator[Check]:
    """The checks; each is asked for only after the one before it has held."""
    yield FILES, lambda: f"{check_manifest(directory)} files"
    found: list[Output] = []

    def open_output() -> str:
        found.append(read_output(directory))
        return f"{len(found[0].layers)} layers, {len(found[0].rest)} other tensors"

    yield "the container is in the documented format", open_output
    output = found[0]
    yield "layers are stored as the report says", lambda: plan_claims.check_report(output)
    tuned = KEY in output.report
    before = " before fine-tuning" if tuned else ""
    if tuned:
        yield "what fine-tuning changed is named", lambda: check_tuned(output)
    yield f"stored bytes are within the budget{before}", lambda: plan_claims.check_bytes(output)
    if output.certificate is not None:
        yield from _certificate_checks(output, before)
    weighted = hessians is not None or plan_claims.curvature_of(output) == "none"
    if tuned or model is None or not weighted:
        yield "every layer decodes to finite weights", lambda: _decodes(output)
    if model is not None:
        yield from _model_checks(output, model, hessians)


def _certificate_checks(output: Output, before: str) -> Iterator[Check]:
    chosen = f"every layer is the option that was chosen{before}"
    yield chosen, lambda: plan_claims.check_options(output)
    yield f"the plan obeys ties and budget{before}", lambda: plan_claims.check_plan(output)
    yield f"no plan is better than the bound{before}", lambda: plan_claims.check_plan_bound(output)
    certificate = plan_claims.certificate_of(output)
    if certificate["surrogate"] is not None or certificate["method"] in PROPOSED:
        yield "the surrogate's gap is what it says", lambda: surrogate.check(output)


def _model_checks(output: Output, model: Path, hessians: Path | None) -> Iterator[Check]:
    sources: list[Source] = []

    def open_source() -> str:
        sources.append(read_source(model))
        return check_source(output, sources[0])

    yield "the model is the one that was compressed", open_source
    yield "other tensors are the model's own", lambda: check_rest(output, sources[0])
    if plan_claims.curvature_of(output) == "none":
        statistics = [Statistics("none", {}, lambda layer, *_: identity(output.layers[layer]))]
    elif hessians is None:
        return
    else:
        statistics = []

        def open_statistics() -> str:
            statistics.append(read_statistics(hessians, plan_claims.curvature_of(output)))
            return check_statistics(output, sources[0], statistics[0])

        yield "the statistics are those of this model", open_statistics
    yield (
        "every layer has the weighted error that it claims",
        lambda: check_losses(output, sources[0], statistics[0]),
    )
    if output.certificate is not None:
        yield (
            "every layer's low-rank program has the gap that it claims",
            lambda: check_programs(output, sources[0], statistics[0]),
        )


def _decodes(output: Output) -> str:
    return f"{sum(decode(layer).size for layer in output.layers.values())} weights"
