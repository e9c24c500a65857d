"""Train the bundled model from the text every CPython carries. Seeded; 40 minutes on one core.

    MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0 python scripts/train_bundled_model.py OUT_DIR

Byte-level BPE of 4096 and a 6.5-million-parameter Llama (widths 288 and 800, grouped-query
attention, tied embedding), AdamW with warm-up and cosine decay, bfloat16 autocast, float16 on
disk. Windows have 256 tokens, the last fifth of the steps 512 at the same tokens per step. The
best state on the validation modules is kept. At the end its bits per byte on the test
modules stand beside `xz -9e` on the same bytes; both go to the log (OUT_DIR/training_log.json).
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from convex_caldera.bundled import corpus

VOCABULARY = 4096
BOS = "<|start|>"
WINDOW = 512


def train_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE; deterministic, since merges are counted over the whole text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def build_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=288,
        intermediate_size=800,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def nats_per_token(model: LlamaForCausalLM, ids: torch.Tensor, limit: int | None = None) -> float:
    """Mean cross entropy over non-overlapping windows, each starting with BOS."""
    windows = ids[: len(ids) // (WINDOW - 1) * (WINDOW - 1)].view(-1, WINDOW - 1)[:limit]
    windows = torch.cat([torch.zeros(len(windows), 1, dtype=torch.long), windows], dim=1)
    total = 0.0
    model.eval()
    with torch.no_grad():
        for batch in windows.split(8):
            logits = model(input_ids=batch).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            ).item()
    model.train()
    return total / (windows.shape[0] * (WINDOW - 1))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def parameter_groups(model: LlamaForCausalLM, decay: float) -> list[dict]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def sample_batch(
    ids: torch.Tensor, size: int, window: int, generator: torch.Generator
) -> torch.Tensor:
    starts = torch.randint(len(ids) - window + 1, (size,), generator=generator)
    batch = torch.stack([ids[s : s + window - 1] for s in starts.tolist()])
    return torch.cat([torch.zeros(size, 1, dtype=torch.long), batch], dim=1)


def backward(model: LlamaForCausalLM, batch: torch.Tensor) -> float:
    """Accumulate gradients of the mean loss; logits live one window at a time, in cache."""
    targets, total = batch[:, 1:], 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
        leaf = hidden.detach().requires_grad_()
        for window, target in zip(leaf, targets, strict=True):
            logits = torch.nn.functional.linear(window, model.lm_head.weight).float()
            loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
            (loss / targets.numel()).backward()
            total += loss.item() / targets.numel()
    hidden.backward(leaf.grad)
    return total


def train(model, ids, validation, args, log) -> None:
    groups = parameter_groups(model, args.decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(args.seed)
    best, best_state, start = math.inf, None, time.time()
    model.train()
    for step in range(args.steps):
        rate = learning_rate(step, args.steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        window = WINDOW // 2 if step < 0.8 * args.steps else WINDOW
        size = args.tokens // window
        loss = backward(model, sample_batch(ids, size, window, generator))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            held_out = nats_per_token(model, validation, limit=32)
            seconds = time.time() - start
            entry = {
                "step": step + 1,
                "loss": round(loss, 4),
                "validation": round(held_out, 4),
                "tokens_per_second": round((step + 1) * args.tokens / seconds),
                "seconds": round(seconds),
            }
            log["steps"].append(entry)
            print(json.dumps(entry), flush=True)
            if held_out < best:
                best = held_out
                best_state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_state)


def compare_with_xz(model, tokenizer) -> dict:
    text = corpus.text("test")
    raw = text.encode()
    ids = torch.tensor(tokenizer.encode(text).ids)
    nats = nats_per_token(model, ids)
    compressed = len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    return {
        "test_bytes": len(raw),
        "test_tokens": len(ids),
        "nats_per_token": round(nats, 4),
        "model_bits_per_byte": round(nats * len(ids) / math.log(2) / len(raw), 4),
        "xz_9e_bits_per_byte": round(8 * compressed / len(raw), 4),
    }


def save(model, tokenizer: Tokenizer, out: Path) -> None:
    model.half().save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, clean_up_tokenization_spaces=False
    ).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--tokens", type=int, default=2048, help="per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus.text("train"))
    ids = torch.tensor(tokenizer.encode(corpus.text("train")).ids)
    validation = torch.tensor(tokenizer.encode(corpus.text("validation")).ids)
    model = build_model(args.seed)
    log = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "arguments": {k: v for k, v in vars(args).items() if k != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(ids),
        "steps": [],
    }
    print(f"{log['parameters']} parameters, {len(ids)} training tokens", flush=True)
    train(model, ids, validation, args, log)
    save(model, tokenizer, args.out)
    model.float()
    log["test"] = compare_with_xz(model, tokenizer)
    print(json.dumps(log["test"]), flush=True)
    (args.out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
