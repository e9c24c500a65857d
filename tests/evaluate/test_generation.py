from __future__ import annotations

import collections
import copy
import math

import pytest
import torch

from convex_caldera.errors import NumericalError, RecipeError
from convex_caldera.evaluate import generate
from convex_caldera.evaluate.generation import _chooser
from tests.evaluate.tiny import byte_tokenizer, tiny_llama

MODEL, TOKENIZER = tiny_llama(5), byte_tokenizer()


def test_greedy_generation_equals_transformers():
    prompt = "To be, or"
    inputs = TOKENIZER(prompt, return_tensors="pt")
    theirs = MODEL.generate(**inputs, do_sample=False, max_new_tokens=20)[0]
    expected = TOKENIZER.decode(theirs[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    pieces = []
    ours = generate(MODEL, TOKENIZER, prompt, max_new_tokens=20, on_text=pieces.append)
    assert ours == expected
    assert len(ours) > 3
    assert ours.startswith("".join(pieces))


def test_sampling_is_a_function_of_its_seed_and_leaves_the_global_state():
    before = torch.random.get_rng_state()
    texts = [generate(MODEL, TOKENIZER, "a", temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_sampling_follows_the_probabilities_of_the_nucleus():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    source = torch.Generator().manual_seed(0)
    choose = _chooser(1.0, 0.79, source)
    drawn = collections.Counter(choose(logits) for _ in range(4000))
    assert set(drawn) == {1, 3}
    # Five standard errors of a share of 5/8 in 4000 draws.
    assert abs(drawn[1] / 4000 - 0.5 / 0.8) < 5 * math.sqrt(0.625 * 0.375 / 4000)


def test_generation_stops_at_the_end_token_and_at_the_end_of_the_context():
    stopping = copy.deepcopy(MODEL)
    first = stopping(torch.tensor([TOKENIZER("ab")["input_ids"]])).logits[0, -1].argmax().item()
    stopping.generation_config.eos_token_id = [first]
    assert generate(stopping, TOKENIZER, "ab") == ""
    inputs = TOKENIZER("a" * 125, return_tensors="pt")
    theirs = MODEL.generate(**inputs, do_sample=False, max_length=128)[0, 125:]
    assert len(theirs) == 3
    assert generate(MODEL, TOKENIZER, "a" * 125) == TOKENIZER.decode(theirs)
    with pytest.raises(RecipeError, match="128 tokens but the model reads at most 128"):
        generate(MODEL, TOKENIZER, "a" * 128)


def test_generation_in_chat_form_reads_the_template():
    chatty = byte_tokenizer()
    with pytest.raises(RecipeError, match="no chat template"):
        generate(MODEL, chatty, "hello", chat=True)
    chatty.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    spoken = generate(MODEL, chatty, "hello", chat=True)
    assert spoken == generate(MODEL, chatty, "<user>hello<bot>")
    assert spoken != generate(MODEL, chatty, "hello")


def test_generation_from_nothing_starts_at_bos():
    assert generate(MODEL, TOKENIZER, "", max_new_tokens=5)
    with pytest.raises(RecipeError, match="no BOS"):
        generate(MODEL, byte_tokenizer(bos=False), "")


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_generation_refuses_options_out_of_range(wrong):
    with pytest.raises(RecipeError, match="generation needs"):
        generate(MODEL, TOKENIZER, "a", **wrong)


def test_generation_refuses_nan_logits():
    broken = copy.deepcopy(MODEL)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(NumericalError, match="NaN at position 1"):
        generate(broken, TOKENIZER, "a")
