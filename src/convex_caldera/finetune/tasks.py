"""Tasks with answers, from local JSON lines: classification and multiple choice.

Every example becomes candidates, a common beginning and one ending each; the model's score of a
candidate is its log-likelihood of the ending, and the loss is the cross-entropy of the scores:

    s_c = sum_{t in ending c} log q(t | before),      loss = -log( e^{s_label} / sum_c e^{s_c} )

    classification   {"premise": "...", "hypothesis": "...", "label": 1}
                     endings are words for the labels; text fields are joined by newlines, or put
                     into a prompt
    choice           {"goal": "...", "sol1": "...", "sol2": "...", "label": 0}
                     endings are the fields named as choices; a text with one "_" in it is a blank:
                     the choice is put there, and what follows the blank is the ending (WinoGrande)

Source: CALDERA, arXiv 2405.18886, tunes on RTE and WinoGrande through a new two-class head.
Differs: no head, the language model itself answers, so that the result stays a language model;
and the score is the one zero-shot evaluations use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convex_caldera.core.seeds import generator
from convex_caldera.errors import DataError, RecipeError
from convex_caldera.finetune.distill import predictions
from convex_caldera.finetune.place import Trained
from convex_caldera.finetune.windows import VALIDATION_SHARE

BLANK = "_"
_PLACE = re.compile(r"\{(\w+)\}")
TaskKind = Literal["classification", "choice"]


@dataclass(frozen=True)
class TaskFields:
    """Which fields of a JSON line hold what.

    Args:
        text: fields joined by newlines, in this order.
        label: the number of the right ending from 0, its name, or for `choice` "1", "2", ...
        choices: `choice`: the fields of the endings, or one field with a list of them.
        labels: `classification`: words for the labels, in the order of their numbers; each may
            be "name=word", where files have names.
        prompt: text with {field} where a field goes, instead of the text fields.

    Raises:
        RecipeError: no text, text fields beside a prompt, one label, or both kinds of ending.
    """

    text: tuple[str, ...] = ()
    label: str = "label"
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    prompt: str = ""

    def __post_init__(self) -> None:
        if not self.text and not _PLACE.search(self.prompt):
            raise RecipeError(
                "name at least one text field of the task (--text-field), or put one into a prompt"
            )
        if self.text and self.prompt:
            raise RecipeError("a prompt says where its fields go; leave out the text fields")
        if bool(self.choices) == bool(self.labels):
            raise RecipeError("name either the choices (fields) or the labels (words) of a task")
        if len(self.labels) == 1:
            raise RecipeError("a task needs at least two labels")

    @property
    def kind(self) -> TaskKind:
        """What the endings are."""
        return "choice" if self.choices else "classification"

    @property
    def words(self) -> list[str]:
        """What is scored for each label."""
        return [label.rpartition("=")[2] for label in self.labels]

    @property
    def names(self) -> list[str]:
        """What files may call each label."""
        return [(label.rpartition("=")[0] or label).strip() for label in self.labels]


@dataclass(frozen=True)
class Example:
    """Token ids of every candidate, how many of them begin it, and the right one."""

    candidates: tuple[tuple[int, ...], ...]
    begins: tuple[int, ...]
    label: int


def read_examples(path: Path, fields: TaskFields, tokenizer: Any, longest: int) -> list[Example]:
    """Examples of a JSON-lines file; the beginning of what is too long is cut off.

    Raises:
        DataError: the file cannot be read, a line lacks a field or has an impossible label.
    """
    if path.suffix != ".jsonl" or not path.is_file():
        raise DataError(f"{path} is no .jsonl file; a task is one JSON object a line")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON: {error}") from error
            found.append(_example(row, fields, tokenizer, longest, where))
    counts = {len(example.candidates) for example in found}
    if len(counts) > 1:
        raise DataError(f"{path} has examples of {sorted(counts)} choices; all need as many")
    if len(found) < 2:
        raise DataError(f"{path} has {len(found)} examples; validation and training need one each")
    return found


def _example(row: Any, fields: TaskFields, tokenizer: Any, longest: int, where: str) -> Example:
    def text_of(field: str) -> str:
        value = row.get(field) if isinstance(row, dict) else None
        if not isinstance(value, str):
            raise DataError(f"{where}: needs a text field {field!r}")
        return value

    text = "\n".join(text_of(field) for field in fields.text)
    if fields.prompt:
        text = _PLACE.sub(lambda place: text_of(place[1]), fields.prompt)
    endings = _choices(row, fields, where) or [text_of(field) for field in fields.choices]
    endings = endings or fields.words
    pairs = [_parts(text, ending, fields.kind) for ending in endings]
    label = _label(row.get(fields.label), fields, endings, where)
    candidates, begins = zip(*(_encode(tokenizer, *pair, longest) for pair in pairs), strict=True)
    return Example(candidates, begins, label)


def _choices(row: Any, fields: TaskFields, where: str) -> list[str]:
    """The list in the one field of choices; none where choices have a field each."""
    if len(fields.choices) != 1:
        return []
    (field,) = fields.choices
    found = row.get(field) if isinstance(row, dict) else None
    listed = found if isinstance(found, list) else []
    if len(listed) < 2 or not all(isinstance(each, str) for each in listed):
        raise DataError(f"{where}: needs a list of at least two texts in {field!r}")
    return listed


def _parts(text: str, ending: str, kind: TaskKind) -> tuple[str, str]:
    """(beginning, scored ending) of one candidate."""
    before, blank, after = text.partition(BLANK)
    if kind == "choice" and blank and BLANK not in after and after.strip():
        return before + ending, after
    return text.rstrip(), f" {ending.strip()}"


def _encode(tokenizer: Any, begin: str, end: str, longest: int) -> tuple[tuple[int, ...], int]:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    head = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ending = ids(end)[: longest - 1]
    beginning = (head + ids(begin))[-(longest - len(ending)) :]
    return (*beginning, *ending), len(beginning)


def _label(value: Any, fields: TaskFields, endings: Sequence[str], where: str) -> int:
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, int) and 0 <= value < len(endings):
        return value
    for known in (endings, fields.names):
        if isinstance(value, str) and value in known:
            return known.index(value)
    if isinstance(value, str) and value.isdigit() and 1 <= int(value) <= len(endings):
        return int(value) - 1
    raise DataError(
        f"{where}: {fields.label!r} is {value!r}; give a number 0 .. {len(endings) - 1}, one of "
        f'the endings, or "1" .. "{len(endings)}"; names have words by --label-name name=word'
    )


class TaskTuning:
    """Cross-entropy of the candidates' likelihoods; an `Objective`."""

    name = "model"

    def __init__(
        self,
        model: nn.Module,
        trained: Trained,
        examples: Sequence[Example],
        batch_size: int,
        seed: int = 0,
    ):
        self.model, self.trained = model, trained
        order = torch.randperm(len(examples), generator=generator(seed, "task", "split")).tolist()
        shuffled = [examples[i] for i in order]
        held_out = max(1, round(VALIDATION_SHARE * len(examples)))
        self.held_out = shuffled[:held_out]
        self.training = shuffled[held_out:]
        self.batch_size = batch_size
        self.batches = -(-len(self.training) // batch_size)

    def loss(self, batch: int) -> Tensor:
        """Mean -log probability of the right candidates of one batch."""
        start = batch * self.batch_size
        return self._loss(self.training[start : start + self.batch_size])[0]

    def validation(self) -> float:
        """The same over the examples held out."""
        return self._over_held_out(0)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the examples held out whose right candidate scores best."""
        return self._over_held_out(1)

    def _over_held_out(self, which: int) -> float:
        total = 0.0
        for start in range(0, len(self.held_out), self.batch_size):
            part = self.held_out[start : start + self.batch_size]
            total += float(self._loss(part)[which]) * len(part)
        return total / len(self.held_out)

    def _loss(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        scores = self._scores(examples)
        rows = list(torch.split(scores, [len(example.candidates) for example in examples]))
        labels = torch.tensor([example.label for example in examples], device=scores.device)
        table = torch.stack(rows)  # every example of a task has as many candidates
        right = (table.argmax(1) == labels).float().mean()
        return nn.functional.cross_entropy(table, labels), right

    def _scores(self, examples: Sequence[Example]) -> Tensor:
        """Log-likelihood of every candidate's ending, examples one after the other."""
        rows = [ids for example in examples for ids in example.candidates]
        begins = [begin for example in examples for begin in example.begins]
        width = max(len(ids) for ids in rows)
        # padded on the right: causal attention keeps what is scored from seeing it
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows])
        position = torch.arange(1, width)
        lengths = torch.tensor([len(ids) for ids in rows])[:, None]
        scored = (position >= torch.tensor(begins)[:, None]) & (position < lengths)
        logits = predictions(self.model, tokens)
        log_q = logits[:, :-1].float().log_softmax(-1)
        taken = log_q.gather(-1, tokens[:, 1:, None].to(log_q.device))[..., 0]
        return (taken * scored.to(taken)).sum(1)
