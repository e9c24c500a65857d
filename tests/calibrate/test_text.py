"""Laws of cutting text into windows of tokens."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from convex_caldera.calibrate.text import fingerprint, token_windows
from convex_caldera.errors import DataError, RecipeError
from tests import tiny_models


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


@pytest.fixture
def numbers(tmp_path):
    """A text in which every line is different."""
    file = tmp_path / "numbers.txt"
    file.write_text("".join(f"line {number} of the text\n" for number in range(2000)))
    return file


def test_windows_have_shape_and_bos(numbers, tokenizer):
    windows = token_windows(numbers, tokenizer, 10, 32)
    assert windows.shape == (10, 32) and windows.dtype == torch.int64
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    assert (windows[:, 1:] != tokenizer.bos_token_id).all()
    plain = token_windows(numbers, tokenizer, 10, 32, bos=False)
    assert plain.shape == (10, 32) and (plain != tokenizer.bos_token_id).all()


def test_windows_without_a_bos_token(numbers):
    tokenizer = tiny_models.tokenizer()
    tokenizer.bos_token = None
    windows = token_windows(numbers, tokenizer, 4, 16)
    assert torch.equal(windows, token_windows(numbers, tokenizer, 4, 16, bos=False))


def test_windows_depend_on_the_seed_only(numbers, tokenizer):
    first = token_windows(numbers, tokenizer, 8, 32, seed=3)
    assert torch.equal(first, token_windows(str(numbers), tokenizer, 8, 32, seed=3))
    assert not torch.equal(first, token_windows(numbers, tokenizer, 8, 32, seed=4))


def test_windows_never_repeat_text_and_can_use_all_of_it(tmp_path, tokenizer):
    text = "".join(f"{number:05d} " for number in range(3000))
    file = tmp_path / "one-line.txt"
    file.write_text(text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = token_windows(file, tokenizer, 10**6, 16, bos=False, allow_short=True)
    # Pieces are tokenized one by one, which may split a token at each of their ends.
    assert len(ids) - 16 <= windows.numel() <= len(ids) * 1.02
    found = tokenizer.decode(windows.flatten().tolist()).split()
    whole = [number for number in found if len(number) == 5]
    assert len(set(whole)) >= 0.98 * 3000
    assert len(whole) - len(set(whole)) <= 2 * len(text) // (16 * 16)


def test_json_lines_are_documents_with_an_end(tmp_path, tokenizer):
    file = tmp_path / "texts.jsonl"
    rows = [{"text": f"document {number}", "id": number} for number in range(40)]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    windows = token_windows(file, tokenizer, 3, 32, bos=False, allow_short=True)
    assert (windows == tokenizer.eos_token_id).sum() >= 3


def test_short_text_is_refused_with_its_count(tmp_path, tokenizer):
    file = tmp_path / "short.txt"
    file.write_text("a b c d e f g h i j " * 10)
    total = len(tokenizer(file.read_text(), add_special_tokens=False)["input_ids"])
    windows = total // 15
    enough = int(windows / 0.8)
    assert len(token_windows(file, tokenizer, enough, 16)) == windows
    with pytest.raises(DataError, match=rf"has {total} tokens, {windows} windows of 16"):
        token_windows(file, tokenizer, enough + 2, 16)
    assert len(token_windows(file, tokenizer, enough + 2, 16, allow_short=True)) == windows
    with pytest.raises(DataError, match="0 windows"):
        token_windows(file, tokenizer, 1, total * 2, allow_short=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n", "is empty"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
        ("table.csv", b"text\n", "must end in"),
        ("bad.jsonl", b'{"text": "a"}\n{', "line 2: not JSON"),
        ("other.jsonl", b'{"body": "a"}', 'needs a string "text"'),
        ("list.jsonl", b'["text"]', 'needs a string "text"'),
    ],
)
def test_unreadable_files_are_refused(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        token_windows(tmp_path / name, tokenizer, 1, 4)


@pytest.mark.parametrize("name", ["nowhere.txt", "./nowhere", "/no/where"])
def test_missing_files_are_refused(tokenizer, name):
    with pytest.raises(DataError, match="is not a file"):
        token_windows(name, tokenizer, 1, 4)


def test_bundled_splits_differ_and_others_are_refused(tokenizer, monkeypatch):
    """The rule of the splits is real; the documents are few, since reading all takes seconds."""
    few = [(f"module{number}", f"def f{number}():\n    pass\n" * 40) for number in range(60)]
    monkeypatch.setattr(
        "convex_caldera.bundled.corpus.documents", lambda wanted: [d for d in few if wanted(d[0])]
    )
    default = token_windows("bundled", tokenizer, 2, 64)
    assert torch.equal(default, token_windows("bundled:calibration", tokenizer, 2, 64))
    assert not torch.equal(default, token_windows("bundled:test", tokenizer, 2, 64))
    with pytest.raises(DataError, match="no split 'dev'"):
        token_windows("bundled:dev", tokenizer, 2, 64)


def test_hub_data_without_the_package_says_which(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="package `datasets`"):
        token_windows("owner/texts:train", tokenizer, 1, 4)


def test_hub_data_is_asked_for_by_name_config_and_split(tokenizer, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"text": "some words of a document"}] * 5

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert token_windows("owner/texts@small:validation", tokenizer, 2, 8).shape == (2, 8)
    token_windows("texts", tokenizer, 2, 8)
    assert asked == [
        (("owner/texts", "small"), {"split": "validation"}),
        (("texts", None), {"split": "train"}),
    ]


@pytest.mark.parametrize(("nsamples", "seqlen"), [(0, 8), (1, 1)])
def test_windows_refuse_impossible_sizes(numbers, tokenizer, nsamples, seqlen):
    with pytest.raises(RecipeError):
        token_windows(numbers, tokenizer, nsamples, seqlen)


def test_fingerprint_sees_ids_and_shape():
    tokens = torch.arange(12).view(3, 4)
    assert fingerprint(tokens) == fingerprint(tokens.clone().to(torch.int32))
    assert fingerprint(tokens) != fingerprint(tokens.view(4, 3))
    assert fingerprint(tokens) != fingerprint(tokens + 1)
