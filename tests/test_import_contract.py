"""Who imports whom: the contracts of pyproject.toml hold, and they notice a planted breach."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "convex_caldera"
SLOW_TO_IMPORT = {"torch", "transformers", "scipy", "numba", "matplotlib", "ray", "triton"}
# What the independent checker may use; a bug in the package must not be able to hide there.
CHECKER_MAY_IMPORT = {"numpy", "safetensors", "convex_caldera.certify", "convex_caldera.errors"}


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            Path(sys.executable).parent / "lint-imports",
            "--no-cache",
            "--config",
            root / "pyproject.toml",
        ],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "src"), "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_import_contracts_hold():
    report = lint(ROOT)
    assert report.returncode == 0, report.stdout + report.stderr


BREACHES = [
    ("core", "from convex_caldera.fit import backfit", "Rooms import only rooms below"),
    ("linalg", "import convex_caldera.core.problem", "Rooms import only rooms below"),
    ("fit", "import convex_caldera.allocate", "Rooms import only rooms below"),
    ("errors.py", "import convex_caldera.linalg.factor", "Rooms import only rooms below"),
    ("core", "def load():\n    import transformers", "transformers and datasets"),
    ("linalg", "import cvxpy", "Modelling languages"),
    ("evaluate", "import matplotlib.pyplot", "matplotlib only in report"),
    ("recipes", "import triton", "triton only in runtime.kernels"),
    ("fit", "import pydantic", "The mathematics knows nothing"),
]


def plant(root: Path, room: str, line: str) -> None:
    package = root / "src/convex_caldera"
    planted = package / room if room.endswith(".py") else package / room / "planted.py"
    with planted.open("a") as file:
        file.write(f"\n{line}\n")


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "src/convex_caldera", ignore=_only_python)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def assert_broken(report, contract):
    lines = report.stdout.splitlines()
    assert any(contract in text and "BROKEN" in text for text in lines), report.stdout


def test_import_contracts_notice_all_breaches_at_once(copied):
    for room, line, _ in BREACHES:
        plant(copied, room, line)
    report = lint(copied)
    assert report.returncode == 1, report.stdout + report.stderr
    for room, line, broken in BREACHES:
        assert_broken(report, broken)
        owner = room.removesuffix(".py") if room.endswith(".py") else f"{room}.planted"
        imported = line.split()[-1].removesuffix(".pyplot")
        assert re.search(rf"convex_caldera\.{owner} -> \S*{imported}\b", report.stdout), (
            report.stdout
        )


@pytest.mark.slow
@pytest.mark.parametrize(("room", "line", "broken"), BREACHES)
def test_import_contracts_notice_a_breach(copied, room, line, broken):
    plant(copied, room, line)
    report = lint(copied)
    assert report.returncode == 1, report.stdout + report.stderr
    assert_broken(report, broken)


def _only_python(folder: str, names: list[str]) -> set[str]:
    keep = (".py",)
    paths = {name: Path(folder) / name for name in names}
    return {
        n for n, p in paths.items() if n == "__pycache__" or (p.is_file() and p.suffix not in keep)
    }


def test_every_room_is_a_package():
    """A folder without __init__.py would be skipped by the contracts without a word."""
    folders = {path.parent for path in SOURCE.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


@pytest.mark.skipif(not list(SOURCE.glob("certify/*.py")), reason="there is no checker yet")
def test_checker_imports_nothing_that_it_checks():
    for path in SOURCE.glob("certify/**/*.py"):
        for module in _imported(path):
            allowed = module.split(".")[0] in sys.stdlib_module_names or any(
                module == name or module.startswith(name + ".") for name in CHECKER_MAY_IMPORT
            )
            assert allowed, f"{path.name} imports {module}"


def _imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import; write it out"
            found.add(node.module)
    return found


@pytest.mark.parametrize("module", ["convex_caldera", "convex_caldera.errors"])
def test_import_of_the_package_stays_light(module):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not SLOW_TO_IMPORT & set(loaded)
