"""Where a layer's metric comes from: nothing, its inputs, or the model's own loss.

    none        H = I
    input       H = E[x x^T] of the layer's input, one decoder block in memory at a time
    kronecker   both sides, from gradients of whole sequences; the whole model in memory, and
                losses are then predicted nats of KL per token
    guided      the input covariance weighted by squared gradients, of each group of output
                channels on its own; memory and unit as for kronecker
    diagonal    H = diag(d) from a file of diagonal Hessians (`workflow.diagonals`)

What the vision tower and the projector of a model read comes from images, by `input` alone: the
loss on text does not reach them.

Those of data are collected once (`workflow.collecting`) and asked for layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, Protocol

from torch import Tensor

from convex_caldera.calibrate.curvature import Curvature, sequence_fisher
from convex_caldera.calibrate.curvature_average import averaged
from convex_caldera.calibrate.curvature_guided import GuidedCurvature
from convex_caldera.calibrate.curvature_shrinkage import Shrinkage, shrunk
from convex_caldera.calibrate.saved import SavedStatistics
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.models.sites import Site
from convex_caldera.workflow.held_out_kl import HeldOutKL, kl_of_windows
from convex_caldera.workflow.perturbation import measured_kl
from convex_caldera.workflow.progress import Progress

# Held-out sequences that shrinkage is searched on, and that a plan's loss is measured on.
SEARCHED = 16
# Layers whose factored curvature is kept: those being fitted, and one more.
LAYERS_KEPT = 3

CurvatureKind = Literal["none", "input", "kronecker", "guided", "diagonal"]
GRADIENT_KINDS: tuple[CurvatureKind, ...] = ("kronecker", "guided")
LayerCurvature = Curvature | GuidedCurvature


@dataclass(frozen=True)
class GradientOptions:
    """How curvature from gradients is treated.

    Attributes:
        shrinkage: fixed, or None to search it on held-out sequences.
        draws: of labels for each window that curvature is measured on.
        fall_back: round layers whose gradients vanish under their input's second moment, and
            say so; otherwise they are an error.
    """

    shrinkage: Shrinkage | None = field(default_factory=Shrinkage)
    fall_back: bool = False
    draws: int = 1


class Curvatures(Protocol):
    """Gives a layer its problem."""

    def problem(self, site: Site, W: Tensor) -> Problem:
        """What losses are reported under."""

    def seen(self, site: Site, W: Tensor) -> Problem:
        """What rounding sees: the same, or a smoother metric (`smooths`)."""

    @property
    def smooths(self) -> bool: ...

    def tokens(self, site: Site) -> int:
        """How many tokens the layer's statistics have seen."""

    def notes(self) -> dict[str, Any]:
        """What the report says of them."""


class NoCurvature:
    """Every layer under the identity."""

    def problem(self, site: Site, W: Tensor) -> Problem:
        return Problem(W, Hessian.identity(site.shape[1]), site.name)

    seen = problem
    smooths = False

    def tokens(self, site: Site) -> int:
        del site
        return 0

    def notes(self) -> dict[str, Any]:
        return {}


class InputCurvatures:
    """Second moments of inputs, read back one block at a time; layers of one input share one H."""

    def __init__(self, saved: SavedStatistics):
        self._saved = saved
        self._hessians: Callable[[int], dict[str, Hessian]] = lru_cache(maxsize=2)(self._read)

    def problem(self, site: Site, W: Tensor) -> Problem:
        return Problem(W, self._hessians(site.block)[site.input_site], site.name)

    seen = problem
    smooths = False

    def tokens(self, site: Site) -> int:
        return self._saved[site.block][site.input_site].num_tokens

    def notes(self) -> dict[str, Any]:
        return {}

    def _read(self, block: int) -> dict[str, Hessian]:
        return {name: s.hessian() for name, s in self._saved[block].items()}


