"""Keys of a staged configuration: those of LQER's TOML templates, strict, and a few of our own.

Names, meaning and nesting follow the templates of LQER (arXiv 2402.02446), so that a file made
for its pipeline is read here. Where that pipeline has a knob that changes nothing here (workers,
device maps, padding) the key is accepted and reported as without effect; any other key is an
error. "NA" stands for an absent value.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]

METHODS: dict[str, str] = {
    "lqer-svd": "lqer",
    "lqer_svd": "lqer",
    "lqer": "lqer",
    "lqer-act": "l2qer",
    "lqer_act": "l2qer",
    "l2qer": "l2qer",
    "qera-approx": "qera-approx",
    "qera-exact": "qera-exact",
    "no-lqer": "no-lqer",
}


class Strict(BaseModel):
    """Unknown keys are errors, types are not guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class QuantizerTable(Strict):
    """A number format; `mxint` has OCP's exponent rule, `block_fp` that of LQER's code."""

    name: Literal["mxint", "block_fp", "int", "sint", "normalfloat", "minifloat", "passthrough"]
    width: Annotated[int, Field(ge=1, le=8)] | None = None
    exponent_width: Annotated[int, Field(ge=1, le=8)] | None = None
    exponent_bias: int | None = None
    block_size: int | list[int] | None = None
    skip_first_dim: bool | None = None


class Profile(Strict):
    """Calibration. Statistics are means over tokens and do not depend on `batch_size`."""

    dataset: str = "bundled:calibration"
    max_length: Positive = 512
    num_samples: Positive = 128
    seed: int = 42
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "cpu"
    allow_short: bool = False
    scaling_mode: Literal["mean(abs())"] = "mean(abs())"
    # without effect
    batch_size: Any = None
    num_workers: Any = None
    num_raw_samples: Any = None
    scale_dict: Any = None
    device_map: Any = None
    max_memory: Any = None
    padding: Any = None
    progress_bar: Any = None


class Approximator(Strict):
    """What one layer is made of."""

    rank: Number
    W_quantizer: QuantizerTable
    A_quantizer: QuantizerTable | None = None
    B_quantizer: QuantizerTable | None = None


class Approximate(Strict):
    """Method, chunks, and which layer gets which approximator; `default` is the usual one."""

    name: Literal[tuple(METHODS)]  # type: ignore[valid-type]
    default: Approximator
    approximator: dict[str, Literal["default"] | Approximator] | None = None
    ignore: list[str] = []
    chunk_size: Positive | None = None
    chunk_idx: Number | None = None
    # without effect
    device: Any = None
    lqer_svd: Annotated[dict[str, Any], Field(max_length=0)] = {}
    lqer_act: Annotated[dict[str, Any], Field(max_length=0)] = {}


class LinearRank(Strict):
    """[l_config.linear]: must agree with the approximator's rank."""

    rank: Number


class LowRankConfig(Strict):
    linear: LinearRank | None = None


class LinearConfig(Strict):
    """[q_config.linear]: how a linear layer computes."""

    x_quantizer: QuantizerTable | None = None
    w_quantizer: QuantizerTable | None = None
    A_out_quantizer: QuantizerTable | None = None
    # without effect: biases and sums are not rounded
    b_quantizer: Any = None
    B_out_quantizer: Any = None
    name: Any = None
    is_ptq: Any = None
    default: Any = None


class MatmulConfig(Strict):
    """[q_config.matmul] or [q_config.bmm]: both attention products."""

    x_quantizer: QuantizerTable
    w_quantizer: QuantizerTable
    layout: Literal["contraction", "legacy"] = "contraction"
    # without effect
    name: Any = None
    default: Any = None


class QuantizeConfig(Strict):
    linear: LinearConfig | None = None
    matmul: MatmulConfig | None = None
    bmm: MatmulConfig | None = None


class Perplexity(Strict):
    dataset: str = "bundled:test"
    max_length: Positive = 512
    stride: Positive | None = None
    num_samples: Positive | None = None
    bos: bool = True
    # without effect
    batch_size: Any = None
    device_map: Any = None


class Downstream(Strict):
    datasets: list[str]
    task_data: list[str] = []
    limit: Positive | None = None
    batch_size: Positive | None = None
    num_fewshot: Literal[0] = 0
    # without effect
    no_cache: Any = None


class Evaluate(Strict):
    disable_lqer: bool = False
    perplexity: Perplexity | None = None
    harness_downstream: Downstream | None = None
    device: str = "cpu"
    # without effect: evaluation is in float32, of the stored model
    dtype: Any = None
    low_rank_dict: Any = None


class StagedConfig(Strict):
    """A whole file."""

    model_name: str
    project: str = ""
    tags: list[str] = []
    checkpoint_path: str | None = None
    overwrite_checkpoint: bool = False
    enable_profiling: bool = True
    enable_approximation: bool = True
    enable_quantization: bool = True
    enable_perplexity_evaluation: bool = True
    enable_harness_downstream_evaluation: bool = False
    enable_wandb: Literal[False] = False
    profile: Profile = Profile()
    approximate: Approximate
    l_config: LowRankConfig = LowRankConfig()
    q_config: QuantizeConfig = QuantizeConfig()
    evaluate: Evaluate = Evaluate()
    wandb: Any = None


# Tables whose keys above the comment "without effect" matter; the others are reported.
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "": ("wandb",),
    "profile": (
        "batch_size",
        "num_workers",
        "num_raw_samples",
        "scale_dict",
        "device_map",
        "max_memory",
        "padding",
        "progress_bar",
    ),
    "approximate": ("device",),
    "q_config.linear": ("b_quantizer", "B_out_quantizer", "name", "is_ptq", "default"),
    "q_config.matmul": ("name", "default"),
    "q_config.bmm": ("name", "default"),
    "evaluate": ("dtype", "low_rank_dict"),
    "evaluate.perplexity": ("batch_size", "device_map"),
    "evaluate.harness_downstream": ("no_cache",),
}
