"""Decoders that one layer stores and others borrow.

A neural record with a `home` has no decoder among its parts; its tensors are those of the neural
record of the layer of that name. Whoever rebuilds layers gives a `Lend` that finds them: an
output directory, a run in progress, the modules of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from convex_caldera.core.protocols import Quantizer
from convex_caldera.errors import FormatError
from convex_caldera.linalg.finite import all_finite
from convex_caldera.quantizers.neural import check_borrowed, neural_part

Lend = Callable[[str], Mapping[str, Tensor]]  # layer -> tensors of the decoder that it stores


def borrowed(quantizer: Quantizer, lend: Lend | None) -> dict[str, Tensor]:
    """Tensors of another layer that this quantizer needs, under the names that it wants.

    Raises FormatError if nobody lends, or what is lent does not fit.
    """
    prefix, neural = neural_part(quantizer)
    if neural is None or not neural.home:
        return {}
    if lend is None:
        raise FormatError(f"needs the decoder stored with {neural.home}, which is not at hand")
    lent = lend(neural.home)
    check_borrowed(lent, neural.borrows, neural.home)
    for name, tensor in lent.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise FormatError(f"{neural.home}: {name!r} holds NaN or infinite numbers")
    return {prefix + name: tensor for name, tensor in lent.items()}


def stored_decoder(quantizer: Quantizer, parts: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The decoder among a coded term's parts, by plain names; None if it stores none."""
    prefix, neural = neural_part(quantizer)
    if neural is None or neural.home:
        return None
    return {name: parts[prefix + name] for name in neural.geometry.layout(neural.decoder_bits)}
