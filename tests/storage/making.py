"""Small compressed layers and output directories, made without calibration or fitting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe
from convex_caldera.core.terms import Coded, CompressedLayer, Dense, LowRank
from convex_caldera.errors import FormatError
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.uniform import Uniform
from convex_caldera.recipes.records import to_record
from convex_caldera.storage import CardFacts, Container, PartialRun, SourceModel, assemble

FINGERPRINT = {"model": "a" * 64, "text": "b" * 64, "recipe": "c" * 64}
CARD = CardFacts(base_model="tiny", method="test", command="convex-caldera compress tiny -o out")
# One of each kind of content: codes alone, both stages, dense and coded factors.
RECIPES = (
    Recipe((Quantize(Uniform(2, group_size=16, search=False), "identity"),)),
    Recipe((Quantize(E8P(3), "identity"),)),
    Recipe(
        (
            FitLowRank(3),
            Quantize(Uniform(3, group_size=0, symmetric=True, search=False), "identity"),
        )
    ),
    Recipe((FitLowRank(4, factors=FactorCoding(E8P(4))), Quantize(E8P(2), "identity"))),
)


@dataclass(frozen=True)
class Flip:
    """A transform for tests: flips the signs of some input channels."""

    kind: ClassVar[str] = "flip"

    def fit(self, W: Tensor, hessian: Hessian, *, seed: int, layer: str, site: str) -> FittedFlip:
        bits = torch.randint(0, 2, (W.shape[1],), generator=torch.Generator().manual_seed(seed))
        return FittedFlip(self, (W.shape[0], W.shape[1]), bits.to(torch.uint8))

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"bits": (torch.uint8, (shape[1],))}

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedFlip:
        bits = tensors.get("bits")
        if bits is None or bits.shape != (shape[1],) or bits.max() > 1:
            raise FormatError("flip needs one bit per channel")
        return FittedFlip(self, shape, bits)


@dataclass(frozen=True, eq=False)
class FittedFlip:
    transform: Flip
    shape: tuple[int, int]
    bits: Tensor

    @property
    def signs(self) -> Tensor:
        return 1.0 - 2.0 * self.bits.float()

    def apply(self, W: Tensor) -> Tensor:
        return W * self.signs

    def invert(self, W: Tensor) -> Tensor:
        return W * self.signs

    def apply_hessian(self, hessian: Hessian) -> Hessian:
        return Hessian(hessian.matrix * self.signs[:, None] * self.signs, hessian.damping)

    def inputs(self, x: Tensor) -> Tensor:
        return x * self.signs

    def outputs(self, y: Tensor) -> Tensor:
        return y

    def tensors(self) -> dict[str, Tensor]:
        return {"bits": self.bits}


def code(quantizer: Any, W: Tensor) -> Coded:
    """Nearest codes of a whole matrix."""
    fitted = quantizer.fit(W)
    return Coded(fitted.encode(W), fitted)


def make_layer(W: Tensor, recipe: Recipe, seed: int = 0) -> CompressedLayer:
    """A layer with the terms of `recipe`, each fitted plainly to what the earlier ones leave."""
    shape, transforms = (W.shape[0], W.shape[1]), []
    rest = W.float()
    hessian = Hessian.identity(shape[1])
    for transform in recipe.transforms:
        transforms.append(transform.fit(rest, hessian, seed=seed, layer="l", site="s"))
        rest = transforms[-1].apply(rest)
    terms: list[Any] = []
    for step in recipe.steps:
        if isinstance(step, Quantize):
            terms.append(code(step.quantizer, rest))
        else:
            terms.append(_low_rank(rest, step))
        rest = rest - terms[-1].decode()
    return CompressedLayer(shape, tuple(terms), tuple(transforms))


def _low_rank(W: Tensor, step: FitLowRank) -> LowRank:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    left, right = U[:, : step.rank] * S[: step.rank].sqrt(), Vh[: step.rank]
    right = right * S[: step.rank, None].sqrt()
    if step.factors is None:
        return LowRank(Dense(left.half().contiguous()), Dense(right.half()))
    quantizer = step.factors.quantizer
    return LowRank(code(quantizer, left.T.contiguous()), code(quantizer, right.contiguous()))


def linear_names(source: SourceModel) -> list[str]:
    """Layers of a tiny model: all matrices inside decoder blocks."""
    inside = [n for n, i in source.infos.items() if ".layers." in n and len(i.shape) == 2]
    return sorted(name.removesuffix(".weight") for name in inside)


def fill(
    run: PartialRun, source: SourceModel, recipes: tuple[Recipe, ...], names: list[str]
) -> None:
    """Compress the layers that are not done yet, cycling through `recipes`."""
    for index, name in enumerate(names):
        if name not in run.done():
            W = source.checkpoint.tensor(f"{name}.weight").float()
            run.put(name, make_layer(W, recipes[index % len(recipes)]), {"loss": float(index)})


def make_output(
    model: Path, out: Path, recipes: tuple[Recipe, ...] = RECIPES, **options: Any
) -> Container:
    """A finished output directory for a tiny model."""
    source = SourceModel(model)
    names = linear_names(source)
    run = PartialRun(out, FINGERPRINT)
    fill(run, source, recipes, names)
    return finish(run, source, names, recipes, **options)


def finish(
    run: PartialRun,
    source: SourceModel,
    names: list[str],
    recipes: tuple[Recipe, ...] = RECIPES,
    **options: Any,
) -> Container:
    report = {"layers": {name: run.record(name) for name in names}}
    return assemble(
        run,
        source,
        names,
        recipe={"method": "test", "recipes": [to_record(recipe) for recipe in recipes]},
        report=report,
        provenance={"versions": {"format": "1"}},
        card=CARD,
        **options,
    )
