"""Running compressed models: the torch module, its kernels, and the two ways to load.

Nothing is imported before it is used, so that `runtime.hook` costs nothing at start-up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convex_caldera.runtime.linear import CompressedLinear as CompressedLinear
    from convex_caldera.runtime.load import load as load

_HOME = {
    "CompressedLinear": "convex_caldera.runtime.linear",
    "load": "convex_caldera.runtime.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    # the function `load` replaces the module of the same name, which importing has just bound
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
