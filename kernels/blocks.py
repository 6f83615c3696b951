"""Products and copies of the blocks of queries and keys that attention goes by.

A block has queries i < rows and keys j < count, of which query i sees those with j <= i + diagonal; register
tiles that it sees nothing of are left out. paired: unless None, what is multiplied is pairs of bfloat16, from
`pair_rows`, `pack_panel`, `pair_down` and `pair_across`; C is float32.

The tile unit takes A by rows alone, and pairs sixteen at a time. So the sum over queries, in which blocks of
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
from kernels.simd import LANES, address, compact, out_of_line, transpose_block
from kernels.tile import ROWS, height, register_tile

TILES = TARGET.tiles
TILE_ROWS = height(True)          # rows of the register tile of pairs
UNROLLED = 4 * LANES              # elements that LLVM takes at a time in a loop over a row
STEP = amx.PAIRS if TILES else 1  # and its pairs come in so many


@helper
def elements(n, paired):
    """That n values take: themselves, or whole steps of pairs."""
    return n if paired is None else steps(n, True)


@helper
def tile_rows(paired):
    return ROWS if paired is None else TILE_ROWS


@helper
def read(n, size, paired):
    """How many of a row's weights a product may read, of which n are not 0, in whole turns of an unrolled
    loop: the register tile takes the row with others that see more keys.
    """
    return min(size, (n + tile_rows(paired) + UNROLLED - 1) // UNROLLED * UNROLLED)


@mover
def multiply_panels(a, a_start, a_row, panels, panels_start, depth, c, c_row, rows, count, tile, diagonal,
                    paired):
    """C[i, j] = a_i · column j of the panels, of so many elements or pairs."""
    out_of_line()
    for j in range(0, count, tile):
        for i in range(0, rows, tile_rows(paired)):
            if j < i + tile_rows(paired) + diagonal:
                register_tile(c, address(a, a_start + i * a_row), a_row, 1,
                              address(panels, panels_start + j * depth), tile,
                              address(c, i * c_row + j), c_row, depth, 0, 0, rows - i, True,
                              paired is not None)


@mover
def multiply_rows(a, a_row, b, b_start, c, c_start, width, rows, count, tile, diagonal, paired):
    """c_i += Σ_j A[i, j] b_j, for rows of width."""
    out_of_line()
    for i in range(0, rows, tile_rows(paired)):
        n = min(count, i + tile_rows(paired) + diagonal)
        for d in range(0, width, tile):
            if n > 0:
                to = address(c, c_start + i * width + d)
                register_tile(c, address(a, i * a_row), a_row, 1, address(b, b_start + d), width,
                              to, width, elements(n, paired), to, width, rows - i, True, paired is not None)


@mover
def multiply_columns(a, a_row, b, first_row, b_row, c, c_row, width, rows, count, tile, diagonal, paired):
    """c_j += Σ_i A[i, j] b_i, for rows of width; b_i is row first_row + i of b. On a tile unit cᵀ += bᵀ A, of
    what `pair_across` makes of b.
    """
    out_of_line()
    last = elements(rows, paired)
    for j in range(0, count, tile if paired is not None and TILES else ROWS):
        first = max(0, j - diagonal)                     # earlier queries do not see these keys
        first = first if paired is None else first // (2 * STEP) * STEP
        for d in range(0, width, tile):
            if first < last and paired is not None and TILES:
                to = address(c, d * c_row + j)
                register_tile(c, address(b, d * b_row + first_row + first), b_row, 1,
                              address(a, first * a_row + j), a_row,
                              to, c_row, last - first, to, c_row, TILE_ROWS, True, True)
            elif first < last:
                to = address(c, j * c_row + d)
                register_tile(c, address(a, first * a_row + j), 1, a_row,
                              address(b, (first_row + first) * b_row + d), b_row,
                              to, c_row, last - first, to, c_row, count - j, True, paired is not None)


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
def pair_down(x, start, stride, count, depth, to, width):
    """Pairs of rows of x, side by side: to[p, j] = (x_2p[j], x_2p+1[j]), 0 beyond count, and beyond depth to
    the end of a step.
    """
    compact()
    pair_columns(x, start, stride, count, depth, to, 0, width)
    fill_step(to, 0, depth, width)


@mover
def pair_across(x, stride, count, depth, to, to_row):
    """What is summed over rows of x with `multiply_columns`: pairs of rows as there, or turned over."""
    compact()
    if TILES:
        pair_rows_of_columns(x, 0, stride, count, depth, to, 0, to_row)
    else:
        pair_columns(x, 0, stride, count, depth, to, 0, to_row)


@mover
def turn_over(x, to):
    """to = xᵀ, for matrices of whole vectors."""
    compact()
    (rows, width), flat, to_flat = x.shape, x.reshape(-1), to.reshape(-1)
    for i in range(0, rows, LANES):
        for j in range(0, width, LANES):
            transpose_block(flat, i * width + j, width, to_flat, j * rows + i, rows)


@mover
def pair_rows(x, count):
    """The first rows of x (., n) as pairs, in the first halves of their places."""
    compact()
    flat, width = x.reshape(-1), x.shape[1]
    for i in range(count):
        pair_row(flat, i * width, width, flat, i * width)


@mover
def pack_rows(x, start, stride, count, depth, scale, visible, to):
    """to[i, d] = scale x_i[d], where x_i is x from start + i stride on; zero beyond count and depth.

    visible: which rows to take, the others are zero; empty for all.
    """
    compact()
    width = to.shape[1]
    for i in range(len(to)):
        prefetch_row(x, start + (i + AHEAD) * stride, depth, False)
        seen = i < count and (visible.size == 0 or visible[i])
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
