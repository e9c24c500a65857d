"""The mission's ReALLM commands under their own flags, carried out by this library.

    python -m convex_caldera.compat.run_vqdora --lora_model_name=nf2 --lora_num_ranks=64 ...
    python -m convex_caldera.compat.train_nerv_all --vid=q0_512 --enc_dim=64_16 ...

`lora_model_name` names a bit rate, not NormalFloat codes: "nf2" is 2 code bits in pairs, sorted
strips with 16-bit indices, scales of 64 weights on 8 bits, and no data. Codes are NormalFloat with
`--method blockwise-nf`. Different from the original, whose command line is never read: flags are
obeyed, unknown ones refused, and the model is not fixed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from convex_caldera.core.recipe import FitLowRank, Quantize, Recipe
from convex_caldera.errors import ConvexCalderaError, RecipeError
from convex_caldera.quantizers.double_scale import DoubleScale
from convex_caldera.quantizers.kmeans import KMeans
from convex_caldera.quantizers.neural import Neural
from convex_caldera.quantizers.normal_float import NormalFloat
from convex_caldera.quantizers.strip_order import StripOrder
from convex_caldera.recipes.autoencoder import parse_options

RATES = {"nf2": 2, "nf3": 3, "nf4": 4}
METHODS = ("blockwise-permute", "blockwise-nf")
# Short names of the mission's `vid`, and the layers that they are in a Llama.
LAYER_TYPES = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
ALTERNATIONS = 10  # at most; theirs stops at the first rise, this keeps the best


@dataclass(frozen=True)
class ReALLMArguments:
    """Flags of `run_vqdora.py`.

    results_path: output directory; lora_model_name: nf2, nf3 or nf4; lora_num_ranks: rank of the
    low-rank term, in 16 bits; bucket: weights of a vector, fixed to 2 in the original; method:
    blockwise-permute (codebook, sorted strips) or blockwise-nf; model_name_or_path: the model;
    seed.

    Raises RecipeError for values that mean nothing here.
    """

    results_path: str = ""
    lora_model_name: str = "nf2"
    lora_num_ranks: int = 64
    bucket: int = 2
    method: str = "blockwise-permute"
    model_name_or_path: str = ""
    seed: int = 42

    def __post_init__(self) -> None:
        if self.lora_model_name not in RATES:
            raise RecipeError(
                f"lora_model_name is {', '.join(RATES)}, got {self.lora_model_name!r}; budgets are "
                "given to `convex-caldera compress --method reallm`"
            )
        if self.method not in METHODS:
            raise RecipeError(f"method is {' or '.join(METHODS)}, got {self.method!r}")
        if self.lora_num_ranks < 0:
            raise RecipeError(f"lora_num_ranks must be >= 0, got {self.lora_num_ranks}")

    @property
    def bits(self) -> int:
        """Code bits per weight."""
        return RATES[self.lora_model_name]

    def recipe(self) -> Recipe:
        """What the paper's code does to one matrix, without its stopping rule and its flaws."""
        if self.method == "blockwise-nf":
            codes = Quantize(DoubleScale(NormalFloat(self.bits, -1)), "identity")
        else:
            inner = DoubleScale(KMeans(self.bits, self.bucket, -1, iterations=20, seed=self.seed))
            codes = Quantize(StripOrder(inner, 64, index_bits=16), "identity")
        if self.lora_num_ranks == 0:
            return Recipe((codes,))
        return Recipe((FitLowRank(self.lora_num_ranks, "identity"), codes), sweeps=ALTERNATIONS)

    def settings(self) -> dict[str, Any]:
        """Options of `convex-caldera compress` that mean the same."""
        latent = "nf" if self.method == "blockwise-nf" else "vq"
        return {
            "model": self.model_name_or_path,
            "method": "reallm-vq",
            "rank": self.lora_num_ranks,
            "factor_bits": 16,
            "latent": latent,
            **({"bucket": self.bucket, "order": "strip"} if latent == "vq" else {}),
            "pin": (f"re:.*=bits:{self.bits},rank:{self.lora_num_ranks},factor_bits:16",),
            "curvature": "none",
            "seed": self.seed,
        }


