"""Seeded forgeries of compressed outputs, and how many the independent checker lets pass.

    python -m benchmarks.forgeries [--count 500] [--honest 50] [--seed 0]
                                   [--real OUT MODEL STATISTICS] [--out benchmarks/results]

Each forgery copies an honest output, falsifies one thing, and repairs what an attacker would:
sums that depend on it, sizes in headers and index, and the manifest's hashes. The checker is
given the model and the statistics only for those that nothing else could show (altered codes,
swapped layers, lowered losses, programs that were not solved so well, another model). Outputs
are small and made on the spot; --real adds one that `convex-caldera compress` wrote. Writes
forgeries.json and forgeries.txt.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import os
import random
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convex_caldera.certify import verify

FOLDER = "convex_caldera"
INDEX = "model.safetensors.index.json"


@dataclass
class Forger:
    """One copy of an honest output under falsification."""

    output: Path
    model: Path
    random: random.Random

    def __post_init__(self) -> None:
        self.certificate = self.read("certificate.json")
        self.report = self.read("report.json")
        self.provenance = self.read("provenance.json")

    def read(self, name: str) -> Any:
        return json.loads((self.output / FOLDER / name).read_text())

    @property
    def plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = self.certificate["plan"]
        return plan

    @property
    def shard(self) -> Path:
        return sorted(self.output.glob("model-compressed-*.safetensors"))[0]

    def layer(self) -> str:
        return self.random.choice(sorted(self.report["layers"]))

    def option(self, name: str) -> dict[str, Any]:
        """The chosen option of a layer, in the curves."""
        group = next(g for g in self.certificate["curves"]["groups"] if g["name"] == name)
        label = self.plan["choice"][name]
        option: dict[str, Any] = next(o for o in group["options"] if o["label"] == label)
        return option

    def program(self) -> dict[str, Any]:
        """The low-rank program of some layer."""
        record: dict[str, Any] = self.certificate["layers"][self.layer()]["program"]
        return record

    def named(self, program: dict[str, Any]) -> str:
        """Whose program it is."""
        layers = self.certificate["layers"]
        return next(name for name, entry in layers.items() if entry["program"] is program)

    def share(self) -> float:
        """How much of a figure is taken away: from a millionth to nearly all."""
        return 10 ** self.random.uniform(-6, -0.1)

    def finish(self) -> None:
        """Write the JSON files and make the manifest honest about what is there."""
        for name in ("certificate", "report", "provenance"):
            value = getattr(self, name)
            path = self.output / FOLDER / f"{name}.json"
            if value is not None:
                path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
        write_manifest(self.output)


def write_manifest(output: Path) -> None:
    files = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_file() and name != f"{FOLDER}/manifest.json":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            files[name] = {"sha256": digest, "size": path.stat().st_size}
    text = json.dumps({"files": files, "version": 1}, indent=1, sort_keys=True) + "\n"
    (output / FOLDER / "manifest.json").write_text(text)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


def tensor_range(path: Path, name: str) -> tuple[int, int]:
    header, start = read_header(path)
    low, high = header[name]["data_offsets"]
    return start + low, start + high


# --- falsified claims -----------------------------------------------------------------------


def fewer_bits(f: Forger) -> None:
    """A layer is said to take fewer bits; plan and rates follow."""
    option, taken = f.option(f.layer()), 8 * f.random.randint(1, 8)
    option["bits"] -= taken
    f.plan["bits"] -= taken
    f.plan["bits_per_weight"] = f.plan["bits"] / f.plan["weights"]


def fewer_bytes(f: Forger) -> None:
    """The report says that a layer is smaller."""
    name = f.layer()
    record = f.report["layers"][name]
    record["stored_bytes"] -= f.random.randint(1, 16)
    weights = math.prod(record["shape"])
    record["bits"] = f.certificate["layers"][name]["bits"] = 8 * record["stored_bytes"] / weights


def other_rank(f: Forger) -> None:
    """Report and certificate agree on a rank that is not stored."""
    name = f.layer()
    rank = f.report["layers"][name]["rank"] + f.random.choice([-1, 1, 2, 5])
    f.report["layers"][name]["rank"] = f.certificate["layers"][name]["rank"] = rank


def higher_bound(f: Forger) -> None:
    """Down to the next double."""
    bound = f.plan["bound"]
    higher = [math.nextafter(bound, math.inf), bound * (1 + f.share())]
    f.plan["bound"] = f.random.choice(higher)
    if f.random.random() < 0.5:  # and the gap that would follow
        f.plan["plan_gap"] = max(f.plan["distortion"] / f.plan["bound"] - 1, 0.0)


def higher_core_bound(f: Forger) -> None:
    """Optimal at a value that no plan needs to reach."""
    f.plan["core_bound"] = f.plan["distortion"] * (1 + f.share())
    f.plan["proof"], f.plan["optimal"] = "core", True


def smaller_gap(f: Forger) -> None:
    gap = f.plan["plan_gap"]
    f.plan["plan_gap"] = gap * (1 - f.share()) if gap else None
    if not gap:  # an honest gap of zero can only be falsified by its bound
        higher_bound(f)


def smaller_distortion(f: Forger) -> None:
    """The plan's sum, with the gap that would follow."""
    f.plan["distortion"] *= 1 - f.share()
    f.plan["plan_gap"] = max(f.plan["distortion"] / f.plan["bound"] - 1, 0.0)


