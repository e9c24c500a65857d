"""Exponent coding of kept tensors: every bit comes back, by every reader, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.certify.lossless import original_bytes
from convex_caldera.certify.reader import read_output
from convex_caldera.certify.source import check_rest, read_source
from convex_caldera.coding.byte_planes import decode_planes, encode_planes
from convex_caldera.errors import FormatError
from convex_caldera.runtime.load import load
from convex_caldera.storage import Container, export_dense, open_container
from convex_caldera.storage.lossless import LOSSLESS_KEY
from convex_caldera.storage.shard import read_header, tensor_bytes
from tests.examples import examples, first
from tests.loading import from_transformers
from tests.storage.making import make_output

TOKENS = torch.arange(24).view(2, 12) * 7 % 320
KINDS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@examples(60)
@given(st.sampled_from([2, 4]), st.binary(max_size=120))
def test_planes_come_back_bit_for_bit_whatever_the_bits(width: int, raw: bytes) -> None:
    """NaN payloads, infinities, subnormals and negative zeros included."""
    raw = raw[: len(raw) // width * width]
    count = len(raw) // width
    stream = encode_planes(raw, width)
    assert decode_planes(stream, count, width).tobytes() == raw


@examples(40)
@given(st.sampled_from([2, 4]), st.binary(max_size=90), st.data())
def test_planes_refuse_what_is_cut_or_prolonged(width: int, raw: bytes, data: Any) -> None:
    raw = raw[: len(raw) // width * width]
    stream, count = encode_planes(raw, width), len(raw) // width
    end = data.draw(st.integers(0, stream.size - 1))
    tail = np.frombuffer(data.draw(st.binary(min_size=1, max_size=4)), np.uint8)
    for wrong in (stream[:end], np.concatenate([stream, tail])):
        with pytest.raises(FormatError):
            decode_planes(wrong, count, width)
    with pytest.raises(FormatError):
        decode_planes(stream, count + 1, width)


@pytest.mark.parametrize(("dtype", "least"), [("BF16", 0.25), ("F16", 0.05), ("F32", 0.1)])
def test_weights_become_smaller(dtype: str, least: float) -> None:
    W = 0.02 * torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    raw = tensor_bytes(W.to(KINDS[dtype]))
    width = KINDS[dtype].itemsize
    stream = encode_planes(raw, width)
    assert stream.size < (1 - least) * len(raw)
    assert decode_planes(stream, W.numel(), width).tobytes() == bytes(raw)


def test_wider_types_that_were_narrow_once_lose_their_zeros() -> None:
    W = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert encode_planes(tensor_bytes(W), 4).size < 0.36 * 4 * W.numel()


@pytest.fixture(scope="module")
def outputs(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[bool, tuple[Path, Path, Path]] = {}

    def make(tied: bool) -> tuple[Path, Path, Path]:
        if tied not in made:
            model = tiny_model("llama", tie_word_embeddings=tied)
            folder = tmp_path_factory.mktemp("lossless")
            plain = make_output(model, folder / "plain").directory
            coded = make_output(model, folder / "coded", lossless=True).directory
            made[tied] = (model, plain, coded)
        return made[tied]

    return make


@pytest.mark.parametrize("tied", first(1, [False, True]))
@torch.no_grad()
def test_every_reader_sees_the_same_tensors(outputs: Any, tied: bool, tmp_path: Path) -> None:
    model, plain, coded = outputs(tied)
    one, two = open_container(plain), open_container(coded)
    assert set(one.rest) == set(two.rest) and two.lossless
    for name in one.rest:
        assert one.rest_info(name) == two.rest_info(name)
        assert bytes(one.raw(name)) == bytes(two.raw(name))
        assert torch.equal(one.tensor(name), two.tensor(name))
    assert check_rest(read_output(coded), read_source(model))
    expected = load(plain)(TOKENS).logits
    assert torch.equal(load(coded)(TOKENS).logits, expected)
    assert torch.equal(from_transformers(coded)(TOKENS).logits, expected)
    dense = [export_dense(p, tmp_path / p.name, dtype="float32") for p in (plain, coded)]
    files = [sorted(d.glob("*.safetensors")) for d in dense]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_saved_bytes_are_reported_and_true(outputs: Any) -> None:
    _, plain, coded = (p for p in outputs(False))
    one, two = (open_container(p).sizes() for p in (plain, coded))
    assert one.lossless_saved_bytes == 0 < two.lossless_saved_bytes
    saved = one.rest_bytes - two.rest_bytes
    assert 0 <= two.lossless_saved_bytes - saved < 1000  # headers
    assert one.all_weights == two.all_weights


def forged(container: Container, copy: Path, change: Any) -> Path:
    """The lossless file with other metadata."""
    (source,) = container.directory.glob("model-lossless-*")
    raw = source.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    record = json.loads(header["__metadata__"][LOSSLESS_KEY])
    change(record)
    header["__metadata__"][LOSSLESS_KEY] = json.dumps(record)
    text = json.dumps(header).encode()
    path = copy / source.name
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    return path


FORGERIES: dict[str, Any] = {
    "version": lambda r: r.update(version=2),
    "no tensors": lambda r: r.update(tensors={}),
    "unknown key": lambda r: r.update(more=1),
    "another name": lambda r: r["tensors"].update(other=["F32", [2]]),
    "dtype": lambda r: r["tensors"].update({next(iter(r["tensors"])): ["I8", [2, 2]]}),
    "shape": lambda r: r["tensors"].update({next(iter(r["tensors"])): ["F32", [-1]]}),
    "huge shape": lambda r: r["tensors"].update({next(iter(r["tensors"])): ["F32", [1 << 40]]}),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_metadata_is_refused_by_both_readers(
    outputs: Any, name: str, tmp_path: Path
) -> None:
    from convex_caldera.certify.lossless import lossless_entries
    from convex_caldera.certify.shard import read_shard
    from convex_caldera.storage.lossless import lossless_infos

    path = forged(open_container(outputs(False)[2]), tmp_path, FORGERIES[name])
    with pytest.raises(FormatError):
        lossless_infos(read_header(path))
    with pytest.raises(FormatError):
        lossless_entries(read_shard(path))


@pytest.mark.slow
def test_altered_streams_are_refused_alike(outputs: Any, tmp_path: Path) -> None:
    from convex_caldera.certify.lossless import lossless_entries
    from convex_caldera.certify.shard import read_shard
    from convex_caldera.storage.lossless import lossless_infos, read_lossless

    (source,) = outputs(False)[2].glob("model-lossless-*")
    raw, path = source.read_bytes(), tmp_path / source.name
    start = 8 + int.from_bytes(raw[:8], "little")
    step = max((len(raw) - start) // 60, 1)
    for offset in range(start, len(raw), step):
        spoiled = bytearray(raw)
        spoiled[offset] ^= 1 << offset % 8
        path.write_bytes(spoiled)
        header, shard = read_header(path), read_shard(path)
        infos, entries = lossless_infos(header), lossless_entries(shard)
        assert infos is not None and entries is not None
        for name, info in infos.items():
            try:
                expected = bytes(read_lossless(header, info))
            except FormatError:
                with pytest.raises(FormatError):
                    original_bytes(shard, name, entries[name])
                continue
            assert original_bytes(shard, name, entries[name]) == expected
