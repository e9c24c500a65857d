"""Whether a compressed model has what is to be trained, seen from its specs alone."""

from __future__ import annotations

from collections.abc import Callable

from convex_caldera.errors import RecipeError
from convex_caldera.finetune.parts import CODEBOOK_FIELDS, SCALE_FIELDS, Wish
from convex_caldera.finetune.stored import StoredModel
from convex_caldera.quantizers.nested import INNER
from convex_caldera.storage.shard import DTYPES
from convex_caldera.storage.spec import Spec


def check_trainable(stored: StoredModel, wish: Wish) -> None:
    """Raise RecipeError unless at least one of the wished parts exists in some layer."""
    layers = stored.container.layers
    specs = [layers[name][1] for name in stored.layer_names.values()]
    absent = [part for part in wish.parts if not _exists(part, stored, specs)]
    if len(absent) == len(wish.parts):
        reasons = "; ".join(f"{part}: {_REASONS[part]}" for part in absent)
        raise RecipeError(
            f"{stored.container.directory.name} has no trainable part among these. {reasons}. "
            "lora and dora can be trained in every layer"
        )


def _exists(part: str, stored: StoredModel, specs: list[Spec]) -> bool:
    if part == "norms":
        return bool(stored.norm_names)
    return part not in _TESTS or any(_TESTS[part](spec) for spec in specs)


def _has_factors(spec: Spec) -> bool:
    return any(term["kind"] == "low_rank" for term in spec["terms"])


def _has_rotation(spec: Spec) -> bool:
    return any(item["transform"]["kind"] == "hadamard" for item in spec["transforms"])


def _has_fields(spec: Spec, wanted: frozenset[str]) -> bool:
    coded = [term["tensors"] for term in spec["terms"] if term["kind"] == "coded"]
    return any(
        field.split(INNER)[-1] in wanted and DTYPES[dtype].is_floating_point
        for tensors in coded
        for field, (dtype, _) in tensors.items()
    )


_TESTS: dict[str, Callable[[Spec], bool]] = {
    "lowrank": _has_factors,
    "signs": _has_rotation,
    "scales": lambda spec: _has_fields(spec, SCALE_FIELDS),
    "codebooks": lambda spec: _has_fields(spec, CODEBOOK_FIELDS),
}
_REASONS = {
    "lowrank": "no layer has low-rank factors",
    "signs": "no layer has a Hadamard rotation",
    "scales": "no quantizer stores a floating-point scale",
    "codebooks": "no quantizer stores a learned codebook",
    "norms": "the model has no normalization weights",
}
