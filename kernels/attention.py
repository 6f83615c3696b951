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

Forward, a thread takes blocks of queries of a head against blocks of keys, and keeps for every query the
largest score so far, m, and Σ exp(s - m); when m grows, what was summed shrinks by exp(m - m'). Backward, it
takes blocks of keys against blocks of queries and makes p again from s and n.
Products are register tiles on scratch that stays in the second-level cache, or on few rows where they are;
tiles that the causal mask hides are skipped. In bfloat16 (see `kernels.matmul`) what is multiplied is rounded
on its way into the scratch, to pairs of what follows each other where a product adds up: along D for s and
dp, along keys for o and dq, along queries for dk and dv.

A mask (B, S) of bool hides the keys where it is False from all queries: their scores are -inf, and zeros
take the place of their keys and values, so that not even a NaN in them is seen. A query that sees no key
at all gets zeros, and passes no gradient on.
"""
from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import prange

from kernels import memory
from kernels.amx import PAIRS
from kernels.blocks import TILE_ROWS, TILES
from kernels.check import check
from kernels.cpu import TARGET
from kernels.dropout import keep_below, start_of
from kernels.head import QUERIES, add_parts, backward_pieces, forward_pieces
from kernels.jit import kernel, launch, max_threads
from kernels.matmul import get_matmul_precision
from kernels.share import new_counters, num_threads
from kernels.simd import LANES, LINE, ROUNDS
from kernels.tile import columns

KEYS = 512 if TARGET.vector_bytes == 64 else 320         # the most in a block, for the second-level cache,
APART = 16                                   # rows of scores are so much further apart: they share no sets
MULTIPLE = 64                                # which has a multiple of so many
FEW = 16                                     # heads: threads share each of fewer, by blocks of queries, or by
#                                              parts of the keys: by shape alone, as dq is the sum of theirs
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
        blocks, places = _plan_forward(keys, depth, q.dtype, paired)
        of_each = -(-time // QUERIES) if batch * heads < FEW else 1
        scratch = _scratch(places, q.dtype)
        launch(_attention_forward, batch * heads * of_each, q.reshape(-1), kv.reshape(-1), sizes.mask,
               out.reshape(-1), norms.reshape(-1, time), sizes.layout, sizes.causal, dropout, blocks, of_each,
               scratch, paired)
    return out, norms


def _backward(sizes: _Sizes, dout: np.ndarray, q: np.ndarray, kv: np.ndarray, out: np.ndarray,
              norms: np.ndarray, dq: np.ndarray, dkv: np.ndarray, p: float, seed: int) -> None:
    """Fill dq and dkv, which are one array where q and kv are."""
    batch, time, keys, heads, depth = sizes[:5]
    dropout = _dropout(p, seed, q.dtype)
    if out.size and keys:
        paired = _paired(keys, q.dtype, sizes.mask)
        parts = min(-(-keys // KEYS), -(-FEW // (batch * heads)))
        blocks, places = _plan_backward(time, keys, depth, q.dtype, paired,
                                        batch * heads * parts if parts > 1 else max_threads())
        scratch = _scratch(places, q.dtype)
        launch(_attention_backward, batch * heads * parts, dout.reshape(-1), q.reshape(-1), kv.reshape(-1),
               sizes.mask, out.reshape(-1), norms.reshape(-1, time), dq.reshape(-1), dkv.reshape(-1),
               sizes.layout, sizes.causal, dropout, blocks, parts, scratch, paired)


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


def _blocks(depth: int, keys: int, dtype: np.dtype) -> tuple[int, int, int]:
    """The width of a register tile; of a head, in whole tiles; how many keys are in a block."""
    tile = columns(dtype)
    return tile, _round_up(depth, tile), _round_up(min(keys, KEYS), MULTIPLE)


@functools.lru_cache(256)
def _plan_forward(keys: int, depth: int, dtype: np.dtype, paired: bool | None) -> tuple[tuple, tuple]:
    """The blocks, and the places of the scratch, in the order in which `head_forward` names it."""
    _, padded, block = blocks = _blocks(depth, keys, dtype)
    room, across = keys + TILE_ROWS, QUERIES + APART     # a register tile goes beyond the last key
    values = (room, padded) if not paired else _turned(keys, padded) if TILES else (_pairs(keys), padded)
    sums, upright = (QUERIES, padded), (0, 0)
    if TILES and paired:
        sums, upright = (padded, QUERIES), sums
    return blocks, _places(dtype, *_own(
        (room, padded), values, (QUERIES * padded,), (block + TILE_ROWS, across), sums, (4, QUERIES),
        (_pairs(block) * across if paired else 0,), upright))


@functools.lru_cache(256)
def _plan_backward(time: int, keys: int, depth: int, dtype: np.dtype,
                   paired: bool | None, sums_of_dq: int) -> tuple[tuple, tuple]:
    """As `_plan_forward`, for `head_backward`."""
    _, padded, block = blocks = _blocks(depth, keys, dtype)
    rows, across = _round_up(time, QUERIES), QUERIES + APART
    of_block, weights = (block + TILE_ROWS, padded), (block + TILE_ROWS, across)
    summed = (_pairs(rows) if paired else rows, padded)
    key_pairs = _turned(block, padded) if TILES and paired else (_pairs(block) if paired else 0, padded)
    return blocks, _places(dtype, (sums_of_dq, rows, padded), *_own(
        summed, summed, (rows * padded,), (rows * padded,), (2, rows), of_block, of_block, of_block, of_block,
        weights, weights, key_pairs, (_pairs(block) * across if paired else 0,),
        (padded, rows) if TILES and paired else (0, 0)))


def _pairs(n: int) -> int:
    """Rows of pairs of so many, in whole steps."""
    return _round_up(n, 2 * PAIRS) // 2


def _turned(n: int, padded: int) -> tuple[int, int]:
    """Columns of so many rows as rows of pairs; LANES: so that they share no cache sets."""
    return padded, _pairs(n) + LANES


def _own(*shapes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of arrays that hold one such for each thread."""
    return [(max_threads(), *shape) for shape in shapes]


def _places(dtype: np.dtype, *shapes: tuple[int, ...]) -> tuple[int, tuple]:
    """Arrays of these shapes, one behind the other: the bytes of all; the shape of each, and the byte where
    it begins, with a line of the cache.
    """
    sizes = [_round_up(math.prod(shape) * dtype.itemsize, LINE) for shape in shapes]
    starts = itertools.accumulate(sizes[:-1], initial=0)
    return sum(sizes), tuple(zip(shapes, starts, strict=True))


def _scratch(places: tuple[int, tuple], dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """The arrays of `_places`, cut from one."""
    size, cuts = places
    room = memory.empty(size, np.uint8)
    return tuple([np.ndarray(shape, dtype, room, start) for shape, start in cuts])


def _dropout(p: float, seed: int, dtype: np.dtype) -> tuple:
    return keep_below(p), dtype.type(1 / (1 - p)), start_of(seed)


@kernel
def _attention_forward(q, kv, mask, out, norms, layout, causal, dropout, blocks, of_each, scratch, paired,
                       tasks):
    threads = min(tasks, num_threads())
    counters = new_counters(threads)
    for index in prange(threads):
        forward_pieces(q, kv, mask, out, norms, layout, causal, dropout, blocks, of_each, scratch,
                       np.int64(index), threads, counters, paired)


@kernel
def _attention_backward(dout, q, kv, mask, out, norms, dq, dkv, layout, causal, dropout, blocks, parts,
                        scratch, paired, tasks):
    threads = min(tasks, num_threads())
    counters = new_counters(threads)
    for index in prange(threads):
        backward_pieces(dout, q, kv, mask, out, norms, dq, dkv, layout, causal, dropout, blocks, parts,
                        scratch, np.int64(index), threads, counters, paired)
    if parts > 1:
        time = norms.shape[1]
        for index in prange(len(norms) * ((time + QUERIES - 1) // QUERIES)):
            add_parts(scratch[0], dq, np.int64(index), time, parts, layout, causal, blocks)
