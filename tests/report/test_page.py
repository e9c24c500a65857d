"""The page stands alone, escapes what it shows, and its recheck really rechecks."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from convex_caldera.errors import DataError, RecipeError
from convex_caldera.report import read_run, write_report
from convex_caldera.report.page import page
from convex_caldera.report.words import RECHECK
from tests.report import making

pytestmark = pytest.mark.slow

VOID = {"meta", "img", "br"}
HOSTILE = (
    "</style><script>alert(1)</script><img src=http://x onerror=y>\"'&\x00\u202e$\\frac{--> ]]>"
)


class Page(HTMLParser):
    """Tags, attributes and ids of a page; fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def values(self, key: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == key]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page over two runs, one with a certificate, every string that can be hostile so."""
    folder = tmp_path_factory.mktemp("report")
    names = (*making.NAMES[:3], f"model.layers.1.{HOSTILE}")
    contents = making.files(names)
    for name in ("report.json", "certificate.json"):
        contents[name]["method"] = HOSTILE
    certificate = contents["certificate.json"]
    certificate |= {"statement": HOSTILE, "unit": HOSTILE + " nats", "curvature": HOSTILE}
    certificate["surrogate"] = {HOSTILE: HOSTILE}
    certificate["layers"][names[-1]]["label"] = HOSTILE
    contents["report.json"]["budget"] = HOSTILE
    contents["measured.json"]["measured"]["text"] = HOSTILE
    contents["landscape.json"]["landscape"]["title"] = HOSTILE
    contents["provenance.json"] = {
        "versions": {HOSTILE: HOSTILE},
        "source_files": {HOSTILE: HOSTILE},
        "settings": {"model": HOSTILE, HOSTILE: HOSTILE},
    }
    hostile = making.write_run(folder / "<b>'a' & \"b\"", contents)
    plain = making.write_run(folder / "plain", method="gptq", with_certificate=False)
    scores = folder / "eval.json"
    record = making.evaluation(str(hostile), str(plain), HOSTILE, text=HOSTILE)
    scores.write_text(json.dumps(record))
    written = write_report([hostile, plain], folder / "target", [scores])
    return folder / "target", written


def test_every_file_named_is_there(report):
    target, written = report
    assert written[0] == target / "report.html"
    assert all(path.is_file() and path.stat().st_size for path in written)
    assert {path.name for path in target.iterdir()} == {path.name for path in written}
    figures = {path.stem for path in written if path.suffix == ".svg"}
    assert figures == {path.stem for path in written if path.suffix == ".png"}
    for name in (
        "perplexity_vs_bits",
        "kl_vs_bits",
        "accuracy_vs_bits",
        "1-b-a-b-bit_allocation",
        "1-b-a-b-price_curve",
        "1-b-a-b-gap_by_layer",
        "1-b-a-b-predicted_vs_measured",
        "1-b-a-b-program_gap_by_layer",
        "1-b-a-b-loss_left_by_rank",
        "1-b-a-b-singular_values",
        "1-b-a-b-heatmap_error_rank_bits",
        "1-b-a-b-loss_vs_rank",
        "2-plain-bit_allocation",
        "2-plain-rank_allocation",
        "2-plain-relative_loss_by_layer",
    ):
        assert name in figures
    assert not any(name.startswith("2-plain-price") for name in figures)


def test_page_needs_no_network_and_runs_nothing(report):
    text = (report[0] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "b", "base"} & set(page.tags)
    assert page.values("src")
    assert all(value.startswith("data:image/svg+xml;base64,") for value in page.values("src"))
    assert all(value.startswith("#") for value in page.values("href"))
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "\x00" not in text
    assert "\u202e" not in text


def test_embedded_figures_are_xml_without_outside_references(report):
    page = Page((report[0] / "report.html").read_text(encoding="utf-8"))
    for source in page.values("src"):
        root = ElementTree.fromstring(base64.b64decode(source.partition(",")[2]))
        for element in root.iter():
            for key, value in element.attrib.items():
                if key.endswith("href"):
                    assert value.startswith(("#", "data:image/png;base64,"))  # colour bars
            assert not element.tag.endswith("script")


def test_links_lead_somewhere_and_ids_are_unique(report):
    page = Page((report[0] / "report.html").read_text(encoding="utf-8"))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.values("href")} <= set(ids)
    assert all(page.values("alt"))


def test_hostile_text_is_shown_as_it_is(report):
    page = Page((report[0] / "report.html").read_text(encoding="utf-8"))
    shown = HOSTILE.replace("\x00", " ").replace("\u202e", " ")
    assert sum(shown in piece for piece in page.text) > 10


def test_page_says_what_is_proved_and_what_not(tmp_path):
    run = read_run(making.write_run(tmp_path / "out"))
    text = " ".join(Page(page([run], [], [], [[]])).text)
    plan = making.certificate()["plan"]
    assert "What it does not prove" in text
    assert f"below {plan['bound']:.6g}" in text
    assert "joint" in text
    assert "not shown" not in text
    assert "No evaluation was given" in text
    assert "convex-caldera verify out" in text


def test_same_input_gives_the_same_bytes(tmp_path):
    out = making.write_run(tmp_path / "out", names=making.NAMES[:1], with_certificate=False)
    first = [p.read_bytes() for p in write_report([out], tmp_path / "a")]
    again = [p.read_bytes() for p in write_report([out], tmp_path / "b")]
    assert first == again


def test_folders_of_one_name_are_told_apart(tmp_path):
    outs = [
        making.write_run(tmp_path / name / "out", names=making.NAMES[:1], with_certificate=False)
        for name in ("x", "y")
    ]
    write_report(outs, tmp_path / "target")
    table = (tmp_path / "target/results.csv").read_text()
    assert "x/out" in table
    assert "y/out" in table


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(DataError, match="at least one"):
        write_report([], tmp_path)


def test_missing_matplotlib_writes_nothing(tmp_path, monkeypatch):
    out = making.write_run(tmp_path / "out")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RecipeError, match="pip install"):
        write_report([out], tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("ties", [(), (making.NAMES[:2], making.NAMES[3:5])])
def test_recheck_accepts_an_honest_plan(tmp_path, ties):
    contents = making.files()
    certificate = contents["certificate.json"] = making.certificate(ties=ties)
    out = making.write_run(tmp_path / "honest", contents)
    done = _recheck(out)
    assert done.returncode == 0, done.stderr
    assert f"{certificate['plan']['distortion']}" in done.stdout


FORGERIES = {
    "larger bound": lambda plan: {"bound": plan["bound"] * 1.0001},
    "negative price": lambda plan: {"price": -plan["price"], "bound": 0.0},
    "fewer bits": lambda plan: {"bits": plan["bits"] - 1},
    "smaller budget": lambda plan: {"budget_bits": plan["bits"] - 1},
    "smaller loss": lambda plan: {"distortion": plan["distortion"] * 0.9999},
    "another choice": lambda plan: {"choice": plan["choice"] | {making.NAMES[0]: "4b"}},
}


@pytest.mark.parametrize("name", FORGERIES)
def test_recheck_refuses_a_forgery(tmp_path, name):
    contents = making.files()
    plan = contents["certificate.json"]["plan"]
    assert plan["choice"][making.NAMES[0]] != "4b"
    plan |= FORGERIES[name](plan)
    assert "AssertionError" in _recheck(making.write_run(tmp_path / "forged", contents)).stderr


def _recheck(out):
    command = [sys.executable, "-I", "-c", RECHECK]
    return subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
