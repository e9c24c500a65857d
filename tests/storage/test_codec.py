"""T8: write, then read, is the identity on bytes and values; sizes are known beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from convex_caldera import transforms
from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe
from convex_caldera.core.terms import Coded, CompressedLayer, Dense, LowRank
from convex_caldera.errors import FormatError
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.uniform import Uniform
from convex_caldera.storage.codec import (
    layer_from_tensors,
    layer_to_tensors,
    recipe_layout,
    split_packed,
)
from convex_caldera.storage.layers import (
    LayerEntry,
    layer_specs,
    plan_shards,
    planned_shard_bytes,
)
from convex_caldera.storage.schemes import compact, expand
from convex_caldera.storage.shard import read_header, read_tensor, tensor_bytes, write_shard
from convex_caldera.storage.spec import packed_parts
from tests.storage.making import RECIPES, Flip, make_layer

CASES = {
    "codes": RECIPES[0],
    "two stages": RECIPES[1],
    "dense factors": RECIPES[2],
    "coded factors": RECIPES[3],
    "transformed": Recipe((Quantize(E8P(2), "identity"),), transforms=(Flip(), Flip())),
    "only factors": Recipe((FitLowRank(2),)),
    "two low ranks": Recipe((FitLowRank(2), FitLowRank(1, factors=FactorCoding(Uniform(4))))),
}
SHAPES = [(24, 40), (7, 19)]


@pytest.fixture(autouse=True)
def _flip_in_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transforms.TABLE, "flip", Flip)


def a_layer(recipe: Recipe, shape: tuple[int, int], seed: int = 0) -> CompressedLayer:
    generator = torch.Generator().manual_seed(seed)
    return make_layer(torch.randn(shape, generator=generator), recipe, seed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_layer_survives_its_tensors(case: str, shape: tuple[int, int]) -> None:
    layer = a_layer(CASES[case], shape)
    spec, tensors = layer_to_tensors(layer)
    assert expand(*json.loads(json.dumps(compact([spec]))), 10_000) == [spec]
    again = layer_from_tensors(spec, tensors)
    assert torch.equal(again.decode(), layer.decode())
    assert layer_to_tensors(again)[0] == spec
    for name, tensor in layer_to_tensors(again)[1].items():
        assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("case", CASES)
def test_layer_takes_few_tensors_and_little_more_than_its_bytes(case: str) -> None:
    layer = a_layer(CASES[case], (24, 40))
    _, tensors = layer_to_tensors(layer)
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    assert layer.stored_bytes() <= stored < layer.stored_bytes() + 8
    factors = sum(isinstance(t, LowRank) and isinstance(t.left, Dense) for t in layer.terms)
    assert len(tensors) <= 1 + 2 * factors


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_layout_is_known_before_the_data(case: str, shape: tuple[int, int]) -> None:
    spec, tensors = layer_to_tensors(a_layer(CASES[case], shape))
    planned_spec, layout = recipe_layout(CASES[case], shape)
    assert planned_spec == spec
    assert layout == {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def entries_of(
    layers: dict[str, CompressedLayer],
) -> tuple[list[LayerEntry], dict[str, torch.Tensor]]:
    entries, by_name = [], {}
    for name, layer in layers.items():
        spec, tensors = layer_to_tensors(layer)
        layout = {field: (t.dtype, tuple(t.shape)) for field, t in tensors.items()}
        entries.append(LayerEntry(name, spec, layout))
        by_name.update({f"{name}.{field}": t for field, t in tensors.items()})
    return entries, by_name


def some_layers() -> dict[str, CompressedLayer]:
    recipes = list(CASES.values())
    return {
        f"model.layers.{i}.proj": a_layer(recipes[i % len(recipes)], SHAPES[i % 2], i)
        for i in range(12)
    }


@pytest.mark.parametrize("limit", [5_000_000_000, 1500])
def test_planned_bytes_are_the_written_bytes(tmp_path: Path, limit: int) -> None:
    entries, tensors = entries_of(some_layers())
    plans = plan_shards(entries, limit)
    assert len(plans) > (limit < 2000)
    written = 0
    for i, plan in enumerate(plans):
        path = tmp_path / f"{i}.safetensors"
        write_shard(path, plan.infos, plan.metadata, lambda info: tensor_bytes(tensors[info.name]))
        assert path.stat().st_size == plan.num_bytes
        written += path.stat().st_size
    assert planned_shard_bytes(entries, limit) == written


def test_shard_reads_the_same_with_the_safetensors_library(tmp_path: Path) -> None:
    layers = some_layers()
    entries, tensors = entries_of(layers)
    (plan,) = plan_shards(entries)
    path = tmp_path / "x.safetensors"
    write_shard(path, plan.infos, plan.metadata, lambda info: tensor_bytes(tensors[info.name]))
    header = read_header(path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors) == set(header.entries)
        for name in tensors:
            assert torch.equal(file.get_tensor(name), tensors[name])
            assert torch.equal(read_tensor(header, name), tensors[name])
    starts = [e.start for n, e in header.entries.items() if n.endswith(".packed")]
    assert all(start % 8 == 0 for start in starts)
    specs = layer_specs(header)
    for name, layer in layers.items():
        fields = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(name + ".")}
        assert torch.equal(layer_from_tensors(specs[name], fields).decode(), layer.decode())


def test_order_of_layers_does_not_show(tmp_path: Path) -> None:
    layers = some_layers()
    digests = set()
    for order in (list(layers), list(reversed(layers))):
        entries, tensors = entries_of({name: layers[name] for name in order})
        (plan,) = plan_shards(entries)
        path = tmp_path / "x.safetensors"
        raw = {name: tensor_bytes(t) for name, t in tensors.items()}
        digests.add(write_shard(path, plan.infos, plan.metadata, lambda i, raw=raw: raw[i.name]))
    assert len(digests) == 1


def test_equal_specs_are_stored_once() -> None:
    layers = {f"l{i}": a_layer(CASES["coded factors"], (24, 40), i) for i in range(9)}
    entries, _ = entries_of(layers)
    (plan,) = plan_shards(entries)
    record = json.loads(plan.metadata["convex_caldera"])
    assert len(record["schemes"]) == 1 and record["layers"] == [0] * 9
    one = plan_shards(entries[:1])[0].num_bytes
    per_layer = (plan.num_bytes - one) / 8 - sum(i.num_bytes for i in entries[0].infos())
    assert per_layer < 80  # header bytes that one more layer costs here


def test_layers_of_different_rank_share_their_records() -> None:
    recipe = [
        Recipe((FitLowRank(r, factors=FactorCoding(E8P(4))), *RECIPES[1].steps))
        for r in range(1, 10)
    ]
    entries, _ = entries_of({f"l{r}": a_layer(recipe[r], (24, 40), r) for r in range(9)})
    (plan,) = plan_shards(entries)
    record = json.loads(plan.metadata["convex_caldera"])
    assert len(record["records"]) == 2 and len(record["schemes"]) == 9
    tensors = sum(info.num_bytes for info in plan.infos)
    assert plan.num_bytes - tensors < 9 * 100 + 250


def test_layout_that_lies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = a_layer(RECIPES[0], (8, 16))
    layout = {
        "scales": (torch.float32, (8, 1)),
        "codes": (torch.uint8, (32,)),
        "zero_points": (torch.uint8, (2,)),
    }
    monkeypatch.setattr(Uniform, "layout", lambda self, shape: layout)
    with pytest.raises(FormatError, match="layout says"):
        layer_to_tensors(layer)


def test_rank_zero_is_dropped_and_nothing_is_refused() -> None:
    coded = a_layer(RECIPES[0], (8, 16))
    nothing = LowRank(Dense(torch.zeros(8, 0).half()), Dense(torch.zeros(0, 16).half()))
    spec, _ = layer_to_tensors(CompressedLayer((8, 16), (nothing, *coded.terms)))
    assert [term["kind"] for term in spec["terms"]] == ["coded"]
    with pytest.raises(FormatError, match="without terms"):
        layer_to_tensors(CompressedLayer((8, 16), (nothing,)))


def test_parts_of_packed_are_where_the_spec_says() -> None:
    layer = a_layer(CASES["coded factors"], (24, 40))
    spec, tensors = layer_to_tensors(layer)
    parts = packed_parts(spec)
    widths = [part.dtype.itemsize for part in parts]
    assert widths == sorted(widths, reverse=True)
    split = split_packed(spec, tensors["packed"])
    quantized = layer.terms[1]
    assert isinstance(quantized, Coded)
    assert torch.equal(split["terms", 1]["codes"], quantized.fitted.pack(quantized.codes))
    assert torch.equal(split["terms", 1]["scale"], quantized.fitted.tensors()["scale"])


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(packed=t["packed"][:-1]),
        lambda t: t.update(packed=torch.cat([t["packed"], t["packed"][:8]])),
        lambda t: t.update(packed=t["packed"].view(torch.int8)),
        lambda t: t.update(extra=torch.zeros(1)),
        lambda t: t.pop("packed"),
        lambda t: t.update(left_0=t["left_0"].T.contiguous()),
        lambda t: t.update(left_0=t["left_0"] * float("nan")),
        lambda t: t.update(right_0=t["right_0"].double()),
    ],
)
def test_wrong_tensors_are_refused(change: object) -> None:
    spec, tensors = layer_to_tensors(a_layer(CASES["dense factors"], (24, 40)))
    change(tensors)  # type: ignore[operator]
    with pytest.raises(FormatError):
        layer_from_tensors(spec, tensors)


def test_nonzero_padding_is_refused() -> None:
    spec, tensors = layer_to_tensors(a_layer(RECIPES[0], (5, 19)))
    used = sum(part.num_bytes for part in packed_parts(spec))
    assert used % 8, "this case must have padding"
    tensors["packed"][-1] = 1
    with pytest.raises(FormatError, match="padding"):
        layer_from_tensors(spec, tensors)
