"""How a matrix product is cut up: into parts of K, and C into pieces of its rows, or of its columns.

A thread goes through K part by part, while its piece of C is near. Rows of A are read where they are. With
vectors of 64 bytes, so are columns of A that few others multiply, and rows of B if they stay in the caches.
What else one thread alone reads, it copies, into the cache of its core. What all read is copied first, by all
together, or if it is small by each for itself: to wait for others and fetch from their caches takes longer.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from kernels.amx import PAIRS
from kernels.cpu import TARGET
from kernels.jit import helper, max_threads
from kernels.simd import LINE
from kernels.tile import columns, height

# Of a part of K, in steps of the register tile. A panel of B is then larger than the first-level cache, and
# comes from the second, which is fast enough; with fewer steps C would be read and written more often. The
# tile unit is faster than that cache, so its parts are less deep, but for a C that goes past the caches: to
# add to it once more would cost more.
DEPTH = 1536
DEPTH_TILES = 384           # in elements
TALLEST = 1024              # rows of a piece of rows, or of a product that is not cut
NEAR = 384 << 10            # bytes of panels of B that a block of rows goes by, in the second-level cache,
                            # or of what all threads read, for each to have it there for itself
FAR = 32 << 20              # bytes of copies of B that are made at a time, for the last-level cache; for each
                            # A is read again
REUSED = 1024               # columns that A, or rows that B is multiplied by: so many pay for a copy of it
LARGE = 4 << 20             # bytes of a matrix that will not be in the caches when it is read
SAME_SET = 4096             # rows a multiple of so many bytes apart share sets of the first-level cache,
PAD = 16                    # and rows of their copies are so many elements further apart; room, too,
                            # for the last vector that `pack_tiles`, `pair_columns` and `pair_tiles` write
ALIGN = LINE // 4           # floats: panels begin where lines of the cache do
SMALL = 1 << 16             # multiplications that are not worth a second thread
LEAST = 1 << 20             # and of a piece
MANY = 8                    # units for each thread: more of them do not help


class Plan(NamedTuple):
    """What the kernel is told."""
    transpose_a: bool
    transpose_b: bool
    bf16: bool
    half: bool               # leave out register tiles below the diagonal
    streams: bool            # C goes past the caches, once it is whole
    batch_a: int             # different A and B
    batch_b: int
    by_rows: bool            # a unit of the work is a row of register tiles
    by_panels: bool          # or a panel; if neither, a product
    most: int                # units of a piece
    least: int
    block_n: int             # columns of B at a time
    near: int                # panels that rows go by at a time
    rows: int                # of a register tile, and its width
    width: int
    first_copied: int        # the first tile of rows of A that is copied, not read where it is,
    first_panel: int         # and the first panel of B
    shared: int              # so many tiles are copied for all threads; 0: each copies its own, if any,
    own_a: int               # at most so many at a time
    own_b: bool              # each thread copies its panels of B, if any,
    kept: bool               # and once what it multiplies all its pieces by: B by rows, A by panels
    parts: int               # of K, of so many elements
    depth: int
    size_a: int              # of the copy of a tile of rows of A, and of a panel of B
    size_b: int
    end_a: int               # of all copies of A, and of B, in the scratch
    end_b: int
    room: int                # for each thread behind them: a register tile, and if an activation follows,
    #                          tiles side by side, and a row of what it gives and of what is kept


@helper
def steps(depth, bf16):
    """Of the register tile, for so many k: those of the tile unit come sixteen at a time."""
    if not bf16:
        return depth
    pairs = (depth + 1) // 2
    return (pairs + PAIRS - 1) // PAIRS * PAIRS if TARGET.tiles else pairs


@functools.lru_cache(4096)
def plan_product(count: int, m: int, n: int, k: int, batch_a: int, batch_b: int, dtype: np.dtype, bf16: bool,
                 transpose_a: bool, transpose_b: bool, row_of_a: int, half: bool,
                 activated: bool) -> tuple[tuple, int, int]:
    """The plan of count products of (m, k) and (k, n), as a plain tuple, which numba takes faster; how many
    threads can share it, and the size of its scratch. row_of_a: in bytes.
    """
    rows, width = height(bf16), columns(dtype)
    tall, panels = -(-m // rows), -(-n // width)
    streams = not half and m * n * dtype.itemsize >= LARGE and n % width == 0
    parts = max(1, -(-k // (DEPTH_TILES if bf16 and TARGET.tiles and not streams else DEPTH * (1 + bf16))))
    depth = -(-k // parts)
    depth += depth % 2 if bf16 else 0                                   # whole pairs
    by_rows, by_panels = _cut(count, m, n, k, tall, panels)
    units, multiplications = count, m * n * k
    if by_rows:
        units, multiplications = count * tall, rows * n * k
    elif by_panels:
        units, multiplications = count * panels, m * width * k
    least = max(1, LEAST // max(1, multiplications))
    most = max(least, -(-units // (2 * max_threads())))
    if by_rows:
        most = min(most, max(1, TALLEST // rows))
    deep = steps.py_func(depth, bf16)
    size_a, size_b = -(-rows * (deep + PAD) // ALIGN) * ALIGN, deep * width
    bytes_b = size_b * dtype.itemsize or 1
    beside = width * (rows + 2) * dtype.itemsize if activated else 0       # for each, in the room of a thread
    own_b, row_of_b = not by_rows and batch_b == count, n * dtype.itemsize
    # Read in place, but for a last, partial tile or panel. A step of the register tile of 64-byte vectors
    # takes long enough to fetch what it reads from the second-level cache.
    in_place = TARGET.vector_bytes == 64 and not bf16
    rows_of_a, columns_of_a = not transpose_a and not bf16, in_place and transpose_a and n < REUSED
    first_copied = m // rows if (rows_of_a or columns_of_a) and row_of_a % SAME_SET else 0
    # What all threads read, the copies of which each can keep for itself
    common = (tall - first_copied) * size_a * dtype.itemsize if by_panels else panels * (bytes_b + beside)
    kept = (by_rows or by_panels) and parts == 1 and common <= NEAR
    near_b = m < REUSED and k * row_of_b <= LARGE if own_b else not by_panels and k * row_of_b <= NEAR
    rows_of_b = in_place and not transpose_b and near_b and row_of_b % SAME_SET > 0
    own_b = own_b or rows_of_b or (by_rows and kept)
    first_panel = n // width if rows_of_b else 0
    shared = tall - first_copied if by_panels and not kept else 0
    own_a = min(most if by_rows else tall, tall - first_copied)
    copies_a = batch_a * parts * shared or max_threads() * own_a
    if not own_b:
        panels = min(panels, max(1, FAR // (batch_b * parts * bytes_b)))
    near = min(most if by_panels else panels, panels, max(1, NEAR // (bytes_b + beside)))
    end_a = copies_a * size_a
    end_b = end_a + (max_threads() * near if own_b else batch_b * parts * panels) * size_b
    room = rows * width + (near * width * (rows + 2) if activated else 0)
    plan = Plan(transpose_a, transpose_b, bf16, half, streams, batch_a, batch_b, by_rows, by_panels, most,
                least, panels * width, near, rows, width, first_copied, first_panel, shared, own_a, own_b,
                kept, parts, depth, size_a, size_b, end_a, end_b, room)
    return tuple(plan), 1 if count * m * n * k < SMALL else units, end_b + max_threads() * room


def _cut(count: int, m: int, n: int, k: int, tall: int, panels: int) -> tuple[bool, bool]:
    """Are the products cut by rows, or by panels, or not at all? The larger operand is, if there are enough
    pieces, as many for each thread, so that each has one reader; all threads read the other, or a copy.
    """
    threads = max_threads()
    if (count >= MANY * threads and m <= TALLEST) or count * m * n * k < SMALL:
        return False, False
    rounds_of_rows, rounds_of_panels = (min(units // threads, MANY) for units in (tall, panels))
    by_rows = (rounds_of_rows, m) >= (rounds_of_panels, n)
    return by_rows, not by_rows
