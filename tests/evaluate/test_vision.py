"""Batched answers are the model's own, given pixels and one prompt at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from convex_caldera.errors import DataError, ModelError, NumericalError
from convex_caldera.evaluate.vision import (
    answer,
    image_features,
    load_vision_inputs,
    read_image,
)
from convex_caldera.models.tokenizer import load_tokenizer
from tests import tiny_vision

pytest.importorskip("PIL", reason="pillow is not installed; pip install pillow")
ASKED = [row["text"] for row in tiny_vision.QUESTIONS[:3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_vision.save(tmp_path_factory.mktemp("vision"), seed=3)
    tiny_vision.pictures(path / "images")
    return path


@pytest.fixture(scope="module")
def ready(folder: Path) -> tuple[Any, Any, list[Any]]:
    inputs = load_vision_inputs(folder, load_tokenizer(folder))
    images = [read_image(folder / "images" / f"{i}.png") for i in range(3)]
    return tiny_vision.build(3), inputs, images


def test_batched_answers_are_those_of_pixels_and_places(ready: tuple[Any, Any, list[Any]]) -> None:
    model, inputs, images = ready
    expected = []
    for image, question in zip(images, ASKED, strict=True):
        pixels = inputs.image_processor(images=[image], return_tensors="pt")
        ids = inputs.tokenizer(inputs.prompt(question), add_special_tokens=False)["input_ids"]
        number = len(image_features(model, inputs, [image])[0])
        place = ids.index(tiny_vision.IMAGE)
        ids = torch.tensor([ids[:place] + [tiny_vision.IMAGE] * number + ids[place + 1 :]])
        produced = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=1,
            pixel_values=pixels["pixel_values"], image_sizes=pixels["image_sizes"],
            do_sample=False, max_new_tokens=6,
        )  # fmt: skip
        expected.append(inputs.tokenizer.decode(produced[0, ids.shape[1] :], True))
    assert answer("tiny", model, inputs, images, ASKED, max_new_tokens=6) == expected
    assert len(set(expected)) > 1


def test_the_image_matters_and_its_shape_decides_its_places(
    ready: tuple[Any, Any, list[Any]],
) -> None:
    model, inputs, images = ready
    wide, square = (len(image_features(model, inputs, [images[i]])[0]) for i in (2, 1))
    assert wide > square >= 4
    seen: list[torch.Tensor] = []
    for image in images[:2]:
        answer(
            "tiny", model, inputs, [image], ASKED[:1], max_new_tokens=1, on_logits=seen.append
        )  # fmt: skip
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_a_chat_template_places_the_image(ready: tuple[Any, Any, list[Any]], folder: Path) -> None:
    _, inputs, _ = ready
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    chatty = load_vision_inputs(folder, inputs.tokenizer)
    assert chatty.prompt("Is it?") == "<user><image>Is it?<bot>"
    (folder / "chat_template.jinja").write_text("{{ messages[0].content[1].text }}")
    with pytest.raises(ModelError, match="makes 0 places"):
        load_vision_inputs(folder, inputs.tokenizer).prompt("Is it?")
    (folder / "chat_template.jinja").unlink()


def test_missing_and_corrupt_images_are_told_apart(tmp_path: Path) -> None:
    whole = (tiny_vision.pictures(tmp_path) / "1.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    for name, message in (("none.png", "missing"), ("cut.png", "corrupt"), ("text.png", "corrupt")):
        with pytest.raises(DataError, match=f"{name}: {message}"):
            read_image(tmp_path / name)


def test_nan_logits_stop_and_name_the_question(ready: tuple[Any, Any, list[Any]]) -> None:
    _, inputs, images = ready
    broken = tiny_vision.build(3)
    with torch.no_grad():
        broken.model.language_model.norm.weight[0] = math.nan
    with pytest.raises(NumericalError, match=r"tiny: logits are NaN .* question 7"):
        answer("tiny", broken, inputs, images[:2], ASKED[:2], first=7)


def test_directories_without_an_image_processor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="image processor"):
        load_vision_inputs(tmp_path, None)
