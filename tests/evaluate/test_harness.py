"""Scores are those of lm-evaluation-harness run directly on the model, item for item."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from convex_caldera.errors import DataError, NumericalError, RecipeError
from convex_caldera.evaluate.task_files import find_file, read_task
from convex_caldera.evaluate.task_table import task_named
from tests.evaluate.task_rows import NATIVE, write
from tests.evaluate.tiny import byte_tokenizer, tiny_llama
from tests.optional import needs

pytestmark = needs("lm_eval")


def run_task(*args: Any, **options: Any) -> Any:
    """The library's, imported late: the harness takes seconds to import."""
    from convex_caldera.evaluate.harness import run_task

    return run_task(*args, **options)


MODEL, TOKENIZER = tiny_llama(4), byte_tokenizer()
# Sums of float32 log-probabilities in batches of another shape.
TOLERANCE = 1e-4

# Written by hand from the tasks' published prompts.
PROMPTS: dict[str, dict[str, Any]] = {
    "piqa": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rte": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{sentence1}}\nQuestion: {{sentence2}} True or False?\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": ["True", "False"],
        "metric_list": [{"metric": "acc"}],
    },
    "lambada": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
}


def score(name: str, folder: Path, **options: Any) -> Any:
    task = task_named(name)
    rows = read_task(task, find_file(task, [folder], {}))
    model = options.pop("model", MODEL)
    return run_task("tiny", model, options.pop("tokenizer", TOKENIZER), task, rows, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
def test_items_equal_the_harness_run_directly(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="the harness's own class needs accelerate")
    from datasets import Dataset, DatasetDict
    from lm_eval import evaluator
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    ours = score(name, write(tmp_path, NATIVE))
    rows = DatasetDict({"validation": Dataset.from_list(NATIVE[name])})
    config = {"task": name, "validation_split": "validation", **PROMPTS[name]}
    theirs = evaluator.evaluate(
        HFLM(pretrained=MODEL, tokenizer=byte_tokenizer(), batch_size=3, device="cpu"),
        {"tasks": {name: ConfigurableTask(config={**config, "custom_dataset": lambda: rows})}},
        log_samples=True,
        bootstrap_iters=1000,
    )
    for metric, items in ours.items.items():
        direct = [sample[metric] for sample in theirs["samples"][name]]
        sign = -1 if metric == "perplexity" else 1
        assert items == pytest.approx([sign * d for d in direct], abs=TOLERANCE)
        figures = theirs["results"][name]
        assert ours.values[metric] == pytest.approx(figures[f"{metric},none"], rel=TOLERANCE)
        if metric != "perplexity":  # of perplexity, theirs is a bootstrap
            assert ours.stderr[metric] == pytest.approx(figures[f"{metric}_stderr,none"], rel=1e-6)


@pytest.mark.slow
def test_word_perplexity_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    """Pages within the context: sum of -log p over all, per word of the page as it is on disk."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    write(tmp_path, {})
    pages = [{"page": "The dog , of course . \n"}, {"page": " = Fox = \n A fox ran . \n"}]
    (tmp_path / "wikitext2.jsonl").write_text("\n".join(map(json.dumps, pages)))
    nats = words = 0.0
    for page in pages:
        ids = TOKENIZER(wikitext_detokenizer(page), add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([[256, *ids]])
        with torch.no_grad():
            logp = MODEL(tokens).logits[0].double().log_softmax(-1)
        nats -= sum(logp[i, token].item() for i, token in enumerate(ids))
        words += len(page["page"].strip().split()) + sum(
            page["page"][end].isspace() for end in (0, -1)
        )
    ours = score("wikitext2", tmp_path)
    assert ours.values["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=TOLERANCE)
    assert ours.counts and sum(ours.counts) == words


def test_scores_do_not_depend_on_batches_or_a_padding_token(tmp_path: Path) -> None:
    folder = write(tmp_path, NATIVE)
    padded = byte_tokenizer()
    padded.pad_token = "</s>"
    runs = [
        score("piqa", folder),
        score("piqa", folder, batch_size=1),
        score("piqa", folder, batch_size=3, tokenizer=padded),
    ]
    assert TOKENIZER.pad_token is None
    assert all(run.items == runs[0].items for run in runs)


def test_parts_count_alike_and_limits_are_per_part(tmp_path: Path) -> None:
    folder = write(tmp_path, NATIVE)
    whole = score("blimp", folder)
    by_part = {part: [] for part in whole.parts}
    for part, item in zip(whole.parts, whole.items["acc"], strict=True):
        by_part[part].append(item)
    means = [sum(items) / len(items) for items in by_part.values()]
    assert whole.values["acc"] == pytest.approx(sum(means) / 2)
    assert len(score("blimp", folder, limit=1).items["acc"]) == 2
    assert len(score("piqa", folder, limit=3).items["acc"]) == 3


def test_progress_counts_inputs(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    score(
        "rte", write(tmp_path, NATIVE), batch_size=1,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    # True and False are one token each only for a larger vocabulary; inputs that agree are shared.
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))


def test_nan_logits_stop_and_name_the_first_sample(tmp_path: Path) -> None:
    class Spoiled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = MODEL, MODEL.config

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            output = self.inner(input_ids=input_ids, use_cache=use_cache)
            hammer = torch.tensor(TOKENIZER(" hammer", add_special_tokens=False)["input_ids"])
            rows = (input_ids.unfold(1, len(hammer), 1) == hammer).all(-1).any(-1)
            output.logits[rows, :, 0] = math.nan
            return output

    with pytest.raises(NumericalError, match=r"tiny: logits are NaN .* sample 1 of piqa"):
        score("piqa", write(tmp_path, NATIVE), model=Spoiled())


def test_unknown_parts_and_tokenizers_without_a_start_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"blimp": [{"good": "a b", "bad": "a c", "uid": "passive_9"}]})
    with pytest.raises(DataError, match=r"no part 'passive_9'; there is passive_1"):
        score("blimp", tmp_path)
    bare = byte_tokenizer(bos=False)
    bare.eos_token = None
    with pytest.raises(RecipeError, match="neither a BOS nor an EOS"):
        score("piqa", write(tmp_path, NATIVE), tokenizer=bare)
