"""Damage of any kind is a false claim, never an exception; and no torch is ever needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.forging.forger import write_manifest
from convex_caldera.certify import verify
from convex_caldera.certify.strict import parse
from convex_caldera.errors import FormatError
from tests.certify.making import make
from tests.examples import examples

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hostile") / "x", seed=4, blocks=1)


@pytest.fixture
def copy(honest, tmp_path):
    shutil.copytree(honest.output, tmp_path / "out")
    return tmp_path / "out"


def edit(path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


def rejected(output, *data) -> str:
    found = verify(output, *data)
    assert not found.ok, found.text()
    assert found.text().isascii()
    return found.claims[-1].value


DEEP = "[" * 200_000 + "]" * 200_000
TEXTS = {
    "deep": DEEP,
    "nested": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "nan": '{"version": 1, "files": NaN}',
    "overflow": '{"version": 1, "files": 1e999}',
    "digits": '{"version": ' + "9" * 10_000 + "}",
    "repeated": '{"version": 1, "version": 1, "files": {}}',
    "not utf-8": b"\xff\xfe{}",
    "surrogate": '{"\\ud800": 1}',
    "empty": "",
    "list": "[]",
    "number": "1",
}
FILES = [
    "config.json",
    "model.safetensors.index.json",
    "convex_caldera/manifest.json",
    "convex_caldera/report.json",
    "convex_caldera/provenance.json",
    "convex_caldera/certificate.json",
    "convex_caldera/recipe.toml",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("file", FILES)
def test_hostile_text_is_a_false_claim(copy, honest, file, text):
    value = TEXTS[text]
    (copy / file).write_bytes(value if isinstance(value, bytes) else value.encode())
    if "manifest" not in file:
        write_manifest(copy)
    rejected(copy, honest.model, honest.hessians)


@pytest.mark.parametrize("text", TEXTS)
def test_hostile_metadata_is_a_false_claim(copy, text):
    shard = next(copy.glob("model-compressed-*"))
    value = TEXTS[text]
    raw = value if isinstance(value, bytes) else value.encode()
    shard.write_bytes(len(raw).to_bytes(8, "little") + raw)
    write_manifest(copy)
    rejected(copy)


def with_header(shard, change) -> None:
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def _record(header, change):
    record = json.loads(header["__metadata__"]["convex_caldera"])
    change(record)
    header["__metadata__"]["convex_caldera"] = json.dumps(record)


HUGE = 2**31 - 1
METADATA = {
    "huge shape": lambda r: r["schemes"][0].__setitem__(slice(0, 2), [HUGE, HUGE]),
    "negative shape": lambda r: r["schemes"][0].__setitem__(0, -16),
    "boolean shape": lambda r: r["schemes"][0].__setitem__(0, True),
    "no terms": lambda r: r["schemes"][0].__setitem__(3, []),
    "term of terms": lambda r: r["schemes"][0].__setitem__(3, [[[[[1]]]]]),
    "record beyond": lambda r: r["schemes"][0].__setitem__(3, [99]),
    "record of another role": lambda r: r["schemes"][0].__setitem__(2, r["schemes"][0][3]),
    "unused record": lambda r: r["records"].append({"kind": "permute"}),
    "unknown kind": lambda r: r["records"][0].update(kind="pickle"),
    "unknown option": lambda r: r["records"][0].update(more=1),
    "missing option": lambda r: r["records"][-1].popitem(),
    "layer beyond": lambda r: r["layers"].__setitem__(0, 10**30),
    "layers by name": lambda r: r.update(layers={"a": 0}),
    "version": lambda r: r.update(version=True),
    "text for a list": lambda r: r.update(schemes="schemes"),
}


@pytest.mark.parametrize("name", METADATA)
def test_hostile_layer_description_is_a_false_claim(copy, name):
    shard = next(copy.glob("model-compressed-*"))
    with_header(shard, lambda header: _record(header, METADATA[name]))
    write_manifest(copy)
    rejected(copy)


def test_names_that_leave_the_directory_are_refused(copy, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    for name in ("../secret.json", "/etc/passwd", "a//b", "./a", "a\\b", "c:d", "a\x00b"):
        manifest = copy / "convex_caldera" / "manifest.json"
        files = json.loads(manifest.read_text())["files"]
        files[name] = {"sha256": "0" * 64, "size": 2}
        text = json.dumps({"files": files, "version": 1}, indent=1, sort_keys=True) + "\n"
        manifest.write_text(text)
        assert "unsafe" in rejected(copy)
    write_manifest(copy)
    edit(copy / "model.safetensors.index.json", weight_map={"a": "../model.safetensors"})
    write_manifest(copy)
    assert "shard" in rejected(copy)


def test_links_and_strange_files_are_refused(copy, tmp_path):
    (copy / "folder").symlink_to(tmp_path, target_is_directory=True)
    assert "link" in rejected(copy)
    (copy / "folder").unlink()
    os.mkfifo(copy / "pipe")
    rejected(copy)  # must not wait for a writer
    (copy / "pipe").unlink()
    (copy / "model-rest-00009-of-00009.safetensors").write_bytes(b"")
    assert "not listed" in rejected(copy)


def test_damaged_model_and_statistics_are_false_claims(copy, honest, tmp_path):
    rejected(copy, tmp_path / "absent", honest.hessians)
    rejected(copy, honest.model, tmp_path / "absent")
    for file in ("calibration.json", "block-00000.safetensors"):
        damaged = tmp_path / file.split(".")[0]
        shutil.copytree(honest.hessians, damaged)
        raw = (damaged / file).read_bytes()
        (damaged / file).write_bytes(raw[: len(raw) // 2])
        rejected(copy, honest.model, damaged)
    index = tmp_path / "other"
    shutil.copytree(honest.hessians, index)
    record = json.loads((index / "calibration.json").read_text())
    record["provenance"]["model"] = "0" * 64
    (index / "calibration.json").write_text(json.dumps(record))
    assert "another model" in rejected(copy, honest.model, index)


@given(st.data())
@examples(60)
def test_any_altered_byte_is_noticed(honest, data):
    files = sorted(p for p in honest.output.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    raw = path.read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    changed = bytearray(raw)
    changed[at] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(bytes(changed))
        assert not verify(honest.output).ok
    finally:
        path.write_bytes(raw)


@given(st.data())
@examples(60)
def test_no_altered_header_escapes_as_an_exception(honest, data):
    """The attacker repairs the manifest; what the reader then makes of it must be a verdict."""
    shard = next(honest.output.glob("model-compressed-*"))
    manifest = honest.output / "convex_caldera" / "manifest.json"
    raw, listed = shard.read_bytes(), manifest.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    changed = bytearray(raw)
    changed[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    try:
        shard.write_bytes(bytes(changed))
        write_manifest(honest.output)
        verify(honest.output)
    finally:
        shard.write_bytes(raw)
        manifest.write_bytes(listed)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
@examples(60)
def test_parsing_gives_the_value_or_a_format_error(value):
    text = json.dumps(value).encode()
    try:
        assert parse(text, "x") == value
    except FormatError:
        assert "NaN" in text.decode() or "Infinity" in text.decode()


def test_verification_runs_where_torch_cannot_be_imported(honest):
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        room = name.removeprefix("convex_caldera.").split(".")[0]
        ours = name.startswith("convex_caldera.") and room not in ("certify", "errors", "runtime")
        if ours or name.split(".")[0] in ("torch", "scipy", "numba", "transformers", "cvxpy"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from convex_caldera.certify import verify
from tests.examples import examples
found = verify({str(honest.output)!r}, {str(honest.model)!r}, {str(honest.hessians)!r})
print(found.text())
assert found.ok
"""
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
