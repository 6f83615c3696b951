"""Every kernel, timed beside the same work in numpy (matrix products) or PyTorch eager (all others).

    python tests/benchmarks/kernels.py                      tables
    python tests/benchmarks/kernels.py --only matmul --json a JSON line for each row

Both sides run in turn in one process on all threads, in rounds of at least --seconds; what is compared is the
median of all calls. Ratios are theirs over ours: above 1 we are faster. Attention and the kernels by row are
forward and backward together.
"""
import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path[0] = str(Path(__file__).parents[2])          # `kernels` is the package, not this file
import kernels  # noqa: E402
from kernels.cpu import TARGET  # noqa: E402

SHAPES = [(768, 128, 384), (768, 128, 512), (768, 128, 65), (768, 512, 128), (2048, 384, 1152),
          (2048, 384, 1536), (2048, 384, 384), (2048, 1536, 384), (1024, 1024, 1024), (2048, 2048, 2048),
          (256, 768, 2304), (256, 768, 3072), (256, 768, 50304)]                                 # M, K, N
# B, H, T, D
HEADS = [(12, 4, 64, 32), (8, 6, 256, 64), (1, 4, 1024, 32), (1, 4, 1024, 64), (1, 4, 4096, 32)]
ROUNDS = 3


class Row(NamedTuple):
    """A line of a table."""
    what: str
    ours_ms: float
    theirs_ms: float
    ratio: float


def compare(what: str, ours: Callable, theirs: Callable, seconds: float) -> Row:
    """Both in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for side, run in enumerate((ours, theirs)):
            run()
            time.sleep(0.02)                       # the other side's threads have stopped to spin
            run()
            started = time.perf_counter()
            while time.perf_counter() < started + seconds:
                start = time.perf_counter()
                run()
                times[side].append(time.perf_counter() - start)
    a, b = (1e3 * statistics.median(side) for side in times)
    return Row(what, round(a, 4), round(b, 4), round(b / a, 2))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def matmul(seconds: float, precision: str = "highest") -> Iterator[Row]:
    """Our products beside numpy's, in float32, of matrices that lie in memory as they do in training."""
    kernels.set_matmul_precision(precision)
    for m, k, n in SHAPES:
        a, b, c = normal(m, k), normal(k, n), np.empty((m, n), np.float32)
        a_t, b_t = a.T.copy(), b.T.copy()
        for name, x, y, transposed in (("A B", a, b, (False, False)), ("A Bᵀ", a, b_t, (False, True)),
                                       ("Aᵀ B", a_t, b, (True, False))):
            yield compare(f"{m} x {k} x {n}  {name}", functools.partial(kernels.matmul, x, y, *transposed),
                          functools.partial(np.matmul, x.T if transposed[0] else x,
                                            y.T if transposed[1] else y, out=c), seconds)
    a, b, c = normal(96, 64, 32), normal(96, 32, 64), np.empty((96, 64, 64), np.float32)
    yield compare("96 x (64 x 32 x 64)  A B", functools.partial(kernels.matmul, a, b),
                  functools.partial(np.matmul, a, b, out=c), seconds)
    kernels.set_matmul_precision("highest")


def matmul_bf16(seconds: float) -> Iterator[Row]:
    """Our products in bfloat16 beside numpy's in float32."""
    if TARGET.bf16:
        yield from matmul(seconds, "bf16")


def attention(seconds: float) -> Iterator[Row]:
    """Causal attention on packed queries, keys and values, beside scaled_dot_product_attention."""
    import torch
    for batch, heads, length, depth in HEADS:
        for p in (0.0, 0.2):
            width = heads * depth
            qkv, dout = normal(batch, length, 3 * width), normal(batch, length, width)
            theirs, dtheirs = torch.from_numpy(qkv).requires_grad_(), torch.from_numpy(dout)

            def ours(qkv=qkv, dout=dout, heads=heads, p=p):
                out, norms = kernels.attention_forward(qkv, heads, True, p, 1)
                kernels.attention_backward(dout, qkv, out, norms, heads, True, p, 1)

            def torchs(theirs=theirs, dtheirs=dtheirs, heads=heads, p=p):
                split = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in theirs.chunk(3, dim=2))
                out = torch.nn.functional.scaled_dot_product_attention(*split, is_causal=True, dropout_p=p)
                torch.autograd.grad(out.transpose(1, 2).flatten(2), theirs, dtheirs)

            yield compare(f"B {batch} H {heads} T {length} D {depth}" + f", dropout {p}" * (p > 0),
                          ours, torchs, seconds)


