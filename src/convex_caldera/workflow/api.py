"""The library's two calls: `compress(model, ...).save(out)`.

Work is done in a folder under the cache directory (CONVEX_CALDERA_CACHE, or the user's cache
folder); `save` copies the finished directory to its place. Nothing is written anywhere else.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from convex_caldera.errors import ModelError, ResumeError
from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.progress import Progress
from convex_caldera.workflow.settings import make_settings
from convex_caldera.workflow.summary import Summary


class Compressed:
    """A finished compression in the cache; `save` keeps it.

    Attributes:
        summary: sizes, bits, seconds, peak memory.
        directory: where it is until `save`; removed when this object goes.
    """

    def __init__(self, directory: Path, summary: Summary, folder: Path):
        self.directory = directory
        self.summary = summary
        self._cleanup = weakref.finalize(self, shutil.rmtree, folder, True)

    def save(self, out: str | Path) -> Path:
        """Copy to `out`, which must be missing or empty. Raises ResumeError otherwise."""
        out = Path(out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ResumeError(f"{out} is not empty; choose another output directory")
        shutil.copytree(self.directory, out, dirs_exist_ok=True)
        return out

    def load(self, **options: Any) -> Any:
        """The compressed model, through `convex_caldera.load`."""
        from convex_caldera.runtime.load import load

        return load(self.directory, **options)


def compress(
    model: Any,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
    workers: int | None = None,
    hessians: str | Path | None = None,
    measured: str | Path | None = None,
    **settings: Any,
) -> Compressed:
    """Compress a model; every option of `convex-caldera compress` is a keyword.

    Args:
        model: a local directory, a hub id, "bundled", or a transformers model in memory (which
            is left alone; give its tokenizer too, unless the method needs no calibration).
        tokenizer: of a model in memory.
        progress: told of finished steps; silent by default.
        workers: layers at a time; does not change the result.
        hessians: folder of `convex-caldera calibrate`, reused; collected into it where missing.
        measured: folder of options measured for other budgets, reused; new ones stay there.
        **settings: bits=2.2 | size="1.5GB" | ratio="6x", method, rank, factor_bits, dataset,
            nsamples, seqlen, seed, device, dtype, ignore, pin: see `workflow.settings`.

    Raises:
        RecipeError, InfeasibleBudgetError, ModelError, DataError, NumericalError.
    """
    folder = Path(tempfile.mkdtemp(prefix="compress-", dir=cache_directory()))
    try:
        name = model if isinstance(model, (str, Path)) else _saved(model, tokenizer, folder)
        made = make_settings(model=str(name), **settings)
        out = folder / "out"
        summary = compress_to(
            made,
            out,
            progress=progress,
            workers=workers,
            hessians=None if hessians is None else Path(hessians),
            measured=None if measured is None else Path(measured),
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Compressed(out, summary, folder)


def cache_directory() -> Path:
    """CONVEX_CALDERA_CACHE, or convex_caldera in the user's cache folder; created if missing."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "convex_caldera"
    path = Path(os.environ.get("CONVEX_CALDERA_CACHE", default))
    path.mkdir(parents=True, exist_ok=True)
    return path


def _saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    """A model in memory as a directory, which the workflow reads block by block."""
    if not hasattr(model, "save_pretrained"):
        raise ModelError(f"{type(model).__name__} is neither a path nor a transformers model")
    target = folder / "model"
    model.save_pretrained(target, max_shard_size="5GB")
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    return target