@dataclass(frozen=True)
class NervArguments:
    """Flags of `train_nerv_all.py`.

    vid: layer type, depth and patch, as in "q0_512" (q, k, v, o, gate, up, down; depths joined by
    "_" as in "q0_3_7_512"); conv_type, enc_dim, enc_strds, dec_strds, modelsize (millions of
    parameters with the embeddings): as HNeRV; ks, lower_width, wbits, epochs, lr, quant_embed_bit:
    as there; model_name_or_path: the model; results_path: output directory.
    """

    vid: str = "q0_512"
    conv_type: str = "convnext,quantpshuffle"
    enc_dim: str = "64_16"
    enc_strds: str = "2,2,2,2,2"
    dec_strds: str = "2,2,2,2,2"
    modelsize: float = 7.2
    ks: str = "0_1_5"
    lower_width: int = 12
    wbits: int = 8
    epochs: int = 20
    lr: float = 1e-3
    quant_embed_bit: int = 6
    model_name_or_path: str = ""
    results_path: str = ""
    seed: int = 1

    @property
    def layers(self) -> tuple[str, tuple[int, ...], int]:
        """Kind of layer, depths, side of a patch. Raises RecipeError if `vid` names no layer."""
        match = re.fullmatch(r"([a-z]+)(\d+(?:_\d+)*)_(\d+)", self.vid)
        if match is None or match[1] not in LAYER_TYPES:
            raise RecipeError(
                f"vid {self.vid!r} must read layer type, depths and patch such as q0_512; "
                f"types are {', '.join(LAYER_TYPES)}"
            )
        return LAYER_TYPES[match[1]], tuple(map(int, match[2].split("_"))), int(match[3])

    def options(self) -> tuple[str, ...]:
        """The same as `--neural` options."""
        patch = self.layers[2]
        return (
            f"p_size={patch}",
            *(
                f"{name}={getattr(self, name)}"
                for name in (
                    "conv_type", "enc_dim", "enc_strds", "dec_strds", "modelsize", "ks",
                    "lower_width", "wbits", "epochs", "lr", "seed",
                )
            ),
            f"embed_bits={self.quant_embed_bit}",
        )  # fmt: skip

    def neural(self, shape: tuple[int, int]) -> Neural:
        """The code of one matrix; RecipeError where flags do not fit together."""
        return parse_options(self.options()).neural(shape, self.quant_embed_bit)

    def settings(self) -> dict[str, Any]:
        """Options of `convex-caldera compress` that mean the same, all other layers ignored."""
        kind, depths, _ = self.layers
        wanted = "|".join(rf"\.{depth}\..*{kind}" for depth in depths)
        return {
            "model": self.model_name_or_path,
            "method": "reallm-ae",
            "rank": 64,
            "factor_bits": 16,
            "neural": self.options(),
            "ignore": (rf"re:^(?!.*({wanted})$).*",),
            "curvature": "none",
            "seed": self.seed,
        }


def parse_flags(kind: type, argv: Sequence[str]) -> Any:
    """An instance of `kind` from "--flag=value" or "--flag value"; RecipeError otherwise.

    A list may have spaces, as the mission's command writes it without quotes.
    """
    known = {field.name: str(field.type) for field in fields(kind)}
    values: dict[str, Any] = {}
    rest = _joined_lists(argv)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or name not in known:
            raise RecipeError(f"unknown flag {flag!r}; known: {', '.join(known)}")
        if not equals:
            if not rest:
                raise RecipeError(f"flag {flag!r} needs a value")
            value = rest.pop(0)
        if name in values:
            raise RecipeError(f"flag --{name} is given twice")
        values[name] = _typed(name, value, known[name])
    return kind(**values)


def _joined_lists(argv: Sequence[str]) -> list[str]:
    """The arguments, those that a shell made of one [list, with spaces] joined again."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1].count("[") > joined[-1].count("]"):
            joined[-1] += argument
        else:
            joined.append(argument)
    return joined


def compress_as(settings: dict[str, Any], results_path: str) -> Any:
    """Run what `settings` say into `results_path`; the summary of `workflow.compress`."""
    from convex_caldera.workflow.compress import compress_to
    from convex_caldera.workflow.progress import shown
    from convex_caldera.workflow.settings import make_settings

    for flag, value in (
        ("model_name_or_path", settings["model"]),
        ("results_path", results_path),
    ):
        if not value:
            raise RecipeError(f"--{flag} is needed")
    with shown() as progress:
        return compress_to(make_settings(**settings), Path(results_path), progress=progress)


def _typed(name: str, value: str, kind: str) -> Any:
    try:
        return {"int": int, "float": float}.get(kind, str)(value)
    except ValueError as error:
        raise RecipeError(f"--{name} {value!r} is no {kind}") from error


def run_as(arguments: type[ReALLMArguments] | type[NervArguments], argv: Sequence[str]) -> int:
    """Compress by a script's flags; the exit codes are those of the command line."""
    try:
        given = parse_flags(arguments, argv)
        summary = compress_as(given.settings(), given.results_path)
    except ConvexCalderaError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(summary.text() + "\n")
    return 0
