"""Make `import convex_caldera` enough for transformers, without importing transformers.

transformers finds quantization methods in a table of its module `transformers.quantizers.auto`
and has no entry points. If that module is loaded already, ours is added at once; if not, a finder
on `sys.meta_path` waits for it, adds ours when it has been loaded, and removes itself. Standard
library only; costs microseconds at start-up.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    # not imported otherwise: importlib.abc would double the cost of this module
    from importlib.abc import Loader

AWAITED = "transformers.quantizers.auto"


def install() -> None:
    """Register with transformers now or as soon as it is imported; safe to call repeatedly."""
    if AWAITED in sys.modules and not _is_loading(sys.modules[AWAITED]):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    # importing it registers; if it is what imports transformers right now, it does so by itself
    import convex_caldera.runtime.hf  # noqa: F401


def _is_loading(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


class _Finder:
    """Finds one module, through all other finders, and hands it to `_Loader`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)  # so that the search below does not end here again
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """Loads as the original loader does, then registers."""

    def __init__(self, original: Loader):
        self._original = original

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._original
        if module.__spec__ is not None:
            module.__spec__.loader = self._original
        self._original.exec_module(module)
        _register()
