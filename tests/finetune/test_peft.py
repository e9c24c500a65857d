"""PEFT finds our layers by their sizes, trains beside them and saves an ordinary adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convex_caldera.errors import ModelError, RecipeError
from convex_caldera.finetune.adapters import attach, load_adapter
from convex_caldera.runtime.load import load
from tests import tiny_models
from tests.optional import needs
from tests.workflow.fixtures import Output

pytestmark = needs("peft")
TOKENS = torch.arange(24).view(2, 12) * 7 % 320


OPTIONS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


def five_steps(model: Any, tokens: torch.Tensor, *, labels: torch.Tensor, lr: float) -> list[float]:
    """The loss before each of five steps on what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=lr), []
    for _ in range(5):
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
def test_adapter_is_trained_saved_and_loaded(
    compressed: Callable[..., Output], tmp_path: Path
) -> None:
    directory = compressed("caldera").directory
    torch.manual_seed(0)
    model = attach(load(directory, dtype=torch.float32), **OPTIONS)
    with torch.no_grad():
        before = model(TOKENS).logits
        plain = load(directory, dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(before, plain, rtol=1e-4, atol=1e-4)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # two factors of two layers in two blocks
    losses = five_steps(model, TOKENS, labels=TOKENS, lr=0.05)
    assert losses[-1] < losses[0]

    model.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    again = load_adapter(load(directory, dtype=torch.float32), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)
        with model.disable_adapter():
            torch.testing.assert_close(model(TOKENS).logits, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_classification_head_is_trained_and_saved_with_its_adapter(
    compressed: Callable[..., Output], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    def classifier() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(
            compressed("caldera").directory, num_labels=2, dtype=torch.float32
        )
        model.config.pad_token_id = 0
        return model

    torch.manual_seed(0)
    model = attach(classifier(), task_type="SEQ_CLS", **OPTIONS)
    losses = five_steps(model, TOKENS + 1, labels=torch.tensor([0, 1]), lr=0.01)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(classifier(), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS + 1).logits, model(TOKENS + 1).logits)


def test_adapter_of_another_model_is_refused(
    compressed: Callable[..., Output], tmp_path: Path
) -> None:
    attach(load(compressed("gptq").directory), **OPTIONS).save_pretrained(tmp_path / "adapter")
    wider = tiny_models.build("llama", intermediate_size=96)
    with pytest.raises(ModelError, match=r"another model: .*down_proj has 96 inputs here, 112"):
        load_adapter(wider, tmp_path / "adapter")
    shorter = tiny_models.build("llama", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"another model: no model\.layers\.1"):
        load_adapter(shorter, tmp_path / "adapter")
    with pytest.raises(ModelError, match="holds no adapter"):
        load_adapter(wider, tmp_path)


def test_options_that_read_dense_weights_are_refused(compressed: Callable[..., Output]) -> None:
    model = load(compressed("gptq").directory)
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(RecipeError, match="dense"):
            attach(model, **OPTIONS, **options)
