"""What a report knows of one compressed model, of its certificate and of one evaluation.

Plain frozen data, filled by read.py and read by tables, plots and the page; None means that the
files do not say, and is shown as such.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convex_caldera.report.names import Place


@dataclass(frozen=True)
class LayerRow:
    """One compressed layer.

    `bits` are stored bits per original weight without the shard's header; `loss` is
    tr(E H E^T), `relative_loss` the same over tr(W H W^T). `nominal_bits` and `entropy_bits` are
    width and entropy of the codes alone, per weight. What follows these comes
    from the certificate: the option chosen, the distance in bits from the reverse-waterfilling
    limit, the relative duality gap of the layer's low-rank program, and the KL in nats per token
    of this layer alone, predicted; measured, if `convex-caldera measure` has run.
    """

    name: str
    place: Place
    shape: tuple[int, int]
    bits: float
    rank: int
    loss: float
    relative_loss: float
    stored_bytes: int
    nominal_bits: float | None = None
    entropy_bits: float | None = None
    label: str | None = None
    gap_bits: float | None = None
    program_gap: float | None = None
    predicted_kl: float | None = None
    measured_kl: float | None = None
    measured_kl_stderr: float | None = None

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class FileSizes:
    """Bytes of the safetensors files, and bits over original weights (None: not known)."""

    file_bytes: int
    compressed_bytes: int
    rest_bytes: int
    bits_per_compressed_weight: float
    bits_per_weight: float | None


@dataclass(frozen=True)
class FrontierPoint:
    """A plan that is optimal for its own number of bits, and the price there."""

    bits: float
    distortion: float
    price: float


@dataclass(frozen=True)
class Certificate:
    """certificate.json, checked for form only; `verify` is what checks its claims.

    `plan_gap` is None if the bound is zero. `frontier` is the lower hull of all plans that the
    certificate's curves allow, `options` the number of options in all, `losses` the loss of every
    group's option as it was measured, `stored_losses` that of every layer as it is stored.
    """

    statement: tuple[str, ...]
    unit: str
    curvature: str
    groups: int
    options: int
    ties: int
    weights: int
    budget_bits: float
    budget_bytes: int | None
    compressed_bytes: int | None
    header_bytes: int | None
    bits: float
    distortion: float
    price: float
    bound: float
    plan_gap: float | None
    proof: str
    milp_status: str
    surrogate: dict[str, Any] | None
    losses: dict[str, float]
    stored_losses: dict[str, float]
    frontier: tuple[FrontierPoint, ...]

    @property
    def in_nats(self) -> bool:
        """Whether the losses predict the model's KL, so that both may be compared."""
        return "nats" in self.unit


@dataclass(frozen=True)
class Spectra:
    """Singular values of one layer, largest first: W, W C with C C^T = H, and (W - W^) C.

    `index` says which of them, from 1, the same for all three. `loss_left` is the share of
    tr(W H W^T) that the best factors of each of the `ranks` leave; both may be empty.
    """

    name: str
    place: Place
    index: tuple[float, ...]
    values: dict[str, tuple[float, ...]]
    ranks: tuple[float, ...] = ()
    loss_left: tuple[float, ...] = ()


@dataclass(frozen=True)
class MeasuredLoss:
    """KL of the whole model in nats per token, on which text, and over how many tokens."""

    text: str
    kl: float
    kl_stderr: float | None
    tokens: int


@dataclass(frozen=True)
class Landscape:
    """Relative error over ranks x bits: `error[i][j]` belongs to `ranks[i]` and `bits[j]`."""

    ranks: tuple[float, ...]
    bits: tuple[float, ...]
    error: tuple[tuple[float, ...], ...]
    stored_bits: tuple[tuple[float, ...], ...] | None
    title: str


@dataclass(frozen=True)
class Run:
    """One output directory. `byte_parts` maps matrix kind -> what -> bytes.

    `expected_kl` is what the plan said of the whole model's KL, `held_out` what it is on
    calibration windows that no curvature saw.
    """

    directory: Path
    title: str
    method: str
    budget: str
    budget_bytes: int | None
    layers: tuple[LayerRow, ...]
    sizes: FileSizes | None
    byte_parts: dict[str, dict[str, int]]
    certificate: Certificate | None
    settings: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str]
    source_files: dict[str, str]
    files: int
    spectra: tuple[Spectra, ...] = ()
    landscape: Landscape | None = None
    measured: MeasuredLoss | None = None
    expected_kl: float | None = None
    held_out: MeasuredLoss | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None

    @property
    def compressed_weights(self) -> int:
        return sum(layer.weights for layer in self.layers)


@dataclass(frozen=True)
class Score:
    """One model of an evaluation; standard errors are None if there was one window only."""

    name: str
    file_bytes: int | None
    bits_per_compressed_weight: float | None
    bits_per_weight: float | None
    perplexity: float
    perplexity_stderr: float | None
    kl: float
    kl_stderr: float | None
    top1: float
    top1_stderr: float | None


@dataclass(frozen=True)
class EvaluationFile:
    """Scores on one text under one protocol, the original first."""

    text: str
    scores: tuple[Score, ...]
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def protocol_words(self) -> str:
        p = self.protocol
        if not {"window", "stride", "bos", "tokens"} <= set(p):
            return ""
        bos = "BOS before each window" if p["bos"] else "no BOS"
        return f"{p['tokens']} tokens, window {p['window']}, stride {p['stride']}, {bos}"
