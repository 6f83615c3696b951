"""Matrix products: A B, A Bᵀ, Aᵀ B, over batches.

    y = x Wᵀ          dx = dy W          dW = dyᵀ x

B is copied once into panels as wide as the register tile, so that the tile reads it in order. A is read where
it is, but for a last partial tile of rows, and for rows whose distance makes them share a few sets of the
cache; for products in bfloat16 both are copied, and rounded on the way. Blocks of K keep a panel of B near;
blocks of rows keep A in the second-level cache. Every sum over K runs in the same order however C is cut up,
so the bits do not depend on the number of threads.
"""
from __future__ import annotations

import math
import threading

import numba
import numpy as np
from numba import prange

from kernels import memory
from kernels.amx import PAIRS, start_tiles, stop_tiles
from kernels.check import check
from kernels.cpu import TARGET
from kernels.gelu import gelu_row
from kernels.jit import helper, kernel, launch, max_threads, mover, row_tasks
from kernels.pack import (
    mirror_stripe,
    pack_columns,
    pack_transposed,
    pair_columns,
    pair_row,
    pair_rows_of_columns,
    pair_tiles,
    pair_transposed,
)
from kernels.relu2 import relu2_row
from kernels.simd import LANES, LINE, ROUNDS, address, finish_streams, out_of_line, stream_rows
from kernels.tile import columns, height, register_tile

# Depth of a panel of B: 24 KB of 32-byte vectors, for the first-level cache. Of 64-byte vectors it comes from
# the second, which is fast enough, as a step takes 14 cycles or more.
BLOCK_K = 768 if TARGET.vector_bytes == 64 else 384
BLOCK_K_TILES = 384
BLOCK_N = 4096              # columns of packed B: 768 x 4096 floats are 12 MB, in the last-level cache
BLOCK_M = 16                # register tiles of A in a task: 224 x 768 floats, in the second-level cache, or
                            # 512 x 384 pairs on a tile unit
NEAR = 32                   # panels of B for a block of rows: 32 of 192 x 32 pairs are 768 KB, in that cache
GROUP = 2                   # register tiles of A, or panels of B, that are copied at a time
SAME_SET = 4096             # rows a multiple of so many bytes apart share sets of the first-level cache,
PAD = 16                    # and the rows of their copies are so many elements apart that they do not; room,
                            # too, for the last vector that `pair_columns` and `pair_tiles` write
ALIGN = LINE // 4           # floats: panels begin where lines of the cache do
TASKS = 16                  # as many tasks as keep a small machine evenly busy
SMALL = 1 << 16             # multiplications of a product that is not worth a second thread
LARGE = 4 << 20             # bytes of a result that will not be in the caches when it is read
TILES = TARGET.tiles
GELU, GELU_TANH, RELU2 = range(3)
ACTIVATIONS = {"gelu": GELU, "gelu_tanh": GELU_TANH, "relu2": RELU2}


class _State(threading.local):
    """What a thread asked for."""
    precision = "highest"


_state = _State()


def set_matmul_precision(precision: str) -> None:
    """How `matmul`, `linear_forward` and attention multiply float32 in this thread: "highest" in float32,
    "bf16" with operands rounded to bfloat16 (relative error up to 2**-8 of each product).

    Sums are float32 either way; float64 and column sums are as always, as is attention of fewer than 192
    keys, under a mask, or on a CPU with a tile unit. RuntimeError where there are no such products.
    """
    if precision not in ("highest", "bf16"):
        raise ValueError(f"set_matmul_precision: precision is {precision!r}; it must be 'highest' or 'bf16'")
    if precision == "bf16" and not TARGET.bf16:
        raise RuntimeError(f"set_matmul_precision: this CPU ({TARGET.name}) has no products in bfloat16; "
                           "'highest' works everywhere")
    _state.precision = precision


def get_matmul_precision() -> str:
    """What `set_matmul_precision` was given in this thread: "highest" if nothing."""
    return _state.precision


