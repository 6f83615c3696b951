"""What this machine is, and what each kernel reaches of it: a roofline in text.

    python -m kernels                    a table
    python -m kernels --plot FILE.png    and a picture (matplotlib)

A kernel that does f operations on b bytes takes at least f / peak and b / bandwidth seconds, whichever is
more; its share is that bound over its time. Peak and bandwidth are measured first, in the same run. What a
cache holds streams faster than memory: such kernels reach more than all.
"""
from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
from numba import prange

import kernels as K
from kernels import jit, memory
from kernels.amx import start_tiles, stop_tiles
from kernels.cpu import TARGET
from kernels.jit import helper, kernel, launch
from kernels.simd import address
from kernels.tile import columns, height, register_tile

DEPTH, REPEATS = 128, 4000


class Case(NamedTuple):
    """A kernel at work: its operations, and the bytes that it cannot avoid to move."""
    name: str
    run: Callable
    operations: float
    bytes: float


class Result(NamedTuple):
    """What a case took, and how much of the machine that is."""
    name: str
    seconds: float
    rate: float              # operations a second
    bandwidth: float         # bytes a second
    share: float             # of the bound, which is 1


@kernel
def _tiles(a, b, c, repeats, bf16, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        multiply_again(a, b, c[task], repeats, bf16)


@helper
def multiply_again(a, b, c, repeats, bf16):
    start_tiles(bf16)
    for _ in range(repeats):
        register_tile(c, address(a, 0), a.shape[1], 1, address(b, 0), c.shape[1], address(c, 0), c.shape[1],
                      len(b), 0, 0, len(c), True, bf16)
    stop_tiles(bf16)


@kernel
def _triad(x, y, z, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        i, j = x.size * task // tasks, x.size * (task + 1) // tasks
        triad_part(x[i:j], y[i:j], z[i:j])


@helper
def triad_part(x, y, z):
    for i in range(x.size):
        x[i] = y[i] + np.float32(3) * z[i]


def seconds(run: Callable, at_least: float = 0.2) -> float:
    """The median time of a call, over at least five of them and so many seconds."""
    run()
    times: list[float] = []
    end = time.perf_counter() + at_least
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak(bf16: bool = False) -> float:
    """Operations a second of the register tile on the first-level cache, on all threads."""
    rows, width, threads = height(bf16), columns(np.dtype(np.float32)), K.get_num_threads()
    a, b = memory.zeros((rows, DEPTH)), memory.zeros((DEPTH, width))
    c = memory.zeros((threads, rows, width))
    operations = 2 * rows * width * DEPTH * REPEATS * threads * (2 if bf16 else 1)
    return operations / seconds(lambda: launch(_tiles, threads, a, b, c, REPEATS, bf16))


def bandwidth() -> float:
    """Bytes a second of x = y + 3 z on arrays of 64 MB, on all threads: two are read, one is written."""
    x, y, z = (memory.zeros(1 << 24) for _ in range(3))
    return 3 * x.nbytes / seconds(lambda: launch(_triad, 16, x, y, z))


def cases(n: int = 2048, c: int = 384, heads: int = 6, T: int = 256, vocabulary: int = 50304) -> list[Case]:
    """Every kernel on what a batch of the lecture's model gives it: n tokens of width c."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    x, dy, gain, wide, dwide = normal(n, c), normal(n, c), normal(c), normal(n, 4 * c), normal(n, 4 * c)
    squares = wide * wide
    weight, up = normal(c, c), normal(4 * c, c)
    ids = random.integers(0, vocabulary, n)
    table, logits = normal(vocabulary, c), normal(256, vocabulary)
    targets = random.integers(0, vocabulary, 256)
    qkv, dout = normal(n // T, T, 3 * c), normal(n // T, T, c)
    out, norms = K.attention_forward(qkv, heads)
    turned, scales = K.rotary_forward(qkv, heads, eps=1e-6)
    _, mean, rstd = K.layernorm_forward(x, gain)
    losses, log_sums = K.cross_entropy_forward(logits, targets)
    p, g, m, v = (normal(1 << 22) ** 2 for _ in range(4))
    matrices, steps, momenta = ([normal(c, c) for _ in range(6)] for _ in range(3))
    pairs = n * (T + 1) / 2 * c                  # of a query and a key that it sees, times the head width
    size, big, all_logits = x.nbytes, wide.nbytes, logits.nbytes
    return [
        Case("embedding forward", lambda: K.embedding_forward(ids, table), 0, 2 * size),
        Case("embedding backward", lambda: K.embedding_backward(dy, ids, vocabulary), x.size,
             3 * size + table.nbytes),
        Case("layernorm forward", lambda: K.layernorm_forward(x, gain), 8 * x.size, 2 * size),
        Case("layernorm backward", lambda: K.layernorm_backward(dy, x, gain, mean, rstd), 16 * x.size,
             3 * size),
        Case("matmul A B", lambda: K.matmul(x, weight), 2 * x.size * c, 2 * size + weight.nbytes),
        Case("matmul A Bᵀ", lambda: K.matmul(x, weight, transpose_b=True), 2 * x.size * c,
             2 * size + weight.nbytes),
        Case("matmul Aᵀ B", lambda: K.matmul(dy, x, transpose_a=True), 2 * x.size * c,
             2 * size + weight.nbytes),
        Case("linear with GELU", lambda: K.linear_forward(x, up, None, "gelu"), 2 * x.size * 4 * c,
             size + up.nbytes + 2 * big),
        Case("rotary, QK-norm forward", lambda: K.rotary_forward(qkv, heads, eps=1e-6), 10 * x.size,
             6 * size),
        Case("rotary, QK-norm backward", lambda: K.rotary_backward(qkv, turned, scales, heads), 16 * x.size,
             8 * size),
        Case("attention forward", lambda: K.attention_forward(qkv, heads), 4 * pairs, 4 * size),
        Case("attention backward", lambda: K.attention_backward(dout, qkv, out, norms, heads), 10 * pairs,
             8 * size),
        Case("softmax forward", lambda: K.softmax_forward(wide), 15 * wide.size, 2 * big),
        Case("softmax backward", lambda: K.softmax_backward(dwide, wide), 4 * wide.size, 3 * big),
        Case("GELU forward", lambda: K.gelu_forward(wide), 45 * wide.size, 3 * big),
        Case("GELU backward", lambda: K.gelu_backward(dwide, wide), wide.size, 3 * big),
        Case("add", lambda: K.add(dwide, wide), wide.size, 3 * big),
        Case("squared ReLU backward", lambda: K.relu2_backward(dwide, squares), 3 * wide.size, 3 * big),
        Case("dropout", lambda: K.dropout(wide, 0.2, 1), 0, 2 * big),
        Case("cross-entropy forward", lambda: K.cross_entropy_forward(logits, targets), 15 * logits.size,
             all_logits),
        Case("cross-entropy backward",
             lambda: K.cross_entropy_backward(losses, logits, targets, log_sums), 15 * logits.size,
             2 * all_logits),
        Case("norm of gradients", lambda: K.sum_of_squares([g]), 2 << 22, 4 << 22),
        Case("AdamW", lambda: K.adamw([p], [g], [m], [v], [0.1], 1, 1e-6, 0.9, 0.99, 1e-8),
             15 << 22, 7 * 4 << 22),
        Case("Muon, six matrices", lambda: K.muon(matrices, steps, momenta, [1] * 6, 1e-6, 0.95, 0.1),
             6 * 20 * c**3, 6 * 5 * 4 * c * c),
    ]


def measure(case: Case, peak_rate: float, streaming: float) -> Result:
    """Time a case against the bound that the machine sets."""
    took = seconds(case.run)
    bound = max(case.operations / peak_rate, case.bytes / streaming)
    return Result(case.name, took, case.operations / took, case.bytes / took, bound / took)


def machine() -> list[tuple[str, str]]:
    """What was found out about this machine: names and values."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]      # type: ignore[call-overload,index]
    folder = jit.cache_folder()
    files = list(folder.glob("*.nbc")) if folder else []
    held = f"{len(files)} compiled, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB"
    return [
        ("processor", f"{platform.machine()}, {TARGET.name}: vectors of {TARGET.vector_bytes} bytes, "
                      f"register tile of {TARGET.rows} x 2 vectors"),
        ("bfloat16 products", "on the tile unit" if TARGET.tiles else "yes" if TARGET.bf16 else "no"),
        ("threads", f"{K.get_num_threads()} of {jit.max_threads()}, by {numba.threading_layer()}"),
        ("numpy", f"{np.__version__} with {blas.get('name')} {blas.get('version')}"),
        ("numba", numba.__version__),
        ("compiled kernels", f"in {folder}: {held}" if folder else "are not kept: no folder can be written"),
    ]


def plot(results: list[Result], found: list[Case], peak_rate: float, streaming: float, path: str) -> None:
    """Draw the roofline and a dot for each kernel, rate over operations a byte, to a PNG."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    intensity = np.geomspace(0.005, 1000, 200)
    axes.loglog(intensity, np.minimum(peak_rate, intensity * streaming) / 1e9, color="black",
                label=f"{peak_rate / 1e9:.0f} GFLOP/s, {streaming / 1e9:.0f} GB/s")
    for i, (result, case) in enumerate((r, c) for r, c in zip(results, found, strict=True) if c.operations):
        axes.plot(case.operations / case.bytes, result.rate / 1e9, "os^vDP*"[i % 7], color=f"C{i % 10}",
                  label=f"{result.name}, {result.share:.0%}")
    axes.set(xlabel="operations a byte", ylabel="GFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def png(path: str) -> str:
    """argparse's type of a picture to draw: known to be wrong before all is measured, not after."""
    if not path.endswith(".png") or not os.access(Path(path).parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path!r} is not a .png in a folder that can be written to")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="What this machine is, and what each kernel reaches of it.")
    parser.add_argument("--plot", metavar="FILE.png", type=png, help="draw the roofline")
    options = parser.parse_args()
    peak_rate, streaming = peak(), bandwidth()
    for name, value in machine():
        print(f"{name:<18} {value}")
    print(f"{'peak':<18} {peak_rate / 1e9:.0f} GFLOP/s in float32"
          + (f", {peak(bf16=True) / 1e9:.0f} in bfloat16" if TARGET.bf16 else ""))
    print(f"{'memory':<18} {streaming / 1e9:.0f} GB/s\n")
    print(f"{'kernel':<24}{'ms':>9}{'GFLOP/s':>10}{'GB/s':>8}{'share':>8}")
    found, results = cases(), []
    for case in found:
        results.append(measure(case, peak_rate, streaming))
        name, took, rate, moved, share = results[-1]
        print(f"{name:<24}{took * 1e3:>9.3f}{rate / 1e9:>10.1f}{moved / 1e9:>8.1f}{share:>8.0%}  "
              f"{'#' * round(20 * min(share, 2))}", flush=True)
    if any(result.share > 1 for result in results):
        print("more than 100%: what a cache holds streams faster than memory")
    if options.plot:
        plot(results, found, peak_rate, streaming, options.plot)


if __name__ == "__main__":
    main()
