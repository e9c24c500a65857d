"""What a compression would cost, from shapes alone: no weight and no text is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from convex_caldera.evaluate.table import plain_table
from convex_caldera.models.embeddings import EmbeddingSite, copies_of, without_embeddings
from convex_caldera.models.resolve import resolve_model
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.recipes.guided import group_count
from convex_caldera.recipes.table import method as method_named
from convex_caldera.storage.source import SourceModel
from convex_caldera.storage.write import rest_file_bytes
from convex_caldera.workflow.choosing import sites_for
from convex_caldera.workflow.compress import budget_of, computing_dtype
from convex_caldera.workflow.curvatures import GRADIENT_KINDS
from convex_caldera.workflow.planning import Plan, chosen_sites, uniform_plan
from convex_caldera.workflow.sequential import windows_wanted
from convex_caldera.workflow.settings import Settings

# torch, transformers and this package once imported, measured on a 64-bit Linux.
LIBRARIES_BYTES = 450_000_000
# Layers fitted at a time, float32 copies of a weight in a fit, sequences in a gradient batch.
WORKERS, FIT_COPIES, GRADIENT_BATCH = 2, 8, 4


@dataclass(frozen=True)
class Estimate:
    """Disk to the byte, memory by its terms, and the plan."""

    method: str
    plan: Plan
    rest_bytes: int
    original_bytes: int
    all_weights: int
    memory: dict[str, int]
    calibration_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def file_bytes(self) -> int:
        return self.plan.compressed_bytes + self.rest_bytes

    @property
    def peak_memory_bytes(self) -> int:
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "file_bytes": self.file_bytes,
            "compressed_bytes": self.plan.compressed_bytes,
            "original_bytes": self.original_bytes,
            "bits_per_compressed_weight": self.plan.bits_per_compressed_weight,
            "bits_per_weight": 8 * self.file_bytes / self.all_weights,
            "budget_bytes": self.plan.budget.compressed_bytes if self.plan.budget else None,
            "peak_memory_bytes": self.peak_memory_bytes,
            "memory": self.memory,
            "notes": list(self.notes),
            "disk_bytes_while_running": self.plan.compressed_bytes
            + self.file_bytes
            + self.calibration_bytes,
            "layers": [
                {
                    "name": name,
                    "shape": list(shape),
                    "bits": self.plan.layer_bits(name),
                    "rank": self.plan.recipes[name].rank,
                }
                for name, shape in self.plan.shapes.items()
            ],
        }

    def text(self, layers: bool = False) -> str:
        record = self.to_dict()
        lines = []
        if layers:
            rows = [
                (r["name"], "x".join(map(str, r["shape"])), f"{r['bits']:.3f}", str(r["rank"]))
                for r in record["layers"]
            ]
            lines += [plain_table(("layer", "shape", "bits", "rank"), rows), ""]
        lines += [
            f"{self.method}: {len(self.plan.recipes)} layers, {self.plan.weights:,} weights",
            f"weight files {self.original_bytes:,} -> {self.file_bytes:,} bytes, "
            f"{record['bits_per_compressed_weight']:.4f} bits per compressed weight, "
            f"{record['bits_per_weight']:.4f} per all weights",
            f"disk while running {record['disk_bytes_while_running']:,} bytes",
            f"peak memory about {self.peak_memory_bytes / 1e6:,.0f} MB: "
            + ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in self.memory.items()),
        ]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def estimate(settings: Settings) -> Estimate:
    """Plan a compression and predict its disk and memory.

    Raises:
        InfeasibleBudgetError, ModelError, RecipeError: as `workflow.compress.prepare`.
    """
    path = resolve_model(settings.model)
    skeleton = Skeleton(path, computing_dtype(settings))
    parts = sites_for(skeleton, settings)
    sites = chosen_sites(parts, settings.ignore)
    source = SourceModel(path, frozenset(copies_of(sites)))
    plan = uniform_plan(
        sites, method_named(settings.method), settings, budget_of(settings, source, sites)
    )
    return Estimate(
        settings.method,
        plan,
        rest_file_bytes(source, [site.name for site in sites]),
        source.checkpoint.stored_bytes,
        sum(math.prod(shape) for shape in source.checkpoint.shapes().values()),
        _memory(settings, skeleton, parts),
        _calibration_bytes(settings, parts),
        tuple(_notes(settings, skeleton)),
    )


def _notes(settings: Settings, skeleton: Skeleton) -> Iterator[str]:
    if settings.coder is not None:
        yield (
            f"codes are counted at fixed width, which {settings.coder} does not exceed; what it "
            "saves is known once layers are fitted, and spent on finer codes within the budget"
        )
    if skeleton.whole_model:
        yield "transformers converts this checkpoint; it is held whole in memory"


def _calibration_bytes(settings: Settings, sites: Sequence[Site]) -> int:
    """Bytes of the statistics that wait on disk: triangles, float32 of inputs, else float64."""
    kind, layers = _kind(settings), without_embeddings(sites)
    heads = [site for site in sites if isinstance(site, EmbeddingSite) and "head" in site.uses]
    moments = sum(_moment_bytes(site.shape[1]) for site in heads)
    if kind == "input":
        widths = {site.input_site: site.shape[1] for site in layers}
        return moments + sum(map(_moment_bytes, widths.values()))
    shapes = [site.shape for site in layers]
    if kind == "kronecker":
        return moments + sum(4 * (m * (m + 1) + n * (n + 1)) for m, n in shapes)
    if kind == "guided":
        return moments + sum(4 * group_count((m, n)) * n * (n + 1) for m, n in shapes)
    if kind == "diagonal":
        return sum(8 * n for _, n in shapes)
    return 0


def _moment_bytes(n: int) -> int:
    return 2 * n * (n + 1) + 4 * n


def _kind(settings: Settings) -> str:
    if settings.diag_hessians is not None:
        return "diagonal"
    own = method_named(settings.method).curvature
    return own if settings.curvature == "auto" else settings.curvature


def _corrects_drift(settings: Settings) -> bool:
    chosen = settings.targets
    own = method_named(settings.method).targets
    return (own if chosen == "auto" else chosen) == "drift-corrected"


def _memory(settings: Settings, skeleton: Skeleton, sites: Sequence[Site]) -> dict[str, int]:
    """Bytes at the peak, by what takes them; each layer is fitted with a few copies of itself."""
    kind = _kind(settings)
    largest = max((s.shape[0] * s.shape[1] for s in sites), default=0)
    # Of an embedding no matrix has the size of the vocabulary squared.
    sides = [s.shape[1:] if isinstance(s, EmbeddingSite) else s.shape for s in sites]
    widest = max((max(side) for side in sides), default=0)
    return {
        "libraries": LIBRARIES_BYTES,
        **(_image_memory(skeleton, sites) if kind == "input" else {}),
        **(_gradient_memory(settings, skeleton) if kind in GRADIENT_KINDS else {}),
        **(_input_memory(settings, skeleton) if kind == "input" else {}),
        **(_drift_memory(settings, skeleton) if _corrects_drift(settings) else {}),
        "layers being fitted": WORKERS * (FIT_COPIES * 4 * largest + 4 * 8 * widest * widest),
    }


def _image_memory(skeleton: Skeleton, sites: Sequence[Site]) -> dict[str, int]:
    """Tower and projector whole, with float64 moments of all their inputs at once, if chosen."""
    beyond = [site for site in sites if site.block >= len(skeleton.structure.blocks)]
    if not beyond:
        return {}
    weights = sum(site.shape[0] * site.shape[1] for site in skeleton.image_parts)
    widths = {site.input_site: site.shape[1] for site in beyond}
    moments = 8 * sum(n * n for n in widths.values())
    return {"tower and projector": skeleton.dtype.itemsize * weights + moments}


def _input_memory(settings: Settings, skeleton: Skeleton) -> dict[str, int]:
    """One block, what waits between blocks, and float64 moments of one block's inputs."""
    widths = {site.input_site: site.shape[1] for site in skeleton.sites if site.block == 0}
    block = sum(s.shape[0] * s.shape[1] for s in skeleton.sites if s.block == 0)
    hidden = skeleton.model.config.get_text_config().hidden_size
    return {
        "one block": skeleton.dtype.itemsize * block,
        "hidden states": 4 * settings.nsamples * settings.seqlen * hidden,
        "second moments": 8 * sum(3 * n * n for n in widths.values()),
    }


