"""Entropy-coded codes in files: the same layer back, never larger than planned, checked twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convex_caldera.certify.decode_layer import decode
from convex_caldera.certify.reader import Layer
from convex_caldera.certify.shard import read_shard
from convex_caldera.certify.specs import layer_specs as checked_specs
from convex_caldera.coding import Huffman, Rans
from convex_caldera.coding.symbols import symbol_bits
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.core.recipe import FitLowRank, Quantize, Recipe
from convex_caldera.core.terms import Coded, CompressedLayer
from convex_caldera.errors import FormatError, RecipeError
from convex_caldera.fit.backfit import fit_layer
from convex_caldera.quantizers import E8P, KMeans, LloydMax, NormalFloat, Uniform
from convex_caldera.recipes.records import from_record, to_record
from convex_caldera.runtime import CompressedLinear
from convex_caldera.storage.codec import layer_from_tensors, layer_to_tensors, recipe_layout
from convex_caldera.storage.layers import LayerEntry, layer_specs, plan_shards, planned_shard_bytes
from convex_caldera.storage.shard import read_header, tensor_bytes, write_shard

QUANTIZERS = (Uniform(4, 0), NormalFloat(4, 64), LloydMax(5), KMeans(2, 2), E8P(2))


def coder(kind: type[Rans] | type[Huffman], quantizer: Any) -> Rans | Huffman:
    return kind(symbol_bits(quantizer))


def fitted_layer(recipe: Recipe, shape: tuple[int, int] = (96, 80), seed: int = 0) -> Any:
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=random) ** 3  # heavy tails: codes far from uniform
    x = torch.randn(4 * shape[1], shape[1], generator=random)
    problem = Problem(W, Hessian(x.T @ x / len(x)), "layer")
    return fit_layer(problem, recipe, seed=0, layer="layer", site="site").layer


def written(layers: dict[str, CompressedLayer], path: Path) -> Path:
    entries, tensors = [], {}
    for name, layer in layers.items():
        spec, stored = layer_to_tensors(layer)
        layout = {field: (t.dtype, tuple(t.shape)) for field, t in stored.items()}
        entries.append(LayerEntry(name, spec, layout))
        tensors.update({f"{name}.{field}": t for field, t in stored.items()})
    (plan,) = plan_shards(entries)
    write_shard(path, plan.infos, plan.metadata, lambda info: tensor_bytes(tensors[info.name]))
    return path


# Every coder and every quantizer in every run, half of the pairs.
PAIRS = [
    pytest.param(quantizer, kind, marks=[pytest.mark.slow] if (i + j) % 2 else [])
    for i, quantizer in enumerate(QUANTIZERS)
    for j, kind in enumerate((Rans, Huffman))
]


@pytest.mark.parametrize(("quantizer", "kind"), PAIRS, ids=str)
def test_coded_layers_come_back_and_the_checker_agrees(
    quantizer: Any, kind: type[Rans] | type[Huffman], tmp_path: Path
) -> None:
    step = Quantize(quantizer, "identity", coder=coder(kind, quantizer))
    recipe = Recipe((FitLowRank(2), step))
    layers = {f"l.{k}": fitted_layer(recipe, seed=k) for k in range(3)}
    path = written(layers, tmp_path / "x.safetensors")
    planned = planned_shard_bytes(
        LayerEntry(name, *recipe_layout(recipe, (96, 80))) for name in layers
    )
    assert path.stat().st_size <= planned
    header, shard = read_header(path), read_shard(path)
    specs, checked = layer_specs(header), checked_specs(shard)
    assert checked is not None
    for name, layer in layers.items():
        assert specs[name] == layer_to_tensors(layer)[0]
        again = layer_from_tensors(specs[name], layer_to_tensors(layer)[1])
        assert torch.equal(again.decode(), layer.decode())
        assert layer_to_tensors(again)[0] == specs[name]
        module = CompressedLinear.from_layer(layer)
        x = torch.randn(3, 80)
        torch.testing.assert_close(module(x), x @ layer.decode().T, rtol=1e-4, atol=1e-4)
        found = decode(Layer(name, shard, checked[name]))
        np.testing.assert_allclose(found, layer.decode().numpy(), rtol=1e-5, atol=1e-5)


def test_coded_codes_are_counted_as_stored() -> None:
    plain = fitted_layer(Recipe((Quantize(LloydMax(4), "identity"),)))
    coded = fitted_layer(Recipe((Quantize(LloydMax(4), "identity", coder=Rans(4)),)))
    saved = plain.stored_bytes() - coded.stored_bytes()
    assert saved > 500
    assert torch.equal(plain.decode(), coded.decode())
    _, tensors = layer_to_tensors(coded)
    assert 0 <= sum(t.numel() for t in tensors.values()) - coded.stored_bytes() < 8


def test_coding_that_saves_nothing_is_not_used() -> None:
    random = torch.Generator().manual_seed(0)
    fitted = LloydMax(2).fit(torch.randn(16, 16, generator=random))
    codes = torch.randint(0, 4, (16, 16), generator=random).to(torch.uint8)
    term = Coded(codes, fitted, Rans(2))
    assert term.stored_codes[1] is None
    assert torch.equal(term.stored_codes[0], fitted.pack(codes))


def test_coder_is_a_field_of_recipes() -> None:
    step = Quantize(Uniform(3), "identity", coder=Rans(3))
    record = to_record(Recipe((step,)))
    assert record["steps"][0]["coder"] == {"kind": "rans", "symbol_bits": 3}
    assert from_record(record) == Recipe((step,))
    assert "coder" not in to_record(Quantize(Uniform(3)))
    record["steps"][0]["coder"]["kind"] = "uniform"
    with pytest.raises(RecipeError, match="not one of huffman, rans"):
        from_record(record)


FORGERIES = [
    [0, [1, 10**9]],  # more bytes than the file has
    [0, [1, -1]],
    [0, [0, 50]],  # a quantizer as coder
    [0, [2, 50]],
    [1, [0, 50]],
    [0, 1],
    [0, [1]],
    [0, [1, 50, 3]],
    [0, [1, 50], 3],
    [0, [True, 50]],
    [0, [1, 50.0]],
]


@pytest.mark.parametrize("term", FORGERIES, ids=str)
def test_forged_schemes_are_refused_by_both_readers(term: Any, tmp_path: Path) -> None:
    recipe = Recipe((Quantize(LloydMax(4), "identity", coder=Rans(4)),))
    path = written({"l": fitted_layer(recipe)}, tmp_path / "x.safetensors")
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    record = json.loads(header["__metadata__"]["convex_caldera"])
    assert record["schemes"][0][3][0][1][0] == 1
    record["schemes"][0][3][0] = term
    header["__metadata__"]["convex_caldera"] = json.dumps(record)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    with pytest.raises(FormatError):
        layer_specs(read_header(path))
    with pytest.raises(FormatError):
        checked_specs(read_shard(path))


@pytest.mark.parametrize("stride", [131, pytest.param(23, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [Rans, Huffman])
def test_altered_streams_are_refused_by_both_readers_or_decode_alike(
    kind: type[Rans] | type[Huffman], stride: int, tmp_path: Path
) -> None:
    recipe = Recipe((Quantize(LloydMax(4), "identity", coder=kind(4)),))
    layer = fitted_layer(recipe, (48, 40))
    spec, tensors = layer_to_tensors(layer)
    path = written({"l": layer}, tmp_path / "x.safetensors")
    raw = path.read_bytes()
    start = len(raw) - tensors["packed"].numel()
    first = start + 2 * 17  # after scale and levels
    for offset in range(first, len(raw) - 8, stride):
        spoiled = bytearray(raw)
        spoiled[offset] ^= 1 << offset % 8
        path.write_bytes(spoiled)
        shard = read_shard(path)
        checked = checked_specs(shard)
        assert checked is not None
        packed = torch.frombuffer(spoiled, dtype=torch.uint8)[start:]
        try:
            values = layer_from_tensors(spec, {"packed": packed}).decode().numpy()
        except FormatError:
            with pytest.raises(FormatError):
                decode(Layer("l", shard, checked["l"]))
            continue
        np.testing.assert_allclose(decode(Layer("l", shard, checked["l"])), values, rtol=1e-6)
