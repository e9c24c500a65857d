"""Weighted errors under every curvature, and saved statistics of both kinds."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from convex_caldera.allocate.waterfilling import waterfilling_bits
from convex_caldera.certify import verify
from convex_caldera.certify.decode_layer import decode
from convex_caldera.certify.losses import check_loss, recompute
from convex_caldera.certify.reader import read_output
from convex_caldera.certify.source import read_source
from convex_caldera.certify.statistics import Sides, read_statistics, unpack_symmetric
from convex_caldera.certify.waterfilling import least_bits
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.errors import CheckError, FormatError
from convex_caldera.storage import open_container
from tests.certify.making import make


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("losses") / "x", seed=2, blocks=1)


def positive(n, seed):
    X = np.random.default_rng(seed).standard_normal((2 * n, n))
    return X.T @ X / n


@pytest.mark.parametrize("two_sided", [False, True])
def test_loss_agrees_with_the_problem_within_its_tolerance(made, two_sided):
    output, source = read_output(made.output), read_source(made.model)
    container = open_container(made.output)
    for name, layer in output.layers.items():
        m, n = layer.spec.shape
        W, H = source.weight(f"{name}.weight"), positive(n, 1)
        O = positive(m, 2) if two_sided else None
        weighted = None if O is None else Hessian(torch.from_numpy(O))
        problem = Problem(torch.from_numpy(W), Hessian(torch.from_numpy(H)), name, weighted)
        W_hat = container.layer(name).decode()
        assert np.allclose(decode(layer), W_hat.numpy(), atol=1e-5)
        found = recompute(layer, W, Sides(H, O))
        claim = {"loss": problem.loss(W_hat), "relative_loss": problem.relative_loss(W_hat)}
        check_loss(name, found, claim)
        assert found.tolerance < 1e-4 * found.loss
        assert abs(found.loss - claim["loss"]) < 0.2 * found.tolerance
        for key in claim:
            with pytest.raises(CheckError, match="claimed"):
                check_loss(name, found, {**claim, key: claim[key] * 0.999})


def write_curvature(folder, model, layers):
    """The layout of a saved Kronecker curvature."""
    folder.mkdir()
    tensors = {}
    for name, sides in layers.items():
        for side, matrix in sides.items():
            tensors[f"{name}.{side}"] = matrix[np.tril_indices(len(matrix))]
    save_file(tensors, folder / "block-00000.safetensors")
    digest = hashlib.sha256((folder / "block-00000.safetensors").read_bytes()).hexdigest()
    index = {
        "schema": 1,
        "provenance": {"kind": "kronecker", "model": model},
        "files": {"block-00000.safetensors": digest},
        "layers": dict.fromkeys(layers, "block-00000.safetensors"),
    }
    (folder / "curvature.json").write_text(json.dumps(index))


def test_kronecker_statistics_are_read(made, tmp_path):
    H, O = positive(5, 1), positive(3, 2)
    write_curvature(tmp_path / "k", "m", {"a": {"input": H, "output": O}})
    found = read_statistics(tmp_path / "k", "kronecker")
    sides = found.sides("a", "ignored", 3)
    assert found.kind == "kronecker"
    assert np.array_equal(sides.H, H)
    assert np.array_equal(sides.O, O)
    with pytest.raises(FormatError, match="no layer"):
        found.sides("b", "ignored", 3)
    model = read_source(made.model).fingerprint()
    write_curvature(tmp_path / "other", model, {"a": {"input": H, "output": O}})
    verdict = verify(made.output, made.model, tmp_path / "other")
    assert "--curvature 'input'" in verdict.claims[-1].value


def test_packed_triangles_must_be_whole_and_finite():
    assert unpack_symmetric(np.array([1.0, 2.0, 3.0]), "H").tolist() == [[1, 2], [2, 3]]
    for wrong in (np.ones(4), np.array([1.0, np.nan, 1.0])):
        with pytest.raises(FormatError):
            unpack_symmetric(wrong, "H")


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("share", [0.0, 1e-6, 1e-3, 0.3, 0.99, 1.5])
def test_waterfilling_rate_agrees_with_the_library(two_sided, share):
    W = np.random.default_rng(0).standard_normal((6, 9))
    H, O = positive(9, 1), positive(6, 2) if two_sided else None
    h, o = np.linalg.eigvalsh(H), None if O is None else np.linalg.eigvalsh(O)
    variance = float(np.square(W).mean())
    loss = share * variance * h.sum() * (6 if o is None else o.sum())
    expected = waterfilling_bits(variance, o, h, (6, 9), loss)
    assert least_bits(W, Sides(H, O), loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)
