"""Copies of B into panels as wide as the register tile: for each k the columns of the panel side by side."""
from __future__ import annotations

from kernels.jit import mover
from kernels.simd import copy_columns, out_of_line, transpose_block


@mover
def pack_columns(x, start, stride, count, depth, to, to_start, width):
    """A panel of B from rows of k: to[p, j] = x_p[j] if j < count else 0; x_p is x from start + p stride."""
    out_of_line()
    if count == width:
        for p in range(depth):
            copy_columns(x, start + p * stride, to, to_start + p * width)
    else:
        for p in range(depth):
            for j in range(count):
                to[to_start + p * width + j] = x[start + p * stride + j]
            for j in range(count, width):
                to[to_start + p * width + j] = 0


@mover
def pack_transposed(x, start, stride, count, depth, to, to_start, width):
    """A panel of B from columns: to[p, j] = x_j[p] if j < count else 0; x_j is x from start + j stride."""
    out_of_line()
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
