"""Staged configurations and sweeps that come with the package, by name."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from convex_caldera.errors import RecipeError


def names(prefix: str = "") -> list[str]:
    """Names of the shipped files, without their ending."""
    files = resources.files(__package__).iterdir()
    found = [file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")]
    return sorted(name for name in found if name.startswith(prefix))


def find(name: str, beside: Path | None = None) -> Path:
    """The file of that path, relative to `beside` too, or the shipped one of that name.

    Raises:
        RecipeError: there is neither.
    """
    for path in (Path(name), *([] if beside is None else [beside / name])):
        if path.is_file():
            return path
    if name in names():
        return Path(str(resources.files(__package__) / f"{name}.toml"))
    raise RecipeError(f"there is no file {name}, and the shipped ones are {', '.join(names())}")
