"""Reading is tolerant of what is absent and strict about what is there."""

from __future__ import annotations

import json

import pytest

from convex_caldera.errors import FormatError
from convex_caldera.report.byte_parts import REST, byte_parts
from convex_caldera.report.names import Place, natural_key, place_of, short_kinds
from convex_caldera.report.read import read_inputs, read_run
from convex_caldera.report.rows import entries
from convex_caldera.report.words import measured_words
from convex_caldera.storage.manifest import write_manifest
from convex_caldera.storage.read import open_container
from tests.report import making
from tests.storage.making import make_output


def test_run_without_certificate_is_read(tmp_path):
    run = read_run(making.write_run(tmp_path / "out", method="gptq", with_certificate=False))
    assert run.certificate is None
    assert run.method == "gptq"
    assert [layer.name for layer in run.layers] == sorted(making.NAMES, key=natural_key)
    weights = making.WEIGHTS * len(making.NAMES)
    assert run.sizes.file_bytes == making.COMPRESSED_BYTES + making.REST_BYTES
    assert run.sizes.bits_per_compressed_weight == making.COMPRESSED_BYTES * 8 / weights
    assert run.sizes.bits_per_weight is None  # the JSON alone does not say


def test_certificate_numbers_are_those_of_the_file(tmp_path):
    contents = making.files()
    run = read_run(making.write_run(tmp_path / "out", contents))
    plan, c = contents["certificate.json"]["plan"], run.certificate
    assert (c.bound, c.distortion, c.price) == (plan["bound"], plan["distortion"], plan["price"])
    assert (c.groups, c.options) == (len(making.NAMES), 3 * len(making.NAMES))
    assert c.frontier[0].bits == 2 * making.WEIGHTS * len(making.NAMES)
    by_name = {layer.name: layer for layer in run.layers}
    assert by_name[making.NAMES[1]].predicted_kl == c.stored_losses[making.NAMES[1]]
    assert by_name[making.NAMES[1]].program_gap == 2e-6


def test_prediction_of_a_layer_is_that_of_the_layer_as_stored(tmp_path):
    contents = making.files()
    record = contents["certificate.json"]
    run = read_run(making.write_run(tmp_path / "nats", contents))
    predicted = {layer.name: layer.predicted_kl for layer in run.layers}
    stored = making.STORED_LOSS * making.SCALE
    assert predicted == pytest.approx(
        {name: stored * (1 + i) for i, name in enumerate(making.NAMES)}
    )
    assert sum(run.certificate.losses.values()) == pytest.approx(record["plan"]["distortion"])
    assert run.certificate.unit == "predicted nats of KL per token"
    record["unit"] = "relative"  # not the model's KL, so not shown as such
    run = read_run(making.write_run(tmp_path / "relative", contents))
    assert {layer.predicted_kl for layer in run.layers} == {None}


def test_measurements_stand_beside_the_predictions(tmp_path):
    run = read_run(making.write_run(tmp_path / "out"))
    assert run.measured.kl == 0.03
    assert run.measured.tokens == 640
    measured = {layer.name: layer.measured_kl for layer in run.layers}
    assert measured[making.NAMES[1]] == 0.0022
    assert run.spectra[0].index == (1, 2, 3, 4)
    assert run.spectra[0].loss_left == (1.0, 0.3, 0.1, 0.0)


def test_what_was_expected_of_the_whole_is_set_beside_what_it_lost(tmp_path):
    contents = making.files()
    contents["report.json"]["expected_kl"] = 0.02
    run = read_run(making.write_run(tmp_path / "out", contents))
    alone = f"{run.certificate.distortion:.4g}"
    said = measured_words(run, [])[0]
    assert "Predicted 0.02," in said and "(1.50 times)" in said and alone in said
    del contents["report.json"]["expected_kl"]  # an output of an earlier version
    run = read_run(making.write_run(tmp_path / "old", contents))
    assert f"Predicted {alone}," in measured_words(run, [])[0]


MUTATIONS = {
    "no layers": ("report.json", ("layers",), {}),
    "layers a list": ("report.json", ("layers",), []),
    "bits text": ("report.json", ("layers", making.NAMES[0], "bits"), "three"),
    "bits true": ("report.json", ("layers", making.NAMES[0], "bits"), True),
    "shape short": ("report.json", ("layers", making.NAMES[0], "shape"), [8]),
    "rank negative": ("report.json", ("layers", making.NAMES[0], "rank"), -1),
    "method missing": ("report.json", ("method",), None),
    "schema": ("certificate.json", ("schema",), 2),
    "bound text": ("certificate.json", ("plan", "bound"), "low"),
    "curves": ("certificate.json", ("curves", "groups"), []),
    "curve key": ("certificate.json", ("curves", "extra"), 1),
    "choice": ("certificate.json", ("plan", "choice", making.NAMES[0]), "9b"),
    "statement": ("certificate.json", ("statement",), 3),
    "program": ("certificate.json", ("layers", making.NAMES[0], "program"), {"gap": "x"}),
    "measured": ("measured.json", ("measured", "layers", making.NAMES[0], "kl"), [1]),
    "measured total": ("measured.json", ("measured", "total_kl"), None),
    "spectra index": ("spectra.json", ("spectra", making.NAMES[0], "index"), [1, 3, 2, 4]),
    "spectra ranks": ("spectra.json", ("spectra", making.NAMES[0], "ranks"), [0]),
    "spectra": ("spectra.json", ("spectra", making.NAMES[0], "weight"), [1, "x"]),
    "spectra negative": ("spectra.json", ("spectra", making.NAMES[0], "weight"), [1, -1]),
    "landscape": ("landscape.json", ("landscape", "relative_error"), [[1, 2]]),
    "versions": ("provenance.json", ("versions",), {"python": 3}),
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_malformed_entry_is_named(tmp_path, case):
    name, path, value = MUTATIONS[case]
    contents = making.files()
    inner = contents[name]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(FormatError, match=name):
        read_run(making.write_run(tmp_path / "out", contents))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"layers": NaN}', '{"a": 1, "a": 2}', "\x00", "[" * 100_000]
)
def test_damaged_json_is_named(tmp_path, text):
    contents = making.files() | {"report.json": text}
    with pytest.raises(FormatError, match=r"report\.json"):
        read_run(making.write_run(tmp_path / "out", contents))


