"""What is claimed of an output that was fine-tuned after it was compressed.

The report's "finetuned" names the layers and the other tensors that training changed, and gives
the bytes of the compressed files before and after. Plan, bound and losses are then statements
about the model before tuning: what needs the codes of a layer alone, or the untouched layers, is
still checked; what would need the values before tuning is not claimed any more, and the names of
the claims say so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from convex_caldera.certify.reader import Output
from convex_caldera.certify.strict import listing, natural, short, table
from convex_caldera.errors import CheckError

KEY = "finetuned"
KEYS = (
    "compressed_bytes",
    "compressed_bytes_before",
    "layers",
    "phases",
    "scope",
    "tensors",
    "trained",
    "validation_tokens",
)


def tuning_of(output: Output) -> Mapping[str, Any] | None:
    """The report's record of fine-tuning with its names checked; None where there was none."""
    record = output.report.get(KEY)
    if record is None:
        return None
    record = table(record, KEYS, f"report: {KEY}")
    for key, known in (("layers", output.layers), ("tensors", output.rest)):
        for name in listing(record[key], f"report: {KEY}.{key}"):
            if not isinstance(name, str) or name not in known:
                raise CheckError(f"fine-tuned {key}: {short(name)} is not stored")
    for key in ("compressed_bytes", "compressed_bytes_before"):
        natural(record[key], f"report: {KEY}.{key}")
    return record


def tuned_layers(output: Output) -> Collection[str]:
    """Layers whose values are not those of the plan."""
    record = tuning_of(output)
    return () if record is None else set(record["layers"])


def tuned_tensors(output: Output) -> Collection[str]:
    """Other tensors that are not the original's."""
    record = tuning_of(output)
    return () if record is None else set(record["tensors"])


def bytes_before(output: Output) -> int:
    """Bytes of the compressed files that plan and budget speak of."""
    record = tuning_of(output)
    return output.compressed_bytes if record is None else record["compressed_bytes_before"]


def check_tuned(output: Output) -> str:
    """The changed parts are stored, and the compressed files have the bytes that are stated."""
    record = tuning_of(output)
    if record is None:
        raise CheckError("the report names no fine-tuning")
    if record["compressed_bytes"] != output.compressed_bytes:
        stated = record["compressed_bytes"]
        raise CheckError(f"{output.compressed_bytes} bytes are stored, {stated} are stated")
    more = output.compressed_bytes - record["compressed_bytes_before"]
    return (
        f"{len(record['layers'])} layers and {len(record['tensors'])} other tensors, "
        f"{more:+} bytes; plan and losses below are those before"
    )
