"""The last step of a run: finished layers and untouched tensors become a model directory.

A pure copy that can be repeated: nothing is computed here, every file is written under a
temporary name and renamed, and the work folder goes only when everything is in place and has
been read back. Layers are copied in the order of their names, so neither the order in which they
were finished nor the number of workers shows in the bytes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from convex_caldera.errors import FormatError, ModelError
from convex_caldera.recipes.records import to_toml
from convex_caldera.storage.card import CardFacts, model_card
from convex_caldera.storage.files import file_chunks, require_free_space, write_atomically
from convex_caldera.storage.layers import (
    FORMAT_VERSION,
    MAX_SHARD_BYTES,
    LayerEntry,
    ShardPlan,
    plan_shards,
)
from convex_caldera.storage.lossless import (
    LosslessTensor,
    encoded,
    lossless_metadata,
    split_rest,
)
from convex_caldera.storage.manifest import FOLDER, MANIFEST, Files, listed_files, write_manifest
from convex_caldera.storage.partial import PartialRun
from convex_caldera.storage.read import QUANT_METHOD, Container, Sizes, open_container
from convex_caldera.storage.shard import (
    DTYPES,
    Header,
    TensorInfo,
    read_header,
    read_raw,
    shard_bytes,
    write_shard,
)
from convex_caldera.storage.source import INDEX, SourceModel
from convex_caldera.storage.spec import spec_layout
from convex_caldera.storage.tuned import CompressedSource

SMALL_FILES_BYTES = 1_000_000  # allowance for JSON, TOML and the card
PACKAGES = ("convex-caldera", "torch", "numpy", "safetensors", "transformers")


def assemble(
    run: PartialRun,
    source: SourceModel | CompressedSource,
    layers: Iterable[str],
    *,
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    provenance: Mapping[str, Any],
    card: CardFacts,
    certificate: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    activations: str | None = None,
    lossless: bool = False,
) -> Container:
    """Write the model directory `run.out` from a finished run and remove the work folder.

    Args:
        run: holds every layer named in `layers`; it is closed and removed at the very end.
        source: the original model, for all other tensors, its config and its side files; or a
            finished directory, for the same of a tuned one.
        layers: names of the compressed layers; `<name>.weight` must be in the source.
        recipe: plain dict for recipe.toml, enough to recreate this directory.
        report, provenance: plain JSON for report.json and provenance.json.
        card: facts for README.md.
        certificate: plain JSON for certificate.json, if the plan has one.
        max_shard_bytes: upper limit for one file's tensors.
        activations: canonical text of what activations are rounded to, for config.json.
        lossless: code the exponents of the other tensors where that saves bytes.

    Returns:
        The finished directory, opened and verified against its own manifest.

    Raises:
        InterruptedRunError: not enough disk; nothing is lost, and the call can be repeated.
        ResumeError: a layer is not finished.
        ModelError: a layer has no weight of its shape in the source.
        FormatError: what was written does not read back.
    """
    names = sorted(set(layers))
    plans = plan_shards([_entry(run, source, name) for name in names], max_shard_bytes)
    rest = source.rest(names)
    sides = source.side_files()
    require_free_space(run.out, _needed_bytes(plans, rest, sides.values()))

    plain, coded = split_rest(source, rest) if lossless else (rest, [])
    files, weight_map = _write_weights(run, source, plans, _group(plain, max_shard_bytes))
    _write_lossless(run.out, source, coded, max_shard_bytes, files, weight_map)
    total = sum(info.num_bytes for plan in plans for info in plan.infos)
    total += sum(info.num_bytes for info in plain) + sum(tensor.num_bytes for tensor in coded)
    texts = {
        INDEX: _json({"metadata": {"total_size": total}, "weight_map": weight_map}),
        "config.json": config_with_quantization(source.config_text, source.config, activations),
        "README.md": model_card(card, _sizes(run, names, files, rest)),
        f"{FOLDER}/recipe.toml": to_toml(recipe),
        f"{FOLDER}/report.json": _json(report),
        f"{FOLDER}/provenance.json": _json(provenance),
    }
    if certificate is not None:
        # In the order given: it begins with what it proves and what it does not.
        texts[f"{FOLDER}/certificate.json"] = _json(certificate, sort_keys=False)
    files.update(_write_others(run.out, texts, sides))
    _remove_strays(run.out, files)
    write_manifest(run.out, files)
    container = open_container(run.out)
    _audit(container, names, rest)
    run.discard()
    return container


def _write_weights(
    run: PartialRun,
    source: SourceModel | CompressedSource,
    plans: list[ShardPlan],
    rest_groups: list[list[TensorInfo]],
) -> tuple[Files, dict[str, str]]:
    """All shards; their hashes and sizes, and which file holds which tensor."""
    files: Files = {}
    weight_map: dict[str, str] = {}
    for file, plan in _numbered("compressed", plans):
        digest = _write_compressed(run, plan, run.out / file)
        files[file] = {"sha256": digest, "size": plan.num_bytes}
        weight_map.update({info.name: file for info in plan.infos})
    for file, infos in _numbered("rest", rest_groups):
        path = run.out / file
        digest = write_shard(path, infos, {"format": "pt"}, lambda info: source.raw(info.name))
        files[file] = {"sha256": digest, "size": path.stat().st_size}
        weight_map.update({info.name: file for info in infos})
    return files, weight_map


def _write_lossless(
    out: Path,
    source: SourceModel | CompressedSource,
    coded: list[LosslessTensor],
    max_shard_bytes: int,
    files: Files,
    weight_map: dict[str, str],
) -> None:
    """Files of tensors whose exponents are coded; adds to `files` and `weight_map`."""
    by_stored = {tensor.stored.name: tensor for tensor in coded}
    originals = {name: tensor.info for name, tensor in by_stored.items()}
    groups = _group([tensor.stored for tensor in coded], max_shard_bytes)
    for file, infos in _numbered("lossless", groups):
        metadata = lossless_metadata(by_stored[info.name] for info in infos)
        path = out / file
        digest = write_shard(path, infos, metadata, lambda i: encoded(source, i, originals))
        files[file] = {"sha256": digest, "size": path.stat().st_size}
        weight_map.update({info.name: file for info in infos})


def _write_others(out: Path, texts: Mapping[str, str], sides: Mapping[str, Path]) -> Files:
    """Texts of our own, and the original's side files byte for byte."""
    chunks: dict[str, Iterable[bytes]] = {n: file_chunks(path) for n, path in sides.items()}
    chunks.update({name: [text.encode()] for name, text in texts.items()})
    files: Files = {}
    for name, content in chunks.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = write_atomically(path, content)
        files[name] = {"sha256": digest, "size": path.stat().st_size}
    return files


