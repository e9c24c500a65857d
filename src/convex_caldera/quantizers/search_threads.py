"""How many threads a search may use, a property of the thread that asks for it.

Layers fitted side by side share the cores between them. Searches give the same codes on any
number of threads, so that a layer fitted alone may use all of them; arithmetic whose sums depend
on it keeps to one.
"""

from __future__ import annotations

import threading

import torch

_local = threading.local()


def search_threads() -> int:
    """What was said last in this thread, else as many as torch uses."""
    found: int = getattr(_local, "count", 0)
    return found or torch.get_num_threads()


def use_search_threads(count: int) -> None:
    """So many (at least one) for searches that this thread asks for."""
    _local.count = max(count, 1)
