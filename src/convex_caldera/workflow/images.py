"""The images of a folder that tower and projector are calibrated on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from convex_caldera.errors import DataError, RecipeError
from convex_caldera.evaluate.vision import VisionInputs, load_vision_inputs, read_image
from convex_caldera.models.tokenizer import load_tokenizer

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageSet:
    """The first images of a folder by name, as many as there are calibration windows.

    Args:
        folder: of the image files.
        count: how many to take at most.
        model: directory of the model, which has the image processor.

    Raises:
        RecipeError: there is no such folder, or pillow is not installed.
        DataError: it holds no images, or one that is corrupt.
    """

    folder: Path
    count: int
    model: Path

    @cached_property
    def files(self) -> tuple[Path, ...]:
        if not self.folder.is_dir():
            raise RecipeError(f"--images {self.folder}: no such folder")
        found = sorted(
            path
            for path in self.folder.iterdir()
            if path.suffix.lower() in SUFFIXES and path.is_file()
        )
        if not found:
            raise DataError(f"{self.folder} holds no images ({', '.join(SUFFIXES)})")
        return tuple(found[: self.count])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files, in order, and of how the model cuts and normalizes images."""
        digest = hashlib.sha256()
        settings = sorted(self.model.glob("*processor_config.json"))
        for path in (*settings, *self.files):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        """Each image as tensors for the model, one in memory at a time."""
        processor: Any = self._inputs.image_processor
        for path in self.files:
            pixels = processor(images=[read_image(path)], return_tensors="pt")
            yield {key: pixels[key] for key in ("pixel_values", "image_sizes") if key in pixels}

    @cached_property
    def _inputs(self) -> VisionInputs:
        return load_vision_inputs(self.model, load_tokenizer(self.model))
