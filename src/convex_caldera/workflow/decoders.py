"""Training of the decoders that layers share, before any layer is fitted.

For every decoder: the residuals that low rank leaves in a sample of patches of all its layers,
one training, and the result on disk, where a run that is cut short finds it again. Layers then
are fitted side by side like those of any method, each with its decoder at hand.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from convex_caldera.core.recipe import FitLowRank, Quantize, Recipe
from convex_caldera.core.seeds import generator
from convex_caldera.errors import RecipeError
from convex_caldera.fit.backfit import damp, fit_layer
from convex_caldera.models.sites import Site
from convex_caldera.quantizers.double_scale import DoubleScale
from convex_caldera.quantizers.kmeans import floored
from convex_caldera.quantizers.neural import Neural, TrainedNeural
from convex_caldera.quantizers.neural_decoder import Decoder
from convex_caldera.quantizers.neural_encoder import Encoder, make_encoder
from convex_caldera.quantizers.neural_patches import Patches, joined, patches_of
from convex_caldera.quantizers.neural_start import cosine_basis
from convex_caldera.quantizers.neural_training import train
from convex_caldera.recipes.autoencoder import core_of, parse_options, with_recipe_core
from convex_caldera.workflow.compression import Compression
from convex_caldera.workflow.fitting import Fitter, side_by_side
from convex_caldera.workflow.progress import Progress

FOLDER = "decoders"


@dataclass(frozen=True, eq=False)
class Trained:
    """A decoder with its encoder; `core` is the record under which it was trained."""

    core: Neural
    decoder: Decoder
    encoder: Encoder


def with_decoders(compression: Compression, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The recipes with trained decoders in place of records; trains what is not on disk.

    Those whose layers all are in the run, with all that share their decoder, are left out.
    """
    run, progress = compression.run, compression.progress
    groups: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        groups.setdefault(core_of(recipe).home or name, []).append(name)
    found: dict[str, Recipe] = {}
    for home, members in groups.items():
        if all(name in run.done() for name in members):
            continue
        path = run.folder / FOLDER / f"{hashlib.sha256(home.encode()).hexdigest()[:24]}.safetensors"
        core = _training_core([core_of(recipes[name]) for name in members])
        trained = read_decoder(path, core) if path.is_file() else None
        if trained is None:
            patches = _sample(compression, {n: recipes[n] for n in members})
            trained = _train(core, patches, len(members), progress)
            write_decoder(path, trained)
        for name in members:
            record = core_of(recipes[name])
            primed = TrainedNeural(record, trained.decoder, trained.encoder)
            found[name] = with_recipe_core(recipes[name], primed)
    return found


def _training_core(cores: list[Neural]) -> Neural:
    """The record that a shared decoder is trained under: the most common embedding bits."""
    ((bits, _),) = Counter(core.embed_bits for core in cores).most_common(1)
    return replace(cores[0], home="", embed_bits=bits)


def _train(core: Neural, patches: Patches, count: int, progress: Progress) -> Trained:
    progress.start(f"decoder of {count} layers", core.epochs)

    def told(epoch: int, epochs: int, error: float) -> None:
        del epoch, epochs
        progress.advance(f"relative error {error:.4f}")

    decoder, encoder = train(patches, core.geometry, core.training, told)
    return Trained(core, decoder, encoder)


def _sample(compression: Compression, recipes: Mapping[str, Recipe]) -> Patches:
    """Patches of what low rank leaves in the layers, as many of each, all of one energy."""
    job, progress = compression.job, compression.progress
    sites = {site.name: site for site in job.sites}
    sample = parse_options(job.settings.neural).sample
    most = max(sample // len(recipes), 1)
    progress.start("patches", len(recipes))

    def work(name: str) -> Patches:
        patches = residual_patches(compression.fitter, sites[name], recipes[name])
        if len(patches) <= most:
            return patches
        random = generator(job.settings.seed, name, "patches of a shared decoder")
        return patches.take(torch.randperm(len(patches), generator=random)[:most].sort().values)

    parts = {}
    for name, part in side_by_side(work, list(recipes), 1):
        parts[name] = part
        progress.advance(name)
    return joined([parts[name] for name in recipes])


def residual_patches(fitter: Fitter, site: Site, recipe: Recipe) -> Patches:
    """Patches of the matrix that a recipe's neural codes will see first."""
    W = fitter.weight(site)
    problem = fitter.curvatures.seen(site, W)
    first = recipe.steps[0]
    if isinstance(first, FitLowRank):
        alone = replace(recipe, steps=(first,), sweeps=1)
        fit = fit_layer(problem, alone, seed=fitter.seed, layer=site.name, site=site.input_site)
        W = W - fit.layer.decode().to(W)
    importance = damp(problem.hessian, recipe.damping).damped.diagonal()
    return patches_of(
        _scaled(recipe).divided(W).cpu(), core_of(recipe).patch, floored(importance).cpu()
    )


def _scaled(recipe: Recipe) -> DoubleScale:
    for step in recipe.steps:
        if isinstance(step, Quantize) and isinstance(step.quantizer, DoubleScale):
            return step.quantizer
    raise RecipeError("a shared decoder needs its codes directly within double_scale")


# --- on disk --------------------------------------------------------------------------------


def write_decoder(path: Path, trained: Trained) -> None:
    """Decoder and encoder, under a temporary name first."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {**trained.decoder.tensors()}
    for i, stage in enumerate(trained.encoder.stages):
        tensors.update({f"encoder.{i:03}.{j:03}": t.contiguous() for j, t in enumerate(stage)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def read_decoder(path: Path, core: Neural) -> Trained | None:
    """What `write_decoder` wrote for this record; None, to be trained again, if it does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError:
        return None
    shape = core.geometry
    wanted = {**shape.layout(core.decoder_bits)}
    plain = make_encoder(
        shape, core.encoder_width, cosine_basis(shape.channels, shape.stride), torch.Generator()
    )
    for i, stage in enumerate(plain.stages):
        wanted.update(
            {f"encoder.{i:03}.{j:03}": (t.dtype, tuple(t.shape)) for j, t in enumerate(stage)}
        )
    if {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} != wanted:
        return None
    stages = [
        [tensors[f"encoder.{i:03}.{j:03}"] for j in range(len(stage))]
        for i, stage in enumerate(plain.stages)
    ]
    decoder = Decoder.restore(shape, core.decoder_bits, tensors)
    return Trained(core, decoder, Encoder(shape.enc_strides, stages))
