"""A plain model directory: every compressed layer decoded to bfloat16, float16 or float32."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from convex_caldera.errors import NumericalError, RecipeError
from convex_caldera.linalg.finite import all_finite
from convex_caldera.storage.files import Bytes, file_chunks, require_free_space, write_atomically
from convex_caldera.storage.layers import MAX_SHARD_BYTES
from convex_caldera.storage.read import Container, open_container
from convex_caldera.storage.shard import NAMES, TensorInfo, tensor_bytes, write_shard
from convex_caldera.storage.source import INDEX, SourceModel

EXPORT_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def export_dense(directory: Path | str, out: Path | str, dtype: str = "bfloat16") -> Path:
    """Write a model directory that any transformers reads, without this package.

    Args:
        directory: an output directory; it is verified first.
        out: where to write; must not exist or be empty.
        dtype: "bfloat16", "float16" or "float32", for the decoded weights. All other tensors are
            copied byte for byte.

    Returns:
        `out`.

    Raises:
        RecipeError: unknown dtype, or `out` is not empty.
        NumericalError: a weight exceeds float16.
        FormatError: the directory is damaged.
        InterruptedRunError: the disk is full.

    Cost: decodes every layer once; one layer and one shard's layout in memory.
    """
    if dtype not in EXPORT_DTYPES:
        raise RecipeError(f"unknown dtype {dtype!r}; one of {', '.join(EXPORT_DTYPES)}")
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"{target.name} exists and is not empty; choose another directory")
    container = open_container(directory)
    infos = _dense_infos(container, EXPORT_DTYPES[dtype])
    require_free_space(target, sum(info.num_bytes for info in infos))
    target.mkdir(parents=True, exist_ok=True)
    weight_map = _write_weights(container, infos, target, EXPORT_DTYPES[dtype])
    total = sum(info.num_bytes for info in infos)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write(target / INDEX, json.dumps(index, indent=2, sort_keys=True))
    config = {k: v for k, v in container.config.items() if k != "quantization_config"}
    config.pop("torch_dtype", None)
    _write(target / "config.json", json.dumps({**config, "dtype": dtype}, indent=2))
    for name, path in SourceModel(container.directory).side_files().items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target / name, file_chunks(path))
    return target


def _dense_infos(container: Container, dtype: torch.dtype) -> list[TensorInfo]:
    dense = [
        TensorInfo(f"{name}.weight", NAMES[dtype], tuple(spec["shape"]))
        for name, (_, spec) in container.layers.items()
    ]
    return sorted(dense + [container.rest_info(n) for n in container.rest], key=lambda i: i.name)


def _write_weights(
    container: Container, infos: list[TensorInfo], target: Path, dtype: torch.dtype
) -> dict[str, str]:
    groups: list[list[TensorInfo]] = [[]]
    for info in infos:
        if groups[-1] and sum(i.num_bytes for i in [*groups[-1], info]) > MAX_SHARD_BYTES:
            groups.append([])
        groups[-1].append(info)
    weight_map = {}

    def data(info: TensorInfo) -> Bytes:
        if info.name in container.rest:
            return container.raw(info.name)
        weight = container.layer(info.name.removesuffix(".weight")).decode().to(dtype)
        if not all_finite(weight):
            raise NumericalError(f"{info.name}: exceeds {dtype}; export as bfloat16 instead")
        return tensor_bytes(weight)

    for i, group in enumerate(groups, start=1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        ordered = sorted(group, key=lambda info: (-info.element_bytes, info.name))
        write_shard(target / file, ordered, {"format": "pt"}, data)
        weight_map.update({info.name: file for info in group})
    return weight_map


def _write(path: Path, text: str) -> None:
    write_atomically(path, [text.encode() + b"\n"])
