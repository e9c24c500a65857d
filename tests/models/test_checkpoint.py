"""Laws of reading safetensors checkpoints."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from convex_caldera.errors import FormatError, ModelError
from convex_caldera.models.checkpoint import INDEX, SINGLE, Checkpoint, hash_file


@pytest.fixture
def single(tmp_path):
    save_file(
        {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
        tmp_path / SINGLE,
    )
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def sharded(tiny_model, tmp_path):
    """A copy of a sharded model, free to be damaged."""
    return shutil.copytree(tiny_model("llama", shard="64KB"), tmp_path / "copy")


def test_checkpoint_reads_what_was_saved(single):
    checkpoint = Checkpoint(single)
    assert checkpoint.names == ("a.weight", "b")
    assert checkpoint.shapes() == {"a.weight": (2, 3), "b": (4,)}
    assert checkpoint.dtypes() == {"a.weight": torch.float32, "b": torch.bfloat16}
    assert torch.equal(checkpoint.tensor("a.weight"), torch.arange(6.0).view(2, 3))
    assert "b" in checkpoint and "c" not in checkpoint
    assert checkpoint.stored_bytes == (single / SINGLE).stat().st_size


def test_checkpoint_shards_hold_the_same_tensors_as_one_file(tiny_model):
    whole, sharded = Checkpoint(tiny_model("llama")), Checkpoint(tiny_model("llama", shard="64KB"))
    assert len(sharded.files) > 2 and len(whole.files) == 1
    assert whole.shapes() == sharded.shapes()
    for name in whole.names:
        assert torch.equal(whole.tensor(name), sharded.tensor(name))


def test_checkpoint_tensor_does_not_change_with_the_file(single):
    checkpoint = Checkpoint(single)
    before = checkpoint.tensor("a.weight")
    before += 1
    assert torch.equal(checkpoint.tensor("a.weight"), before - 1)


def test_checkpoint_fingerprint_changes_with_one_weight(single, tmp_path):
    first = Checkpoint(single).fingerprint
    assert Checkpoint(single).fingerprint == first
    tensors = load_file(single / SINGLE)
    tensors["b"][0] = 2.0
    save_file(tensors, single / SINGLE)
    assert Checkpoint(single).fingerprint != first
    assert Checkpoint(single).file_hashes[SINGLE] == hash_file(single / SINGLE)


def test_checkpoint_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match="neither"):
        Checkpoint(tmp_path)


def test_checkpoint_unknown_tensor_is_named(single):
    with pytest.raises(ModelError, match=r"no\.such"):
        Checkpoint(single).tensor("no.such")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_checkpoint_truncated_file_is_refused(single, keep):
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content[:keep])
    with pytest.raises(FormatError, match="truncated or damaged"):
        Checkpoint(single)


def _edit(index, change):
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def test_checkpoint_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FormatError, match=shard.name):
        Checkpoint(sharded)


def test_checkpoint_index_must_agree_with_shards(sharded):
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    index = sharded / INDEX
    weights = json.loads(index.read_text())["weight_map"]
    name = next(name for name, file in weights.items() if file == files[0])
    _edit(index, lambda content: content["weight_map"].update({name: files[1]}))
    with pytest.raises(FormatError, match="says that"):
        Checkpoint(sharded)


def test_checkpoint_tensor_outside_the_index_is_refused(single, tmp_path):
    (single / SINGLE).rename(single / "part.safetensors")
    (single / INDEX).write_text(json.dumps({"weight_map": {"b": "part.safetensors"}}))
    with pytest.raises(FormatError, match=r"'a\.weight' is in a shard but not in"):
        Checkpoint(single)


def test_checkpoint_index_must_not_leave_the_folder(sharded):
    _edit(sharded / INDEX, lambda c: c["weight_map"].update({"x": "../secret.safetensors"}))
    with pytest.raises(FormatError, match="not a file of this folder"):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', "\udcff"])
def test_checkpoint_damaged_index_is_refused(sharded, text):
    (sharded / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError):
        Checkpoint(sharded)
