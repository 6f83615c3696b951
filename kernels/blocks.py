"""Products and copies of the blocks of queries and keys that attention goes by.

A block has queries i < rows and keys j < count, of which query i sees those with j <= i + diagonal; register
tiles that it sees nothing of are left out. paired: unless None, what is multiplied is pairs of bfloat16, from
`pair_rows`, `pack_panel` and `kernels.pack.pair_columns`; C is float32.
"""
from __future__ import annotations

from kernels.jit import helper, mover
from kernels.pack import AHEAD, pack_transposed, pair_row, pair_transposed, prefetch_row
from kernels.simd import address, out_of_line
from kernels.tile import ROWS, register_tile


@helper
def elements(n, paired):
    """That n values take: themselves, or pairs."""
    return n if paired is None else (n + 1) // 2


@mover
def multiply_panels(a, a_start, a_row, panels, panels_start, depth, c, c_row, rows, count, tile, diagonal,
                    paired):
    """C[i, j] = a_i · column j of the panels, of so many elements or pairs."""
    out_of_line()
    for j in range(0, count, tile):
        for i in range(0, rows, ROWS):
            if j < i + ROWS + diagonal:
                register_tile(c, address(a, a_start + i * a_row), a_row, 1,
                              address(panels, panels_start + j * depth), tile,
                              address(c, i * c_row + j), c_row, depth, 0, 0, True, paired is not None)


@mover
def multiply_rows(a, a_row, b, b_start, c, c_start, width, rows, count, tile, diagonal, paired):
    """c_i += Σ_j A[i, j] b_j, for rows of width."""
    out_of_line()
    for i in range(0, rows, ROWS):
        n = min(count, i + ROWS + diagonal)
        for d in range(0, width, tile):
            if n > 0:
                to = address(c, c_start + i * width + d)
                register_tile(c, address(a, i * a_row), a_row, 1, address(b, b_start + d), width,
                              to, width, elements(n, paired), to, width, True, paired is not None)


@mover
def multiply_columns(a, a_row, b, b_start, c, width, rows, count, tile, diagonal, paired):
    """c_j += Σ_i A[i, j] b_i, for rows of width."""
    out_of_line()
    for j in range(0, count, ROWS):
        first = max(0, j - diagonal)                     # earlier queries do not see these keys
        first, last = first if paired is None else first // 2, elements(rows, paired)
        for d in range(0, width, tile):
            if first < last:
                to = address(c, j * width + d)
                register_tile(c, address(a, first * a_row + j), 1, a_row,
                              address(b, b_start + first * width + d), width,
                              to, width, last - first, to, width, True, paired is not None)


@mover
def pack_panel(x, start, stride, count, depth, to, to_start, width, paired):
    """See `kernels.pack`."""
    out_of_line()
    if paired is not None:
        pair_transposed(x, start, stride, count, depth, to, to_start, width)
    else:
        pack_transposed(x, start, stride, count, depth, to, to_start, width)


@mover
def pair_rows(x, count):
    """The first rows of x (., n) as pairs, in the first halves of their places."""
    out_of_line()
    for i in range(count):
        pair_row(x[i], x[i])


@mover
def pack_rows(x, start, stride, count, depth, scale, visible, to):
    """to[i, d] = scale x_i[d], where x_i is x from start + i stride on; zero beyond count and depth.

    visible: which rows to take, the others are zero; empty for all.
    """
    out_of_line()
    for i in range(len(to)):
        row = to[i]
        prefetch_row(x, start + (i + AHEAD) * stride, depth, False)
        if i < count and (visible.size == 0 or visible[i]):
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
        prefetch_row(to, start + (i + AHEAD) * stride, depth, True)
        for d in range(depth):
            to_i[d] = row[d] * scale
