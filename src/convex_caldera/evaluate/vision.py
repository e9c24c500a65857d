"""Answers of a vision-language model to questions about images, several at a time.

The image processor cuts and normalizes an image, the tower and projector turn it into feature
vectors, once; their number says how many places the prompt needs, and they are put there. Prompts
are padded on the left and answered greedily. Whole processors of transformers are not used: they
ask for torchvision, if only to be ready for videos.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convex_caldera.errors import DataError, ModelError, NumericalError, RecipeError

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class VisionInputs:
    """What turns images and text into inputs, read from a model's directory."""

    image_processor: Any
    tokenizer: Any
    template: str | None

    def prompt(self, question: str) -> str:
        """The user's turn in chat form, with one place for the image; ends before the answer."""
        if self.template is None:
            return f"{IMAGE_TOKEN}\n{question}\n"
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        ]
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        if text.count(IMAGE_TOKEN) != 1:
            raise ModelError(
                f"the chat template makes {text.count(IMAGE_TOKEN)} places {IMAGE_TOKEN} for one "
                "image; it is not one of a vision-language model"
            )
        return text


def load_vision_inputs(path: Path, tokenizer: Any) -> VisionInputs:
    """Image processor and chat template of a model directory.

    Raises:
        ModelError: there is no image processor.
        RecipeError: pillow is not installed.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            "images need pillow; install the extra: pip install 'convex-caldera[vision]'"
        ) from error
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{path}: cannot read the image processor: {first}") from error
    return VisionInputs(processor, tokenizer, _template(path, tokenizer))


def _template(path: Path, tokenizer: Any) -> str | None:
    """The processor's template where there is one, else the tokenizer's if it places images."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    if (path / "chat_template.json").is_file():
        return json.loads((path / "chat_template.json").read_text())["chat_template"]
    own = getattr(tokenizer, "chat_template", None)
    return own if isinstance(own, str) and IMAGE_TOKEN in own else None


def read_image(path: Path) -> Any:
    """An RGB image. Raises DataError if it is missing or corrupt."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"{path.name}: missing") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path.name}: corrupt ({error})") from error


def answer(
    name: str,
    model: Any,
    inputs: VisionInputs,
    images: Sequence[Any],
    questions: Sequence[str],
    *,
    max_new_tokens: int = 16,
    first: int = 0,
    on_logits: Callable[[Tensor], None] | None = None,
) -> list[str]:
    """Greedy answers to one batch of questions, one image each.

    Args:
        name: of the model, for messages.
        model: a transformers image-text-to-text model in evaluation mode.
        inputs: of `load_vision_inputs`.
        images, questions: of equal number.
        max_new_tokens: of an answer.
        first: number of the first question, for messages.
        on_logits: sees the logits of every step, (batch, vocabulary).

    Raises:
        NumericalError: NaN or infinite logits; names the first question of the batch.
        ModelError: the tokenizer has no image token.
    """
    with torch.no_grad():
        features = image_features(model, inputs, images)
        embeds, mask = _embedded(model, inputs, questions, features)
        longest = max_new_tokens

        def watch(_: Tensor, logits: Tensor) -> Tensor:
            bad = (~logits.isfinite().all(-1)).nonzero()
            if len(bad):
                raise NumericalError(
                    f"{name}: logits are NaN or infinite, first in question {first + int(bad[0])}; "
                    "inspect the model's weights"
                )
            if on_logits is not None:
                on_logits(logits)
            return logits

        produced = model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=longest,
            pad_token_id=_padding(inputs.tokenizer),
            logits_processor=[watch],
        )
    return inputs.tokenizer.batch_decode(produced, skip_special_tokens=True)


def image_features(model: Any, inputs: VisionInputs, images: Sequence[Any]) -> list[Tensor]:
    """Vectors (tokens, width) that stand for each image in the prompt."""
    device = next(model.parameters()).device
    found = []
    for image in images:
        pixels = inputs.image_processor(images=[image], return_tensors="pt")
        sizes = pixels["image_sizes"].to(device) if "image_sizes" in pixels else None
        values = pixels["pixel_values"].to(device, next(model.parameters()).dtype)
        output = model.get_image_features(pixel_values=values, image_sizes=sizes)
        packed = getattr(output, "pooler_output", output)
        found.append(torch.cat(list(packed)))
    return found


def _embedded(
    model: Any, inputs: VisionInputs, questions: Sequence[str], features: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Prompts with features in their places, padded on the left, and what may be looked at."""
    token = inputs.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if token is None or token == inputs.tokenizer.unk_token_id:
        raise ModelError(f"the tokenizer has no token {IMAGE_TOKEN}")
    table = model.get_input_embeddings()
    rows = []
    for question, vectors in zip(questions, features, strict=True):
        # The template writes its own special tokens.
        ids = inputs.tokenizer(inputs.prompt(question), add_special_tokens=False)["input_ids"]
        if ids.count(token) != 1:
            raise ModelError(f"the prompt has {ids.count(token)} tokens {IMAGE_TOKEN}, not one")
        place = ids.index(token)
        before, after = (
            table(torch.tensor(part, dtype=torch.int64, device=vectors.device))
            for part in (ids[:place], ids[place + 1 :])
        )
        rows.append(torch.cat([before, vectors.to(before.dtype), after]))
    width = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), width, rows[0].shape[1])
    mask = torch.zeros(len(rows), width, dtype=torch.int64, device=embeds.device)
    for number, row in enumerate(rows):
        embeds[number, width - len(row) :] = row
        mask[number, width - len(row) :] = 1
    return embeds, mask


def _padding(tokenizer: Any) -> int:
    """Any token will do: what is padded is not looked at, and ended answers are cut there."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0
