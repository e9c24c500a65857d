"""Where a layer's metric comes from: nothing, its inputs, or the model's own loss.

    none        H = I
    input       H = E[x x^T] of the layer's input, one decoder block in memory at a time
    kronecker   both sides, from gradients of whole sequences; the whole model in memory, and
                losses are then predicted nats of KL per token

Those of data are gathered once, kept where a resumed run finds them, and asked for layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from convex_caldera.calibrate.collect import collect
from convex_caldera.calibrate.curvature import Curvature, sequence_curvature, sequence_fisher
from convex_caldera.calibrate.saved import (
    INDEX,
    Provenance,
    SavedStatistics,
    load_statistics,
    save_statistics,
)
from convex_caldera.calibrate.saved_curvature import (
    CurvatureProvenance,
    has_curvature,
    load_curvature,
    save_curvature,
)
from convex_caldera.calibrate.text import fingerprint
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.errors import NumericalError
from convex_caldera.models.original import load_original
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.workflow.progress import Progress

# Share of the sequences that no curvature sees; predictions are scaled to what they say.
HELD_OUT = 1 / 3

CurvatureKind = Literal["none", "input", "kronecker"]


class Curvatures(Protocol):
    """Gives a layer its problem."""

    def problem(self, site: Site, W: Tensor) -> Problem: ...

    def tokens(self, site: Site) -> int:
        """How many tokens the layer's statistics have seen."""


class NoCurvature:
    """Every layer under the identity."""

    def problem(self, site: Site, W: Tensor) -> Problem:
        return Problem(W, Hessian.identity(site.shape[1]), site.name)

    def tokens(self, site: Site) -> int:
        del site
        return 0


class InputCurvatures:
    """Second moments of inputs, read back one block at a time; layers of one input share one H."""

    def __init__(self, saved: SavedStatistics):
        self._saved = saved
        self._hessians: Callable[[int], dict[str, Hessian]] = lru_cache(maxsize=2)(self._read)

    def problem(self, site: Site, W: Tensor) -> Problem:
        return Problem(W, self._hessians(site.block)[site.input_site], site.name)

    def tokens(self, site: Site) -> int:
        return self._saved[site.block][site.input_site].num_tokens

    def _read(self, block: int) -> dict[str, Hessian]:
        return {name: s.hessian() for name, s in self._saved[block].items()}


class KroneckerCurvatures:
    """Both sides of every layer, in memory; some sequences are held out to check predictions."""

    def __init__(
        self, curvatures: dict[str, Curvature], model: Any, tokens: Tensor, held_out: Tensor
    ):
        self._curvatures = curvatures
        self._model = model
        self._tokens = tokens.numel()
        self._held_out = held_out

    def problem(self, site: Site, W: Tensor) -> Problem:
        hessian, output = self._curvatures[site.name].hessians(site.name)
        return Problem(W, hessian, site.name, output)

    def tokens(self, site: Site) -> int:
        del site
        return self._tokens

    @property
    def has_held_out(self) -> bool:
        return len(self._held_out) > 0

    def held_out_loss(
        self, errors: Mapping[str, Sequence[Tensor]], seed: int, progress: Progress
    ) -> dict[str, list[float]]:
        """Nats per token of errors W^ - W by the sequence Fisher of the held-out sequences."""
        progress.start("held out", len(self._held_out))
        return sequence_fisher(
            self._model, self._held_out, errors, seed=seed + 1, progress=steps_of(progress)
        )


def steps_of(progress: Progress) -> Callable[[int, int], None]:
    """Turns (done, in all) into steps of the current stage."""
    seen = [0]

    def advance(done: int, total: int) -> None:
        del total
        for _ in range(done - seen[0]):
            progress.advance()
        seen[0] = done

    return advance


def gather(
    kind: CurvatureKind,
    skeleton: Skeleton,
    sites: Sequence[Site],
    tokens: Tensor | None,
    folder: Path,
    seed: int,
    progress: Progress,
) -> Curvatures:
    """Run the calibration that the method asks for.

    Args:
        kind: see above; without tokens only "none" is possible.
        folder: where they are kept for a resumed run, or were saved by `calibrate`.

    Raises:
        NumericalError, DataError, InterruptedRunError: as `calibrate`.
        ResumeError: the folder holds those of another model, text or setting.
    """
    if kind == "none" or tokens is None:
        return NoCurvature()
    if kind == "input":
        return InputCurvatures(_input_statistics(skeleton, tokens, folder, progress))
    model = load_original(skeleton.path, skeleton.dtype, str(skeleton.device))
    _check_finite(model)
    count = max(1, round(len(tokens) * (1 - HELD_OUT)))
    used, held_out = tokens[:count], tokens[count:]

    def make() -> dict[str, dict[str, Tensor]]:
        progress.start("curvature", count)
        names = [site.name for site in sites]
        found = sequence_curvature(model, used, names, seed=seed, progress=steps_of(progress))
        return {name: {"input": c.input, "output": c.output} for name, c in found.items()}

    parts = kept_curvature(folder, provenance_of(kind, skeleton, used, seed), sites, make)
    curvatures = {name: Curvature(p["input"], p["output"], count) for name, p in parts.items()}
    return KroneckerCurvatures(curvatures, model, used, held_out)


def provenance_of(
    kind: CurvatureKind, skeleton: Skeleton, tokens: Tensor, seed: int
) -> CurvatureProvenance:
    """What a curvature collected on these tokens depends on."""
    dtype = str(skeleton.dtype).split(".")[-1]
    return CurvatureProvenance(
        kind, skeleton.checkpoint.fingerprint, fingerprint(tokens), dtype, seed
    )


def kept_curvature(
    folder: Path,
    provenance: CurvatureProvenance,
    sites: Sequence[Site],
    make: Callable[[], Mapping[str, Mapping[str, Tensor]]],
) -> dict[str, dict[str, Tensor]]:
    """The matrices of all layers by part, read from `folder`, or made and saved there.

    What is returned was read back in both cases, so that a run does not see whether it was.

    Raises:
        ResumeError: the folder holds the curvature of another model, text or setting.
    """
    blocks = {site.name: site.block for site in sites}
    if not has_curvature(folder):
        save_curvature(folder, make(), blocks, provenance)
    return load_curvature(folder, blocks, provenance)


def _check_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise NumericalError(
                f"{name}: {bad} of {parameter.numel()} weights are NaN or infinite; "
                "repair the checkpoint"
            )


def _input_statistics(
    skeleton: Skeleton, tokens: Tensor, folder: Path, progress: Progress
) -> SavedStatistics:
    """Statistics of all blocks in `folder`, those that are there already not collected again."""
    dtype = str(skeleton.dtype).split(".")[-1]
    provenance = Provenance(skeleton.checkpoint.fingerprint, fingerprint(tokens), dtype)
    known = set(load_statistics(folder, provenance)) if (folder / INDEX).is_file() else set()
    missing = set(range(len(skeleton.structure.blocks))) - known
    if missing:
        progress.start("calibrate", len(missing))
        for block in collect(skeleton, tokens, only=missing):
            save_statistics(folder, block.index, block.inputs, provenance)
            progress.advance(block.name)
    return load_statistics(folder, provenance)
