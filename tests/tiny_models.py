"""Random two-layer models of every family, saved with a byte-level BPE tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 320
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Every matrix has a singular value decomposition; not every matrix has an inverse.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Rounding loses a little of each weight; feedback moves the loss where it hurts least.",
]

# What is common to all; widths are no powers of two.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GROUPED: dict[str, Any] = {"intermediate_size": 112, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "gemma": {**_GROUPED, "head_dim": 16},
    "phi3": _GROUPED,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
    "gpt_neox": {"intermediate_size": 96, "rotary_pct": 0.25},
}

# Blocks that return tuples, take a bias instead of a mask, or read one input in parallel.
FURTHER: dict[str, dict[str, Any]] = {
    "bloom": {},
    "falcon": {"new_decoder_architecture": False, "parallel_attn": True},
    "cohere": _GROUPED,
    "gemma2": {**_GROUPED, "head_dim": 16, "sliding_window": 8},
}


def build(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model with weights large enough that every layer matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**_COMMON, **(FAMILIES | FURTHER)[family], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(0.0, 0.2)
            elif name.endswith("bias"):
                parameter.data.normal_(0.0, 0.1)
    return model


def tokenizer() -> Any:
    """A byte-level BPE trained on a few sentences, with <s> = 0 and </s> = 1."""
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")


def save(directory: Path, family: str, *, shard: str = "5GB", **changes: Any) -> Path:
    """Write model and tokenizer to `directory`; a small `shard` size splits the weights."""
    build(family, **changes).save_pretrained(directory, max_shard_size=shard)
    tokenizer().save_pretrained(directory)
    return directory
