"""Tower and projector as parts to compress, and diagonal Hessians of a file for any part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convex_caldera.models.skeleton import Skeleton
from convex_caldera.runtime.linear import CompressedLinear
from convex_caldera.runtime.load import load
from tests import tiny_vision
from tests.tiny_models import SENTENCES
from tests.workflow.running import Ran, run

pytestmark = pytest.mark.slow

ALL = "language,tower,projector"
# The mission's rules: the last layers of the language model only, none of the small matrices.
LAST_LAYERS = ("--ignore", r"re:language_model\.model\.layers\.[01]\.", "--ignore", "k_proj",
               "--ignore", "v_proj")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision.save(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("PIL", reason="pillow is not installed; pip install pillow")
    return tiny_vision.pictures(tmp_path_factory.mktemp("images"))


def compress(model: Path, out: Path, *options: object) -> Ran:
    text = out.parent / "text.txt"
    text.write_text("\n".join(SENTENCES * 40))
    return run(
        "compress", model, "-o", out, "--method", "gptq", "--bits", 6, "--dataset", text,
        "--nsamples", 3, "--seqlen", 32, *options,
    )  # fmt: skip


def diagonals(model: Path, path: Path, older: bool = True, **changed: Any) -> Path:
    """A file as the mission's scripts wrote it, under the names of older releases."""
    sites = Skeleton(model).sites_of(("language", "tower"))
    generator = torch.Generator().manual_seed(0)
    content = {}
    for site in sites:
        name = site.name
        if older:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        content[name] = torch.rand(site.shape[1], generator=generator, dtype=torch.float64) + 0.1
    content |= {name: value for name, value in changed.items() if value is not None}
    for name, value in changed.items():
        if value is None:
            del content[name]
    torch.save(content, path)
    return path


class TestModules:
    """`--modules`."""

    @torch.no_grad()
    def test_every_part_is_compressed_through_its_own_inputs(
        self, model: Path, images: Path, tmp_path: Path
    ) -> None:
        from transformers import AutoModelForImageTextToText

        out, saved = tmp_path / "all", tmp_path / "saved"
        ran = compress(model, out, "--modules", ALL, "--images", images, "--hessians", saved)
        assert ran.code == 0, ran.err
        own, theirs = load(out), AutoModelForImageTextToText.from_pretrained(out)
        layers = [n for n, m in own.named_modules() if isinstance(m, CompressedLinear)]
        assert len(layers) == 3 * 7 + 3 * 6 + 2
        assert any("vision_tower" in n for n in layers)
        assert any("multi_modal_projector" in n for n in layers)
        pixels = torch.randn(1, 3, 3, 28, 28)
        sizes = torch.tensor([[28, 56]])
        found = [
            m.get_image_features(pixel_values=pixels, image_sizes=sizes).pooler_output[0]
            for m in (own, theirs, tiny_vision.build())
        ]
        assert torch.equal(found[0], found[1])
        change = (found[0] - found[2]).norm() / found[2].norm()
        assert 0 < change < 0.35
        ran = run("verify", out, "--model", model, "--hessians", saved)
        assert ran.code == 0, ran.out + ran.err
        report = json.loads((out / "convex_caldera" / "report.json").read_text())
        counts = {name: layer["tokens"] for name, layer in report["layers"].items()}
        tower = next(name for name in counts if name.startswith("vision_tower"))
        # Four patches a tile, at least two tiles an image; the text has 3 windows of 32 tokens.
        assert counts[tower] % 4 == 0 and counts[tower] >= 3 * 2 * 4
        assert counts["language_model.model.layers.0.mlp.up_proj"] == 96

    def test_statistics_of_the_tower_are_those_of_its_own_forward(
        self, model: Path, images: Path
    ) -> None:
        from convex_caldera.calibrate.images import collect_images
        from convex_caldera.workflow.images import ImageSet

        skeleton = Skeleton(model)
        sites = skeleton.image_parts
        chosen = ImageSet(images, 2, model)
        found = collect_images(skeleton, chosen, {site.block for site in sites})
        reference = tiny_vision.build()
        name = "model.multi_modal_projector.linear_2"
        seen: list[torch.Tensor] = []
        reference.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        with torch.no_grad():
            for image in chosen:
                reference.get_image_features(**image)
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()
        statistics = found[sites.projector[0].block]["multi_modal_projector.linear_2"]
        assert statistics.num_tokens == len(rows)
        expected = rows.T @ rows / len(rows)
        assert torch.allclose(statistics.second_moment(), expected, rtol=1e-4, atol=1e-5)

    def test_a_method_without_data_needs_no_images(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "rtn"
        ran = run("compress", model, "-o", out, "--method", "rtn", "--bits", 6,
                  "--modules", "projector")  # fmt: skip
        assert ran.code == 0, ran.err
        assert sum(isinstance(m, CompressedLinear) for m in load(out).modules()) == 2

    def test_plan_counts_the_chosen_parts(self, model: Path, tmp_path: Path) -> None:
        ran = run("plan", model, "--method", "gptq", "--bits", 6, "--modules", "tower",
                  json_to=tmp_path / "plan.json")  # fmt: skip
        assert ran.code == 0, ran.err
        assert len(ran.json["layers"]) == 18 and "tower and projector" in ran.json["memory"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--modules", "tower"), "reads images, not text: give --images DIR"),
            (("--modules", "eyes"), "eyes is no part of a model"),
            (("--modules", "tower", "--images", "/nowhere"), "no such folder"),
            (("--images", "."), "no layer is calibrated on images"),
            (("--modules", ALL, "--curvature", "kronecker"), "does not reach vision_tower"),
            (("--modules", ALL, "--targets", "drift-corrected"), "--modules language"),
        ],
    )
    def test_wrong_options_are_one_line(
        self, model: Path, tmp_path: Path, options: tuple[str, ...], message: str
    ) -> None:
        ran = compress(model, tmp_path / "out", *options)
        assert ran.code == 2 and message in ran.err and "Traceback" not in ran.err

    def test_models_without_eyes_are_refused(self, tiny_model: Any, tmp_path: Path) -> None:
        ran = compress(tiny_model("llama"), tmp_path / "out", "--modules", "tower")
        assert ran.code == 2 and "reads no images" in ran.err

    def test_a_corrupt_image_is_named(self, model: Path, images: Path, tmp_path: Path) -> None:
        folder = tiny_vision.pictures(tmp_path / "images")
        (folder / "1.png").write_text("not an image")
        ran = compress(model, tmp_path / "out", "--modules", ALL, "--images", folder)
        assert ran.code == 2 and "1.png: corrupt" in ran.err


