"""The calibration that a method asks for: run once, kept where a resumed run finds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convex_caldera.calibrate.collect import collect
from convex_caldera.calibrate.curvature import Curvature, sequence_curvature
from convex_caldera.calibrate.curvature_guided import GuidedCurvature, guided_curvature
from convex_caldera.calibrate.curvature_shrinkage import choose_shrinkage
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
from convex_caldera.errors import NumericalError, RecipeError
from convex_caldera.finetune.memory import keep_freed_memory
from convex_caldera.linalg.finite import all_finite
from convex_caldera.models.embeddings import without_embeddings
from convex_caldera.models.original import load_original
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.workflow.curvatures import (
    SEARCHED,
    CurvatureKind,
    Curvatures,
    GradientCurvatures,
    GradientOptions,
    InputCurvatures,
    LayerCurvature,
    NoCurvature,
    steps_of,
)
from convex_caldera.workflow.images import ImageSet
from convex_caldera.workflow.progress import Progress
from convex_caldera.workflow.substituted import exchanged

# Share of the sequences that no curvature sees; predictions are scaled to what they say.
HELD_OUT = 1 / 3
# Layers that shrinkage is searched on, evenly spaced: one share serves all of them. What it may
# draw to, second moments of inputs, settles on few windows too.
SEARCHED_LAYERS, INPUT_WINDOWS = 16, 32
FEW = "few_windows"


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
        kind: see `workflow.curvatures`; without tokens only "none" is possible.
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
    return _from_gradients(
        kind, skeleton, sites, tokens, folder, seed, progress, options or GradientOptions()
    )


def _from_gradients(
    kind: CurvatureKind,
    skeleton: Skeleton,
    sites: Sequence[Site],
    tokens: Tensor,
    folder: Path,
    seed: int,
    progress: Progress,
    options: GradientOptions,
) -> GradientCurvatures:
    keep_freed_memory()  # every window's arrays are those of the window before
    model = load_original(skeleton.path, skeleton.dtype, str(skeleton.device))
    _check_finite(model)
    count = max(1, round(len(tokens) * (1 - HELD_OUT)))
    used, held_out = tokens[:count], tokens[count:]
    if options.shrinkage is None and not len(held_out):
        raise RecipeError("shrinkage is searched on held-out windows; give more than one window")
    names = [site.name for site in sites]

    def make() -> dict[str, dict[str, Tensor]]:
        progress.start("curvature", count)
        return _parts_by_layer(kind, model, used, names, seed, progress, options.draws)

    provenance = provenance_of(kind, skeleton, used, seed, options.draws)
    parts = kept_curvature(folder, provenance, sites, make)
    rows, samples = {site.name: site.shape[0] for site in sites}, count * options.draws
    curvatures = {name: _from_parts(p, rows[name], samples) for name, p in parts.items()}
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


def curvature_in_context(
    kind: CurvatureKind,
    curvatures: GradientCurvatures,
    layers: Mapping[str, Tensor],
    sites: Sequence[Site],
    folder: Path,
    provenance: CurvatureProvenance,
    progress: Progress,
) -> dict[str, LayerCurvature]:
    """Curvature of the model with other weights, on the text that the original's was measured on.

    Args:
        layers: name -> W^ (m, n), embeddings included; the model has its own again afterwards.
        sites: linear layers that curvature is wanted of.
        folder, provenance: where it is kept for a resumed run, and what it is of; its seed is that
            of the labels.

    Raises:
        NumericalError: as `calibrate`.
    """
    used, model = curvatures.used, curvatures.model
    names, seed, draws = [site.name for site in sites], provenance.seed, provenance.draws

    def make() -> dict[str, dict[str, Tensor]]:
        progress.start("curvature again", len(used))
        with exchanged(model, layers):
            return _parts_by_layer(kind, model, used, names, seed, progress, draws)

    parts = kept_curvature(folder, provenance, sites, make)
    rows = {site.name: site.shape[0] for site in sites}
    return {name: _from_parts(p, rows[name], draws * len(used)) for name, p in parts.items()}


def _parts_by_layer(
    kind: CurvatureKind,
    model: Any,
    tokens: Tensor,
    names: Sequence[str],
    seed: int,
    progress: Progress,
    draws: int = 1,
) -> dict[str, dict[str, Tensor]]:
    """The matrices of every layer by the name under which they are kept."""
    steps = steps_of(progress)
    if kind == "guided":
        guided = guided_curvature(model, tokens, names, seed=seed, draws=draws, progress=steps)
        return {n: {f"group{k}": H for k, H in enumerate(c.groups)} for n, c in guided.items()}
    found = sequence_curvature(model, tokens, names, seed=seed, draws=draws, progress=steps)
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
    kind: CurvatureKind, skeleton: Skeleton, tokens: Tensor, seed: int, draws: int = 1
) -> CurvatureProvenance:
    """What a curvature collected on these tokens depends on."""
    dtype = str(skeleton.dtype).split(".")[-1]
    return CurvatureProvenance(
        kind, skeleton.checkpoint.fingerprint, fingerprint(tokens), dtype, seed, draws
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
        if not all_finite(parameter):
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
