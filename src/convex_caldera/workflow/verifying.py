"""Check a compressed directory claim by claim, without the original model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from convex_caldera.errors import ConvexCalderaError, FormatError
from convex_caldera.recipes.records import canonical_json, from_record
from convex_caldera.storage.codec import recipe_layout
from convex_caldera.storage.read import Container, open_container


@dataclass(frozen=True)
class Claim:
    """One statement about the directory, whether it holds, and the figure behind it."""

    name: str
    holds: bool
    value: str


@dataclass(frozen=True)
class Verification:
    """All claims up to the first false one."""

    claims: tuple[Claim, ...]

    @property
    def ok(self) -> bool:
        return all(claim.holds for claim in self.claims)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "claims": [asdict(claim) for claim in self.claims]}

    def text(self) -> str:
        lines = [f"{'ok  ' if c.holds else 'FAIL'} {c.name}: {c.value}" for c in self.claims]
        return "\n".join([*lines, "verified" if self.ok else "NOT verified"])


def verify_directory(directory: Path) -> Verification:
    """Hashes, structure, exact bytes, recipes and finite decoding; stops at the first false claim.

    Raises nothing for a damaged directory: the damage is the false claim.
    """
    claims: list[Claim] = []
    container: Container | None = None
    try:
        container = open_container(directory)
    except ConvexCalderaError as error:
        return Verification((Claim("files match their manifest and format", False, str(error)),))
    files = f"{len(container.layers)} layers, {len(container.rest)} other tensors"
    claims.append(Claim("files match their manifest and format", True, files))
    checks: tuple[tuple[str, Callable[[Container], str]], ...] = (
        ("stored bytes are within the budget", _budget),
        ("every layer is stored as its recipe says", _recipes),
        ("every layer decodes to finite weights", _decodes),
    )
    for name, check in checks:
        try:
            claims.append(Claim(name, True, check(container)))
        except (ConvexCalderaError, KeyError, TypeError) as error:
            claims.append(Claim(name, False, f"{type(error).__name__}: {error}"))
            break
    return Verification(tuple(claims))


def _budget(container: Container) -> str:
    sizes, budget = container.sizes(), container.report()["budget_bytes"]
    if budget is None:
        return f"{sizes.compressed_bytes} bytes, no budget was given"
    if sizes.compressed_bytes > budget:
        raise FormatError(f"{sizes.compressed_bytes} bytes exceed the budget of {budget}")
    return f"{sizes.compressed_bytes} of {budget} bytes"


def _recipes(container: Container) -> str:
    records = container.report()["layers"]
    if set(records) != set(container.layers):
        raise FormatError("the report speaks of other layers than the files hold")
    for name, (_, spec) in container.layers.items():
        expected, _ = recipe_layout(from_record(records[name]["recipe"]), tuple(spec["shape"]))
        if canonical_json(_kinds(expected)) != canonical_json(_kinds(spec)):
            raise FormatError(f"{name} is not stored as its recipe says")
        rank = sum(t["rank"] for t in spec["terms"] if t["kind"] == "low_rank")
        if rank != records[name]["rank"]:
            raise FormatError(f"{name}: rank {rank} is stored, {records[name]['rank']} is claimed")
    return f"{len(records)} recipes"


def _kinds(spec: dict[str, Any]) -> list[Any]:
    """The terms of a spec in an order that does not matter to their sum."""
    return [spec["shape"], spec["transforms"], sorted(spec["terms"], key=canonical_json)]


def _decodes(container: Container) -> str:
    weights = 0
    for name in container.layers:
        W_hat = container.layer(name).decode()
        if not torch.isfinite(W_hat).all():
            raise FormatError(f"{name} decodes to NaN or infinite weights")
        weights += W_hat.numel()
    return f"{weights} weights"
