"""The copies of its operands that a matrix product takes, as `kernels.plan` has it."""
from __future__ import annotations

from kernels.cpu import TARGET
from kernels.jit import helper, mover
from kernels.pack import (
    fill_step,
    pack_columns,
    pack_some_columns,
    pack_tiles,
    pack_transposed,
    pair_columns,
    pair_row,
    pair_rows_of_columns,
    pair_tiles,
    pair_transposed,
)
from kernels.plan import steps
from kernels.rows import scale_row
from kernels.share import next_piece
from kernels.simd import ROUNDS, compact, copied_rows

TILES, BF16 = TARGET.tiles, TARGET.bf16        # asked first: numba leaves out what is not of this CPU
GROUP = 2         # register tiles of A, or panels of B, that are copied at once


@helper
def groups(count):
    """Of so many register tiles of A, or panels of B."""
    return (count + GROUP - 1) // GROUP


@helper
def copy_pieces(a, packed_a, b, packed_b, m, n, k, n0, panels, plan, thread, threads, counters):
    """The copies for all threads that one thread makes: of A, with the first columns, and of panels of B."""
    copies_a = plan.batch_a * plan.parts * groups(plan.shared) if n0 == 0 else 0
    copies_b = 0 if plan.own_b else plan.batch_b * plan.parts * groups(panels)
    copies = copies_a + copies_b
    copy, end, whose = next_piece(counters, thread, threads, copies, copies, 1)
    while copy < end:
        place = copy - (copies_b + 1) // 2         # A in the middle: of two threads, each copies half of it
        if 0 <= place < copies_a:
            pack_group_of_a(a, packed_a, place, m, k, plan)
        else:
            pack_group_of_b(b, packed_b, copy if place < 0 else copy - copies_a, panels, n0, n, k, plan)
        copy += 1
        if copy == end:
            copy, end, whose = next_piece(counters, whose, threads, copies, copies, 1)


@helper
def pack_group_of_a(a, packed, copy, m, k, plan):
    """A few register tiles of one part of one op(A)."""
    first = plan.first_copied + copy % groups(plan.shared) * GROUP
    place = copy // groups(plan.shared)                             # of the part of the matrix
    k0 = place % plan.parts * plan.depth
    pack_block(a[place // plan.parts], packed, (place * plan.shared - plan.first_copied) * plan.size_a, first,
               min(first + GROUP, plan.first_copied + plan.shared), plan.rows, m, k0, min(plan.depth, k - k0),
               plan.size_a, plan.transpose_a, plan.bf16)


@mover
def pack_block(a, packed, start, first, last, rows, m, k0, depth, size, transposed, bf16):
    """Register tiles first to last of op(A), each at start + its number times size, as `pack_a`; on a tile
    unit row by row always.
    """
    whole = first
    if TILES and bf16 and transposed:
        i0 = first * rows
        pair_rows_of_columns(a.reshape(-1), k0 * m + i0, m, min(m, last * rows) - i0, depth, packed,
                             start + first * size, size // rows)
        whole = last
    elif ROUNDS and bf16 and transposed and depth % 2 == 0:
        whole = max(first, min(last, m // rows))
        pair_tiles(a.reshape(-1), k0 * m + first * rows, m, whole - first, depth, packed,
                   start + first * size, rows, size)
    elif transposed and not bf16:
        whole = max(first, min(last, (m - copied_rows(packed.itemsize)) // rows + 1))
        pack_tiles(a.reshape(-1), k0 * m + first * rows, m, whole - first, depth, packed,
                   start + first * size, size)
    for tile in range(whole, last):
        pack_a(a, packed, start + tile * size, tile, rows, m, k0, depth, size, transposed, bf16)


@mover
def pack_a(a, packed, start, tile, rows, m, k0, depth, size, transposed, bf16):
    """The rows of one register tile of op(A), to packed[start]: k by k if transposed, else row by row."""
    compact()
    i0, count = tile * rows, min(rows, m - tile * rows)
    flat, k, deep = a.reshape(-1), a.shape[1], steps(depth, bf16)
    if BF16 and bf16 and transposed:
        pair_columns(flat, k0 * m + i0, m, count, depth, packed, start, rows)
    elif transposed:
        for p in range(depth):
            for i in range(count):
                packed[start + p * rows + i] = flat[(k0 + p) * m + i0 + i]
            for i in range(count, rows):
                packed[start + p * rows + i] = 0
    else:
        for i in range(rows):
            row, to = (i0 + i) * k + k0, start + i * (size // rows)
            if i >= count:
                packed[to:to + deep] = 0
            elif BF16 and bf16:
                pair_row(flat, row, depth, packed, to)
                fill_step(packed, to, depth, 1)
            else:
                scale_row(flat, row, depth, packed.dtype.type(1), packed, to)


@helper
def pack_group_of_b(b, packed, copy, panels, n0, n, k, plan):
    """A few panels of one part of one matrix of B."""
    first, place = copy % groups(panels) * GROUP, copy // groups(panels)
    k0 = place % plan.parts * plan.depth
    pack_panels(b, packed, place * panels * plan.size_b, place // plan.parts, first,
                min(first + GROUP, panels), n0, n, k0, k, min(plan.depth, k - k0), plan.width, plan.size_b,
                plan.transpose_b, plan.bf16)


@mover
def pack_panels(b, packed, start, batch, first, last, n0, n, k0, k, depth, width, size, transposed, bf16):
    """Panels first to last of one matrix of B from column n0 on, each at start + its number times size."""
    whole, at, to = first, (batch * k + k0) * n + n0 + first * width, start + first * size
    if not transposed and not bf16:
        whole = min(last, (n - n0) // width)
        pack_columns(b, at, n, whole - first, depth, packed, to, width, size)
    elif ROUNDS and bf16 and not transposed and depth % 2 == 0:
        whole = min(last, (n - n0) // width)
        pair_tiles(b, at, n, whole - first, depth, packed, to, width, size)
        for panel in range(first, whole):
            fill_step(packed, start + panel * size, depth, width)
    for panel in range(whole, last):
        pack_b(b, packed, start + panel * size, batch, n0 + panel * width, n, k0, k, depth, width, transposed,
               bf16)


@mover
def pack_b(b, packed, to, batch, j, n, k0, k, depth, width, transposed, bf16):
    """The panel of one matrix of B from column j on."""
    compact()
    start, stride = ((batch * n + j) * k + k0, k) if transposed else ((batch * k + k0) * n + j, n)
    count = min(width, n - j)
    if BF16 and bf16 and transposed:
        pair_transposed(b, start, stride, count, depth, packed, to, width)
    elif transposed:
        pack_transposed(b, start, stride, count, depth, packed, to, width)
    elif BF16 and bf16:
        pair_columns(b, start, stride, count, depth, packed, to, width)
    else:
        pack_some_columns(b, start, stride, count, depth, packed, to, width)
    if BF16 and bf16:
        fill_step(packed, to, depth, width)
