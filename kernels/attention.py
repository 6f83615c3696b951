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

A task is one head of one sequence. Forward, it takes blocks of queries against blocks of keys, and keeps for every
query the largest score so far, m, and Σ exp(s - m); when m grows, what was summed shrinks by exp(m - m'). Backward,
it takes blocks of keys against blocks of queries and makes p again from s and n. Products are register tiles on
scratch that stays in the second-level cache; tiles that the causal mask hides are skipped.
"""
from __future__ import annotations

import math

import numba
import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check
from kernels.dropout import U32, U64, keep_below, kept, row_key
from kernels.elementary import exp
from kernels.jit import helper, kernel
from kernels.simd import ROWS, columns, register_tile, row_max

QUERIES = -(-48 // ROWS) * ROWS              # queries in a block: whole register tiles


def attention_forward(qkv: np.ndarray, heads: int, causal: bool = True, p: float = 0.0,
                      seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """qkv (B, T, 3C), queries first, then keys, then values -> out (B, T, C), norms n (B, H, T).

    C is heads x D, heads side by side. p, seed: dropout of the attention weights (see `kernels.dropout`; the
    mask's row is the number of (sequence, head, query), its column the key).
    """
    batch, time, width, depth = _sizes("attention_forward", qkv, heads)
    out = memory.empty((batch, time, width), qkv.dtype)
    norms = memory.empty((batch, heads, time), qkv.dtype)
    if out.size:
        tile = columns(qkv.dtype)
        padded, keys = _round_up(depth, tile), _round_up(48, tile)
        scratch = _scratch(qkv.dtype, _round_up(time, keys) * (depth + padded)
                           + QUERIES * (depth + keys + padded + 2))
        real = qkv.dtype.type
        _attention_forward(qkv.reshape(batch, time, 3 * heads, depth), out.reshape(batch, time, heads, depth), norms,
                           causal, real(1 / math.sqrt(depth)), keep_below(p), real(1 / (1 - p)), U64(seed),
                           tile, padded, keys, scratch)
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
        tile = columns(qkv.dtype)
        padded, keys = _round_up(depth, tile), _round_up(48, tile)
        key_rows = _round_up(keys, ROWS)
        queries = _round_up(time, QUERIES)
        scratch = _scratch(qkv.dtype, queries * (3 * padded + 1) + keys * (2 * depth + padded)
                           + 2 * key_rows * padded + 2 * QUERIES * key_rows)
        real = qkv.dtype.type
        split = (batch, time, heads, depth)
        _attention_backward(dout.reshape(split), qkv.reshape(batch, time, 3 * heads, depth), out.reshape(split), norms,
                            dqkv.reshape(batch, time, 3 * heads, depth), causal, real(1 / math.sqrt(depth)),
                            keep_below(p), real(1 / (1 - p)), U64(seed), tile, padded, keys, key_rows, scratch)
    return dqkv


def _sizes(name: str, qkv: np.ndarray, heads: int) -> tuple[int, int, int, int]:
    check(name, "qkv", qkv, (None, None, None))
    batch, time, packed = qkv.shape
    if heads < 1 or packed % (3 * heads):
        raise ValueError(f"{name}: qkv has a last axis of {packed}, which is not 3 x heads x D for {heads} heads")
    return batch, time, packed // 3, packed // (3 * heads)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _scratch(dtype: np.dtype, size: int) -> np.ndarray:
    """A row of scratch for each thread."""
    return memory.empty((numba.config.NUMBA_NUM_THREADS, _round_up(size, 16)), dtype)


@kernel
def _attention_forward(qkv, out, norms, causal, scale, limit, kept_scale, seed, tile, padded, keys, scratch):
    batch, time, heads, depth = out.shape
    for task in prange(batch * heads):
        b, h = task // heads, task % heads
        head_forward(qkv[b, :, h], qkv[b, :, heads + h], qkv[b, :, 2 * heads + h], out[b, :, h], norms[b, h], causal,
                     scale, limit, kept_scale, seed, task * time, tile, padded, keys, scratch[numba.get_thread_id()])


@helper
def head_forward(q, k, v, out, norms, causal, scale, limit, kept_scale, seed, mask_row, tile, padded, keys, s):
    """One head of one sequence; s: scratch."""
    time, depth = q.shape
    rows = (time + keys - 1) // keys * keys
    key_panels, s = s[:rows * depth], s[rows * depth:]
    values, s = s[:rows * padded], s[rows * padded:]
    pack_panels(k, 0, time, rows, tile, key_panels)
    pack_padded(v, 0, time, rows, padded, norms.dtype.type(1), values)
    for i0 in range(0, time, QUERIES):
        attend(q, out, norms, i0, causal, scale, limit, kept_scale, seed, mask_row, tile, padded, keys, key_panels,
               values, s)


@helper
def attend(q, out, norms, i0, causal, scale, limit, kept_scale, seed, mask_row, tile, padded, keys, key_panels,
           values, s):
    """The outputs of the block of queries from i0 on."""
    time, depth = q.shape
    zero = norms.dtype.type(0)
    queries, s = s[:QUERIES * depth], s[QUERIES * depth:]
    scores, s = s[:QUERIES * keys], s[QUERIES * keys:]
    sums, s = s[:QUERIES * padded], s[QUERIES * padded:]
    top, total = s[:QUERIES], s[QUERIES:2 * QUERIES]
    rows = min(QUERIES, time - i0)
    pack_padded(q, i0, time, QUERIES, depth, scale, queries)
    sums[:] = zero
    top[:] = -math.inf
    total[:] = zero
    for j0 in range(0, min(time, i0 + rows) if causal else time, keys):
        count = min(keys, time - j0)
        multiply_panels(queries, depth, key_panels[j0 * depth:], depth, scores, keys, rows, count, tile,
                        i0 - j0 if causal else time)
        for i in range(rows):
            row = scores[i * keys:(i + 1) * keys]
            n = max(0, min(count, i0 + i + 1 - j0)) if causal else count
            m = max(top[i], row_max(row, 0, n))
            if m > -math.inf or n == 0:
                shrink = exp(top[i] - m) if n else norms.dtype.type(1)
                added = zero
                for j in range(n):
                    e = exp(row[j] - m)
                    row[j] = e
                    added += e
            else:                            # scores of -inf or NaN alone
                shrink = norms.dtype.type(1)
                added = zero
                for j in range(n):
                    row[j] = row[j] - row[j] if row[j] != row[j] else zero
                    added += row[j]
            row[n:] = zero
            if n:
                top[i] = m
                total[i] = total[i] * shrink + added
                for d in range(padded):
                    sums[i * padded + d] *= shrink
            if kept_scale != norms.dtype.type(1):
                drop(row, n, limit, kept_scale, seed, mask_row + i0 + i, j0)
        for i in range(0, rows, ROWS):
            n = min(count, i0 + i + ROWS - j0) if causal else count
            for d in range(0, padded, tile):
                if n > 0:
                    register_tile(scores, i * keys, keys, 1, values, j0 * padded + d, padded,
                                  sums, i * padded + d, padded, n, True)
    for i in range(rows):
        norms[i0 + i] = top[i] + norms.dtype.type(math.log(total[i]))
        inverse = norms.dtype.type(1) / total[i]
        for d in range(depth):
            out[i0 + i, d] = sums[i * padded + d] * inverse


@kernel
def _attention_backward(dout, qkv, out, norms, dqkv, causal, scale, limit, kept_scale, seed, tile, padded, keys,
                        key_rows, scratch):
    batch, time, heads, depth = out.shape
    for task in prange(batch * heads):
        b, h = task // heads, task % heads
        head_backward(dout[b, :, h], qkv[b, :, h], qkv[b, :, heads + h], qkv[b, :, 2 * heads + h], out[b, :, h],
                      norms[b, h], dqkv[b, :, h], dqkv[b, :, heads + h], dqkv[b, :, 2 * heads + h], causal, scale,
                      limit, kept_scale, seed, task * time, tile, padded, keys, key_rows,
                      scratch[numba.get_thread_id()])


@helper
def head_backward(dout, q, k, v, out, norms, dq, dk, dv, causal, scale, limit, kept_scale, seed, mask_row, tile,
                  padded, keys, key_rows, s):
    """One head of one sequence; s: scratch."""
    time, depth = q.shape
    rows = (time + QUERIES - 1) // QUERIES * QUERIES
    queries, s = s[:rows * padded], s[rows * padded:]
    douts, s = s[:rows * padded], s[rows * padded:]
    dqueries, s = s[:rows * padded], s[rows * padded:]
    delta, s = s[:rows], s[rows:]
    pack_padded(q, 0, time, rows, padded, scale, queries)
    pack_padded(dout, 0, time, rows, padded, norms.dtype.type(1), douts)
    dqueries[:] = norms.dtype.type(0)
    for i in range(time):
        total = norms.dtype.type(0)
        for d in range(depth):
            total += douts[i * padded + d] * out[i, d]
        delta[i] = total
    for j0 in range(0, time, keys):
        attend_back(k, v, dk, dv, norms, j0, causal, limit, kept_scale, seed, mask_row, tile, padded, keys, key_rows,
                    queries, douts, dqueries, delta, s)
    for i in range(time):
        for d in range(depth):
            dq[i, d] = dqueries[i * padded + d] * scale


@helper
def attend_back(k, v, dk, dv, norms, j0, causal, limit, kept_scale, seed, mask_row, tile, padded, keys, key_rows,
                queries, douts, dqueries, delta, s):
    """dk and dv of the block of keys from j0 on, and what it adds to dq."""
    time, depth = k.shape
    zero = norms.dtype.type(0)
    key_panels, s = s[:keys * depth], s[keys * depth:]
    value_panels, s = s[:keys * depth], s[keys * depth:]
    key_block, s = s[:keys * padded], s[keys * padded:]
    dkeys, s = s[:key_rows * padded], s[key_rows * padded:]
    dvalues, s = s[:key_rows * padded], s[key_rows * padded:]
    weights, s = s[:QUERIES * key_rows], s[QUERIES * key_rows:]
    dscores = s[:QUERIES * key_rows]
    count = min(keys, time - j0)
    pack_panels(k, j0, time, keys, tile, key_panels)
    pack_panels(v, j0, time, keys, tile, value_panels)
    pack_padded(k, j0, time, keys, padded, norms.dtype.type(1), key_block)
    dkeys[:] = zero
    dvalues[:] = zero
    for i0 in range(j0 // QUERIES * QUERIES if causal else 0, time, QUERIES):
        rows = min(QUERIES, time - i0)
        diagonal = i0 - j0 if causal else time
        q, do = queries[i0 * padded:], douts[i0 * padded:]
        multiply_panels(q, padded, key_panels, depth, weights, key_rows, rows, count, tile, diagonal)
        multiply_panels(do, padded, value_panels, depth, dscores, key_rows, rows, count, tile, diagonal)
        for i in range(rows):
            n = max(0, min(count, i + 1 + diagonal))
            p, ds = weights[i * key_rows:(i + 1) * key_rows], dscores[i * key_rows:(i + 1) * key_rows]
            norm, d = norms[i0 + i], delta[i0 + i]
            if kept_scale != norms.dtype.type(1):
                drop(ds, n, limit, kept_scale, seed, mask_row + i0 + i, j0)
            for j in range(n):
                p[j] = exp(p[j] - norm)
                ds[j] = p[j] * (ds[j] - d)
            if kept_scale != norms.dtype.type(1):
                drop(p, n, limit, kept_scale, seed, mask_row + i0 + i, j0)
            p[n:] = zero
            ds[n:] = zero
        for i in range(0, rows, ROWS):
            n = max(0, min(count, i + ROWS + diagonal))
            for d in range(0, padded, tile):
                register_tile(dscores, i * key_rows, key_rows, 1, key_block, d, padded,
                              dqueries, (i0 + i) * padded + d, padded, n, True)
        for j in range(0, count, ROWS):
            first = min(rows, max(0, j - diagonal))      # earlier queries do not see these keys
            for d in range(0, padded, tile):
                register_tile(weights, first * key_rows + j, 1, key_rows, do, first * padded + d, padded,
                              dvalues, j * padded + d, padded, rows - first, True)
                register_tile(dscores, first * key_rows + j, 1, key_rows, q, first * padded + d, padded,
                              dkeys, j * padded + d, padded, rows - first, True)
    for j in range(count):
        for d in range(depth):
            dk[j0 + j, d] = dkeys[j * padded + d]
            dv[j0 + j, d] = dvalues[j * padded + d]


@helper
def multiply_panels(a, a_row, panels, depth, c, c_row, rows, count, tile, diagonal):
    """C[i, j] = a_i · panel column j for the tiles that hold any j <= i + diagonal."""
    for j in range(0, count, tile):
        for i in range(0, rows, ROWS):
            if j < i + ROWS + diagonal:
                register_tile(a, i * a_row, a_row, 1, panels, j * depth, tile, c, i * c_row + j, c_row, depth, False)


@helper
def pack_padded(x, i0, time, rows, width, scale, to):
    """to[i, d] = scale x[i0 + i, d] in rows of width, zero beyond time and beyond the head's width."""
    depth = x.shape[1]
    for i in range(rows):
        if i0 + i < time:
            for d in range(depth):
                to[i * width + d] = x[i0 + i, d] * scale
            for d in range(depth, width):
                to[i * width + d] = 0
        else:
            for d in range(width):
                to[i * width + d] = 0


@helper
def pack_panels(x, j0, time, rows, tile, to):
    """x transposed, in panels of tile columns: to[panel, d, j] = x[j0 + panel tile + j, d], zero beyond time."""
    depth = x.shape[1]
    for j in range(rows):
        start = j // tile * tile * depth + j % tile
        if j0 + j < time:
            for d in range(depth):
                to[start + d * tile] = x[j0 + j, d]
        else:
            for d in range(depth):
                to[start + d * tile] = 0


@helper
def drop(row, n, limit, kept_scale, seed, mask_row, first_column):
    """Dropout of the first n elements of a row of weights."""
    key = row_key(seed, mask_row)
    low, high = U32(key & U64(0xFFFFFFFF)), U32(key >> U64(32))
    for j in range(n):
        row[j] = row[j] * kept_scale if kept(low, high, first_column + j, limit) else row.dtype.type(0)