def rows(seconds: float) -> Iterator[Row]:
    """Kernels that stream through memory, forward and backward, on 2048 x 1536; AdamW on 4 M parameters."""
    import torch
    F = torch.nn.functional
    x, dy, gain, bias = normal(2048, 1536), normal(2048, 1536), normal(1536), normal(1536)
    targets = np.random.default_rng(1).integers(0, 1536, 2048)
    t, dt, t_gain, t_bias = (torch.from_numpy(z.copy()).requires_grad_() for z in (x, dy, gain, bias))
    t_targets, dlosses = torch.from_numpy(targets), np.full(2048, 1 / 2048, np.float32)

    def layernorm():
        _, mean, rstd = kernels.layernorm_forward(x, gain, bias)
        kernels.layernorm_backward(dy, x, gain, mean, rstd)

    def cross_entropy():
        _, norms = kernels.cross_entropy_forward(x, targets)
        kernels.cross_entropy_backward(dlosses, x, targets, norms)

    def torchs(function, *inputs):
        return lambda: torch.autograd.grad(function(*inputs), inputs, dt.detach())

    yield compare("layernorm", layernorm,
                  torchs(lambda x, gain, bias: F.layer_norm(x, (1536,), gain, bias), t, t_gain, t_bias),
                  seconds)
    yield compare("softmax", lambda: kernels.softmax_backward(dy, kernels.softmax_forward(x)),
                  torchs(lambda x: F.softmax(x, -1), t), seconds)
    yield compare("GELU", lambda: kernels.gelu_backward(dy, kernels.gelu_forward(x)[1]), torchs(F.gelu, t),
                  seconds)
    yield compare("dropout", lambda: (kernels.dropout(x, 0.2, 1), kernels.dropout(dy, 0.2, 1)),
                  torchs(lambda x: F.dropout(x, 0.2), t), seconds)
    yield compare("cross-entropy", cross_entropy,
                  lambda: torch.autograd.grad(F.cross_entropy(t, t_targets), t), seconds)
    p, g, m, v = (normal(1 << 22) ** 2 for _ in range(4))
    parameter = torch.from_numpy(p.copy()).requires_grad_()
    parameter.grad = torch.from_numpy(g.copy())
    optimizer = torch.optim.AdamW([parameter], lr=1e-6, fused=True)

    def adamw():
        scale = min(1.0, 1.0 / math.sqrt(kernels.sum_of_squares([g])))
        kernels.adamw([p], [g], [m], [v], [0.1], 1, 1e-6, 0.9, 0.99, 1e-8, scale)

    def torch_adamw():
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()

    yield compare("norm, clipping and AdamW", adamw, torch_adamw, seconds)


TABLES = {"matmul": matmul, "matmul-bf16": matmul_bf16, "attention": attention, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time every kernel beside numpy or PyTorch.")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="tables to make")
    parser.add_argument("--seconds", type=float, default=0.1, help="of each side in each of three rounds")
    parser.add_argument("--json", action="store_true", help="a JSON line for each row")
    options = parser.parse_args()
    for name in options.only:
        if not options.json:
            title = " ".join((TABLES[name].__doc__ or "").split())
            print(f"\n{title}\n{'':<40}{'ours, ms':>10}{'theirs':>10}{'ratio':>8}")
        for row in TABLES[name](options.seconds):
            if options.json:
                print(json.dumps(dict(table=name, **row._asdict())), flush=True)
            else:
                print(f"{row.what:<40}{row.ours_ms:>10.3f}{row.theirs_ms:>10.3f}{row.ratio:>8.2f}",
                      flush=True)


if __name__ == "__main__":
    main()
