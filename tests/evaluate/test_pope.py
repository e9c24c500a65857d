from __future__ import annotations

import json
from pathlib import Path

import pytest

from convex_caldera.errors import DataError, RecipeError
from convex_caldera.evaluate.pope import (
    PopeScore,
    Question,
    find_split,
    parse_answer,
    read_questions,
    score_answers,
)

ROW = {"image": "a.jpg", "text": "Is there a dog?", "label": "yes"}


def test_scores_of_ten_answers_by_hand() -> None:
    """3 of 4 present objects seen, 2 of 6 absent ones imagined."""
    gold = [True] * 4 + [False] * 6
    said = [True, True, True, False, True, True, False, False, False, False]
    score = score_answers([Question("", "", g) for g in gold], said)
    assert score == PopeScore(3, 2, 4, 1)
    assert score.accuracy == pytest.approx(7 / 10)
    assert score.precision == pytest.approx(3 / 5)
    assert score.recall == pytest.approx(3 / 4)
    assert score.f1 == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert score.yes_ratio == pytest.approx(5 / 10)


def test_answers_that_say_neither_are_wrong() -> None:
    """Yes right twice, once unclear; no right once, once unclear."""
    gold = [True, True, True, False, False]
    score = score_answers([Question("", "", g) for g in gold], [True, True, None, False, None])
    assert (score.accuracy, score.recall, score.precision) == (3 / 5, 2 / 3, 1)
    assert (score.unclear, score.items, score.yes_ratio) == (2, 5, 2 / 5)


def test_always_yes_and_always_no() -> None:
    asked = [Question("", "", g) for g in (True, False)]
    yes, no = (score_answers(asked, [said] * 2) for said in (True, False))
    assert (yes.accuracy, yes.recall, yes.precision, yes.yes_ratio) == (0.5, 1, 0.5, 1)
    assert (no.accuracy, no.recall, no.precision, no.f1, no.yes_ratio) == (0.5, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", True),
        ("no.", False),
        (" YES, there is no doubt", True),
        ("There is not a dog, no", False),
        ("I know nothing", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_the_first_whole_word_decides(text: str, expected: bool | None) -> None:
    assert parse_answer(text) is expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "label": "maybe"}, "'maybe' is out of range"),
        ({"image": "a.jpg", "text": "b"}, "missing field 'label'"),
        ({**ROW, "image": "../a.jpg"}, "without folders"),
        ([1], "missing field 'image'"),
    ],
)
def test_bad_questions_are_named_by_line(row: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pope_random.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        read_questions(path)


def test_splits_are_found_by_name_and_never_empty(tmp_path: Path) -> None:
    (tmp_path / "pope_coco_random.jsonl").write_text("")
    with pytest.raises(DataError, match="empty split"):
        read_questions(find_split(tmp_path, "random"))
    with pytest.raises(DataError, match="wants one file of the split popular, there is none"):
        find_split(tmp_path, "popular")
    with pytest.raises(RecipeError, match="random, popular, adversarial"):
        find_split(tmp_path, "hard")
