"""Plain weights from a compressed directory, for programs that know nothing of us."""

from __future__ import annotations

from pathlib import Path

from convex_caldera.storage.export import export_dense


def export_directory(directory: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Write decoded weights as an ordinary Hugging Face directory; see `storage.export`."""
    export_dense(directory, out, dtype)
