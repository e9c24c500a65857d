"""certificate.json: its form checked here, its claims by `convex-caldera verify` and nobody else.

The words say what the certificate proves, what it does not, and what its numbers mean.
"""

from __future__ import annotations

from convex_caldera.allocate.curves import Curves, curves_from_dict
from convex_caldera.allocate.plan import frontier
from convex_caldera.errors import DataError, FormatError, RecipeError
from convex_caldera.report.checked import Table
from convex_caldera.report.run import Certificate, FrontierPoint

SCHEMA = 1


def certificate_from(table: Table) -> Certificate:
    """The certificate of a directory.

    Raises:
        FormatError: another schema, missing or mistyped entries, or curves that are none.
    """
    if table.count("schema") != SCHEMA:
        raise table.wrong("schema", str(SCHEMA))
    plan = table.table("plan")
    curves = _curves(table)
    surrogate = table.table_or_none("surrogate")
    return Certificate(
        statement=_statement(table),
        unit=table.text("unit", ""),
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
        surrogate=None if surrogate is None else dict(surrogate.record),
        frontier=_frontier(curves),
    )


def _curves(table: Table) -> Curves:
    try:
        return curves_from_dict(dict(table.table("curves").record))
    except (DataError, RecipeError) as error:
        raise FormatError(f"{table.where}: curves: {error}") from error


def _frontier(curves: Curves) -> tuple[FrontierPoint, ...]:
    points = frontier(curves).points()
    return tuple(FrontierPoint(p["bits"], p["distortion"], p["price"]) for p in points)


def _statement(table: Table) -> tuple[str, ...]:
    value = table.record.get("statement")
    lines = [value] if isinstance(value, str) else value
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise table.wrong("statement", "a string or a list of strings")
    return tuple(lines)
