"""POPE: does a vision-language model see objects that are not there? Questions and scoring.

Every question is "Is there a ... in the image?" with the answer yes or no, half of each. With
yes as the positive class

    precision = TP / (TP + FP)    recall = TP / positives    F1 = their harmonic mean
    accuracy = right / all        yes-ratio = (TP + FP) / all

An answer without yes or no is wrong: it lowers accuracy, and recall where yes was right. An answer
counts as its first word that is yes or no. The three splits differ in how the absent objects are
drawn: at random, from the most popular ones, or from those that often occur together (adversarial).

Li et al., Evaluating Object Hallucination in Large Vision-Language Models, arXiv 2305.10355.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convex_caldera.errors import DataError, RecipeError

SPLITS = ("random", "popular", "adversarial")
_ANSWER = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """One item: what is asked of which image file, and the right answer."""

    text: str
    image: str
    positive: bool


@dataclass(frozen=True)
class PopeScore:
    """Counts of one split; the figures follow from them. `unclear` answers say neither word."""

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int
    unclear_positive: int = 0
    unclear_negative: int = 0

    @property
    def items(self) -> int:
        return sum(self.__dict__.values())

    @property
    def accuracy(self) -> float:
        return _share(self.true_positive + self.true_negative, self.items)

    @property
    def precision(self) -> float:
        return _share(self.true_positive, self.true_positive + self.false_positive)

    @property
    def recall(self) -> float:
        positives = self.true_positive + self.false_negative + self.unclear_positive
        return _share(self.true_positive, positives)

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0

    @property
    def yes_ratio(self) -> float:
        return _share(self.true_positive + self.false_positive, self.items)

    @property
    def unclear(self) -> int:
        return self.unclear_positive + self.unclear_negative

    def to_dict(self) -> dict[str, Any]:
        names = ("items", "accuracy", "precision", "recall", "f1", "yes_ratio", "unclear")
        return {name: getattr(self, name) for name in names} | {"counts": dict(self.__dict__)}


def parse_answer(text: str) -> bool | None:
    """True for yes, False for no, None where the text says neither."""
    found = _ANSWER.search(text)
    return None if found is None else found[1].lower() == "yes"


def score_answers(questions: Sequence[Question], answers: Sequence[bool | None]) -> PopeScore:
    """Counts over questions and parsed answers."""
    count = dict.fromkeys(PopeScore.__dataclass_fields__, 0)
    for question, answer in zip(questions, answers, strict=True):
        if answer is None:
            key = "unclear_positive" if question.positive else "unclear_negative"
        else:
            key = f"{'true' if answer == question.positive else 'false'}_"
            key += "positive" if answer else "negative"
        count[key] += 1
    return PopeScore(**count)


def read_questions(path: Path) -> list[Question]:
    """A split's JSON lines: `image`, `text`, `label` (yes or no).

    Raises:
        DataError: not readable, empty, a missing field, a label out of range; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    questions = [
        _question(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line
    ]
    if not questions:
        raise DataError(f"{path} is an empty split; it has no questions")
    return questions


def find_split(folder: Path, split: str) -> Path:
    """The file of a split: `*_random.jsonl` and the like.

    Raises:
        RecipeError: no such split; DataError: no file, or several.
    """
    if split not in SPLITS:
        raise RecipeError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    found = sorted([*folder.glob(f"*pope*_{split}.json*"), *folder.glob(f"{split}.json*")])
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{folder}: wants one file of the split {split}, there is {names}")
    return found[0]


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    for key in ("image", "text", "label"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key]:
            raise DataError(f"{where}: missing field {key!r}; a row has image, text, label")
    if row["label"] not in ("yes", "no"):
        raise DataError(f"{where}: label {row['label']!r} is out of range; it must be yes or no")
    if Path(row["image"]).name != row["image"]:
        raise DataError(f"{where}: image {row['image']!r} must be a file name without folders")
    return Question(row["text"], row["image"], row["label"] == "yes")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
