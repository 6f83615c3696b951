"""Matrix products: A B, A Bᵀ, Aᵀ B, over batches.

    y = x Wᵀ          dx = dy W          dW = dyᵀ x

B is copied once into panels as wide as the register tile, so that the tile reads it in order; Aᵀ into panels
as high as the tile. Blocks of K keep a panel of B in the first-level cache; blocks of rows keep A in the
second. Every sum over K runs in the same order however C is cut up, so the bits do not depend on the number
of threads.
"""
from __future__ import annotations

import math

import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check
from kernels.gelu import gelu_row
from kernels.jit import helper, kernel, launch
from kernels.pack import pack_columns, pack_panel_of_a, pack_transposed
from kernels.simd import ROWS, columns, register_tile

BLOCK_K = 384               # a panel of B: 384 x 2 vectors of 32 bytes is 24 KB of a 32 KB first-level cache
BLOCK_N = 4096              # packed B: 384 x 4096 floats is 6 MB, in the last-level cache
BLOCK_M = 16 * ROWS         # the most rows of A in a task: about 100 x 384 floats, in the second-level cache
TASKS = 16                  # as many tasks as keep a small machine evenly busy
SMALL = 1 << 16             # multiplications of a product that is not worth a second thread


def matmul(a: np.ndarray, b: np.ndarray, transpose_a: bool = False, transpose_b: bool = False) -> np.ndarray:
    """op(a) @ op(b), where op swaps the last two axes if asked: (..., M, K) @ (..., K, N) -> (..., M, N).

    Leading axes are broadcast. Both arrays C-contiguous, both float32 or both float64.
    """
    for name, x in (("a", a), ("b", b)):
        check("matmul", name, x)
        if x.ndim < 2:
            raise ValueError(f"matmul: {name} has shape {x.shape}; it must have two axes or more")
    if a.dtype != b.dtype:
        raise TypeError(f"matmul: a is {a.dtype}, b is {b.dtype}; convert one of them")
    m, k = a.shape[-2:] if not transpose_a else a.shape[:-3:-1]
    k_b, n = b.shape[-2:] if not transpose_b else b.shape[:-3:-1]
    if k != k_b:
        raise ValueError(f"matmul: inner sizes differ: a is {a.shape}{' transposed' * transpose_a}, "
                         f"b is {b.shape}{' transposed' * transpose_b}")
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    c = memory.empty((*batch, m, n), a.dtype)
    if c.size:
        a, b = _flat_batch(a, batch), _flat_batch(b, batch)
        _product(a, b, c.reshape(-1, m, n), k, transpose_a, transpose_b)
    return c


def _flat_batch(x: np.ndarray, batch: tuple[int, ...]) -> np.ndarray:
    """x as (1, ., .), if it is one matrix for the whole batch, else as (count, ., .)."""
    if math.prod(x.shape[:-2]) not in (1, math.prod(batch)):
        x = np.broadcast_to(x, batch + x.shape[-2:]).copy()
    return x.reshape(-1, *x.shape[-2:]) if x.size else np.zeros((1, *x.shape[-2:]), x.dtype)


def linear_forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None,
                   approximate: bool | None = None) -> tuple[np.ndarray, np.ndarray]:
    """x (N, K), weight (M, K), bias (M,) or None -> y (N, M) and what it was before the activation.

    approximate: None for no activation (both results are one array), else that of `gelu_forward`.
    """
    check("linear_forward", "x", x, (None, None))
    check("linear_forward", "weight", weight, (None, x.shape[1]), like=x)
    if bias is not None:
        check("linear_forward", "bias", bias, weight.shape[:1], like=x)
    before = memory.empty((len(x), len(weight)), x.dtype)
    y = before if approximate is None else memory.empty(before.shape, x.dtype)
    if y.size:
        _product(x[None], weight[None], before[None], x.shape[1], False, True, bias,
                 None if y is before else y[None], bool(approximate))
    return y, before


def column_sum(x: np.ndarray) -> np.ndarray:
    """The sum of the rows of x (N, C) -> (C,)."""
    check("column_sum", "x", x, (None, None))
    return matmul(np.ones((1, len(x)), x.dtype), x)[0]


