"""Kronecker curvature of the model's own loss, from gradients of whole sequences.

Labels are drawn from the model's own distribution; G_s is the gradient of sequence s's summed
log-likelihood with respect to W. For any error E the Fisher matrix, which is the Hessian of
KL(original || changed), predicts

    KL per token  ~  1/2 mean_s <E, G_s>^2 / T  ~  tr(O E H E^T),
    H = mean_s G_s^T G_s / (2 T m),   O = m mean_s G_s G_s^T / t,   t = mean_s |G_s|^2,

in nats, T tokens a sequence. O has mean diagonal one, so that with O = I the second form is the
expectation of the first over errors with independent rows. One pass from identity start of the
nearest Kronecker product, as Tseng et al., YAQA, arXiv 2505.22988, sketch B.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.core.hessian import Hessian
from convex_caldera.core.seeds import generator
from convex_caldera.errors import NumericalError
from convex_caldera.linalg.finite import all_finite


@dataclass(frozen=True, eq=False)
class Curvature:
    """Both sides of one layer's curvature: `input` (n, n) in nats, `output` (m, m) of mean one."""

    input: Tensor
    output: Tensor
    sequences: int

    @property
    def energy(self) -> float:
        """Mean diagonal of the input side; 0 if no gradient reached the layer."""
        return float(self.input.diagonal().mean())

    def hessians(self, name: str, damping: float = 0.01) -> tuple[Hessian, Hessian]:
        """H and O as the fits take them."""
        return (
            Hessian(self.input, damping, f"{name} (input curvature)"),
            Hessian(self.output, damping, f"{name} (output curvature)"),
        )


def sequence_curvature(
    model: nn.Module,
    tokens: Tensor,
    layers: Collection[str],
    *,
    seed: int,
    draws: int = 1,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Curvature]:
    """Curvature of the named linear layers.

    Args:
        model: a causal language model with all its weights, float32.
        tokens: (sequences, T) token ids.
        layers: full names of nn.Linear modules.
        seed: of the labels drawn.
        draws: of labels for each sequence, every one a sample of its own (`sequences` counts
            them): two halve what the choice of labels adds to the sampling error.
        progress: called with (sequences done, in all).

    Raises:
        NumericalError: a gradient is NaN or infinite; names the layer.

    Cost: one forward pass a sequence, one backward pass a draw, and m n (T + m + n) multiply-adds
    a layer and draw, all with factors rounded to bfloat16 and sums in float32 where the processor
    offers it (far below the sampling error); memory m^2 + n^2 float32 a layer beside the model.
    """
    sums = {name: _Sums(model.get_submodule(name).weight.shape) for name in layers}
    for name, G in sequence_gradients(model, tokens, layers, seed, batch_size, progress, draws):
        sums[name].add(G)
    count, length = tokens.shape
    return {name: layer.finish(draws * count, length) for name, layer in sums.items()}


