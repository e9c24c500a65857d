"""docs/format.md is enough: a literal reading of it decodes what the package writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from convex_caldera import quantizers, transforms
from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.minifloat import Minifloat
from convex_caldera.quantizers.mxint import MXInt
from convex_caldera.quantizers.normal_float import NormalFloat
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.quantizers.uniform import Uniform
from convex_caldera.storage.codec import layer_to_tensors
from convex_caldera.storage.layers import LayerEntry, plan_shards
from convex_caldera.storage.shard import tensor_bytes, write_shard
from convex_caldera.transforms.hadamard import RandomizedHadamard
from convex_caldera.transforms.permute import ActOrder
from convex_caldera.transforms.scale import ColumnScale
from tests.oracles import format_v1
from tests.storage.making import make_layer

QUANTIZERS = [
    *(Uniform(b, group_size=16, search=False) for b in (1, 2, 3, 8)),
    Uniform(4, group_size=0, symmetric=True, search=False, scale_dtype="bfloat16"),
    Uniform(1, group_size=-1, symmetric=True, search=False, scale_dtype="float32"),
    Uniform(3, group_size=8, symmetric=True, search=False, legacy_levels=True),
    *(NormalFloat(b, group_size=16) for b in (2, 4)),
    *(MXInt(b, group_size=8) for b in (2, 4, 8)),
    MXInt(3, group_size=0, exponent_bits=3, exponent_rule="legacy"),
    *(Minifloat(b, x, 8) for b, x in ((4, 2), (6, 3), (3, 1))),
    *(E8P(b) for b in (2, 3, 4)),
    *(E8P(b, joint_scale=False) for b in (3, 4)),
    *(Trellis(2.0, 6, code) for code in ("mul1", "mul2", "1mad", "3inst", "mcg", "table")),
    Trellis(1.5, 7, chain=2, row_scales=True),
    Trellis(2.0, 8, "weyl"),
]
HADAMARD = RandomizedHadamard()
CASES = [
    *(Recipe((Quantize(q, "identity"),)) for q in QUANTIZERS),
    *(
        Recipe((Quantize(Uniform(8, group_size=8, search=False), "identity"),), transforms=ts)
        for ts in (
            (HADAMARD,),
            (RandomizedHadamard(inputs=False),),
            (RandomizedHadamard(outputs=False),),
            (ColumnScale(), ActOrder(), HADAMARD),
        )
    ),
    Recipe((FitLowRank(2), Quantize(E8P(2), "identity")), transforms=(HADAMARD,)),
    Recipe((Quantize(E8P(2), "identity"), FitLowRank(3, factors=FactorCoding(E8P(4))))),
]
SHAPES = [(33, 20), (24, 40)]  # Hartley; Paley I and II with Sylvester factors


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", CASES, ids=lambda r: "+".join(_words(r)))
def test_literal_reader_decodes(recipe: Recipe, shape: tuple[int, int], tmp_path: Path) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    layers = {name: make_layer(W * k, recipe) for k, name in enumerate(["l.a", "l.b"], start=1)}
    entries, tensors = [], {}
    for name, layer in layers.items():
        spec, stored = layer_to_tensors(layer)
        layout = {field: (t.dtype, tuple(t.shape)) for field, t in stored.items()}
        entries.append(LayerEntry(name, spec, layout))
        tensors.update({f"{name}.{field}": t for field, t in stored.items()})
    (plan,) = plan_shards(entries)
    path = tmp_path / "x.safetensors"
    write_shard(path, plan.infos, plan.metadata, lambda info: tensor_bytes(tensors[info.name]))
    found = format_v1.read_layers(path)
    assert set(found) == set(layers)
    for name, layer in layers.items():
        expected = layer.decode().numpy()
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)


def test_every_kind_is_in_the_format_document() -> None:
    document = Path(__file__).parents[2] / "docs" / "format.md"
    text = document.read_text(encoding="utf-8")
    for kind in [*quantizers.TABLE, *transforms.TABLE]:
        assert f" `{kind}`\n" in text, f"{kind} has no section in docs/format.md"


def _words(recipe: Recipe) -> list[str]:
    inner = [s.quantizer if isinstance(s, Quantize) else s for s in recipe.steps]
    return [type(each).__name__ for each in (*recipe.transforms, *inner)]
