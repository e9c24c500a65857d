"""Tests of optional parts: skipped, saying so, where a package is absent; not imported to look."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs(module: str) -> pytest.MarkDecorator:
    """Skip unless `module` is installed; finding it costs nothing, importing some takes seconds."""
    absent = find_spec(module) is None
    return pytest.mark.skipif(absent, reason=f"{module} is not installed (an optional extra)")
