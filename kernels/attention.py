"""Attention over packed queries, keys and values, without a T x T matrix: memory grows with T.
Sources: Milakov, Gimelshein 2018 (online softmax); Dao et al. 2022 (tiles recomputed in the backward pass).

For each of H heads of width D, with q, k, v the rows of T tokens and a = 1 / √D:

    forward:   1. s_ij = a q_i · k_j     (j <= i where causal)
               2. p_ij = exp(s_ij - n_i),   n_i = log Σ_j exp(s_ij)
               3. o_i  = Σ_j p̃_ij v_j,      p̃ = p with dropout

    backward, by number:
               3. dv_j = Σ_i p̃_ij do_i,     dp_ij = dropout of (do_i · v_j)
               2. ds_ij = p_ij (dp_ij - δ_i),   δ_i = Σ_j p_ij dp_ij = do_i · o_i
               1. dq_i = a Σ_j ds_ij k_j,   dk_j = a Σ_i ds_ij q_i

A task is one head of one sequence. Forward, it takes blocks of queries against blocks of keys, and keeps
for every query the largest score so far, m, and Σ exp(s - m); when m grows, what was summed shrinks by
exp(m - m'). Backward, it takes blocks of keys against blocks of queries and makes p again from s and n.
Products are register tiles on scratch that stays in the second-level cache; tiles that the causal mask hides
are skipped.
"""
from __future__ import annotations

import math

import numba
import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check
from kernels.dropout import U32, U64, keep_below, kept, row_key, start_of
from kernels.elementary import exp
from kernels.jit import helper, kernel, launch, max_threads, mover
from kernels.pack import pack_transposed
from kernels.simd import ROWS, address, columns, out_of_line, register_tile, row_max

