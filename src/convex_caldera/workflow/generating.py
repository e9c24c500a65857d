"""Continue a prompt with a model given by name."""

from __future__ import annotations

from collections.abc import Callable

from convex_caldera.evaluate.generation import generate
from convex_caldera.models.tokenizer import load_tokenizer
from convex_caldera.workflow.models import open_model


def generate_text(
    name: str,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
    device: str = "cpu",
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The text that the model puts after the prompt; see `evaluate.generation.generate`.

    `chat` None uses the chat template where the tokenizer has one, as an instructed model needs.
    """
    model = open_model(name)
    tokenizer = load_tokenizer(model.path)
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
    return generate(
        model.load(device),
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        on_text=on_text,
    )