class GradientCurvatures:
    """From the model's own loss, in memory; losses are nats of KL per token.

    Some sequences are held out to check predictions. `seen` is what rounding sees where that is
    not the measured curvature: it is drawn towards something smoother (`shrinkage`), while
    losses are reported under what was measured. `fallbacks` are layers whose gradients vanish:
    they are rounded under the second moment of their input, their predicted loss is the zero
    that was measured, and the report names them. `rounding` is what is drawn in place of the
    measured curvatures (`rounding_under`). `model` is the original, `used` the windows (samples,
    length) that curvatures are of.
    """

    def __init__(
        self,
        curvatures: Mapping[str, LayerCurvature],
        model: Any,
        tokens: Tensor,
        held_out: Tensor,
        shrinkage: Shrinkage,
        inputs: Mapping[str, Tensor],
        fallbacks: Sequence[str],
        rounding: Mapping[str, LayerCurvature] | None = None,
    ):
        self._curvatures, self._inputs = curvatures, inputs
        self.model, self.used, self._held_out = model, tokens, held_out
        self._shrinkage, self._fallbacks = shrinkage, tuple(fallbacks)
        self._rounding = curvatures if rounding is None else rounding
        # Options of one layer are fitted one after the other: what they factor, they share.
        self._measured = lru_cache(maxsize=LAYERS_KEPT)(self._measured_sides)
        self._drawn = lru_cache(maxsize=LAYERS_KEPT)(self._drawn_sides)

    def problem(self, site: Site, W: Tensor) -> Problem:
        return self._under(self._measured(site.name), W, site.name)

    def seen(self, site: Site, W: Tensor) -> Problem:
        return self._under(self._drawn(site.name), W, site.name)

    def _under(self, sides: tuple[Hessian, ...], W: Tensor, name: str) -> Problem:
        if len(sides) == 1:
            return Problem(W, sides[0], name)
        if isinstance(self._curvatures[name], GuidedCurvature):
            return Problem.by_row_groups(W, sides, name)
        hessian, output = sides
        return Problem(W, hessian, name, output)

    def _measured_sides(self, name: str) -> tuple[Hessian, ...]:
        return self._curvatures[name].hessians(name)

    def _drawn_sides(self, name: str) -> tuple[Hessian, ...]:
        if name in self._fallbacks:
            return (Hessian(self._inputs[name], name=f"{name} (input alone)"),)
        towards = self._inputs[name] if self._shrinkage.towards == "input" else None
        return shrunk(self._rounding[name], self._shrinkage, towards).hessians(name)

    def rounding_under(self, others: Mapping[str, LayerCurvature]) -> GradientCurvatures:
        """The same, but rounding sees the mean of the measured curvatures and these others."""
        rounding = {name: averaged(c, others[name]) for name, c in self._curvatures.items()}
        return GradientCurvatures(
            self._curvatures, self.model, self.used, self._held_out, self._shrinkage,
            self._inputs, self._fallbacks, rounding,
        )  # fmt: skip

    @property
    def smooths(self) -> bool:
        shrinks = max(self._shrinkage.input, self._shrinkage.output) > 0
        return bool(self._fallbacks) or shrinks or self._rounding is not self._curvatures

    def tokens(self, site: Site) -> int:
        del site
        return self.used.numel()

    def notes(self) -> dict[str, Any]:
        record: dict[str, Any] = {"shrinkage": self._shrinkage.to_dict()}
        return {**record, "input_curvature_only": list(self._fallbacks)}

    @property
    def has_held_out(self) -> bool:
        return len(self._held_out) > 0

    def held_out_kl(self, layers: Mapping[str, Tensor], progress: Progress) -> HeldOutKL | None:
        """KL(original || model with these weights) on the windows that no curvature saw.

        Args:
            layers: name -> its weight W^ (m, n), of all compressed layers.
        """
        windows = self._held_out[:SEARCHED]
        progress.start("held-out KL", len(windows))
        return kl_of_windows(self.model, layers, windows, progress.advance)

    def held_out_loss(
        self, errors: Mapping[str, Sequence[Tensor]], seed: int, progress: Progress
    ) -> dict[str, list[float]]:
        """Nats per token of errors W^ - W by the sequence Fisher of the held-out sequences."""
        progress.start("held out", len(self._held_out))
        return sequence_fisher(
            self.model, self._held_out, errors, seed=seed + 1, progress=steps_of(progress)
        )

    def measured_kl(self, parameter: str, values: Sequence[Tensor]) -> list[float]:
        """Nats per token of each of several values of one parameter, by running the model with

        them on sequences held out, or on those used where there are none.
        """
        tokens = self._held_out if self.has_held_out else self.used
        return measured_kl(self.model, tokens, parameter, values)


def steps_of(progress: Progress) -> Callable[[int, int], None]:
    """Turns (done, in all) into steps of the current stage."""
    seen = [0]

    def advance(done: int, total: int) -> None:
        del total
        for _ in range(done - seen[0]):
            progress.advance()
        seen[0] = done

    return advance
