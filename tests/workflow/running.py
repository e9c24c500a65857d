"""Run the command line inside the test process, on small texts, and look at what it wrote."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convex_caldera.cli import main
from tests.tiny_models import SENTENCES

NSAMPLES, SEQLEN = 4, 16


@dataclass(frozen=True)
class Ran:
    """Exit code, printed text, and the JSON twin where one was asked for."""

    code: int
    out: str
    err: str
    json: dict[str, Any]


def run(*arguments: object, json_to: Path | None = None) -> Ran:
    """`convex-caldera ARGUMENTS`, in this process."""
    extra = [] if json_to is None else ["--json", str(json_to)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*(str(argument) for argument in arguments), *extra])
    wrote = json_to is not None and json_to.exists()
    record = json.loads(json_to.read_text()) if json_to is not None and wrote else {}
    return Ran(code, out.getvalue(), err.getvalue(), record)


def compress(model: Path, out: Path, text: Path, *options: object) -> Ran:
    """Compress with a small calibration; `options` as on the command line."""
    return run(
        "compress", model, "-o", out, "--dataset", text,
        "--nsamples", NSAMPLES, "--seqlen", SEQLEN, *options, json_to=json_path(out),
    )  # fmt: skip


def json_path(out: Path) -> Path:
    return out.with_name(out.name + ".json")


def write_text(path: Path, lines: int = 120, seed: int = 0) -> Path:
    """A text file of the sentences that the tiny tokenizer was trained on."""
    chosen = random.Random(seed).choices(SENTENCES, k=lines)
    path.write_text("\n".join(chosen), encoding="utf-8")
    return path


def snapshot(directory: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def shard_bytes(directory: Path) -> Mapping[str, int]:
    """Bytes on disk of the compressed shards and of all shards, from the file system alone."""
    sizes = {path.name: path.stat().st_size for path in directory.glob("*.safetensors")}
    compressed = sum(size for name, size in sizes.items() if name.startswith("model-compressed-"))
    return {"compressed": compressed, "all": sum(sizes.values())}
