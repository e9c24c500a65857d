"""The certificate in words, and the commands that check and remake everything."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from convex_caldera.report.rows import entries
from convex_caldera.report.run import Certificate, EvaluationFile, Run

# Gaps up to this are what the integer arithmetic of the proof leaves open.
PROVED = 1e-9
RECHECK = """import json
from fractions import Fraction

c = json.load(open("convex_caldera/certificate.json"))
plan, ties = c["plan"], c["curves"]["ties"]
price = Fraction(plan["price"])
tie_of = {name: i for i, tie in enumerate(ties) for name in tie}
menus = {}  # one per layer, or per tie: label -> cost of the option at this price
chosen = []
for n, g in enumerate(c["curves"]["groups"]):
    menu = menus.setdefault(("tie", tie_of[g["name"]]) if g["name"] in tie_of else n, [])
    menu.append({o["label"]: Fraction(o["distortion"]) + price * o["bits"] for o in g["options"]})
    chosen += [o for o in g["options"] if o["label"] == plan["choice"][g["name"]]]
least = sum(
    min(sum(m[label] for m in menu) for label in set.intersection(*map(set, menu)))
    for menu in menus.values()
)
bound = least - price * plan["budget_bits"]
assert price >= 0 and Fraction(plan["bound"]) <= bound
assert sum(o["bits"] for o in chosen) == plan["bits"] <= plan["budget_bits"]
assert sum(Fraction(o["distortion"]) for o in chosen) <= Fraction(plan["distortion"])
print("no plan within the budget is below", float(bound), "- this one has", plan["distortion"])
"""


def proves(c: Certificate) -> list[str]:
    """What is proved, one sentence per claim."""
    unit = c.unit or "the unit of the curves"
    ties = f", with {c.ties} sets of layers tied to one option" if c.ties else ""
    gap = "the bound is zero, so no ratio can be given"
    if c.plan_gap is not None:
        gap = (
            "exactly the bound: no better plan exists"
            if c.plan_gap <= PROVED
            else f"at most {100 * c.plan_gap:.3g} % above the best that is possible"
        )
    lines = [
        f"Each of the {c.groups:,} layers takes one option from a menu of measured options "
        f"({c.options:,} in all{ties}). No such choice that fits into {c.budget_bits:,.0f} bits "
        f"has a total loss below {c.bound:.6g} ({unit}).",
        f"The plan used here has {c.distortion:.6g} and takes {c.bits:,.0f} bits: {gap}.",
    ]
    if c.budget_bytes is not None and c.compressed_bytes is not None:
        headers = "" if c.header_bytes is None else f", {c.header_bytes:,} of them file headers"
        lines.append(
            f"The files of the compressed layers have {c.compressed_bytes:,} bytes of the "
            f"{c.budget_bytes:,} allowed{headers}."
        )
    if c.proof == "milp":
        lines.append(
            "HiGHS, a branch-and-bound solver, reports that no plan is better at all. That is its "
            "word and cannot be replayed; the bound above can."
        )
    return lines


def does_not_prove(c: Certificate) -> list[str]:
    """What a reader might take for proved and is not."""
    curvature = f" ({c.curvature})" if c.curvature else ""
    model = (
        "that the model loses this much on other text: the losses are predicted from the "
        f"curvature{curvature} on the calibration text, are added up over layers, and are an "
        "expansion for small errors that is known to break below about 3 bits;"
        if c.in_nats
        else "that the model's own loss follows this sum: it adds up errors of layers, which need "
        "not matter equally to the model;"
    )
    return [
        "that an option which is not on the menus (another quantizer, another rank, fine-tuning) "
        "would not be better;",
        model,
        "anything about tasks, or about the original model.",
    ]


def price_words(c: Certificate) -> str:
    """What the dual value of the budget means."""
    per_kilobyte = 8000 * c.price
    return (
        f"The price of the budget is {c.price:.4g} per bit: near this plan, another 1000 bytes "
        f"would lower the loss by about {per_kilobyte:.3g}, and 1000 bytes less would raise it by "
        "about as much."
    )


def measured_words(run: Run, evaluations: Sequence[EvaluationFile]) -> list[str]:
    """The predicted loss beside the KL that was measured, one sentence per evaluation."""
    if run.certificate is None or not run.certificate.in_nats:
        return []
    lines = _single_words(run)
    mine = next((e for e in entries([run], evaluations) if e.run is run), None)
    for evaluation, score in zip(evaluations, mine.scores if mine else (), strict=True):
        if score is not None:
            text = f" on {evaluation.text}" if evaluation.text else ""
            lines.append(_beside(run, run.certificate, text, score.kl))
    return lines


def _beside(run: Run, certificate: Certificate, text: str, kl: float) -> str:
    """What was expected, what the whole cost on held-out calibration text, and a KL."""
    alone = certificate.distortion
    predicted = alone if run.expected_kl is None else run.expected_kl
    ratio = f" ({kl / predicted:.2f} times)" if predicted > 0 else ""
    line = f"Predicted {predicted:.4g}, measured{text} {kl:.4g}{ratio}."
    if predicted != alone:
        line += f" Layers alone add up to {alone:.4g}; targets that make up for drift lower that."
    if run.held_out is not None and run.held_out.kl > 0:
        h = run.held_out
        line += f" On {h.tokens:,} tokens of {h.text} it was {h.kl:.4g} ({kl / h.kl:.2f} times)."
    return line


def _single_words(run: Run) -> list[str]:
    """What `measure` found: the whole model, and whether losses of single layers add up."""
    m, layers = run.measured, [row for row in run.layers if row.measured_kl is not None]
    if m is None or run.certificate is None:
        return []
    text = f" on {m.tokens:,} tokens of {m.text}" if m.text else ""
    lines = [_beside(run, run.certificate, text, m.kl)]
    if len(layers) == len(run.layers):
        total = sum(row.measured_kl or 0.0 for row in layers)
        lines.append(
            f"Each layer compressed alone loses {total:.4g} in sum, all of them at once {m.kl:.4g}."
        )
    return lines


def commands(run: Run) -> list[tuple[str, str]]:
    """(what it does, command) for one run."""
    out = shlex.quote(run.title)
    model = shlex.quote(str(run.settings.get("model", "MODEL")))
    found = [("Check hashes, sizes and every claim", f"convex-caldera verify {out}")]
    if run.certificate is not None:
        found.append(
            (
                "The same, with the weighted errors recomputed from the original",
                f"convex-caldera verify {out} --model {model} --hessians DIR",
            )
        )
    found.append(("The table of layers", f"convex-caldera inspect {out}"))
    if run.spectra or run.measured is not None:
        found.append(("Spectra and the KL of every layer", f"convex-caldera measure {out}"))
    found.append(
        (
            "Make the same directory again, byte for byte",
            f"convex-caldera compress {model} --config {out}/convex_caldera/recipe.toml -o AGAIN",
        )
    )
    return found


def evaluation_command(evaluation: EvaluationFile) -> str:
    """The command that repeats an evaluation, from its names and protocol."""
    p = evaluation.protocol
    parts = ["convex-caldera eval", *(shlex.quote(score.name) for score in evaluation.scores)]
    if evaluation.text:
        parts.append(f"--text {shlex.quote(evaluation.text)}")
    parts += [f"--{key} {p[key]}" for key in ("window", "stride") if isinstance(p.get(key), int)]
    if p.get("bos") is False:
        parts.append("--no-bos")
    tokens, whole = p.get("tokens"), p.get("text_tokens")
    if p.get("bos") and isinstance(tokens, int) and isinstance(whole, int) and tokens < whole:
        parts.append(f"--max-tokens {tokens}")
    return " ".join(parts)


def readable_entries(record: dict[str, Any]) -> dict[str, str]:
    """Names without underscores, numbers to six digits."""
    return {
        key.replace("_", " "): f"{value:,.6g}" if isinstance(value, int | float) else value
        for key, value in record.items()
    }
