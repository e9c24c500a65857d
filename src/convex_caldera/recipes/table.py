"""Names to methods, a literal table: the list that `convex-caldera methods` prints."""

from __future__ import annotations

from convex_caldera.errors import RecipeError
from convex_caldera.recipes.adaptive import reallm_ladder, reallm_menu
from convex_caldera.recipes.autoencoder import reallm_ae_ladder, share_decoders
from convex_caldera.recipes.convex import FACTOR_BITS, convex_caldera_ladder, trellis_ladder
from convex_caldera.recipes.ladder import Method
from convex_caldera.recipes.lattice import caldera_ladder, quip_sharp_ladder
from convex_caldera.recipes.lqer import (
    l2qer_ladder,
    lqer_ladder,
    no_lqer_ladder,
    qera_approx_ladder,
    qera_exact_ladder,
)
from convex_caldera.recipes.reallm import reallm_vq_ladder
from convex_caldera.recipes.scalar import gptq_ladder, normal_float_ladder, rtn_ladder
from convex_caldera.recipes.scl import (
    ecsq_ladder,
    ecvq_ladder,
    lloyd_max_ladder,
    scalar_uniform_ladder,
    vector_vq_ladder,
)

METHODS: dict[str, Method] = {
    "convex-caldera": Method(
        "convex-caldera",
        "Bits and rank of every layer chosen by convex optimisation of the predicted loss, "
        "with a certificate; trellis codes plus low rank where it earns its bits.",
        "this project; docs/methods/convex-caldera.md",
        convex_caldera_ladder,
        curvature="kronecker",
        targets="drift-corrected",
        shrinkage="held-out",
        factor_bits=FACTOR_BITS,
        allocates=True,
    ),
    "rtn": Method(
        "rtn",
        "Round each weight to the nearest point of an affine integer grid per group.",
        "the common baseline; no paper",
        rtn_ladder,
        curvature="none",
    ),
    "gptq": Method(
        "gptq",
        "The same grid, each column corrected for the rounding errors of those before it.",
        "Frantar et al., GPTQ, arXiv 2210.17323",
        gptq_ladder,
    ),
    "nf4": Method(
        "nf4",
        "Nearest quantile of a normal distribution under a block's absolute maximum.",
        "Dettmers et al., QLoRA, arXiv 2305.14314",
        normal_float_ladder,
        curvature="none",
    ),
    "quip-sharp": Method(
        "quip-sharp",
        "Randomised Hadamard on both sides, then LDLQ with the E8 lattice codebook.",
        "Tseng et al., QuIP#, arXiv 2402.04396",
        quip_sharp_ladder,
    ),
    "qtip": Method(
        "qtip",
        "Randomised Hadamard on both sides, then LDLQ with trellis codes near Shannon's limit.",
        "Tseng et al., QTIP, arXiv 2406.11235",
        trellis_ladder,
    ),
    "caldera": Method(
        "caldera",
        "E8 lattice codes plus a low-rank term with coded factors, fitted in alternation.",
        "Saha et al., CALDERA, arXiv 2405.18886",
        caldera_ladder,
    ),
    "reallm-vq": Method(
        "reallm-vq",
        "A low-rank term beside vector-quantized or NormalFloat codes under double-quantized "
        "scales, fitted in alternation; columns may be sorted by strips.",
        "Leconte et al., ReALLM, arXiv 2405.13155",
        reallm_vq_ladder,
    ),
    "reallm": Method(
        "reallm",
        "Every matrix gets the latent that suits it: codebook, sorted strips, NormalFloat or "
        "autoencoder, by measured rate and loss under the budget, with a certificate.",
        "Leconte et al., ReALLM, arXiv 2405.13155",
        reallm_ladder,
        curvature="kronecker",
        allocates=True,
        menu=reallm_menu,
    ),
    "reallm-ae": Method(
        "reallm-ae",
        "A low-rank term beside an autoencoder: patches as small embeddings, and a neural decoder "
        "on few bits that the layers share.",
        "Leconte et al., ReALLM, arXiv 2405.13155; Chen et al., HNeRV, arXiv 2304.02633",
        reallm_ae_ladder,
        share=share_decoders,
    ),
    "scl-scalar-uniform": Method(
        "scl-scalar-uniform",
        "Evenly spaced levels between the extremes, or two quantiles, of a matrix or its groups.",
        "source-coding baseline of the EE274 course; no paper",
        scalar_uniform_ladder,
        curvature="none",
    ),
    "scl-lloyd-max": Method(
        "scl-lloyd-max",
        "The scalar codebook of least squared error, learned for every matrix.",
        "Lloyd 1982, IEEE Trans. Inf. Theory 28 (2); Max 1960, IRE Trans. Inf. Theory 6 (1)",
        lloyd_max_ladder,
        curvature="none",
    ),
    "scl-vector-vq": Method(
        "scl-vector-vq",
        "A k-means codebook for blocks of weights, learned for every matrix.",
        "Linde, Buzo, Gray 1980, IEEE Trans. Commun. 28 (1)",
        vector_vq_ladder,
        curvature="none",
    ),
    "scl-ecsq": Method(
        "scl-ecsq",
        "Levels for entropy-coded codes of any rate, rounded with feedback, coded by rANS.",
        "Chou, Lookabaugh, Gray 1989, IEEE Trans. ASSP 37 (1)",
        ecsq_ladder,
    ),
    "scl-ecvq": Method(
        "scl-ecvq",
        "Codewords for entropy-coded codes of any rate, rounded with feedback, coded by rANS.",
        "Chou, Lookabaugh, Gray 1989, IEEE Trans. ASSP 37 (1)",
        ecvq_ladder,
    ),
    "no-lqer": Method(
        "no-lqer",
        "Nearest rounding to MXINT or another scalar format: LQER's baseline without low rank.",
        "Zhang et al., LQER, arXiv 2402.02446",
        no_lqer_ladder,
        curvature="none",
    ),
    "lqer": Method(
        "lqer",
        "Nearest rounding, then the truncated SVD of its error in a format of its own.",
        "Zhang et al., LQER, arXiv 2402.02446",
        lqer_ladder,
        curvature="none",
    ),
    "l2qer": Method(
        "l2qer",
        "LQER with the error scaled by the mean magnitude of each input channel.",
        "Zhang et al., LQER, arXiv 2402.02446",
        l2qer_ladder,
    ),
    "qera-approx": Method(
        "qera-approx",
        "LQER with the error scaled by the root mean square of each input channel.",
        "Zhang et al., QERA, arXiv 2410.06040",
        qera_approx_ladder,
    ),
    "qera-exact": Method(
        "qera-exact",
        "LQER with the low-rank term of least output error under all of E[x x^T].",
        "Zhang et al., QERA, arXiv 2410.06040",
        qera_exact_ladder,
    ),
}


def method(name: str) -> Method:
    """The method of that name; RecipeError offers the nearest names."""
    import difflib

    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise RecipeError(f"unknown method {name!r}{hint} (see `convex-caldera methods`)")
    return METHODS[name]
