"""Plain weights from a compressed directory, for programs that know nothing of us."""

from __future__ import annotations

from pathlib import Path

from convex_caldera.storage.export import export_dense
from convex_caldera.storage.read import open_container


def export_directory(directory: Path, out: Path, dtype: str = "bfloat16") -> str:
    """Write decoded weights as an ordinary Hugging Face directory; see `storage.export`.

    Returns:
        What a plain directory cannot say and the original did; empty if nothing.
    """
    export_dense(directory, out, dtype)
    activations = open_container(directory, verify=False).activations
    if activations is None:
        return ""
    return f"note: activations were rounded to {activations}; plain weights do not do that"
