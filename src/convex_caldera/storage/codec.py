"""One compressed layer <-> a spec (plain data) and at most a few tensors.

Everything but dense low-rank factors goes into one uint8 tensor `packed`: codes, scales, tables
and signs one after the other, in an order that the spec gives. One tensor instead of seven saves
about 600 header bytes per layer, and a cast of the model to another dtype cannot touch a scale.
Dense factors stay tensors of their own, `left_<t>` and `right_<t>` for term t, so that they can
be trained in place.

The spec says what is in `packed`: kinds and fields of quantizers and transforms (as in
`recipes.records`), and dtype and shape of every part. docs/format.md, section 3, is normative.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_caldera.core.protocols import (
    Coder,
    FittedQuantizer,
    FittedTransform,
    Quantizer,
    RateLimited,
)
from convex_caldera.core.recipe import Quantize, Recipe
from convex_caldera.core.terms import Coded, CompressedLayer, Dense, LowRank, Term
from convex_caldera.errors import FormatError, RecipeError
from convex_caldera.linalg.finite import all_finite
from convex_caldera.recipes.records import from_record
from convex_caldera.storage.lending import Lend, borrowed, stored_decoder
from convex_caldera.storage.spec import (
    CODES,
    FACTOR_DTYPES,
    PACKED,
    Layout,
    Owner,
    Part,
    Spec,
    coded_spec,
    packed_parts,
    padding,
    spec_layout,
    transform_spec,
)

# --- layer -> spec and tensors --------------------------------------------------------------


def layer_to_tensors(layer: CompressedLayer) -> tuple[Spec, dict[str, Tensor]]:
    """Spec and tensors (CPU) of a layer; the inverse of `layer_from_tensors`.

    Low-rank terms of rank 0 are dropped. Raises FormatError if nothing is left to store, or a
    part stores something else than its `layout` says; RecipeError if its kind is in no table.
    """
    terms = [t for t in layer.terms if not (isinstance(t, LowRank) and t.rank == 0)]
    if not terms:
        raise FormatError(f"a layer of shape {layer.shape} without terms would decode to zeros")
    shape = layer.shape
    spec: Spec = {
        "shape": list(shape),
        "transforms": [transform_spec(fitted.transform, shape) for fitted in layer.transforms],
        "terms": [_term_spec(term, shape) for term in terms],
    }
    values: dict[Owner, dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for i, fitted in enumerate(layer.transforms):
        values["transforms", i] = fitted.tensors()
    for i, term in enumerate(terms):
        match term:
            case Coded():
                values["terms", i] = _coded_tensors(term)
            case LowRank():
                for side, factor in (("left", term.left), ("right", term.right)):
                    if isinstance(factor, Dense):
                        tensors[f"{side}_{i}"] = factor.values.detach().cpu().contiguous()
                    else:
                        values["terms", i, side] = _coded_tensors(factor)
    parts = packed_parts(spec)
    if parts:
        pieces = [_as_bytes(_checked(values, part)) for part in parts]
        pieces.append(torch.zeros(padding(parts), dtype=torch.uint8))
        tensors[PACKED] = torch.cat(pieces)
    return spec, tensors


def recipe_layout(recipe: Recipe, shape: tuple[int, int]) -> tuple[Spec, Layout]:
    """What a layer of `shape` fitted by `recipe` will be stored as, before any data is seen.

    The spec is equal to that of `layer_to_tensors` for the fitted layer, and the layout to the
    dtypes and shapes of its tensors; where codes are to be entropy-coded, no file with the fitted
    layer is larger than with this one. Raises RecipeError if a rank exceeds the shape.
    """
    terms: list[Spec] = []
    for step in recipe.steps:
        if isinstance(step, Quantize):
            terms.append(_longest_spec(step, shape))
        elif step.rank:
            quantizer = step.factors.quantizer if step.factors else None
            terms.append(_low_rank_spec(step.rank, shape, quantizer, quantizer))
    transforms = [transform_spec(transform, shape) for transform in recipe.transforms]
    spec = {"shape": list(shape), "transforms": transforms, "terms": terms}
    return spec, spec_layout(spec, torch.float16)


def _longest_spec(step: Quantize, shape: tuple[int, int]) -> Spec:
    """At fixed width, or with as many bytes as a quantizer meant for its coder may need."""
    if step.coder is None or not isinstance(step.quantizer, RateLimited):
        return coded_spec(step.quantizer, shape)
    return coded_spec(step.quantizer, shape, step.coder, step.quantizer.most_coded_bytes(shape))


def _term_spec(term: Term, shape: tuple[int, int]) -> Spec:
    if isinstance(term, Coded):
        codes, coder = term.stored_codes
        return coded_spec(term.fitted.quantizer, shape, coder, codes.numel())
    left, right = (
        factor.fitted.quantizer if isinstance(factor, Coded) else None
        for factor in (term.left, term.right)
    )
    return _low_rank_spec(term.rank, shape, left, right)


def _low_rank_spec(
    rank: int, shape: tuple[int, int], left: Quantizer | None, right: Quantizer | None
) -> Spec:
    """Factors coded by `left` and `right`, dense where None."""
    if rank > min(shape):
        raise RecipeError(f"rank {rank} exceeds the smaller side of {shape}")
    sides = {
        side: {"kind": "dense"} if quantizer is None else coded_spec(quantizer, (rank, width))
        for side, quantizer, width in (("left", left, shape[0]), ("right", right, shape[1]))
    }
    return {"kind": "low_rank", "rank": rank, **sides}


def _coded_tensors(coded: Coded) -> dict[str, Tensor]:
    return {**coded.fitted.tensors(), CODES: coded.stored_codes[0]}


def _checked(values: Mapping[Owner, Mapping[str, Tensor]], part: Part) -> Tensor:
    """The tensor of a part, if it is what the layout of its kind says."""
    tensor = values[part.owner].get(part.field)
    if tensor is None or tensor.dtype != part.dtype or tuple(tensor.shape) != part.shape:
        got = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        where = ".".join(map(str, (*part.owner, part.field)))
        raise FormatError(f"{where}: its layout says {part.dtype} {part.shape}, it stores {got}")
    return tensor


# --- spec and tensors -> layer --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StoredCoded:
    """Codes still packed, at their fixed width, and the fitted quantizer that reads them.

    `coder` is that of the file, to which the codes go back.
    """

    packed: Tensor
    fitted: FittedQuantizer
    coder: Coder | None = None

    def unpack(self) -> Coded:
        return Coded(self.fitted.unpack(self.packed), self.fitted, self.coder)


@dataclass(frozen=True, eq=False)
class StoredLowRank:
    """Factors as stored; a coded left is the transpose (rank, m)."""

    left: StoredCoded | Dense
    right: StoredCoded | Dense

    def unpack(self) -> LowRank:
        left, right = (
            side.unpack() if isinstance(side, StoredCoded) else side
            for side in (self.left, self.right)
        )
        return LowRank(left, right)


StoredTerm = StoredCoded | StoredLowRank


def layer_from_tensors(
    spec: Spec, tensors: Mapping[str, Tensor], lend: Lend | None = None
) -> CompressedLayer:
    """Rebuild a layer from its spec and tensors; `lend` finds what other layers store for it.

    Raises FormatError if a tensor is missing, superfluous, of the wrong dtype or shape, holds NaN
    or infinite numbers, or if codes are out of range.
    """
    transforms, terms = stored_terms(spec, tensors, lend)
    shape = (spec["shape"][0], spec["shape"][1])
    return CompressedLayer(shape, tuple(term.unpack() for term in terms), transforms)


def stored_terms(
    spec: Spec, tensors: Mapping[str, Tensor], lend: Lend | None = None
) -> tuple[tuple[FittedTransform, ...], tuple[StoredTerm, ...]]:
    """Transforms and terms of a stored layer, codes left packed; checks as in the above."""
    check_tensors(spec, tensors)
    parts = split_packed(spec, tensors.get(PACKED))
    shape = (spec["shape"][0], spec["shape"][1])
    transforms = tuple(
        from_record(item["transform"]).restore(shape, _finite(parts.get(("transforms", i), {})))
        for i, item in enumerate(spec["transforms"])
    )
    terms: list[StoredTerm] = []
    for i, item in enumerate(spec["terms"]):
        if item["kind"] == "coded":
            terms.append(_stored_coded(item, shape, parts["terms", i], lend))
            continue
        sides: list[StoredCoded | Dense] = []
        for side, width in (("left", shape[0]), ("right", shape[1])):
            if item[side]["kind"] == "dense":
                field = f"{side}_{i}"
                sides.append(Dense(_finite({field: tensors[field]})[field]))
            else:
                stored = parts["terms", i, side]
                sides.append(_stored_coded(item[side], (item["rank"], width), stored, lend))
        terms.append(StoredLowRank(*sides))
    return transforms, tuple(terms)


def lent_decoder(spec: Spec, packed: Tensor) -> Mapping[str, Tensor]:
    """The decoder that a layer stores, for those that borrow it. FormatError if there is none."""
    parts = split_packed(spec, packed)
    for i, item in enumerate(spec["terms"]):
        if item["kind"] == "coded":
            found = stored_decoder(from_record(item["quantizer"]), parts["terms", i])
            if found is not None:
                return found
    raise FormatError("a decoder is borrowed from a layer that stores none")


def _stored_coded(
    item: Spec, shape: tuple[int, int], stored: Mapping[str, Tensor], lend: Lend | None
) -> StoredCoded:
    side = _finite({name: t for name, t in stored.items() if name != CODES})
    quantizer = from_record(item["quantizer"])
    fitted = quantizer.restore(shape, {**side, **borrowed(quantizer, lend)})
    if "coder" not in item:
        return StoredCoded(stored[CODES], fitted)
    coder = from_record(item["coder"])
    (num_bytes,) = quantizer.layout(shape)[CODES][1]
    packed = coder.decode(stored[CODES], num_bytes).to(stored[CODES].device)
    return StoredCoded(packed, fitted, coder)


def _finite(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise FormatError(f"{name!r} holds NaN or infinite numbers")
    return tensors


def check_tensors(spec: Spec, tensors: Mapping[str, Tensor]) -> None:
    """Names, dtypes and shapes exactly as the spec asks; dense factors in any float dtype."""
    layout = spec_layout(spec)
    if set(tensors) != set(layout):
        odd = sorted(set(tensors) ^ set(layout))
        raise FormatError(f"tensors {odd} are missing or superfluous; expected {sorted(layout)}")
    for name, (dtype, shape) in layout.items():
        tensor = tensors[name]
        allowed = (dtype,) if name == PACKED else FACTOR_DTYPES
        if tuple(tensor.shape) != shape or tensor.dtype not in allowed:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise FormatError(f"{name!r} must be {allowed[0]} {shape}, got {got}")


def split_packed(spec: Spec, packed: Tensor | None) -> dict[Owner, dict[str, Tensor]]:
    """Views (or aligned copies) of the parts of `packed`, by owner and field.

    Raises FormatError if the length is not exactly that of the parts or the padding is not zero.
    """
    parts = packed_parts(spec)
    used = sum(part.num_bytes for part in parts)
    want = used + padding(parts)
    if packed is None:
        packed = torch.empty(0, dtype=torch.uint8)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != want:
        got = f"{packed.dtype} {tuple(packed.shape)}"
        raise FormatError(f"`packed` must be uint8 ({want},) for this spec, got {got}")
    if packed[used:].any():
        raise FormatError("the padding after the last part of `packed` must be zero")
    out: dict[Owner, dict[str, Tensor]] = {}
    position = 0
    for part in parts:
        raw = packed[position : position + part.num_bytes]
        out.setdefault(part.owner, {})[part.field] = _from_bytes(raw, part)
        position += part.num_bytes
    return out


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _from_bytes(raw: Tensor, part: Part) -> Tensor:
    if part.dtype.itemsize > 1 and raw.numel():
        raw = raw.clone()  # a view needs an aligned start, which a slice of a file may lack
    return raw.view(part.dtype).reshape(part.shape)
