"""The list of all files of an output directory with sizes and hashes.

The manifest is itself in one canonical form, so that any altered byte of any file, the manifest
included, is noticed. Hidden files at the top (".gitattributes", ".cache") are not ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from convex_caldera.errors import FormatError
from convex_caldera.storage.files import inside, sha256_of, write_atomically
from convex_caldera.storage.shard import parse_json

FOLDER = "convex_caldera"
MANIFEST = f"{FOLDER}/manifest.json"
MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 10_000_000

Files = dict[str, dict[str, Any]]  # relative POSIX name -> {"sha256": hex, "size": bytes}


def write_manifest(directory: Path, files: Files) -> None:
    """Write the manifest for files that are already in place."""
    write_atomically(directory / MANIFEST, [_canonical(files)])


def read_manifest(directory: Path) -> Files:
    """The manifest of a directory, checked in itself but not against the files.

    Raises FormatError if it is missing, malformed, not in canonical form, of another version, or
    names a file outside the directory.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise FormatError(f"{directory.name}: no {MANIFEST}; not a finished output directory")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise FormatError(f"{MANIFEST}: larger than {MAX_MANIFEST_BYTES} bytes")
    raw = path.read_bytes()
    manifest = parse_json(raw, MANIFEST)
    if not isinstance(manifest, dict) or set(manifest) != {"files", "version"}:
        raise FormatError(f"{MANIFEST}: needs exactly files and version")
    if type(manifest["version"]) is not int or manifest["version"] != MANIFEST_VERSION:
        raise FormatError(f"{MANIFEST}: version {manifest['version']!r}, not {MANIFEST_VERSION}")
    files = manifest["files"]
    if not isinstance(files, dict) or MANIFEST in files:
        raise FormatError(f"{MANIFEST}: files must be a table of all files but itself")
    for name, entry in files.items():
        inside(directory, name)
        _check_entry(name, entry)
    if raw != _canonical(files):
        raise FormatError(f"{MANIFEST}: not in canonical form; it was altered")
    return files


def check_manifest(directory: Path) -> Files:
    """Compare every file of a directory with the manifest; returns the manifest's files.

    Raises FormatError for the first file that is missing, unlisted, or of another size or hash.

    Cost: one SHA-256 over all files.
    """
    files = read_manifest(directory)
    present = set(listed_files(directory)) - {MANIFEST}
    for name in sorted(present - set(files)):
        raise FormatError(f"{name}: not listed in {MANIFEST}; remove it")
    for name, entry in sorted(files.items()):
        path = inside(directory, name)
        if not path.is_file():
            raise FormatError(f"{name}: listed in {MANIFEST} but missing; fetch it again")
        size = path.stat().st_size
        if size != entry["size"]:
            raise FormatError(f"{name}: {size} bytes, not {entry['size']}: truncated or altered")
        if sha256_of(path) != entry["sha256"]:
            raise FormatError(f"{name}: SHA-256 differs from {MANIFEST}: altered or damaged")
    return files


def add_file(directory: Path, name: str, chunks: Iterable[bytes]) -> None:
    """Add or replace one file below `convex_caldera/` and list it in the manifest.

    Raises FormatError if the name is unsafe or elsewhere, or the manifest is not in order.
    """
    if not name.startswith(FOLDER + "/") or name == MANIFEST:
        raise FormatError(f"{name!r}: only files below {FOLDER}/ may be added")
    files = read_manifest(directory)
    path = inside(directory, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = write_atomically(path, chunks)
    files[name] = {"sha256": digest, "size": path.stat().st_size}
    write_manifest(directory, files)


def listed_files(directory: Path) -> list[str]:
    """Relative names of all files that a manifest must list, and the manifest's own."""
    names = (p.relative_to(directory) for p in directory.rglob("*") if not p.is_dir())
    return sorted(name.as_posix() for name in names if not name.parts[0].startswith("."))


def _check_entry(name: str, entry: Any) -> None:
    if not isinstance(entry, dict) or set(entry) != {"sha256", "size"}:
        raise FormatError(f"{MANIFEST}: {name!r} needs exactly sha256 and size")
    digest, size = entry["sha256"], entry["size"]
    hexadecimal = isinstance(digest, str) and len(digest) == 64
    if not hexadecimal or set(digest) - set("0123456789abcdef"):
        raise FormatError(f"{MANIFEST}: {name!r} has a malformed hash")
    if type(size) is not int or size < 0:
        raise FormatError(f"{MANIFEST}: {name!r} has a malformed size")


def _canonical(files: Mapping[str, Any]) -> bytes:
    manifest = {"files": files, "version": MANIFEST_VERSION}
    return json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n"
