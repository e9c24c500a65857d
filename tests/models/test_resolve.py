"""A name becomes a directory or one clear error."""

from __future__ import annotations

import pytest

from convex_caldera.errors import ModelError
from convex_caldera.models.resolve import resolve_model


def test_resolve_local_directory_is_itself(tiny_model):
    path = tiny_model("llama")
    assert resolve_model(path) == path
    assert resolve_model(str(path)) == path


def test_resolve_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"pickled.*pytorch_model\.bin"):
        resolve_model(tmp_path)


def test_resolve_directory_without_config_or_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "has space", ""])
def test_resolve_missing_path_never_asks_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", _fail)
    with pytest.raises(ModelError, match="is not a directory"):
        resolve_model(name)


def test_resolve_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(file)


def test_resolve_offline_hub_id_is_a_clear_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        resolve_model("owner/never-downloaded-here")


def test_resolve_hub_fetches_no_code_and_no_pickles(tiny_model, monkeypatch):
    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(tiny_model("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("owner/name@v1") == tiny_model("llama")
    assert (asked["repository"], asked["revision"]) == ("owner/name", "v1")
    assert not any(p.endswith((".py", ".bin", ".pt", "*")) for p in asked["allow_patterns"])


def _fail(*_, **__):
    raise AssertionError("asked the hub")