def matmul(a: np.ndarray, b: np.ndarray, transpose_a: bool = False, transpose_b: bool = False,
           exact: bool = False) -> np.ndarray:
    """op(a) @ op(b), where op swaps the last two axes if asked: (..., M, K) @ (..., K, N) -> (..., M, N).

    Leading axes are broadcast. Both arrays C-contiguous, both float32 or both float64. exact: in their own
    precision, whatever `set_matmul_precision` says.
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
    batch = () if a.ndim == b.ndim == 2 else np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    c = memory.empty((*batch, m, n), a.dtype)
    if c.size:
        a, b = _flat_batch(a, batch), _flat_batch(b, batch)
        _product(a, b, c.reshape(-1, m, n), k, transpose_a, transpose_b, exact=exact)
    return c


def symmetric_matmul(a: np.ndarray, b: np.ndarray, transpose_a: bool = False, transpose_b: bool = False,
                     exact: bool = False, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """a (n, ., .), b (n, ., .) -> scale op(a) @ op(b) + shift I (n, M, M), which must be symmetric.

    Arguments else as `matmul`'s. What is above the diagonal is computed, and copied below it.
    """
    check("symmetric_matmul", "a", a, (None, None, None))
    k, m = a.shape[1:] if transpose_a else a.shape[:0:-1]
    check("symmetric_matmul", "b", b, (len(a), m, k) if transpose_b else (len(a), k, m), like=a)
    c = memory.empty((len(a), m, m), a.dtype)
    if c.size:
        _product(a, b, c, k, transpose_a, transpose_b, exact=exact, mirrored=(scale, shift))
    return c


def _flat_batch(x: np.ndarray, batch: tuple[int, ...]) -> np.ndarray:
    """x as (1, ., .), if it is one matrix for the whole batch, else as (count, ., .)."""
    if math.prod(x.shape[:-2]) not in (1, math.prod(batch)):
        x = np.broadcast_to(x, batch + x.shape[-2:]).copy()
    return x.reshape(-1, *x.shape[-2:]) if x.size else np.zeros((1, *x.shape[-2:]), x.dtype)


def linear_forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None,
                   activation: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """x (N, K), weight (M, K), bias (M,) or None -> y (N, M) and what the activation's backward pass takes.

    activation: None, "gelu", "gelu_tanh" or "relu2". For the GELUs the second result is what y was before,
    else it is y itself.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"linear_forward: activation is {activation!r}; it must be None or one of "
                         f"{', '.join(map(repr, ACTIVATIONS))}")
    check("linear_forward", "x", x, (None, None))
    check("linear_forward", "weight", weight, (None, x.shape[1]), like=x)
    if bias is not None:
        check("linear_forward", "bias", bias, weight.shape[:1], like=x)
    kept = memory.empty((len(x), len(weight)), x.dtype)
    y = kept if activation in (None, "relu2") else memory.empty(kept.shape, x.dtype)
    if y.size:
        _product(x[None], weight[None], kept[None], x.shape[1], False, True, bias,
                 None if activation is None else y[None], ACTIVATIONS.get(activation or "", GELU))
    return y, kept


def column_sum(x: np.ndarray) -> np.ndarray:
    """The sum of the rows of x (N, C) -> (C,)."""
    check("column_sum", "x", x, (None, None))
    tasks = row_tasks(x)
    partial = memory.zeros((tasks, x.shape[1]), x.dtype)
    launch(_column_sum, tasks, x, partial)
    return np.sum(partial, axis=0, out=memory.empty(x.shape[1], x.dtype))


