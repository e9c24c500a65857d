"""Curvature of layers on disk: named symmetric matrices of every layer, and whose they are.

    curvature.json               schema, provenance, the SHA-256 of every file, each layer's file
    curvature-00000.safetensors  <layer>.<part>: lower triangle, row by row, float64

Kronecker curvature has the parts `input` (n, n) and `output` (m, m); other kinds name their own. A
diagonal matrix may be given by its diagonal alone: the part `diagonal` (n,), stored as it is.
Files are written beside their place and renamed, the JSON last, so that a run killed at any
moment leaves a whole curvature or none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from convex_caldera.calibrate.saved import write_atomic
from convex_caldera.calibrate.statistics import pack_symmetric, unpack_symmetric
from convex_caldera.errors import FormatError, ResumeError
from convex_caldera.models.checkpoint import hash_file, read_json

CURVATURE_INDEX = "curvature.json"
SCHEMA = 1

DIAGONAL = "diagonal"
Parts = Mapping[str, Tensor]  # part -> symmetric matrix, or its diagonal


@dataclass(frozen=True)
class CurvatureProvenance:
    """What a curvature depends on; it is reused only if all of it is the same.

    Attributes:
        kind: "kronecker", another kind made from gradients, or "diagonal" (of a file).
        model: fingerprint of the checkpoint (`Checkpoint.fingerprint`).
        tokens: fingerprint of the token ids it was collected on (`text.fingerprint`), or of the
            file that it comes from.
        dtype: of the computation, as "float32".
        seed: of the labels drawn.
        draws: of labels for each window.
    """

    kind: str
    model: str
    tokens: str
    dtype: str
    seed: int
    draws: int = 1


def save_curvature(
    directory: Path,
    layers: Mapping[str, Parts],
    blocks: Mapping[str, int],
    provenance: CurvatureProvenance,
) -> None:
    """Write the matrices of all layers, one file a block.

    Args:
        layers: float64 symmetric matrices by layer and part.
        blocks: the block of every layer, which decides its file.

    Raises:
        ResumeError: the directory holds the curvature of another model, text or setting.
        InterruptedRunError: the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if has_curvature(directory):
        _index(directory, provenance)
    files: dict[str, str] = {}
    named = {layer: f"curvature-{blocks[layer]:05d}.safetensors" for layer in sorted(layers)}
    for name in sorted(set(named.values())):
        tensors = {
            f"{layer}.{part}": _packed(matrix.double().cpu())
            for layer, file in named.items()
            if file == name
            for part, matrix in layers[layer].items()
        }
        write_atomic(directory / name, save(tensors))
        files[name] = hash_file(directory / name)
    content = {
        "schema": SCHEMA,
        "provenance": asdict(provenance),
        "files": files,
        "layers": named,
    }
    write_atomic(directory / CURVATURE_INDEX, (json.dumps(content, indent=1) + "\n").encode())


def load_curvature(
    directory: Path, layers: Mapping[str, Any], provenance: CurvatureProvenance
) -> dict[str, dict[str, Tensor]]:
    """The matrices of the named layers by part, (n, n) float64, both triangles.

    Raises:
        ResumeError: they are of another model, text or setting, or a layer is not among them.
        FormatError: the directory is not what `save_curvature` writes.
    """
    content = _index(directory, provenance)
    named, hashes = content["layers"], content["files"]
    found: dict[str, dict[str, Tensor]] = {}
    missing = sorted(set(layers) - set(named))
    if missing:
        raise ResumeError(
            f"{directory} holds no curvature of {missing[0]}; calibrate again in another directory"
        )
    for name in sorted({named[layer] for layer in layers}):
        tensors = _read(directory / name, hashes.get(name))
        for layer in layers:
            if named[layer] == name:
                prefix = f"{layer}."
                found[layer] = {
                    key.removeprefix(prefix): _unpacked(value, key)
                    for key, value in tensors.items()
                    if key.startswith(prefix) and "." not in key.removeprefix(prefix)
                }
    return found


def has_curvature(directory: Path) -> bool:
    """Whether a curvature was saved there."""
    return (directory / CURVATURE_INDEX).is_file()


def _index(directory: Path, provenance: CurvatureProvenance) -> dict[str, Any]:
    """The index, if it is whole and of this provenance."""
    where = directory / CURVATURE_INDEX
    content = read_json(where)
    keys = {"schema", "provenance", "files", "layers"}
    if set(content) != keys or content["schema"] != SCHEMA:
        raise FormatError(f"{where} is not curvature schema {SCHEMA}")
    if not all(isinstance(content[key], dict) for key in keys - {"schema"}):
        raise FormatError(f"{where} is damaged; calibrate again")
    # Those written before there were several had one draw.
    written, expected = {"draws": 1, **content["provenance"]}, asdict(provenance)
    if set(written) != set(expected):
        raise FormatError(f"{where} has no complete provenance")
    for key, value in expected.items():
        if written[key] != value:
            raise ResumeError(
                f"{directory} holds the curvature of another {key} ({written[key]!r}, now "
                f"{value!r}); use another directory or remove this one"
            )
    if not all(_is_name(file) for file in (*content["files"], *content["layers"].values())):
        raise FormatError(f"{where} names a file outside its folder")
    return content


def _is_name(file: Any) -> bool:
    return isinstance(file, str) and Path(file).name == file


def _read(file: Path, digest: Any) -> dict[str, Tensor]:
    if not file.is_file():
        raise FormatError(f"{file} is missing; calibrate again")
    if hash_file(file) != digest:
        raise FormatError(f"{file} is not what was written (hash differs); calibrate again")
    try:
        return load(file.read_bytes())
    except SafetensorError as error:
        raise FormatError(f"{file} is not readable: {error}") from error


def _packed(matrix: Tensor) -> Tensor:
    return matrix if matrix.dim() == 1 else pack_symmetric(0.5 * (matrix + matrix.T))


def _unpacked(packed: Tensor, name: str) -> Tensor:
    if name.endswith(f".{DIAGONAL}") and packed.dim() == 1 and packed.dtype == torch.float64:
        return packed
    n = round((8 * packed.numel() + 1) ** 0.5 - 1) // 2
    whole = packed.dim() == 1 and n * (n + 1) // 2 == packed.numel()
    if not whole or packed.dtype != torch.float64:
        raise FormatError(f"{name} is not a packed float64 triangle: {tuple(packed.shape)}")
    return unpack_symmetric(packed, n)
