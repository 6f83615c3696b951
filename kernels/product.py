"""One task of a matrix product, a block of rows times a chunk of panels: see `kernels.matmul`.

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
from kernels.simd import address, compact, copy_columns, finish_streams, stream_columns
from kernels.tile import register_tile

GELU, GELU_TANH, RELU2 = range(3)


@helper
def multiply_task(a, packed_a, b, packed_b, c, k, n0, panels, task, plan, room, thread, bias, activated,
                  activation):
    """One block of rows times one chunk of panels, part by part of K, while its part of C is near."""
    batch, block = task // (plan.blocks * plan.chunks), task // plan.chunks % plan.blocks
    chunk, first_copied = task % plan.chunks, plan.first_copied
    batch_a, batch_b = batch if plan.batch_a > 1 else 0, batch if plan.batch_b > 1 else 0
    m = c.shape[1]
    tall = (m + plan.rows - 1) // plan.rows                                     # in register tiles
    i0, i1 = tall * block // plan.blocks, tall * (block + 1) // plan.blocks
    first, last = panels * chunk // plan.chunks, panels * (chunk + 1) // plan.chunks
    own = min((tall + plan.blocks - 1) // plan.blocks, tall - first_copied)     # at most copied by a task
    copied = max(i0, first_copied)
    for part in range(plan.parts):
        k0 = part * plan.depth
        depth = min(plan.depth, k - k0)
        copy = (batch_a * plan.parts + part) * plan.shared - first_copied                        # of tile 0
        if not plan.shared:
            copy = thread * own - copied
            pack_block(a[batch_a], packed_a, copy * plan.size_a, copied, i1, plan.rows, m, k0, depth,
                       plan.size_a, plan.transpose_a, plan.bf16)
        start_b = thread * plan.near if plan.own_b else (batch_b * plan.parts + part) * panels
        for panel in range(first, last, plan.near):
            end = min(last, panel + plan.near)
            if plan.own_b:
                pack_panels(b, packed_b, (start_b - panel) * plan.size_b, batch_b, panel, end, n0, c.shape[2],
                            k0, k, depth, plan.width, plan.size_b, plan.transpose_b, plan.bf16)
            multiply_block(a[batch_a], packed_a, copy * plan.size_a, packed_b,
                           (start_b + (0 if plan.own_b else panel)) * plan.size_b, c[batch], i0, i1, k0,
                           depth, n0 + panel * plan.width, end - panel, plan, part + 1 == plan.parts, room,
                           bias, activated[batch] if len(activated) else c[batch, :0], activation)


@helper
def multiply_block(a, packed_a, start_a, b, start_b, c, i0, i1, k0, depth, j0, panels, plan, ends, room,
                   bias, activated, activation):
    """Register tiles i0 to i1, panels of columns from j0 on of C (+)= op(A) B (+ bias), for k0 to k0 + depth.

    ends: K does, so that C is whole. room: scratch for tiles that reach beyond C, or go past the caches or on
    to an activation.
    """
    (m, n), deep, rows, width = c.shape, steps(depth, plan.bf16), plan.rows, plan.width
    edge, side_by_side = room[:rows * width], room[rows * width:]
    active, streams = ends and len(activated) > 0, ends and plan.streams
    span = panels * width
    start_tiles(plan.bf16)
    for tile in range(i0, i1):
        i = tile * rows
        if tile < plan.first_copied:
            a_at, row, step = address(a, i * a.shape[1] + k0), a.shape[1], 1
        elif plan.transpose_a and not (plan.bf16 and TILES):
            a_at, row, step = address(packed_a, start_a + tile * plan.size_a), 1, rows
        else:
            a_at, row, step = address(packed_a, start_a + tile * plan.size_a), plan.size_a // rows, 1
        for panel in range(max(0, (i - j0) // width) if plan.half else 0, panels):
            j = j0 + panel * width
            inside = i + rows <= m and j + width <= n
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
            b_at, wide = address(b, start_b + panel * plan.size_b), inside or 2 * (n - j) > width
            register_tile(c, a_at, row, step, b_at, width, to, to_row, deep, before, before_row, wide,
                          plan.bf16)
            if not active and (streams or not inside):
                place_tile(edge, rows, width, c, i, j, inside, streams)
        if active:
            for r in range(min(rows, m - i)):
                activate_row(side_by_side[r * span:], side_by_side[rows * span:], span, width, c, activated,
                             (i + r) * n + j0, min(n - j0, span), activation, streams)
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
    if inside and streams:
        for r in range(rows):
            stream_columns(edge, r * width, c, (i + r) * n + j)
    elif inside:
        for r in range(rows):
            copy_columns(edge, r * width, c, (i + r) * n + j)
    else:
        for r in range(min(rows, m - i)):
            for s in range(min(width, n - j)):
                c[i + r, j + s] = edge[r * width + s]
