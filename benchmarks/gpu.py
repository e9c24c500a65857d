"""Every check that wants a GPU, in one command and one table, in less than ten minutes.

    python benchmarks/gpu.py [--shape 4096 4096] [--bits 2] [--minutes 9] [--out FILE.json]
    python benchmarks/gpu.py --device cpu --small       the same on tiny matrices, writes nothing

Without a GPU it says so, does the latter and exits with 0. What is checked, on the device:

    codes     encode and decode by trellis and E8P; the device's decoding equals the CPU's
    search    a tile row on the device and on the CPU: the same distortion to 1e-5; and the step
              of the search as torch.compile makes it, where it can
    product   x Q^T from packed codes equals the decoded matrix's, beside x W^T in bfloat16
    recipe    a matrix of a 7B model's shape through every method, at the rung nearest to --bits;
              the stored layer decodes on the device and its loss is finite and below one

Seconds are wall time after synchronising; peak is the most memory that tensors held on the device.
What of the work a row's code does on the CPU counts in its seconds. The files are written after
every row, so what has run is kept if the machine goes away. Rows that have not begun when the
minutes are over are listed as not run. Exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.core.protocols import Quantizer
from convex_caldera.core.recipe import Recipe
from convex_caldera.core.seeds import generator
from convex_caldera.errors import CheckError, ConvexCalderaError
from convex_caldera.fit.backfit import fit_layer
from convex_caldera.quantizers import E8P, Trellis, trellis_torch, trellis_viterbi
from convex_caldera.quantizers.trellis_stream import step_bits
from convex_caldera.recipes.ladder import Method, Wishes
from convex_caldera.recipes.table import METHODS
from convex_caldera.runtime.kernels import kernel_for
from convex_caldera.workflow.planning import layer_bytes

Shape = tuple[int, int]
Facts = dict[str, float]
Check = Callable[[torch.device, Shape], Facts]

QUANTIZERS: dict[str, Quantizer] = {
    "trellis 2 bits, L = 12": Trellis(2.0, 12),
    "trellis 2 bits, L = 16": Trellis(2.0, 16),
    "trellis 4 bits, L = 14": Trellis(4.0, 14),
    "trellis 2.5 bits, mul1, L = 12": Trellis(2.5, 12, "mul1"),
    "e8p 2 bits": E8P(2),
    "e8p 3 bits": E8P(3),
    "e8p 4 bits": E8P(4),
}
RELATIVE = 1e-4  # float32 sums in another order, relative to the largest entry
RANK = 64
REPEATS = 10


def synchronized(device: torch.device) -> float:
    """Seconds on the clock once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gaussian(shape: Shape, device: torch.device, purpose: str) -> torch.Tensor:
    return torch.randn(shape, generator=generator(0, "gpu", purpose)).to(device)


def require_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    expected = expected.to(found.device)
    error, size = (found - expected).abs().max().item(), expected.abs().max().item()
    if not error <= RELATIVE * size:
        raise CheckError(f"{what}: off by {error:.3g} where entries reach {size:.3g}")


def check_codes(quantizer: Quantizer) -> Check:
    def check(device: torch.device, shape: Shape) -> Facts:
        W = gaussian(shape, device, "weights")
        fitted = quantizer.fit(W)
        fitted.decode(fitted.encode(W[:, :16]))  # loads kernels and fills tables
        start = synchronized(device)
        codes = fitted.encode(W)
        encoded = synchronized(device)
        values = fitted.decode(codes)
        decoded = synchronized(device)
        if values.device.type != device.type:
            raise CheckError(f"decoded to {values.device}, asked on {device}")
        on_cpu = quantizer.fit(W.cpu())
        require_close(values, on_cpu.decode(codes.cpu()), "decoded on the device and on the CPU")
        return {
            "encode_seconds": encoded - start,
            "encoded_weights_a_second": W.numel() / (encoded - start),
            "decode_seconds": decoded - encoded,
            "relative_error": ((values - W).square().sum() / W.square().sum()).item(),
        }

    return check


def check_product(quantizer: Quantizer) -> Check:
    def check(device: torch.device, shape: Shape) -> Facts:
        W = gaussian(shape, device, "weights")
        fitted = quantizer.fit(W)
        codes = fitted.encode(W)
        packed, x = fitted.pack(codes), gaussian((1, shape[1]), device, "inputs")
        kernel = kernel_for(fitted, device.type)
        plain, v = W.bfloat16(), x.bfloat16()
        found, _ = kernel.forward(fitted, packed, x), v @ plain.T
        start = synchronized(device)
        for _ in range(REPEATS):
            kernel.forward(fitted, packed, x)
        seconds = synchronized(device) - start
        start = synchronized(device)
        for _ in range(REPEATS):
            _ = v @ plain.T
        bf16 = synchronized(device) - start
        require_close(found, x @ fitted.decode(codes).T, f"product by {kernel.name}")
        return {"seconds": seconds / REPEATS, "bf16_seconds": bf16 / REPEATS}

    return check


