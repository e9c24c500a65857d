"""certificate.json: its form checked here, its claims by `convex-caldera verify` and nobody else.

The words say what the certificate proves, what it does not, and what its numbers mean.
"""

from __future__ import annotations

from typing import Any

from convex_caldera.allocate.curves import Curves, curves_from_dict
from convex_caldera.allocate.plan import frontier
from convex_caldera.errors import DataError, FormatError, RecipeError
from convex_caldera.report.checked import Table
from convex_caldera.report.run import Certificate, FrontierPoint

SCHEMA = 1
UNITS = {  # short names of units, spelled out
    "nats": "predicted nats of KL per token",
    "relative": "sum over layers of relative weighted squared error",
}


def certificate_from(table: Table) -> Certificate:
    """The certificate of a directory.

    Raises:
        FormatError: another schema, missing or mistyped entries, or curves that are none.
    """
    if table.count("schema") != SCHEMA:
        raise table.wrong("schema", str(SCHEMA))
    plan = table.table("plan")
    curves = _curves(table)
    unit = table.text("unit", "")
    surrogate = table.table_or_none("surrogate")
    return Certificate(
        statement=_statement(table),
        unit=UNITS.get(unit, unit),
        curvature=table.text("curvature", ""),
        groups=len(curves.groups),
        options=sum(len(group.options) for group in curves.groups),
        ties=len(curves.ties),
        weights=curves.weights,
        budget_bits=plan.number("budget_bits"),
        budget_bytes=table.count_or_none("budget_bytes"),
        compressed_bytes=table.count_or_none("compressed_bytes"),
        header_bytes=table.count_or_none("header_bytes"),
        bits=plan.number("bits"),
        distortion=plan.number("distortion"),
        price=plan.number("price"),
        bound=plan.number("bound"),
        plan_gap=plan.number_or_none("plan_gap"),
        proof=plan.text("proof", ""),
        milp_status=plan.text("milp_status", ""),
        surrogate=None if surrogate is None else _plain_entries(surrogate),
        losses=_losses(curves, plan.table("choice")),
        stored_losses=_stored_losses(table.table("layers"), unit),
        frontier=_frontier(curves),
    )


def _curves(table: Table) -> Curves:
    try:
        return curves_from_dict(dict(table.table("curves").record))
    except (DataError, RecipeError) as error:
        raise FormatError(f"{table.where}: curves: {error}") from error


def _losses(curves: Curves, choice: Table) -> dict[str, float]:
    """Group -> loss of the option that the plan chose for it."""
    losses = {}
    for group in curves.groups:
        label = choice.text(group.name)
        try:
            losses[group.name] = group.option(label).distortion
        except RecipeError as error:
            raise FormatError(f"{choice.where}: {error}") from error
    return losses


def _stored_losses(layers: Table, unit: str) -> dict[str, float]:
    """Layer -> what it costs alone as it is stored, which drift correction changes."""
    key = "loss" if unit == "nats" else "relative_loss"
    found = {}
    for name in layers.record:
        layer = layers.table(name)
        found[name] = layer.number(key) * layer.number("held_out_scale")
    return found


def _plain_entries(table: Table) -> dict[str, Any]:
    """Numbers and words; lists and tables (the groups of the program) are for machines."""
    return {k: v for k, v in table.record.items() if isinstance(v, int | float | str)}


def _frontier(curves: Curves) -> tuple[FrontierPoint, ...]:
    points = frontier(curves).points()
    return tuple(FrontierPoint(p["bits"], p["distortion"], p["price"]) for p in points)


def _statement(table: Table) -> tuple[str, ...]:
    value = table.record.get("statement")
    lines = [value] if isinstance(value, str) else value
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise table.wrong("statement", "a string or a list of strings")
    return tuple(lines)
