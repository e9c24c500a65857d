"""Claims about certificate.json and report.json that need no model.

certificate.json (docs/certificate.md) has exactly these keys: schema 1, statement, method,
budget_bytes, compressed_bytes, header_bytes, reserved_bytes, curves, plan, surrogate, layers,
unit, curvature, targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from convex_caldera.certify.embeddings import uses_of
from convex_caldera.certify.knapsack import (
    Curves,
    check_bound,
    check_membership,
    read_curves,
    read_plan,
)
from convex_caldera.certify.reader import Output
from convex_caldera.certify.strict import natural, number, short, string, table
from convex_caldera.certify.tuned import bytes_before, tuned_layers, tuning_of
from convex_caldera.errors import CheckError, FormatError

SCHEMA = 1
KEYS = (
    "schema",
    "statement",
    "method",
    "budget_bytes",
    "compressed_bytes",
    "header_bytes",
    "reserved_bytes",
    "curves",
    "plan",
    "surrogate",
    "layers",
    "unit",
    "curvature",
    "targets",
)
LAYER_KEYS = (
    "label",
    "bits",
    "rank",
    "loss",
    "relative_loss",
    "option_loss",
    "option_relative_loss",
    "held_out_scale",
    "gap_to_waterfilling_bits",
    "program",
)
# Methods whose outputs make a plan, so that one without its certificate is not accepted.
PLANNED = ("convex-caldera", "reallm")
UNITS = ("nats", "relative")
CURVATURES = ("none", "input", "kronecker", "guided", "diagonal")
TARGETS = ("original", "drift-corrected")


def certificate_of(output: Output) -> Mapping[str, Any]:
    """The certificate with its top level checked."""
    certificate = table(output.certificate, KEYS, "certificate.json")
    if type(certificate["schema"]) is not int or certificate["schema"] != SCHEMA:
        raise FormatError(f"certificate.json: schema {short(certificate['schema'])}, not {SCHEMA}")
    for name in ("statement", "method"):
        string(certificate[name], f"certificate.{name}")
    if certificate["method"] != output.report.get("method"):
        raise CheckError("the certificate and the report name different methods")
    for name in ("budget_bytes", "compressed_bytes", "header_bytes", "reserved_bytes"):
        natural(certificate[name], f"certificate.{name}")
    if certificate["unit"] not in UNITS or certificate["curvature"] not in CURVATURES:
        unit, curvature = certificate["unit"], certificate["curvature"]
        raise FormatError(f"certificate: unit {short(unit)}, curvature {short(curvature)}")
    targets = certificate["targets"]
    if targets not in TARGETS:
        raise FormatError(f"certificate: targets {short(targets)}")
    if targets != output.report.get("targets"):
        raise CheckError("the certificate and the report name different targets")
    return certificate


def curvature_of(output: Output) -> str:
    """Under which curvature the report's losses are; "none" is H = I, "input" the default."""
    curvature: str = output.report.get("curvature", "input")
    if curvature not in CURVATURES:
        raise FormatError(f"report: curvature {short(curvature)}")
    if output.certificate is not None and certificate_of(output)["curvature"] != curvature:
        raise CheckError("the certificate and the report name different curvatures")
    return curvature


def check_report(output: Output) -> str:
    """The report speaks of the layers that are stored: shapes, ranks and bytes."""
    records = output.report.get("layers")
    if not isinstance(records, dict) or set(records) != set(output.layers):
        raise CheckError("the report speaks of other layers than the files hold")
    for name, layer in output.layers.items():
        record = records[name]
        if not isinstance(record, dict):
            raise FormatError(f"report: {short(name)} must be an object")
        stored = {
            "shape": list(layer.spec.shape),
            "rank": layer.spec.rank,
            "stored_bytes": layer.payload_bytes,
        }
        for key, value in stored.items():
            if type(record.get(key)) is not type(value) or record[key] != value:
                claimed = short(record.get(key))
                raise CheckError(f"{short(name)}: {key} {value} is stored, {claimed} is claimed")
        weights = layer.spec.shape[0] * layer.spec.shape[1]
        if record.get("bits") != 8 * layer.payload_bytes / weights:
            raise CheckError(f"{short(name)}: bits {short(record.get('bits'))} are not its bytes")
    curvature_of(output)
    uses_of(output)
    ranks = sorted({layer.spec.rank for layer in output.layers.values()})
    return f"{len(records)} layers, ranks {ranks[0]} to {ranks[-1]}"


