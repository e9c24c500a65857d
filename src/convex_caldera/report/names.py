"""Where a layer stands: its block and which matrix of the block it is, from its name.

model.layers.12.mlp.down_proj           -> block 12, "mlp.down_proj"
transformer.h.3.attn.c_attn             -> block 3,  "attn.c_attn"
model.layers.4.mlp.experts.17.up_proj   -> block 4,  "mlp.experts.*.up_proj"
lm_head                                 -> no block, "lm_head"
vision_tower.encoder.layers.3.mlp.fc1   -> block 3,  "tower.mlp.fc1"

Blocks of a vision tower are counted like those of the language model beside it; the kind tells them
apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# How the modules of vision towers are called.
TOWERS = frozenset({"vision_tower", "vision_model", "visual"})


@dataclass(frozen=True, order=True)
class Place:
    """A block number (None outside the blocks) and the kind of matrix."""

    block: int | None
    kind: str


def place_of(name: str) -> Place:
    """The first number is the block, later ones (experts) become `*`."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isascii() and part.isdigit()]
    if not numbers or numbers[0] == len(parts) - 1:
        return Place(None, name)
    first = numbers[0]
    tower = ["tower"] if any(part in TOWERS for part in parts[:first]) else []
    rest = ["*" if part.isascii() and part.isdigit() else part for part in parts[first + 1 :]]
    return Place(int(parts[first][:9]), ".".join(tower + rest))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which layer 10 comes after layer 9."""
    pieces = re.split(r"([0-9]+)", name)
    return [(1, int(p[:18]), "") if p.isascii() and p.isdigit() else (0, 0, p) for p in pieces]


def short_kinds(kinds: Iterable[str]) -> dict[str, str]:
    """The shortest unambiguous ends of the kinds: "self_attn.q_proj" -> "q_proj"."""
    kinds = list(kinds)
    short = {}
    for kind in kinds:
        parts = kind.split(".")
        for length in range(1, len(parts) + 1):
            end = parts[-length:]
            if sum(other.split(".")[-length:] == end for other in kinds) == 1:
                break
        short[kind] = ".".join(end)
    return short
