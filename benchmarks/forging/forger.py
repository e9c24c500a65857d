"""One copy of an honest output under falsification, and the repairs that an attacker would make."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "convex_caldera"


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