def _product(a, b, c, k, transpose_a, transpose_b, bias=None, activated=None, approximate=False):
    """c = op(a) @ op(b) + bias, activated = gelu(c), all 3-D; a or b may have a batch of one."""
    count, m, n = c.shape
    width = columns(c.dtype)
    panels = -(-min(n, BLOCK_N) // width)
    wanted = -(-TASKS // count) if m * n * k >= SMALL else 1
    blocks = max(-(-m // BLOCK_M), min(-(-m // ROWS), wanted))
    chunks = max(1, min(panels, wanted // blocks))
    panel_size = min(k, BLOCK_K) * width
    packed = memory.empty(len(b) * panels * panel_size, c.dtype)
    none = c[:0]
    launch(_multiply, count * blocks * chunks, a, b.reshape(-1), len(b), c, k, transpose_a, transpose_b,
           blocks, chunks, width, packed, panel_size, none[:, 0, 0] if bias is None else bias,
           none if activated is None else activated, approximate)


@kernel
def _multiply(a, b, batch_b, c, k, transpose_a, transpose_b, blocks, chunks, width, packed, panel_size,
              bias, activated, approximate, tasks):
    m, n = c.shape[1:]
    height = (m + ROWS - 1) // ROWS                 # in register tiles
    for n0 in range(0, n, BLOCK_N):
        panels = (min(BLOCK_N, n - n0) + width - 1) // width
        for k0 in range(0, max(k, 1), BLOCK_K):
            depth = min(BLOCK_K, k - k0)
            for index in prange(batch_b * panels):
                task = np.int64(index)
                batch, panel = task // panels, task % panels
                j = n0 + panel * width
                to = task * panel_size
                if transpose_b:
                    pack_transposed(b, (batch * n + j) * k + k0, k, min(width, n - j), depth,
                                    packed, to, width)
                else:
                    pack_columns(b, (batch * k + k0) * n + j, n, min(width, n - j), depth,
                                 packed, to, width)
            for index in prange(tasks):
                task = np.int64(index)
                batch, rest = task // (blocks * chunks), task % (blocks * chunks)
                block, chunk = rest // chunks, rest % chunks
                i0, i1 = height * block // blocks * ROWS, min(m, height * (block + 1) // blocks * ROWS)
                first, last = panels * chunk // chunks, panels * (chunk + 1) // chunks
                multiply_block(a[batch if len(a) > 1 else 0], packed, batch * panels if batch_b > 1 else 0,
                               panel_size, c[batch], i0, i1, k0, depth, n0, width, first, last, transpose_a)
                if k0 + depth == k and (bias.size or len(activated)):
                    finish_block(c[batch], bias, activated[batch:batch + 1], approximate,
                                 i0, i1, n0 + first * width, min(n, n0 + last * width))


@helper
def finish_block(c, bias, activated, approximate, i0, i1, j0, j1):
    """Bias and activation of rows i0 to i1 and columns j0 to j1, while they are in the cache."""
    for i in range(i0, i1):
        row = c[i, j0:j1]
        if bias.size:
            for j in range(j1 - j0):
                row[j] += bias[j0 + j]
        if len(activated):
            gelu_row(row, activated[0, i, j0:j1], approximate)


@helper
def multiply_block(a, packed, first_panel, panel_size, c, i0, i1, k0, depth, n0, width, first, last,
                   transposed):
    """Rows i0 to i1 and panels first to last of C (+)= op(A) B, for k0 to k0 + depth."""
    n, stride = c.shape[1], a.shape[1]
    add = k0 > 0
    packed_a = np.empty(((i1 - i0 + ROWS - 1) // ROWS, depth, ROWS), c.dtype)
    edge = np.empty((ROWS, width), c.dtype)
    for i in range(i0, i1, ROWS):
        if transposed or i + ROWS > i1:
            pack_panel_of_a(a, packed_a[(i - i0) // ROWS], i, i1, k0, depth, transposed)
    for panel in range(first, last):
        j = n0 + panel * width
        b = (first_panel + panel) * panel_size
        for i in range(i0, i1, ROWS):
            p = (i - i0) // ROWS * depth * ROWS
            if i + ROWS <= i1 and j + width <= n:           # spelt out: to choose arrays is slow
                if transposed:
                    register_tile(packed_a, p, 1, ROWS, packed, b, width, c, i * n + j, n, depth, add)
                else:
                    at = i * stride + k0
                    register_tile(a, at, stride, 1, packed, b, width, c, i * n + j, n, depth, add)
            else:
                if transposed or i + ROWS > i1:
                    register_tile(packed_a, p, 1, ROWS, packed, b, width, edge, 0, width, depth, False)
                else:
                    at = i * stride + k0
                    register_tile(a, at, stride, 1, packed, b, width, edge, 0, width, depth, False)
                for r in range(min(ROWS, i1 - i)):
                    for s in range(min(width, n - j)):
                        c[i + r, j + s] = edge[r, s] + (c[i + r, j + s] if add else 0)