def other_price(f: Forger) -> None:
    """The bound stays, the price that should give it does not."""
    factor = f.random.choice([-1.0, 0.0, 0.1, 10.0, 1e6])
    f.plan["price"] = f.plan["price"] * factor if f.plan["price"] else 1.0


def smaller_budget(f: Forger) -> None:
    """One byte over budget: the budget was less than what is stored."""
    budget = f.certificate["compressed_bytes"] - f.random.choice([1, 1, 2, 8])
    f.certificate["budget_bytes"] = f.report["budget_bytes"] = budget
    f.plan["budget_bits"] = 8 * (budget - f.certificate["header_bytes"])


def smaller_header(f: Forger) -> None:
    """Headers said to be smaller, so that the layers may be larger."""
    f.certificate["header_bytes"] -= 1
    f.certificate["compressed_bytes"] -= f.random.randint(0, 1)
    f.plan["budget_bits"] += 8


def other_label(f: Forger) -> None:
    """A plan that names options which are not those stored, added up as it should be."""
    name = f.layer()
    groups = {g["name"]: g for g in f.certificate["curves"]["groups"]}
    tie = next((t for t in f.certificate["curves"]["ties"] if name in t), [name])
    shared = set.intersection(*({o["label"] for o in groups[n]["options"]} for n in tie))
    now = f.plan["choice"][name]
    label = f.random.choice(sorted(shared - {now}))
    for member in tie:
        before = f.option(member)
        f.plan["choice"][member] = f.certificate["layers"][member]["label"] = label
        after = f.option(member)
        f.plan["bits"] += after["bits"] - before["bits"]
        f.plan["distortion"] += after["distortion"] - before["distortion"]
    f.plan["bits_per_weight"] = f.plan["bits"] / f.plan["weights"]


def broken_tie(f: Forger) -> None:
    """A tie that the plan does not obey."""
    choice = f.plan["choice"]
    first = f.layer()
    other = [name for name in choice if choice[name] != choice[first]]
    if other:
        f.certificate["curves"]["ties"] = [sorted([first, f.random.choice(other)])]
    else:
        f.certificate["curves"]["ties"] = [[first, first]]


def higher_dual(f: Forger) -> None:
    surrogate = f.certificate["surrogate"]
    surrogate["dual"] += abs(surrogate["primal"]) * f.share()


def lower_primal(f: Forger) -> None:
    """With the gap that would follow."""
    surrogate = f.certificate["surrogate"]
    surrogate["primal"] *= 1 - f.share()
    surrogate["gap"] = max(1 - surrogate["dual"] / surrogate["primal"], 0.0)


def other_dual_price(f: Forger) -> None:
    """The dual value stays, the multiplier that should give it does not."""
    price = f.certificate["surrogate"]["price"]
    factor = f.random.choice([-1.0, 0.0, 0.5, 2.0, 1e9])
    f.certificate["surrogate"]["price"] = price * factor if price else -1.0


def other_solution(f: Forger) -> None:
    """A primal point that is not the one evaluated, or not even allowed."""
    group = f.random.choice(f.certificate["surrogate"]["groups"])
    group["solution_bits"] += f.random.choice([-0.5, 0.5, -10.0, 100.0])


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


def no_surrogate(f: Forger) -> None:
    """A convex program whose gap would show is left out."""
    f.certificate["surrogate"] = None


def smaller_reserve(f: Forger) -> None:
    """Less set aside for headers than they take: the bound of a budget that nobody has."""
    taken = f.random.randint(1, 8)
    f.certificate["reserved_bytes"] = f.certificate["header_bytes"] - taken
    f.plan["budget_bits"] = 8 * (f.certificate["budget_bytes"] - f.certificate["reserved_bytes"])


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