def check_bytes(output: Output) -> str:
    """Bytes of the compressed shards, to the byte, against report and certificate.

    After fine-tuning: the bytes before it, as the report states them.
    """
    budget = output.report.get("budget_bytes")
    found = bytes_before(output)
    if output.certificate is None and output.report.get("method") in PLANNED:
        raise CheckError("this method makes a plan, but there is no certificate.json")
    if output.certificate is not None:
        certificate = certificate_of(output)
        stored = {"compressed_bytes": found}
        if tuning_of(output) is None:
            stored["header_bytes"] = found - output.layer_bytes
        for name, value in stored.items():
            if certificate[name] != value:
                raise CheckError(f"{name} {certificate[name]} is claimed, {value} is stored")
        if budget is not None and budget != certificate["budget_bytes"]:
            raise CheckError(f"the report's budget is {short(budget)}, the certificate's another")
        budget = certificate["budget_bytes"]
    if budget is None:
        return f"{found} bytes, no budget was given"
    if found > natural(budget, "budget_bytes"):
        raise CheckError(f"{found} bytes exceed the budget of {budget}")
    return f"{found} of {budget} bytes"


def curves_of(output: Output) -> Curves:
    return read_curves(certificate_of(output)["curves"])


def check_options(output: Output) -> str:
    """Every chosen option is what is stored: groups, weights, bits, ranks, losses and labels.

    Of a layer that was fine-tuned only what training left: its weights, label and losses before.
    """
    certificate = certificate_of(output)
    curves, plan = curves_of(output), read_plan(certificate["plan"])
    layers, tuned = certificate["layers"], tuned_layers(output)
    if not isinstance(layers, dict) or not set(layers) == set(output.layers) == set(curves.menus):
        raise CheckError("the certificate speaks of other layers than the files hold")
    for name, layer in output.layers.items():
        record, where = table(layers[name], LAYER_KEYS, short(name)), short(name)
        label = plan["choice"].get(name)
        if record["label"] != label or label not in curves.menus[name]:
            raise CheckError(f"{where}: labels {short(record['label'])} and {short(label)}")
        weights = layer.spec.shape[0] * layer.spec.shape[1]
        if curves.weights[name] != weights:
            raise CheckError(f"{where}: {weights} weights, not {curves.weights[name]}")
        bits = 8 * layer.stored_bytes
        if name not in tuned and curves.menus[name][label][0] != bits:
            raise CheckError(f"{where}: its tensors take {bits} bits, another number is claimed")
        rank = natural(record["rank"], f"{where}: rank")
        if name not in tuned and rank != layer.spec.rank:
            raise CheckError(f"{where}: rank {layer.spec.rank} is stored, another is claimed")
        _check_same_figures(name, record, output.report["layers"][name], name in tuned)
        _check_option_figures(where, record, certificate["targets"])
        key = "option_loss" if certificate["unit"] == "nats" else "option_relative_loss"
        scale = number(record["held_out_scale"], f"{where}: held_out_scale", 0.0)
        # The product of two doubles, rounded as every IEEE machine rounds it.
        if curves.menus[name][label][1] != Fraction(record[key] * scale):
            raise CheckError(f"{where}: the option's distortion is not its {key}")
        gap = record["gap_to_waterfilling_bits"]
        if gap is not None:
            number(gap, f"{where}: gap_to_waterfilling_bits")
    return f"{len(layers)} layers"


def _check_same_figures(
    name: str, record: Mapping[str, Any], report: Mapping[str, Any], tuned: bool
) -> None:
    for key in ("loss", "relative_loss") if tuned else ("bits", "loss", "relative_loss"):
        if number(record[key], f"{short(name)}: {key}") != report.get(key):
            raise CheckError(f"{short(name)}: {key} differs between certificate and report")


def _check_option_figures(where: str, record: Mapping[str, Any], targets: str) -> None:
    """What the option cost when it was measured; only drift correction fits it once more."""
    for key in ("loss", "relative_loss"):
        measured = number(record[f"option_{key}"], f"{where}: option_{key}", 0.0)
        if targets == "original" and measured != record[key]:
            raise CheckError(f"{where}: its {key} is not that of its option")


def check_plan(output: Output) -> str:
    """One option per group, ties, bits, and exactly the bits that the byte budget leaves.

    Headers vary with the plan, so that more may have been reserved for them than it needs; no
    more than twice, or the bound would speak of plans far below the budget.
    """
    certificate = certificate_of(output)
    plan = read_plan(certificate["plan"])
    headers, reserved = certificate["header_bytes"], certificate["reserved_bytes"]
    room = 8 * (certificate["budget_bytes"] - reserved)
    if plan["budget_bits"] != room:
        raise CheckError(f"budget_bits {plan['budget_bits']} is claimed, the bytes leave {room}")
    if not headers <= reserved <= 2 * headers:
        raise CheckError(f"{reserved} bytes are reserved for headers, which take {headers}")
    return check_membership(curves_of(output), plan)


def check_plan_bound(output: Output) -> str:
    """The price bound and the gap, exactly."""
    return check_bound(curves_of(output), read_plan(certificate_of(output)["plan"]))
