"""From what training found to a finished directory that says what was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from convex_caldera.core.terms import CompressedLayer
from convex_caldera.finetune.parts import Wish
from convex_caldera.finetune.place import Trained, Values
from convex_caldera.finetune.stored import StoredModel
from convex_caldera.finetune.tunable import TunableLinear
from convex_caldera.storage.card import CardFacts
from convex_caldera.storage.codec import layer_to_tensors
from convex_caldera.storage.files import sha256_of
from convex_caldera.storage.layers import LayerEntry, planned_shard_bytes
from convex_caldera.storage.manifest import MANIFEST
from convex_caldera.storage.partial import PartialRun
from convex_caldera.storage.read import Container
from convex_caldera.storage.tuned import CompressedSource, certificate_of, provenance_of
from convex_caldera.storage.write import assemble
from convex_caldera.workflow.tuning_settings import TuneSettings

KEY = "finetuned"


def write_tuned(
    run: PartialRun,
    stored: StoredModel,
    wish: Wish,
    values: Values,
    record: Mapping[str, Any],
    settings: TuneSettings,
) -> Container:
    """Assemble the new directory; layers without values are copied as they are.

    `record` goes into the report under "finetuned", with the names of the layers and tensors that
    changed and the bytes before and after. The certificate stays that of the plan: its distortions
    and sizes are those before tuning, and `verify` says so.
    """
    source = stored.container
    old = source.report()
    tuned = set(old.get(KEY, {}).get("layers", ()))
    entries = []
    for module, name in {**stored.layer_names, **stored.embedding_names}.items():
        before = source.layer(name)
        layer = _tuned_layer(module, before, values, wish, settings.seed)
        if layer is not before:
            tuned.add(name)
        run.put(name, layer, _layer_record(old["layers"][name], layer, name in tuned))
        entries.append(_entry(name, layer))
    norms = {stored.norm_names[n]: v for n, v in values.items() if n in stored.norm_names}
    report = {
        **old,
        "layers": {name: run.record(name) for name in source.layers},
        KEY: {
            **record,
            "layers": sorted(tuned),
            "tensors": sorted({*norms, *old.get(KEY, {}).get("tensors", ())}),
            "compressed_bytes": planned_shard_bytes(entries),
            "compressed_bytes_before": old.get(KEY, {}).get(
                "compressed_bytes_before", source.sizes().compressed_bytes
            ),
        },
    }
    return assemble(
        run,
        CompressedSource(source, norms),
        list(source.layers),
        recipe=_recipe(source, settings),
        report=report,
        provenance=_provenance(source),
        card=_card(source, settings, old, bool(norms)),
        certificate=certificate_of(source),
        activations=source.activations,
        lossless=bool(source.lossless),
    )


def _tuned_layer(
    module: str, layer: CompressedLayer, values: Values, wish: Wish, seed: int
) -> CompressedLayer:
    """The layer with the values found for it; the same object if there are none."""
    own = {n: value for n, value in values.items() if n.rpartition(".")[0] == module}
    if not own:
        return layer
    tunable = TunableLinear(module, layer, None, wish, seed, cached=False)
    trained = Trained({module: tunable}, {}, {})
    trained.assign(own)
    with trained.as_stored():
        return tunable.layer()


def _layer_record(before: Mapping[str, Any], layer: CompressedLayer, tuned: bool) -> dict[str, Any]:
    """The layer's line of the report: sizes of now, errors of before tuning."""
    weights = layer.shape[0] * layer.shape[1]
    stored = layer.stored_bytes()
    now = {"stored_bytes": stored, "bits": 8 * stored / weights, "rank": layer.rank}
    return {**before, **now} if tuned else dict(before)


def _entry(name: str, layer: CompressedLayer) -> LayerEntry:
    spec, tensors = layer_to_tensors(layer)
    return LayerEntry(name, spec, {f: (t.dtype, tuple(t.shape)) for f, t in tensors.items()})


def _recipe(source: Container, settings: TuneSettings) -> dict[str, Any]:
    """That of the compression, and one table more of [[finetune]]."""
    recipe = source.recipe()
    return {**recipe, "finetune": [*recipe.get("finetune", []), settings.published()]}


def _provenance(source: Container) -> dict[str, Any]:
    """That of the compression, with the manifest of every directory it went through."""
    record = provenance_of(source)
    chain = [*record.get("tuned_from", []), sha256_of(source.directory / MANIFEST)]
    return {**record, "tuned_from": chain}


def _card(
    source: Container, settings: TuneSettings, report: Mapping[str, Any], norms: bool
) -> CardFacts:
    published = settings.published()
    run = source.recipe().get("run", {})
    certificate = certificate_of(source)
    statement = "" if certificate is None else str(certificate.get("statement", ""))
    return CardFacts(
        base_model=str(run.get("model", source.directory.name)),
        method=f"{report.get('method', 'unknown')}, fine-tuned",
        command=_command_line(published),
        calibration=f"Fine-tuned on {settings.nsamples} windows of {published['dataset']}.",
        certificate=statement and f"Before fine-tuning: {statement}",
        activations=source.activations or "",
        kept="all other tensors\nare those of the original, byte for byte"
        + (", but for the norms, which were fine-tuned." if norms else "."),
    )


def _command_line(published: Mapping[str, Any]) -> str:
    """The command that repeats the run, defaults left out."""
    parts = [f"convex-caldera finetune {published['directory']} -o OUT"]
    for key, value in published.items():
        if key == "directory" or value == TuneSettings.model_fields[key].default:
            continue
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            parts.append(flag)
        elif key == "train":
            parts.append(f"{flag} {','.join(value)}")
        elif isinstance(value, tuple | list):
            parts += [f"{flag} {json.dumps(item)}" for item in value]
        else:
            parts.append(f"{flag} {value}")
    return " ".join(parts)