def no_certificate(f: Forger) -> None:
    """What cannot be met is left out."""
    (f.output / FOLDER / "certificate.json").unlink()
    f.certificate = None


def other_words(f: Forger) -> None:
    """Another unit, schema, curvature or method than the numbers have."""
    key, value = f.random.choice(
        [
            ("unit", "nats"),
            ("unit", "bits"),
            ("schema", 2),
            ("method", "caldera"),
            ("statement", ""),
        ]
    )
    f.certificate[key] = "relative" if f.certificate[key] == value else value


# --- falsified data -------------------------------------------------------------------------


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


def larger_shard(f: Forger) -> None:
    """Bytes hidden in the padding of the header."""
    raw = f.shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    more = 8 * f.random.randint(1, 4)
    head = (length + more).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * more
    f.shard.write_bytes(head + raw[8 + length :])


def truncated(f: Forger) -> None:
    raw = f.shard.read_bytes()
    f.shard.write_bytes(raw[: f.random.randrange(len(raw))])


CLAIMS: tuple[Callable[[Forger], None], ...] = (
    fewer_bits,
    fewer_bytes,
    other_rank,
    higher_bound,
    higher_core_bound,
    smaller_gap,
    smaller_distortion,
    other_price,
    smaller_budget,
    smaller_header,
    other_label,
    broken_tie,
    higher_dual,
    lower_primal,
    other_dual_price,
    other_solution,
    no_surrogate,
    smaller_reserve,
    no_certificate,
    other_words,
    larger_shard,
    truncated,
)
# These leave every stored claim consistent; only the model and the statistics show them.
DATA: tuple[Callable[[Forger], None], ...] = (
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


def forge(
    honest: tuple[Path, Path, Path], number: int, seed: int, folder: Path
) -> tuple[str, bool, str]:
    """Forgery `number`: (kind, rejected, the claim that showed it)."""
    draw = random.Random(1_000_003 * seed + number)
    kinds = CLAIMS + DATA
    kind = kinds[number % len(kinds)]
    output, model = folder / "out", folder / "model"
    shutil.copytree(honest[0], output)
    shutil.copytree(honest[1], model)
    for path in [output, model, *output.rglob("*"), *model.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    forger = Forger(output, model, draw)
    kind(forger)
    forger.finish()
    data = (model, honest[2]) if kind in DATA else (None, None)
    found = verify(output, *data)
    shutil.rmtree(folder)
    last = found.claims[-1]
    return kind.__name__, not found.ok, f"{last.name}: {last.value}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--honest", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", nargs=3, type=Path, metavar=("OUT", "MODEL", "STATISTICS"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    from tests.certify.making import make

    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.monotonic()
        bases = []
        accepted = 0
        for seed in range(args.honest):
            made = make(folder / f"honest-{seed}", seed, blocks=1 + seed % 3, tied=seed % 2 == 0)
            bases.append((made.output, made.model, made.hessians))
            accepted += verify(*bases[-1]).ok
        if args.real:
            accepted += verify(*args.real).ok
            bases = [args.real if i % 5 == 0 else base for i, base in enumerate(bases)]
        results = [
            forge(bases[i % len(bases)], i, args.seed, folder / "forged") for i in range(args.count)
        ]
        seconds = time.monotonic() - started
    report(results, accepted, args.honest + bool(args.real), seconds, args)


def report(results: Any, accepted: int, honest: int, seconds: float, args: Any) -> None:
    total, caught = Counter(r[0] for r in results), Counter(r[0] for r in results if r[1])
    lines = [f"{'kind':20s} forged rejected"]
    lines += [f"{kind:20s} {count:6d} {caught[kind]:8d}" for kind, count in total.items()]
    rejected = sum(caught.values())
    lines += [
        f"{'all':20s} {len(results):6d} {rejected:8d}",
        f"honest outputs: {honest} checked, {accepted} accepted",
    ]
    table = "\n".join(lines)
    passed = [(i, kind, text) for i, (kind, no, text) in enumerate(results) if not no]
    print(table, *passed, f"{seconds:.0f} s", sep="\n")
    record = {
        "command": f"python -m benchmarks.forgeries --count {args.count} --honest {args.honest}"
        f" --seed {args.seed}",
        "kinds": {k: {"forged": total[k], "rejected": caught[k]} for k in total},
        "forged": len(results),
        "rejected": rejected,
        "honest": honest,
        "accepted": accepted,
        "passed": passed,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "forgeries.json").write_text(json.dumps(record, indent=1) + os.linesep)
    (args.out / "forgeries.txt").write_text(table + os.linesep)


if __name__ == "__main__":
    main()
