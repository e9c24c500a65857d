"""The mission's ReALLM flags: accepted as they are written, and meaning what the paper means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from convex_caldera.compat import run_vqdora, train_nerv_all
from convex_caldera.compat.reallm import NervArguments, ReALLMArguments, parse_flags
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers import DoubleScale, KMeans, NormalFloat, StripOrder
from convex_caldera.storage.read import open_container
from convex_caldera.workflow.settings import make_settings

README = ["--results_path=OUT", "--lora_model_name=nf2", "--lora_num_ranks=64"]
NERV = [
    "--vid=q0_512", "--conv_type=['convnext', 'quantpshuffle']", "--enc_dim=64_16",
    "--enc_strds=[2,2,2,2,2]", "--dec_strds=[2,2,2,2,2]", "--modelsize=7.2",
]  # fmt: skip


def test_nf2_names_a_rate_and_not_a_code() -> None:
    arguments = parse_flags(ReALLMArguments, README)
    assert (arguments.bits, arguments.lora_num_ranks, arguments.results_path) == (2, 64, "OUT")
    low_rank, codes = arguments.recipe().steps
    assert low_rank.rank == 64 and low_rank.factors is None and low_rank.metric == "identity"
    assert codes.metric == "identity"
    expected = StripOrder(DoubleScale(KMeans(2, 2, -1, iterations=20, seed=42)), 64, 16)
    assert codes.quantizer == expected
    as_floats = parse_flags(ReALLMArguments, [*README, "--method", "blockwise-nf"])
    assert as_floats.recipe().steps[1].quantizer == DoubleScale(NormalFloat(2, -1))
    for each in (arguments, as_floats):
        assert make_settings(**each.settings() | {"model": "m"}).curvature == "none"


def test_vid_names_layers_and_patch() -> None:
    arguments = parse_flags(NervArguments, NERV)
    assert arguments.layers == ("q_proj", (0,), 512)
    neural = arguments.neural((4096, 4096))
    assert neural.patch == 512 and neural.channels == 16 and neural.kernels == (1, 5)
    assert NervArguments(vid="gate0_3_7_64").layers == ("gate_proj", (0, 3, 7), 64)
    with pytest.raises(RecipeError, match="such as q0_512"):
        _ = NervArguments(vid="x0_512").layers


def test_lists_may_have_spaces_and_no_quotes_as_in_the_mission() -> None:
    as_a_shell_splits = [NERV[0], "--conv_type=[convnext,", "quantpshuffle]", *NERV[2:]]
    arguments = parse_flags(NervArguments, as_a_shell_splits)
    assert arguments.layers == parse_flags(NervArguments, NERV).layers
    assert arguments.neural((96, 96)) == parse_flags(NervArguments, NERV).neural((96, 96))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_model_name=nf5"], "nf2, nf3, nf4"),
        (["--lora_num_rank=64"], "unknown flag"),
        (["--lora_num_ranks=many"], "is no int"),
        (["--lora_num_ranks=-1"], ">= 0"),
        (["--lora_num_ranks"], "needs a value"),
        (["--bucket=2", "--bucket=4"], "given twice"),
        (["--method=lora"], "blockwise-permute or blockwise-nf"),
        (["nf2"], "unknown flag"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_flags(ReALLMArguments, flags)


def test_commands_say_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_vqdora.main(README) == 2
    assert "--model_name_or_path is needed" in capsys.readouterr().err
    assert train_nerv_all.main([*NERV, "--model_name_or_path=m"]) == 2
    assert "--results_path is needed" in capsys.readouterr().err


@pytest.mark.slow
def test_commands_make_models(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """No budget is asked for: the flags leave no choice."""
    model = tiny_model("llama")
    out = tmp_path / "vq"
    flags = [f"--model_name_or_path={model}", f"--results_path={out}"]
    assert run_vqdora.main([*flags, "--lora_model_name=nf2", "--lora_num_ranks=4"]) == 0
    for _, spec in open_container(out).layers.values():
        factors, codes = spec["terms"]
        assert factors["rank"] == 4 and factors["left"]["kind"] == "dense"
        assert codes["quantizer"]["kind"] == "strip_order"
        assert codes["quantizer"]["inner"]["inner"]["bits"] == 2

    out = tmp_path / "ae"
    flags = [f"--model_name_or_path={model}", f"--results_path={out}", "--vid=up0_1_16"]
    small = ["--enc_dim=4_4", "--enc_strds=2", "--dec_strds=2", "--modelsize=0.012", "--epochs=1"]
    assert train_nerv_all.main([*flags, *small, "--lower_width=2", "--ks=0_1_1"]) == 0
    layers = open_container(out).layers
    assert sorted(layers) == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    homes = [spec["terms"][-1]["quantizer"]["inner"]["home"] for _, spec in layers.values()]
    assert sorted(homes) == ["", "model.layers.0.mlp.up_proj"]
