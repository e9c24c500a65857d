"""Measure a compressed directory for its report: spectra, KL of each layer alone, a landscape.

All need the original and take time, so they are no part of a compression. They are added to the
directory as files of its manifest, and nothing that was there changes: the weights, the
certificate and what `verify` says stay as they are.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from convex_caldera.calibrate.text import read_text
from convex_caldera.errors import ModelError, RecipeError
from convex_caldera.evaluate.table import plain_table
from convex_caldera.models.architectures import reads_images
from convex_caldera.models.embeddings import EmbeddingSite
from convex_caldera.models.original import load_original
from convex_caldera.models.resolve import resolve_model
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.models.tokenizer import load_tokenizer
from convex_caldera.runtime.load import load
from convex_caldera.storage.manifest import FOLDER, add_file
from convex_caldera.storage.read import Container, open_container
from convex_caldera.workflow.collecting import gather
from convex_caldera.workflow.compress import calibration_tokens, computing_dtype
from convex_caldera.workflow.curvatures import Curvatures
from convex_caldera.workflow.embedding_curvatures import with_embeddings
from convex_caldera.workflow.evaluating import Meter
from convex_caldera.workflow.fitting import side_by_side
from convex_caldera.workflow.landscape import layer_landscape
from convex_caldera.workflow.models import usable_device
from convex_caldera.workflow.progress import Progress, Silent
from convex_caldera.workflow.settings import Settings, read_settings
from convex_caldera.workflow.single_layers import kl_of_single_layers
from convex_caldera.workflow.spectra import layer_spectra

SCHEMA = 1
SPECTRA, MEASURED, LANDSCAPE = "spectra.json", "measured.json", "landscape.json"


@dataclass(frozen=True)
class Measurement:
    """What was measured, as it was written."""

    directory: str
    spectra: dict[str, Any]
    measured: dict[str, Any]
    landscape: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"output": self.directory, **self.spectra, **self.measured, **self.landscape}

    def text(self) -> str:
        found = self.measured["measured"]
        rows = [(name, f"{row['kl']:.6f}") for name, row in found["layers"].items()]
        rows.append(("sum of the layers", f"{sum(r['kl'] for r in found['layers'].values()):.6f}"))
        rows.append(("all layers at once", f"{found['total_kl']:.6f}"))
        table = plain_table(("layer", "KL, nats per token"), rows)
        folder = f"{self.directory}/{FOLDER}"
        names = f"{SPECTRA}, {MEASURED} and {LANDSCAPE}"
        return f"{table}\n\n{names} are in {folder}; `report` shows them"


def measure_directory(
    directory: Path,
    *,
    model: str | None = None,
    dataset: str | None = None,
    text: str = "bundled:test",
    window: int = 512,
    max_tokens: int = 8 * 512,
    hessians: Path | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Measurement:
    """Write spectra.json, measured.json and landscape.json into an output of `compress`.

    Args:
        directory: altered by these files and their lines in the manifest alone.
        model: the original; the one that the directory names unless given.
        dataset: calibration text, likewise.
        text: held-out text of the KL.
        window, max_tokens: of the KL; a few thousand tokens rank the layers.
        hessians: statistics of `calibrate`, to be used instead of collecting them again.
        workers: layers at a time; does not change the result.

    Raises:
        FormatError: the directory is damaged.
        ModelError: no such original, or not the one that was compressed.
        DataError, RecipeError, ResumeError, NumericalError: as `compress` and `eval`.

    Cost: the calibration pass, three eigenvalue problems and one forward pass per layer; and
    `layer_landscape` of the layer that costs most alone.
    """
    directory, progress = Path(directory), progress or Silent()
    workers = workers or os.cpu_count() or 1
    container = open_container(directory)
    settings = read_settings(directory / FOLDER / "recipe.toml", model=model, dataset=dataset)
    path, device = resolve_model(settings.model), usable_device(settings.device)
    skeleton = Skeleton(path, computing_dtype(settings), device)
    sites = _sites(container, skeleton)
    measured = kl_of_single_layers(
        load_original(path, skeleton.dtype, str(device)),
        {site.name: _decoded(container, site.name) for site in sites},
        load(directory, dtype=skeleton.dtype, device=device, verify=False),
        read_text(text),
        load_tokenizer(path),
        window=window,
        max_tokens=max_tokens,
        progress=Meter(progress),
    )
    with tempfile.TemporaryDirectory() as temporary:
        inputs = _inputs(skeleton, sites, settings, hessians or Path(temporary), progress)
        spectra = _spectra(container, skeleton, sites, inputs, progress, workers)
        landscape = _landscape(
            skeleton, sites, inputs, measured["layers"], settings.seed, progress, workers
        )
    result = Measurement(
        str(directory),
        {"schema": SCHEMA, "spectra": spectra},
        {"schema": SCHEMA, "measured": {"text": _shown(text), **measured}},
        {"schema": SCHEMA, "landscape": landscape},
    )
    written = {SPECTRA: result.spectra, MEASURED: result.measured, LANDSCAPE: result.landscape}
    for name, record in written.items():
        add_file(directory, f"{FOLDER}/{name}", [json.dumps(record, indent=1).encode() + b"\n"])
    return result


def _sites(container: Container, skeleton: Skeleton) -> list[Site]:
    # Looked at only where something is left over: not every model has them in its checkpoint.
    sites: list[Site] = [site for site in skeleton.sites if site.name in container.layers]
    if len(sites) < len(container.layers):
        sites += [site for site in skeleton.embeddings if site.name in container.layers]
    missing = sorted(set(container.layers) - {site.name for site in sites})
    unseen = sorted(set(missing) & _image_layers(skeleton))
    if unseen:
        raise RecipeError(f"{unseen[0]} reads images; `measure` reads text, which it does not see")
    if missing:
        raise ModelError(f"{missing[0]}: the original has no such layer; give the one compressed")
    for site in sites:
        stored = tuple(container.layers[site.name][1]["shape"])
        if stored != site.shape:
            raise ModelError(f"{site.name}: {stored} compressed, {site.shape} in the original")
    return sites


def _inputs(
    skeleton: Skeleton, sites: list[Site], settings: Settings, folder: Path, progress: Progress
) -> Curvatures:
    """Second moments of what the layers read, collected into the folder or read from there."""
    tokens = calibration_tokens(settings, skeleton)
    layers = gather("input", skeleton, sites, tokens, folder, settings.seed, progress)
    return with_embeddings(layers, skeleton, sites, tokens, folder, progress)


def _spectra(
    container: Container,
    skeleton: Skeleton,
    sites: list[Site],
    inputs: Curvatures,
    progress: Progress,
    workers: int,
) -> dict[str, Any]:
    progress.start("spectra", len(sites))

    def work(site: Site) -> dict[str, Any]:
        W = skeleton.tensor(f"{site.name}.weight").float().cpu()
        H = inputs.problem(site, W).hessian.matrix.cpu()
        return layer_spectra(W, _decoded(container, site.name)().cpu(), H)

    found = {}
    for site, spectra in side_by_side(work, sites, workers):
        found[site.name] = spectra
        progress.advance(site.name)
    return dict(sorted(found.items()))


def _landscape(
    skeleton: Skeleton,
    sites: list[Site],
    inputs: Curvatures,
    measured: Mapping[str, Mapping[str, float]],
    seed: int,
    progress: Progress,
    workers: int,
) -> dict[str, Any]:
    """Error over rank and bits of the linear layer that costs most alone."""
    progress.start("landscape", 1)
    linear = [site for site in sites if not isinstance(site, EmbeddingSite)] or sites
    site = max(linear, key=lambda site: measured[site.name]["kl"])
    W = skeleton.tensor(f"{site.name}.weight").float()
    problem = inputs.problem(site, W.to(skeleton.device))
    found = layer_landscape(
        problem, seed=seed, layer=site.name, site=site.input_site, workers=workers
    )
    progress.advance(site.name)
    return found


def _image_layers(skeleton: Skeleton) -> set[str]:
    """Layers of tower and projector, where there are any."""
    if not reads_images(skeleton.model.config):
        return set()
    return {site.name for site in skeleton.image_parts}


def _decoded(container: Container, name: str) -> Callable[[], Tensor]:
    return lambda: container.layer(name).decode()


def _shown(text: str) -> str:
    """The name of a text without the folders of this machine."""
    return Path(text).name if Path(text).is_absolute() else text
