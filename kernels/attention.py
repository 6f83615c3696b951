"""Attention of queries over keys and values, without a matrix of all scores: memory grows with T, not T².
Sources: Milakov, Gimelshein 2018 (online softmax); Dao et al. 2022 (tiles recomputed in the backward pass).

For each of H heads of width D, with q the rows of T queries, k and v those of S keys, and a = 1 / √D:

    forward:   1. s_ij = a q_i · k_j     (j <= i + S - T where causal)
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
are skipped. In bfloat16 (see `kernels.matmul`) what is multiplied is rounded on its way into the scratch, to
pairs of what follows each other where a product adds up: along D for s and dp, along keys for o and dq, along
queries for dk and dv.

A mask (B, S) of bool hides the keys where it is False from all queries: their scores are -inf, and zeros
take the place of their keys and values, so that not even a NaN in them is seen. A query that sees no key
at all gets zeros, and passes no gradient on.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
from numba import prange

from kernels import memory
from kernels.amx import start_tiles, stop_tiles
from kernels.blocks import (
    TILE_ROWS,
    TILES,
    UNROLLED,
    elements,
    multiply_columns,
    multiply_panels,
    multiply_rows,
    pack_panel,
    pack_rows,
    pair_across,
    pair_down,
    pair_rows,
    read,
    turn_over,
    unpack_rows,
)
from kernels.check import check
from kernels.dropout import halves, keep_below, kept, start_of
from kernels.elementary import exp_below
from kernels.jit import helper, kernel, launch, max_threads, mover
from kernels.matmul import get_matmul_precision
from kernels.simd import LANES, LINE, ROUNDS, fill_vectors, out_of_line, row_max
from kernels.tile import ROWS, columns

QUERIES = tuple(-(-42 // rows) * rows for rows in (ROWS, TILE_ROWS))         # in a block, and in one of pairs
KEYS = 320                                   # the most keys in a block; rows of 256 would share cache sets
MANY_KEYS = 128 if TILES else 192            # from here on products in bfloat16 pay


def attention_forward(qkv: np.ndarray, heads: int, causal: bool = True, p: float = 0.0, seed: int = 0,
                      mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """qkv (B, T, 3C), queries first, then keys, then values -> out (B, T, C), norms n (B, H, T).

    C is heads x D, heads side by side. p, seed: dropout of the attention weights (see `kernels.dropout`; the
    mask's row is the number of (sequence, head, query), its column the key). mask (B, T): the keys to see.
    """
    return _forward(_sizes("attention_forward", qkv, None, heads, causal, mask), qkv, qkv, p, seed)


def attention_backward(dout: np.ndarray, qkv: np.ndarray, out: np.ndarray, norms: np.ndarray, heads: int,
                       causal: bool = True, p: float = 0.0, seed: int = 0,
                       mask: np.ndarray | None = None) -> np.ndarray:
    """dqkv (B, T, 3C), from the gradient and what the forward pass was given and gave."""
    sizes = _sizes("attention_backward", qkv, None, heads, causal, mask)
    sizes.check_results("attention_backward", dout, out, norms, qkv)
    dqkv = sizes.room()(qkv.shape, qkv.dtype)
    _backward(sizes, dout, qkv, qkv, out, norms, dqkv, dqkv, p, seed)
    return dqkv


def cross_attention_forward(q: np.ndarray, kv: np.ndarray, heads: int, causal: bool = False, p: float = 0.0,
                            seed: int = 0, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """q (B, T, C), kv (B, S, 2C), keys first, then values -> out (B, T, C), norms n (B, H, T).

    causal: the queries are those of the last T of the S tokens. mask (B, S); else as `attention_forward`.
    """
    return _forward(_sizes("cross_attention_forward", q, kv, heads, causal, mask), q, kv, p, seed)


def cross_attention_backward(dout: np.ndarray, q: np.ndarray, kv: np.ndarray, out: np.ndarray,
                             norms: np.ndarray, heads: int, causal: bool = False, p: float = 0.0,
                             seed: int = 0, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """dq (B, T, C), dkv (B, S, 2C), from the gradient and what the forward pass was given and gave."""
    sizes = _sizes("cross_attention_backward", q, kv, heads, causal, mask)
    sizes.check_results("cross_attention_backward", dout, out, norms, q)
    dq, dkv = sizes.room()(q.shape, q.dtype), sizes.room()(kv.shape, kv.dtype)
    _backward(sizes, dout, q, kv, out, norms, dq, dkv, p, seed)
    return dq, dkv


class _Sizes(NamedTuple):
    """What is attended to by what, and where it lies: rows of q and kv may hold all three, side by side."""
    batch: int
    time: int                # queries
    keys: int
    heads: int
    depth: int
    q_row: int               # elements from a query to the next
    kv_row: int              # and from a key to the next
    first_key: int           # where keys begin in a row; values follow
    causal: bool
    mask: np.ndarray         # (B S,), or empty where all keys are seen

    @property
    def layout(self) -> tuple[int, ...]:
        """What a kernel needs of it, as numbers."""
        return self.keys, self.heads, self.depth, self.q_row, self.kv_row, self.first_key

    def room(self) -> Callable[..., np.ndarray]:
        """What makes arrays for results: filled with zeros if there is nothing to attend to."""
        return memory.empty if self.batch * self.time * self.keys * self.depth else memory.zeros

    def check_results(self, name: str, dout: np.ndarray, out: np.ndarray, norms: np.ndarray,
                      like: np.ndarray) -> None:
        shape = self.batch, self.time, self.heads * self.depth
        check(name, "dout", dout, shape, like=like)
        check(name, "out", out, shape, like=like)
        check(name, "norms", norms, (self.batch, self.heads, self.time), like=like)


def _sizes(name: str, q: np.ndarray, kv: np.ndarray | None, heads: int, causal: bool,
           mask: np.ndarray | None) -> _Sizes:
    """kv: None where q is packed, (B, T, 3C)."""
    argument, parts, phrase = ("q", 1, "") if kv is not None else ("qkv", 3, "3 x ")
    check(name, argument, q, (None, None, None))
    batch, time, q_row = q.shape
    if heads < 1 or q_row % (parts * heads):
        raise ValueError(f"{name}: {argument} has a last axis of {q_row}, "
                         f"which is not {phrase}heads x D for {heads} heads")
    width = q_row // parts
    if kv is not None:
        check(name, "kv", kv, (batch, None, 2 * width), like=q)
    keys, kv_row = q.shape[1:] if kv is None else kv.shape[1:]
    if causal and time > keys:
        raise ValueError(f"{name}: q has {time} queries and kv {keys} keys; where causal, the queries are "
                         "those of the last tokens, so that there are no more of them than keys")
    if mask is None:
        mask = np.zeros(0, bool)
    elif not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != (batch, keys):
        given = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else f"a {type(mask).__name__}"
        raise ValueError(f"{name}: mask is {given}; it must be an array of bool, ({batch}, {keys}), "
                         "True where a key is seen")
    mask = np.require(mask, requirements=("C", "W")).reshape(-1)
    return _Sizes(batch, time, keys, heads, width // heads, q_row, kv_row, kv_row - 2 * width, causal, mask)


def _forward(sizes: _Sizes, q: np.ndarray, kv: np.ndarray, p: float,
             seed: int) -> tuple[np.ndarray, np.ndarray]:
    batch, time, keys, heads, depth = sizes[:5]
    dropout = _dropout(p, seed, q.dtype)
    out = sizes.room()((batch, time, heads * depth), q.dtype)
    norms = sizes.room()((batch, heads, time), q.dtype)
    if out.size and keys:
        paired = _paired(keys, q.dtype, sizes.mask)
        _, padded, block, queries = blocks = _blocks(depth, keys, q.dtype, paired)
        rows = _round_up(keys, block)
        scratch = _scratch(q.dtype, (rows * padded,), (rows, padded), (queries, padded), (queries, block),
                           (queries, padded), (2, queries))
        launch(_attention_forward, batch * heads, q.reshape(-1), kv.reshape(-1), sizes.mask, out.reshape(-1),
               norms.reshape(-1, time), sizes.layout, sizes.causal, dropout, blocks, scratch, paired)
    return out, norms


def _backward(sizes: _Sizes, dout: np.ndarray, q: np.ndarray, kv: np.ndarray, out: np.ndarray,
              norms: np.ndarray, dq: np.ndarray, dkv: np.ndarray, p: float, seed: int) -> None:
    """Fill dq and dkv, which are one array where q and kv are."""
    batch, time, keys, heads, depth = sizes[:5]
    dropout = _dropout(p, seed, q.dtype)
    if out.size and keys:
        paired = _paired(keys, q.dtype, sizes.mask)
        _, padded, block, queries = blocks = _blocks(depth, keys, q.dtype, paired)
        rows, block_rows = _round_up(time, queries), _round_up(_round_up(block, ROWS), UNROLLED)
        turned = TILES and paired                         # sums over queries are made as cᵀ there
        sums = (padded, block_rows) if turned else (block_rows, padded)
        pairs = (padded, rows // 2 + LANES) if turned else (rows // 2, padded) if paired else (0, 0)
        block_pairs = queries // 2 * block_rows if paired else 0     # LANES: so that rows share no cache sets
        scratch = _scratch(q.dtype, (rows, padded), (rows, padded), (rows, padded), (rows,),
                           (block * padded,), (block * padded,), (block, padded),
                           sums, sums, (queries, block_rows), (queries, block_rows),
                           pairs, pairs, (block_pairs,), (block_pairs,),
                           (block_rows, padded) if turned else (0, 0))
        launch(_attention_backward, batch * heads, dout.reshape(-1), q.reshape(-1), kv.reshape(-1),
               sizes.mask, out.reshape(-1), norms.reshape(-1, time), dq.reshape(-1), dkv.reshape(-1),
               sizes.layout, sizes.causal, dropout, blocks, scratch, paired)


def _paired(keys: int, dtype: np.dtype, mask: np.ndarray) -> bool | None:
    """True for products in bfloat16, else None: not under a mask, or of few keys, where rounding costs what
    it saves.

    None and True, not False and True, are types of their own: numba compiles a kernel for each, without what
    is not of the case.
    """
    return True if (get_matmul_precision() == "bf16" and dtype == np.float32 and keys >= MANY_KEYS
                    and not mask.size and ROUNDS) else None


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _blocks(depth: int, keys: int, dtype: np.dtype, paired: bool | None) -> tuple[int, int, int, int]:
    """The width of a register tile; of a head, in whole tiles; how many keys and queries are in a block."""
    tile = columns(dtype)
    return tile, _round_up(depth, tile), _round_up(min(keys, KEYS), UNROLLED), QUERIES[paired is not None]


def _dropout(p: float, seed: int, dtype: np.dtype) -> tuple:
    return keep_below(p), dtype.type(1 / (1 - p)), start_of(seed)


def _scratch(dtype: np.dtype, *shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Arrays of these shapes for each thread, cut from one, each of which begins at a line of the cache."""
    sizes = [_round_up(max_threads() * math.prod(shape), LINE // dtype.itemsize) for shape in shapes]
    starts = itertools.accumulate(sizes[:-1], initial=0)
    room = memory.empty(sum(sizes), dtype)
    return tuple([np.ndarray((max_threads(), *shape), dtype, room, start * dtype.itemsize)
                  for shape, start in zip(shapes, starts, strict=True)])


@kernel
def _attention_forward(q, kv, mask, out, norms, layout, causal, dropout, blocks, scratch, paired, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        head_forward(q, kv, mask, out, norms[task], task, layout, causal, dropout, blocks, scratch,
                     numba.get_thread_id(), paired)


@helper
def head_forward(q, kv, mask, out, norms, task, layout, causal, dropout, blocks, scratch, thread, paired):
    """One head of one sequence. paired: as `_paired` has it."""
    kept_scale = dropout[1]
    tile, padded, block, most = blocks
    key_panels, values = scratch[0][thread], scratch[1][thread]                           # of the head
    queries, scores, sums = scratch[2][thread], scratch[3][thread], scratch[4][thread]    # of a query block
    tops = scratch[5][thread]                                                             # m and Σ p
    time = norms.size
    keys, heads, depth, q_row, kv_row, _ = layout
    start, key_start, value_start, out_start = starts(task, time, layout)
    width = heads * depth
    visible = mask[task // heads * keys:(task // heads + 1) * keys]
    first = first_visible(visible)
    zero, one = norms.dtype.type(0), norms.dtype.type(1)
    lowest, scale = norms.dtype.type(-math.inf), norms.dtype.type(1 / math.sqrt(depth))
    deep = elements(depth, paired)
    for j in range(0, keys, tile):
        pack_panel(kv, key_start + j * kv_row, kv_row, min(tile, keys - j), depth,
                   key_panels, j * deep, tile, paired)
    if paired is not None:
        pair_down(kv, value_start, kv_row, depth, keys, values.reshape(-1), padded)
    else:
        pack_rows(kv, value_start, kv_row, keys, depth, one, visible, values)
    start_tiles(paired is not None)
    for i0 in range(0, time, most):
        rows = min(most, time - i0)
        pack_rows(q, start + i0 * q_row, q_row, rows, depth, scale, visible[:0], queries)
        if paired is not None:
            pair_rows(queries, rows)
        sums[:] = 0
        tops[0] = -math.inf
        tops[1] = 0
        reach = i0 + keys - time if causal else keys                   # query i sees the keys to i + reach
        for j0 in range(0, min(keys, rows + reach), block):
            count = min(block, keys - j0)
            diagonal = reach - j0
            multiply_panels(queries, 0, padded, key_panels, j0 * deep, deep, scores, block,
                            rows, count, tile, diagonal, paired)
            for i in range(rows):
                n = max(0, min(count, i + 1 + diagonal))
                if visible.size:
                    hide(scores[i], n, visible[j0:j0 + count], lowest)
                weigh(scores, i, n, tops, sums, paired)
                if kept_scale != one:
                    drop(scores, i, n, dropout, task * time + i0 + i, j0, paired)
            if paired is not None:
                pair_rows(scores, rows)
            multiply_rows(scores, block, values, elements(j0, paired) * padded, sums, 0, padded,
                          rows, count, tile, diagonal, paired)
        for i in range(rows):
            norms[i0 + i] = tops[0, i] + norms.dtype.type(math.log(tops[1, i]))
            to = out_start + (i0 + i) * width
            if first > min(keys - 1, i + reach):
                out[to:to + depth] = zero
            else:
                scale_row(sums[i], one / tops[1, i], out[to:to + depth])
    stop_tiles(paired is not None)


@helper
def starts(task, time, layout):
    """Where the queries, keys, values and outputs of a head of a sequence start."""
    keys, heads, depth, q_row, kv_row, first_key = layout
    sequence, column = task // heads, task % heads * depth
    key_start = sequence * keys * kv_row + first_key + column
    return (sequence * time * q_row + column, key_start, key_start + heads * depth,
            sequence * time * heads * depth + column)


@helper
def first_visible(visible):
    first = 0
    while first < visible.size and not visible[first]:
        first += 1
    return first


@helper
def weigh(scores, i, n, tops, sums, paired):
    """p = exp(s - m) for n keys, 0 for the others; tops carry m and Σ p of query i, earlier sums shrink."""
    zero, lowest = tops.dtype.type(0), tops.dtype.type(-math.inf)
    start, end = i * scores.shape[1], read(n, scores.shape[1], paired)
    fill_vectors(scores, start, n, end, lowest)
    m = max(tops[0, i], row_max(scores, start, n))
    base = m if m > -math.inf else zero                   # scores of -inf alone: exp(s - 0) is 0
    total = zero
    for j in range(end):
        e = exp_below(scores[i, j] - base)
        scores[i, j] = e
        total += e
    if m != tops[0, i]:
        if tops[1, i] != zero:
            shrink = exp_below(tops[0, i] - base)
            tops[1, i] *= shrink
            for d in range(sums.shape[1]):
                sums[i, d] *= shrink
        tops[0, i] = m
    tops[1, i] += total


@helper
def scale_row(x, scale, to):
    for d in range(to.size):
        to[d] = x[d] * scale


@kernel
def _attention_backward(dout, q, kv, mask, out, norms, dq, dkv, layout, causal, dropout, blocks, scratch,
                        paired, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        head_backward(dout, q, kv, mask, out, norms[task], dq, dkv, task, layout, causal, dropout, blocks,
                      scratch, numba.get_thread_id(), paired)


@helper
def head_backward(dout, q, kv, mask, out, norms, dq, dkv, task, layout, causal, dropout, blocks, scratch,
                  thread, paired):
    """As `head_forward`."""
    kept_scale = dropout[1]
    tile, padded, block, most = blocks
    queries, douts, dqueries = scratch[0][thread], scratch[1][thread], scratch[2][thread]     # of the head
    deltas = scratch[3][thread]
    key_panels, value_panels, key_block = scratch[4][thread], scratch[5][thread], scratch[6][thread]
    dkeys, dvalues = scratch[7][thread], scratch[8][thread]                                   # of a key block
    weights, dscores = scratch[9][thread], scratch[10][thread]      # p and ds of a query block with it
    query_pairs, dout_pairs = scratch[11][thread], scratch[12][thread]        # along queries, of the head
    weight_pairs, dscore_pairs = scratch[13][thread], scratch[14][thread]     # and of the blocks
    upright = scratch[15][thread]                                   # sums that a tile unit has turned over
    block_rows = weights.shape[1]
    time = norms.size
    keys, heads, depth, q_row, kv_row, _ = layout
    start, key_start, value_start, out_start = starts(task, time, layout)
    width = heads * depth
    visible = mask[task // heads * keys:(task // heads + 1) * keys]
    zero, one = norms.dtype.type(0), norms.dtype.type(1)
    scale = norms.dtype.type(1 / math.sqrt(depth))
    pack_rows(q, start, q_row, time, depth, scale, visible[:0], queries)
    pack_rows(dout, out_start, width, time, depth, one, visible[:0], douts)
    dqueries[:] = 0
    for i in range(time):
        deltas[i] = inner(douts[i], out[out_start + i * width:out_start + i * width + depth])
    if paired is not None:
        for x, pairs in ((queries, query_pairs), (douts, dout_pairs)):
            pair_across(x.reshape(-1), padded, padded, time, pairs.reshape(-1), pairs.shape[1])
            pair_rows(x, time)
    deep = elements(depth, paired)
    start_tiles(paired is not None)
    for j0 in range(0, keys, block):
        count = min(block, keys - j0)
        key_at, value_at = key_start + j0 * kv_row, value_start + j0 * kv_row
        for j in range(0, count, tile):
            for panels, begin in ((key_panels, key_at), (value_panels, value_at)):
                pack_panel(kv, begin + j * kv_row, kv_row, min(tile, count - j), depth,
                           panels, j * deep, tile, paired)
        if paired is not None:
            pair_down(kv, key_at, kv_row, depth, count, key_block.reshape(-1), padded)
        else:
            pack_rows(kv, key_at, kv_row, count, depth, one, visible[j0:j0 + count], key_block)
        dkeys[:] = 0
        dvalues[:] = 0
        first_query = max(0, j0 - (keys - time)) if causal else 0
        for i0 in range(first_query // most * most, time, most):
            rows = min(most, time - i0)
            diagonal = (i0 + keys - time if causal else keys) - j0
            at = i0 * padded
            multiply_panels(queries, at, padded, key_panels, 0, deep, weights, block_rows,
                            rows, count, tile, diagonal, paired)
            multiply_panels(douts, at, padded, value_panels, 0, deep, dscores, block_rows,
                            rows, count, tile, diagonal, paired)
            for i in range(rows):
                n = max(0, min(count, i + 1 + diagonal))
                if kept_scale != one:
                    weigh_backward_dropped(weights, dscores, i, n, norms[i0 + i], deltas[i0 + i], dropout,
                                           task * time + i0 + i, j0, paired)
                else:
                    weigh_backward(weights, dscores, i, n, norms[i0 + i], deltas[i0 + i], paired)
                if visible.size:
                    hide(weights[i], n, visible[j0:j0 + count], zero)
                    hide(dscores[i], n, visible[j0:j0 + count], zero)
            if paired is not None:
                for x, pairs in ((weights, weight_pairs), (dscores, dscore_pairs)):
                    pair_down(x.reshape(-1), 0, block_rows, block_rows, rows, pairs, block_rows)
                pair_rows(dscores, rows)
            multiply_rows(dscores, block_rows, key_block, 0, dqueries, at, padded,
                          rows, count, tile, diagonal, paired)
            if paired is not None:
                multiply_columns(weight_pairs, block_rows, dout_pairs.reshape(-1), elements(i0, paired),
                                 dout_pairs.shape[1], dvalues, dvalues.shape[1], padded,
                                 rows, count, tile, diagonal, paired)
                multiply_columns(dscore_pairs, block_rows, query_pairs.reshape(-1), elements(i0, paired),
                                 query_pairs.shape[1], dkeys, dkeys.shape[1], padded,
                                 rows, count, tile, diagonal, paired)
            else:
                multiply_columns(weights.reshape(-1), block_rows, douts.reshape(-1), i0, padded,
                                 dvalues, padded, padded, rows, count, tile, diagonal, paired)
                multiply_columns(dscores.reshape(-1), block_rows, queries.reshape(-1), i0, padded,
                                 dkeys, padded, padded, rows, count, tile, diagonal, paired)
        for x, at in ((dkeys, key_at), (dvalues, value_at)):
            if paired is not None and TILES:
                turn_over(x, upright)
                unpack_rows(upright, count, depth, one, dkv, at, kv_row)
            else:
                unpack_rows(x, count, depth, one, dkv, at, kv_row)
    stop_tiles(paired is not None)
    unpack_rows(dqueries, time, depth, scale, dq, start, q_row)


@helper
def weigh_backward(weights, dscores, i, n, norm, delta, paired):
    """p = exp(s - n), ds = p (dp - δ), in place of s and dp of query i, for n keys; 0 for the others."""
    base, end = end_backward(weights, dscores, i, n, norm, paired)
    for j in range(end):
        p = exp_below(weights[i, j] - base)
        weights[i, j] = p
        dscores[i, j] = p * (dscores[i, j] - delta)


@helper
def weigh_backward_dropped(weights, dscores, i, n, norm, delta, dropout, mask_row, first_column, paired):
    """As that, with dropout of dp, and of p for the sums of dv."""
    limit, kept_scale, start = dropout
    low, high = halves(start, mask_row)
    base, end = end_backward(weights, dscores, i, n, norm, paired)
    zero = weights.dtype.type(0)
    for j in range(end):
        p = exp_below(weights[i, j] - base)
        stays = kept(low, high, first_column + j, limit)
        weights[i, j] = p * kept_scale if stays else zero
        dscores[i, j] = p * ((dscores[i, j] * kept_scale if stays else zero) - delta)


@helper
def end_backward(weights, dscores, i, n, norm, paired):
    """What makes weights and dscores 0 from n on; the norm, or 0 for a query that sees no key; the end."""
    start, end = i * weights.shape[1], read(n, weights.shape[1], paired)
    fill_vectors(weights, start, n, end, weights.dtype.type(-math.inf))
    fill_vectors(dscores, start, n, end, weights.dtype.type(0))
    return weights.dtype.type(0) if norm == -math.inf else norm, end        # NaN goes on


@helper
def inner(x, y):
    total = y.dtype.type(0)
    for d in range(y.size):
        total += x[d] * y[d]
    return total


@mover
def hide(row, n, visible, value):
    """value in the place of what is not visible, in the first n of a row."""
    out_of_line()
    for j in range(n):
        if not visible[j]:
            row[j] = value


@mover
def drop(weights, i, n, dropout, mask_row, first_column, paired):
    """Dropout of the first n of row i of weights, behind which are zeros."""
    out_of_line()
    limit, kept_scale, start = dropout
    low, high = halves(start, mask_row)
    zero = weights.dtype.type(0)
    for j in range(read(n, weights.shape[1], paired)):
        weights[i, j] = weights[i, j] * kept_scale if kept(low, high, first_column + j, limit) else zero
