"""Products and copies of the blocks of queries and keys that attention goes by.

A block has keys j < count, its rows, and queries i, its columns, of which query i sees the keys with
j <= i + diagonal; register tiles that it sees nothing of are left out. paired: unless None, what is
multiplied is pairs of bfloat16, from the functions here whose names begin with pair, or `pack_panel`; C is
float32.

The tile unit takes A by rows alone, and pairs sixteen at a time. So the sum over keys, in which blocks of
weights are turned over, is made the other way round there: cᵀ = bᵀ A, which takes the weights as they are.
"""
from __future__ import annotations

from kernels import amx
from kernels.cpu import TARGET
from kernels.jit import helper, mover
from kernels.pack import (
    AHEAD,
    fill_step,
    pack_transposed,
    pair_columns,
    pair_row,
    pair_rows_of_columns,
    pair_transposed,
    prefetch_row,
)
from kernels.plan import steps
from kernels.rows import scale_row
from kernels.simd import LANES, address, compact, out_of_line, round_interleaved, transpose_block
from kernels.tile import ROWS, height, register_tile, written

TILES = TARGET.tiles
TILE_ROWS = height(True)          # rows of the register tile of pairs
STEP = amx.PAIRS if TILES else 1  # and its pairs come in so many


@helper
def elements(n, paired):
    """That n values take: themselves, or whole steps of pairs."""
    return n if paired is None else steps(n, True)


@helper
def tile_rows(paired):
    return ROWS if paired is None else TILE_ROWS


@mover
def multiply_panels(a, a_start, a_row, panels, depth, c, c_row, count, queries, tile, diagonal, paired):
    """C[j, i] = a_j · column i of the panels, of so many elements or pairs."""
    out_of_line()
    for i in range(0, queries, tile):
        for j in range(0, min(count, i + tile + diagonal), tile_rows(paired)):
            register_tile(c, address(a, a_start + j * a_row), a_row, 1, address(panels, i * depth), tile,
                          address(c, j * c_row + i), c_row, depth, 0, 0,
                          written(count - j, paired is not None), 2 * (queries - i) > tile,
                          paired is not None)


@mover
def sum_over_queries(a, a_row, b, b_start, b_row, c, width, count, queries, tile, diagonal, paired):
    """c_j += Σ_i A[j, i] b_i, for rows of width."""
    out_of_line()
    last = elements(queries, paired)
    for j in range(0, count, tile_rows(paired)):
        first = max(0, j - diagonal)                     # earlier queries do not see these keys
        first = first if paired is None else first // (2 * STEP) * STEP
        for d in range(0, width, tile):
            if first < last:
                to = address(c, j * width + d)
                register_tile(c, address(a, j * a_row + first), a_row, 1,
                              address(b, b_start + first * b_row + d), b_row,
                              to, width, last - first, to, width, written(count - j, paired is not None),
                              True, paired is not None)


@mover
def sum_over_keys(a, a_row, b, b_start, b_row, c, c_start, c_row, width, count, queries, tile, diagonal,
                  paired):
    """c_i += Σ_j A[j, i] b_j, for rows of width. On a tile unit cᵀ += bᵀ A, of what `pair_across` makes of b.
    """
    out_of_line()
    if paired is not None and TILES:
        for i in range(0, queries, tile):
            n = elements(max(0, min(count, i + tile + diagonal)), paired)
            for d in range(0, width if n > 0 else 0, TILE_ROWS):
                to = address(c, c_start + d * c_row + i)
                register_tile(c, address(b, d * b_row + b_start), b_row, 1, address(a, i), a_row, to, c_row,
                              n, to, c_row, TILE_ROWS, True, True)
    else:
        for i in range(0, queries, ROWS):
            n = elements(max(0, min(count, i + ROWS + diagonal)), paired)
            for d in range(0, width if n > 0 else 0, tile):
                to = address(c, c_start + i * c_row + d)
                register_tile(c, address(a, i), 1, a_row, address(b, b_start + d), b_row, to, c_row,
                              n, to, c_row, written(queries - i, paired is not None), True,
                              paired is not None)


@mover
def pack_panel(x, start, stride, count, depth, to, to_start, width, paired):
    """See `kernels.pack`."""
    compact()
    if paired is not None:
        pair_transposed(x, start, stride, count, depth, to, to_start, width)
        fill_step(to, to_start, depth, width)
    else:
        pack_transposed(x, start, stride, count, depth, to, to_start, width)


@mover
def pair_down(x, start, stride, count, depth, to, to_start, width):
    """Pairs of rows of x, side by side: to[p, j] = (x_2p[j], x_2p+1[j]), 0 beyond count, and beyond depth to
    the end of a step.
    """
    compact()
    pair_columns(x, start, stride, count, depth, to, to_start, width)
    fill_step(to, to_start, depth, width)


@mover
def pair_scores(x, count, width, to):
    """As `pair_down`, of the first columns of scores; for an odd count the row behind it holds zeros."""
    compact()
    flat, stride = x.reshape(-1), x.shape[1]
    for p in range((count + 1) // 2):
        for j in range(p * stride, p * stride + width, LANES):
            round_interleaved(flat, p * stride + j, (p + 1) * stride + j, to, j, LANES)
    fill_step(to, 0, count, stride)


@mover
def pair_across(x, start, stride, count, depth, to, to_row):
    """What is summed over rows of x with `sum_over_keys`: pairs of rows as there, or turned over."""
    compact()
    if TILES:
        pair_rows_of_columns(x, start, stride, count, depth, to, 0, to_row)
    else:
        pair_columns(x, start, stride, count, depth, to, 0, to_row)
        fill_step(to, 0, depth, to_row)


@mover
def turn_over(x, to):
    """to = xᵀ, for matrices of whole vectors."""
    compact()
    (rows, width), flat, to_flat = x.shape, x.reshape(-1), to.reshape(-1)
    for i in range(0, rows, LANES):
        for j in range(0, width, LANES):
            transpose_block(flat, i * width + j, width, to_flat, j * rows + i, rows)


@mover
def pair_rows(x, count, width):
    """The first rows of x, so wide, as pairs, in the first halves of their places."""
    compact()
    flat, stride = x.reshape(-1), x.shape[1]
    for i in range(count):
        pair_row(flat, i * stride, width, flat, i * stride)


@mover
def pack_rows(x, start, stride, count, depth, scale, visible, to):
    """to[i, d] = scale x_i[d] for i < count, where x_i is x from start + i stride on; zero beyond depth.

    visible: which rows to take, the others are zero; empty for all.
    """
    compact()
    width = to.shape[1]
    for i in range(count):
        prefetch_row(x, start + (i + AHEAD) * stride, depth, False)
        seen = visible.size == 0 or visible[i]
        if seen:
            scale_row(x, start + i * stride, depth, scale, to, i * width)
        to[i, depth if seen else 0:] = 0


@mover
def unpack_rows(x, count, depth, scale, to, start, stride):
    """The way back: to_i[d] = scale x[i, d]."""
    compact()
    for i in range(count):
        prefetch_row(to, start + (i + AHEAD) * stride, depth, True)
        scale_row(x, i * x.shape[1], depth, scale, to, start + i * stride)
