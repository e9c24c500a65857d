"""The tasks, and how rows of their files become documents of lm-evaluation-harness.

Every task is the harness's own: its prompt, its choices and its metrics are read from the
harness's configuration, and only the data set is replaced by local rows. A row is accepted in the
harness's schema (the schema of the hub's data set), or in the flat one of llm-foundry and of the
tasks' first publications; which one is seen from its fields.

A converter returns a document of the harness or raises ValueError with what is wrong in the row.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from convex_caldera.errors import RecipeError

Row = Mapping[str, Any]
Document = dict[str, Any]
Kind = Literal["choice", "text"]


@dataclass(frozen=True)
class Form:
    """One schema: the fields a row must have, and the way to a document of the harness."""

    fields: tuple[str, ...]
    convert: Callable[[Row], Document]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as the command line knows it.
        config: the harness's configuration, a path below its folder of tasks with `{part}` for
            a task of several parts, or a configuration of our own.
        stems: names of its file without suffix, the first that exists is read.
        forms: accepted schemas, the harness's first.
        kind: "choice" has accuracies, "text" a perplexity.
        part: the field that tells the parts of a task apart; every part counts alike.
    """

    name: str
    config: str | dict[str, Any]
    stems: tuple[str, ...]
    forms: tuple[Form, ...]
    kind: Kind = "choice"
    part: str | None = None


def task_named(name: str) -> Task:
    """The task of that name; RecipeError offers the nearest ones."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(TASKS)}"
    raise RecipeError(f"unknown task {name!r}; {hint}")


def _label(value: Any, count: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise ValueError(f"label {value!r} is out of range; it must be 0 to {count - 1}")
    return value


def _choices(row: Row) -> list[str]:
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise ValueError(f"choices must be a list of two texts or more, not {choices!r:.60}")
    return choices


def _common_start(first: str, second: str) -> str:
    same = (a == b for a, b in zip(first, second, strict=False))
    return first[: len(list(takewhile(bool, same)))]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _multiple(row: Row) -> Document:
    """query, choices, gold -> ARC's schema (question, choices.text, choices.label, answerKey)."""
    texts = _choices(row)
    labels = [chr(ord("A") + i) for i in range(len(texts))]
    question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    key = labels[_label(row["gold"], len(texts))]
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": key}


def _arc(row: Row) -> Document:
    choices, key = row["choices"], row["answerKey"]
    if not isinstance(choices, dict) or len(choices.get("text", ())) < 2:
        raise ValueError("choices must hold the lists `text` and `label`")
    if key not in choices.get("label", ()):
        raise ValueError(f"label {key!r} is out of range; it must be one of {choices['label']}")
    return {"question": row["question"], "choices": choices, "answerKey": key}


def _open_book(row: Row) -> Document:
    document = _multiple(row)
    return {"question_stem": document.pop("question"), **document}


def _open_book_native(row: Row) -> Document:
    document = _arc({**row, "question": row["question_stem"]})
    return {"question_stem": document.pop("question"), **document}


def _piqa(row: Row) -> Document:
    keys = ("goal", "sol1", "sol2")
    return {**{k: row[k] for k in keys}, "label": _label(row["label"], 2)}


def _winogrande(row: Row) -> Document:
    if "_" not in row["sentence"]:
        raise ValueError("the sentence has no blank (_) to fill")
    if str(row["answer"]) not in ("1", "2"):
        raise ValueError(f"label {row['answer']!r} is out of range; it must be 1 or 2")
    keys = ("sentence", "option1", "option2")
    return {**{k: row[k] for k in keys}, "answer": str(row["answer"])}


def _partial_scoring(row: Row) -> Document:
    """Two contexts and one continuation -> a sentence with a blank where the contexts part."""
    contexts = row["context_options"]
    if not isinstance(contexts, list) or len(contexts) != 2 or not all(map(_is_text, contexts)):
        raise ValueError(f"context_options must be two texts, not {contexts!r:.60}")
    shared = _common_start(*contexts)
    if "_" in shared:
        raise ValueError("the context has an underscore, which the harness takes for its blank")
    option1, option2 = (context.removeprefix(shared) for context in contexts)
    sentence = f"{shared}_ {row['continuation'].strip()}"
    answer = str(1 + _label(row["gold"], 2))
    return {"sentence": sentence, "option1": option1, "option2": option2, "answer": answer}


def _rte(row: Row) -> Document:
    keys = ("sentence1", "sentence2")
    return {**{k: row[k] for k in keys}, "label": _label(row["label"], 2)}


def _premise(row: Row) -> Document:
    names = ("entailment", "not_entailment")
    label = names.index(row["label"]) if row["label"] in names else row["label"]
    return {
        "sentence1": row["premise"],
        "sentence2": row["hypothesis"],
        "label": _label(label, 2),
    }


def _boolq(row: Row) -> Document:
    return {k: row[k] for k in ("passage", "question")} | {"label": _label(row["label"], 2)}


