"""A model's name to a local directory with a config and safetensors weights.

Three kinds of name: a Hugging Face directory, the word ``bundled``, or a hub id
(``owner/name`` or ``owner/name@revision``). Pickled weights are refused, since reading them can
run code; so is code that comes with a model (``trust_remote_code`` is never on).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from convex_caldera.errors import ModelError

BUNDLED = "bundled"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
# Weights, configuration and tokenizer of the repository's top level; nothing executable.
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.tiktoken",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
]
_UNWANTED = ["*/*", "consolidated*"]
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_model(name_or_path: str | os.PathLike[str]) -> Path:
    """The local directory of a model, fetched from the hub if need be.

    Environment variables of the hub client are honored, `HF_HUB_OFFLINE` among them.

    Raises:
        ModelError: there is no such model, it cannot be fetched, it has no config, or its
            weights are missing or pickled.
    """
    name = os.fspath(name_or_path)
    if name == BUNDLED:
        return _checked(_bundled())
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _checked(path)
    if name and path.exists():
        raise ModelError(f"{name} is a file; give the directory that holds config.json")
    looks_local = name.startswith((".", "~", "/")) or name.count("/") > 1
    if looks_local or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"{name!r} is not a directory; give a Hugging Face model directory, a hub id "
            f"(owner/name) or {BUNDLED!r}"
        )
    return _checked(_fetched(name))


def _bundled() -> Path:
    import convex_caldera.bundled

    path = Path(convex_caldera.bundled.__file__).parent / "model"
    if not path.is_dir():
        raise ModelError("this installation carries no bundled model; reinstall the package")
    return path


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ModelError(
            f"no directory {name!r} here, and the hub did not give it: {type(error).__name__}: "
            f"{first}; check the name, the network, HF_HUB_OFFLINE and your access token"
        ) from error


def _checked(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; it is not a Hugging Face model directory")
    if any(path.glob("*.safetensors")):
        return path
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        raise ModelError(
            f"{path} has only pickled weights ({pickled[0]}), which can run code when read; "
            "convert them to safetensors first (save_pretrained does)"
        )
    raise ModelError(f"{path} has no *.safetensors weights")
