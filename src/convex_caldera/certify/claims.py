"""A claim, whether it was found to hold, and the figure behind it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """One statement about a directory; `value` is the recomputed figure or what is wrong."""

    name: str
    holds: bool
    value: str


@dataclass(frozen=True)
class Verification:
    """All claims up to the first false one, in the order in which they were checked."""

    claims: tuple[Claim, ...]

    @property
    def ok(self) -> bool:
        """Every claim holds, and there is at least one."""
        return bool(self.claims) and all(claim.holds for claim in self.claims)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "claims": [asdict(claim) for claim in self.claims]}

    def text(self) -> str:
        """One line per claim, and the verdict."""
        lines = [f"{'ok  ' if c.holds else 'FAIL'} {c.name}: {c.value}" for c in self.claims]
        return "\n".join([*lines, "verified" if self.ok else "NOT verified"])
