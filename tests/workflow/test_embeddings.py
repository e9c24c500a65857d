"""Compressed embeddings: one variable where they are tied, a plain weight once they are loaded."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convex_caldera
from convex_caldera.certify import verify
from convex_caldera.models.tokenizer import load_tokenizer
from convex_caldera.storage.read import open_container
from convex_caldera.workflow.collecting import HELD_OUT
from convex_caldera.workflow.inspecting import inspect_directory
from tests.loading import from_transformers
from tests.tiny_models import VOCABULARY
from tests.workflow.killing import at_file
from tests.workflow.running import NSAMPLES, SEQLEN, Ran, compress, run, shard_bytes, snapshot

TOKENS = torch.arange(24).view(2, 12) * 7 % VOCABULARY
TIED: dict[str, Any] = {"tie_word_embeddings": True, "num_hidden_layers": 1}
NAME = "model.embed_tokens"
BITS = 6
# Some layers have one option only, for time.
ALLOCATED = ("--bits", BITS, "--embeddings", "--pin", "mlp=bits:5")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", **TIED)


@pytest.fixture(scope="module")
def hessians(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hessians")


@pytest.fixture(scope="module")
def allocated(
    model: Path, text: Path, hessians: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ran]:
    """The tied model by the default method, its statistics in `hessians`."""
    out = tmp_path_factory.mktemp("allocated") / "out"
    ran = compress(model, out, text, *ALLOCATED, "--hessians", hessians)
    assert ran.code == 0, ran.err
    return out, ran


def rounded(model: Path, out: Path, text: Path, *options: object) -> Ran:
    """By rtn, which is fast."""
    ran = compress(model, out, text, "--method", "rtn", "--bits", BITS, "--embeddings", *options)
    assert ran.code == 0, ran.err
    return ran


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS).logits.double()


# --- laws -----------------------------------------------------------------------------------


def test_a_tied_embedding_is_one_variable_counted_once(
    model: Path, allocated: tuple[Path, Ran]
) -> None:
    out, ran = allocated
    container = open_container(out)
    certificate = json.loads((out / "convex_caldera/certificate.json").read_text())
    groups = {group["name"]: group for group in certificate["curves"]["groups"]}
    assert set(groups) == set(container.layers) == set(container.report()["layers"])
    assert groups[NAME]["weights"] == VOCABULARY * 48 and "lm_head" not in groups
    assert container.report()["embeddings"] == {NAME: ["lookup", "head"]}
    original = load_file(model / "model.safetensors")
    weights = sum(t.numel() for name, t in original.items() if name[:-7] in container.layers)
    assert container.sizes().compressed_weights == ran.json["compressed_weights"] == weights
    assert container.sizes().all_weights == sum(t.numel() for t in original.values())
    row = next(row for row in inspect_directory(out).rows if row["name"] == NAME)
    assert row["bits"] == container.report()["layers"][NAME]["bits"]


def test_files_with_embeddings_are_within_the_budget(allocated: tuple[Path, Ran]) -> None:
    out, ran = allocated
    sizes = shard_bytes(out)
    weights = ran.json["compressed_weights"]
    assert sizes["compressed"] <= ran.json["budget_bytes"] == math.floor(BITS * weights / 8)
    assert ran.json["file_bytes"] == sizes["all"]
    assert ran.json["bits_per_compressed_weight"] == 8 * sizes["compressed"] / weights


def test_both_loaders_decode_embeddings_to_one_plain_weight(allocated: tuple[Path, Ran]) -> None:
    out, _ = allocated
    models = [
        convex_caldera.load(out, dtype=torch.float32),
        from_transformers(out, dtype=torch.float32),
    ]
    assert torch.equal(*map(logits, models))
    expected = open_container(out).layer(NAME).decode()
    for loaded in models:
        lookup, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
        assert type(lookup) is nn.Embedding and type(head) is nn.Linear
        assert lookup.weight is head.weight and torch.equal(lookup.weight, expected)


def test_an_embedding_costs_the_kl_that_is_measured_with_it(
    model: Path, text: Path, allocated: tuple[Path, Ran]
) -> None:
    out, _ = allocated
    certificate = json.loads((out / "convex_caldera/certificate.json").read_text())
    (group,) = (g for g in certificate["curves"]["groups"] if g["name"] == NAME)
    claimed = {o["label"]: o["distortion"] for o in group["options"]}
    windows = convex_caldera.calibrate.token_windows(
        str(text), load_tokenizer(model), NSAMPLES, SEQLEN, 42
    )[round(NSAMPLES * (1 - HELD_OUT)) :]
    reference, changed = from_original(model), from_original(model)
    changed.get_input_embeddings().weight.data = open_container(out).layer(NAME).decode()
    changed.tie_weights()
    with torch.no_grad():
        p, q = (m(windows).logits.double().log_softmax(-1) for m in (reference, changed))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert claimed[certificate["plan"]["choice"][NAME]] == pytest.approx(kl, rel=1e-3)
    assert len(claimed) >= 3 and len(set(claimed.values())) == len(claimed)


def from_original(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


# --- the checker ----------------------------------------------------------------------------


def test_the_checker_weighs_embeddings_and_says_where_it_cannot(
    model: Path, allocated: tuple[Path, Ran], hessians: Path, tmp_path: Path
) -> None:
    out, _ = allocated
    checked = verify(out, model, hessians)
    assert checked.ok, checked.text()
    assert "its statistics were not saved" not in checked.text()
    without = shutil.copytree(hessians, tmp_path / "without")
    shutil.rmtree(without / "embeddings")
    checked = verify(out, model, without)
    assert checked.ok and "its statistics were not saved" in checked.text()


def test_a_flipped_byte_of_an_embedding_is_refused(
    model: Path, allocated: tuple[Path, Ran], hessians: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(allocated[0], tmp_path / "out")
    header, _ = open_container(out).layers[NAME]
    entry = header.entries[f"{NAME}.packed"]
    raw = bytearray(header.path.read_bytes())
    raw[entry.start + 40] ^= 0xFF
    header.path.write_bytes(raw)
    assert not verify(out).ok
    rehash(out)  # a forger would; then the weighted error tells
    assert verify(out).ok and not verify(out, model, hessians).ok


def test_no_other_layer_passes_for_an_embedding(
    model: Path, allocated: tuple[Path, Ran], hessians: Path, tmp_path: Path
) -> None:
    """Neither beside the two uses nor with one of them, where its statistics are known."""
    out = shutil.copytree(allocated[0], tmp_path / "out")
    path = out / "convex_caldera/report.json"
    report = json.loads(path.read_text())
    other = next(name for name in report["layers"] if name.endswith("q_proj"))
    for uses in ({NAME: ["head"], other: ["lookup", "head"]}, {other: []}, {"lm_head": ["head"]}):
        path.write_text(json.dumps({**report, "embeddings": uses}))
        rehash(out)
        assert not verify(out).ok
    path.write_text(json.dumps({**report, "embeddings": {NAME: ["head"], other: ["lookup"]}}))
    rehash(out)
    text = verify(out, model, hessians).text()
    assert f"{len(report['layers'])} layers, sum" in text


def rehash(out: Path) -> None:
    from convex_caldera.storage.files import sha256_of
    from convex_caldera.storage.manifest import read_manifest, write_manifest

    files = read_manifest(out)
    for name in files:
        files[name] = {"sha256": sha256_of(out / name), "size": (out / name).stat().st_size}
    write_manifest(out, files)


# --- options and models ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("gpt_neox", False),
        ("opt", True),
        pytest.param("gemma", True, marks=pytest.mark.slow),
        pytest.param("llama", False, marks=pytest.mark.slow),
    ],
)
def test_families_load_alike_with_compressed_embeddings(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path, family: str, tied: bool
) -> None:
    original = tiny_model(family, tie_word_embeddings=tied, num_hidden_layers=1)
    rounded(original, tmp_path / "out", text)
    container = open_container(tmp_path / "out")
    assert len(container.report()["embeddings"]) == (1 if tied else 2)
    assert not any("position" in name for name in container.layers)
    ours, theirs = (
        convex_caldera.load(tmp_path / "out"),
        from_transformers(tmp_path / "out", dtype=torch.float32),
    )
    assert torch.equal(logits(ours), logits(theirs))
    assert (ours.get_input_embeddings().weight is ours.get_output_embeddings().weight) == tied
    cosine = torch.cosine_similarity(
        logits(ours).flatten(), logits(from_original(original)).flatten(), dim=0
    )
    assert cosine > 0.95
    assert verify(tmp_path / "out", original).ok


def test_pins_and_ignore_reach_embeddings_by_name(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    untied = tiny_model("llama", num_hidden_layers=1)
    rounded(untied, tmp_path / "pinned", text, "--pin", "embed_tokens=bits:3")
    records = open_container(tmp_path / "pinned").report()["layers"]
    assert records[NAME]["nominal_bits"] == 3 < records["lm_head"]["nominal_bits"]
    rounded(untied, tmp_path / "ignored", text, "--ignore", "lm_head")
    kept = open_container(tmp_path / "ignored")
    assert NAME in kept.layers and "lm_head.weight" in kept.rest
    assert torch.equal(
        logits(convex_caldera.load(tmp_path / "ignored")),
        logits(from_transformers(tmp_path / "ignored", dtype=torch.float32)),
    )


def test_a_matrix_that_is_stored_twice_is_written_once(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    twice = shutil.copytree(tiny_model("llama", num_hidden_layers=1), tmp_path / "model")
    tensors = load_file(twice / "model.safetensors")
    tensors["lm_head.weight"] = tensors[f"{NAME}.weight"].clone()
    save_file(tensors, twice / "model.safetensors", {"format": "pt"})
    config = json.loads((twice / "config.json").read_text()) | {"tie_word_embeddings": True}
    (twice / "config.json").write_text(json.dumps(config))
    rounded(twice, tmp_path / "out", text)
    container = open_container(tmp_path / "out")
    assert container.report()["copies"] == {"lm_head.weight": NAME}
    assert "lm_head.weight" not in container.rest and "lm_head" not in container.layers
    loaded = convex_caldera.load(tmp_path / "out")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert verify(tmp_path / "out", twice).ok


def test_a_tied_matrix_that_is_stored_as_the_head_serves_both_uses(
    model: Path, text: Path, tmp_path: Path
) -> None:
    renamed = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(renamed / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop(f"{NAME}.weight")
    save_file(tensors, renamed / "model.safetensors", {"format": "pt"})
    rounded(renamed, tmp_path / "out", text)
    container = open_container(tmp_path / "out")
    assert container.report()["embeddings"] == {"lm_head": ["lookup", "head"]}
    ours, theirs = (
        convex_caldera.load(tmp_path / "out"),
        from_transformers(tmp_path / "out", dtype=torch.float32),
    )
    assert torch.equal(logits(ours), logits(theirs))
    for loaded in (ours, theirs):
        assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert torch.equal(ours.lm_head.weight, container.layer("lm_head").decode())


def test_export_writes_plain_embeddings(
    model: Path, allocated: tuple[Path, Ran], tmp_path: Path
) -> None:
    assert run("export", allocated[0], "-o", tmp_path / "plain", "--dtype", "float32").code == 0
    plain, ours = from_original(tmp_path / "plain"), convex_caldera.load(allocated[0])
    assert torch.equal(plain.get_input_embeddings().weight, ours.get_input_embeddings().weight)
    torch.testing.assert_close(logits(plain), logits(ours), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_interrupted_runs_with_embeddings_end_in_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, allocated: tuple[Path, Ran]
) -> None:
    """Between the fits and the measured KL of an embedding too; shards do not depend on workers."""

    def stop() -> None:
        raise KeyboardInterrupt

    arguments = (*ALLOCATED, "--workers", 1)
    for number in (12, 30):
        with at_file(number, stop):
            assert compress(model, tmp_path / "out", text, *arguments).code != 0
    assert compress(model, tmp_path / "out", text, *arguments).code == 0
    assert snapshot(tmp_path / "out") == snapshot(allocated[0])
