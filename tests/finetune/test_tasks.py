"""Examples become candidates; scores are log-likelihoods of their endings."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from convex_caldera.errors import DataError, RecipeError
from convex_caldera.finetune.place import Trained
from convex_caldera.finetune.tasks import TaskFields, TaskTuning, read_examples
from tests import tiny_models


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_models.tokenizer()


def test_a_blank_is_filled_and_what_follows_is_scored(tokenizer: Any, tmp_path: Path) -> None:
    row = {"sentence": "The _ is lazy.", "option1": "fox", "option2": "dog", "answer": "2"}
    fields = TaskFields(("sentence",), "answer", ("option1", "option2"))
    example, _ = read_examples(write(tmp_path / "x.jsonl", row, row), fields, tokenizer, 64)
    assert example.label == 1
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in example.candidates]
    assert texts == ["The fox is lazy.", "The dog is lazy."]
    for ids, begin in zip(example.candidates, example.begins, strict=True):
        assert tokenizer.decode(ids[begin:]) == " is lazy."


def test_labels_are_endings_after_all_texts(tokenizer: Any, tmp_path: Path) -> None:
    row = {"premise": "A dog.", "hypothesis": "A fox.", "label": 0}
    fields = TaskFields(("premise", "hypothesis"), labels=("yes", "no"))
    assert fields.kind == "classification"
    example, _ = read_examples(write(tmp_path / "x.jsonl", row, row), fields, tokenizer, 64)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in example.candidates]
    assert texts == ["A dog.\nA fox. yes", "A dog.\nA fox. no"]
    short, _ = read_examples(tmp_path / "x.jsonl", fields, tokenizer, 6)
    for ids, begin in zip(short.candidates, short.begins, strict=True):
        assert len(ids) <= 6 and 0 < begin < len(ids)


def test_labels_may_have_names_and_fields_a_prompt(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"premise": "A dog.", "hypothesis": "A fox.", "label": label}
        for label in ("entailment", "not_entailment", 1)
    ]
    fields = TaskFields(
        labels=("entailment=yes", "not_entailment=no"), prompt="{premise} {hypothesis} It"
    )
    found = read_examples(write(tmp_path / "x.jsonl", *rows), fields, tokenizer, 64)
    assert [example.label for example in found] == [0, 1, 1]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found[0].candidates]
    assert texts == ["A dog. A fox. It yes", "A dog. A fox. It no"]
    with pytest.raises(DataError, match="needs a text field 'other'"):
        read_examples(
            tmp_path / "x.jsonl", TaskFields(labels=("a", "b"), prompt="{other}"), tokenizer, 64
        )


def test_choices_may_be_one_list_of_beginnings(tokenizer: Any, tmp_path: Path) -> None:
    row = {"options": ["The fox", "The dog"], "continuation": "is lazy.", "gold": 1}
    fields = TaskFields(label="gold", choices=("options",), prompt="_ {continuation}")
    example, _ = read_examples(write(tmp_path / "x.jsonl", row, row), fields, tokenizer, 64)
    assert example.label == 1
    for ids, begin, text in zip(example.candidates, example.begins, row["options"], strict=True):
        assert tokenizer.decode(ids[:begin], skip_special_tokens=True) == text
        assert tokenizer.decode(ids[begin:]) == " is lazy."
    three = {**row, "options": ["The fox", "The dog", "A dog"]}
    for rows, message in (
        ((row, three), r"\[2, 3\] choices"),
        (({**row, "options": ["one"]},), "at least two texts in 'options'"),
    ):
        with pytest.raises(DataError, match=message):
            read_examples(write(tmp_path / "y.jsonl", *rows), fields, tokenizer, 64)


def test_scores_are_sums_of_log_probabilities(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    row = {"text": "The dog is", "a": "lazy", "b": "not lazy at all", "label": 1}
    fields = TaskFields(("text",), "label", ("a", "b"))
    examples = read_examples(write(tmp_path / "x.jsonl", row, row), fields, tokenizer, 64)
    task = TaskTuning(model, Trained({}, {}, {}), examples, 2)
    expected = []
    for ids, begin in zip(examples[0].candidates, examples[0].begins, strict=True):
        with torch.no_grad():
            log_q = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(sum(float(log_q[t - 1, ids[t]]) for t in range(begin, len(ids))))
    with torch.no_grad():
        scores = task._scores(examples[:1])
    assert scores.tolist() == pytest.approx(expected, rel=1e-4)
    loss = torch.tensor(expected).log_softmax(0)[1].neg()
    with torch.no_grad():
        assert task.validation() == pytest.approx(float(loss), rel=1e-3)
        assert task.accuracy() in (0.0, 1.0)


def test_examples_are_split_without_overlap() -> None:
    examples = [SimpleNamespace(number=i) for i in range(20)]
    task = TaskTuning(None, None, examples, 3)  # type: ignore[arg-type]
    numbers = [e.number for e in task.training], [e.number for e in task.held_out]
    assert sorted(numbers[0] + numbers[1]) == list(range(20))
    assert len(numbers[1]) == 2 and task.batches == 6


@pytest.mark.parametrize(
    "options",
    [
        {"text": ()},
        {"text": ("t",)},
        {"text": ("t",), "labels": ("a",)},
        {"text": ("t",), "labels": ("a", "b"), "choices": ("c", "d")},
    ],
)
def test_contradictory_fields_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        TaskFields(**options)


def test_files_are_checked(tokenizer: Any, tmp_path: Path) -> None:
    fields = TaskFields(("t",), labels=("a", "b"))
    with pytest.raises(DataError, match=r"no \.jsonl"):
        read_examples(tmp_path / "none.jsonl", fields, tokenizer, 8)
    with pytest.raises(DataError, match="1 examples"):
        read_examples(write(tmp_path / "x.jsonl", {"t": "x", "label": 0}), fields, tokenizer, 8)
    (tmp_path / "y.jsonl").write_text("{not json")
    with pytest.raises(DataError, match="line 1: not JSON"):
        read_examples(tmp_path / "y.jsonl", fields, tokenizer, 8)
