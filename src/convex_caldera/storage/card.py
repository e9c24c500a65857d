"""The README.md of an output directory: what it is, how to load it, what it costs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from convex_caldera.storage.read import Sizes


@dataclass(frozen=True)
class CardFacts:
    """What the card says beyond the sizes.

    Args:
        base_model: hub id or plain name of the original; a path must not be given here.
        method: name of the method.
        command: the exact command or call that made this directory, without private paths.
        calibration: one sentence on the calibration text.
        license: identifier inherited from the original, if known.
        results: rows of (measure, original, compressed), already formatted.
        certificate: one sentence, if there is a certificate.
        kept: what is said of all tensors that are not compressed.
        activations: what the forward pass rounds activations to, if it does.
    """

    base_model: str
    method: str
    command: str = ""
    calibration: str = ""
    license: str | None = None
    results: tuple[tuple[str, str, str], ...] = ()
    certificate: str = ""
    kept: str = "embeddings,\nnorms and biases are those of the original, byte for byte."
    activations: str = ""


def model_card(facts: CardFacts, sizes: Sizes) -> str:
    """Markdown with YAML front matter; the same facts give the same bytes."""
    front = ["---", "library_name: transformers", f"base_model: {_yaml(facts.base_model)}"]
    front += ["base_model_relation: quantized", "pipeline_tag: text-generation"]
    if facts.license:
        front.append(f"license: {_yaml(facts.license)}")
    front += ["tags:", "- convex-caldera", "- compressed", "---", ""]
    body = [
        f"# {facts.base_model}, compressed with Convex-CALDERA",
        "",
        f"Method `{facts.method}`. Every compressed weight is `T^-1(codes + L R)`; {facts.kept}",
        "",
        "## Load",
        "",
        "```python",
        "import convex_caldera  # must come before from_pretrained",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this/directory")',
        "```",
        "",
        "or `convex_caldera.load(directory)`. Without the import transformers would initialise the",
        "layers at random with no more than a warning, so check first:",
        "`convex-caldera verify DIRECTORY`.",
        "",
        "## Size",
        "",
        "| | |",
        "|---|---|",
        f"| weight files | {sizes.file_bytes:,} bytes |",
        f"| bits per compressed weight | {sizes.bits_per_compressed_weight:.4f} |",
        f"| bits per weight, all weights | {sizes.bits_per_weight:.4f} |",
        f"| compressed weights | {sizes.compressed_weights:,} of {sizes.all_weights:,} |",
        "",
        "Bits are bytes on disk * 8 / weights, everything counted.",
        "",
    ]
    return "\n".join(front + body + _sections(facts))


def inherited_license(readme: str) -> str | None:
    """The `license:` of a model card's front matter, if it has one."""
    front = re.match(r"---\n(.*?)\n---\n", readme, re.DOTALL)
    found = re.search(r"^license:[ \t]*(\S+)[ \t]*$", front[1], re.MULTILINE) if front else None
    return found[1].strip("'\"") if found else None


def _sections(facts: CardFacts) -> list[str]:
    lines: list[str] = []
    if facts.results:
        lines += ["## Held-out results", "", "| | original | compressed |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in facts.results] + [""]
    paragraphs = {
        "Made by": f"```\n{facts.command}\n```" if facts.command else "",
        "Calibration": facts.calibration,
        "Activations": f"Rounded to `{facts.activations}` in the forward pass, also when measured."
        if facts.activations
        else "",
        "Certificate": facts.certificate,
    }
    for title, text in paragraphs.items():
        lines += [f"## {title}", "", text, ""] if text else []
    lines += ["Recipe, report, provenance and hashes of all files are in `convex_caldera/`.", ""]
    return lines


def _yaml(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", text)
    return text if plain else "'" + text.replace("'", "''").replace("\n", " ") + "'"
