"""What a staged configuration says twice must be said alike; an error names both keys.

As LQER's files do: the rank of the approximator and of l_config, the format that the error is
taken of and the one that is stored, both factors, both operands of attention.
"""

from __future__ import annotations

from typing import Any, NoReturn

from convex_caldera.errors import RecipeError
from convex_caldera.recipes.formats import parse_format
from convex_caldera.workflow.stage_schema import Approximator, QuantizerTable, StagedConfig


def approximators(config: StagedConfig) -> list[tuple[str, Approximator]]:
    """Every distinct approximator with the place where it is written."""
    inline = [
        (f"approximate.approximator.{pattern!r}", entry)
        for pattern, entry in (config.approximate.approximator or {}).items()
        if isinstance(entry, Approximator)
    ]
    return [("approximate.default", config.approximate.default), *inline]


def check_agreement(config: StagedConfig) -> None:
    """What is said twice must be said alike."""
    default, linear = config.approximate.default, config.q_config.linear
    place = "approximate.default"
    low_rank = config.l_config.linear
    if low_rank is not None and low_rank.rank != default.rank and not config.evaluate.disable_lqer:
        disagree(f"{place}.rank", default.rank, "l_config.linear.rank", low_rank.rank)
    if linear is not None and linear.w_quantizer is not None:
        _same_table(
            f"{place}.W_quantizer",
            default.W_quantizer,
            "q_config.linear.w_quantizer",
            linear.w_quantizer,
        )
    if linear is not None and linear.A_out_quantizer is not None:
        if linear.x_quantizer is None:
            raise RecipeError("q_config.linear.A_out_quantizer needs q_config.linear.x_quantizer")
        _same_table(
            "q_config.linear.A_out_quantizer",
            linear.A_out_quantizer,
            "q_config.linear.x_quantizer",
            linear.x_quantizer,
        )
    for name, entry in approximators(config):
        _check_factors(name, entry)
    _check_attention(config)
    if config.approximate.chunk_idx is not None and config.approximate.chunk_size is None:
        raise RecipeError("approximate.chunk_idx needs approximate.chunk_size")
    if config.enable_harness_downstream_evaluation and config.evaluate.harness_downstream is None:
        raise RecipeError(
            "enable_harness_downstream_evaluation is true without evaluate.harness_downstream"
        )


def _check_factors(name: str, entry: Approximator) -> None:
    """Both factors have one format."""
    left, right = entry.B_quantizer, entry.A_quantizer
    if (left is None) != (right is None):
        raise RecipeError(f"{name}.A_quantizer and {name}.B_quantizer go together")
    if left is not None and right is not None:
        names = (f"{name}.A_quantizer", f"{name}.B_quantizer")
        _same_format(names[0], right, names[1], left)


def _check_attention(config: StagedConfig) -> None:
    q_config = config.q_config
    if q_config.matmul is not None and q_config.bmm is not None and q_config.matmul != q_config.bmm:
        raise RecipeError("q_config.matmul and q_config.bmm differ; one of them is enough")
    name = "q_config.matmul" if q_config.matmul is not None else "q_config.bmm"
    products = q_config.matmul or q_config.bmm
    if products is not None:
        _same_format(
            f"{name}.x_quantizer",
            products.x_quantizer,
            f"{name}.w_quantizer",
            products.w_quantizer,
        )


def _same_table(one: str, first: QuantizerTable, other: str, second: QuantizerTable) -> None:
    """Every field alike; blocks by what they mean."""
    for key in ("name", "width", "exponent_width", "exponent_bias"):
        a, b = getattr(first, key), getattr(second, key)
        if a != b:
            disagree(f"{one}.{key}", a, f"{other}.{key}", b)
    a, b = group_of(first, one), group_of(second, other)
    if a != b:
        disagree(f"{one}.block_size", first.block_size, f"{other}.block_size", second.block_size)


def _same_format(one: str, first: QuantizerTable, other: str, second: QuantizerTable) -> None:
    if format_text(first, one) != format_text(second, other):
        for key in ("name", "width", "exponent_width", "block_size"):
            a, b = getattr(first, key), getattr(second, key)
            if a != b:
                disagree(f"{one}.{key}", a, f"{other}.{key}", b)


def disagree(one: str, first: Any, other: str, second: Any) -> NoReturn:
    raise RecipeError(f"{one} = {first} but {other} = {second}; they must agree")


# --- formats --------------------------------------------------------------------------------


def group_of(table: QuantizerTable, where: str) -> int | None:
    """Weights that share a scale: block_size 16, [1, 16] or [16, 1]; [1, -1] is a row, -1 all.

    Raises:
        RecipeError: a block of several rows and columns.
    """
    size = table.block_size
    if size is None or isinstance(size, int):
        return size
    if len(size) == 1:
        return 0 if size[0] == -1 else size[0]
    wide = [side for side in size if side != 1]
    if len(size) == 2 and size == [-1, -1]:
        return -1
    if len(size) != 2 or len(wide) > 1:
        raise RecipeError(f"{where}.block_size = {size}: a block lies along one axis, as [1, 16]")
    return (0 if wide[0] == -1 else wide[0]) if wide else 1


def format_text(table: QuantizerTable | None, where: str) -> str | None:
    """The name of the format (`recipes.formats`), None where values pass through.

    Raises:
        RecipeError: keys that the format does not have, or values that it refuses.
    """
    if table is None or table.name == "passthrough":
        return None
    if table.width is None:
        raise RecipeError(f"{where}.width is missing")
    if table.exponent_bias is not None:
        raise RecipeError(
            f"{where}.exponent_bias = {table.exponent_bias}: biases are fitted here; leave it out"
        )
    group = group_of(table, where)
    block = "" if group is None else f"/{group}"
    if group is not None and group < 0:
        raise RecipeError(f"{where}.block_size = {table.block_size}: one block for all is refused")
    exponent = table.exponent_width
    if table.name == "minifloat":
        if exponent is None:
            raise RecipeError(f"{where}.exponent_width is missing")
        return _checked(f"e{exponent}m{table.width - 1 - exponent}{block}", where)
    if table.name in ("mxint", "block_fp"):
        short = "" if exponent in (None, 8) else f"e{exponent}"
        legacy = "-legacy" if table.name == "block_fp" else ""
        return _checked(f"mxint{table.width}{short}{legacy}{block}", where)
    if exponent is not None:
        raise RecipeError(f"{where}.exponent_width: {table.name} has no exponent")
    family = "nf" if table.name == "normalfloat" else table.name
    return _checked(f"{family}{table.width}{block}", where)


def _checked(text: str, where: str) -> str:
    try:
        parse_format(text)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    return text
