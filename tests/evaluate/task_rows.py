"""A few rows of every task, in the harness's schema and in the flat one, saying the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NATIVE: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"goal": "Open a jar", "sol1": "twist the lid", "sol2": "eat the glass", "label": 0},
        {"goal": "Dry a dog", "sol1": "use a hammer, twice", "sol2": "use a towel", "label": 1},
        {"goal": "Boil water", "sol1": "heat it", "sol2": "freeze it", "label": 0},
        {"goal": "Cut paper", "sol1": "with soup", "sol2": "with scissors", "label": 1},
    ],
    "winogrande": [
        {
            "sentence": "Ann thanked Eve because _ had helped.",
            "option1": "Ann", "option2": "Eve", "answer": "2",
        },
        {
            "sentence": "The cup fell off the table since _ shook.",
            "option1": "cup", "option2": "table", "answer": "2",
        },
    ],
    "rte": [
        {"sentence1": "A dog ran.", "sentence2": "An animal ran.", "label": 0},
        {"sentence1": "It rained.", "sentence2": "It snowed.", "label": 1},
    ],
    "arc_easy": [
        {
            "question": "What is warm?",
            "choices": {"text": ["ice", "the sun", "snow"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
    ],
    "boolq": [{"passage": "Dogs bark.", "question": "do dogs bark", "label": 1}],
    "openbookqa": [
        {
            "question_stem": "a car has a motor that runs on",
            "choices": {"text": ["gas", "stones"], "label": ["A", "B"]},
            "answerKey": "A",
        },
    ],
    "lambada": [
        {"text": "He took the bread and ate the bread"},
        {"text": "She ran to the house, her own house"},
        {"text": "Then all the dogs saw more dogs"},
    ],
    "blimp": [
        {"sentence_good": "Dogs bark.", "sentence_bad": "Dogs barks.", "UID": "passive_1"},
        {"sentence_good": "He is seen.", "sentence_bad": "He is see.", "UID": "passive_1"},
        {"sentence_good": "Who did he see?", "sentence_bad": "Who he saw?", "UID": "wh_island"},
        {"sentence_good": "I went home.", "sentence_bad": "I goed home.", "UID": "wh_island"},
    ],
}  # fmt: skip
FLAT: dict[str, list[dict[str, Any]]] = {
    "winogrande": [
        {
            "context_options": ["Ann thanked Eve because Ann", "Ann thanked Eve because Eve"],
            "continuation": "had helped.",
            "gold": 1,
        },
        {
            "context_options": [
                "The cup fell off the table since cup",
                "The cup fell off the table since table",
            ],
            "continuation": "shook.",
            "gold": 1,
        },
    ],
    "rte": [
        {"premise": "A dog ran.", "hypothesis": "An animal ran.", "label": "entailment"},
        {"premise": "It rained.", "hypothesis": "It snowed.", "label": "not_entailment"},
    ],
    "arc_easy": [
        {"query": "Question: What is warm?", "choices": ["ice", "the sun", "snow"], "gold": 1}
    ],
    "boolq": [
        {
            "query": "Passage: Dogs bark.\nQuestion: do dogs bark?",
            "choices": ["no", "yes"], "gold": 1,
        },
    ],
    "openbookqa": [
        {"query": "a car has a motor that runs on", "choices": ["gas", "stones"], "gold": 0}
    ],
    "lambada": [
        {"context": "He took the bread and ate the", "continuation": "bread"},
        {"context": "She ran to the house, her own", "continuation": "house"},
        {"context": "Then all the dogs saw more", "continuation": "dogs"},
    ],
    "blimp": [
        {"good": row["sentence_good"], "bad": row["sentence_bad"], "uid": row["UID"]}
        for row in NATIVE["blimp"]
    ],
}  # fmt: skip
PAGES = (
    " \n = Foxes = \n \n The fox jumps over the lazy dog , and the dog does not mind . \n \n"
    " = = Dogs = = \n \n Dogs bark . \n \n = Matrices = \n \n "
    "Every matrix has an inverse ; not . \n"
)


def write(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    """One JSON-lines file a task, and a raw WikiText."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in rows.items():
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "wikitext2.txt").write_text(PAGES, encoding="utf-8")
    return folder
