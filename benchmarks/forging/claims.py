"""Falsified claims that the output alone refutes: sums, bounds, sizes, words, broken files."""

from __future__ import annotations

import math
from collections.abc import Callable

from benchmarks.forging.forger import FOLDER, Forger


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


def no_surrogate(f: Forger) -> None:
    """A convex program whose gap would show is left out."""
    f.certificate["surrogate"] = None


def smaller_reserve(f: Forger) -> None:
    """Less set aside for headers than they take: the bound of a budget that nobody has."""
    taken = f.random.randint(1, 8)
    f.certificate["reserved_bytes"] = f.certificate["header_bytes"] - taken
    f.plan["budget_bits"] = 8 * (f.certificate["budget_bytes"] - f.certificate["reserved_bytes"])


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
