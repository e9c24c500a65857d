from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from convex_caldera.calibrate.diagonal_file import diagonal_of, read_diagonal_hessians
from convex_caldera.errors import FormatError, NumericalError, RecipeError, ShapeError
from convex_caldera.models.aliases import aliases, known_alias

LAYER = "language_model.model.layers.0.mlp.up_proj"
GOOD = {
    LAYER: torch.arange(6, dtype=torch.float64),
    "vision_tower.vision_model.encoder.layers.2.mlp.fc1": torch.ones(4),
}


def saved(folder: Path, content: Any) -> Path:
    path = folder / "diag_Hessians.pt"
    torch.save(content, path)
    return path


def test_entries_are_found_under_old_and_new_names(tmp_path: Path) -> None:
    diagonals = read_diagonal_hessians(saved(tmp_path, GOOD))
    assert all(d.dtype == torch.float64 for d in diagonals.values())
    layers = {
        LAYER: (3, 6),
        "model.language_model.layers.0.mlp.up_proj": (3, 6),
        "model.vision_tower.encoder.layers.2.mlp.fc1": (2, 4),
    }
    found = diagonal_of(layers, diagonals)
    assert list(found) == list(layers)
    assert torch.equal(found["model.language_model.layers.0.mlp.up_proj"], diagonals[LAYER])


def test_keys_with_a_second_prefix_or_a_suffix_are_known() -> None:
    keys = {"language_model.model.layers.0.mlp.up_proj.weight"}
    assert known_alias("model.layers.0.mlp.up_proj", keys) is None
    assert known_alias(LAYER, keys) in keys
    assert "model.layers.0.x" in set(aliases("language_model.model.layers.0.x"))
    assert next(aliases(LAYER)) == LAYER


def test_no_code_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    with pytest.raises(FormatError, match="not a file of plain tensors"):
        read_diagonal_hessians(saved(tmp_path, {"x": Evil()}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([torch.ones(2)], FormatError, "dict of tensors, not list"),
        ({}, FormatError, "dict of tensors"),
        ({"a": torch.ones(2, 2)}, FormatError, "'a' is not a 1-D tensor"),
        ({"a": 1.0}, FormatError, "'a' is not a 1-D tensor"),
        ({"a": torch.tensor([1.0, math.nan])}, NumericalError, "a has NaN"),
        ({"a": torch.tensor([-1.0])}, NumericalError, "negative"),
    ],
)
def test_other_contents_are_refused(
    content: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        read_diagonal_hessians(saved(tmp_path, content))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, GOOD)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"diag_Hessians.pt"):
            read_diagonal_hessians(path)


def test_absent_layers_and_other_widths_are_named() -> None:
    with pytest.raises(RecipeError, match=r"no diagonal for other \(1 of 2 layers\)"):
        diagonal_of({LAYER: (3, 6), "other": (1, 1)}, GOOD)
    with pytest.raises(ShapeError, match=r"6 entries but .* reads 5"):
        diagonal_of({LAYER: (3, 5)}, GOOD)
