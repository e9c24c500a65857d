"""Names of layers chosen by patterns, as `--ignore` and `--pin` take them.

q_proj, layers.0, mlp.down_proj     whole dotted parts, anywhere in the name
model.layers.[0-3].*                a glob over the whole name, if it has *, ? or [
re:layers\\.(0|1)\\.                  a regular expression, found anywhere
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from convex_caldera.errors import RecipeError


def match(patterns: Iterable[str], name: str) -> bool:
    """Whether any pattern fits the name.

    Raises:
        RecipeError: a pattern is empty or not a valid regular expression.
    """
    return any(_fits(pattern, name) for pattern in patterns)


def select(patterns: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The names that any pattern fits, in their order.

    Raises:
        RecipeError: a pattern fits no name at all, which is nearly always a slip.
    """
    patterns, names = tuple(patterns), tuple(names)
    for pattern in patterns:
        if not any(_fits(pattern, name) for name in names):
            raise RecipeError(
                f"pattern {pattern!r} fits none of {len(names)} layers, such as "
                f"{names[0] if names else '(none)'}; give dotted parts, a glob or re:..."
            )
    return tuple(name for name in names if match(patterns, name))


def _fits(pattern: str, name: str) -> bool:
    if not pattern or pattern == "re:":
        raise RecipeError("a layer pattern must not be empty")
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise RecipeError(f"{pattern!r} is not a regular expression: {error}") from error
    if any(mark in pattern for mark in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern.strip('.')}." in f".{name}."
