"""The demonstration: compress the bundled model, reload it in a fresh process, compare.

The comparison runs in another process that has only the files, so that what is shown is what
anyone would load.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convex_caldera.errors import CheckError
from convex_caldera.evaluate.table import plain_table
from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.progress import Progress
from convex_caldera.workflow.settings import make_settings
from convex_caldera.workflow.summary import Summary

MODEL = "bundled"
TEXT = "bundled:test"
MAX_TOKENS = 64 * 511
PROMPT = 'def read_lines(path):\n    """Return the lines of a file'
NEW_TOKENS = 48


@dataclass(frozen=True)
class Demo:
    """Compression summary, scores of both models, and both continuations."""

    summary: Summary
    evaluation: dict[str, Any]
    continuations: tuple[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "compress": self.summary.to_dict(),
            "eval": self.evaluation,
            "prompt": PROMPT,
            "continuations": dict(zip(("original", "compressed"), self.continuations, strict=True)),
        }

    def text(self) -> str:
        original, compressed = self.evaluation["models"]
        pairs = [("", "original", "compressed")]
        rows = [
            ("file bytes", f"{original['file_bytes']:,}", f"{compressed['file_bytes']:,}"),
            _row(
                "bits per compressed weight", "bits_per_compressed_weight", self.evaluation, ".3f"
            ),
            _row("bits per all weights", "bits_per_weight", self.evaluation, ".3f"),
            _row("perplexity, held-out text", "perplexity", self.evaluation, ".3f"),
            _row("KL per token (nats)", "kl", self.evaluation, ".4f"),
            _row("top-1 agreement", "top1_agreement", self.evaluation, ".2%"),
            ("seconds to compress", "", f"{self.summary.seconds:.1f}"),
            ("peak memory", "", f"{self.summary.peak_memory_bytes / 1e6:.0f} MB"),
        ]
        blocks = [plain_table(pairs[0], rows)]
        for name, text in zip(("original", "compressed"), self.continuations, strict=True):
            blocks.append(f"--- {name} continues the prompt ---\n{PROMPT}{text}")
        blocks.append(f"The compressed model is in {self.summary.output}")
        return "\n\n".join(blocks)


def run_demo(out: Path, bits: float, *, progress: Progress) -> Demo:
    """Compress `bundled` with CALDERA, then evaluate and generate in fresh processes.

    A finished earlier demonstration in `out` is compressed anew beside it.

    Raises:
        CheckError: a fresh process failed; it has said why.
    """
    target = _free(out)
    settings = make_settings(model=MODEL, method="caldera", bits=bits)
    summary = compress_to(settings, target, progress=progress)
    evaluation = _fresh(
        ["eval", MODEL, str(target), "--text", TEXT, "--max-tokens", str(MAX_TOKENS)]
    )
    continuations = tuple(
        _fresh(["generate", model, "--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS)])["text"]
        for model in (MODEL, str(target))
    )
    return Demo(summary, evaluation, continuations)  # type: ignore[arg-type]


def _free(out: Path) -> Path:
    """`out`, or out-2, out-3, ... : the first that is free or holds a partial run."""
    candidates = [out, *(out.with_name(f"{out.name}-{i}") for i in range(2, 10_000))]
    return next(c for c in candidates if not c.exists() or not (c / "config.json").exists())


def _fresh(arguments: list[str]) -> dict[str, Any]:
    """Run one command of ours in a new process and return what it writes as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        command = [sys.executable, "-m", "convex_caldera", *arguments, "--json", str(path)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise CheckError(f"{' '.join(arguments[:2])} failed with code {done.returncode}")
        return json.loads(path.read_text(encoding="utf-8"))


def _row(title: str, key: str, evaluation: dict[str, Any], form: str) -> tuple[str, str, str]:
    original, compressed = (model[key] for model in evaluation["models"])
    return title, format(original, form), format(compressed, form)