def rest_file_bytes(
    source: SourceModel, layers: Iterable[str], max_shard_bytes: int = MAX_SHARD_BYTES
) -> int:
    """Exact bytes of the files that will hold everything but the named layers."""
    groups = _group(source.rest(sorted(set(layers))), max_shard_bytes)
    return sum(shard_bytes(group, {"format": "pt"}) for group in groups)


def config_with_quantization(
    text: str, config: Mapping[str, Any], activations: str | None = None
) -> str:
    """config.json with our `quantization_config` appended; the original text is kept verbatim."""
    ours = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
    if activations is not None:
        ours["activations"] = activations
    if config.get("quantization_config") is not None:
        raise ModelError("the model is already quantized; start from the original")
    if "quantization_config" in config:  # an explicit null cannot be kept beside ours
        text = json.dumps({k: v for k, v in config.items() if k != "quantization_config"}, indent=2)
    body = text.rstrip()
    if not body.endswith("}"):
        raise ModelError("config.json does not end with a closing brace")
    body = body[:-1].rstrip()
    comma = "" if body.endswith("{") else ","
    return f'{body}{comma}\n  "quantization_config": {json.dumps(ours)}\n}}\n'


def provenance_record(source: SourceModel, **facts: Any) -> dict[str, Any]:
    """Versions and the hashes of the original's files, with further facts; no paths or names."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        found = list(metadata.distributions(name=package))
        versions[package] = found[0].version if found else "not installed"
    return {"versions": versions, "source_files": source.file_hashes(), **facts}


def _entry(run: PartialRun, source: SourceModel | CompressedSource, name: str) -> LayerEntry:
    """A finished layer's place in the shards, checked against the weight that it replaces."""
    spec = run.spec(name)
    shape = tuple(spec["shape"])
    weight = source.infos.get(f"{name}.weight")
    if weight is None:
        raise ModelError(f"{source.directory.name}: has no tensor '{name}.weight'")
    if weight.shape != shape:
        raise ModelError(f"{name}: compressed as {shape}, but the model's weight is {weight.shape}")
    entries = read_header(run.artefact(name)).entries
    layout = {}
    for field in spec_layout(spec):
        info = entries[f"{name}.{field}"].info
        layout[field] = (DTYPES[info.dtype], info.shape)
    return LayerEntry(name, spec, layout)


