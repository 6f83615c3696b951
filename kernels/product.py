"""What a thread does of a matrix product, rows of register tiles times panels: see `kernels.matmul`.

Where an activation follows, register tiles are laid side by side in scratch, so that it goes along whole rows
while they are near, and works on several vectors at once.
"""
from __future__ import annotations

from kernels.amx import start_tiles, stop_tiles
from kernels.copies import TILES, pack_block, pack_panels
from kernels.gelu import gelu_row
from kernels.jit import helper, mover
from kernels.plan import steps
from kernels.relu2 import relu2_row
from kernels.share import next_piece
from kernels.simd import address, compact, copy_columns, finish_streams, stream_columns
from kernels.tile import register_tile, written

GELU, GELU_TANH, RELU2 = range(3)


@helper
def multiply_pieces(a, packed_a, b, packed_b, c, k, n0, panels, plan, room, thread, threads, counters, bias,
                    activated, activation):
    """The pieces of all products that one thread gets, in panels of columns from n0 on."""
    tall = (c.shape[1] + plan.rows - 1) // plan.rows                                     # in register tiles
    of_each = tall if plan.by_rows else panels if plan.by_panels else 1
    units, kept_of = len(c) * of_each, -1                       # the matrix of a batch whose copy is kept
    first, end, whose = next_piece(counters, thread, threads, units, plan.most, plan.least)
    while first < end:
        batch = first // of_each
        start, stop = first - batch * of_each, min(of_each, end - batch * of_each)
        i0, i1 = (start, stop) if plan.by_rows else (0, tall)
        p0, p1 = (start, stop) if plan.by_panels else (0, panels)
        common = batch if (plan.batch_b if plan.by_rows else plan.batch_a) > 1 else 0
        multiply_piece(a, packed_a, b, packed_b, c, k, n0, panels, batch, i0, i1, p0, p1,
                       not plan.kept or common != kept_of, plan, room, thread, bias, activated, activation)
        kept_of = common
        first += stop - start
        if first == end:
            first, end, whose = next_piece(counters, whose, threads, units, plan.most, plan.least)


@helper
def multiply_piece(a, packed_a, b, packed_b, c, k, n0, panels, batch, i0, i1, first, last, fresh,
                   plan, room, thread, bias, activated, activation):
    """Rows i0 to i1 of tiles times panels first to last, part by part of K, while this piece of C is near.
    fresh: what all pieces are multiplied by is not yet copied.
    """
    batch_a, batch_b = batch if plan.batch_a > 1 else 0, batch if plan.batch_b > 1 else 0
    m, first_copied = c.shape[1], plan.first_copied
    copied = max(i0, first_copied)
    for part in range(plan.parts):
        k0 = part * plan.depth
        depth = min(plan.depth, k - k0)
        copy = (batch_a * plan.parts + part) * plan.shared - first_copied                        # of tile 0
        if not plan.shared:
            copy = thread * plan.own_a - copied
            if fresh or not plan.by_panels:
                pack_block(a[batch_a], packed_a, copy * plan.size_a, copied, i1, plan.rows, m, k0, depth,
                           plan.size_a, plan.transpose_a, plan.bf16)
        start_b = thread * plan.near if plan.own_b else (batch_b * plan.parts + part) * panels
        for panel in range(first, last, plan.near):
            end = min(last, panel + plan.near)
            copy_b = start_b + panel
            if plan.own_b:
                copied_b = max(panel, plan.first_panel)
                copy_b = start_b + panel - copied_b
                if fresh or not plan.by_rows:
                    pack_panels(b, packed_b, (start_b - copied_b) * plan.size_b, batch_b, copied_b, end, n0,
                                c.shape[2], k0, k, depth, plan.width, plan.size_b, plan.transpose_b,
                                plan.bf16)
            multiply_block(a[batch_a], packed_a, copy * plan.size_a, b, (batch_b * k + k0) * c.shape[2],
                           packed_b, copy_b * plan.size_b, c[batch], i0, i1, k0, depth,
                           n0 + panel * plan.width, end - panel, plan, part + 1 == plan.parts, room, bias,
                           activated[batch] if len(activated) else c[batch, :0], activation)


