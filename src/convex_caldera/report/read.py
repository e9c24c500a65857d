"""Read what a run directory and its evaluations offer; absent is None, malformed is an error.

A directory offers `convex_caldera/{report,provenance,manifest}.json` and `recipe.toml`; methods
with a plan also `certificate.json`. Three optional measurements, in that folder (where
`convex-caldera measure` writes them) or beside it:

    spectra.json    {"schema": 1, "spectra": {layer: {"weight": [...], "whitened": [...],
                     "residual": [...], "index": [...], "ranks": [...], "loss_left": [...]}}}
                     singular values, largest first; `index` says which, all unless given
    measured.json   {"schema": 1, "measured": {"text": "...", "total_kl": x, "total_kl_stderr": y,
                     "layers": {layer: {"kl": x, "kl_stderr": y}}, "protocol": {"tokens": n}}}
    landscape.json  {"schema": 1, "landscape": {"ranks": [...], "bits": [...],
                     "relative_error": [[...]], "stored_bits": [[...]], "title": "..."}}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from convex_caldera.errors import FormatError
from convex_caldera.report.byte_parts import byte_parts
from convex_caldera.report.certificate import certificate_from
from convex_caldera.report.checked import Table, read_table, read_toml
from convex_caldera.report.names import natural_key, place_of
from convex_caldera.report.run import (
    Certificate,
    EvaluationFile,
    FileSizes,
    Landscape,
    LayerRow,
    MeasuredLoss,
    Run,
    Score,
    Spectra,
)
from convex_caldera.storage.manifest import FOLDER, read_manifest
from convex_caldera.storage.read import open_container
from convex_caldera.storage.source import INDEX

SPECTRA = ("weight", "whitened", "residual")
MEASUREMENTS = ("spectra", "landscape", "measured")
# Keys that the JSON of `compress` has.
COST = ("output", "file_bytes", "seconds", "peak_memory_bytes")


def read_run(directory: Path) -> Run:
    """Everything a report shows of one output directory; no tensor is decoded.

    Raises:
        FormatError: a file is missing that every directory has, or one is malformed; the message
            names file and key. An absent certificate is no error.
    """
    directory = Path(directory)
    folder = directory / FOLDER
    if not folder.is_dir():
        raise FormatError(f"{directory}: no folder {FOLDER}; not an output of `compress`")

    def load(name: str) -> Table:
        return read_table(folder / name, f"{directory.name}/{FOLDER}/{name}")

    report, provenance = load("report.json"), load("provenance.json")
    manifest = read_manifest(directory)
    record = load("certificate.json") if (folder / "certificate.json").exists() else None
    certificate = None if record is None else certificate_from(record)
    layers = _layers(report, record, certificate)
    sizes, parts = _sizes(directory, manifest, layers)
    settings = provenance.table_or_none("settings")
    run = Run(
        directory=directory,
        title=directory.resolve().name,
        method=report.text("method"),
        budget=report.text("budget", ""),
        budget_bytes=report.count_or_none("budget_bytes"),
        layers=layers,
        sizes=sizes,
        byte_parts=parts,
        certificate=certificate,
        settings={} if settings is None else dict(settings.record),
        recipe=read_toml(folder / "recipe.toml", f"{directory.name}/{FOLDER}/recipe.toml"),
        versions=_texts(provenance, "versions"),
        source_files=_texts(provenance, "source_files"),
        files=len(manifest) + 1,
        expected_kl=report.number_or_none("expected_kl"),
        held_out=_held_out(report.table_or_none("held_out_kl")),
        seconds=report.number_or_none("seconds"),
        peak_memory_bytes=report.count_or_none("peak_memory_bytes"),
    )
    for name in MEASUREMENTS:
        if (folder / f"{name}.json").exists():
            run = with_measurement(run, load(f"{name}.json"))
    return run


def read_inputs(
    outs: Sequence[Path], files: Iterable[Path]
) -> tuple[list[Run], list[EvaluationFile]]:
    """Directories and the JSON files given beside them, told apart by what they hold.

    A file with `models` (or `eval`, as `demo` writes) is an evaluation; one with `spectra`,
    `landscape` or `measured` belongs to the first directory; the JSON of `compress` gives seconds
    and peak memory to the directory that it wrote, known by its name and bytes.

    Raises:
        FormatError: a file is none of these, or malformed, or of no directory given.
    """
    runs = [read_run(out) for out in outs]
    evaluations = []
    for path in files:
        table = read_table(path)
        table = table.table("eval") if "eval" in table.record else table
        if "models" in table.record:
            evaluations.append(evaluation_from(table))
        elif set(COST) <= set(table.record):
            runs = _with_cost(runs, table, path)
        elif runs and set(MEASUREMENTS) & set(table.record):
            runs[0] = with_measurement(runs[0], table)
        else:
            raise FormatError(
                f"{path}: is neither the JSON of `eval` or `compress` nor of spectra; "
                "write it with `convex-caldera eval ... --json FILE`"
            )
    return runs, evaluations


def _with_cost(runs: list[Run], table: Table, path: Path) -> list[Run]:
    """The runs, that which the file is of with its seconds and memory."""
    name, size = Path(table.text("output")).name, table.count("file_bytes")
    seconds, memory = table.number("seconds"), table.count("peak_memory_bytes")
    found = [
        replace(run, seconds=seconds, peak_memory_bytes=memory)
        if run.directory.resolve().name == name
        and run.sizes is not None
        and run.sizes.file_bytes == size
        else run
        for run in runs
    ]
    if found == runs:
        raise FormatError(
            f"{path}: is of {name} with {size:,} bytes of weight files; no such directory is given"
        )
    return found


def evaluation_from(table: Table) -> EvaluationFile:
    """The JSON of `convex-caldera eval`."""
    models = table.tables("models")
    if not models:
        raise table.wrong("models", "a list with at least one model")
    protocol = table.table_or_none("protocol")
    return EvaluationFile(
        text=table.text("text", ""),
        scores=tuple(_score(model) for model in models),
        protocol={} if protocol is None else dict(protocol.record),
    )


def with_measurement(run: Run, table: Table) -> Run:
    """The run with what a measurement file holds added."""
    if "spectra" in table.record:
        layers = table.table("spectra")
        run = replace(run, spectra=tuple(_spectra(layers, n) for n in _ordered(layers.record)))
    if "landscape" in table.record:
        run = replace(run, landscape=_landscape(table.table("landscape")))
    if "measured" in table.record:
        run = _with_measured(run, table.table("measured"))
    return run


def _held_out(table: Table | None) -> MeasuredLoss | None:
    if table is None:
        return None
    kl, stderr = table.number("kl"), table.number_or_none("kl_stderr")
    return MeasuredLoss("calibration text held out", kl, stderr, table.count("tokens"))


def _with_measured(run: Run, table: Table) -> Run:
    """KLs beside the predictions; layers that were not measured stay without."""
    layers = table.table("layers")
    total = MeasuredLoss(
        table.text("text", ""),
        table.number("total_kl"),
        table.number_or_none("total_kl_stderr"),
        table.table("protocol").count("tokens"),
    )
    rows = []
    for row in run.layers:
        if row.name in layers.record:
            own = layers.table(row.name)
            kl, stderr = own.number("kl"), own.number_or_none("kl_stderr")
            row = replace(row, measured_kl=kl, measured_kl_stderr=stderr)
        rows.append(row)
    return replace(run, layers=tuple(rows), measured=total)


def _layers(
    report: Table, record: Table | None, certificate: Certificate | None
) -> tuple[LayerRow, ...]:
    layers = report.table("layers")
    if not layers.record:
        raise report.wrong("layers", "an object with at least one layer")
    extras = None if record is None else record.table("layers")
    rows = []
    for name in _ordered(layers.record):
        row = _layer(name, layers.table(name))
        if extras is not None and name in extras.record:
            row = _with_extras(row, extras.table(name))
        if certificate is not None and certificate.in_nats:
            row = replace(row, predicted_kl=certificate.stored_losses.get(name))
        rows.append(row)
    return tuple(rows)


def _layer(name: str, table: Table) -> LayerRow:
    return LayerRow(
        name=name,
        place=place_of(name),
        shape=table.shape("shape"),
        bits=table.number("bits"),
        rank=table.count("rank"),
        loss=table.number("loss"),
        relative_loss=table.number("relative_loss"),
        stored_bytes=table.count("stored_bytes"),
        nominal_bits=table.number_or_none("nominal_bits"),
        entropy_bits=table.number_or_none("entropy_bits"),
    )


def _with_extras(row: LayerRow, table: Table) -> LayerRow:
    program = table.table_or_none("program")
    return replace(
        row,
        label=table.text("label", ""),
        gap_bits=table.number_or_none("gap_to_waterfilling_bits"),
        program_gap=None if program is None else program.number("gap"),
    )


def _sizes(
    directory: Path, manifest: dict[str, dict[str, Any]], layers: tuple[LayerRow, ...]
) -> tuple[FileSizes | None, dict[str, dict[str, int]]]:
    """From the shards where they are, else (the JSON alone was kept) from the manifest."""
    if (directory / INDEX).exists():
        container = open_container(directory, verify=False)
        found = container.sizes()
        sizes = FileSizes(
            found.file_bytes,
            found.compressed_bytes,
            found.rest_bytes,
            found.bits_per_compressed_weight,
            found.bits_per_weight,
        )
        return sizes, byte_parts(container)
    shards = {n: e["size"] for n, e in manifest.items() if n.endswith(".safetensors")}
    compressed = sum(size for name, size in shards.items() if name.startswith("model-compressed-"))
    total = sum(shards.values())
    if not compressed:
        return None, {}
    weights = sum(layer.weights for layer in layers)
    return FileSizes(total, compressed, total - compressed, compressed * 8 / weights, None), {}


def _score(table: Table) -> Score:
    return Score(
        name=table.text("name"),
        file_bytes=table.count_or_none("file_bytes"),
        bits_per_compressed_weight=table.number_or_none("bits_per_compressed_weight"),
        bits_per_weight=table.number_or_none("bits_per_weight"),
        perplexity=table.number("perplexity"),
        perplexity_stderr=table.number_or_none("perplexity_stderr"),
        kl=table.number("kl"),
        kl_stderr=table.number_or_none("kl_stderr"),
        top1=table.number("top1_agreement"),
        top1_stderr=table.number_or_none("top1_stderr"),
    )


def _spectra(layers: Table, name: str) -> Spectra:
    table = layers.table(name)
    values = {key: table.numbers(key) for key in SPECTRA if key in table.record}
    if not values or any(not v or min(v) < 0 for v in values.values()):
        raise layers.wrong(name, "lists of singular values >= 0 under weight, whitened, residual")
    most = max(len(v) for v in values.values())
    index = table.numbers("index") if "index" in table.record else tuple(range(1, most + 1))
    if any(a >= b for a, b in pairwise(index)) or min(len(v) for v in values.values()) != len(
        index
    ):
        raise layers.wrong(name, "an index that rises, one per singular value")
    ranks, left = (
        table.numbers(key) if key in table.record else () for key in ("ranks", "loss_left")
    )
    if len(ranks) != len(left):
        raise layers.wrong(name, "as many ranks as entries of loss_left")
    return Spectra(name, place_of(name), tuple(index), values, tuple(ranks), tuple(left))


def _landscape(table: Table) -> Landscape:
    ranks, bits = table.numbers("ranks"), table.numbers("bits")
    stored = None
    if table.record.get("stored_bits") is not None:
        stored = _grid(table, "stored_bits", len(ranks), len(bits))
    error = _grid(table, "relative_error", len(ranks), len(bits))
    return Landscape(ranks, bits, error, stored, table.text("title", ""))


def _grid(table: Table, key: str, rows: int, columns: int) -> tuple[tuple[float, ...], ...]:
    value = table.record.get(key)
    if not isinstance(value, list) or len(value) != rows or not rows or not columns:
        raise table.wrong(key, f"{rows} rows (ranks) of {columns} numbers (bits), none empty")
    grid = tuple(Table({key: row}, table.where).numbers(key) for row in value)
    if any(len(row) != columns for row in grid):
        raise table.wrong(key, f"{rows} rows (ranks) of {columns} numbers (bits)")
    return grid


def _texts(table: Table, key: str) -> dict[str, str]:
    inner = table.table_or_none(key)
    return {} if inner is None else {k: inner.text(k) for k in inner.record}


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=natural_key)
