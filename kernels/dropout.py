"""Dropout by counter: whether an element is kept is a hash of (seed, row, column), so no mask is ever stored.

    y = x / (1 - p) where kept, else 0          dx = dy / (1 - p) where kept, else 0: the same function of dy

A flat array counts as rows of 4096. Any thread can make any part of a mask, and the backward pass makes it
again. The hash: splitmix64 (Steele, Lea, Flood 2014) makes a row's key of two 32-bit halves from the seed;
two rounds of xor, shift and multiply mix the column with them.
"""
from __future__ import annotations

import functools

import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check
from kernels.jit import flat_tasks, helper, kernel, launch

U32, U64 = np.uint32, np.uint64
ROW = 4096
WEYL, MIX1, MIX2 = U64(0x9E3779B97F4A7C15), U64(0xBF58476D1CE4E5B9), U64(0x94D049BB133111EB)
STEP, ODD1, ODD2 = U32(0x9E3779B9), U32(0x7FEB352D), U32(0x846CA68B)


def dropout(x: np.ndarray, p: float, seed: int) -> np.ndarray:
    """x of any shape -> y; called on the gradient with the same p and seed, it is the backward pass."""
    check("dropout", "x", x)
    y = memory.empty(x.shape, x.dtype)
    launch(_dropout, flat_tasks(x.size), x.reshape(-1), keep_below(p), x.dtype.type(1 / (1 - p)),
           start_of(seed), y.reshape(-1))
    return y


def dropout_mask(rows: int, columns: int, p: float, seed: int) -> np.ndarray:
    """The mask itself, (rows, columns) of bool, True where kept: in numpy, for references and tests."""
    with np.errstate(over="ignore"):
        key = splitmix(np.arange(1, rows + 1, dtype=U64)[:, None] * WEYL + start_of(seed))
        h = np.arange(columns, dtype=U32) * STEP + key.astype(U32)
        h = (h ^ (h >> U32(16))) * ODD1
        h = (h ^ (h >> U32(15))) + (key >> U64(32)).astype(U32)
        h = (h ^ (h >> U32(16))) * ODD2
        h = h ^ (h >> U32(15))
    return h <= keep_below(p)


def flat_mask(shape: tuple[int, ...], p: float, seed: int) -> np.ndarray:
    """The mask that `dropout` takes for an array of this shape."""
    size = int(np.prod(shape))
    return dropout_mask(-(-size // ROW), ROW, p, seed).reshape(-1)[:size].reshape(shape)


def keep_below(p: float) -> np.uint32:
    """The largest hash of an element that is kept; ValueError unless 0 <= p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p is {p}; the probability of dropping an element must be in [0, 1)")
    return U32(round((1 - p) * (2**32 - 1)))


def start_of(seed: int) -> np.uint64:
    """Where the sequence of row keys starts: a hash, so that no seed's sequence is another's, a row on."""
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise ValueError(f"dropout: seed is {seed!r}; it must be an integer in 0 to 2**64 - 1")
    return _start_of(int(seed))


@functools.lru_cache(256)
def _start_of(seed: int) -> np.uint64:
    with np.errstate(over="ignore"):
        return splitmix(U64(seed) + WEYL)


def splitmix(z):
    """The finaliser of splitmix64: every bit of z changes half of all bits."""
    z = (z ^ (z >> U64(30))) * MIX1
    z = (z ^ (z >> U64(27))) * MIX2
    return z ^ (z >> U64(31))


_splitmix = helper(splitmix)


@helper
def row_key(start, row):
    """The 64-bit key of a row of the mask; start: see `start_of`."""
    return _splitmix(U64(U64(row) + U64(1)) * WEYL + start)


@helper
def halves(start, row):
    """The halves of a row's key, for `kept`."""
    key = row_key(start, row)
    return U32(key & U64(0xFFFFFFFF)), U32(key >> U64(32))


@helper
def kept(low, high, column, limit):
    """Whether the column of a row is kept; low, high: the halves of the row's key."""
    h = U32(U32(column) * STEP + low)
    h = U32((h ^ (h >> U32(16))) * ODD1)
    h = U32((h ^ (h >> U32(15))) + high)
    h = U32((h ^ (h >> U32(16))) * ODD2)
    return (h ^ (h >> U32(15))) <= limit


@kernel
def _dropout(x, limit, scale, start, y, tasks):
    rows = (x.size + ROW - 1) // ROW
    for index in prange(tasks):
        task = np.int64(index)
        for row in range(rows * task // tasks, rows * (task + 1) // tasks):
            first, last = row * ROW, min(x.size, (row + 1) * ROW)
            low, high = halves(start, row)
            dropout_row(x[first:last], y[first:last], low, high, limit, scale)


@helper
def dropout_row(x, y, low, high, limit, scale):
    for j in range(x.size):
        y[j] = x[j] * scale if kept(low, high, j, limit) else x.dtype.type(0)
