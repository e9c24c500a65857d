"""The torch module of a compressed layer: y = B^-1 (Q + L R) A x + bias.

Buffers and parameters carry the names and bytes of the file: `packed` (uint8, so no cast of the
model ever touches it) and dense factors `left_<t>`, `right_<t>` as parameters. Codes are decoded
on the fly, a slice of rows at a time; L and R act one after the other, so W^ never exists unless
`dequantize` is called. All arithmetic inside is float32, whatever the dtype of the activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.core.protocols import FittedQuantizer, FittedTransform, Quantizer
from convex_caldera.core.terms import Coded, CompressedLayer
from convex_caldera.errors import FormatError, ShapeError
from convex_caldera.quantizers.neural import fitted_core
from convex_caldera.runtime.activations import rounded
from convex_caldera.runtime.kernels import kernel_for
from convex_caldera.storage.codec import (
    StoredCoded,
    StoredLowRank,
    StoredTerm,
    layer_from_tensors,
    layer_to_tensors,
    lent_decoder,
    stored_terms,
)
from convex_caldera.storage.spec import PACKED, Spec, spec_layout

ANCHOR = "anchor"  # an empty parameter of layers that have no other; never saved
Stored = tuple[tuple[FittedTransform, ...], tuple[StoredTerm, ...]]


class CompressedLinear(nn.Module):
    """A linear layer that stays compressed in memory.

    Law: `forward(x)` equals `dequantize()(x)` up to float32 rounding.

    Args:
        spec: what the tensors mean, from `layer_to_tensors` or a file.
        bias: whether there is one.
        dtype: of bias and dense factors; `packed` is uint8 always.
        device: of all tensors; "meta" for a skeleton that is filled later.
    """

    packed: Tensor
    anchor: nn.Parameter

    def __init__(
        self,
        spec: Spec,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = spec["shape"]
        for name, (stored, shape) in spec_layout(spec).items():
            if name == PACKED:
                self.register_buffer(PACKED, torch.empty(shape, dtype=stored, device=device))
            else:
                values = torch.empty(shape, dtype=dtype or stored, device=device)
                self.register_parameter(name, nn.Parameter(values))
        self.activation: Quantizer | None = None  # format that inputs are rounded to
        self.bias: nn.Parameter | None = None
        if bias:
            zeros = torch.empty(self.out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(zeros)
        if not list(self.parameters()):
            # PEFT asks every layer it wraps for one parameter, to learn its device.
            anchor = torch.empty(0, dtype=dtype, device="cpu")
            self.register_parameter(ANCHOR, nn.Parameter(anchor, requires_grad=False))
        # Layers that store a decoder for this one, by their name in the file; set by who loads.
        self.lenders: dict[str, CompressedLinear] = {}
        self._lent: dict[str, Mapping[str, Tensor]] = {}
        self._stored: Stored | None = None
        self._stored_from: Tensor | None = None

    @classmethod
    def from_layer(cls, layer: CompressedLayer, bias: Tensor | None = None) -> CompressedLinear:
        """A module holding copies of a layer's tensors, and of the bias if there is one."""
        spec, tensors = layer_to_tensors(layer)
        module = cls(spec, bias=bias is not None)
        for name, tensor in tensors.items():
            if name == PACKED:
                module.packed = tensor.clone()
            else:
                setattr(module, name, nn.Parameter(tensor.clone()))
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone())
        for term in layer.terms:
            core = fitted_core(term.fitted) if isinstance(term, Coded) else None
            if core is not None and core.quantizer.home:
                module._lent[core.quantizer.home] = core.decoder.tensors()
        return module

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of x."""
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"expected (..., {self.in_features}) inputs, got {tuple(x.shape)}")
        transforms, terms = self._parts()
        inner = x.reshape(-1, self.in_features).float()
        for transform in transforms:
            inner = transform.inputs(inner)
        inner = self._rounded(inner)
        y: Tensor | None = None
        for index, term in enumerate(terms):
            product = self._apply_term(index, term, inner)
            y = product if y is None else y + product
        assert y is not None  # a spec has at least one term
        for transform in reversed(transforms):
            y = transform.outputs(y)
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def layer(self) -> CompressedLayer:
        """The compressed layer with the present values of the factors."""
        return layer_from_tensors(self.spec, self._tensors(), self._lend)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """A plain linear layer with W^ in `dtype`, on the same device."""
        weight = self.layer().decode().to(dtype)
        plain = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=weight.device,
            dtype=dtype,
        )
        plain.weight.copy_(weight)
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain

    def extra_repr(self) -> str:
        kinds = [
            term["quantizer"]["kind"] if term["kind"] == "coded" else f"low_rank({term['rank']})"
            for term in self.spec["terms"]
        ]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, terms={' + '.join(kinds)}"
        )

    def _apply_term(self, index: int, term: StoredTerm, x: Tensor) -> Tensor:
        if isinstance(term, StoredCoded):
            return coded_product(term, x)
        return self._apply_factors(index, term, x)

    def _apply_factors(self, index: int, term: StoredLowRank, x: Tensor) -> Tensor:
        """L (R x). Dense factors come from the parameters, so that gradients reach them."""
        if isinstance(term.right, StoredCoded):
            z = coded_product(term.right, x)
        else:
            z = x @ getattr(self, f"right_{index}").float().T
        z = self._rounded(z)
        if isinstance(term.left, StoredCoded):
            return coded_product(term.left, z, transposed=True)
        return z @ getattr(self, f"left_{index}").float().T

    def _rounded(self, x: Tensor) -> Tensor:
        """What a product reads: x itself, or rounded to the format of activations."""
        return x if self.activation is None else rounded(x, self.activation)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).detach() for name in spec_layout(self.spec)}

    def _lend(self, name: str) -> Mapping[str, Tensor]:
        """A decoder stored with another layer of the model, or given with this one."""
        if name in self.lenders:
            home = self.lenders[name]
            return lent_decoder(home.spec, home.packed)
        if name not in self._lent:
            raise FormatError(f"needs the decoder stored with {name}, which is not in this model")
        return self._lent[name]

    def _parts(self) -> Stored:
        """Transforms and terms, rebuilt when the buffers were moved or loaded."""
        packed = getattr(self, PACKED, None)
        if self._stored is None or self._stored_from is not packed:
            self._stored = stored_terms(self.spec, self._tensors(), self._lend)
            self._stored_from = packed
        return self._stored

    def settle(self) -> None:
        """Put the anchor, which is in no file, where the loaded tensors are."""
        if ANCHOR in self._parameters:
            self.anchor.data = self.anchor.data.to(self.packed.device)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + ANCHOR, None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *rest
        )
        if prefix + ANCHOR in missing_keys:
            missing_keys.remove(prefix + ANCHOR)
        self._stored = None


class _CodedProduct(torch.autograd.Function):
    """y = Q x for a constant Q in packed form; the backward pass decodes again."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, packed: Tensor, fitted: FittedQuantizer, transposed: bool
    ) -> Tensor:
        context.save_for_backward(packed)
        context.fitted, context.transposed = fitted, transposed
        kernel = kernel_for(fitted, x.device.type)
        return (kernel.transposed if transposed else kernel.forward)(fitted, packed, x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = context.saved_tensors
        kernel = kernel_for(context.fitted, gradients[0].device.type)
        product = kernel.forward if context.transposed else kernel.transposed
        return product(context.fitted, packed, gradients[0].contiguous()), None, None, None


def coded_product(term: StoredCoded, x: Tensor, transposed: bool = False) -> Tensor:
    """x (tokens, n) -> x Q^T (tokens, m), or x (tokens, m) -> x Q with `transposed`."""
    return _CodedProduct.apply(x, term.packed, term.fitted, transposed)
