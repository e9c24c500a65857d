"""Where a layer's metric comes from: nothing, its inputs, or the model's own loss.

    none        H = I
    input       H = E[x x^T] of the layer's input, one decoder block in memory at a time
    kronecker   both sides, from gradients of whole sequences; the whole model in memory, and
                losses are then predicted nats of KL per token
    guided      the input covariance weighted by squared gradients, of each group of output
                channels on its own; memory and unit as for kronecker
    diagonal    H = diag(d) from a file of diagonal Hessians (`workflow.diagonals`)

What the vision tower and the projector of a model read comes from images, by `input` alone: the
loss on text does not reach them.

Those of data are gathered once, kept where a resumed run finds them, and asked for layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from convex_caldera.calibrate.collect import collect
from convex_caldera.calibrate.curvature import Curvature, sequence_curvature, sequence_fisher
from convex_caldera.calibrate.curvature_guided import GuidedCurvature, guided_curvature
from convex_caldera.calibrate.curvature_shrinkage import Shrinkage, choose_shrinkage, shrunk
from convex_caldera.calibrate.images import collect_images
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
from convex_caldera.errors import NumericalError, RecipeError
from convex_caldera.models.embeddings import without_embeddings
from convex_caldera.models.original import load_original
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.workflow.held_out_kl import HeldOutKL, kl_of_windows
from convex_caldera.workflow.images import ImageSet
from convex_caldera.workflow.perturbation import measured_kl
from convex_caldera.workflow.progress import Progress

# Share of the sequences that no curvature sees; predictions are scaled to what they say.
HELD_OUT = 1 / 3
# Held-out sequences that shrinkage is searched on, and layers, evenly spaced: one share serves
# all of them. What it may draw to, second moments of inputs, settles on few windows too.
SEARCHED, SEARCHED_LAYERS, INPUT_WINDOWS = 16, 16, 32
FEW = "few_windows"
# Layers whose factored curvature is kept: those being fitted, and one more.
LAYERS_KEPT = 3

CurvatureKind = Literal["none", "input", "kronecker", "guided", "diagonal"]
GRADIENT_KINDS: tuple[CurvatureKind, ...] = ("kronecker", "guided")
LayerCurvature = Curvature | GuidedCurvature


@dataclass(frozen=True)
class GradientOptions:
    """How curvature from gradients is treated.

    Attributes:
        shrinkage: fixed, or None to search it on held-out sequences.
        fall_back: round layers whose gradients vanish under their input's second moment, and
            say so; otherwise they are an error.
    """

    shrinkage: Shrinkage | None = field(default_factory=Shrinkage)
    fall_back: bool = False


class Curvatures(Protocol):
    """Gives a layer its problem."""

    def problem(self, site: Site, W: Tensor) -> Problem:
        """What losses are reported under."""

    def seen(self, site: Site, W: Tensor) -> Problem:
        """What rounding sees: the same, or a smoother metric (`smooths`)."""

    @property
    def smooths(self) -> bool: ...

    def tokens(self, site: Site) -> int:
        """How many tokens the layer's statistics have seen."""

    def notes(self) -> dict[str, Any]:
        """What the report says of them."""


class NoCurvature:
    """Every layer under the identity."""

    def problem(self, site: Site, W: Tensor) -> Problem:
        return Problem(W, Hessian.identity(site.shape[1]), site.name)

    seen = problem
    smooths = False

    def tokens(self, site: Site) -> int:
        del site
        return 0

    def notes(self) -> dict[str, Any]:
        return {}


class InputCurvatures:
    """Second moments of inputs, read back one block at a time; layers of one input share one H."""

    def __init__(self, saved: SavedStatistics):
        self._saved = saved
        self._hessians: Callable[[int], dict[str, Hessian]] = lru_cache(maxsize=2)(self._read)

    def problem(self, site: Site, W: Tensor) -> Problem:
        return Problem(W, self._hessians(site.block)[site.input_site], site.name)

    seen = problem
    smooths = False

    def tokens(self, site: Site) -> int:
        return self._saved[site.block][site.input_site].num_tokens

    def notes(self) -> dict[str, Any]:
        return {}

    def _read(self, block: int) -> dict[str, Hessian]:
        return {name: s.hessian() for name, s in self._saved[block].items()}