def _write_compressed(run: PartialRun, plan: ShardPlan, path: Path) -> str:
    headers: dict[str, Header] = {name: read_header(run.artefact(name)) for name in plan.layers}

    def data(info: TensorInfo) -> bytearray:
        return read_raw(headers[info.name.rpartition(".")[0]], info.name)

    return write_shard(path, plan.infos, plan.metadata, data)


def _group(infos: list[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Files of at most `max_bytes` of tensors; in each, wide elements first, for alignment."""
    groups: list[list[TensorInfo]] = []
    filled = 0
    for info in infos:
        if not groups or filled + info.num_bytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += info.num_bytes
    return [sorted(group, key=lambda info: (-info.element_bytes, info.name)) for group in groups]


def _numbered(kind: str, items: list[Any]) -> list[tuple[str, Any]]:
    count = len(items)
    return [
        (f"model-{kind}-{i:05d}-of-{count:05d}.safetensors", item)
        for i, item in enumerate(items, start=1)
    ]


def _needed_bytes(plans: list[ShardPlan], rest: list[TensorInfo], sides: Iterable[Path]) -> int:
    tensors = sum(plan.num_bytes for plan in plans) + sum(info.num_bytes for info in rest)
    return tensors + sum(path.stat().st_size for path in sides) + SMALL_FILES_BYTES


def _sizes(run: PartialRun, names: list[str], files: Files, rest: list[TensorInfo]) -> Sizes:
    shapes = [run.spec(name)["shape"] for name in names]
    weights = sum(shape[0] * shape[1] for shape in shapes)
    kept = sum(info.num_bytes // info.element_bytes for info in rest)
    size = dict.fromkeys(("compressed", "rest", "lossless"), 0)
    for file, entry in files.items():
        size[file.split("-")[1]] += entry["size"]
    return Sizes(size["compressed"], size["rest"] + size["lossless"], weights, weights + kept)


def _remove_strays(out: Path, files: Files) -> None:
    """Files of an earlier, interrupted assembly that are not part of this one."""
    for name in set(listed_files(out)) - set(files) - {MANIFEST}:
        (out / name).unlink()


def _audit(container: Container, names: list[str], rest: list[TensorInfo]) -> None:
    """Every layer compressed once, no plain twin, every other tensor there."""
    if sorted(container.layers) != names or set(container.rest) != {info.name for info in rest}:
        raise FormatError(f"{container.directory.name}: the files do not hold what was planned")


def _json(value: Any, sort_keys: bool = True) -> str:
    return json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False) + "\n"
