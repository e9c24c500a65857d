"""Running compressed models: the torch module, its kernels, and the two ways to load.

Nothing is imported before it is used, so that `runtime.hook` costs nothing at start-up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convex_caldera.runtime.linear import CompressedLinear as CompressedLinear


def __getattr__(name: str) -> Any:
    if name != "CompressedLinear":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from convex_caldera.runtime.linear import CompressedLinear

    globals()[name] = CompressedLinear
    return CompressedLinear