def _boolq_flat(row: Row) -> Document:
    """ "Passage: ...\\nQuestion: ...?" with choices no, yes."""
    if row["choices"] != ["no", "yes"]:
        raise ValueError(f"choices must be no, yes, not {row['choices']!r:.60}")
    passage, mark, question = row["query"].rpartition("\nQuestion: ")
    if not mark:
        raise ValueError("the query has no line that begins with 'Question: '")
    return {
        "passage": passage.removeprefix("Passage: "),
        "question": question.removesuffix("?"),
        "label": _label(row["gold"], 2),
    }


def _hellaswag(row: Row) -> Document:
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) < 2 or not all(map(_is_text, endings)):
        raise ValueError(f"endings must be a list of two texts or more, not {endings!r:.60}")
    label = row["label"]
    label = int(label) if isinstance(label, str) and label.isdecimal() else label
    keys = ("ctx_a", "ctx_b", "activity_label", "endings")
    return {**{k: row[k] for k in keys}, "label": str(_label(label, len(endings)))}


def _two_way(row: Row) -> Document:
    """A right and a wrong text -> their common beginning up to a word, and two endings."""
    texts = [row["correct"], row["wrong"]]
    shared = _common_start(*texts)
    shared = shared[: shared.rfind(" ")] if " " in shared else ""
    if not shared or texts[0] == texts[1]:
        raise ValueError("the two texts must begin with the same words and end differently")
    return {"query": shared, "choices": [t.removeprefix(shared).strip() for t in texts], "gold": 0}


def _last_word(row: Row) -> Document:
    text = row["text"].strip()
    if " " not in text:
        raise ValueError("the text must have two words or more")
    return {"text": text}


def _continuation(row: Row) -> Document:
    word = row["continuation"].strip()
    if not word or " " in word:
        raise ValueError(f"the continuation must be one word, not {word!r:.60}")
    return _last_word({"text": f"{row['context'].rstrip()} {word}"})


def _pair(good: str, bad: str, part: str) -> Callable[[Row], Document]:
    def convert(row: Row) -> Document:
        return {"sentence_good": row[good], "sentence_bad": row[bad], "part": row[part]}

    return convert


def _field(source: str, target: str) -> Form:
    return Form((source,), lambda row: {target: row[source]})


_ARC = (
    Form(("question", "choices", "answerKey"), _arc),
    Form(("query", "choices", "gold"), _multiple),
)
_TWO_WAY = {
    "task": "hellaswag_2way",
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "{{query}}",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
_ALL = (
    Task(
        "wikitext2",
        "wikitext/wikitext.yaml",
        ("wikitext2", "wikitext", "wikitext2_raw_test", "wikitext2_raw_valid", "wiki.test"),
        (_field("page", "page"), _field("text", "page")),
        kind="text",
    ),
    Task("c4", "c4/c4.yaml", ("c4", "c4_sample_a"), (_field("text", "text"),), kind="text"),
    Task(
        "winogrande",
        "winogrande/default.yaml",
        ("winogrande",),
        (
            Form(("sentence", "option1", "option2", "answer"), _winogrande),
            Form(("context_options", "continuation", "gold"), _partial_scoring),
        ),
    ),
    Task(
        "rte",
        "glue/rte/default.yaml",
        ("rte",),
        (
            Form(("sentence1", "sentence2", "label"), _rte),
            Form(("premise", "hypothesis", "label"), _premise),
        ),
    ),
    Task("piqa", "piqa/piqa.yaml", ("piqa",), (Form(("goal", "sol1", "sol2", "label"), _piqa),)),
    Task("arc_challenge", "arc/arc_challenge.yaml", ("arc_challenge",), _ARC),
    Task("arc_easy", "arc/arc_easy.yaml", ("arc_easy",), _ARC),
    Task(
        "hellaswag",
        "hellaswag/hellaswag.yaml",
        ("hellaswag",),
        (Form(("ctx_a", "ctx_b", "activity_label", "endings", "label"), _hellaswag),),
    ),
    Task("hellaswag_2way", _TWO_WAY, ("hellaswag_2way",), (Form(("correct", "wrong"), _two_way),)),
    Task(
        "boolq",
        "super_glue/boolq/default.yaml",
        ("boolq",),
        (
            Form(("passage", "question", "label"), _boolq),
            Form(("query", "choices", "gold"), _boolq_flat),
        ),
    ),
    Task(
        "openbookqa",
        "openbookqa/openbookqa.yaml",
        ("openbookqa",),
        (
            Form(("question_stem", "choices", "answerKey"), _open_book_native),
            Form(("query", "choices", "gold"), _open_book),
        ),
    ),
    Task(
        "lambada",
        "lambada/lambada_openai.yaml",
        ("lambada", "lambada_openai"),
        (
            Form(("text",), _last_word),
            Form(("context", "continuation"), _continuation),
        ),
    ),
    Task(
        "blimp",
        "blimp/{part}.yaml",
        ("blimp",),
        (
            Form(
                ("sentence_good", "sentence_bad", "UID"),
                _pair("sentence_good", "sentence_bad", "UID"),
            ),
            Form(("good", "bad", "uid"), _pair("good", "bad", "uid")),
        ),
        part="part",
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