QUERIES = -(-64 // ROWS) * ROWS              # queries in a block: whole register tiles
KEYS = 128                                   # the most keys in a block


def attention_forward(qkv: np.ndarray, heads: int, causal: bool = True, p: float = 0.0,
                      seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """qkv (B, T, 3C), queries first, then keys, then values -> out (B, T, C), norms n (B, H, T).

    C is heads x D, heads side by side. p, seed: dropout of the attention weights (see `kernels.dropout`; the
    mask's row is the number of (sequence, head, query), its column the key).
    """
    batch, time, width, depth = _sizes("attention_forward", qkv, heads)
    out = memory.empty((batch, time, width), qkv.dtype)
    norms = (memory.empty if out.size else memory.zeros)((batch, heads, time), qkv.dtype)
    if out.size:
        tile, padded, keys = _blocks(depth, time, qkv.dtype)
        rows = _round_up(time, keys)
        scratch = _scratch(qkv.dtype, (rows * depth,), (rows, padded), (QUERIES, depth), (QUERIES, keys),
                           (QUERIES, padded), (2, QUERIES))
        launch(_attention_forward, batch * heads, qkv.reshape(-1), out.reshape(-1), norms.reshape(-1, time),
               heads, depth, causal, _dropout(p, seed, qkv.dtype), (tile, padded, keys), scratch)
    return out, norms


def attention_backward(dout: np.ndarray, qkv: np.ndarray, out: np.ndarray, norms: np.ndarray, heads: int,
                       causal: bool = True, p: float = 0.0, seed: int = 0) -> np.ndarray:
    """dqkv (B, T, 3C), from the gradient and what the forward pass was given and gave."""
    batch, time, width, depth = _sizes("attention_backward", qkv, heads)
    check("attention_backward", "dout", dout, (batch, time, width), like=qkv)
    check("attention_backward", "out", out, (batch, time, width), like=qkv)
    check("attention_backward", "norms", norms, (batch, heads, time), like=qkv)
    dqkv = memory.empty(qkv.shape, qkv.dtype)
    if dqkv.size:
        tile, padded, keys = _blocks(depth, time, qkv.dtype)
        rows, key_rows = _round_up(time, QUERIES), _round_up(keys, ROWS)
        scratch = _scratch(qkv.dtype, (rows, padded), (rows, padded), (rows, padded), (rows,),
                           (keys * depth,), (keys * depth,), (keys, padded),
                           (key_rows, padded), (key_rows, padded), (QUERIES, key_rows), (QUERIES, key_rows))
        launch(_attention_backward, batch * heads, dout.reshape(-1), qkv.reshape(-1), out.reshape(-1),
               norms.reshape(-1, time), dqkv.reshape(-1), heads, depth, causal, _dropout(p, seed, qkv.dtype),
               (tile, padded, keys), scratch)
    return dqkv


def _sizes(name: str, qkv: np.ndarray, heads: int) -> tuple[int, int, int, int]:
    check(name, "qkv", qkv, (None, None, None))
    batch, time, packed = qkv.shape
    if heads < 1 or packed % (3 * heads):
        raise ValueError(f"{name}: qkv has a last axis of {packed}, "
                         f"which is not 3 x heads x D for {heads} heads")
    return batch, time, packed // 3, packed // (3 * heads)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _blocks(depth: int, time: int, dtype: np.dtype) -> tuple[int, int, int]:
    """The width of a register tile; in whole tiles, the width of a head and the keys in a block."""
    tile = columns(dtype)
    return tile, _round_up(depth, tile), _round_up(min(time, KEYS), tile)


def _dropout(p: float, seed: int, dtype: np.dtype) -> tuple:
    return keep_below(p), dtype.type(1 / (1 - p)), start_of(seed)


def _scratch(dtype: np.dtype, *shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Arrays of these shapes for each thread."""
    return tuple([memory.empty((max_threads(), *shape), dtype) for shape in shapes])


@kernel
def _attention_forward(qkv, out, norms, heads, depth, causal, dropout, blocks, scratch, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        head_forward(qkv, out, norms[task], task, heads, depth, causal, dropout, blocks, scratch,
                     numba.get_thread_id())


@helper
def head_forward(qkv, out, norms, task, heads, depth, causal, dropout, blocks, scratch, thread):
    """One head of one sequence."""
    limit, kept_scale, start_of_rows = dropout
    tile, padded, keys = blocks
    key_panels, values = scratch[0][thread], scratch[1][thread]                           # of the head
    queries, scores, sums = scratch[2][thread], scratch[3][thread], scratch[4][thread]    # of a query block
    tops = scratch[5][thread]                                                             # m and Σ p
    time, width = norms.size, heads * depth
    start = task // heads * time * 3 * width + task % heads * depth
    one = norms.dtype.type(1)
    scale = norms.dtype.type(1 / math.sqrt(depth))
    for j in range(0, time, tile):
        pack_transposed(qkv, start + width + j * 3 * width, 3 * width, min(tile, time - j), depth,
                        key_panels, j * depth, tile)
    pack_rows(qkv, start + 2 * width, 3 * width, time, depth, one, values)
    for i0 in range(0, time, QUERIES):
        rows = min(QUERIES, time - i0)
        pack_rows(qkv, start + i0 * 3 * width, 3 * width, rows, depth, scale, queries)
        sums[:] = 0
        tops[0] = -math.inf
        tops[1] = 0
        for j0 in range(0, i0 + rows if causal else time, keys):
            count = min(keys, time - j0)
            diagonal = i0 - j0 if causal else time
            multiply_panels(queries, 0, depth, key_panels, j0 * depth, depth, scores, keys, rows, count, tile,
                            diagonal)
            for i in range(rows):
                n = max(0, min(count, i + 1 + diagonal))
                weigh(scores[i], n, tops, i, sums[i])
                if kept_scale != one:
                    drop(scores[i], n, limit, kept_scale, start_of_rows, task * time + i0 + i, j0)
            multiply_rows(scores, keys, values, j0 * padded, sums, 0, padded, rows, count, tile, diagonal)
        for i in range(rows):
            norms[i0 + i] = tops[0, i] + norms.dtype.type(math.log(tops[1, i]))
            to = (task // heads * time + i0 + i) * width + task % heads * depth
            scale_row(sums[i], one / tops[1, i], out[to:to + depth])


@helper
def weigh(scores, n, tops, i, sums):
    """p = exp(s - m) for n keys, 0 for the others; tops carry m and Σ p of query i, earlier sums shrink."""
    m = max(tops[0, i], row_max(scores, 0, n))
    base = m if m > -math.inf else tops.dtype.type(0)     # scores of -inf alone: exp(s - 0) is 0
    total = tops.dtype.type(0)
    for j in range(n):
        e = exp(scores[j] - base)
        scores[j] = e
        total += e
    scores[n:] = 0
    if m != tops[0, i]:
        shrink = exp(tops[0, i] - base)
        tops[0, i] = m
        tops[1, i] *= shrink
        for d in range(sums.size):
            sums[d] *= shrink
    tops[1, i] += total


@helper
def scale_row(x, scale, to):
    for d in range(to.size):
        to[d] = x[d] * scale


@kernel
def _attention_backward(dout, qkv, out, norms, dqkv, heads, depth, causal, dropout, blocks, scratch, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        head_backward(dout, qkv, out, norms[task], dqkv, task, heads, depth, causal, dropout, blocks,
                      scratch, numba.get_thread_id())


@helper
def head_backward(dout, qkv, out, norms, dqkv, task, heads, depth, causal, dropout, blocks, scratch, thread):
    """One head of one sequence."""
    limit, kept_scale, start_of_rows = dropout
    tile, padded, keys = blocks
    queries, douts, dqueries = scratch[0][thread], scratch[1][thread], scratch[2][thread]     # of the head
    deltas = scratch[3][thread]
    key_panels, value_panels, key_block = scratch[4][thread], scratch[5][thread], scratch[6][thread]
    dkeys, dvalues = scratch[7][thread], scratch[8][thread]                                   # of a key block
    weights, dscores = scratch[9][thread], scratch[10][thread]      # p and ds of a query block with it
    key_rows = weights.shape[1]
    time, width = norms.size, heads * depth
    start = task // heads * time * 3 * width + task % heads * depth
    start_out = task // heads * time * width + task % heads * depth
    one = norms.dtype.type(1)
    scale = norms.dtype.type(1 / math.sqrt(depth))
    pack_rows(qkv, start, 3 * width, time, depth, scale, queries)
    pack_rows(dout, start_out, width, time, depth, one, douts)
    dqueries[:] = 0
    for i in range(time):
        deltas[i] = inner(douts[i], out[start_out + i * width:start_out + i * width + depth])
    for j0 in range(0, time, keys):
        count = min(keys, time - j0)
        at = start + j0 * 3 * width
        for j in range(0, count, tile):
            for panels, third in ((key_panels, 1), (value_panels, 2)):
                pack_transposed(qkv, at + third * width + j * 3 * width, 3 * width, min(tile, count - j),
                                depth, panels, j * depth, tile)
        pack_rows(qkv, at + width, 3 * width, count, depth, one, key_block)
        dkeys[:] = 0
        dvalues[:] = 0
        for i0 in range(j0 // QUERIES * QUERIES if causal else 0, time, QUERIES):
            rows = min(QUERIES, time - i0)
            diagonal = i0 - j0 if causal else time
            block = i0 * padded
            multiply_panels(queries, block, padded, key_panels, 0, depth, weights, key_rows,
                            rows, count, tile, diagonal)
            multiply_panels(douts, block, padded, value_panels, 0, depth, dscores, key_rows,
                            rows, count, tile, diagonal)
            for i in range(rows):
                n = max(0, min(count, i + 1 + diagonal))
                if kept_scale != one:
                    drop(dscores[i], n, limit, kept_scale, start_of_rows, task * time + i0 + i, j0)
                weigh_backward(weights[i], dscores[i], n, norms[i0 + i], deltas[i0 + i])
                if kept_scale != one:
                    drop(weights[i], n, limit, kept_scale, start_of_rows, task * time + i0 + i, j0)
            multiply_rows(dscores, key_rows, key_block, 0, dqueries, block, padded,
                          rows, count, tile, diagonal)
            multiply_columns(weights, key_rows, douts, block, dvalues, padded, rows, count, tile, diagonal)
            multiply_columns(dscores, key_rows, queries, block, dkeys, padded, rows, count, tile, diagonal)
        unpack_rows(dkeys, count, depth, one, dqkv, at + width, 3 * width)
        unpack_rows(dvalues, count, depth, one, dqkv, at + 2 * width, 3 * width)
    unpack_rows(dqueries, time, depth, scale, dqkv, start, 3 * width)


@helper
def weigh_backward(weights, dscores, n, norm, delta):
    """p = exp(s - n), ds = p (dp - δ), in place of s and dp, for n keys; 0 for the others."""
    for j in range(n):
        p = exp(weights[j] - norm)
        weights[j] = p
        dscores[j] = p * (dscores[j] - delta)
    weights[n:] = 0
    dscores[n:] = 0


@helper
def inner(x, y):
    total = y.dtype.type(0)
    for d in range(y.size):
        total += x[d] * y[d]
    return total


# ---- products of a block of queries, i < rows, and of keys, j < count, of which j <= i + diagonal count ----

@mover
def multiply_panels(a, a_start, a_row, panels, panels_start, depth, c, c_row, rows, count, tile, diagonal):
    """C[i, j] = a_i · column j of the panels."""
    out_of_line()
    for j in range(0, count, tile):
        for i in range(0, rows, ROWS):
            if j < i + ROWS + diagonal:
                register_tile(c, address(a, a_start + i * a_row), a_row, 1,
                              address(panels, panels_start + j * depth), tile,
                              address(c, i * c_row + j), c_row, depth, 0, 0, True, False)


@mover
def multiply_rows(a, a_row, b, b_start, c, c_start, width, rows, count, tile, diagonal):
    """c_i += Σ_j A[i, j] b_j, for rows of width."""
    out_of_line()
    for i in range(0, rows, ROWS):
        n = min(count, i + ROWS + diagonal)
        for d in range(0, width, tile):
            if n > 0:
                to = address(c, c_start + i * width + d)
                register_tile(c, address(a, i * a_row), a_row, 1, address(b, b_start + d), width,
                              to, width, n, to, width, True, False)


@mover
def multiply_columns(a, a_row, b, b_start, c, width, rows, count, tile, diagonal):
    """c_j += Σ_i A[i, j] b_i, for rows of width."""
    out_of_line()
    for j in range(0, count, ROWS):
        first = max(0, j - diagonal)                     # earlier queries do not see these keys
        for d in range(0, width, tile):
            if first < rows:
                to = address(c, j * width + d)
                register_tile(c, address(a, first * a_row + j), 1, a_row,
                              address(b, b_start + first * width + d), width,
                              to, width, rows - first, to, width, True, False)


@mover
def pack_rows(x, start, stride, count, depth, scale, to):
    """to[i, d] = scale x_i[d], where x_i is x from start + i stride on; zero beyond count and depth."""
    out_of_line()
    for i in range(len(to)):
        row = to[i]
        if i < count:
            x_i = x[start + i * stride:start + i * stride + depth]
            for d in range(depth):
                row[d] = x_i[d] * scale
            row[depth:] = 0
        else:
            row[:] = 0


@mover
def unpack_rows(x, count, depth, scale, to, start, stride):
    """The way back: to_i[d] = scale x[i, d]."""
    out_of_line()
    for i in range(count):
        row, to_i = x[i], to[start + i * stride:start + i * stride + depth]
        for d in range(depth):
            to_i[d] = row[d] * scale


@mover
def drop(weights, n, limit, kept_scale, start, mask_row, first_column):
    """Dropout of the first n of a row of weights."""
    out_of_line()
    key = row_key(start, mask_row)
    low, high = U32(key & U64(0xFFFFFFFF)), U32(key >> U64(32))
    zero = weights.dtype.type(0)
    for j in range(n):
        weights[j] = weights[j] * kept_scale if kept(low, high, first_column + j, limit) else zero
