"""Small but complete outputs: a random model, its statistics, a measured plan, a certificate."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from convex_caldera.allocate import allocate
from convex_caldera.allocate.curves import Curves, Group, Option, curves_to_dict
from convex_caldera.allocate.layer_program import layer_program
from convex_caldera.allocate.surrogate import RateModel, solve_surrogate
from convex_caldera.allocate.waterfilling import waterfilling_bits
from convex_caldera.calibrate.saved import Provenance, save_statistics
from convex_caldera.calibrate.statistics import InputStatistics, pack_symmetric
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe
from convex_caldera.core.terms import CompressedLayer
from convex_caldera.quantizers import E8P, NormalFloat, Uniform
from convex_caldera.storage import CardFacts, PartialRun, SourceModel, add_file, assemble
from convex_caldera.storage.codec import layer_to_tensors
from convex_caldera.storage.write import provenance_record
from convex_caldera.transforms.hadamard import RandomizedHadamard
from convex_caldera.transforms.permute import ActOrder
from convex_caldera.transforms.scale import ColumnScale
from tests.storage.making import make_layer

METHOD = "convex-caldera"
SCALE = 1.1  # of the predicted loss on held-out text; any number will do here
SHAPES = {"q_proj": (16, 16), "k_proj": (16, 16), "up_proj": (40, 16), "down_proj": (16, 40)}
INPUTS = {"q_proj": "q_proj", "k_proj": "q_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
# Options from cheap to dear; every kind of quantizer but the trellis, whose search is slow here.
MENU = {
    "2b": Recipe((Quantize(Uniform(2, group_size=8, search=False)),), (ActOrder(),)),
    "2b r2": Recipe((FitLowRank(2), Quantize(E8P(2))), (RandomizedHadamard(),)),
    "3b": Recipe((Quantize(E8P(3)),), (RandomizedHadamard(outputs=False),)),
    "3b r1": Recipe(
        (FitLowRank(1, factors=FactorCoding(E8P(4))), Quantize(NormalFloat(3, group_size=16))),
        (ColumnScale(0.5),),
    ),
    "4b": Recipe((Quantize(E8P(4)),), (RandomizedHadamard(),)),
    "5b": Recipe((Quantize(Uniform(5, group_size=0, symmetric=True)),)),
}


@dataclass(frozen=True)
class Made:
    """An honest output, its model, and its statistics."""

    output: Path
    model: Path
    hessians: Path


def layer_names(blocks: int) -> list[str]:
    return [f"model.layers.{b}.{kind}" for b in range(blocks) for kind in SHAPES]


def make_model(path: Path, blocks: int, seed: int) -> None:
    """Random weights with outliers, an embedding and norms that stay as they are."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(24, 16, generator=draw).bfloat16()}
    for name in layer_names(blocks):
        W = torch.randn(SHAPES[name.rpartition(".")[2]], generator=draw)
        W[:, 0] *= 4
        tensors[f"{name}.weight"] = W if seed % 2 else W.half()
        tensors[f"{name}.bias"] = torch.randn(W.shape[0], generator=draw)
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text('{\n  "model_type": "tiny"\n}\n')


def make_statistics(path: Path, source: SourceModel, blocks: int, seed: int) -> dict[str, Hessian]:
    """Second moments of random inputs by site, saved; the Hessians that were saved."""
    draw = torch.Generator().manual_seed(seed + 1)
    provenance = Provenance(source.checkpoint.fingerprint, "text")
    found = {}
    for block in range(blocks):
        sites = {}
        for kind in set(INPUTS.values()):
            name, n = f"model.layers.{block}.{kind}", SHAPES[kind][1]
            X = torch.randn(60, n, generator=draw) @ torch.randn(n, n, generator=draw)
            H = (X.T @ X / 60).float()
            sites[name] = InputStatistics(name, pack_symmetric(H), X.abs().mean(0), 60)
            found[name] = sites[name].hessian()
        save_statistics(path, block, sites, provenance)
    return found


def layer_bits(layer: CompressedLayer) -> int:
    """8 x bytes of the tensors that a layer is stored as."""
    _, tensors = layer_to_tensors(layer)
    return 8 * sum(t.numel() * t.element_size() for t in tensors.values())


