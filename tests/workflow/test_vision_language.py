"""LLaVA-OneVision: its language model compressed by the mission's rules, and POPE on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from convex_caldera.models.skeleton import Skeleton
from convex_caldera.runtime.linear import CompressedLinear
from convex_caldera.runtime.load import load
from tests import tiny_vision
from tests.tiny_models import SENTENCES
from tests.workflow.running import run

pytestmark = pytest.mark.slow

# The last two of three blocks; keys and values stay, as layers too small to be worth it.
RULES = ["--ignore", r"re:layers\.0\.", "--ignore", "k_proj", "--ignore", "v_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision.save(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def compressed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "gptq"
    text = out.parent / "text.txt"
    text.write_text("\n".join(SENTENCES * 40))
    ran = run(
        "compress", model, "-o", out, "--method", "gptq", "--bits", 6, "--dataset", text,
        "--nsamples", 4, "--seqlen", 32, *RULES,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return out


def test_sites_are_those_of_the_language_model_under_their_names_on_disk(model: Path) -> None:
    skeleton = Skeleton(model)
    # The tower has more weights than the language model and is left alone all the same.
    assert len(skeleton.structure.blocks) == 3 and not skeleton.whole_model
    assert all(s.name.startswith("language_model.model.layers.") for s in skeleton.sites)
    assert all(f"{s.name}.weight" in skeleton.checkpoint for s in skeleton.sites)
    first = skeleton.sites[0]
    assert skeleton.model.get_submodule(first.name).out_features == first.shape[0]
    names = [name for name, _ in skeleton.model.named_modules()]
    assert len(names) == len(set(names)) and first.name not in names
    original = tiny_vision.build()
    weight = original.get_submodule("model.language_model.layers.0.self_attn.q_proj").weight
    assert torch.equal(skeleton.tensor(f"{first.name}.weight"), weight.detach())


@torch.no_grad()
def test_rules_choose_layers_and_the_rest_is_as_it_was(compressed: Path) -> None:
    from transformers import AutoModelForImageTextToText

    own, theirs = load(compressed), AutoModelForImageTextToText.from_pretrained(compressed)
    layers = {n for n, m in own.named_modules() if isinstance(m, CompressedLinear)}
    kinds = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(layers) == 2 * len(kinds)
    assert all(n.startswith("model.language_model.layers.") for n in layers)
    assert not any(".0." in n or n.endswith(("k_proj", "v_proj")) for n in layers)
    tokens = torch.arange(12)[None]
    assert torch.equal(own(tokens).logits, theirs(tokens).logits)
    original = tiny_vision.build()
    assert 0 < (own(tokens).logits - original(tokens).logits).abs().max() < 1
    tower = "model.vision_tower.encoder.layers.1.mlp.fc1"
    assert torch.equal(own.get_submodule(tower).weight, original.get_submodule(tower).weight)


def test_verify_accepts_it_with_its_original(model: Path, compressed: Path) -> None:
    ran = run("verify", compressed, "--model", model)
    assert ran.code == 0, ran.out + ran.err


def test_gradients_reach_layers_by_their_names_on_disk(model: Path) -> None:
    from convex_caldera.models.original import load_original

    whole = load_original(model)
    for site in Skeleton(model).sites:
        assert whole.get_submodule(site.name) in set(whole.modules())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("PIL", reason="pillow is not installed; pip install pillow")
    folder = tmp_path_factory.mktemp("pope")
    tiny_vision.questions(folder / "questions")
    tiny_vision.pictures(folder / "images")
    return folder


class TestPope:
    """The command `eval-pope`."""

    def ask(self, folder: Path, *models: Path, extra: tuple[Any, ...] = ()) -> Any:
        return run(
            "eval-pope", *models, "--questions", folder / "questions",
            "--images", folder / "images", "--max-new-tokens", 2, *extra,
            json_to=folder / "pope.json",
        )  # fmt: skip

    def test_every_split_has_every_figure(
        self, folder: Path, model: Path, compressed: Path
    ) -> None:
        ran = self.ask(folder, model, compressed)
        assert ran.code == 0, ran.err
        original, other = ran.json["models"]
        for entry in (original, other):
            assert list(entry["splits"]) == ["adversarial", "popular", "random"]
            for score in entry["splits"].values():
                assert set(score) >= {"accuracy", "precision", "recall", "f1", "yes_ratio"}
                assert score["items"] == 4
        assert "difference" in other["splits"]["random"]
        assert "difference" not in original["splits"]["random"]
        assert "yes-ratio" in ran.out and ran.json["bad_images"] == {}

    def test_it_is_a_task_of_eval_too(self, folder: Path, model: Path) -> None:
        out = folder / "eval.json"
        wanted = ("eval", model, "--tasks", "pope", "--task-data", folder / "questions")
        ran = run(*wanted, "--images", folder / "images", "--limit", 2, json_to=out)
        assert ran.code == 0, ran.err
        (entry,) = ran.json["pope"]["models"]
        assert {score["items"] for score in entry["splits"].values()} == {2}
        ran = run(*wanted)
        assert ran.code == 2 and "--images DIR" in ran.err

    def test_bad_images_are_counted_listed_and_too_many_fail(
        self, folder: Path, model: Path
    ) -> None:
        (folder / "images" / "1.png").write_text("not an image")
        (folder / "images" / "2.png").unlink()
        try:
            ran = self.ask(folder, model, extra=("--splits", "random"))
            assert ran.code == 4 and "2 of 4 questions lack a usable image" in ran.err
            assert "1.png: corrupt" in ran.out and "2.png: missing" in ran.out
            assert ran.json["models"][0]["splits"]["random"]["items"] == 2
            ran = self.ask(folder, model, extra=("--splits", "random", "--max-bad", 0.5))
            assert ran.code == 0, ran.err
        finally:
            tiny_vision.pictures(folder / "images")

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            (("--splits", "hard"), "unknown split 'hard'"),
            (("--limit", 0), "limit must be at least 1"),
            (("--max-bad", 2), "max-bad"),
            (("--images", "/nowhere"), "no such folder"),
        ],
    )
    def test_wrong_options_are_one_line(
        self, folder: Path, model: Path, extra: tuple[Any, ...], message: str
    ) -> None:
        ran = self.ask(folder, model, extra=extra)
        assert ran.code == 2 and message in ran.err and "Traceback" not in ran.err

    def test_models_without_eyes_are_refused(self, folder: Path, tiny_model: Any) -> None:
        ran = self.ask(folder, tiny_model("llama"))
        assert ran.code == 2 and "reads no images" in ran.err
