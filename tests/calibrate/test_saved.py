"""Statistics on disk: the same after reading, refused when they are another's or damaged."""

from __future__ import annotations

import dataclasses
import errno
import json

import pytest
import torch

from convex_caldera.calibrate import saved
from convex_caldera.calibrate.saved import INDEX, Provenance, load_statistics, save_statistics
from convex_caldera.calibrate.statistics import InputAccumulator, InputStatistics
from convex_caldera.errors import FormatError, InterruptedRunError, ResumeError

PROVENANCE = Provenance(model="m" * 64, tokens="t" * 64)


def _inputs(index: int) -> dict[str, InputStatistics]:
    result = {}
    for kind, width in (("q_proj", 5), ("down_proj", 7)):
        accumulator = InputAccumulator(f"model.layers.{index}.{kind}", width)
        draw = torch.Generator().manual_seed(index * 10 + width)
        accumulator.add(torch.randn(3, 4, width, generator=draw), range(3))
        result[accumulator.name] = accumulator.finish()
    return result


@pytest.fixture
def directory(tmp_path):
    for index in (1, 0):
        save_statistics(tmp_path / "statistics", index, _inputs(index), PROVENANCE)
    return tmp_path / "statistics"


def test_saved_statistics_are_the_same_bits(directory):
    found = load_statistics(directory, PROVENANCE)
    assert list(found) == [0, 1] and len(found) == 2 and 1 in found and 2 not in found
    for index in found:
        expected = _inputs(index)
        assert found[index].keys() == expected.keys()
        for name, statistics in found[index].items():
            assert torch.equal(statistics.packed, expected[name].packed)
            assert torch.equal(statistics.mean_abs, expected[name].mean_abs)
            assert statistics.num_tokens == 12 and statistics.name == name


def test_saved_statistics_are_the_same_bytes_again(directory, tmp_path):
    for index in (0, 1):
        save_statistics(tmp_path / "again", index, _inputs(index), PROVENANCE)
    for file in directory.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert len(list(directory.iterdir())) == 3


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Provenance)])
def test_saved_statistics_of_another_run_are_refused(directory, field):
    other = dataclasses.replace(PROVENANCE, **{field: "other"})
    with pytest.raises(ResumeError, match=f"another {field}"):
        load_statistics(directory, other)
    with pytest.raises(ResumeError, match=f"another {field}"):
        save_statistics(directory, 2, _inputs(2), other)
    assert list(load_statistics(directory, PROVENANCE)) == [0, 1]


def test_saved_statistics_flipped_or_cut_are_refused(directory):
    file = directory / "block-00001.safetensors"
    content = file.read_bytes()
    found = load_statistics(directory, PROVENANCE)
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match="hash differs"):
            found[1]
    file.unlink()
    with pytest.raises(FormatError, match="missing"):
        found[1]
    assert found[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(schema=2),
        lambda content: content.update(extra=1),
        lambda content: content.pop("blocks"),
        lambda content: content.update(blocks=[]),
        lambda content: content["provenance"].pop("model"),
        lambda content: content["blocks"].update(x=content["blocks"]["0"]),
        lambda content: content["blocks"]["0"].update(file="../block"),
        lambda content: content["blocks"]["0"].update(inputs={"a": "b"}),
        lambda content: content["blocks"].update({"0": 3}),
    ],
)
def test_saved_statistics_with_a_damaged_index_are_refused(directory, change):
    content = json.loads((directory / INDEX).read_text())
    change(content)
    (directory / INDEX).write_text(json.dumps(content))
    with pytest.raises(FormatError):
        load_statistics(directory, PROVENANCE)


def test_saved_statistics_absent_are_refused(tmp_path):
    with pytest.raises(FormatError, match=INDEX):
        load_statistics(tmp_path, PROVENANCE)


def test_saving_on_a_full_disk_keeps_what_was_there(directory, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saved.os, "fsync", full)
    with pytest.raises(InterruptedRunError, match="disk full"):
        save_statistics(directory, 2, _inputs(2), PROVENANCE)
    assert list(load_statistics(directory, PROVENANCE)) == [0, 1]
    assert len(list(directory.iterdir())) == 3
