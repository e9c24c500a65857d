"""Open a model by name, original or compressed, and say what it weighs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convex_caldera.errors import RecipeError
from convex_caldera.models.checkpoint import Checkpoint, read_json
from convex_caldera.models.original import load_original
from convex_caldera.models.resolve import resolve_model
from convex_caldera.storage.read import QUANT_METHOD, open_container


@dataclass(frozen=True)
class ModelRef:
    """A model on disk.

    `bits_per_compressed_weight` and `bits_per_weight` count file bytes; for an original both
    are those of its stored precision. `activations` is what it rounds them to, if it does.
    """

    name: str
    path: Path
    compressed: bool
    file_bytes: int
    bits_per_compressed_weight: float
    bits_per_weight: float
    activations: str | None = None

    def load(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """A transformers causal language model in evaluation mode, computing in `dtype`."""
        device = usable_device(device)
        if self.compressed:
            from convex_caldera.runtime.load import load

            return load(self.path, dtype=dtype, device=device)
        return load_original(self.path, dtype, device)


def usable_device(name: str) -> str:
    """`name` if tensors can be made there. Raises RecipeError otherwise."""
    try:
        usable = torch.empty(0, device=name).device.type != "meta"
    except (RuntimeError, AssertionError) as error:  # unknown name; not built in; no driver
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"device {name!r} cannot be used here: {reason}") from error
    if not usable:
        raise RecipeError(f"device {name!r} holds no numbers; give cpu, cuda or mps")
    return name


def open_model(name: str) -> ModelRef:
    """A ModelRef of a directory, hub id or `bundled`.

    Raises:
        ModelError: no such model.
        FormatError: a compressed directory that is damaged.
    """
    path = resolve_model(name)
    quantization = read_json(path / "config.json").get("quantization_config") or {}
    if quantization.get("quant_method") == QUANT_METHOD:
        container = open_container(path, verify=False)
        sizes = container.sizes()
        return ModelRef(
            name,
            path,
            True,
            sizes.file_bytes,
            sizes.bits_per_compressed_weight,
            sizes.bits_per_weight,
            container.activations,
        )
    checkpoint = Checkpoint(path)
    weights = sum(_numel(shape) for shape in checkpoint.shapes().values())
    file_bytes = checkpoint.stored_bytes
    checkpoint.close()
    bits = 8 * file_bytes / weights
    return ModelRef(name, path, False, file_bytes, bits, bits)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
