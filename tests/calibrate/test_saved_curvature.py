"""Curvature on disk: the same bits after reading, refused when it is another's or damaged."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from convex_caldera.calibrate.saved_curvature import (
    CURVATURE_INDEX,
    CurvatureProvenance,
    has_curvature,
    load_curvature,
    save_curvature,
)
from convex_caldera.certify.statistics import read_statistics
from convex_caldera.errors import FormatError, ResumeError

PROVENANCE = CurvatureProvenance("kronecker", "m" * 64, "t" * 64, "float32", 42)
BLOCKS = {"a.0.q": 0, "a.0.down": 0, "a.1.q": 1}


def parts(seed=0):
    draw = torch.Generator().manual_seed(seed)

    def positive(n):
        X = torch.randn(2 * n, n, generator=draw, dtype=torch.float64)
        return X.T @ X / n

    return {
        name: {"input": positive(5 + i), "output": positive(3)} for i, name in enumerate(BLOCKS)
    }


@pytest.fixture
def folder(tmp_path):
    save_curvature(tmp_path / "saved", parts(), BLOCKS, PROVENANCE)
    return tmp_path / "saved"


def test_saved_curvature_is_the_same_bits(folder):
    found, expected = load_curvature(folder, BLOCKS, PROVENANCE), parts()
    assert has_curvature(folder) and found.keys() == expected.keys()
    for name, sides in expected.items():
        assert found[name].keys() == sides.keys()
        for side, matrix in sides.items():
            assert torch.equal(found[name][side], 0.5 * (matrix + matrix.T))
    assert list(load_curvature(folder, {"a.1.q": 1}, PROVENANCE)) == ["a.1.q"]


def test_saved_curvature_is_the_same_bytes_again(folder, tmp_path):
    save_curvature(tmp_path / "again", parts(), BLOCKS, PROVENANCE)
    assert len(list(folder.iterdir())) == 3
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_the_checker_reads_what_was_saved(folder, tmp_path):
    found = read_statistics(folder, "kronecker")
    for name, sides in load_curvature(folder, BLOCKS, PROVENANCE).items():
        read = found.sides(name, "ignored", 3)
        assert torch.equal(torch.from_numpy(read.H), sides["input"])
        assert torch.equal(torch.from_numpy(read.O), sides["output"])
    assert found.provenance["model"] == PROVENANCE.model
    with pytest.raises(FormatError, match="--curvature"):
        read_statistics(folder, "input")
    with pytest.raises(FormatError, match="guided"):
        read_statistics(folder, "guided")


def test_the_checker_reads_groups_of_rows(tmp_path):
    groups = {f"group{k}": parts(k)["a.0.q"]["input"] for k in range(3)}
    guided = dataclasses.replace(PROVENANCE, kind="guided")
    save_curvature(tmp_path / "guided", {"x": groups}, {"x": 0}, guided)
    found = read_statistics(tmp_path / "guided", "guided").sides("x", "ignored", 70)
    assert [(rows.start, rows.stop) for rows, _ in found.groups] == [(0, 32), (32, 64), (64, 70)]
    mean = sum(h * groups[f"group{k}"] for k, h in enumerate((32, 32, 6))) / 70
    assert torch.allclose(torch.from_numpy(found.H), mean, rtol=1e-14)
    with pytest.raises(FormatError, match="3 groups"):
        read_statistics(tmp_path / "guided", "guided").sides("x", "ignored", 16)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(CurvatureProvenance)])
def test_curvature_of_another_run_is_refused(folder, field):
    other = dataclasses.replace(PROVENANCE, **{field: "other"})
    with pytest.raises(ResumeError, match=f"another {field}"):
        load_curvature(folder, BLOCKS, other)
    with pytest.raises(ResumeError, match=f"another {field}"):
        save_curvature(folder, parts(1), BLOCKS, other)
    assert load_curvature(folder, BLOCKS, PROVENANCE)


def test_curvature_without_a_layer_is_refused(folder):
    with pytest.raises(ResumeError, match=r"no curvature of b\.q"):
        load_curvature(folder, {**BLOCKS, "b.q": 2}, PROVENANCE)


def test_curvature_flipped_or_cut_is_refused(folder):
    file = folder / "curvature-00001.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match="hash differs"):
            load_curvature(folder, BLOCKS, PROVENANCE)
        with pytest.raises(FormatError, match="SHA-256"):
            read_statistics(folder, "kronecker")
    file.unlink()
    with pytest.raises(FormatError, match="missing"):
        load_curvature(folder, BLOCKS, PROVENANCE)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(schema=2),
        lambda content: content.update(extra=1),
        lambda content: content.pop("layers"),
        lambda content: content.update(files=[]),
        lambda content: content["provenance"].pop("seed"),
        lambda content: content["layers"].update({"a.1.q": "../x"}),
        lambda content: content["layers"].update({"a.1.q": 3}),
    ],
)
def test_curvature_with_a_damaged_index_is_refused(folder, change):
    content = json.loads((folder / CURVATURE_INDEX).read_text())
    change(content)
    (folder / CURVATURE_INDEX).write_text(json.dumps(content))
    with pytest.raises(FormatError):
        load_curvature(folder, BLOCKS, PROVENANCE)