class TestDiagonalHessians:
    """`--diag-hessians`."""

    def test_the_missions_recipe_from_file_to_proof(self, model: Path, tmp_path: Path) -> None:
        file = diagonals(model, tmp_path / "diag_Hessians.pt")
        out, saved = tmp_path / "out", tmp_path / "saved"
        ran = run(
            "compress", model, "-o", out, "--method", "caldera", "--rank", 4, "--bits", 9,
            "--diag-hessians", file, "--hessians", saved, "--modules", "language,tower",
            *LAST_LAYERS,
        )  # fmt: skip
        assert ran.code == 0, ran.err
        report = json.loads((out / "convex_caldera" / "report.json").read_text())
        assert report["curvature"] == "diagonal"
        assert report["diag_hessians"]["file"] == "diag_Hessians.pt"
        assert len(report["diag_hessians"]["sha256"]) == 64
        assert (
            'diag_hessians = "diag_Hessians.pt"'
            in (out / "convex_caldera" / "recipe.toml").read_text()
        )
        assert len(report["layers"]) == 1 * 5 + 3 * 4
        ran = run("verify", out, "--model", model, "--hessians", saved)
        assert ran.code == 0 and "diagonal curvature" in ran.out, ran.out + ran.err
        self.check_loss(model, file, out)

    def check_loss(self, model: Path, file: Path, out: Path) -> None:
        """The reported loss is sum_ij d_j e_ij^2 with the file's d."""
        from convex_caldera.storage.read import open_container

        name = "language_model.model.layers.2.mlp.down_proj"
        d = torch.load(file, weights_only=True)[name]
        W = Skeleton(model).checkpoint.tensor(f"{name}.weight").double()
        container = open_container(out)
        E = container.layer(name).decode().double() - W
        assert container.report()["layers"][name]["loss"] == pytest.approx(
            float((E.square() @ d).sum()), rel=1e-5
        )

    def test_another_file_is_another_run(self, model: Path, tmp_path: Path) -> None:
        from convex_caldera.storage.partial import PartialRun
        from convex_caldera.workflow.compress import prepare
        from convex_caldera.workflow.settings import make_settings

        prints = []
        for scale in (1.0, 2.0):
            file = diagonals(
                model, tmp_path / f"{scale}.pt",
                **{"language_model.model.layers.0.mlp.up_proj": scale * torch.ones(48)},
            )  # fmt: skip
            settings = make_settings(model=str(model), method="gptq", diag_hessians=str(file))
            prints.append(prepare(settings).fingerprint())
        assert prints[0]["recipe"] == prints[1]["recipe"] and prints[0] != prints[1]
        with PartialRun(tmp_path / "run", prints[0]):
            pass

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"language_model.model.layers.2.mlp.up_proj": None},
             "no diagonal for language_model.model.layers.2.mlp.up_proj (1 of 21 layers)"),
            ({"language_model.model.layers.2.mlp.up_proj": torch.ones(7)},
             "language_model.model.layers.2.mlp.up_proj has 7 entries but"),
            ({"language_model.model.layers.2.mlp.up_proj": -torch.ones(48)}, "negative entries"),
        ],
        ids=["missing", "wrong shape", "negative"],
    )  # fmt: skip
    def test_wrong_entries_are_one_line_that_names_them(
        self, model: Path, tmp_path: Path, changed: dict[str, Any], message: str
    ) -> None:
        file = diagonals(model, tmp_path / "d.pt", **changed)
        ran = compress(model, tmp_path / "out", "--diag-hessians", file)
        assert ran.code in (2, 4) and message in ran.err and "Traceback" not in ran.err

    def test_the_projector_has_no_entry(self, model: Path, tmp_path: Path) -> None:
        file = diagonals(model, tmp_path / "d.pt")
        ran = compress(model, tmp_path / "out", "--diag-hessians", file, "--modules", ALL)
        assert ran.code == 2 and "no diagonal for multi_modal_projector.linear_1" in ran.err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--curvature", "input"), "diag_hessians and curvature exclude each other"),
            (("--targets", "drift-corrected"), "diag_hessians and targets exclude each other"),
            (("--method", "rtn"), "rtn sees no data"),
        ],
    )
    def test_contradictions_are_one_line(
        self, model: Path, tmp_path: Path, options: tuple[str, ...], message: str
    ) -> None:
        file = diagonals(model, tmp_path / "d.pt")
        ran = compress(model, tmp_path / "out", "--diag-hessians", file, *options)
        assert ran.code == 2 and message in ran.err

    def test_a_file_that_is_not_there(self, model: Path, tmp_path: Path) -> None:
        ran = compress(model, tmp_path / "out", "--diag-hessians", tmp_path / "none.pt")
        assert ran.code == 2 and "no such file" in ran.err