@helper
def multiply_block(a, packed_a, start_a, b, row_of_b, packed_b, start_b, c, i0, i1, k0, depth, j0, panels,
                   plan, ends, room, bias, activated, activation):
    """Register tiles i0 to i1, panels of columns from j0 on of C (+)= op(A) B (+ bias), for k0 to k0 + depth.

    row_of_b: where row k0 of B starts. ends: K does, so that C is whole. room: scratch for tiles that reach
    beyond C, or go past the caches or on to an activation.
    """
    (m, n), deep, rows, width = c.shape, steps(depth, plan.bf16), plan.rows, plan.width
    edge, side_by_side = room[:rows * width], room[rows * width:]
    active, streams = ends and len(activated) > 0, ends and plan.streams
    span = panels * width
    start_tiles(plan.bf16)
    for tile in range(i0, i1):
        i = tile * rows
        high = written(m - i, plan.bf16)
        if tile < plan.first_copied and plan.transpose_a:
            a_at, row, step = address(a, k0 * m + i), 1, m
        elif tile < plan.first_copied:
            a_at, row, step = address(a, i * a.shape[1] + k0), a.shape[1], 1
        elif plan.transpose_a and not (plan.bf16 and TILES):
            a_at, row, step = address(packed_a, start_a + tile * plan.size_a), 1, rows
        else:
            a_at, row, step = address(packed_a, start_a + tile * plan.size_a), plan.size_a // rows, 1
        for panel in range(max(0, (i - j0) // width) if plan.half else 0, panels):
            j = j0 + panel * width
            inside = i + high <= m and j + width <= n
            before, before_row = 0, 0
            if not inside:
                for r in range(min(rows, m - i)):
                    for s in range(min(width, n - j)):
                        old = c[i + r, j + s] if k0 > 0 else bias[j + s] if bias.size else 0
                        edge[r * width + s] = old
                before, before_row = address(edge, 0), width
            elif k0 > 0:
                before, before_row = address(c, i * n + j), n
            elif bias.size:
                before = address(bias, j)
            if active:
                to, to_row = address(side_by_side, panel * width), span
            elif inside and not streams:
                to, to_row = address(c, i * n + j), n
            else:
                to, to_row = address(edge, 0), width
            b_at, b_step = address(packed_b, start_b + panel * plan.size_b), width
            if j < plan.first_panel * width:
                b_at, b_step = address(b, row_of_b + j), n
            register_tile(c, a_at, row, step, b_at, b_step, to, to_row, deep, before, before_row, high,
                          2 * (n - j) > width, plan.bf16)
            if not active and (streams or not inside):
                place_tile(edge, rows, width, c, i, j, inside, streams)
        if active:
            there = min(rows, m - i)
            at_once = there if span == n and not streams else 1        # whole rows lie one behind the other
            for r in range(0, there, at_once):
                activate_row(side_by_side[r * span:], side_by_side[rows * span:], span, width, c, activated,
                             (i + r) * n + j0, at_once * min(n - j0, span), activation, streams)
    stop_tiles(plan.bf16)
    if streams:
        finish_streams()


@helper
def activate_row(row, room, span, width, c, activated, at, count, activation, streams):
    """The activation of a row to its place from element `at` on, and what is kept of it to C; by way of room
    for two rows of span, where they go past the caches.
    """
    before, flat, flat_c = row[:count], activated.reshape(-1), c.reshape(-1)
    y = room[:count] if streams else flat[at:at + count]
    kept = room[span:span + count] if streams else flat_c[at:at + count]
    if activation == RELU2:
        relu2_row(before, kept)
    else:
        gelu_row(before, activation == GELU_TANH, y, kept)
    if streams:
        stream_row(kept, width, c, at)
        if activation != RELU2:
            stream_row(y, width, activated, at)


@mover
def stream_row(row, width, to, at):
    """A row of whole panels past the caches, to element `at` on."""
    compact()
    for j in range(0, row.size, width):
        stream_columns(row, j, to, at + j)


@mover
def place_tile(edge, rows, width, c, i, j, inside, streams):
    """A register tile to where it belongs."""
    compact()
    m, n = c.shape
    rows = min(rows, m - i)
    if inside and streams:
        for r in range(rows):
            stream_columns(edge, r * width, c, (i + r) * n + j)
    elif inside:
        for r in range(rows):
            copy_columns(edge, r * width, c, (i + r) * n + j)
    else:
        for r in range(rows):
            for s in range(min(width, n - j)):
                c[i + r, j + s] = edge[r * width + s]