def sequence_fisher(
    model: nn.Module,
    tokens: Tensor,
    errors: Mapping[str, Sequence[Tensor]],
    *,
    seed: int,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """1/2 mean_s <E, G_s>^2 / T for every error E (m, n) of every layer: nats of KL per token.

    Unbiased to second order for errors made without knowledge of these sequences; its relative
    standard error is about sqrt(2 / sequences) a layer. Arguments, errors and cost are those of
    `sequence_curvature`, with m n multiply-adds an error instead of m n (m + n).
    """
    sums = {name: [0.0] * len(list_) for name, list_ in errors.items()}
    for name, G in sequence_gradients(model, tokens, errors.keys(), seed, batch_size, progress):
        for i, E in enumerate(errors[name]):
            sums[name][i] += float((G * E).sum(dtype=torch.float64)) ** 2
    count = 2 * tokens.shape[0] * tokens.shape[1]
    return {name: [value / count for value in values] for name, values in sums.items()}


def sequence_gradients(
    model: nn.Module,
    tokens: Tensor,
    layers: Collection[str],
    seed: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    draws: int = 1,
) -> Iterator[tuple[str, Tensor]]:
    """(layer, G_s) for every sequence and layer; labels are drawn from the model itself."""
    for name, x, dy in token_gradients(model, tokens, layers, seed, batch_size, progress, draws):
        G = dy.T @ x
        if not all_finite(G):
            raise NumericalError(f"{name}: a gradient is NaN or infinite; check weights")
        yield name, G


def token_gradients(
    model: nn.Module,
    tokens: Tensor,
    layers: Collection[str],
    seed: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    draws: int = 1,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer, x (T, n), dy (T, m)) for every sequence, draw of labels and layer: G_s = dy^T x.

    x is what the layer read and dy the gradient of the sequence's summed negative
    log-likelihood with respect to what it wrote, labels drawn from the model itself.
    """
    taps = {name: _Tap(model.get_submodule(name), name) for name in layers}
    draw = generator(seed, "labels", "curvature")
    done = 0
    with _frozen(model), _watched(taps), _bfloat16_products():
        for batch in tokens.split(batch_size):
            for tap in taps.values():
                tap.samples = range(done, done + len(batch))
            for _ in _backward(model, batch, draw, draws):
                for name, tap in taps.items():
                    for x, dy in tap.sequences(len(batch)):
                        yield name, x, dy
            done += len(batch)
            if progress is not None:
                progress(done, len(tokens))


def _backward(model: nn.Module, batch: Tensor, draw: torch.Generator, draws: int) -> Iterator[None]:
    """Gradients of the summed negative log-likelihood of labels drawn from the model itself.

    Goes on after every backward pass, of which there is one a draw.
    """
    embeddings = model.get_input_embeddings()(batch).detach().requires_grad_()  # type: ignore[operator]
    logits = model(inputs_embeds=embeddings, use_cache=False).logits.float()
    if not all_finite(logits):
        raise NumericalError("the model's logits are NaN or infinite on the calibration text")
    for left in reversed(range(draws)):
        labels = _drawn(logits.detach().flatten(0, 1), draw)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
        loss.backward(retain_graph=left > 0)
        yield


def _drawn(logits: Tensor, draw: torch.Generator) -> Tensor:
    """One label a row, by inverting the distribution function: one random number each."""
    ladder = logits.softmax(-1).cumsum(-1)
    level = torch.rand(len(ladder), 1, generator=draw) * ladder[:, -1:].cpu()
    labels = torch.searchsorted(ladder, level.to(ladder.device), right=True).squeeze(1)
    return labels.clamp_max(logits.shape[-1] - 1)


class _Tap:
    """Keeps what one layer reads on the way forward and its output's gradient on the way back."""

    def __init__(self, linear: Any, name: str):
        self.linear, self.name = linear, name
        self.x: Tensor | None = None
        self.dy: Tensor | None = None
        self.samples = range(0)

    def forward_hook(self, _: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if not all_finite(args[0]):
            bad = ~torch.isfinite(args[0].reshape(len(self.samples), -1)).all(1)
            raise NumericalError(
                f"{self.name}: activations are NaN or infinite in sample "
                f"{self.samples[int(bad.nonzero()[0])]}; check the model in this dtype"
            )
        self.x = args[0].detach()
        y.register_hook(self._keep)

    def _keep(self, dy: Tensor) -> None:
        self.dy = dy.detach()

    def sequences(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(x_s, dy_s) for every sequence of the batch; some models fold it into the tokens."""
        if self.x is None or self.dy is None:
            raise NumericalError(f"{self.name} received no gradient; it does not reach the output")
        folded = (t.reshape(count, -1, t.shape[-1]) for t in (self.x, self.dy))
        yield from zip(*folded, strict=True)
        self.dy = None


class _Sums:
    """Second moments of one layer's sequence gradients."""

    def __init__(self, shape: torch.Size):
        m, n = shape
        self.input, self.output = torch.zeros(n, n), torch.zeros(m, m)
        self.energy = 0.0

    def add(self, G: Tensor) -> None:
        self.input += G.T @ G
        self.output += G @ G.T
        self.energy += float(G.square().sum())

    def finish(self, sequences: int, length: int) -> Curvature:
        m = len(self.output)
        energy = self.energy if self.energy > 0 else 1.0
        H = self.input.double() / (sequences * 2 * length * m)
        return Curvature(H, self.output.double() * (m / energy), sequences)


@contextmanager
def _watched(taps: Mapping[str, _Tap]) -> Iterator[None]:
    handles = [tap.linear.register_forward_hook(tap.forward_hook) for tap in taps.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Only activations carry gradients inside; flags are given back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """float32 products on bfloat16 units inside, where torch and the processor have them."""
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    if switch is None or not hasattr(switch, "fp32_precision"):
        yield
        return
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before
