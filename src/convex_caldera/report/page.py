"""One HTML page that stands alone: no script, no network, style and figures inside it.

Everything that comes from a file passes `html.escape`; figures are data URIs of images, in which
nothing can run; a Content-Security-Policy forbids the rest.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from convex_caldera.report import words
from convex_caldera.report.css import CSS
from convex_caldera.report.pictures import Picture
from convex_caldera.report.rows import efficiency, headline, layer_rows, shown
from convex_caldera.report.run import Certificate, EvaluationFile, Run
from convex_caldera.report.tables import html_table, one_line

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Drawn:
    """A picture and its SVG."""

    picture: Picture
    svg: bytes


def page(
    runs: Sequence[Run],
    evaluations: Sequence[EvaluationFile],
    comparison: Sequence[Drawn],
    own: Sequence[Sequence[Drawn]],
) -> str:
    """The whole page.

    Args:
        runs: at least one.
        evaluations: any number.
        comparison: figures over all runs.
        own: for every run its figures.
    """
    title = f"{len(runs)} compressed models" if len(runs) > 1 else runs[0].title
    title = f"Compression report: {title}"
    parts = [_head(title), f"<h1>{_text(title)}</h1>", _lead(runs)]
    parts.append(_navigation(runs))
    parts.append(_results(runs, evaluations))
    parts.append(_figures(comparison, "recheck"))
    for number, (run, drawn) in enumerate(zip(runs, own, strict=True), start=1):
        parts.append(_run_section(run, number, drawn, evaluations))
    parts.append(_recheck(runs, evaluations))
    parts.append(_provenance(runs))
    return "\n".join(part for part in parts if part) + "\n</body></html>\n"


def _head(title: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{CSS}</style></head><body>"
    )


def _lead(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        methods = ", ".join(dict.fromkeys(run.method for run in runs))
        return f'<p class="lead">Side by side: {_text(methods)}.</p>'
    run = runs[0]
    sentence = f"Method <strong>{_text(run.method)}</strong>, {len(run.layers):,} layers"
    sentence += f" with {run.compressed_weights:,} weights"
    if run.sizes is not None:
        sentence += (
            f", {run.sizes.bits_per_compressed_weight:.3f} stored bits per weight, everything "
            "counted"
        )
    c = run.certificate
    if c is not None and c.plan_gap is not None:
        sentence += f"; plan at most {100 * c.plan_gap:.3g} % from the best possible"
    return f'<p class="lead">{sentence}.</p>'


def _navigation(runs: Sequence[Run]) -> str:
    links = ['<a href="#results">Results</a>']
    if len(runs) == 1:
        links.append('<a href="#run-1">Layers</a>')
        if runs[0].certificate is not None:
            links.insert(1, '<a href="#certificate-1">Certificate</a>')
    else:
        links += [f'<a href="#run-{i}">{_text(r.title)}</a>' for i, r in enumerate(runs, start=1)]
    links += ['<a href="#recheck">How to recheck</a>', '<a href="#provenance">Provenance</a>']
    return f"<nav>{' '.join(links)}</nav>"


def _results(runs: Sequence[Run], evaluations: Sequence[EvaluationFile]) -> str:
    note = (
        "Bits are bytes of the weight files × 8 over original weights: of the compressed files "
        "over the weights they hold, and of all files over all weights. Nothing is left out."
    )
    parts = ['<h2 id="results">Results</h2>']
    parts.append(html_table(headline(runs, evaluations), "cards", "Size and quality"))
    parts.append(f'<p class="soft">{note} Sizes: {_link("recheck", "how to recheck")}.</p>')
    for number, evaluation in enumerate(evaluations, start=1):
        text = f"{shown(evaluation.text) or 'Evaluation'}: {evaluation.protocol_words}"
        parts.append(
            f'<p class="soft">{_text(text)}; KL and agreement are against the original, ± is one '
            f"standard error. Made by {_link(f'eval-{number}', 'this command')}.</p>"
        )
    if not evaluations:
        parts.append(
            '<p class="soft">No evaluation was given; <code>convex-caldera eval MODEL OUT --json '
            "FILE</code> makes one, and the report takes the file.</p>"
        )
    caption = "Budget, plan and cost"
    parts.append(html_table(efficiency(runs), "cards", caption))
    return "\n".join(parts)


def _run_section(
    run: Run, number: int, drawn: Sequence[Drawn], evaluations: Sequence[EvaluationFile]
) -> str:
    parts = []
    if run.certificate is not None:
        parts.append(f'<h2 id="certificate-{number}">Certificate of {_text(run.title)}</h2>')
        parts.append(_certificate(run, run.certificate, evaluations))
    parts.append(f'<h2 id="run-{number}">Layers of {_text(run.title)}</h2>')
    if run.certificate is None:
        parts.append(
            f'<p class="soft">{_text(run.method)} makes no plan with a certificate: bits follow '
            "from one recipe for all layers.</p>"
        )
    parts.append(_figures(drawn, f"recheck-{number}"))
    parts.append(html_table(layer_rows(run), "layers", f"Every layer of {run.title}"))
    parts.append(
        '<p class="soft">Bits are stored bits per original weight of the layer without the file '
        f"header. Made by <code>convex-caldera inspect {_text(run.title)}</code>.</p>"
    )
    return "\n".join(parts)


def _certificate(run: Run, c: Certificate, evaluations: Sequence[EvaluationFile]) -> str:
    parts = [f"<p><em>{_text(line)}</em></p>" for line in c.statement]
    parts.append('<div class="proof"><div><h4>What it proves</h4>')
    parts.append(_list(words.proves(c)))
    parts.append("</div><div><h4>What it does not prove</h4>")
    parts.append(_list(words.does_not_prove(c)))
    parts.append("</div></div>")
    parts.append(f"<p>{_text(words.price_words(c))}</p>")
    parts += [f"<p>{_text(line)}</p>" for line in words.measured_words(run, evaluations)]
    if c.surrogate:
        parts.append(
            "<p>The convex program that proposed the options has a primal-dual gap of its own, "
            "which says nothing about the plan:</p>"
        )
        parts.append(_definitions(words.readable_entries(c.surrogate)))
    parts.append("<h4>The bound, replayed in exact arithmetic</h4>")
    parts.append(
        "<p>Needs Python and the directory, nothing of ours. Any price that is not negative gives "
        "a true bound, so nothing has to be believed about how this one was found.</p>"
    )
    parts.append(f"<pre>{_block(words.RECHECK)}</pre>")
    return "\n".join(parts)


def _recheck(runs: Sequence[Run], evaluations: Sequence[EvaluationFile]) -> str:
    parts = ['<h2 id="recheck">How to recheck</h2>']
    for number, run in enumerate(runs, start=1):
        parts.append(f'<h3 id="recheck-{number}">{_text(run.title)}</h3>')
        lines = [f"# {what}\n{command}" for what, command in words.commands(run)]
        parts.append(f"<pre>{_block(chr(10).join(lines))}</pre>")
    for number, evaluation in enumerate(evaluations, start=1):
        where = f" on {shown(evaluation.text)}" if evaluation.text else ""
        parts.append(f'<h3 id="eval-{number}">Evaluation{_text(where)}</h3>')
        parts.append(f"<pre>{_block(words.evaluation_command(evaluation))}</pre>")
    return "\n".join(parts)


def _provenance(runs: Sequence[Run]) -> str:
    parts = ['<h2 id="provenance">Provenance</h2>']
    for run in runs:
        if len(runs) > 1:
            parts.append(f"<h3>{_text(run.title)}</h3>")
        facts: dict[str, Any] = {"Asked for": run.budget or "no budget"}
        facts["Files in the manifest"] = run.files
        facts["Versions"] = ", ".join(f"{k} {v}" for k, v in sorted(run.versions.items()))
        if run.settings:
            facts["Settings"] = ", ".join(f"{k} = {v}" for k, v in sorted(run.settings.items()))
        parts.append(_definitions(facts))
        if run.source_files:
            hashes = "\n".join(f"{h}  {name}" for name, h in sorted(run.source_files.items()))
            parts.append("<p>Files of the original (SHA-256):</p>")
            parts.append(f"<pre>{_block(hashes)}</pre>")
    return "\n".join(parts)


def _figures(drawn: Sequence[Drawn], commands: str) -> str:
    if not drawn:
        return ""
    cells = []
    for item in drawn:
        p = item.picture
        data = base64.b64encode(item.svg).decode()
        cells.append(
            f"<figure><h4>{_text(p.title)}</h4>"
            f'<img alt="{_text(p.title)}. {_text(p.caption)}" '
            f'src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{_text(p.caption)} {_link(p.source or commands, 'Commands')}."
            "</figcaption></figure>"
        )
    return f'<div class="figures">{"".join(cells)}</div>'


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"


def _definitions(facts: dict[str, Any]) -> str:
    items = "".join(f"<dt>{_text(str(k))}</dt><dd>{_text(str(v))}</dd>" for k, v in facts.items())
    return f"<dl>{items}</dl>"


def _link(anchor: str, text: str) -> str:
    return f'<a href="#{anchor}">{_text(text)}</a>'


def _text(text: str) -> str:
    return escape(one_line(text), quote=True)


def _block(text: str) -> str:
    return "\n".join(_text(line) for line in text.split("\n"))
