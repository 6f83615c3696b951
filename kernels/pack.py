"""Copies of operands into the order in which the register tile reads them, and of half a result to the rest.

A panel of B is as wide as the tile: for each k its columns side by side. For products in bfloat16 an element
of a copy is a pair: the values of two successive k, rounded, in the halves of a float32.
"""
from __future__ import annotations

import numpy as np

from kernels.jit import exact, helper, mover
from kernels.plan import steps
from kernels.simd import (
    LANES,
    ROUNDS,
    bits,
    compact,
    copy_columns,
    copy_tile_rows,
    from_bits,
    prefetch_columns,
    round_in_turn,
    round_interleaved,
    transpose_block,
)
from kernels.tile import ROWS

AHEAD = 16        # rows far apart come from memory as if at random: each is asked for so many rows before


@helper
def prefetch_row(x, start, width, write):
    """Ask for a row before it is read, or written."""
    for j in range(0, width, 2 * LANES):
        prefetch_columns(x, start + j, write)


@mover
def pack_columns(x, start, stride, panels, depth, to, to_start, width, size):
    """Whole panels of B from rows of k, size apart in `to`: to[p, j] = x_p[j], where x_p is x from
    start + p stride. A row of x is read once for all.
    """
    compact()
    ahead = max(2, AHEAD // max(1, panels))          # as many lines as for a single panel, or a few more
    for p in range(depth):
        row = start + p * stride
        for panel in range(panels):
            prefetch_columns(x, row + ahead * stride + panel * width, False)
            copy_columns(x, row + panel * width, to, to_start + panel * size + p * width)


@mover
def pack_some_columns(x, start, stride, count, depth, to, to_start, width):
    """As `pack_columns`, for a panel of which only count columns are there: the others are 0."""
    compact()
    for p in range(depth):
        for j in range(count):
            to[to_start + p * width + j] = x[start + p * stride + j]
        for j in range(count, width):
            to[to_start + p * width + j] = 0


@mover
def pack_transposed(x, start, stride, count, depth, to, to_start, width):
    """A panel of B from columns: to[p, j] = x_j[p] if j < count else 0; x_j is x from start + j stride."""
    compact()
    lanes = width // 2
    squares = depth // lanes * lanes if count == width else 0
    for p in range(0, squares, lanes):
        for j in range(0, width, lanes):
            transpose_block(x, start + j * stride + p, stride, to, to_start + p * width + j, width)
    for j in range(count):
        for p in range(squares, depth):
            to[to_start + p * width + j] = x[start + j * stride + p]
    for p in range(depth):
        for j in range(count, width):
            to[to_start + p * width + j] = 0


@exact
def pair(low, high):
    """Two float32 as bfloat16, rounded to nearest even, in the low and the high half of a float32."""
    return from_bits((rounded(low) >> np.int32(16)) & np.int32(0xFFFF) | rounded(high) & np.int32(-65536))


@exact
def rounded(x):
    """The bits of x, of which the upper half is x as a bfloat16; NaN stays NaN."""
    n = bits(np.float32(x))                  # (float64 is compiled along, and never run)
    return n + np.int32(0x7FFF) + (n >> np.int32(16) & np.int32(1)) if x == x else n | np.int32(0x400000)


@helper
def fill_step(to, start, depth, width):
    """Zeros behind the pairs of so many k, to the end of a step of the register tile."""
    to[start + (depth + 1) // 2 * width:start + steps(depth, True) * width] = 0


@mover
def pair_row(x, start, size, to, to_start):
    """to[p] = (x[2 p], x[2 p + 1]), and 0 for what is beyond size, counted from the starts; x may be to."""
    whole = size // 2
    vectors = whole // LANES * LANES if ROUNDS else 0
    for p in range(0, vectors, LANES):
        round_in_turn(x, start + 2 * p, start + 2 * p + LANES, to, to_start + p, LANES)
    for p in range(vectors, whole):
        to[to_start + p] = pair(x[start + 2 * p], x[start + 2 * p + 1])
    if size % 2:
        to[to_start + whole] = pair(x[start + size - 1], np.float32(0))


@mover
def pair_columns(x, start, stride, count, depth, to, to_start, width):
    """As `pack_some_columns`, in pairs of rows; whole vectors are written, the last of which reaches into
    the next row, or beyond the end, if the width is not a multiple of theirs.
    """
    compact()
    for p in range((depth + 1) // 2):
        low, high, panel = start + 2 * p * stride, start + (2 * p + 1) * stride, to_start + p * width
        prefetch_row(x, low + AHEAD * stride, count, False)
        prefetch_row(x, high + AHEAD * stride, count, False)
        if 2 * p + 1 == depth:
            for j in range(count):
                to[panel + j] = pair(x[low + j], np.float32(0))
        elif ROUNDS:
            whole = count // LANES * LANES
            for j in range(0, whole, LANES):
                round_interleaved(x, low + j, high + j, to, panel + j, LANES)
            if whole < count:
                round_interleaved(x, low + whole, high + whole, to, panel + whole, count - whole)
        else:
            for j in range(count):
                to[panel + j] = pair(x[low + j], x[high + j])
        to[panel + count:panel + width] = 0


@mover
def pair_rows_of_columns(x, start, stride, count, depth, to, to_start, to_row):
    """The columns of x as rows of pairs: to[j, p] = (x_2p[j], x_2p+1[j]), 0 beyond count and depth, in whole
    squares as wide as a vector; rows of `to` are to_row apart.
    """
    compact()
    width = (count + LANES - 1) // LANES * LANES
    stripe = np.empty(LANES * width, to.dtype)
    for p in range(0, (depth + 1) // 2, LANES):
        rows = min(2 * LANES, depth - 2 * p)
        pair_columns(x, start + 2 * p * stride, stride, count, rows, stripe, 0, width)
        stripe[(rows + 1) // 2 * width:] = 0
        for j in range(0, width, LANES):
            transpose_block(stripe, j, width, to, to_start + j * to_row + p, to_row)


@mover
def pack_tiles(x, start, stride, tiles, depth, to, to_start, size):
    """Tiles of transposed A, size apart in `to`: to[p, i] = x_p[i]. A row of x is read once for all.

    `copied_rows` are read from the start of each tile's, and what they reach beyond it is overwritten next.
    """
    compact()
    for p in range(depth):
        row = start + p * stride
        prefetch_row(x, row + AHEAD * stride, tiles * ROWS, False)
        for tile in range(tiles):
            copy_tile_rows(x, row + tile * ROWS, to, to_start + tile * size + p * ROWS)


@mover
def pair_tiles(x, start, stride, tiles, depth, to, to_start, width, size):
    """As `pair_columns` for panels side by side, size apart in `to`, so that a row of x is read once for all.

    Where ROUNDS, for an even depth; if the width is not a multiple of a vector's, the last may reach beyond
    depth / 2 * width elements, for which `size` leaves room.
    """
    compact()
    for p in range(depth // 2):
        low = start + 2 * p * stride
        prefetch_row(x, low + AHEAD * stride, tiles * width, False)
        prefetch_row(x, low + (AHEAD + 1) * stride, tiles * width, False)
        for tile in range(tiles):
            for j in range(0, width, LANES):
                first = low + tile * width + j
                round_interleaved(x, first, first + stride, to, to_start + tile * size + p * width + j,
                                  min(LANES, width - j))


@mover
def pair_transposed(x, start, stride, count, depth, to, to_start, width):
    """As `pack_transposed`, in pairs: the pairs of each column first, then as there."""
    compact()
    pairs = (depth + 1) // 2
    columns = np.empty(count * pairs, to.dtype)
    for j in range(count):
        pair_row(x, start + j * stride, depth, columns, j * pairs)
    pack_transposed(columns, 0, pairs, count, pairs, to, to_start, width)


@helper
def mirror_stripe(c, j0, width, scale, shift):
    """Scale columns j0 to j0 + width down to the diagonal, shift that, and copy them to those rows."""
    m, lanes = len(c), width // 2
    j1 = min(m, j0 + width)
    for i in range(j1):
        row = c[i, max(i, j0):j1]
        for j in range(row.size):
            row[j] *= scale
        if i >= j0:
            row[0] += shift
    whole = j0 if j1 == j0 + width else 0
    for i in range(0, whole, lanes):
        for j in range(j0, j1, lanes):
            transpose_block(c, i * m + j, m, c, j * m + i, m)
    for i in range(whole, j1):
        for j in range(max(i + 1, j0), j1):
            c[j, i] = c[i, j]
