"""Which of transformers' automatic classes makes a model: text only, or images and text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def auto_class(config: PretrainedConfig) -> Any:
    """AutoModelForCausalLM, or AutoModelForImageTextToText where only that knows the type.

    LLaVA-OneVision is of the second kind: its language model, vision tower and projector are
    parts of one model, which reads text alone as a causal language model does.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(config)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def reads_images(config: PretrainedConfig) -> bool:
    """Whether the model has a vision tower."""
    return hasattr(config, "vision_config")
