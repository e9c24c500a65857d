"""Figures of the papers, as printed there, to stand beside ours in columns of their own.

WikiText-2 perplexity per token of Llama-2-7B. Every figure has the context length of its windows
and says whether weights were fine-tuned afterwards: neither may be mixed. `bits` is what the paper
calls average bits. Sources:

    QuIP#     Tseng et al., arXiv 2402.04396
    CALDERA   Saha et al., arXiv 2405.18886 (others report 6.90 and 6.47 for ranks 128 and 256)
    QTIP      Tseng et al., arXiv 2406.11235
    LQER      Zhang et al., arXiv 2402.02446, the authors' workbook (GPTQ as they ran it)

CALDERA's fine-tuned figures are left out: they are of a model tuned on WikiText-2 itself, in short
blocks. The perplexities published with the first Convex-CALDERA scripts are left
out too: they are per word, and 8 of the model's 224 matrices were compressed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One printed figure."""

    method: str
    budget: float
    bits: str
    perplexity: float
    context: int
    fine_tuned: bool
    source: str


# (context, fine-tuned): the columns, in order.
COLUMNS = ((4096, False), (4096, True), (2048, False), (2048, True))
FIGURES = (
    Published("original", 0.0, "16 b", 5.12, 4096, False, "QuIP#"),
    Published("original", 0.0, "16 b", 5.47, 2048, False, "QuIP#"),
    Published("quip-sharp", 2.2, "2 b", 8.22, 4096, False, "QuIP#"),
    Published("quip-sharp", 2.2, "2 b", 6.19, 4096, True, "QuIP#"),
    Published("quip-sharp", 2.2, "2 b", 6.66, 2048, True, "QuIP#"),
    Published("quip-sharp", 3.2, "3 b", 5.60, 4096, False, "QuIP#"),
    Published("quip-sharp", 3.2, "3 b", 5.41, 4096, True, "QuIP#"),
    Published("quip-sharp", 3.2, "3 b", 5.79, 2048, True, "QuIP#"),
    Published("quip-sharp", 4.2, "4 b", 5.22, 4096, False, "QuIP#"),
    Published("quip-sharp", 4.2, "4 b", 5.19, 4096, True, "QuIP#"),
    Published("quip-sharp", 4.2, "4 b", 5.56, 2048, True, "QuIP#"),
    Published("caldera", 2.2, "2.2 b, rank 128", 6.76, 4096, False, "CALDERA"),
    Published("qtip", 2.2, "2 b", 6.82, 4096, False, "QTIP"),
    Published("gptq", 4.2, "4 b, groups of 128", 5.69, 2048, False, "LQER"),
    Published("l2qer", 4.2, "4 b, groups of 128", 5.85, 2048, False, "LQER"),
)


def cell(method: str, budget: float, context: int, fine_tuned: bool) -> str:
    """The printed figure with its bits and source, or a dash."""
    wanted = 0.0 if method == "original" else budget
    for figure in FIGURES:
        if (figure.method, figure.budget) == (method, wanted) and (
            figure.context,
            figure.fine_tuned,
        ) == (context, fine_tuned):
            return f"{figure.perplexity:.2f} ({figure.bits}; {figure.source})"
    return "-"
