"""Parameters of CALDERA under their original names and defaults.

Different from the original: defaults are never shared between instances; an empty
`update_order` means low rank first, then codes, instead of doing nothing; `block_size` of a
quantizer factory is used instead of being overwritten by the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from convex_caldera.core.protocols import Quantizer
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.normal_float import NormalFloat
from convex_caldera.quantizers.uniform import Uniform


@dataclass
class QuIPArgs:
    """Options of the lattice rounding that mean something here.

    sigma_reg: damping of H as a fraction of its mean diagonal; quip_tune_iters: refinement
    sweeps after LDLQ; scale_override: codebook scale, 0 for the codebook's own.
    """

    sigma_reg: float = 0.0
    quip_tune_iters: int = 10
    scale_override: float = 0.0


@dataclass
class QuantizerFactory:
    """A scalar quantizer: "uniform", "normal" or "uniform_clipped" in blocks of `block_size`.

    "uniform" is symmetric under the block's largest magnitude; "uniform_clipped" searches how
    far to clip (the original clips at mean + 2.5 standard deviations).
    """

    method: str = "uniform"
    block_size: int = 64

    def get_quantizer(self, num_bits: int) -> Quantizer:
        """The quantizer for a number of bits.

        Raises:
            RecipeError: unknown method, or bits that it does not offer.
        """
        if self.method == "uniform":
            return Uniform(num_bits, self.block_size, symmetric=True, search=False)
        if self.method == "uniform_clipped":
            return Uniform(num_bits, self.block_size, symmetric=True, search=True)
        if self.method == "normal":
            return NormalFloat(num_bits, self.block_size)
        raise RecipeError(
            f"unknown quantizer method {self.method!r}; one of uniform, uniform_clipped, normal"
        )


@dataclass
class CalderaParams:
    """Original names, meanings and defaults; see the method page of CALDERA for each.

    Bits of 16 and more keep a factor in float16. `rand_svd` and `lattice_quant_block_size`
    are accepted; exact or randomised SVD and chunking are chosen by size here.
    """

    quip_args: QuIPArgs = field(default_factory=QuIPArgs)
    compute_quantized_component: bool = True
    compute_low_rank_factors: bool = True
    Q_bits: int = 2
    L_bits: int = 2
    R_bits: int = 2
    rank: int = 64
    iters: int = 20
    lplr_iters: int = 5
    activation_aware_Q: bool = True
    activation_aware_LR: bool = True
    lattice_quant_Q: bool = True
    lattice_quant_LR: bool = True
    hadamard_transform: bool = False
    full_quip_sharp: bool = False
    update_order: list[str] = field(default_factory=list)
    quant_factory_Q: QuantizerFactory = field(default_factory=QuantizerFactory)
    quant_factory_LR: QuantizerFactory = field(default_factory=QuantizerFactory)
    rand_svd: bool = True
    Q_hessian_downdate: bool = False
    lattice_quant_block_size: int = 32000
