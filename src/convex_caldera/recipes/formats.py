"""Names of number formats: a family, a width, and a block that shares a scale.

    mxint4   mxint4/16   mxint4e4/16   mxint4-legacy/16   integers under a shared exponent
    int4/128                                              affine integers, a zero point per group
    sint4/128                                             symmetric integers
    nf4/64                                                NormalFloat
    e2m1/32   e4m3/32                                     minifloats
    float16                                               factors only: kept as they are

Without a width ("mxint") the family is meant, and a ladder chooses the width. `e4` after the
width of an mxint says how many bits an exponent has; 8 unless given. A block of 0 is a whole row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from convex_caldera.core.protocols import Quantizer
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.minifloat import Minifloat
from convex_caldera.quantizers.mxint import EXPONENT_BITS, ExponentRule, MXInt
from convex_caldera.quantizers.normal_float import NormalFloat
from convex_caldera.quantizers.uniform import Uniform

Family = Literal["mxint", "int", "sint", "nf", "fp"]
DENSE = "float16"
# Block and widths of a family where none are given.
BLOCKS: dict[Family, int] = {"mxint": 32, "int": 128, "sint": 128, "nf": 64, "fp": 32}
WIDTHS: dict[Family, tuple[int, ...]] = {
    "mxint": (2, 3, 4, 5, 6, 7, 8),
    "int": (2, 3, 4, 5, 6, 7, 8),
    "sint": (2, 3, 4, 5, 6, 7, 8),
    "nf": (2, 3, 4),
    "fp": (4,),
}
_INTEGER = re.compile(r"(mxint|sint|int|nf)(\d*)(?:e(\d))?(-legacy)?(?:/(\d+))?")
_FLOAT = re.compile(r"e(\d)m(\d)(?:/(\d+))?")


@dataclass(frozen=True)
class NumberFormat:
    """A parsed name; `bits` and `group_size` are None where the name leaves them open.

    `exponent_bits` are those of a shared exponent for mxint, of the number itself for fp.
    """

    family: Family
    bits: int | None = None
    group_size: int | None = None
    exponent_bits: int = EXPONENT_BITS
    exponent_rule: ExponentRule = "ocp"

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths on offer: the one given, or those of the family."""
        return WIDTHS[self.family] if self.bits is None else (self.bits,)

    def quantizer(
        self, bits: int | None = None, group_size: int | None = None, *, search: bool = True
    ) -> Quantizer:
        """The quantizer; arguments fill in or replace what the name says.

        `search` is for integers with real scales: least squared error instead of covering.

        Raises:
            RecipeError: no width is known, or the quantizer refuses the values.
        """
        width = self.bits if bits is None else bits
        if width is None:
            raise RecipeError(f"{self.family} needs a width, such as {self.family}4")
        block = group_size if group_size is not None else self.group_size
        group = BLOCKS[self.family] if block is None else block
        match self.family:
            case "mxint":
                return MXInt(width, group, self.exponent_bits, self.exponent_rule)
            case "nf":
                return NormalFloat(width, group)
            case "fp":
                return Minifloat(width, self.exponent_bits, group)
            case _:
                return Uniform(width, group, symmetric=self.family == "sint", search=search)


def parse_format(text: str) -> NumberFormat:
    """A NumberFormat from its name.

    Raises:
        RecipeError: not a format; the message shows some.
    """
    if (match := _FLOAT.fullmatch(text)) is not None:
        exponent, mantissa = int(match[1]), int(match[2])
        return NumberFormat("fp", 1 + exponent + mantissa, _integer(match[3]), exponent)
    match = _INTEGER.fullmatch(text)
    if match is None or ((match[3] or match[4]) and match[1] != "mxint"):
        raise RecipeError(
            f"format {text!r} is not known; such as mxint4/16, mxint4e4/16, int4/128, sint8/64, "
            "nf4/64, e2m1/32"
        )
    family: Family = next(f for f in get_args(Family) if f == match[1])
    rule: ExponentRule = "legacy" if match[4] else "ocp"
    exponent_bits = int(match[3]) if match[3] else EXPONENT_BITS
    parsed = NumberFormat(family, _integer(match[2]), _integer(match[5]), exponent_bits, rule)
    if parsed.bits is not None:
        parsed.quantizer()  # refuses widths that the family does not have
    return parsed


def factor_quantizer(text: str) -> Quantizer | None:
    """The quantizer of low-rank factors by name; None for float16.

    Raises:
        RecipeError: not a format, or one without a width.
    """
    return None if text == DENSE else parse_format(text).quantizer()


def format_name(quantizer: Quantizer) -> str:
    """The name that `parse_format` reads as this quantizer, or its kind and bits otherwise."""
    match quantizer:
        case MXInt():
            short = (
                "" if quantizer.exponent_bits == EXPONENT_BITS else f"e{quantizer.exponent_bits}"
            )
            legacy = "-legacy" if quantizer.exponent_rule == "legacy" else ""
            return f"mxint{quantizer.bits}{short}{legacy}/{quantizer.group_size}"
        case Uniform():
            family = "sint" if quantizer.symmetric else "int"
            return f"{family}{quantizer.bits}/{quantizer.group_size}"
        case NormalFloat():
            return f"nf{quantizer.bits}/{quantizer.group_size}"
        case Minifloat():
            mantissa = quantizer.bits - 1 - quantizer.exponent_bits
            return f"e{quantizer.exponent_bits}m{mantissa}/{quantizer.group_size}"
        case _:
            return f"{quantizer.kind}{getattr(quantizer, 'bits', '')}"


def _integer(text: str | None) -> int | None:
    return int(text) if text else None
