"""A whole output directory: written, read back, resumed, refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from convex_caldera.errors import FormatError, InterruptedRunError, ModelError, ResumeError
from convex_caldera.storage import (
    PartialRun,
    SourceModel,
    add_file,
    export_dense,
    open_container,
    read_layers,
    require_free_space,
)
from convex_caldera.storage import files as storage_files
from convex_caldera.storage.layers import LayerEntry, planned_shard_bytes
from convex_caldera.storage.manifest import MANIFEST, read_manifest
from convex_caldera.storage.spec import spec_layout
from convex_caldera.storage.write import config_with_quantization
from tests.storage.making import (
    FINGERPRINT,
    RECIPES,
    fill,
    finish,
    linear_names,
    make_layer,
    make_output,
)


def tree_hash(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(path.relative_to(directory).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Path:
    return tiny_model("llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def output(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_output(model, tmp_path_factory.mktemp("output") / "out").directory


def test_every_layer_reads_back_as_it_was_made(model: Path, output: Path) -> None:
    source = SourceModel(model)
    names = linear_names(source)
    found = dict(read_layers(output))
    assert sorted(found) == names
    for index, name in enumerate(names):
        W = source.checkpoint.tensor(f"{name}.weight")
        made = make_layer(W, RECIPES[index % len(RECIPES)])
        assert torch.equal(found[name].decode(), made.decode())


def test_everything_else_is_copied_byte_for_byte(model: Path, output: Path) -> None:
    source, container = SourceModel(model), open_container(output)
    assert set(container.rest) == {info.name for info in source.rest(linear_names(source))}
    for name in container.rest:
        stored = source.checkpoint.tensor(name)
        assert container.tensor(name).dtype == stored.dtype
        assert torch.equal(container.tensor(name), stored)
    for name, path in source.side_files().items():
        assert (output / name).read_bytes() == path.read_bytes()
    assert "tokenizer.json" in source.side_files()


def test_config_keeps_its_text(model: Path, output: Path) -> None:
    original = (model / "config.json").read_text().rstrip()
    text = (output / "config.json").read_text()
    assert text.startswith(original[:-1].rstrip())
    ours = json.loads(text)
    assert ours.pop("quantization_config") == {
        "quant_method": "convex_caldera",
        "format_version": 1,
    }
    assert ours == json.loads(original)


@pytest.mark.parametrize("text", ["{}", '{"a": 1}\n', '{"a": 1, "quantization_config": null}'])
def test_config_text_stays_json(text: str) -> None:
    result = json.loads(config_with_quantization(text, json.loads(text)))
    assert result.pop("quantization_config")["quant_method"] == "convex_caldera"
    assert result == {k: v for k, v in json.loads(text).items() if v is not None}


def test_bits_are_bytes_of_files(output: Path) -> None:
    sizes = open_container(output).sizes()
    compressed = sum(p.stat().st_size for p in output.glob("model-compressed-*.safetensors"))
    rest = sum(p.stat().st_size for p in output.glob("model-rest-*.safetensors"))
    assert (sizes.compressed_bytes, sizes.rest_bytes) == (compressed, rest)
    assert sizes.bits_per_compressed_weight == compressed * 8 / sizes.compressed_weights
    assert sizes.file_bytes == compressed + rest
    source = SourceModel(output.parent / "none")  # totals come from the files alone
    assert source.directory.name == "none"


def test_planned_size_is_the_size_on_disk(output: Path) -> None:
    container = open_container(output)
    entries = [LayerEntry(n, s, spec_layout(s)) for n, (_, s) in container.layers.items()]
    assert planned_shard_bytes(entries) == container.sizes().compressed_bytes


def test_same_input_same_bytes(model: Path, output: Path, tmp_path: Path) -> None:
    source = SourceModel(model)
    names = linear_names(source)
    run = PartialRun(tmp_path / "out", FINGERPRINT)
    made = {
        n: make_layer(source.checkpoint.tensor(f"{n}.weight"), RECIPES[i % 4])
        for i, n in enumerate(names)
    }
    for name in reversed(names):  # any order of completion
        run.put(name, made[name], {"loss": float(names.index(name))})
    finish(run, source, names)
    assert tree_hash(tmp_path / "out") == tree_hash(output)


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_killed_run_resumes_to_the_same_bytes(
    model: Path, output: Path, tmp_path: Path, kept: int
) -> None:
    source, out = SourceModel(model), tmp_path / "out"
    names = linear_names(source)
    run = PartialRun(out, FINGERPRINT)
    fill(run, source, RECIPES, names[:0])
    for index, name in enumerate(names[:kept]):
        W = source.checkpoint.tensor(f"{name}.weight")
        run.put(name, make_layer(W, RECIPES[index % 4]), {"loss": float(index)})
    run.close()  # as the system does for a killed process; nothing else is flushed
    journal = out / ".partial" / "layers.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"name": "torn li')
    (out / ".partial" / "layers" / "x.safetensors.tmp").write_bytes(b"half")
    run = PartialRun(out, FINGERPRINT)
    assert run.done() == set(names[:kept]) == run.resumed
    fill(run, source, RECIPES, names)
    finish(run, source, names)
    assert tree_hash(out) == tree_hash(output)


def test_damaged_artefact_is_done_again(model: Path, tmp_path: Path) -> None:
    source, out = SourceModel(model), tmp_path / "out"
    names = linear_names(source)
    with PartialRun(out, FINGERPRINT) as run:
        fill(run, source, RECIPES, names[:3])
        damaged = run.artefact(names[1])
    raw = bytearray(damaged.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(raw)
    with PartialRun(out, FINGERPRINT) as run:
        assert run.redone == [names[1]]
        assert run.done() == {names[0], names[2]}
        assert run.record(names[0]) == {"loss": 0.0}
        assert torch.equal(
            run.get(names[0]).decode(),
            make_layer(source.checkpoint.tensor(f"{names[0]}.weight"), RECIPES[0]).decode(),
        )
        with pytest.raises(ResumeError, match="not finished"):
            run.get(names[1])


@pytest.mark.parametrize("part", ["model", "text", "recipe", "format_version", "new"])
def test_changed_fingerprint_is_refused_by_name(tmp_path: Path, part: str) -> None:
    PartialRun(tmp_path / "out", FINGERPRINT).close()
    if part == "format_version":
        path = tmp_path / "out" / ".partial" / "fingerprint.json"
        stored = json.loads(path.read_text())
        path.write_text(json.dumps({**stored, "format_version": "0"}))
        changed = FINGERPRINT
    else:
        changed = {**FINGERPRINT, part: "other"}
    with pytest.raises(ResumeError, match=part):
        PartialRun(tmp_path / "out", changed)


def test_second_process_in_one_directory_is_refused(tmp_path: Path) -> None:
    with (
        PartialRun(tmp_path / "out", FINGERPRINT),
        pytest.raises(ResumeError, match="another process"),
    ):
        PartialRun(tmp_path / "out", FINGERPRINT)
    PartialRun(tmp_path / "out", FINGERPRINT).close()


def test_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ResumeError, match="not empty"):
        PartialRun(tmp_path, FINGERPRINT)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    with pytest.raises(ResumeError, match="is a file"):
        PartialRun(tmp_path / "thesis.tex", FINGERPRINT)


def test_full_disk_keeps_what_is_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = SourceModel(model), tmp_path / "out"
    names = linear_names(source)
    run = PartialRun(out, FINGERPRINT)
    fill(run, source, RECIPES, names[:2])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage_files.os, "fsync", full)
        with pytest.raises(InterruptedRunError, match="disk full"):
            fill(run, source, RECIPES, names[:3])
    run.close()
    run = PartialRun(out, FINGERPRINT)
    assert run.done() == set(names[:2])
    fill(run, source, RECIPES, names)
    with monkeypatch.context() as patch:
        patch.setattr(storage_files.os, "fsync", full)
        with pytest.raises(InterruptedRunError, match="disk full"):
            finish(run, source, names)
    assert not list(out.glob("*.tmp"))
    assert finish(run, source, names).directory == out  # the last step can simply be repeated


def test_missing_space_is_said_up_front(tmp_path: Path) -> None:
    require_free_space(tmp_path, 1)
    with pytest.raises(InterruptedRunError, match="GB are free"):
        require_free_space(tmp_path / "not" / "yet", 1 << 60)


def test_layers_must_be_in_the_source(model: Path, tmp_path: Path) -> None:
    source = SourceModel(model)
    run = PartialRun(tmp_path / "out", FINGERPRINT)
    name = linear_names(source)[0]
    run.put(name, make_layer(torch.randn(8, 16), RECIPES[0]), {})
    with pytest.raises(ModelError, match="compressed as"):
        finish(run, source, [name])
    run.put("nowhere", make_layer(torch.randn(8, 16), RECIPES[0]), {})
    with pytest.raises(ModelError, match="nowhere"):
        finish(run, source, ["nowhere"])


def test_small_shards_hold_the_same(model: Path, output: Path, tmp_path: Path) -> None:
    container = make_output(model, tmp_path / "out", max_shard_bytes=9_000)
    assert len(list(container.directory.glob("model-compressed-*"))) > 1
    assert len(list(container.directory.glob("model-rest-*"))) > 1
    for (name, layer), (other, same) in zip(
        read_layers(output), read_layers(container.directory), strict=True
    ):
        assert name == other and torch.equal(layer.decode(), same.decode())


def test_added_file_is_listed(model: Path, tmp_path: Path) -> None:
    out = make_output(model, tmp_path / "out").directory
    add_file(out, "convex_caldera/certificate.json", [b"{}\n"])
    assert "convex_caldera/certificate.json" in read_manifest(out)
    open_container(out)
    for name in ("config.json", "convex_caldera/../x", MANIFEST):
        with pytest.raises(FormatError):
            add_file(out, name, [b"{}"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_export_is_a_plain_model(output: Path, tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    export_dense(output, tmp_path / "dense", dtype)
    plain, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, layer in read_layers(output):
        weight = plain.get_submodule(name).weight
        assert torch.equal(weight, layer.decode().to(getattr(torch, dtype)))


def test_artefacts_name_no_place_or_person(output: Path) -> None:
    private = [str(output), os.path.expanduser("~"), "/work", "/tmp", os.uname().nodename]
    for path in output.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            assert not [word for word in private if len(word) > 3 and word.encode() in raw], path
