"""A random LLaVA-OneVision of two blocks with a SigLIP tower, its processor, and images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import tiny_models

IMAGE, SIDE = 320, 28  # the image token, after the tokenizer's own; pixels a side of a tile
QUESTIONS = [
    {"image": f"{number % 3}.png", "text": f"Is there a {thing} in the image?", "label": label}
    for number, (thing, label) in enumerate(
        [("dog", "yes"), ("fox", "no"), ("matrix", "yes"), ("weight", "no")]
    )
]


def build(seed: int = 0) -> Any:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    text = Qwen2Config(
        vocab_size=IMAGE + 2, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=112, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        image_size=SIDE, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE,
        video_token_index=IMAGE + 1, image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE]],
        tie_word_embeddings=True, vision_feature_layer=-1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.data.normal_(0.0, 0.2)
    return model


def save(directory: Path, seed: int = 0) -> Path:
    """Model, tokenizer with image token, image processor."""
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    build(seed).save_pretrained(directory)
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    tokenizer.save_pretrained(directory)
    LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE]],
    ).save_pretrained(directory)
    return directory


def pictures(folder: Path, count: int = 3) -> Path:
    """Generated images of several shapes: 0.png, 1.png, ..."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number, shape in zip(range(count), [(20, 30), (40, 40), (25, 60)], strict=True):
        values = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
    return folder


def questions(folder: Path, splits: tuple[str, ...] = ("random", "popular", "adversarial")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        lines = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
        (folder / f"pope_coco_{split}.jsonl").write_text(lines)
    return folder
