"""What each layer costs alone: the model's KL with one compressed layer in the original's place.

The plan predicts this number for every layer, and their sum for the model. Here it is measured,
on text that no calibration saw, beside the KL with all layers in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from convex_caldera.errors import ModelError
from convex_caldera.evaluate.compare import Candidate, evaluate
from convex_caldera.runtime.names import own_name
from convex_caldera.workflow.substituted import Substituted

TOGETHER = "all layers"
ORIGINAL = "original"


def kl_of_single_layers(
    model: nn.Module,
    layers: Mapping[str, Callable[[], Tensor]],
    together: nn.Module,
    text: str,
    tokenizer: Any,
    *,
    window: int,
    max_tokens: int,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """KL(original || model with this layer) in nats per token, of each layer and of all at once.

    Args:
        model: the original.
        layers: name in the file -> its decoded weight (m, n).
        together: the compressed model.
        text, tokenizer, window, max_tokens: as in `evaluate`.

    Returns:
        `total_kl`, `total_kl_stderr`, `layers`: name -> {kl, kl_stderr}, and the protocol.

    Raises:
        ModelError: the model has no such layer, or one of another shape.
        DataError, RecipeError, NumericalError: as `evaluate`.

    Cost: one forward pass per layer and two more; a layer is decoded once per batch of windows.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    candidates = [Candidate(ORIGINAL, lambda: model), Candidate(TOGETHER, lambda: together)]
    for name, decoded in layers.items():
        weight = own_name(model, f"{name}.weight", known)
        if weight is None:
            raise ModelError(f"{name}: the original has no such layer; give the one compressed")
        single = Substituted(model, {weight: decoded})
        candidates.append(Candidate(name, lambda single=single: single))  # type: ignore[misc]
    found = evaluate(
        candidates, text, tokenizer, window=window, max_tokens=max_tokens, progress=progress
    )
    scores = {score.name: score for score in found}
    whole = scores[TOGETHER]
    protocol = found.protocol
    return {
        "total_kl": whole.kl,
        "total_kl_stderr": whole.kl_stderr,
        "layers": {
            name: {"kl": scores[name].kl, "kl_stderr": scores[name].kl_stderr} for name in layers
        },
        "protocol": {
            "tokens": protocol.tokens,
            "window": protocol.window,
            "stride": protocol.stride,
            "bos": protocol.bos,
        },
    }
