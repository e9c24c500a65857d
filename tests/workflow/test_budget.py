"""A budget is never exceeded, whatever its form, and stated bits are bytes on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.errors import InfeasibleBudgetError
from convex_caldera.recipes.table import METHODS
from convex_caldera.storage.read import open_container
from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.estimate import estimate
from convex_caldera.workflow.settings import make_settings
from tests.examples import examples, first
from tests.workflow.running import NSAMPLES, SEQLEN, shard_bytes

# A layer of more weights than headers; neither width is a power of two.
WIDE = {"num_hidden_layers": 1, "hidden_size": 96, "intermediate_size": 112}
WEIGHTS = 3 * 96 * 112 + 2 * 96 * 96 + 2 * 96 * 48
KEPT_BYTES = 250_000  # about what embedding and head take

bits = st.integers(1500, 6000).map(lambda thousandths: thousandths / 1000)


@pytest.fixture(scope="module")
def wide(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", **WIDE)


def make(model: Path, method: str, text: Path, **budget: Any) -> Any:
    return make_settings(
        model=str(model), method=method, dataset=str(text), nsamples=NSAMPLES, seqlen=SEQLEN,
        **budget,
    )  # fmt: skip


@cache
def least_bits(method: str, model: Path, text: Path) -> int:
    """The least feasible budget, as the refusal of an impossible one states it."""
    with pytest.raises(InfeasibleBudgetError) as caught:
        estimate(make(model, method, text, bits=0.1))
    assert caught.value.least_bits is not None
    return caught.value.least_bits


# One method of each family first; the others fill ladders by the same code.
FIRST = [
    "rtn", "gptq", "quip-sharp", "caldera", "qtip", "lqer", "scl-ecsq", "reallm-vq",
    "convex-caldera",
]  # fmt: skip


@pytest.mark.parametrize(
    "method", first(len(FIRST), [*FIRST, *(name for name in METHODS if name not in FIRST)])
)
@given(budget=bits)
@examples(12)
def test_plans_stay_within_bits(wide: Path, text: Path, method: str, budget: float) -> None:
    wish = make(wide, method, text, bits=budget)
    if budget * WEIGHTS < (least := least_bits(method, wide, text)):
        with pytest.raises(InfeasibleBudgetError) as caught:
            estimate(wish)
        assert caught.value.least_bits == least
        return
    plan = estimate(wish).plan
    assert 8 * plan.compressed_bytes <= budget * WEIGHTS
    assert plan.weights == WEIGHTS


@given(budget=bits, size=st.integers(KEPT_BYTES, KEPT_BYTES + 60_000))
@examples(8)
def test_files_stay_within_bits_and_bytes(
    wide: Path, text: Path, tmp_path_factory: pytest.TempPathFactory, budget: float, size: int
) -> None:
    for wish in ({"bits": budget}, {"size": str(size)}):
        out = tmp_path_factory.mktemp("budget") / "out"
        try:
            summary = compress_to(make(wide, "rtn", text, **wish), out)
        except InfeasibleBudgetError:
            assert not out.exists()
            continue
        on_disk = shard_bytes(out)
        assert summary.file_bytes == on_disk["all"]
        assert summary.bits_per_compressed_weight == 8 * on_disk["compressed"] / WEIGHTS
        if "bits" in wish:
            assert 8 * on_disk["compressed"] <= budget * WEIGHTS
        else:
            assert on_disk["all"] <= size


@pytest.mark.parametrize(
    ("method", "wish"),
    first(
        4,
        [
            ("gptq", {"bits": 3.3}),
            ("nf4", {"bits": 4.6}),
            ("qtip", {"size": "280kB"}),
            ("gptq", {"ratio": "1.8x"}),
            ("quip-sharp", {"bits": 3.9}),
            ("convex-caldera", {"bits": 3.2}),
            ("caldera", {"bits": 4.5, "rank": 4}),
            ("convex-caldera", {"ratio": "1.8x"}),
        ],
    ),
)
def test_every_method_keeps_its_budget(
    wide: Path, text: Path, tmp_path: Path, method: str, wish: dict[str, Any]
) -> None:
    summary = compress_to(make(wide, method, text, **wish), tmp_path / "out")
    on_disk, original = shard_bytes(tmp_path / "out"), (wide / "model.safetensors").stat().st_size
    assert summary.file_bytes == on_disk["all"]
    assert on_disk["compressed"] <= summary.budget_bytes
    allowed = {
        "bits": lambda value: on_disk["compressed"] <= value * WEIGHTS / 8,
        "size": lambda value: on_disk["all"] <= 1000 * float(value.removesuffix("kB")),
        "ratio": lambda value: on_disk["all"] * float(value.removesuffix("x")) <= original,
        "rank": lambda value: True,
    }
    assert all(allowed[key](value) for key, value in wish.items())
    container = open_container(tmp_path / "out")
    report = container.report()
    assert report["budget_bytes"] == summary.budget_bytes
    assert report["planned_bytes"] == on_disk["compressed"]
    # No more is left over than the next rung of some layer would take.
    assert summary.budget_bytes - on_disk["compressed"] < 0.2 * WEIGHTS / 8


@pytest.mark.parametrize("menu", first(1, ["2,4", "2,3,4,5"]))
@pytest.mark.slow
def test_ties_menus_and_pins_are_obeyed(wide: Path, text: Path, tmp_path: Path, menu: str) -> None:
    wish = {
        "bits": 4.5,
        "tie": ("q_proj,k_proj,v_proj", "gate_proj,up_proj"),
        "bits_menu": menu,
        "rank_menu": "0,2",
        "pin": ("down_proj=bits:2",),
    }
    summary = compress_to(make(wide, "convex-caldera", text, **wish), tmp_path / "out")
    assert shard_bytes(tmp_path / "out")["compressed"] <= summary.budget_bytes == 4.5 * WEIGHTS / 8
    container = open_container(tmp_path / "out")
    certificate = json.loads(
        (tmp_path / "out" / "convex_caldera" / "certificate.json").read_text(encoding="utf-8")
    )
    label = {name.rpartition(".")[2]: text for name, text in certificate["plan"]["choice"].items()}
    assert label["q_proj"] == label["k_proj"] == label["v_proj"]
    assert label["gate_proj"] == label["up_proj"]
    for name, (_, spec) in container.layers.items():
        (codes,) = [term for term in spec["terms"] if term["kind"] == "coded"]
        offered = {2} if "down_proj" in name else {int(bits) for bits in menu.split(",")}
        assert codes["quantizer"]["bits"] in offered, name
    assert {layer["rank"] for layer in container.report()["layers"].values()} <= {0, 2}


@pytest.mark.parametrize("method", first(1, ["gptq", "convex-caldera"]))
def test_pins_and_ignored_layers_are_obeyed(
    wide: Path, text: Path, tmp_path: Path, method: str
) -> None:
    wish = {"bits": 4, "pin": ("q_proj=bits:2", "down_proj=bits:6"), "ignore": ("v_proj",)}
    compress_to(make(wide, method, text, **wish), tmp_path / "out")
    container = open_container(tmp_path / "out")
    layers = container.report()["layers"]
    assert len(layers) == 6 and not [name for name in layers if "v_proj" in name]
    assert "model.layers.0.self_attn.v_proj.weight" in container.rest
    (q,) = [layer for name, layer in layers.items() if "q_proj" in name]
    (down,) = [layer for name, layer in layers.items() if "down_proj" in name]
    assert 2 <= q["bits"] < 3 and 6 <= down["bits"] < 7


@pytest.mark.parametrize("coder", [None, "rans"])
def test_a_plan_says_that_a_coder_will_save_more(wide: Path, text: Path, coder: str | None) -> None:
    found = estimate(make(wide, "scl-lloyd-max", text, bits=4, coder=coder))
    assert [note.partition(" ")[0] for note in found.notes] == (["codes"] if coder else [])
    assert ("note: codes" in found.text()) == bool(coder)
