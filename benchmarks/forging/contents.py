"""Falsified contents under claims that agree with each other: only model and statistics show them.

Altered codes, swapped layers, lowered losses, programs that were not solved so well, another model.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

from benchmarks.forging.forger import FOLDER, Forger, read_header, tensor_range


def lower_loss(f: Forger) -> None:
    """Loss, distortion, plan and bound, all consistent with each other."""
    name, keep = f.layer(), 1 - max(f.share(), 1e-4)
    for record in (f.report["layers"][name], f.certificate["layers"][name]):
        record["loss"] *= keep
        record["relative_loss"] *= keep
    option = f.option(name)
    lost = option["distortion"] * (1 - keep)
    unit = "loss" if f.certificate["unit"] == "nats" else "relative_loss"
    scale = f.certificate["layers"][name]["held_out_scale"]
    option["distortion"] = f.report["layers"][name][unit] * scale
    f.plan["bound"] = max(f.plan["bound"] - 2 * lost - 1e-12, 0.0)
    f.plan["distortion"] *= 1 + 1e-12
    f.plan["price"] = 0.0
    f.plan["bound"] = f.plan["plan_gap"] = f.plan["gap_before_milp"] = None
    total = [min(o["distortion"] for o in g["options"]) for g in f.certificate["curves"]["groups"]]
    f.plan["bound"] = sum(total) * (1 - 1e-9)
    f.plan["core_bound"], f.plan["proof"], f.plan["optimal"] = None, "none", False
    f.certificate["curves"]["ties"] = []


def nearer_the_limit(f: Forger) -> None:
    """A layer said to be closer to the waterfilling limit."""
    record = f.certificate["layers"][f.layer()]
    record["gap_to_waterfilling_bits"] = (
        record["gap_to_waterfilling_bits"] or 0.0
    ) - 10 * f.share()


def better_program(f: Forger) -> None:
    """A layer's low-rank program said to be solved better: primal or dual, with its gap."""
    program = f.program()
    if f.random.random() < 0.5:
        program["dual"] += program["primal"] * f.share()
    else:
        program["primal"] *= 1 - f.share()
    program["gap"] = max(1 - program["dual"] / program["primal"], 0.0)


def smaller_program_gap(f: Forger) -> None:
    """As after a solver that stopped early: a worse point under the claims of a better one."""
    program = f.program()
    m, n = f.report["layers"][f.named(program)]["shape"]
    rank = max(program["rank"], 1)
    entries = [f.random.uniform(-1, 1) for _ in range(rank * (m + n))]
    program["rank"] = rank
    program["factors"] = base64.b64encode(struct.pack(f"<{len(entries)}e", *entries)).decode()


def other_program(f: Forger) -> None:
    """Constants of a program that is easier, or none at all."""
    program = f.program()
    key = f.random.choice(["mu", "kappa", "ridge", "lam", "factor_bits", "absent"])
    if key == "absent":
        f.certificate["layers"][f.named(program)]["program"] = None
    elif key == "factor_bits":
        program[key] += f.random.choice([-1, 1, 4])
    else:
        program[key] *= 1 + f.random.choice([-0.5, 0.1, 1e-6, 10.0])


def dual_of_another(f: Forger) -> None:
    """Two layers exchange their programs."""
    one, two = f.random.sample(sorted(f.certificate["layers"]), 2)
    a, b = (f.certificate["layers"][name] for name in (one, two))
    a["program"], b["program"] = b["program"], a["program"]


def without_curvature(f: Forger) -> None:
    """A layer said to have had no curvature, so that nobody looks at its codes."""
    f.report["input_curvature_only"] = [f.layer()]
    altered_codes(f)


def altered_codes(f: Forger) -> None:
    """A few bytes of a layer's packed tensor, anywhere in it."""
    low, high = tensor_range(f.shard, f"{f.layer()}.packed")
    raw = bytearray(f.shard.read_bytes())
    for _ in range(f.random.choice([1, 4, 64])):
        raw[f.random.randrange(low, high)] ^= f.random.randint(1, 255)
    f.shard.write_bytes(bytes(raw))


def swapped_layers(f: Forger) -> None:
    """Two layers of one scheme exchange their tensors, and their records with them."""
    header, _ = read_header(f.shard)
    sizes: dict[Any, list[str]] = {}
    record = json.loads(header["__metadata__"][FOLDER])
    for name, scheme in zip(sorted(f.report["layers"]), record["layers"], strict=True):
        sizes.setdefault(scheme, []).append(name)
    pairs = [names for names in sizes.values() if len(names) > 1]
    if not pairs:
        return altered_codes(f)
    one, two = f.random.sample(f.random.choice(pairs), 2)
    raw = bytearray(f.shard.read_bytes())
    for field in ("packed", "left_0", "right_0", "left_1", "right_1"):
        if f"{one}.{field}" in header:
            a, b = (slice(*tensor_range(f.shard, f"{n}.{field}")) for n in (one, two))
            raw[a], raw[b] = raw[b], raw[a]
    f.shard.write_bytes(bytes(raw))
    return None


def stale_model(f: Forger) -> None:
    """The model was changed after compression; sometimes its new hash is put in place."""
    path = f.model / "model.safetensors"
    header, start = read_header(path)
    low, high = (start + x for x in header[f"{f.layer()}.weight"]["data_offsets"])
    raw = bytearray(path.read_bytes())
    raw[f.random.randrange(low, high)] ^= 1 << f.random.randint(0, 6)
    path.write_bytes(bytes(raw))
    if f.random.random() < 0.5:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        f.provenance["source_files"]["model.safetensors"] = digest


def altered_rest(f: Forger) -> None:
    """A tensor that should be the original's own."""
    path = sorted(f.output.glob("model-rest-*.safetensors"))[0]
    _, start = read_header(path)
    raw = bytearray(path.read_bytes())
    raw[f.random.randrange(start, len(raw))] ^= f.random.randint(1, 255)
    path.write_bytes(bytes(raw))


CONTENTS: tuple[Callable[[Forger], None], ...] = (
    altered_codes,
    swapped_layers,
    stale_model,
    altered_rest,
    lower_loss,
    nearer_the_limit,
    better_program,
    smaller_program_gap,
    other_program,
    dual_of_another,
    without_curvature,
)