def make(folder: Path, seed: int = 0, blocks: int = 2, tied: bool = True) -> Made:
    """A model, its statistics, and a planned output with a certificate, below `folder`."""
    made = Made(folder / "out", folder / "model", folder / "statistics")
    make_model(made.model, blocks, seed)
    source = SourceModel(made.model)
    hessians = make_statistics(made.hessians, source, blocks, seed)
    sites = {
        n: n.rpartition(".")[0] + "." + INPUTS[n.rpartition(".")[2]] for n in layer_names(blocks)
    }
    problems = {
        name: Problem(source.checkpoint.tensor(f"{name}.weight").float(), hessians[site], name)
        for name, site in sites.items()
    }
    options = {
        name: {
            label: make_layer(problem.W, recipe, seed)
            for label, recipe in MENU.items()
            if "r" in label or not name.endswith("down_proj")
        }
        for name, problem in problems.items()
    }
    ties = tuple((f"model.layers.{b}.q_proj", f"model.layers.{b}.k_proj") for b in range(blocks))
    curves = measured(problems, options, ties if tied else ())
    least = sum(min(o.bits for o in g.options) for g in curves.groups)
    most = sum(max(o.bits for o in g.options) for g in curves.groups)
    budget_bits = 8 * ((least + (most - least) * (30 + seed % 50) // 100) // 8)
    plan = allocate(curves, budget_bits)
    chosen = {name: options[name][label] for name, label in plan.choice.items()}
    records = {name: record(problems[name], layer, sites[name]) for name, layer in chosen.items()}
    store(made, source, chosen, problems, records, curves, plan, budget_bits)
    return made


def measured(problems: Any, options: Any, ties: Any) -> Curves:
    groups = [
        Group(
            name,
            problem.W.numel(),
            tuple(
                Option(label, layer_bits(layer), problem.relative_loss(layer.decode()) * SCALE)
                for label, layer in options[name].items()
            ),
        )
        for name, problem in problems.items()
    ]
    return Curves(tuple(groups), ties)


def record(problem: Problem, layer: CompressedLayer, site: str) -> dict[str, Any]:
    W_hat, stored = layer.decode(), layer.stored_bytes()
    return {
        "shape": list(layer.shape),
        "input_site": site,
        "stored_bytes": stored,
        "bits": 8 * stored / problem.W.numel(),
        "rank": layer.rank,
        "loss": problem.loss(W_hat),
        "relative_loss": problem.relative_loss(W_hat),
    }


def surrogate(curves: Curves, budget_bits: int) -> dict[str, Any]:
    """A joint rate program with made-up constants, solved."""
    models = [
        RateModel(
            g.name,
            g.weights,
            1.0 + i,
            0.5,
            1.3,
            (1.0, 6.0),
            (0.0, 0.5, 1.5),
            (0.0, -0.9, -1.1 - 0.1 * i),
        )
        for i, g in enumerate(curves.groups)
    ]
    found = solve_surrogate(models, float(budget_bits))
    rows = zip(models, found.bits, found.factor_bits, strict=True)
    return {
        "form": "joint",
        "primal": found.primal,
        "dual": found.dual,
        "gap": found.surrogate_gap,
        "price": found.price,
        "budget_bits": found.budget_bits,
        "groups": [
            {**asdict(m), "solution_bits": b, "solution_factor_bits": r} for m, b, r in rows
        ],
    }


def distance(problem: Problem, record: dict[str, Any]) -> float | None:
    """Bits above the waterfilling limit, as a compression reports them."""
    h = torch.linalg.eigvalsh(problem.hessian.matrix).numpy()
    variance = float(problem.W.double().square().mean())
    limit = waterfilling_bits(variance, None, h, tuple(problem.W.shape), record["loss"])
    return None if limit == float("inf") else record["bits"] - limit


def program(
    problem: Problem, record: dict[str, Any], curves: Curves, plan: Any
) -> dict[str, Any] | None:
    """The layer's low-rank program at the plan's price, solved."""
    group = next(g for g in curves.groups if g.name == problem.name)
    distortion = group.option(plan.choice[problem.name]).distortion
    price = plan.price * (record["loss"] / distortion)
    return layer_program(problem.W, problem.hessian.matrix, record["loss"], price, 4)


def store(
    made: Made,
    source: SourceModel,
    chosen: Any,
    problems: Any,
    records: Any,
    curves: Curves,
    plan: Any,
    bits: int,
) -> None:
    """Write the output; only now are headers known, and the budget is they and the bits."""
    run = PartialRun(made.output, {"model": "m"})
    for name, layer in chosen.items():
        run.put(name, layer, records[name])
    container = assemble(
        run,
        source,
        list(chosen),
        recipe={"run": {"method": METHOD}},
        report={"method": METHOD, "budget_bytes": None, "layers": records},
        provenance=provenance_record(source),
        card=CardFacts(base_model="tiny", method=METHOD),
    )
    found = container.sizes().compressed_bytes
    headers = found - plan.bits // 8
    budget = headers + bits // 8
    layers = {
        name: {
            "label": plan.choice[name],
            **{key: records[name][key] for key in ("bits", "rank", "loss", "relative_loss")},
            "option_loss": records[name]["loss"],
            "option_relative_loss": records[name]["relative_loss"],
            "held_out_scale": SCALE,
            "gap_to_waterfilling_bits": distance(problems[name], records[name]),
            "program": program(problems[name], records[name], curves, plan),
        }
        for name in chosen
    }
    certificate = {
        "schema": 1,
        "statement": "Proves: the plan is optimal among measured options.",
        "method": METHOD,
        "unit": "relative",
        "curvature": "input",
        "targets": "original",
        "budget_bytes": budget,
        "compressed_bytes": found,
        "header_bytes": headers,
        "reserved_bytes": headers,
        "curves": curves_to_dict(curves),
        "plan": plan.to_dict(),
        "surrogate": surrogate(curves, bits),
        "layers": layers,
    }
    report = {
        "method": METHOD,
        "targets": "original",
        "budget_bytes": budget,
        "layers": records,
    }
    for name, value in (("certificate", certificate), ("report", report)):
        text = json.dumps(value, indent=2, sort_keys=True) + "\n"
        add_file(made.output, f"convex_caldera/{name}.json", [text.encode()])