class GradientCurvatures:
    """From the model's own loss, in memory; losses are nats of KL per token.

    Some sequences are held out to check predictions. `seen` is what rounding sees where that is
    not the measured curvature: it is drawn towards something smoother (`shrinkage`), while
    losses are reported under what was measured. `fallbacks` are layers whose gradients vanish:
    they are rounded under the second moment of their input, their predicted loss is the zero
    that was measured, and the report names them.
    """

    def __init__(
        self,
        curvatures: Mapping[str, LayerCurvature],
        model: Any,
        tokens: Tensor,
        held_out: Tensor,
        shrinkage: Shrinkage,
        inputs: Mapping[str, Tensor],
        fallbacks: Sequence[str],
    ):
        self._curvatures, self._inputs = curvatures, inputs
        self._model, self._held_out = model, held_out
        self._used, self._tokens = tokens, tokens.numel()
        self._shrinkage, self._fallbacks = shrinkage, tuple(fallbacks)
        # Options of one layer are fitted one after the other: what they factor, they share.
        self._measured = lru_cache(maxsize=LAYERS_KEPT)(self._measured_sides)
        self._drawn = lru_cache(maxsize=LAYERS_KEPT)(self._drawn_sides)

    def problem(self, site: Site, W: Tensor) -> Problem:
        return self._under(self._measured(site.name), W, site.name)

    def seen(self, site: Site, W: Tensor) -> Problem:
        return self._under(self._drawn(site.name), W, site.name)

    def _under(self, sides: tuple[Hessian, ...], W: Tensor, name: str) -> Problem:
        if len(sides) == 1:
            return Problem(W, sides[0], name)
        if isinstance(self._curvatures[name], GuidedCurvature):
            return Problem.by_row_groups(W, sides, name)
        hessian, output = sides
        return Problem(W, hessian, name, output)

    def _measured_sides(self, name: str) -> tuple[Hessian, ...]:
        return self._curvatures[name].hessians(name)

    def _drawn_sides(self, name: str) -> tuple[Hessian, ...]:
        if name in self._fallbacks:
            return (Hessian(self._inputs[name], name=f"{name} (input alone)"),)
        towards = self._inputs[name] if self._shrinkage.towards == "input" else None
        return shrunk(self._curvatures[name], self._shrinkage, towards).hessians(name)

    @property
    def smooths(self) -> bool:
        return bool(self._fallbacks) or max(self._shrinkage.input, self._shrinkage.output) > 0

    def tokens(self, site: Site) -> int:
        del site
        return self._tokens

    def notes(self) -> dict[str, Any]:
        record: dict[str, Any] = {"shrinkage": self._shrinkage.to_dict()}
        return {**record, "input_curvature_only": list(self._fallbacks)}

    @property
    def has_held_out(self) -> bool:
        return len(self._held_out) > 0

    def held_out_kl(self, layers: Mapping[str, Tensor], progress: Progress) -> HeldOutKL | None:
        """KL(original || model with these weights) on the windows that no curvature saw.

        Args:
            layers: name -> its weight W^ (m, n), of all compressed layers.
        """
        windows = self._held_out[:SEARCHED]
        progress.start("held-out KL", len(windows))
        return kl_of_windows(self._model, layers, windows, progress.advance)

    def held_out_loss(
        self, errors: Mapping[str, Sequence[Tensor]], seed: int, progress: Progress
    ) -> dict[str, list[float]]:
        """Nats per token of errors W^ - W by the sequence Fisher of the held-out sequences."""
        progress.start("held out", len(self._held_out))
        return sequence_fisher(
            self._model, self._held_out, errors, seed=seed + 1, progress=steps_of(progress)
        )

    def measured_kl(self, parameter: str, values: Sequence[Tensor]) -> list[float]:
        """Nats per token of each of several values of one parameter, by running the model with

        them on sequences held out, or on those used where there are none.
        """
        tokens = self._held_out if self.has_held_out else self._used
        return measured_kl(self._model, tokens, parameter, values)


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
    options: GradientOptions | None = None,
    images: ImageSet | None = None,
) -> Curvatures:
    """Run the calibration that the method asks for; embeddings among the sites are left out.

    Args:
        kind: see above; without tokens only "none" is possible.
        folder: where they are kept for a resumed run, or were saved by `calibrate`.
        options: of curvature from gradients.
        images: of layers that text does not reach, if any is among the sites.

    Raises:
        NumericalError, DataError, InterruptedRunError: as `calibrate`; a layer's gradients
            vanish and `options` do not let it fall back.
        RecipeError: a shrinkage is to be searched, but no sequence is held out.
        ResumeError: the folder holds those of another model, text or setting.
    """
    sites = without_embeddings(sites)
    if kind == "none" or tokens is None:
        return NoCurvature()
    if kind == "input":
        saved = _input_statistics(skeleton, sites, tokens, images, folder, progress)
        return InputCurvatures(saved)
    options = options or GradientOptions()
    model = load_original(skeleton.path, skeleton.dtype, str(skeleton.device))
    _check_finite(model)
    count = max(1, round(len(tokens) * (1 - HELD_OUT)))
    used, held_out = tokens[:count], tokens[count:]
    if options.shrinkage is None and not len(held_out):
        raise RecipeError("shrinkage is searched on held-out windows; give more than one window")
    names = [site.name for site in sites]

    def make() -> dict[str, dict[str, Tensor]]:
        progress.start("curvature", count)
        return _parts_by_layer(kind, model, used, names, seed, progress)

    parts = kept_curvature(folder, provenance_of(kind, skeleton, used, seed), sites, make)
    rows = {site.name: site.shape[0] for site in sites}
    curvatures = {name: _from_parts(p, rows[name], count) for name, p in parts.items()}
    fallbacks = _vanishing(curvatures, options)
    inputs: dict[str, Tensor] = {}
    if fallbacks or options.shrinkage is None:
        # Of fewer windows than `calibrate` saves, hence in a folder of their own.
        windows, where = (tokens, folder) if fallbacks else (tokens[:INPUT_WINDOWS], folder / FEW)
        saved = _input_statistics(skeleton, sites, windows, None, where, progress)
        inputs = {s.name: saved[s.block][s.input_site].second_moment() for s in sites}
    shrinkage = options.shrinkage
    if shrinkage is None:
        searched = {name: curvatures[name] for name in names[:: -(-len(names) // SEARCHED_LAYERS)]}
        unseen_tokens = held_out[:SEARCHED]
        progress.start("shrinkage", len(unseen_tokens))
        found = _parts_by_layer(kind, model, unseen_tokens, list(searched), seed + 2, progress)
        unseen = {n: _from_parts(p, rows[n], len(unseen_tokens)) for n, p in found.items()}
        shrinkage = choose_shrinkage(searched, unseen, inputs)
    return GradientCurvatures(curvatures, model, used, held_out, shrinkage, inputs, fallbacks)


def _parts_by_layer(
    kind: CurvatureKind,
    model: Any,
    tokens: Tensor,
    names: Sequence[str],
    seed: int,
    progress: Progress,
) -> dict[str, dict[str, Tensor]]:
    """The matrices of every layer by the name under which they are kept."""
    steps = steps_of(progress)
    if kind == "guided":
        guided = guided_curvature(model, tokens, names, seed=seed, progress=steps)
        return {n: {f"group{k}": H for k, H in enumerate(c.groups)} for n, c in guided.items()}
    found = sequence_curvature(model, tokens, names, seed=seed, progress=steps)
    return {name: {"input": c.input, "output": c.output} for name, c in found.items()}


def _from_parts(parts: Mapping[str, Tensor], rows: int, sequences: int) -> LayerCurvature:
    if "input" in parts:
        return Curvature(parts["input"], parts["output"], sequences)
    groups = tuple(parts[f"group{k}"] for k in range(len(parts)))
    return GuidedCurvature(groups, rows, sequences)


def _vanishing(
    curvatures: Mapping[str, LayerCurvature], options: GradientOptions
) -> tuple[str, ...]:
    """Layers without any gradient. Raises NumericalError unless they may fall back."""
    dead = tuple(name for name, c in curvatures.items() if not c.energy > 0)
    if dead and not options.fall_back:
        others = f" ({len(dead)} such layers)" if len(dead) > 1 else ""
        raise NumericalError(
            f"{dead[0]}: its gradients vanish on all calibration windows{others}; round it under "
            "its inputs alone with --curvature-fallback input, or leave it out with --ignore"
        )
    return dead


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
    skeleton: Skeleton,
    sites: Sequence[Site],
    tokens: Tensor,
    images: ImageSet | None,
    folder: Path,
    progress: Progress,
) -> SavedStatistics:
    """Statistics of the sites' blocks in `folder`; what is there already is not collected again."""
    dtype = str(skeleton.dtype).split(".")[-1]
    seen = fingerprint(tokens) if images is None else f"{fingerprint(tokens)}+{images.fingerprint}"
    provenance = Provenance(skeleton.checkpoint.fingerprint, seen, dtype)
    known = set(load_statistics(folder, provenance)) if (folder / INDEX).is_file() else set()
    missing = {site.block for site in sites} - known
    by_text = missing & set(range(len(skeleton.structure.blocks)))
    if by_text:
        progress.start("calibrate", len(by_text))
        for block in collect(skeleton, tokens, only=by_text):
            save_statistics(folder, block.index, block.inputs, provenance)
            progress.advance(block.name)
    by_images = missing - by_text
    if by_images and images is not None:
        progress.start("images", len(images))
        found = collect_images(skeleton, images, by_images, progress.advance)
        for index, inputs in found.items():
            save_statistics(folder, index, inputs, provenance)
    return load_statistics(folder, provenance)