def _gradient_memory(settings: Settings, skeleton: Skeleton) -> dict[str, int]:
    """The whole model, activations of one batch with their logits, and both sides' moments."""
    config = skeleton.model.config.get_text_config()
    weights = sum(math.prod(shape) for shape in skeleton.checkpoint.shapes().values())
    per_token = sum(sum(site.shape) for site in skeleton.sites) + 4 * config.vocab_size
    return {
        "whole model": skeleton.dtype.itemsize * weights,
        "activations": 4 * GRADIENT_BATCH * settings.seqlen * per_token,
        "curvature": 4 * sum(m * m + n * n for m, n in (site.shape for site in skeleton.sites)),
    }


def _drift_memory(settings: Settings, skeleton: Skeleton) -> dict[str, int]:
    """Two blocks, hidden states of both models with one block's inputs, and six moments."""
    widths = {site.input_site: site.shape[1] for site in skeleton.sites if site.block == 0}
    block = sum(s.shape[0] * s.shape[1] for s in skeleton.sites if s.block == 0)
    widest = max((s.shape[1] for s in skeleton.sites), default=0)
    windows = min(windows_wanted(settings.seqlen, widest), settings.nsamples)
    hidden = skeleton.model.config.get_text_config().hidden_size
    return {
        "original and compressed block": 2 * skeleton.dtype.itemsize * block,
        "drift": 4 * windows * settings.seqlen * (2 * hidden + sum(widths.values()))
        + 6 * 8 * widest * widest,
    }
