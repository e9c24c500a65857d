"""Continue a prompt, token by token, with a cache of keys and values.

Greedy at temperature 0; else nucleus sampling (Holtzman et al., arXiv 1904.09751): the least
set of most probable tokens whose mass reaches top_p, drawn with a generator of its own, so
that one seed gives one text and no global random state is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.errors import NumericalError, RecipeError


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The text a causal language model puts after a prompt, without the prompt.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        prompt: text to continue, or with `chat` the user's turn under the chat template.
        max_new_tokens: stop after so many; earlier at an end-of-sequence token or when the
            model's context is full.
        temperature: 0 is greedy; else logits are divided by it.
        top_p: mass of the nucleus, 0 < top_p <= 1.
        seed: of the sampling.
        chat: use the tokenizer's chat template.
        on_text: called with each piece of text as it is settled.

    Raises:
        RecipeError: an option is out of range, or there is no chat template.
        NumericalError: the model gives NaN logits.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise RecipeError(
            "generation needs temperature >= 0, 0 < top_p <= 1 and max_new_tokens >= 1, got "
            f"{temperature}, {top_p}, {max_new_tokens}"
        )
    ids = _prompt_ids(tokenizer, prompt, chat)
    choose = _chooser(temperature, top_p, torch.Generator().manual_seed(seed))
    produced: list[int] = []
    shown = ""
    for token in _tokens(model, ids, choose, max_new_tokens, _stop_ids(model, tokenizer)):
        produced.append(token)
        text = tokenizer.decode(produced, skip_special_tokens=True)
        # A trailing replacement character is the first part of one that is not yet complete.
        if on_text is not None and text.startswith(shown) and not text.endswith("\ufffd"):
            on_text(text[len(shown) :])
            shown = text
    return tokenizer.decode(produced, skip_special_tokens=True)


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise RecipeError("the tokenizer has no chat template; generate without --chat")
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # The template writes its own special tokens.
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids and tokenizer.bos_token_id is None:
        raise RecipeError("the prompt is empty and the tokenizer has no BOS token to start from")
    return ids or [tokenizer.bos_token_id]


def _tokens(
    model: nn.Module,
    ids: list[int],
    choose: Callable[[Tensor], int],
    max_new_tokens: int,
    stop: set[int],
) -> Iterator[int]:
    device = next(model.parameters()).device
    longest = getattr(model.config, "max_position_embeddings", None)
    room = max_new_tokens if longest is None else min(max_new_tokens, longest - len(ids))
    if room < 1:
        raise RecipeError(f"the prompt has {len(ids)} tokens but the model reads at most {longest}")
    step, cache = torch.tensor([ids], device=device), None
    for position in range(len(ids), len(ids) + room):
        with torch.no_grad():
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[0, -1].float().cpu(), output.past_key_values
        if logits.isnan().any():
            raise NumericalError(f"logits are NaN at position {position}; inspect the weights")
        token = choose(logits)
        if token in stop:
            return
        yield token
        step = torch.tensor([[token]], device=device)


def _chooser(temperature: float, top_p: float, source: torch.Generator) -> Callable[[Tensor], int]:
    def greedy(logits: Tensor) -> int:
        return int(logits.argmax())

    def sampled(logits: Tensor) -> int:
        chances, order = (logits.double() / temperature).softmax(-1).sort(descending=True)
        # Mass before each token: the nucleus is where it has not yet reached top_p.
        nucleus = chances.cumsum(-1) - chances < top_p
        return int(order[torch.multinomial(chances * nucleus, 1, generator=source)])

    return greedy if temperature == 0 else sampled


def _stop_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    settings = getattr(model, "generation_config", None)
    stop = getattr(settings, "eos_token_id", None)
    listed = stop if isinstance(stop, list) else [stop]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}