def test_directory_of_something_else_is_refused(tmp_path):
    with pytest.raises(FormatError, match="not an output"):
        read_run(tmp_path)


def test_file_that_is_no_evaluation_is_refused(tmp_path):
    out = making.write_run(tmp_path / "out")
    other = tmp_path / "other.json"
    other.write_text('{"scores": []}')
    with pytest.raises(FormatError, match=r"other\.json"):
        read_inputs([out], [other])


def test_scores_go_to_the_run_of_that_folder_and_size(tmp_path):
    outs = [making.write_run(tmp_path / name) for name in ("a", "b")]
    record = making.evaluation(str(outs[1]), "stranger")
    record["models"].append(record["models"][1] | {"name": "a", "file_bytes": 1})
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"eval": record}))
    runs, evaluations = read_inputs(outs, [path])
    found = {(e.name, e.method): e for e in entries(runs, evaluations)}
    assert found["b", "convex-caldera"].scores[0].perplexity == 21.0
    assert found["a", "convex-caldera"].scores == (None,)  # evaluated when it weighed 1 byte
    assert found["a", "other"].file_bytes == 1
    assert next(iter(found)) == ("tiny", "original")
    assert found["stranger", "other"].run is None


def test_byte_parts_add_up_to_the_files(tmp_path, tiny_model):
    container = make_output(tiny_model(), tmp_path / "out")
    parts = byte_parts(container)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert sum(sum(kind.values()) for kind in parts.values()) == sum(
        path.stat().st_size for path in files
    )
    assert parts[REST]["kept as it was"] == container.sizes().rest_bytes
    kinds = [kind for name, kind in parts.items() if not name.startswith("(")]
    assert all(kind["codes"] > 0 for kind in kinds)
    assert any(kind.get("factors", 0) > 0 for kind in kinds)


def test_factor_bytes_are_those_of_the_recipe(tmp_path, tiny_model):
    from convex_caldera.core.recipe import FitLowRank, Quantize, Recipe
    from convex_caldera.quantizers.uniform import Uniform

    plain = Quantize(Uniform(3, group_size=0, symmetric=True, search=False), "identity")
    make_output(tiny_model(), tmp_path / "out", (Recipe((FitLowRank(3), plain)),))
    container = open_container(tmp_path / "out")
    parts = byte_parts(container)
    expected = {"codes": 0, "factors": 0, "scales and tables": 0}
    for _, spec in container.layers.values():
        m, n = spec["shape"]
        expected["codes"] += -(-3 * m * n // 8)
        expected["factors"] += 2 * 3 * (m + n)
        expected["scales and tables"] += 2 * m
    for part, size in expected.items():
        assert sum(kind.get(part, 0) for kind in parts.values()) == size


def test_manifest_must_be_ours(tmp_path):
    out = making.write_run(tmp_path / "out")
    write_manifest(out, {})
    assert read_run(out).sizes is None
    (out / "convex_caldera/manifest.json").write_text('{"files": {}}')
    with pytest.raises(FormatError, match="manifest"):
        read_run(out)


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.12.mlp.down_proj", 12, "mlp.down_proj"),
        ("transformer.h.3.attn.c_attn", 3, "attn.c_attn"),
        ("model.layers.4.mlp.experts.17.up_proj", 4, "mlp.experts.*.up_proj"),
        ("lm_head", None, "lm_head"),
        ("odd.7", None, "odd.7"),
        ("", None, ""),
    ],
)
def test_place_of_a_layer(name, block, kind):
    assert place_of(name) == Place(block, kind)


def test_short_kinds_stay_distinct():
    kinds = ["attn.proj", "mlp.proj", "mlp.up", "up"]
    short = short_kinds(kinds)
    assert len(set(short.values())) == len(kinds)
    assert short["mlp.proj"] == "mlp.proj"


def test_seconds_and_memory_go_to_the_run_that_took_them(tmp_path):
    outs = [making.write_run(tmp_path / name) for name in ("one", "two")]
    size = making.COMPRESSED_BYTES + making.REST_BYTES
    record = {"output": "runs/two", "file_bytes": size, "seconds": 9.5, "peak_memory_bytes": 7_000}
    path = tmp_path / "two.json"
    path.write_text(json.dumps(record))
    runs, evaluations = read_inputs(outs, [path])
    assert [(run.seconds, run.peak_memory_bytes) for run in runs] == [(None, None), (9.5, 7_000)]
    assert evaluations == []
    for changed in ({"output": "runs/three"}, {"file_bytes": size + 1}):
        path.write_text(json.dumps(record | changed))
        with pytest.raises(FormatError, match="no such directory is given"):
            read_inputs(outs, [path])


def test_layers_of_a_tower_are_told_from_those_of_the_language_model():
    own = place_of("language_model.model.layers.3.self_attn.q_proj")
    tower = place_of("vision_tower.vision_model.encoder.layers.3.self_attn.q_proj")
    assert own == Place(3, "self_attn.q_proj") and tower == Place(3, "tower.self_attn.q_proj")
    assert len(set(short_kinds([own.kind, tower.kind]).values())) == 2