def check_search(quantizer: Trellis, compiled: bool) -> Check:
    """Sixteen rows searched in torch on the device and by the compiled search on the CPU."""

    def check(device: torch.device, shape: Shape) -> Facts:
        q, code = quantizer, quantizer.fit(torch.ones(16, 16)).code
        x = gaussian((shape[1] // 16, 256), device, "tiles")
        steps = step_bits(q.sixteenths, 256)
        levels = trellis_torch.unit_levels(code, device)
        step = torch.compile(trellis_torch.advance) if compiled else trellis_torch.advance
        trellis_torch.search(x[:1], steps, levels, q.state_bits, False, step)
        start = synchronized(device)
        found = trellis_torch.search(x, steps, levels, q.state_bits, False, step)
        seconds = synchronized(device) - start
        table = levels.cpu().numpy()
        on_cpu = trellis_viterbi.search(x.cpu().numpy(), steps, table, q.state_bits, False)
        both = torch.stack([found.cpu(), torch.from_numpy(on_cpu)])
        packed = trellis_torch.write_symbols(both.flatten(0, 1), steps, 2 * q.sixteenths)
        states = trellis_torch.read_states(packed[:, None], 16, 16, q.sixteenths, q.state_bits, 0)
        values = levels.cpu()[states].view(2, -1, 256)
        errors = (values - x.cpu()).double().square().mean((1, 2))
        if not abs(errors[0] / errors[1] - 1) <= 1e-5:
            raise CheckError(f"distortion {errors[0]:.7g} on the device, {errors[1]:.7g} on CPU")
        return {
            "seconds": seconds,
            "searched_weights_a_second": x.numel() / seconds,
            "equal_symbols": (both[0] == both[1]).float().mean().item(),
            "distortion": errors[0].item(),
        }

    return check


def rung(method: Method, shape: Shape, bits: float) -> Recipe:
    """The method's recipe whose stored layer comes nearest to `bits` a weight."""
    rank = min(RANK, min(shape) // 4)
    recipes = method.ladder(shape, Wishes(rank=rank, factor_bits=method.factor_bits))
    wanted = bits * shape[0] * shape[1] / 8
    return min(recipes, key=lambda recipe: abs(layer_bytes(recipe, shape) - wanted))


def check_recipe(method: Method, bits: float) -> Check:
    def check(device: torch.device, shape: Shape) -> Facts:
        n = shape[1]
        X = gaussian((2 * n, n), device, "tokens")
        X *= torch.arange(1, n + 1, device=device).float() ** -0.5
        statistics = {"mean_abs": X.abs().mean(0)}
        H = Hessian((X.T @ X / len(X)).double(), statistics=statistics)
        problem = Problem(gaussian(shape, device, "weights"), H, "layer")
        start = synchronized(device)
        fit = fit_layer(problem, rung(method, shape, bits), seed=0, layer="layer", site="layer")
        seconds = synchronized(device) - start
        if not 0 <= fit.relative_loss < 1:
            raise CheckError(f"relative loss {fit.relative_loss} is no loss of a compressed layer")
        bits_stored = 8 * fit.layer.stored_bytes() / (shape[0] * n)
        return {"seconds": seconds, "bits": bits_stored, "relative_loss": fit.relative_loss}

    return check


def checks(bits: float) -> dict[str, Check]:
    found: dict[str, Check] = {}
    for name, quantizer in QUANTIZERS.items():
        found[f"codes {name}"] = check_codes(quantizer)
        found[f"product {name}"] = check_product(quantizer)
    for state_bits in (12, 16):
        searched = Trellis(2.0, state_bits)
        found[f"search 2 bits, L = {state_bits}"] = check_search(searched, compiled=False)
        found[f"search 2 bits, L = {state_bits}, compiled"] = check_search(searched, compiled=True)
    # networks are trained for a layer: the longest comes last
    for name in sorted(METHODS, key=lambda name: name.startswith("reallm")):
        found[f"recipe {name}"] = check_recipe(METHODS[name], bits)
    return found


def run(name: str, check: Check, device: torch.device, shape: Shape) -> dict[str, object]:
    """One row: its figures, or why there are none."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    row: dict[str, object] = {"check": name, "shape": list(shape)}
    try:
        row |= check(device, shape) | {"result": "ok"}
    except (ConvexCalderaError, RuntimeError, TypeError) as error:
        first = (str(error) or "no message").splitlines()[0]
        row["result"] = f"failed: {type(error).__name__}: {first}"
    if device.type == "cuda":
        row["peak_gigabytes"] = torch.cuda.max_memory_allocated(device) / 1e9
        torch.cuda.empty_cache()
    return row


def line(row: dict[str, object]) -> str:
    figures = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
    return f"| {row['check']} | {row['result']} | {figures} |"


def header(record: dict[str, object]) -> str:
    return (
        f"{record['card']}, {record['date']}, torch {record['torch']}, matrices of"
        f" {record['shape']}\n\n| check | result | figures |\n|---|---|---|"
    )


def save(path: Path, record: dict[str, object], rows: list[dict[str, object]]) -> None:
    """What is known so far, as JSON and as a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join([header(record), *map(line, rows)]) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--small", action="store_true", help="tiny matrices; writes no file")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096))
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of checks' names")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    args = parser.parse_args()
    found = torch.cuda.is_available()
    device = torch.device(args.device or ("cuda" if found else "cpu"))
    if device.type == "cuda" and not found:
        parser.error("torch finds no CUDA device; leave --device away to check the plumbing")
    small = args.small or not found
    if not found:
        print("no GPU here: tiny matrices on the CPU check this script's plumbing alone\n")
    shape: Shape = (64, 64) if small else (args.shape[0], args.shape[1])
    record: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "no card",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shape": list(shape),
    }
    print(header(record))
    rows, start = [], time.monotonic()
    for name, check in checks(args.bits).items():
        if not name.startswith(tuple(args.only)):
            continue
        if time.monotonic() - start < 60 * args.minutes:
            rows.append(run(name, check, device, shape))
        else:
            rows.append({"check": name, "shape": list(shape), "result": "not run: time is over"})
        print(line(rows[-1]), flush=True)
        if not small:
            save(args.out, record, rows)
    failed = sum(str(row["result"]).startswith("failed") for row in rows)
    print(f"\n{len(rows)} checks, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
