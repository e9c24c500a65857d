"""The original model as files: its tensors, its configuration, and what is copied as it is."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from convex_caldera.errors import ModelError
from convex_caldera.models.checkpoint import INDEX as INDEX
from convex_caldera.models.checkpoint import Checkpoint
from convex_caldera.storage.files import sha256_of
from convex_caldera.storage.shard import NAMES, TensorInfo, parse_json, tensor_bytes

# Copied byte for byte, never re-serialised: tokenizers, processors, generation, licences.
SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.bpe",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "*preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class SourceModel:
    """A local Hugging Face model directory with safetensors weights.

    Args:
        directory: of the model.
        copies: tensors that hold a matrix once more which is compressed under another name; an
            output does not keep them.

    Raises ModelError, on first use, where the directory has no config.json or no safetensors
    weights, or is already quantized; FormatError where the weights are damaged.
    """

    directory: Path
    copies: frozenset[str] = frozenset()

    @cached_property
    def config_text(self) -> str:
        """config.json as it is."""
        path = self.directory / "config.json"
        if not path.is_file():
            raise ModelError(f"{self.directory.name}: no config.json; not a model directory")
        return path.read_bytes().decode()

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, parsed."""
        config = parse_json(self.config_text, "config.json")
        if not isinstance(config, dict):
            raise ModelError(f"{self.directory.name}: config.json is not a table")
        if config.get("quantization_config") is not None:
            raise ModelError(
                f"{self.directory.name} is already quantized; start from the original model"
            )
        return config

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The weights, opened once; FormatError if they are damaged."""
        return Checkpoint(self.directory)

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Dtype and shape of every stored tensor, by name."""
        dtypes = self.checkpoint.dtypes()
        shapes = self.checkpoint.shapes()
        return {name: TensorInfo(name, NAMES[dtypes[name]], shapes[name]) for name in shapes}

    def raw(self, name: str) -> memoryview:
        """The bytes of a stored tensor."""
        return tensor_bytes(self.checkpoint.tensor(name))

    def rest(self, layers: Collection[str]) -> list[TensorInfo]:
        """All tensors but the weights of the named layers and copies, in the order of their names.

        Raises ModelError if a layer has no weight here.
        """
        weights = {f"{layer}.weight" for layer in layers}
        unknown = sorted(weights - set(self.infos))
        if unknown:
            raise ModelError(f"{self.directory.name}: has no tensor {unknown[0]!r}")
        return [self.infos[name] for name in sorted(set(self.infos) - weights - self.copies)]

    def side_files(self) -> dict[str, Path]:
        """Relative name -> path of the files that are copied as they are."""
        found = {}
        for path in sorted(self.directory.rglob("*")):
            name = path.relative_to(self.directory).as_posix()
            if path.is_file() and any(_matches(name, pattern) for pattern in SIDE_FILES):
                found[name] = path
        return found

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of config, weights and side files by relative name: what identifies a model."""
        sides = {name: sha256_of(path) for name, path in self.side_files().items()}
        return {**self.checkpoint.file_hashes, **sides}


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)
