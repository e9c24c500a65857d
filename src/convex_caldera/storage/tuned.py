"""An output directory as the source of another one: the same model with other values.

Fine-tuning writes a new directory from a finished one. All that is neither a compressed layer nor
named in `changed` is copied byte for byte, config.json and side files included.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from convex_caldera.errors import FormatError, ModelError
from convex_caldera.storage.files import sha256_of
from convex_caldera.storage.manifest import FOLDER, MANIFEST
from convex_caldera.storage.read import Container
from convex_caldera.storage.shard import TensorInfo, describe, parse_json, tensor_bytes
from convex_caldera.storage.source import SourceModel

WEIGHT_DTYPE = "F32"  # of the decoded weight, which is stored nowhere


class CompressedSource:
    """What `assemble` asks of a source, answered from a compressed directory.

    Args:
        container: the directory that is tuned.
        changed: tensors that are kept but have new values, by stored name.

    Raises:
        FormatError: a changed tensor is not among the kept ones, or of another dtype or shape.
    """

    def __init__(self, container: Container, changed: Mapping[str, Tensor] | None = None):
        self.directory = container.directory
        self.container = container
        self.changed = dict(changed or {})
        for name, value in (changed or {}).items():
            if name not in container.rest or describe(name, value) != container.rest_info(name):
                raise FormatError(f"{name}: not a tensor of {container.directory.name}, or altered")

    @cached_property
    def config_text(self) -> str:
        """config.json as it was before `quantization_config` was appended."""
        text = (self.directory / "config.json").read_text(encoding="utf-8")
        ours = json.dumps(self.container.config["quantization_config"])
        end = f'\n  "quantization_config": {ours}\n}}\n'
        if not text.endswith(end):
            raise FormatError("config.json: quantization_config is not where it was appended")
        return text.removesuffix(end).removesuffix(",") + "\n}\n"

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json without `quantization_config`."""
        return {k: v for k, v in self.container.config.items() if k != "quantization_config"}

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Kept tensors, and the weight that each layer stands for."""
        found = {name: self.container.rest_info(name) for name in self.container.rest}
        for name, (_, spec) in self.container.layers.items():
            weight = f"{name}.weight"
            found[weight] = TensorInfo(weight, WEIGHT_DTYPE, tuple(spec["shape"]))
        return found

    def raw(self, name: str) -> memoryview:
        """The bytes of a kept tensor, new ones where it was changed."""
        if name in self.changed:
            return tensor_bytes(self.changed[name])
        return memoryview(self.container.raw(name))

    def rest(self, layers: Collection[str]) -> list[TensorInfo]:
        """The kept tensors; the layers must be all that are compressed."""
        if set(layers) != set(self.container.layers):
            raise ModelError("a tuned model has exactly the layers of the one it was made from")
        return [self.infos[name] for name in sorted(self.container.rest)]

    def side_files(self) -> dict[str, Path]:
        """Relative name -> path of the files that are copied as they are."""
        return SourceModel(self.directory).side_files()

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of the manifest, which has those of all other files."""
        return {MANIFEST: sha256_of(self.directory / MANIFEST)}


def provenance_of(container: Container) -> dict[str, Any]:
    """convex_caldera/provenance.json."""
    return _record(container, "provenance.json")


def certificate_of(container: Container) -> dict[str, Any] | None:
    """convex_caldera/certificate.json, or None where the method makes no plan."""
    present = (container.directory / FOLDER / "certificate.json").is_file()
    return _record(container, "certificate.json") if present else None


def _record(container: Container, name: str) -> dict[str, Any]:
    record = parse_json((container.directory / FOLDER / name).read_bytes(), name)
    if not isinstance(record, dict):
        raise FormatError(f"{FOLDER}/{name}: must be a table")
    return record
