"""Files that are either wholly there or not there at all, and the disk they need.

Every write goes to a temporary name in the same directory, is flushed to the device and renamed;
a full disk becomes one error that says what is kept and what to free.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from convex_caldera.errors import FormatError, InterruptedRunError

Bytes = bytes | bytearray | memoryview

TEMPORARY = ".tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CHUNK = 1 << 20


def write_atomically(path: Path, chunks: Iterable[Bytes]) -> str:
    """Write `chunks` to `path` in one step; returns the SHA-256 of what was written.

    Raises:
        InterruptedRunError: the disk is full. Nothing is left under `path` but what was there.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    digest = hashlib.sha256()
    with disk_full_as_error(path):
        try:
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_directory(path.parent)
    return digest.hexdigest()


@contextmanager
def disk_full_as_error(path: Path) -> Iterator[None]:
    """Turn "no space left" into InterruptedRunError; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise InterruptedRunError(
            f"disk full while writing {path.name}: free some space on the file system of the "
            f"output directory and run the same command again; finished layers are kept"
        ) from error


def require_free_space(directory: Path, needed_bytes: int) -> None:
    """Raise InterruptedRunError unless `needed_bytes` fit on the disk of `directory`."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise InterruptedRunError(
            f"the output needs {needed_bytes / 1e9:.2f} GB but {free / 1e9:.2f} GB are free; "
            f"free {(needed_bytes - free) / 1e9:.2f} GB or choose another output directory"
        )


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` durable, where the system has such a call."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a mebibyte at a time."""
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def inside(directory: Path, name: object) -> Path:
    """`directory / name` for a name read from a file.

    Raises FormatError unless it is a plain relative POSIX path below the directory: no "..", no
    empty or dot component, no backslash, drive, NUL or leading slash.
    """
    if not isinstance(name, str):
        raise FormatError(f"a file name must be text, got {type(name).__name__}")
    parts = name.split("/")
    bad = any(part in ("", ".", "..") or set(part) & set("\\:\0") for part in parts)
    if bad or PurePosixPath(name).is_absolute() or not name.isprintable():
        raise FormatError(f"unsafe file name {name[:80]!r}: only plain paths below the directory")
    return directory / name
