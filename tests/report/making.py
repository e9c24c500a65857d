"""Small run directories that hold their JSON alone, and evaluations of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convex_caldera.allocate.curves import curves_from_dict
from convex_caldera.allocate.plan import allocate
from convex_caldera.storage.manifest import write_manifest

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
NAMES = tuple(f"model.layers.{block}.{kind}" for block in range(2) for kind in KINDS)
SHAPE = (8, 16)
WEIGHTS = SHAPE[0] * SHAPE[1]
COMPRESSED_BYTES = 512
REST_BYTES = 1000


def curves(names: Sequence[str] = NAMES, ties: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
    """Three options per layer, the same sizes, layer i hurting 1 + i times as much."""
    groups = []
    for i, name in enumerate(names):
        options = [
            {"label": f"{b}b", "bits": b * WEIGHTS, "distortion": (1 + i) * 0.1 * 4.0**-b}
            for b in (2, 3, 4)
        ]
        groups.append({"name": name, "weights": WEIGHTS, "options": options})
    return {"groups": groups, "ties": [list(tie) for tie in ties]}


# What a layer costs as it is stored, and the factor from that to nats.
STORED_LOSS, SCALE = 0.0008, 1.25


def certificate(
    names: Sequence[str] = NAMES, ties: Sequence[Sequence[str]] = (), bits: float = 3.1
) -> dict[str, Any]:
    """A certificate whose plan and bound are real; predictions are given with 10 % of error."""
    record = curves(names, ties)
    plan = allocate(curves_from_dict(record), int(bits * WEIGHTS * len(names)))
    layers = {
        name: {
            "label": plan.choice[name],
            "bits": 3.0,
            "rank": i,
            "loss": STORED_LOSS * (1 + i),
            "relative_loss": 0.01,
            "held_out_scale": SCALE,
            "gap_to_waterfilling_bits": 0.2 + 0.01 * i,
            "program": {"gap": 1e-6 * (1 + i)},
        }
        for i, name in enumerate(names)
    }
    return {
        "schema": 1,
        "statement": ["No other choice of the options loses less."],
        "method": "convex-caldera",
        "budget_bytes": 600,
        "compressed_bytes": COMPRESSED_BYTES,
        "header_bytes": 100,
        "curves": record,
        "plan": plan.to_dict(),
        "surrogate": {"gap": 1e-7, "form": "joint", "groups": [{"name": "not shown"}]},
        "layers": layers,
        "unit": "nats",
        "curvature": "sequence Fisher",
    }


def files(
    names: Sequence[str] = NAMES, method: str = "convex-caldera", with_certificate: bool = True
) -> dict[str, Any]:
    """File name -> JSON value (or text) of the folder convex_caldera/."""
    layers = {
        name: {
            "shape": list(SHAPE),
            "bits": 3.0 + 0.1 * i,
            "rank": i,
            "loss": 1.0,
            "relative_loss": 0.01 * (1 + i),
            "stored_bytes": 48,
        }
        for i, name in enumerate(names)
    }
    found: dict[str, Any] = {
        "report.json": {"method": method, "budget": "3.1 bits", "budget_bytes": 600},
        "provenance.json": {
            "versions": {"python": "3.11"},
            "source_files": {"model.safetensors": "ab" * 32},
            "settings": {"model": "tiny", "bits": 3.1},
        },
        "recipe.toml": "[run]\nbits = 3.1\n",
    }
    found["report.json"]["layers"] = layers
    if with_certificate:
        found["certificate.json"] = certificate(names)
        top = [4.0, 2.0, 1.0, 0.5]
        found["spectra.json"] = {
            "schema": 1,
            "spectra": {
                name: {"weight": top, "whitened": top, "residual": top}
                | {"ranks": [0, 1, 2, 4], "loss_left": [1.0, 0.3, 0.1, 0.0]}
                for name in names
            },
        }
        found["measured.json"] = {
            "schema": 1,
            "measured": {
                "text": "held-out.txt",
                "total_kl": 0.03,
                "total_kl_stderr": 0.001,
                "layers": {
                    name: {"kl": 0.0011 * (1 + i), "kl_stderr": None}
                    for i, name in enumerate(names)
                },
                "protocol": {"tokens": 640, "window": 64, "stride": 64, "bos": True},
            },
        }
        found["landscape.json"] = {
            "schema": 1,
            "landscape": {
                "ranks": [0, 4],
                "bits": [2, 3],
                "relative_error": [[0.2, 0.05], [0.1, 0.02]],
                "stored_bits": [[2, 3], [2.5, 3.5]],
            },
        }
    return found


def write_run(out: Path, contents: dict[str, Any] | None = None, **options: Any) -> Path:
    """A directory with these files and a manifest that lists two shards beside them."""
    contents = files(**options) if contents is None else contents
    folder = out / "convex_caldera"
    folder.mkdir(parents=True)
    entries = {
        "model-compressed-00001-of-00001.safetensors": _entry(b"", COMPRESSED_BYTES),
        "model-rest-00001-of-00001.safetensors": _entry(b"", REST_BYTES),
    }
    for name, value in contents.items():
        raw = (value if isinstance(value, str) else json.dumps(value)).encode()
        (folder / name).write_bytes(raw)
        entries[f"convex_caldera/{name}"] = _entry(raw, len(raw))
    write_manifest(out, entries)
    return out


def evaluation(*names: str, text: str = "held-out.txt") -> dict[str, Any]:
    """Scores of an original of 6000 bytes and of models of the size that `write_run` gives."""
    models = []
    for i, name in enumerate(("tiny", *names)):
        models.append(
            {
                "name": name,
                "file_bytes": COMPRESSED_BYTES + REST_BYTES if i else 6000,
                "bits_per_compressed_weight": 5.3 if i else 32.0,
                "bits_per_weight": 6.0 if i else 32.0,
                "perplexity": 20.0 + i,
                "perplexity_stderr": 0.5,
                "kl": 0.05 * i,
                "kl_stderr": 0.001,
                "top1_agreement": 1.0 - 0.1 * i,
                "top1_stderr": None,
            }
        )
    protocol = {"window": 64, "stride": 64, "bos": True, "tokens": 640, "text_tokens": 1000}
    return {"models": models, "protocol": protocol, "text": text, "seconds": 1.0}


def _entry(raw: bytes, size: int) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(raw).hexdigest(), "size": size}
