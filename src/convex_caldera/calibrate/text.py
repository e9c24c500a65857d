"""Text to packed windows of tokens, the same ones for the same seed.

A text is cut at line ends into pieces of a few windows each; pieces are shuffled by the seed,
tokenized until there is enough, and packed without padding. Only as much of a long text is
tokenized as is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from convex_caldera.core.seeds import generator
from convex_caldera.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED = "bundled"
# Characters of a piece per token of a window: about four windows at four characters a token.
_PIECE_CHARACTERS_PER_TOKEN = 16
_LEAST_SHARE = 0.8


def token_windows(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    *,
    bos: bool = True,
    allow_short: bool = False,
) -> Tensor:
    """Windows of token ids, (nsamples, seqlen), int64.

    Args:
        source: a `.txt` or `.jsonl` file (one object with "text" a line), `bundled` or
            `bundled:SPLIT`, or a hub data set `name[@config][:split]`.
        tokenizer: of the model that will read the windows.
        nsamples: windows wanted; fewer come back if the text has at least 80 % of them.
        seqlen: tokens per window.
        seed: chooses the pieces of text.
        bos: begin every window with the tokenizer's BOS token, if it has one.
        allow_short: take less than 80 % as well.

    Raises:
        DataError: the source cannot be read, or is too short; the message counts its tokens.
    """
    if nsamples < 1 or seqlen < 2:
        raise RecipeError(f"need nsamples >= 1 and seqlen >= 2, got {nsamples} and {seqlen}")
    head = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    body = seqlen - len(head)
    documents = list(_documents(source))
    pieces = [p for d in documents for p in _pieces(d, _PIECE_CHARACTERS_PER_TOKEN * seqlen)]
    order = torch.randperm(len(pieces), generator=generator(seed, "text", "pieces")).tolist()
    separator = _separator(tokenizer) if len(documents) > 1 else []
    ids: list[int] = []
    for number in order:
        if len(ids) >= nsamples * body:
            break
        ids += _encode(tokenizer, pieces[number]) + separator
    count = min(len(ids) // body, nsamples)
    if count < 1 or (count < _LEAST_SHARE * nsamples and not allow_short):
        raise DataError(
            f"{source} has {len(ids)} tokens, {count} windows of {seqlen}; {nsamples} windows "
            f"({nsamples * seqlen} tokens) were asked for; give more text, ask for less "
            "(--nsamples, --seqlen), or take what there is (--allow-short)"
        )
    windows = torch.tensor(ids[: count * body], dtype=torch.int64).view(count, body)
    return torch.cat([torch.tensor([head] * count, dtype=torch.int64).view(count, -1), windows], 1)


def read_text(source: str | Path) -> str:
    """A source as one text, documents in order with a blank line between them.

    Raises:
        DataError: the source cannot be read.
    """
    return "\n\n".join(_documents(source))


def fingerprint(tokens: Tensor) -> str:
    """SHA-256 of token ids and their shape: which text calibrated this."""
    digest = hashlib.sha256(json.dumps(list(tokens.shape)).encode())
    digest.update(tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
    return list(encoded["input_ids"])


def _separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []


def _pieces(text: str, least: int) -> Iterator[str]:
    """Cut at line ends into pieces of at least `least` characters; long lines are cut too."""
    start = 0
    while start < len(text):
        line_end = text.find("\n", start + least - 1, start + 2 * least)
        end = line_end + 1 if line_end >= 0 else start + 2 * least
        yield text[start:end]
        start = end


def _documents(source: str | Path) -> Iterator[str]:
    name = str(source)
    head, _, split = name.partition(":")
    if head == BUNDLED:
        return iter([_bundled(split or "calibration")])
    path = Path(name).expanduser()
    if path.is_file():
        return _from_file(path)
    if path.suffix in _READERS or name.startswith((".", "/", "~")) or path.is_dir():
        raise DataError(
            f"{name} is not a file; give a .txt or .jsonl file, or {BUNDLED!r} (--dataset, --text)"
        )
    return _from_hub(name)


def _bundled(split: str) -> str:
    from convex_caldera.bundled.corpus import Split, text

    if split not in get_args(Split):
        raise DataError(f"no split {split!r} of the bundled text; one of {get_args(Split)}")
    return text(split)  # type: ignore[arg-type]


def _from_file(path: Path) -> Iterator[str]:
    if path.suffix not in _READERS:
        raise DataError(f"{path} must end in one of {', '.join(_READERS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not readable as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    return _READERS[path.suffix](text, path)


def _plain(text: str, _: Path) -> Iterator[str]:
    yield text


def _json_lines(text: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from error
        yield _text_of(row, f"{path}, line {number}")


_READERS: dict[str, Callable[[str, Path], Iterator[str]]] = {".txt": _plain, ".jsonl": _json_lines}


def _from_hub(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise DataError(
            f"{name!r} is no file here; hub data sets need the package `datasets` "
            "(extra `eval`); or give a .txt or .jsonl file"
        ) from error
    address, _, split = name.partition(":")
    repository, _, config = address.partition("@")
    try:
        rows: Iterable[object] = load_dataset(repository, config or None, split=split or "train")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data set {name!r} cannot be loaded: {error}") from error
    return (_text_of(row, name) for row in rows)


def _text_of(row: object, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: every record needs a string "text"')
    return text
