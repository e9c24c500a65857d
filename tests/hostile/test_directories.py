"""A thousand seeded ways to spoil an output directory: every one refused with FormatError."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from convex_caldera.errors import FormatError
from convex_caldera.storage import read_layers
from convex_caldera.storage.manifest import MANIFEST, listed_files, write_manifest
from tests.hostile.mutations import BLIND, SEALED, Changes, Files, Mutator
from tests.storage.making import make_output

# flips and edits have many variants, the rest few: 1000 in all
ROUNDS: Counter[str] = Counter(
    dict.fromkeys([*BLIND, *SEALED], 26)
    | {"flip_bit": 150, "edit_metadata": 150, "edit_entry": 100, "edit_manifest": 54}
)


class Directory:
    """An output directory that can be changed and put back."""

    def __init__(self, path: Path):
        self.path = path
        self.files: Files = {name: (path / name).read_bytes() for name in listed_files(path)}

    def change(self, changes: Changes, seal: bool) -> None:
        for name, content in changes.items():
            path = self.path / name
            if content is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        if seal:
            names = set(listed_files(self.path)) - {MANIFEST}
            raw = {name: (self.path / name).read_bytes() for name in sorted(names)}
            write_manifest(
                self.path,
                {
                    name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
                    for name, content in raw.items()
                },
            )

    def restore(self) -> None:
        for name in listed_files(self.path):
            if name not in self.files:
                (self.path / name).unlink()
        for name, content in self.files.items():
            path = self.path / name
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)


@pytest.fixture(scope="module")
def directory(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Directory:
    model = tiny_model("llama", hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    return Directory(make_output(model, tmp_path_factory.mktemp("hostile") / "out").directory)


def read_everything(path: Path, verify: bool = True) -> None:
    for _, layer in read_layers(path, verify):
        layer.decode()


def test_there_are_a_thousand() -> None:
    assert ROUNDS.total() >= 1000


def test_untouched_directory_is_read(directory: Directory) -> None:
    read_everything(directory.path)


@pytest.mark.parametrize("share", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*BLIND, *SEALED])
def test_spoiled_directory_is_refused(name: str, share: int, directory: Directory) -> None:
    mutate: Mutator = {**BLIND, **SEALED}[name]
    accepted = []
    for seed in range(0, ROUNDS[name], share):
        changes = mutate(random.Random(f"{name} {seed}"), directory.files)
        if all(directory.files.get(file) == content for file, content in changes.items()):
            continue
        try:
            directory.change(changes, seal=name in SEALED)
            read_everything(directory.path)
            accepted.append(seed)
        except FormatError:
            pass
        finally:
            directory.restore()
    assert not accepted


@pytest.mark.parametrize("name", ["edit_entry", "edit_metadata", "truncate_shard", "edit_index"])
def test_structure_is_checked_without_hashes(name: str, directory: Directory) -> None:
    for seed in range(40):
        changes = SEALED[name](random.Random(f"{name} {seed}"), directory.files)
        directory.change(changes, seal=False)
        try:
            with pytest.raises(FormatError):
                read_everything(directory.path, verify=False)
        finally:
            directory.restore()
