"""Lossless coding: integer codes to bytes and back, nothing lost and nothing padded inside.

`TABLE` finds the entropy coders by kind. A coder turns the fixed-width stream of packed codes
into a shorter one and back; which one was used is written with the codes.
"""

from __future__ import annotations

from convex_caldera.coding.huffman import Huffman
from convex_caldera.coding.rans import Rans
from convex_caldera.core.protocols import Coder

TABLE: dict[str, type[Coder]] = {"huffman": Huffman, "rans": Rans}

__all__ = ["TABLE", "Huffman", "Rans"]
