"""Ways to spoil an output directory. Each returns the changed files: name -> bytes, None removes.

`BLIND` ones leave the manifest as it is. `SEALED` ones are followed by a new manifest, as an
attacker would write it, so only the structure can give them away.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from convex_caldera.storage.manifest import MANIFEST

Files = dict[str, bytes]
Changes = dict[str, bytes | None]
Mutator = Callable[[random.Random, Files], Changes]

INDEX = "model.safetensors.index.json"
HUGE = [1 << 31, 1 << 40, 1 << 62, 10**30]
EVIL_NAMES = ["../evil", "/etc/passwd", "a/../../b", "..\\evil", "", ".", "a//b", "C:\\x", "x\x00y"]


def shards(files: Files, kind: str = "") -> list[str]:
    return sorted(n for n in files if n.startswith(f"model-{kind}") and n.endswith(".safetensors"))


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def edited_json(raw: bytes, edit: Callable[[Any], Any]) -> bytes:
    value = json.loads(raw)
    replaced = edit(value)
    return json.dumps(value if replaced is None else replaced).encode()


# --- without touching the manifest ----------------------------------------------------------


def flip_bit(rng: random.Random, files: Files) -> Changes:
    name = rng.choice([n for n in sorted(files) if files[n]])
    raw = bytearray(files[name])
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return {name: bytes(raw)}


def truncate(rng: random.Random, files: Files) -> Changes:
    name = rng.choice([n for n in sorted(files) if files[n]])
    return {name: files[name][: rng.randrange(len(files[name]))]}


def append_bytes(rng: random.Random, files: Files) -> Changes:
    name = rng.choice(sorted(files))
    return {name: files[name] + rng.randbytes(rng.randint(1, 16))}


def remove_file(rng: random.Random, files: Files) -> Changes:
    return {rng.choice(sorted(files)): None}


def swap_files(rng: random.Random, files: Files) -> Changes:
    one, two = rng.sample(sorted(files), 2)
    return {one: files[two], two: files[one]}


def add_stranger(rng: random.Random, files: Files) -> Changes:
    names = ["model.safetensors", "adapter_config.json", "modeling_x.py", "pytorch_model.bin"]
    return {rng.choice([*names, "convex_caldera/x.json", "deep/er/file"]): rng.randbytes(20)}


def overwrite_range(rng: random.Random, files: Files) -> Changes:
    name = rng.choice([n for n in sorted(files) if len(files[n]) > 8])
    raw = bytearray(files[name])
    start = rng.randrange(len(raw) - 4)
    raw[start : start + 4] = bytes(255 - b for b in raw[start : start + 4])
    return {name: bytes(raw)}


def edit_manifest(rng: random.Random, files: Files) -> Changes:
    def edit(manifest: Any) -> Any:
        table = manifest["files"]
        name = rng.choice(sorted(table))
        operation = rng.randrange(9)
        if operation == 0:
            table[rng.choice(EVIL_NAMES)] = table.pop(name)
        elif operation == 1:
            del table[name]
        elif operation == 2:
            table[name]["size"] += rng.choice([-1, 1, 1 << 40])
        elif operation == 3:
            table[name]["sha256"] = rng.choice(["", "0" * 64, "g" * 64, 7, None])
        elif operation == 4:
            manifest["version"] = rng.choice([0, 2, "1", True, None, 1.0])
        elif operation == 5:
            table[name]["mode"] = 0
        elif operation == 6:
            manifest["files"] = rng.choice([[], None, {MANIFEST: table[name]}, {}])
        elif operation == 7:
            return rng.choice([[], 3, "x", {}])
        else:
            manifest["signed_by"] = "me"
        return None

    return {MANIFEST: edited_json(files[MANIFEST], edit)}


def reformat_manifest(rng: random.Random, files: Files) -> Changes:
    value = json.loads(files[MANIFEST])
    return {MANIFEST: json.dumps(value, indent=rng.choice([None, 0, 2, 3])).encode()}


def nested_json(rng: random.Random, files: Files) -> Changes:
    name = rng.choice([n for n in sorted(files) if n.endswith(".json")])
    depth = rng.choice([2000, 100_000])
    return {name: b"[" * depth + b"]" * depth}


# --- with a new manifest --------------------------------------------------------------------


def truncate_shard(rng: random.Random, files: Files) -> Changes:
    name = rng.choice(shards(files))
    return {name: files[name][: rng.randrange(len(files[name]))]}


def lengthen_shard(rng: random.Random, files: Files) -> Changes:
    name = rng.choice(shards(files))
    return {name: files[name] + bytes(rng.randint(1, 64))}


def header_length(rng: random.Random, files: Files) -> Changes:
    name = rng.choice(shards(files))
    length = int.from_bytes(files[name][:8], "little")
    wrong = rng.choice([0, 1, length - 8, length + 8, len(files[name]), 1 << 40, (1 << 64) - 1])
    return {name: wrong.to_bytes(8, "little") + files[name][8:]}


def edit_entry(rng: random.Random, files: Files) -> Changes:
    file = rng.choice(shards(files))
    header, data = header_of(files[file])
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    operation = rng.randrange(9)
    if operation == 0:
        entry["dtype"] = rng.choice({"U8": ["F32", "I64"]}.get(entry["dtype"], ["U8", "F64"]))
    elif operation == 1:
        entry["dtype"] = rng.choice(["F99", "", None, 3, ["F32"]])
    elif operation == 2:
        entry["shape"][rng.randrange(len(entry["shape"]))] += rng.choice([1, -1, *HUGE])
    elif operation == 3:
        entry["shape"] = rng.choice([None, "8", [1.5], [-8], [[8]], [True], [1] * 99])
    elif operation == 4:
        entry["data_offsets"][rng.randrange(2)] += rng.choice([8, -8, 1, 1 << 40])
    elif operation == 5:
        entry["data_offsets"] = rng.choice([[], [0], [8, 0], None, [0, 0, 0], ["0", "8"]])
    elif operation == 6:
        header[rng.choice([*EVIL_NAMES, name + "x"])] = header.pop(name)
    elif operation == 7:
        del header[name]
    else:
        entry["extra"] = 1
    return {file: with_header(header, data)}


def duplicate_key(rng: random.Random, files: Files) -> Changes:
    file = rng.choice(shards(files))
    header, data = header_of(files[file])
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    text = json.dumps(header, separators=(",", ":"))
    text = text[:-1] + f",{json.dumps(name)}:{json.dumps(header[name])}}}"
    raw = text.encode() + b" " * (-len(text.encode()) % 8)
    return {file: len(raw).to_bytes(8, "little") + raw + data}


def not_a_header(rng: random.Random, files: Files) -> Changes:
    file = rng.choice(shards(files))
    data = header_of(files[file])[1]
    return {file: with_header(rng.choice([[], None, 3, "x", {"__metadata__": [1]}]), data)}


def edit_metadata(rng: random.Random, files: Files) -> Changes:
    file = rng.choice(shards(files, "compressed"))
    header, data = header_of(files[file])
    record = json.loads(header["__metadata__"]["convex_caldera"])
    _edit_record(rng, record)
    text = json.dumps(record)
    if rng.random() < 0.1:
        text = rng.choice(["", "{}", "[]", "null", text[:-1], '{"version":1}'])
    header["__metadata__"]["convex_caldera"] = text
    return {file: with_header(header, data)}


def _edit_record(rng: random.Random, record: Any) -> None:
    operation = rng.randrange(10)
    if operation == 0:
        record["version"] = rng.choice([0, 2, "1", True, None])
    elif operation == 1:
        record["layers"][rng.randrange(len(record["layers"]))] = rng.choice([-1, 99, "0", None])
    elif operation == 2:
        record["layers"] = rng.choice([record["layers"][:-1], [*record["layers"], 0], None, {}])
    elif operation == 3:
        record["schemes"] = rng.choice([[], None, {}, [*record["schemes"], record["schemes"][0]]])
    elif operation == 4:
        record["extra"] = 1
    elif operation in (5, 6):
        _edit_records(rng, record)
    else:
        _edit_scheme(rng, rng.choice(record["schemes"]))


def _edit_records(rng: random.Random, record: Any) -> None:
    records = record["records"]
    one = rng.choice(records)
    operation = rng.randrange(6)
    if operation == 0:
        one["bits"] = rng.choice([5, 7, 0, -1, "2", None, 10**9, 2.0])
    elif operation == 1:
        one["kind"] = rng.choice(["pickle", "", None, 1, "recipe", "quantize", ["e8p"]])
    elif operation == 2:
        one[rng.choice(["x", "coder", "rate_per_row"])] = 1
    elif operation == 3:
        del one[rng.choice(sorted(set(one)))]
    elif operation == 4:
        records.append(rng.choice([records[0], {"kind": "permute"}, None, {}, []]))
    else:
        record["records"] = rng.choice([[], None, {}, records[:-1], "e8p"])


def _edit_scheme(rng: random.Random, scheme: Any) -> None:
    terms = scheme[3]
    at = rng.randrange(len(terms))
    operation = rng.randrange(8)
    if operation == 0:
        scheme[rng.randrange(2)] = rng.choice([0, -1, 1, 3, 1.5, None, True, [8], *HUGE])
    elif operation == 1:
        scheme[:2] = rng.choice([HUGE[1:3], [1 << 30, 1 << 30], [1, (1 << 31) - 1]])
    elif operation == 2:
        scheme[3] = rng.choice([[], None, terms * 2, {}, 0, [terms]])
    elif operation == 3:
        scheme[2] = rng.choice([None, [None], [0], [99], [-1], {}, 0])
    elif operation == 4:
        terms[at] = rng.choice([99, -1, "0", None, True, 1.0, [], [1], [1, 0, 0, 0], {}])
    elif operation == 5:
        rank = rng.choice([0, -1, 10**9, None, 1.0, "4"])
        terms[at] = [rank, None, None]
    elif operation == 6:
        terms[at] = [5, rng.choice([99, -1, "0", True]), None]
    else:
        scheme.append(rng.choice([0, None, []]))


def edit_index(rng: random.Random, files: Files) -> Changes:
    def edit(index: Any) -> Any:
        table = index["weight_map"]
        name = rng.choice(sorted(table))
        other = next(f for f in sorted(set(table.values())) if f != table[name])
        operation = rng.randrange(7)
        if operation == 0:
            table[name] = other
        elif operation == 1:
            table[name] = rng.choice([*EVIL_NAMES, "config.json", "nowhere.safetensors"])
        elif operation == 2:
            del table[name]
        elif operation == 3:
            table[name + ".more"] = table[name]
        elif operation == 4:
            index["metadata"] = rng.choice([{}, {"total_size": 0}, None])
        elif operation == 5:
            index["weight_map"] = rng.choice([[], {}, None, {name: None}])
        else:
            return rng.choice([[], "x", 3, {}])
        return None

    return {INDEX: edited_json(files[INDEX], edit)}


def edit_config(rng: random.Random, files: Files) -> Changes:
    def edit(config: Any) -> Any:
        ours = config["quantization_config"]
        operation = rng.randrange(5)
        if operation == 0:
            ours["quant_method"] = rng.choice(["gptq", "", None])
        elif operation == 1:
            ours["format_version"] = rng.choice([0, 2, "1", None, True])
        elif operation == 2:
            ours["trust_remote_code"] = True
        elif operation == 3:
            config["quantization_config"] = rng.choice([None, [], "convex_caldera", {}])
        else:
            return rng.choice([[], "x", 3, {}])
        return None

    return {"config.json": edited_json(files["config.json"], edit)}


def exchange_shards(rng: random.Random, files: Files) -> Changes:
    one, two = rng.choice(shards(files, "compressed")), rng.choice(shards(files, "rest"))
    return {one: files[two], two: files[one]}


def stray_shard(rng: random.Random, files: Files) -> Changes:
    return {f"model-{rng.randrange(100)}.safetensors": files[rng.choice(shards(files))]}


def plain_twin(rng: random.Random, files: Files) -> Changes:
    """A dense weight beside the compressed one, everything else in order."""
    file = rng.choice(shards(files, "rest"))
    header, data = header_of(files[file])
    compressed = header_of(files[shards(files, "compressed")[0]])[0]
    layer = rng.choice(sorted(n for n in compressed if n.endswith(".packed"))).rpartition(".")[0]
    twin = f"{layer}.weight"
    header[twin] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
    index = json.loads(files[INDEX])
    index["weight_map"][twin] = file
    index["metadata"]["total_size"] += 8
    return {file: with_header(header, data + bytes(8)), INDEX: json.dumps(index).encode()}


def not_finite(rng: random.Random, files: Files) -> Changes:
    """A scale that is NaN: `packed` begins with the widest parts, the scales."""
    file = shards(files, "compressed")[0]
    raw = bytearray(files[file])
    header, data = header_of(files[file])
    record = json.loads(header["__metadata__"]["convex_caldera"])
    names = sorted(n for n in header if n.endswith(".packed"))
    layer = rng.randrange(len(names))
    start = len(raw) - len(data) + header[names[layer]]["data_offsets"][0]
    used = _flat(record["schemes"][record["layers"][layer]][3])
    wide = any(record["records"][number]["kind"] == "e8p" for number in used)  # a float32 scale
    raw[start : start + 4] = b"\x00\x00\xc0\x7f" if wide else b"\x00\x7e\x00\x7e"
    return {file: bytes(raw)}


def _flat(terms: Any) -> list[int]:
    """Numbers of the records that terms use."""
    sides = [side for term in terms for side in (term[1:] if isinstance(term, list) else [term])]
    return [side for side in sides if side is not None]


def remove_needed(rng: random.Random, files: Files) -> Changes:
    needed = ["config.json", INDEX, *shards(files)]
    needed += [f"convex_caldera/{n}" for n in ("recipe.toml", "report.json", "provenance.json")]
    return {rng.choice(needed): None}


def garbage(rng: random.Random, files: Files) -> Changes:
    needed = ["config.json", INDEX, *shards(files)]
    needed += [f"convex_caldera/{n}" for n in ("recipe.toml", "report.json", "provenance.json")]
    contents = [b"", b"\xff\xfe", rng.randbytes(64), b"= [", b"{" * 64]
    return {rng.choice(needed): rng.choice(contents)}


BLIND: dict[str, Mutator] = {
    f.__name__: f
    for f in (
        flip_bit,
        truncate,
        append_bytes,
        remove_file,
        swap_files,
        add_stranger,
        overwrite_range,
        edit_manifest,
        reformat_manifest,
        nested_json,
    )
}
SEALED: dict[str, Mutator] = {
    f.__name__: f
    for f in (
        truncate_shard,
        lengthen_shard,
        header_length,
        edit_entry,
        duplicate_key,
        not_a_header,
        edit_metadata,
        edit_index,
        edit_config,
        exchange_shards,
        stray_shard,
        plain_twin,
        not_finite,
        remove_needed,
        garbage,
    )
}
