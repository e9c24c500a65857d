"""A language model as lm-evaluation-harness sees one: log-likelihoods of continuations.

The harness's own class for transformers needs accelerate and hides what is needed here: memory
that is bounded for every vocabulary, progress with the time left, and the name of the first
sample whose logits are NaN. What is scored is the same, item for item:

    log p(continuation | context) = sum_j log softmax(logits_j)[token_j]

with the pair encoded together, an empty context replaced by BOS (else EOS), and long inputs cut
on the left to the model's context. Requests of one input share a forward. Inputs of a batch are
padded on the right, where a causal model does not look, so no padding token is needed. Logits are
made from the first position on that a continuation of the batch needs, where the model can.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn

from convex_caldera.errors import DataError, NumericalError, RecipeError
from convex_caldera.evaluate.compare import BATCH_ENTRIES

# Inputs that share one forward: the requests (number, tokens of the continuation) of each.
Shared = dict[tuple[int, ...], list[tuple[int, list[int]]]]


class HarnessModel(TemplateLM):
    """Scores requests of the harness with a transformers causal language model.

    Args:
        name: of the model, for messages.
        model: the model, in evaluation mode.
        tokenizer: its tokenizer; a padding token is not needed.
        batch_size: inputs at a time; None takes as many as keep logits near 32 MB.
        progress: called with (done, total) inputs after each batch.

    Raises:
        RecipeError: the tokenizer has neither BOS nor EOS, so nothing stands for no context.
    """

    backend = "causal"

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Any,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        super().__init__()
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self._batch_size, self._progress = batch_size, progress
        self._device = next(model.parameters()).device
        self.max_length = resolve_max_length(model.config, tokenizer)  # type: ignore[arg-type]
        self._instances: Sequence[Any] = ()
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        if self.eot_token_id is None and tokenizer.bos_token_id is None:
            raise RecipeError(f"{name}: the tokenizer has neither a BOS nor an EOS token")

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: BOS, else EOS, as in the harness."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds by itself unless told."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            options = {"add_special_tokens": False}
        return self.tokenizer.encode(string, verbose=False, **options)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each (context, continuation)."""
        self._instances = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append((None, context, continuation))
                owners.append(number)
        self._instances = [requests[number] for number in owners]
        totals = [0.0] * len(requests)
        for number, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += nats
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        raise RecipeError("tasks that generate text are not among those of `eval --tasks`")

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        shared: Shared = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation:
                self._refuse(number, "the continuation has no tokens")
            whole = (context + continuation)[-(self.max_length + 1) :]
            shared.setdefault(tuple(whole[:-1]), []).append((number, continuation))
        # Longest first: if memory is short, it is short at once.
        inputs = sorted(shared, key=lambda ids: (-len(ids), ids))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        start = 0
        with torch.no_grad():
            while start < len(inputs):
                batch = inputs[start : start + self._rows(len(inputs[start]))]
                self._answer(batch, shared, answers)
                start += len(batch)
                if self._progress is not None:
                    self._progress(start, len(inputs))
        return answers

    def _rows(self, length: int) -> int:
        vocabulary = self.model.config.get_text_config().vocab_size
        return self._batch_size or max(1, BATCH_ENTRIES // (length * vocabulary))

    def _answer(
        self, batch: list[tuple[int, ...]], shared: Shared, answers: list[tuple[float, bool]]
    ) -> None:
        width = len(batch[0])
        # Inputs are of nearly equal length, so that few positions are kept in vain.
        first = min(
            len(tokens) - len(continuation)
            for tokens in batch
            for _, continuation in shared[tokens]
        )
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        options = {"logits_to_keep": width - first} if self._keeps_logits else {}
        logits = self.model(input_ids=ids.to(self._device), use_cache=False, **options).logits
        start = width - logits.shape[1]  # of the positions that there are logits for
        bad = []
        for row, tokens in enumerate(batch):
            for number, continuation in shared[tokens]:
                end = len(tokens) - start
                answers[number] = _score(logits[row, end - len(continuation) : end], continuation)
                if not math.isfinite(answers[number][0]):
                    bad.append(number)
        if bad:
            place = self._instances[min(bad)]
            raise NumericalError(
                f"{self.name}: logits are NaN or infinite, first in sample {place.doc_id} of "
                f"{place.task_name}; inspect the model's weights, or evaluate it in float32"
            )

    def _refuse(self, number: int, reason: str) -> None:
        place = self._instances[number]
        raise DataError(f"{place.task_name}, sample {place.doc_id}: {reason}")


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Of logits (len(continuation), V), in float32 as the harness does."""
    log_p = logits.float().log_softmax(-1)
    wanted = torch.tensor(continuation, device=logits.device)
    nats = log_p.gather(-1, wanted[:, None]).sum().item()
    return nats, bool((log_p.argmax(-1) == wanted).all())
