"""One decoder, several layers: stored once, found by container, run, module and checker."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from convex_caldera.certify.decode_layer import decode
from convex_caldera.certify.reader import read_output
from convex_caldera.core.terms import Coded, CompressedLayer
from convex_caldera.errors import FormatError
from convex_caldera.quantizers import DoubleScale, Neural, Uniform
from convex_caldera.quantizers.neural import FittedNeural, TrainedNeural, fitted_core
from convex_caldera.runtime.linear import CompressedLinear
from convex_caldera.storage.codec import layer_from_tensors, layer_to_tensors, lent_decoder
from convex_caldera.storage.partial import PartialRun

HOME, GUEST = "model.layers.0.a", "model.layers.0.b"
CORE = Neural(8, 4, (2,), (2,), 10, (1, 1), epochs=1, encoder_width=4)


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def coded(quantizer, W: torch.Tensor) -> CompressedLayer:
    fitted = quantizer.fit(W)
    return CompressedLayer((W.shape[0], W.shape[1]), (Coded(fitted.encode(W), fitted),))


def core_of(layer: CompressedLayer) -> FittedNeural:
    (term,) = layer.terms
    assert isinstance(term, Coded)
    found = fitted_core(term.fitted)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def layers() -> dict[str, CompressedLayer]:
    home = coded(DoubleScale(CORE, 8), gaussian(16, 24))
    core = core_of(home)
    guest = dataclasses.replace(CORE, home=HOME)
    lent = DoubleScale(TrainedNeural(guest, core.decoder, core.encoder), 8)
    return {HOME: home, GUEST: coded(lent, gaussian(8, 16, seed=1))}


def test_a_guest_stores_no_decoder(layers: dict[str, CompressedLayer]) -> None:
    sizes = {name: layer_to_tensors(layer)[1]["packed"].numel() for name, layer in layers.items()}
    decoder = core_of(layers[HOME]).decoder.tensors()
    bytes_ = sum(t.numel() * t.element_size() for t in decoder.values())
    assert sizes[HOME] > bytes_ > 100 and sizes[GUEST] < 100
    assert layers[GUEST].stored_bytes() <= sizes[GUEST]


def test_layers_return_with_what_is_lent(layers: dict[str, CompressedLayer]) -> None:
    stored = {name: layer_to_tensors(layer) for name, layer in layers.items()}

    def lend(name: str):
        spec, tensors = stored[name]
        return lent_decoder(spec, tensors["packed"])

    for name, layer in layers.items():
        again = layer_from_tensors(*stored[name], lend)
        assert torch.equal(again.decode(), layer.decode())
    with pytest.raises(FormatError, match=f"decoder stored with {HOME}, which is not at hand"):
        layer_from_tensors(*stored[GUEST])
    with pytest.raises(FormatError, match="stores none"):
        layer_from_tensors(*stored[GUEST], lambda name: lend(GUEST))
    wrong = coded(DoubleScale(dataclasses.replace(CORE, width=12), 8), gaussian(8, 8))
    spec, tensors = layer_to_tensors(wrong)
    with pytest.raises(FormatError, match="of another shape"):
        layer_from_tensors(*stored[GUEST], lambda name: lent_decoder(spec, tensors["packed"]))
    spec, tensors = layer_to_tensors(coded(Uniform(2, 8), gaussian(8, 8)))
    with pytest.raises(FormatError, match="stores none"):
        lent_decoder(spec, tensors["packed"])


def test_a_run_lends_its_own(layers: dict[str, CompressedLayer], tmp_path) -> None:
    with PartialRun(tmp_path / "out", {"model": "m"}) as run:
        for name, layer in layers.items():
            run.put(name, layer, {})
        for name, layer in layers.items():
            assert torch.equal(run.get(name).decode(), layer.decode())


def test_a_module_keeps_what_it_was_made_with(layers: dict[str, CompressedLayer]) -> None:
    module = CompressedLinear.from_layer(layers[GUEST])
    x = gaussian(3, 16, seed=2)
    expected = x @ layers[GUEST].decode().T
    assert torch.allclose(module(x), expected, atol=1e-4)
    module._lent.clear()
    module._stored = None
    with pytest.raises(FormatError, match="not in this model"):
        module(x)
    module.lenders[HOME] = CompressedLinear.from_layer(layers[HOME])
    assert torch.allclose(module(x), expected, atol=1e-4)


def test_the_checker_finds_the_decoder(
    layers: dict[str, CompressedLayer], tmp_path, stored_output
) -> None:
    output = read_output(stored_output(layers))
    for name, layer in layers.items():
        found = decode(output.layers[name])
        expected = layer.decode().numpy()
        assert np.abs(found - expected).max() <= 4e-7 * np.abs(expected).max()
    alone = dataclasses.replace(output.layers[GUEST], others={})
    with pytest.raises(FormatError, match="to borrow from"):
        decode(alone)
    itself = dataclasses.replace(output.layers[GUEST], others={HOME: output.layers[GUEST]})
    with pytest.raises(FormatError, match="stores none"):
        decode(itself)


@pytest.fixture
def stored_output(tmp_path):
    """Writes layers into an output directory, beside a model that has them."""
    from safetensors.torch import save_file

    from convex_caldera.storage import CardFacts, SourceModel, assemble
    from convex_caldera.storage.write import provenance_record

    def store(layers: dict[str, CompressedLayer]):
        model = tmp_path / "model"
        model.mkdir()
        weights = {f"{name}.weight": torch.zeros(layer.shape) for name, layer in layers.items()}
        weights["model.norm.weight"] = torch.ones(4)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        (model / "config.json").write_text('{\n  "model_type": "tiny"\n}\n')
        source = SourceModel(model)
        run = PartialRun(tmp_path / "out", {"model": "m"})
        for name, layer in layers.items():
            run.put(name, layer, {})
        container = assemble(
            run,
            source,
            list(layers),
            recipe={"run": {"method": "reallm-ae"}},
            report={"layers": {}},
            provenance=provenance_record(source),
            card=CardFacts(base_model="tiny", method="reallm-ae"),
        )
        for name, layer in layers.items():
            assert torch.equal(container.layer(name).decode(), layer.decode())
        with pytest.raises(FormatError, match="to borrow a decoder from"):
            container.lend("nobody")
        return tmp_path / "out"

    return store
