"""Work in progress: every finished layer is on disk at once, and survives a kill -9.

OUT/.partial/ holds
    fingerprint.json     what this run depends on: model, text, recipe, format version
    layers.jsonl         one line per finished layer: name, file, SHA-256, record
    layers/*.safetensors one small shard per layer
    lock                 held while a process works here

A layer's file is written and renamed before its line; a line is only believed if it parses and
its file has the hash it gives. Whatever fails this test is forgotten, and the layer done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch import Tensor

from convex_caldera.core.terms import CompressedLayer
from convex_caldera.errors import FormatError, ResumeError
from convex_caldera.recipes.records import canonical_json
from convex_caldera.storage.codec import layer_to_tensors, lent_decoder
from convex_caldera.storage.files import (
    TEMPORARY,
    disk_full_as_error,
    sha256_of,
    write_atomically,
)
from convex_caldera.storage.layers import FORMAT_VERSION, LayerEntry, layer_specs, plan_shards
from convex_caldera.storage.read import read_layer
from convex_caldera.storage.shard import (
    describe,
    parse_json,
    read_header,
    read_tensor,
    tensor_bytes,
    write_shard,
)
from convex_caldera.storage.spec import PACKED, Spec

PARTIAL = ".partial"


class PartialRun:
    """A resumable run into the directory `out`.

    Args:
        out: output directory; created if missing. It must be empty or hold a partial run.
        fingerprint: name -> hash of everything the result depends on, such as {"model": ...,
            "text": ..., "recipe": ...}; the format version is added here.

    Attributes:
        resumed: layers that were already there when the run was opened.
        redone: layers whose stored artefact was damaged; they count as not done.

    Raises:
        ResumeError: the directory holds something else, a run with another fingerprint (the
            message says which parts differ), or another process is at work in it.
        InterruptedRunError: the disk is full.
    """

    def __init__(self, out: Path | str, fingerprint: Mapping[str, str]):
        self.out = Path(out)
        self.folder = self.out / PARTIAL
        _check_empty_or_partial(self.out, self.folder)
        with disk_full_as_error(self.out):
            (self.folder / "layers").mkdir(parents=True, exist_ok=True)
        self._lock: IO[bytes] | None = _lock(self.folder / "lock")
        try:
            self._check_fingerprint({**fingerprint, "format_version": str(FORMAT_VERSION)})
            self._lines, self.redone = self._load()
            self.resumed = frozenset(self._lines)
            self._rewrite()
        except BaseException:
            self.close()
            raise

    def done(self) -> set[str]:
        """Names of the layers that are finished and intact."""
        return set(self._lines)

    def put(self, name: str, layer: CompressedLayer, record: Mapping[str, Any]) -> None:
        """Store a finished layer and its report record (plain JSON values), durably.

        Raises InterruptedRunError if the disk is full; layers stored before are kept.
        """
        spec, tensors = layer_to_tensors(layer)
        layout = {field: (t.dtype, tuple(t.shape)) for field, t in tensors.items()}
        (plan,) = plan_shards([LayerEntry(name, spec, layout)])
        by_name = {describe(f"{name}.{f}", t).name: t for f, t in tensors.items()}
        file = f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"
        digest = write_shard(
            self.folder / "layers" / file,
            plan.infos,
            plan.metadata,
            lambda info: tensor_bytes(by_name[info.name]),
        )
        line = {"name": name, "file": file, "sha256": digest, "record": dict(record)}
        self._append(line)
        self._lines[name] = line

    def get(self, name: str) -> CompressedLayer:
        """A stored layer. Raises ResumeError if it is not there, FormatError if damaged."""
        header = read_header(self.artefact(name))
        return read_layer(header, name, layer_specs(header)[name], self.lend)

    def lend(self, name: str) -> Mapping[str, Tensor]:
        """The decoder that a stored layer has for others."""
        header = read_header(self.artefact(name))
        return lent_decoder(layer_specs(header)[name], read_tensor(header, f"{name}.{PACKED}"))

    def record(self, name: str) -> dict[str, Any]:
        """The report record that was stored with a layer."""
        return self._line(name)["record"]

    def spec(self, name: str) -> Spec:
        """The spec of a stored layer."""
        return layer_specs(read_header(self.artefact(name)))[name]

    def artefact(self, name: str) -> Path:
        """The file that holds a stored layer."""
        return self.folder / "layers" / self._line(name)["file"]

    def close(self) -> None:
        """Let other processes work here; everything stays on disk."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def discard(self) -> None:
        """Remove the partial run: the output is complete, or no longer wanted."""
        self.close()
        gone = self.out / (PARTIAL + TEMPORARY)
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(self.folder, gone)  # in one step: never half a run under its own name
        shutil.rmtree(gone)

    def __enter__(self) -> PartialRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _line(self, name: str) -> dict[str, Any]:
        if name not in self._lines:
            raise ResumeError(f"layer {name!r} is not finished in {self.out.name}")
        return self._lines[name]

    def _check_fingerprint(self, fingerprint: dict[str, str]) -> None:
        path = self.folder / "fingerprint.json"
        if not path.exists():
            write_atomically(path, [canonical_json(fingerprint).encode()])
            return
        try:
            stored = parse_json(path.read_bytes(), path.name)
        except FormatError as error:
            raise ResumeError(
                f"{self.out.name}: {error}; remove {PARTIAL} to start anew"
            ) from error
        keys = sorted(set(stored) | set(fingerprint))
        changed = [key for key in keys if stored.get(key) != fingerprint.get(key)]
        if changed:
            raise ResumeError(
                f"{self.out.name} holds a partial run with another {', '.join(changed)}; "
                f"restore what changed, choose another output directory, or remove {PARTIAL}"
            )

    def _load(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        lines: dict[str, dict[str, Any]] = {}
        damaged: set[str] = set()
        journal = self.folder / "layers.jsonl"
        for text in journal.read_bytes().splitlines() if journal.exists() else []:
            line = _parse_line(text)
            if line is None:
                continue  # torn by a crash, or altered: the layer is simply not done
            if self._intact(line):
                lines[line["name"]] = line
                damaged.discard(line["name"])
            else:
                lines.pop(line["name"], None)
                damaged.add(line["name"])
        return lines, sorted(damaged)

    def _intact(self, line: dict[str, Any]) -> bool:
        path = self.folder / "layers" / Path(line["file"]).name
        return path.is_file() and sha256_of(path) == line["sha256"]

    def _rewrite(self) -> None:
        """The journal with its good lines only, and no left-over temporary files."""
        text = "".join(canonical_json(line) + "\n" for line in self._lines.values())
        write_atomically(self.folder / "layers.jsonl", [text.encode()])
        for path in (self.folder / "layers").glob("*" + TEMPORARY):
            path.unlink()

    def _append(self, line: dict[str, Any]) -> None:
        path = self.folder / "layers.jsonl"
        size = path.stat().st_size
        with disk_full_as_error(path):
            try:
                with open(path, "ab") as file:
                    file.write(canonical_json(line).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(path, size)  # no torn line before the next one
                raise


def _parse_line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or set(line) != {"name", "file", "sha256", "record"}:
        return None
    if not all(isinstance(line[key], str) for key in ("name", "file", "sha256")):
        return None
    return line if isinstance(line["record"], dict) else None


def _check_empty_or_partial(out: Path, folder: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ResumeError(f"{out.name} is a file; the output must be a directory")
    if out.is_dir() and not folder.is_dir() and any(out.iterdir()):
        raise ResumeError(
            f"{out.name} is not empty and holds no partial run; choose another output directory"
        )


def _lock(path: Path) -> IO[bytes]:
    """Hold `path` exclusively until closed; the system releases it when the process dies."""
    file = open(path, "ab")  # noqa: SIM115 -- stays open for as long as the run
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ResumeError(f"another process is at work in {path.parent.parent.name}") from error
    return file
