"""The documentation holds: Python runs, commands and links exist, every method has a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from convex_caldera.cli.app import command_line
from convex_caldera.recipes.table import METHODS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
TOP = set(ROOT.glob("*.md"))  # their examples compress whole models
METHOD_PAGES = ROOT / "docs" / "methods"
HEADINGS = ("Paper and code", "Options", "Stored bits", "Command", "Limits")
LONGEST = 80

PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"^\s*\$? ?convex-caldera ([a-z]+(?:-[a-z]+)*)(.*(?:\\\n.*)*)$", re.MULTILINE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str) -> list[tuple[int, str]]:
    """(line, source) of every fenced Python block."""
    return [(text.count("\n", 0, m.start()) + 1, m[1]) for m in PYTHON.finditer(text)]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(command, options) of every line that calls the program."""
    return [(m[1], re.findall(r"(?<!\S)(--?[a-z][a-z-]*)", m[2])) for m in COMMAND.finditer(text)]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in TOP else [])
        for page in PAGES
        if blocks(page.read_text())
    ],
    ids=name_of,
)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "example"}
    for line, source in blocks(page.read_text()):
        # Line numbers of a failure are then those of the page.
        exec(compile("\n" * line + source, name_of(page), "exec"), namespace)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page.read_text())], ids=name_of
)
def test_commands_and_their_options_exist(page: Path) -> None:
    known = command_line().commands
    for command, options in commands(page.read_text()):
        assert command in known, f"{name_of(page)}: no command {command}"
        offered = {o for p in known[command].params for o in (*p.opts, *p.secondary_opts)}
        wrong = set(options) - offered - {"-h", "--help"}
        assert not wrong, f"{name_of(page)}: {command} has no {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name_of(page)}: {target} does not exist"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_complete_page(method: str) -> None:
    text = (METHOD_PAGES / f"{method}.md").read_text()
    assert text.startswith(f"# {method}\n")
    for heading in HEADINGS:
        assert f"\n## {heading}\n" in text, heading
    assert f"--method {method}" in text
    assert blocks(text)
    assert text.count("\n") <= LONGEST


def test_pages_are_of_methods_that_exist_and_stand_in_the_index() -> None:
    assert {page.stem for page in METHOD_PAGES.glob("*.md")} == set(METHODS)
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {page for page in (ROOT / "docs").rglob("*.md") if page.name != "index.md"}
    listed = {ROOT / "docs" / target for target in LINK.findall(index)}
    assert pages == listed


def test_checks_notice_what_is_wrong() -> None:
    assert blocks("text\n```python\nx = 1\n```\n") == [(2, "x = 1\n")]
    assert commands("    convex-caldera compress M -o OUT --bits 2 --json a.json\n") == [
        ("compress", ["-o", "--bits", "--json"])
    ]