@kernel
def _column_sum(x, partial, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        add_rows(x, len(x) * task // tasks, len(x) * (task + 1) // tasks, partial[task])


@helper
def add_rows(x, first, last, total):
    """Four rows at a time, as the total is read and written for each."""
    whole = first + (last - first) // 4 * 4
    for i in range(first, whole, 4):
        a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(total.size):
            total[j] += (a[j] + b[j]) + (c[j] + d[j])
    for i in range(whole, last):
        a = x[i]
        for j in range(total.size):
            total[j] += a[j]


def _product(a, b, c, k, transpose_a, transpose_b, bias=None, activated=None, activation=GELU, exact=False,
             mirrored=None):
    """c = op(a) @ op(b) + bias, activated = activation(c), all 3-D; a or b may have a batch of one.

    activated: for "relu2" c itself, as its backward pass needs no more. exact: in the arrays' own precision,
    whatever `set_matmul_precision` says. mirrored: (scale, shift) of a product that is symmetric, and has no
    bias.
    """
    count, m, n = c.shape
    bf16 = _state.precision == "bf16" and c.dtype == np.float32 and not exact
    rows, width = height(bf16), columns(c.dtype)
    tall = -(-m // rows)                                                                  # in register tiles
    most_deep = BLOCK_K_TILES if bf16 and TILES and m * n * 4 < LARGE else BLOCK_K
    panels, depth = -(-min(n, BLOCK_N) // width), -(-k // max(1, -(-k // most_deep)))     # K in like parts,
    depth += depth % 2 if bf16 else 0                                                     # of whole pairs
    wanted = -(-TASKS // count) if m * n * k >= SMALL else 1
    blocks = -(-tall // BLOCK_M)
    chunks = max(1, min(panels, wanted // blocks))
    blocks = max(blocks, min(tall, -(-wanted // chunks)))
    # A is read where it is, but for the rows of a last, partial tile.
    first_copied = m // rows if a.strides[1] % SAME_SET and not bf16 else 0
    deep = steps.py_func(depth, bf16)
    size_a, size_b = -(-rows * (deep + PAD) // ALIGN) * ALIGN, deep * width
    # A block that many tasks need is copied for all of them; else by its task, into the cache of its core.
    shared = tall - first_copied if chunks > 1 else 0
    copies = len(a) * shared or max_threads() * min(-(-tall // blocks), tall - first_copied)
    end_a = copies * size_a
    end_b = end_a + len(b) * panels * size_b
    scratch = memory.empty(end_b + max_threads() * rows * width, c.dtype)
    none = c[:0]
    scale, shift = map(c.dtype.type, mirrored or (1, 0))
    launch(_multiply, count * blocks * chunks, a, b.reshape(-1), len(b), c, k, transpose_a, transpose_b,
           (blocks, chunks, rows, width, first_copied, shared, depth, size_a, size_b),
           (mirrored is not None, scale, shift), bf16, scratch[:end_a], scratch[end_a:end_b],
           scratch[end_b:].reshape(-1, rows, width), none[:, 0, 0] if bias is None else bias,
           none if activated is None else activated, activation)


@kernel
def _multiply(a, b, batch_b, c, k, transpose_a, transpose_b, sizes, mirrored, bf16, packed_a, packed_b,
              edges, bias, activated, activation, tasks):
    blocks, chunks, rows, width, first_copied, shared, most_deep, size_a, size_b = sizes
    half, scale, shift = mirrored
    m, n = c.shape[1:]
    tall = (m + rows - 1) // rows                   # in register tiles
    streams = m * n * c.itemsize >= LARGE and n % (width // 2) == 0 and not half and not len(activated)
    groups = (shared + GROUP - 1) // GROUP
    own = min((tall + blocks - 1) // blocks, tall - first_copied)      # tiles that a task copies, at the most
    for n0 in range(0, n, BLOCK_N):
        panels = (min(BLOCK_N, n - n0) + width - 1) // width
        for k0 in range(0, max(k, 1), max(most_deep, 1)):
            depth = min(most_deep, k - k0)
            stacks = batch_b * ((panels + GROUP - 1) // GROUP)
            for index in prange(stacks + len(a) * groups):
                task = np.int64(index)
                # Those of A are in the middle, where threads part as they do below.
                place = task - (stacks + 1) // 2
                if 0 <= place < len(a) * groups:
                    pack_group(a[place // groups], packed_a, place // groups * shared - first_copied,
                               first_copied + place % groups * GROUP, rows, m, k0, depth, size_a,
                               transpose_a, bf16)
                else:
                    pack_stack(b, packed_b, task if place < 0 else task - len(a) * groups, panels, n0, n,
                               k0, k, depth, width, size_b, transpose_b, bf16)
            for index in prange(tasks):
                task = np.int64(index)
                batch, rest = task // (blocks * chunks), task % (blocks * chunks)
                block, chunk = rest // chunks, rest % chunks
                batch_a, i0 = batch if len(a) > 1 else 0, tall * block // blocks
                i1 = tall * (block + 1) // blocks
                first, last = panels * chunk // chunks, panels * (chunk + 1) // chunks
                thread, copied = numba.get_thread_id(), max(i0, first_copied)
                copy = batch_a * shared - first_copied if shared else thread * own - copied       # of tile 0
                if not shared:
                    pack_block(a[batch_a], packed_a, copy * size_a, copied, i1, rows, m, k0, depth, size_a,
                               transpose_a, bf16)
                multiply_block(a[batch_a], packed_a, copy * size_a, first_copied, size_a, packed_b,
                               (batch * panels if batch_b > 1 else 0) * size_b, size_b, bias, edges[thread],
                               c[batch], i0, i1, k0, depth, n0, rows, width, first, last, half, streams,
                               transpose_a, bf16)
                if k0 + depth == k and len(activated):
                    activate_block(c[batch], activated[batch], activation, i0 * rows, min(m, i1 * rows),
                                   n0 + first * width, min(n, n0 + last * width))
    if half:
        stripes = (n + width - 1) // width
        for index in prange(len(c) * stripes):
            task = np.int64(index)
            mirror_stripe(c[task // stripes], task % stripes * width, width, scale, shift)


@helper
def steps(depth, bf16):
    """Of the register tile, for so many k: those of the tile unit come sixteen at a time."""
    if not bf16:
        return depth
    pairs = (depth + 1) // 2
    return (pairs + PAIRS - 1) // PAIRS * PAIRS if TILES else pairs


@helper
def pack_stack(b, packed, task, panels, n0, n, k0, k, depth, width, size, transposed, bf16):
    """A few panels of one matrix of B."""
    stacks = (panels + GROUP - 1) // GROUP
    first = task % stacks * GROUP
    for panel in range(first, min(first + GROUP, panels)):
        pack_b(b, packed, task // stacks, panel, n0, n, k0, k, depth, width, size, transposed, bf16)


@mover
def pack_b(b, packed, batch, panel, n0, n, k0, k, depth, width, size, transposed, bf16):
    """A panel of one matrix of B: see `kernels.pack`."""
    out_of_line()
    j = n0 + panel * width
    to = (batch * ((min(BLOCK_N, n - n0) + width - 1) // width) + panel) * size
    start, stride = ((batch * n + j) * k + k0, k) if transposed else ((batch * k + k0) * n + j, n)
    if transposed and bf16:
        pair_transposed(b, start, stride, min(width, n - j), depth, packed, to, width)
    elif transposed:
        pack_transposed(b, start, stride, min(width, n - j), depth, packed, to, width)
    elif bf16:
        pair_columns(b, start, stride, min(width, n - j), depth, packed, to, width)
    else:
        pack_columns(b, start, stride, min(width, n - j), depth, packed, to, width)
    if bf16:
        packed[to + (depth + 1) // 2 * width:to + steps(depth, bf16) * width] = 0


@mover
def pack_a(a, packed, start, tile, rows, m, k0, depth, size, transposed, bf16):
    """The rows of one register tile of op(A), to packed[start]: k by k if transposed, else row by row.

    The tile unit takes them row by row alone.
    """
    out_of_line()
    i0, count = tile * rows, min(rows, m - tile * rows)
    flat, k, deep = a.reshape(-1), a.shape[1], steps(depth, bf16)
    if transposed and bf16:
        pair_columns(flat, k0 * m + i0, m, count, depth, packed, start, rows)
    elif transposed:
        for p in range(depth):
            for i in range(count):
                packed[start + p * rows + i] = flat[(k0 + p) * m + i0 + i]
            for i in range(count, rows):
                packed[start + p * rows + i] = 0
    else:
        for i in range(rows):
            row, to = (i0 + i) * k + k0, start + i * (size // rows)
            if i >= count:
                packed[to:to + deep] = 0
            elif bf16:
                pair_row(flat, row, depth, packed, to)
                packed[to + (depth + 1) // 2:to + deep] = 0
            else:
                for p in range(depth):
                    packed[to + p] = flat[row + p]


@helper
def pack_group(a, packed, before, first, rows, m, k0, depth, size, transposed, bf16):
    """A few register tiles of op(A); before: tiles in `packed` before its tile 0."""
    last = min(first + GROUP, (m + rows - 1) // rows)
    pack_block(a, packed, before * size, first, last, rows, m, k0, depth, size, transposed, bf16)


@mover
def pack_block(a, packed, start, first, last, rows, m, k0, depth, size, transposed, bf16):
    """Register tiles first to last of op(A), each at start + its number times size."""
    whole = first
    if transposed and bf16 and TILES:
        i0 = first * rows
        pair_rows_of_columns(a.reshape(-1), k0 * m + i0, m, min(m, last * rows) - i0, depth, packed,
                             start + first * size, size // rows)
        whole = last
    elif transposed and bf16 and ROUNDS and rows <= LANES and depth % 2 == 0:
        whole = max(first, min(last, m // rows))
        pair_tiles(a.reshape(-1), k0 * m + first * rows, m, whole - first, depth, packed,
                   start + first * size, rows, size)
    for tile in range(whole, last):
        pack_a(a, packed, start + tile * size, tile, rows, m, k0, depth, size, transposed, bf16)


@helper
def activate_block(c, activated, activation, i0, i1, j0, j1):
    """The activation of rows i0 to i1 and columns j0 to j1, while they are in the cache; RELU2 in place."""
    for i in range(i0, i1):
        row = c[i, j0:j1]
        if activation == RELU2:
            relu2_row(row, row)
        else:
            gelu_row(row, activated[i, j0:j1], activation == GELU_TANH)


@helper
def multiply_block(a, packed_a, start_a, first_copied, size_a, b, start_b, size_b, bias, edge, c, i0, i1, k0,
                   depth, n0, rows, width, first, last, half, streams, transposed, bf16):
    """Register tiles i0 to i1 and panels first to last of C (+)= op(A) B (+ bias), for k0 to k0 + depth.

    half: leave out tiles below the diagonal; edge: scratch for a tile that reaches beyond C.
    """
    (m, n), deep = c.shape, steps(depth, bf16)
    start_tiles(bf16)
    for panel0 in range(first, last, NEAR):
        for tile in range(i0, i1):
            i = tile * rows
            if tile < first_copied and transposed:
                a_at, row, step = address(a, k0 * m + i), 1, m
            elif tile < first_copied:
                a_at, row, step = address(a, i * a.shape[1] + k0), a.shape[1], 1
            elif transposed and not (bf16 and TILES):
                a_at, row, step = address(packed_a, start_a + tile * size_a), 1, rows
            else:
                a_at, row, step = address(packed_a, start_a + tile * size_a), size_a // rows, 1
            seen = max(panel0, (i - n0) // width) if half else panel0
            for panel in range(seen, min(last, panel0 + NEAR)):
                j = n0 + panel * width
                b_at = address(b, start_b + panel * size_b)
                if streams and i + rows <= m and j + width <= n:
                    to, before, before_row = address(edge, 0), 0, 0
                    if k0 > 0:
                        before, before_row = address(c, i * n + j), n
                    elif bias.size:
                        before = address(bias, j)
                    register_tile(c, a_at, row, step, b_at, width, to, width, deep, before, before_row, True,
                                  bf16)
                    stream_rows(edge, 0, width, c, i * n + j, n, rows, 2)
                elif i + rows <= m and j + width <= n:
                    to, before, before_row = address(c, i * n + j), 0, 0
                    if k0 > 0:
                        before, before_row = to, n
                    elif bias.size:
                        before = address(bias, j)
                    register_tile(c, a_at, row, step, b_at, width, to, n, deep, before, before_row, True,
                                  bf16)
                else:
                    for r in range(min(rows, m - i)):
                        for s in range(min(width, n - j)):
                            edge[r, s] = c[i + r, j + s] if k0 > 0 else bias[j + s] if bias.size else 0
                    to = address(edge, 0)
                    register_tile(c, a_at, row, step, b_at, width, to, width, deep, to, width,
                                  2 * (n - j) > width, bf16)
                    for r in range(min(rows, m - i)):
                        for s in range(min(width, n - j)):
                            c[i + r, j + s] = edge[r, s]
    stop_tiles(bf16)
    if streams:
        finish_streams()
