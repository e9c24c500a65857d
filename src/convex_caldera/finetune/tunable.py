"""A compressed linear layer in training: y = b * ( (Q + L R) (a * x) ) + bias.

    Q   everything else, decoded once (or again in every pass, if the decoded weights of the
        model do not fit into memory)
    L R the trained factors, moved outside of the transforms
    a   input diagonal, b output diagonal or DoRA's m / ||V_i||, V = Q + L R (norm detached)

so that the backward pass goes through the factors and diagonals only. Where scales or codebooks
are trained Q is a function of them: then it is decoded in every pass, and the gradient of a whole
weight is made, of one layer at a time.

Source: DoRA, arXiv 2402.09353; CALDERA, arXiv 2405.18886 (a part of the components in 16 bits).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.core.protocols import FittedTransform
from convex_caldera.core.seeds import generator
from convex_caldera.core.terms import Coded, CompressedLayer, Dense, LowRank, Term, sum_terms
from convex_caldera.finetune.factors import outer_left, outer_right, split
from convex_caldera.finetune.parts import Tuned, Wish, half_dtype, tuned
from convex_caldera.finetune.quantizer_fields import trainable_fields, with_fields
from convex_caldera.quantizers.neural import fitted_core
from convex_caldera.storage.codec import layer_from_tensors, layer_to_tensors
from convex_caldera.transforms.diagonal import Diagonal, FittedDiagonal
from convex_caldera.transforms.hadamard import RandomizedHadamard

CPU = torch.device("cpu")
LEAST_DIAGONAL = 2.0**-10  # |entries| of a stored diagonal; 0 has no inverse


class TunableLinear(nn.Module):
    """A layer whose trained tensors are `tuned`, by their name in it.

    Law: before any step `forward` equals the compressed layer up to float32 rounding (and that
    of factors which were coded and are float16 now); `layer()` decodes to what `forward` does
    while `storing` is on.

    Args:
        name: of the layer, for its own randomness.
        layer: as it is stored; its codes are kept.
        bias: frozen.
        wish: which parts are trained.
        seed: of new components.
        cached: keep Q decoded (4 bytes a weight) instead of decoding it in every pass.
    """

    frozen: Tensor | None
    fixed_input: Tensor | None
    fixed_output: Tensor | None
    magnitude_scale: Tensor | None

    def __init__(
        self,
        name: str,
        layer: CompressedLayer,
        bias: Tensor | None,
        wish: Wish,
        seed: int = 0,
        cached: bool = True,
    ):
        super().__init__()
        self.out_features, self.in_features = layer.shape
        self.original = layer
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), False)
        self.tuned: dict[str, Tuned] = {}
        self.storing = False
        self.transforms, self._start = _outer_diagonals(layer)
        self._moved: tuple[list[Term], torch.device] | None = None
        self._terms: list[Term] = list(layer.terms)
        self._factors: list[int] = []  # which terms are trained low-rank ones
        self._coded: dict[int, list[str]] = {}  # term -> trained fields of its quantizer
        self._choose_factors(name, wish, seed)
        self._choose_quantizers(wish)
        self._choose_diagonals(wish)
        for key, each in self.tuned.items():
            self.register_parameter(f"phi_{key}", each.phi)
        keep = cached and not self._coded
        self.register_buffer("frozen", self._decode() if keep else None, persistent=False)

    # --- what is trained -------------------------------------------------------------------

    def _choose_factors(self, name: str, wish: Wish, seed: int) -> None:
        if not ("lowrank" in wish or "lora" in wish):
            return
        found = [i for i, term in enumerate(self._terms) if isinstance(term, LowRank)]
        if "lora" in wish:
            dense = [i for i in found if isinstance(self._terms[i].right, Dense)]  # type: ignore[union-attr]
            found = (dense or found)[:1]
            if found:
                first, rest = split(self._terms[found[0]], wish.rank)  # type: ignore[arg-type]
                self._terms[found[0]] = first
                self._terms += [] if rest is None else [rest]
            else:
                self._terms.append(self._fresh(name, wish.rank, seed))
                found = [len(self._terms) - 1]
        for i in found:
            self._train_factor(i)

    def _fresh(self, name: str, rank: int, seed: int) -> LowRank:
        """Right at random with rows of unit length, left zero: the layer does not change."""
        m, n = self.original.shape
        rank = min(rank, m, n)
        right = torch.randn(rank, n, generator=generator(seed, name, "lora")) / n**0.5
        return LowRank(Dense(torch.zeros(m, rank).half()), Dense(right.half()))

    def _train_factor(self, i: int) -> None:
        term = self._terms[i]
        assert isinstance(term, LowRank)
        left, right = term.left_matrix(), term.right_matrix()
        unit = None
        if not left.any():  # a step of the new components weighs as much as one of the weight
            W = self.original.decode()
            unit = float(W.square().mean().sqrt() / right.square().mean().sqrt() / term.rank**0.5)
        self.tuned[f"left_{i}"] = tuned(left, half_dtype(left), unit)
        self.tuned[f"right_{i}"] = tuned(right, half_dtype(right))
        self._factors.append(i)

    def _choose_quantizers(self, wish: Wish) -> None:
        for i, term in enumerate(self._terms):
            if isinstance(term, Coded):
                fields = trainable_fields(term.fitted, wish)
                for field, tensor in fields.items():
                    self.tuned[f"{field}_{i}"] = tuned(tensor, tensor.dtype)
                if fields:
                    self._coded[i] = list(fields)

    def _choose_diagonals(self, wish: Wish) -> None:
        a, b = self._start
        rotated = [t.transform for t in self.transforms]
        sides = [t for t in rotated if isinstance(t, RandomizedHadamard)] if "signs" in wish else []
        if any(side.inputs for side in sides):
            self.tuned["input_diagonal"] = tuned(a, torch.float16, 1.0)
        if any(side.outputs for side in sides) and "dora" not in wish:
            self.tuned["output_diagonal"] = tuned(b, torch.float16, 1.0)
        for name, values in (("fixed_input", a), ("fixed_output", b)):
            fixed = None if bool((values == 1).all()) else values
            self.register_buffer(name, fixed, persistent=False)
        norms = None
        if "dora" in wish:
            self.tuned["magnitude"] = tuned(b, torch.float32, 1.0)
            norms = self._row_norms(self._decoded_terms())
        self.register_buffer("magnitude_scale", norms, persistent=False)

    # --- forward ---------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of x."""
        h = x
        a = self._input_factor()
        if a is not None:
            h = h * a
        factors = self._outer_factors()
        y = self._frozen_product(h)
        for left, right in factors:
            y = y + nn.functional.linear(nn.functional.linear(h, right), left)
        b = self._output_factor(factors)
        if b is not None:
            y = y * b
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def _frozen_product(self, h: Tensor) -> Tensor:
        if self.frozen is not None:
            return nn.functional.linear(h, self.frozen)
        return _DecodedProduct.apply(h, self._decode, *self._fields())

    def _fields(self) -> list[Tensor]:
        """Values of the trained scales and codebooks."""
        return [
            self.tuned[f"{field}_{i}"].value()
            for i, fields in self._coded.items()
            for field in fields
        ]

    @torch.autocast("cpu", enabled=False)  # rotations in bfloat16 would round the weight itself
    def _decode(self, *fields: Tensor) -> Tensor:
        """Everything but the trained factors, outside, with these scales and codebooks in it."""
        all_terms, device = self._terms_here()
        given = (field.to(device) for field in fields)
        changed = {i: {name: next(given) for name in names} for i, names in self._coded.items()}
        terms = [
            _with_fields(term, changed.get(i, {}))
            for i, term in enumerate(all_terms)
            if i not in self._factors
        ]
        W = sum_terms(terms, self.original.shape)
        for transform in reversed(self.transforms):
            W = transform.invert(W)
        return W

    def _terms_here(self) -> tuple[list[Term], torch.device]:
        """The terms and where they are: beside what is trained, unless a decoder is shared."""
        device = next((each.phi.device for each in self.tuned.values()), CPU)
        coded = [term for term in self._terms if isinstance(term, Coded)]
        if device == CPU or any(fitted_core(term.fitted) is not None for term in coded):
            return self._terms, CPU
        if self._moved is None or self._moved[1] != device:
            self._moved = on_device(self._terms, self.original.shape, device), device
        return self._moved

    def _outer_factors(self) -> list[tuple[Tensor, Tensor]]:
        pairs = [(self.tuned[f"left_{i}"], self.tuned[f"right_{i}"]) for i in self._factors]
        return [
            (outer_left(L.value(), self.transforms), outer_right(R.value(), self.transforms))
            for L, R in pairs
        ]

    def _input_factor(self) -> Tensor | None:
        """a, or None for ones."""
        if "input_diagonal" in self.tuned:
            return _away_from_zero(self.tuned["input_diagonal"].value())
        return self.fixed_input

    def _output_factor(self, factors: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        """b, or DoRA's magnitude over the present norm, which no gradient goes through."""
        if "output_diagonal" in self.tuned:
            return _away_from_zero(self.tuned["output_diagonal"].value())
        if "magnitude" not in self.tuned:
            return self.fixed_output
        ratio = self.tuned["magnitude"].value()
        if factors or self._coded:
            assert self.magnitude_scale is not None
            with torch.no_grad():
                V = self.frozen
                if V is None:
                    V = self._decode(*self._fields()).to(ratio.device)
                for left, right in factors:
                    V = V + left @ right
                norms = self._row_norms(V)
            ratio = ratio * (self.magnitude_scale / norms)
        ratio = _away_from_zero(ratio)
        return ratio.half().float() if self.storing else ratio

    def _decoded_terms(self) -> Tensor:
        W = sum_terms(self._terms, self.original.shape)
        for transform in reversed(self.transforms):
            W = transform.invert(W)
        return W

    @staticmethod
    def _row_norms(V: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(V.detach().float(), dim=1)
        return norms.clamp(min=torch.finfo(torch.float32).tiny)

    # --- back to a layer -------------------------------------------------------------------

    @torch.no_grad()
    def layer(self) -> CompressedLayer:
        """The compressed layer with the present values, as it will be stored."""
        terms = list(self._terms)
        for i in self._factors:
            left, right = (self.tuned[f"{side}_{i}"].stored() for side in ("left", "right"))
            terms[i] = LowRank(Dense(left), Dense(right))
        for i, fields in self._coded.items():
            term = terms[i]
            assert isinstance(term, Coded)
            values = {field: self.tuned[f"{field}_{i}"].stored() for field in fields}
            terms[i] = replace(term, fitted=with_fields(term.fitted, values))
        return CompressedLayer(self.original.shape, tuple(terms), self._stored_transforms())

    def _stored_transforms(self) -> tuple[FittedTransform, ...]:
        before, self.storing = self.storing, True
        a = self._input_factor()
        b = self._output_factor(self._outer_factors())
        self.storing = before
        if a is None and b is None:
            return self.transforms
        sides = [None if d is None else d.to("cpu", torch.float16) for d in (a, b)]
        transform = Diagonal(inputs=a is not None, outputs=b is not None)
        return (FittedDiagonal(transform, self.original.shape, *sides), *self.transforms)


def on_device(terms: Sequence[Term], shape: tuple[int, int], device: torch.device) -> list[Term]:
    """The same terms with all of their tensors on a device."""
    spec, tensors = layer_to_tensors(CompressedLayer(shape, tuple(terms), ()))
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return list(layer_from_tensors(spec, moved).terms)


def _with_fields(term: Term, values: Mapping[str, Tensor]) -> Term:
    if not values:
        return term
    assert isinstance(term, Coded)
    return replace(term, fitted=with_fields(term.fitted, values))


def _outer_diagonals(
    layer: CompressedLayer,
) -> tuple[tuple[FittedTransform, ...], tuple[Tensor, Tensor]]:
    """The transforms without an outermost diagonal, and its entries a and b; ones without."""
    m, n = layer.shape
    ones = (torch.ones(n), torch.ones(m))
    if not layer.transforms or not isinstance(layer.transforms[0], FittedDiagonal):
        return layer.transforms, ones
    first = layer.transforms[0]
    found = (first.input_diagonal, first.output_diagonal)
    a, b = (one if d is None else d.float() for d, one in zip(found, ones, strict=True))
    return layer.transforms[1:], (a, b)


def _away_from_zero(values: Tensor) -> Tensor:
    sign = torch.where(values.detach() < 0, -1.0, 1.0)
    return torch.where(values.detach().abs() < LEAST_DIAGONAL, sign * LEAST_DIAGONAL, values)


class _DecodedProduct(torch.autograd.Function):
    """h W(fields)^T with W decoded in the forward and again in the backward pass.

    So that of all decoded weights and of all their gradients only those of one layer are there.
    """

    @staticmethod
    def forward(context: Any, h: Tensor, decode: Callable[..., Tensor], *fields: Tensor) -> Tensor:
        context.decode = decode
        context.save_for_backward(h if fields else h[:0], *fields)
        return nn.functional.linear(h, decode(*fields).to(h.device, h.dtype))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        h, *fields = context.saved_tensors
        leaves = [field.detach().requires_grad_() for field in fields]
        with torch.enable_grad():
            W = context.decode(*leaves)
        towards_h = g @ W.detach().to(g.device, g.dtype)
        if not fields:
            return towards_h, None
        towards_W = g.flatten(0, -2).T @ h.flatten(0, -2).to(g.dtype)
        towards_W = towards_W.to(W.device, W.dtype)
        found = torch.autograd.grad(W, leaves, towards_W, allow_unused=True)
        return (towards_h, None, *found)
