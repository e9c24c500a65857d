"""Text that every CPython carries, split by module: the bundled model's world.

Three kinds of document, read from the running interpreter and from nothing else:

    library sources      every pure-Python module of the standard library
    docstrings           the built-in C modules and their public members
    reference topics     the language reference shipped as ``pydoc_data.topics``

A document's split depends on a hash of its name alone, so a module that is test text on one
machine is test text on every machine; a newer Python has newer text under the same rule.
Left out: tests, IDLE, 2to3 and character-map tables, which not every distribution ships or
which are not text.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "calibration", "validation", "test"]

# Cumulative shares of the hash range: 82 % train, 6 % each of the others.
_SHARES: tuple[tuple[Split, float], ...] = (
    ("train", 0.82),
    ("calibration", 0.88),
    ("validation", 0.94),
    ("test", 1.0),
)
_LEFT_OUT = {
    "test",
    "idlelib",
    "lib2to3",
    "distutils",
    "ensurepip",
    "turtledemo",
    "encodings",
    "pydoc_data",
    "site-packages",
    "__pycache__",
}


def split_of(name: str) -> Split:
    """The split of a document, from the SHA-256 of its name."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2.0**64
    return next(split for split, upper in _SHARES if position < upper)


def documents(wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, str]]:
    """(name, text) pairs of wanted names in a fixed order: sources, docstrings, topics."""
    yield from _sources(wanted)
    yield from _docstrings(wanted)
    yield from _topics(wanted)


def text(split: Split) -> str:
    """One split as one string, documents in name order, a blank line between them."""
    chosen = sorted(documents(lambda name: split_of(name) == split))
    return "\n\n".join(body for _, body in chosen)


def _sources(wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT.isdisjoint(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            name = ".".join(parts)
            if not any(part in ("tests", "test") for part in parts) and wanted(name):
                body = path.read_text(encoding="utf-8", errors="replace")
                if body.strip():
                    yield name, body


def _docstrings(wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    for name in sorted(n for n in sys.builtin_module_names if wanted(f"doc:{n}")):
        module = importlib.import_module(name)
        entries = [f"{name}\n\n{module.__doc__ or ''}"]
        for member in sorted(vars(module)):
            value = getattr(module, member)
            doc = getattr(value, "__doc__", None)
            inherited = doc == type(value).__doc__
            if not member.startswith("_") and isinstance(doc, str) and not inherited:
                entries.append(f"{name}.{member}\n{doc}")
        yield f"doc:{name}", "\n\n".join(entries)


def _topics(wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(n for n in topics if wanted(f"topic:{n}")):
        yield f"topic:{name}", topics[name]
