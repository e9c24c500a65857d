"""docs/format.md read literally: decode a layer with the standard library and numpy alone.

Slow and plain on purpose. Imports nothing of the package.
"""

from __future__ import annotations

import json
from itertools import product
from math import cos, pi, sin, sqrt
from pathlib import Path
from statistics import NormalDist

import numpy as np

DTYPES = {
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "F16": np.float16,
    "F32": np.float32,
    "BF16": None,
}
HALVES = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246"
    " 245 167 157 147 156 146 045 067 057 047 056 046 014 237"
)


def read_shard(path: Path):
    """(metadata, {name: array})."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__")
    data = raw[8 + length :]
    return metadata, {
        name: array(data[slice(*e["data_offsets"])], e["dtype"], e["shape"])
        for name, e in header.items()
    }


def array(raw, dtype, shape):
    if dtype == "BF16":
        wide = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    return np.frombuffer(raw, DTYPES[dtype]).reshape(shape)


def read_layers(path: Path):
    """{layer: W^} of one compressed file."""
    metadata, tensors = read_shard(path)
    record = json.loads(metadata["convex_caldera"])
    names = sorted({name.rsplit(".", 1)[0] for name in tensors})
    return {
        name: decode_layer(record["schemes"][number], record["records"], name, tensors)
        for name, number in zip(names, record["layers"], strict=True)
    }


def decode_layer(scheme, records, name, tensors):
    m, n, transforms, terms = scheme
    owners = [(("transform", i), records[k], (m, n)) for i, k in enumerate(transforms)]
    for t, term in enumerate(terms):
        if isinstance(term, int):
            owners.append(((t,), records[term], (m, n)))
            continue
        for side, k, width in (("left", term[1], m), ("right", term[2], n)):
            if k is not None:
                owners.append(((t, side), records[k], (term[0], width)))
    parts = [
        (owner, field, dtype, size)
        for owner, record, shape in owners
        for field, (dtype, size) in sorted(layout(record, shape).items())
    ]
    parts.sort(key=lambda part: -np.dtype(DTYPES[part[2]] or np.uint16).itemsize)
    found, at = {owner: {} for owner, _, _ in owners}, 0
    for owner, field, dtype, shape in parts:
        size = int(np.prod(shape)) * np.dtype(DTYPES[dtype] or np.uint16).itemsize
        raw = tensors[f"{name}.packed"].tobytes()[at : at + size]
        found[owner][field] = array(raw, dtype, shape)
        at += size
    W = np.zeros((m, n))
    for t, term in enumerate(terms):
        if isinstance(term, int):
            W = W + coded(records[term], (m, n), found[t,])
            continue
        r, left, right = term
        L = tensors.get(f"{name}.left_{t}")
        R = tensors.get(f"{name}.right_{t}")
        L = L if left is None else coded(records[left], (r, m), found[t, "left"]).T
        R = R if right is None else coded(records[right], (r, n), found[t, "right"])
        W = W + L.astype(np.float64) @ R.astype(np.float64)
    for i, k in reversed(list(enumerate(transforms))):
        W = invert(records[k], W, found["transform", i])
    return W


def layout(record, shape):
    """Stored tensors of a kind, {field: (dtype, shape)}."""
    m, n = shape
    kind, blocks = record["kind"], -(-n // 8)
    if kind in ("uniform", "normal_float"):
        b, g = record["bits"], record["group_size"]
        grid = (1, 1) if g == -1 else (m, 1 if g == 0 else -(-n // min(g, n)))
        scale = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[record["scale_dtype"]]
        fields = {"scales": (scale, grid), "codes": ("U8", (-(-m * n * b // 8),))}
        if kind == "uniform" and not record["symmetric"]:
            fields["zero_points"] = ("U8", (-(-grid[0] * grid[1] * b // 8),))
        return fields
    if kind in ("mxint", "minifloat"):
        b, g = record["bits"], record["group_size"]
        grid = (1, 1) if g == -1 else (m, 1 if g == 0 else -(-n // min(g, n)))
        fields = {"codes": ("U8", (-(-m * n * b // 8),))}
        if kind == "minifloat":
            scale = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
            return fields | {"scales": (scale[record["scale_dtype"]], grid)}
        w = record["exponent_bits"]
        fields["exponents"] = ("U8", (-(-grid[0] * grid[1] * w // 8),))
        return fields | ({"base": ("U8", (1,))} if w < 8 else {})
    if kind == "e8p":
        return {"scale": ("F32", (1,)), "codes": ("U8", (m * blocks * record["bits"],))}
    if kind == "trellis":
        r = round(16 * record["bits"])
        heights = [min(16, m - i) for i in range(0, m, 16)]
        widths = [min(16, n - j) for j in range(0, n, 16)]
        size = sum(-(-(h * d * r // 16) // 8) for h in heights for d in widths)
        fields = {"scale": ("F32", (1,)), "codes": ("U8", (size,))}
        if record["code"] == "weyl":
            fields["multiplier"] = ("U32", (1,))
        if record["code"] == "table":
            fields["levels"] = ("F16", (1 << record["state_bits"],))
        return fields | ({"row_scale": ("F16", (m,))} if record["row_scales"] else {})
    if kind == "scale":
        return {"scale": ("F16", (n,))}
    if kind == "permute":
        return {"order": ("U16" if n <= 65536 else "U32", (n,))}
    if kind == "diagonal":
        fields = {"input_diagonal": ("F16", (n,))} if record["inputs"] else {}
        return fields | ({"output_diagonal": ("F16", (m,))} if record["outputs"] else {})
    fields = {"input_signs": ("U8", (blocks,))} if record["inputs"] else {}
    return fields | ({"output_signs": ("U8", (-(-m // 8),))} if record["outputs"] else {})


def coded(record, shape, tensors):
    decode = {"uniform": uniform, "normal_float": normal_float, "e8p": e8p, "trellis": trellis}
    decode |= {"mxint": mxint, "minifloat": minifloat}
    return decode[record["kind"]](record, shape, tensors).astype(np.float64)


def bits_of(stream):
    return (stream[:, None] >> np.arange(8) & 1).reshape(-1)


def stream(packed, bits, count):
    flat = bits_of(packed)[: bits * count].reshape(count, bits).astype(np.int64)
    return (flat << np.arange(bits)).sum(1)


# --- quantizers -----------------------------------------------------------------------------


def uniform(record, shape, tensors):
    m, n = shape
    b, g = record["bits"], record["group_size"]
    codes = stream(tensors["codes"], b, m * n).reshape(m, n)
    scales = tensors["scales"].astype(np.float32)
    if record["symmetric"]:
        z = 0.5 if b == 1 else 2 ** (b - 1) - record["legacy_levels"]
        zeros = np.full(scales.shape, z)
    else:
        zeros = stream(tensors["zero_points"], b, scales.size).reshape(scales.shape)
    pick = groups(g, m, n)
    return (codes - zeros[pick]).astype(np.float32) * scales[pick]


def groups(g, m, n):
    column = np.arange(n) // min(g, n) if g > 0 else np.zeros(n, int)
    row = np.zeros(m, int) if g == -1 else np.arange(m)
    return np.ix_(row, column)


def normal_float(record, shape, tensors):
    m, n = shape
    b = record["bits"]
    M, delta, quantile = 2 ** (b - 1), (1 / 30 + 1 / 32) / 2, NormalDist().inv_cdf
    w = 0.5 - delta
    p = [delta + w * k / (M - 1) for k in range(M - 1)] + [0.5]
    p += [0.5 + w * k / M for k in range(1, M + 1)]
    levels = np.array([quantile(each) / quantile(1 - delta) for each in p], np.float32)
    codes = stream(tensors["codes"], b, m * n).reshape(m, n)
    return levels[codes] * tensors["scales"].astype(np.float32)[groups(record["group_size"], m, n)]


def mxint(record, shape, tensors):
    (m, n), b, g = shape, record["bits"], record["group_size"]
    grid = (1, 1) if g == -1 else (m, 1 if g == 0 else -(-n // min(g, n)))
    e = stream(tensors["exponents"], record["exponent_bits"], grid[0] * grid[1]).reshape(grid)
    E = e + int(tensors.get("base", [0])[0]) - 127
    codes = stream(tensors["codes"], b, m * n).reshape(m, n)
    return (codes - (2.0 ** (b - 1) - 1)) * 2.0 ** (E - (b - 2.0))[groups(g, m, n)]


def minifloat(record, shape, tensors):
    (m, n), b, x = shape, record["bits"], record["exponent_bits"]
    k, bias = b - 1 - x, 2 ** (x - 1) - 1
    c = stream(tensors["codes"], b, m * n).reshape(m, n)
    sign, X, M = c >> (b - 1), (c >> k) % 2**x, c % 2**k
    size = np.where(X == 0, M / 2**k * 2.0 ** (1 - bias), (1 + M / 2**k) * 2.0 ** (X - bias))
    scales = tensors["scales"].astype(np.float32)[groups(record["group_size"], m, n)]
    return np.where(sign == 1, -size, size) * scales


def e8p_rows():
    ball = [r for r in product((0.5, 1.5, 2.5), repeat=8) if sum(v * v for v in r) <= 10]
    return np.array(
        ball + [tuple(0.5 if str(i) in h else 1.5 for i in range(8)) for h in HALVES.split()]
    )


def e8p_point(code, rows):
    row, low = rows[code >> 8].copy(), code & 255
    odd = bin(low).count("1") % 2
    total = int(row.sum())
    for i, bit in enumerate((0, 4, 1, 5, 2, 6, 3, 7)):
        if ((low ^ odd) >> bit) & 1:
            row[i] = -row[i]
    if total % 2:
        row[7] = -row[7]
    return row + (-0.25 if odd else 0.25)


def e81b():
    whole = [p for p in product((-1, 0, 1), repeat=8) if sum(map(abs, p)) in (0, 2)]
    halves = [p for p in product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    twos = list(2 * np.eye(8)) + list(-2 * np.eye(8))
    return np.array(whole + halves + twos[:15])


def e8p(record, shape, tensors):
    m, n = shape
    blocks, bits = -(-n // 8), record["bits"]
    rows, raw, scale = e8p_rows(), tensors["codes"].tobytes(), tensors["scale"][0]
    count = m * blocks
    points = np.array([e8p_point(int(c), rows) for c in np.frombuffer(raw[: 2 * count], "<u2")])
    rho = {3: (2.04, 1.77), 4: (3.45, 3.7)}.get(bits, (1, 1))[record["joint_scale"]]
    if bits == 3:
        points = points + e81b()[np.frombuffer(raw[2 * count :], np.uint8)] / rho
    if bits == 4:
        second = [e8p_point(int(c), rows) for c in np.frombuffer(raw[2 * count :], "<u2")]
        points = points + np.array(second) / rho
    return (points.reshape(m, blocks * 8)[:, :n] * scale).astype(np.float32)


def trellis(record, shape, tensors):
    m, n = shape
    r, L, chain = round(16 * record["bits"]), record["state_bits"], record["chain"]
    raw, at, streams = tensors["codes"], 0, {}
    tiles = [(i, j) for i in range(-(-m // 16)) for j in range(-(-n // 16))]
    size = {t: (min(16, m - 16 * t[0]), min(16, n - 16 * t[1])) for t in tiles}
    for tile in tiles:
        length = size[tile][0] * size[tile][1] * r // 16
        flat = np.unpackbits(raw[at : at + -(-length // 8)])
        streams[tile] = flat[:length]
        at += -(-length // 8)
    W = np.zeros((m, n), np.float32)
    for i, j in tiles:
        h, d = size[i, j]
        ends = (np.arange(1, h * d + 1) * r) // 16
        if chain:
            first = i - i % chain
            before = [streams[k, j] for k in range(first, i + 1)]
            bits = np.concatenate([np.zeros(L, np.uint8), *before])
            ends = ends + len(bits) - len(streams[i, j])
        else:
            bits = streams[i, j]
        window = ends[:, None] + np.arange(-L, 0)
        states = (bits[window % len(bits)].astype(np.int64) << np.arange(L)[::-1]).sum(1)
        word = int(tensors["multiplier"][0]) if record["code"] == "weyl" else 0
        if record["code"] == "table":
            values = tensors["levels"].astype(np.float32)[states]
        else:
            values = [level(record["code"], int(s), word) for s in states]
        W[16 * i : 16 * i + h, 16 * j : 16 * j + d] = np.reshape(values, (h, d))
    rows = tensors.get("row_scale", np.ones(m)).astype(np.float32)
    return tensors["scale"][0] * rows[:, None] * W


def level(code, s, multiplier):
    word = 1 << 32
    if code == "weyl":
        quantile = NormalDist().inv_cdf(((multiplier * s % word >> 22) + 0.5) / 1024)
        return round(4096 * quantile) / 4096
    if code in ("mul1", "mul2", "1mad"):
        x = (34038481 * s + 76625530) % word if code == "1mad" else 0x83DCD12D * s % word
        if code == "mul2":
            x = 0x9E3779B1 * (x ^ (x >> 15)) % word
        return sum(x.to_bytes(4, "little")) - 510
    x = 0xCBAC1FED * s if code == "mcg" else 89226354 * s + 64248484
    x = (x % word & 0x8FFF8FFF) ^ 0x3B603B60
    return float(np.frombuffer(x.to_bytes(4, "little"), np.float16).astype(np.float64).sum())


# --- transforms -----------------------------------------------------------------------------


def invert(record, W, tensors):
    m, n = W.shape
    if record["kind"] == "scale":
        return W / tensors["scale"].astype(np.float64)
    if record["kind"] == "permute":
        out = np.empty_like(W)
        out[:, tensors["order"].astype(int)] = W
        return out
    if record["kind"] == "diagonal":
        a = tensors.get("input_diagonal", np.ones(n)).astype(np.float64)
        return tensors.get("output_diagonal", np.ones(m)).astype(np.float64)[:, None] * W * a
    if record["inputs"]:
        W = W @ hadamard(n) * (1 - 2 * bits_of(tensors["input_signs"])[:n].astype(int))
    if record["outputs"]:
        signs = 1 - 2 * bits_of(tensors["output_signs"])[:m].astype(int)
        W = signs[:, None] * (hadamard(m).T @ W)
    return W


def hadamard(n):
    K, p = n, 0
    while K % 2 == 0:
        K, p = K // 2, p + 1
    if K == 1:
        return sylvester(p) / sqrt(n)
    for t in range(2, p + 1):
        b = K << t
        if b > 1024:
            break
        if prime_power(b - 1):
            return np.kron(paley1(b - 1), sylvester(p - t)) / sqrt(n)
        if b // 2 % 4 == 2 and prime_power(b // 2 - 1):
            return np.kron(paley2(b // 2 - 1), sylvester(p - t)) / sqrt(n)
    angles = [[2 * pi * (i * j % K) / K for j in range(K)] for i in range(K)]
    C = np.array([[cos(a) + sin(a) for a in row] for row in angles]) / sqrt(K)
    return np.kron(C, sylvester(p)) / sqrt(2**p)


def sylvester(p):
    return np.array([[(-1) ** bin(i & j).count("1") for j in range(2**p)] for i in range(2**p)])


def prime_power(q):
    primes = [d for d in range(2, q + 1) if q % d == 0 and all(d % e for e in range(2, d))]
    return len(primes) == 1


def legendre(q):
    """Q for a prime q; tests use prime orders only."""
    squares = {i * i % q for i in range(1, q)}
    chi = [0] + [1 if i in squares else -1 for i in range(1, q)]
    return np.array([[chi[(i - j) % q] for j in range(q)] for i in range(q)])


def paley1(q):
    S = np.zeros((q + 1, q + 1), int)
    S[0, 1:], S[1:, 0], S[1:, 1:] = 1, -1, legendre(q)
    return S + np.eye(q + 1, dtype=int)


def paley2(q):
    S = np.zeros((q + 1, q + 1), int)
    S[0, 1:], S[1:, 0], S[1:, 1:] = 1, 1, legendre(q)
    eye = np.eye(q + 1, dtype=int)
    return np.kron(S, [[1, 1], [1, -1]]) + np.kron(eye, [[1, -1], [-1, -1]])
