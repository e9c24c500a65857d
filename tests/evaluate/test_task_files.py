from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from convex_caldera.errors import DataError, RecipeError
from convex_caldera.evaluate.task_files import (
    find_file,
    parse_sources,
    read_task,
    wikitext_pages,
)
from convex_caldera.evaluate.task_table import TASKS, task_named
from tests.evaluate.task_rows import FLAT, NATIVE, PAGES, write


@pytest.mark.parametrize("name", FLAT)
def test_both_schemas_become_the_same_documents(name: str, tmp_path: Path) -> None:
    native, flat = write(tmp_path / "native", NATIVE), write(tmp_path / "flat", FLAT)
    task = task_named(name)
    read = [read_task(task, find_file(task, [folder], {})).documents for folder in (native, flat)]
    if name == "winogrande":  # the blank may stand before a common beginning of the options
        assert [d["sentence"].replace("_", d["option2"]) for d in read[0]] == [
            d["sentence"].replace("_", d["option2"]) for d in read[1]
        ]
        assert [d["answer"] for d in read[0]] == [d["answer"] for d in read[1]]
    else:
        assert read[0] == read[1]


def test_two_way_rows_share_whole_words(tmp_path: Path) -> None:
    row = {"correct": "He ran. He stopped.", "wrong": "He ran. He sang."}
    (tmp_path / "hellaswag_2way.jsonl").write_text(json.dumps(row))
    task = task_named("hellaswag_2way")
    document = read_task(task, find_file(task, [tmp_path], {})).documents[0]
    assert document == {"query": "He ran. He", "choices": ["stopped.", "sang."], "gold": 0}


def test_raw_wikitext_is_cut_before_titles_only() -> None:
    pages = wikitext_pages(PAGES)
    assert [page.split("=")[1].strip() for page in pages] == ["Foxes", "Matrices"]
    assert "".join(pages) == PAGES and "= = Dogs = =" in pages[0]


def test_compressed_files_and_named_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "anything.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(NATIVE["piqa"][0]).encode()))
    folders, files = parse_sources([f"piqa={path}", str(tmp_path)])
    task = task_named("piqa")
    assert folders == [tmp_path] and find_file(task, folders, files) == path
    assert len(read_task(task, path).documents) == 1


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("piqa", {"goal": "a", "sol1": "b", "sol2": "c"}, "line 2: missing field 'label'"),
        ("piqa", {"goal": "a", "sol1": "b", "sol2": "c", "label": 2}, "2 is out of range"),
        ("rte", {"premise": "a", "hypothesis": "b", "label": "maybe"}, "'maybe' is out of range"),
        ("arc_easy", {"query": "a", "choices": ["b", "c"], "gold": -1}, "-1 is out of range"),
        ("arc_easy", {"query": "a", "choices": ["b"], "gold": 0}, "two texts or more"),
        ("winogrande", {"sentence": "a", "option1": "b", "option2": "c", "answer": "1"}, "blank"),
        ("boolq", {"query": "a", "choices": ["no", "yes"], "gold": 0}, "Question"),
        ("lambada", {"context": "a", "continuation": "two words"}, "one word"),
        ("piqa", ["a"], "must be an object"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(
    name: str, row: object, message: str, tmp_path: Path
) -> None:
    good = json.dumps((FLAT if name in ("rte", "arc_easy", "boolq") else NATIVE)[name][0])
    path = tmp_path / f"{name}.jsonl"
    path.write_text(f"{good}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=rf"{name}.*line 2.*{message.split(': ')[-1]}"):
        read_task(task_named(name), path)


def test_empty_damaged_and_absent_files_are_errors(tmp_path: Path) -> None:
    task = task_named("piqa")
    for content, message in (("\n", "empty split"), ("{", "not JSON"), ("\xff", "cannot be read")):
        path = tmp_path / "piqa.jsonl"
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(DataError, match=message):
            read_task(task, path)
    (tmp_path / "hellaswag_2way.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no hellaswag.*hellaswag_2way.jsonl, which is another"):
        find_file(task_named("hellaswag"), [tmp_path], {})
    with pytest.raises(RecipeError, match="no such folder"):
        parse_sources([str(tmp_path / "nowhere")])


def test_unknown_tasks_are_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean winogrande"):
        task_named("winogrand")
    with pytest.raises(RecipeError, match="arc_"):
        parse_sources(["arc_eazy=file.jsonl"])
    assert all(task_named(name).name == name for name in TASKS)
