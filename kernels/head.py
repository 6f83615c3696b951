"""What a thread does of attention, forward and backward: blocks of a head of a sequence.
See `kernels.attention`.
"""
from __future__ import annotations

import math

from kernels.amx import start_tiles, stop_tiles
from kernels.blocks import (
    TILES,
    elements,
    multiply_columns,
    multiply_panels,
    multiply_rows,
    pack_panel,
    pack_rows,
    pair_across,
    pair_down,
    pair_rows,
    read,
    turn_over,
    unpack_rows,
)
from kernels.dropout import halves, kept
from kernels.elementary import exp_below
from kernels.jit import helper, mover
from kernels.rows import fill_vectors, row_max, scale_row
from kernels.share import next_piece
from kernels.simd import out_of_line


@helper
def forward_pieces(q, kv, mask, out, norms, layout, causal, dropout, blocks, of_each, scratch, thread,
                   threads, counters, paired):
    """The blocks of queries that one thread gets, of_each of a head, or whole heads where that is 1."""
    units, most, packed = len(norms) * of_each, blocks[3], -1
    first, end, whose = next_piece(counters, thread, threads, units, units, 1)
    while first < end:
        head = first // of_each
        start, stop = first - head * of_each, min(of_each, end - head * of_each)
        i0, i1 = (start * most, stop * most) if of_each > 1 else (0, norms.shape[1])
        head_forward(q, kv, mask, out, norms[head], head, head != packed, i0, min(i1, norms.shape[1]), layout,
                     causal, dropout, blocks, scratch, thread, paired)
        packed = head
        first += stop - start
        if first == end:
            first, end, whose = next_piece(counters, whose, threads, units, units, 1)


@helper
def head_forward(q, kv, mask, out, norms, head, fresh, first_query, last_query, layout, causal, dropout,
                 blocks, scratch, thread, paired):
    """Some queries of one head of one sequence. fresh: its keys and values are not yet in the scratch.
    paired: as `_paired` has it.
    """
    kept_scale = dropout[1]
    tile, padded, block, most = blocks
    key_panels, values = scratch[0][thread], scratch[1][thread]                           # of the head
    queries, scores, sums = scratch[2][thread], scratch[3][thread], scratch[4][thread]    # of a query block
    tops = scratch[5][thread]                                                             # m and Σ p
    time = norms.size
    keys, heads, depth, q_row, kv_row, _ = layout
    start, key_start, value_start, out_start = starts(head, time, layout)
    width = heads * depth
    visible = mask[head // heads * keys:(head // heads + 1) * keys]
    first = first_visible(visible)
    zero, one = norms.dtype.type(0), norms.dtype.type(1)
    lowest, scale = norms.dtype.type(-math.inf), norms.dtype.type(1 / math.sqrt(depth))
    deep = elements(depth, paired)
    if fresh:
        for j in range(0, keys, tile):
            pack_panel(kv, key_start + j * kv_row, kv_row, min(tile, keys - j), depth,
                       key_panels, j * deep, tile, paired)
        if paired is not None:
            pair_down(kv, value_start, kv_row, depth, keys, values.reshape(-1), padded)
        else:
            pack_rows(kv, value_start, kv_row, keys, depth, one, visible, values)
    start_tiles(paired is not None)
    for i0 in range(first_query, last_query, most):
        rows = min(most, time - i0)
        pack_rows(q, start + i0 * q_row, q_row, rows, depth, scale, visible[:0], queries)
        if paired is not None:
            pair_rows(queries, rows)
        sums[:] = 0
        tops[0] = -math.inf
        tops[1] = 0
        reach = i0 + keys - time if causal else keys                   # query i sees the keys to i + reach
        for j0 in range(0, min(keys, rows + reach), block):
            count = min(block, keys - j0)
            diagonal = reach - j0
            multiply_panels(queries, 0, padded, key_panels, j0 * deep, deep, scores, block,
                            rows, count, tile, diagonal, paired)
            for i in range(rows):
                n = max(0, min(count, i + 1 + diagonal))
                if visible.size:
                    hide(scores[i], n, visible[j0:j0 + count], lowest)
                weigh(scores, i, n, tops, sums, paired)
                if kept_scale != one:
                    drop(scores, i, n, dropout, head * time + i0 + i, j0, paired)
            if paired is not None:
                pair_rows(scores, rows)
            multiply_rows(scores, block, values, elements(j0, paired) * padded, sums, 0, padded,
                          rows, count, tile, diagonal, paired)
        for i in range(rows):
            norms[i0 + i] = tops[0, i] + norms.dtype.type(math.log(tops[1, i]))
            to = out_start + (i0 + i) * width
            if first > min(keys - 1, i + reach):
                out[to:to + depth] = zero
            else:
                scale_row(sums, i * padded, depth, one / tops[1, i], out, to)
    stop_tiles(paired is not None)


@helper
def starts(head, time, layout):
    """Where the queries, keys, values and outputs of a head of a sequence start."""
    keys, heads, depth, q_row, kv_row, first_key = layout
    sequence, column = head // heads, head % heads * depth
    key_start = sequence * keys * kv_row + first_key + column
    return (sequence * time * q_row + column, key_start, key_start + heads * depth,
            sequence * time * heads * depth + column)


@helper
def first_visible(visible):
    first = 0
    while first < visible.size and not visible[first]:
        first += 1
    return first


@helper
def weigh(scores, i, n, tops, sums, paired):
    """p = exp(s - m) for n keys, 0 for the others; tops carry m and Σ p of query i, earlier sums shrink."""
    zero, lowest = tops.dtype.type(0), tops.dtype.type(-math.inf)
    start, end = i * scores.shape[1], read(n, scores.shape[1], paired)
    fill_vectors(scores, start, n, end, lowest)
    m = max(tops[0, i], row_max(scores, start, n))
    base = m if m > -math.inf else zero                   # scores of -inf alone: exp(s - 0) is 0
    total = zero
    for j in range(end):
        e = exp_below(scores[i, j] - base)
        scores[i, j] = e
        total += e
    if m != tops[0, i]:
        if tops[1, i] != zero:
            shrink = exp_below(tops[0, i] - base)
            tops[1, i] *= shrink
            for d in range(sums.shape[1]):
                sums[i, d] *= shrink
        tops[0, i] = m
    tops[1, i] += total


@helper
def backward_pieces(dout, q, kv, mask, out, norms, dq, dkv, layout, causal, dropout, blocks, parts, scratch,
                    thread, threads, counters, paired):
    """The parts of the keys that one thread gets, so many of a head."""
    units, packed = len(norms) * parts, -1
    unit, end, whose = next_piece(counters, thread, threads, units, units, 1)
    while unit < end:
        head = unit // parts
        head_backward(dout, q, kv, mask, out, norms[head], dq, dkv, head, head != packed, unit - head * parts,
                      parts, layout, causal, dropout, blocks, scratch, thread, paired)
        packed = head
        unit += 1
        if unit == end:
            unit, end, whose = next_piece(counters, whose, threads, units, units, 1)


@helper
def head_backward(dout, q, kv, mask, out, norms, dq, dkv, head, fresh, part, parts, layout, causal, dropout,
                  blocks, scratch, thread, paired):
    """One part of the keys of one head; as `head_forward`. Of several parts each has its own sum of dq."""
    kept_scale = dropout[1]
    tile, padded, block, most = blocks
    dqueries = scratch[0][thread if parts == 1 else head * parts + part]
    queries, douts, deltas = scratch[1][thread], scratch[2][thread], scratch[3][thread]       # of the head
    key_panels, value_panels, key_block = scratch[4][thread], scratch[5][thread], scratch[6][thread]
    dkeys, dvalues = scratch[7][thread], scratch[8][thread]                                   # of a key block
    weights, dscores = scratch[9][thread], scratch[10][thread]      # p and ds of a query block with it
    query_pairs, dout_pairs = scratch[11][thread], scratch[12][thread]        # along queries, of the head
    weight_pairs, dscore_pairs = scratch[13][thread], scratch[14][thread]     # and of the blocks
    upright = scratch[15][thread]                                   # sums that a tile unit has turned over
    block_rows, flat_dqueries = weights.shape[1], dqueries.reshape(-1)
    time = norms.size
    keys, heads, depth, q_row, kv_row, _ = layout
    start, key_start, value_start, out_start = starts(head, time, layout)
    width = heads * depth
    visible = mask[head // heads * keys:(head // heads + 1) * keys]
    zero, one = norms.dtype.type(0), norms.dtype.type(1)
    scale = norms.dtype.type(1 / math.sqrt(depth))
    first_key, last_key = keys_of(part, parts, keys, block)
    for at in range(first_seeing(first_key, time, keys, causal, most) * padded, flat_dqueries.size):
        flat_dqueries[at] = zero
    if fresh:
        pack_rows(q, start, q_row, time, depth, scale, visible[:0], queries)
        pack_rows(dout, out_start, width, time, depth, one, visible[:0], douts)
        for i in range(time):
            deltas[i] = inner(douts[i], out[out_start + i * width:out_start + i * width + depth])
        if paired is not None:
            for x, pairs in ((queries, query_pairs), (douts, dout_pairs)):
                pair_across(x.reshape(-1), padded, padded, time, pairs.reshape(-1), pairs.shape[1])
                pair_rows(x, time)
    deep = elements(depth, paired)
    start_tiles(paired is not None)
    for j0 in range(first_key, last_key, block):
        count = min(block, keys - j0)
        key_at, value_at = key_start + j0 * kv_row, value_start + j0 * kv_row
        for j in range(0, count, tile):
            for panels, begin in ((key_panels, key_at), (value_panels, value_at)):
                pack_panel(kv, begin + j * kv_row, kv_row, min(tile, count - j), depth,
                           panels, j * deep, tile, paired)
        if paired is not None:
            pair_down(kv, key_at, kv_row, depth, count, key_block.reshape(-1), padded)
        else:
            pack_rows(kv, key_at, kv_row, count, depth, one, visible[j0:j0 + count], key_block)
        dkeys[:] = 0
        dvalues[:] = 0
        for i0 in range(first_seeing(j0, time, keys, causal, most), time, most):
            rows = min(most, time - i0)
            diagonal = (i0 + keys - time if causal else keys) - j0
            at = i0 * padded
            multiply_panels(queries, at, padded, key_panels, 0, deep, weights, block_rows,
                            rows, count, tile, diagonal, paired)
            multiply_panels(douts, at, padded, value_panels, 0, deep, dscores, block_rows,
                            rows, count, tile, diagonal, paired)
            for i in range(rows):
                n = max(0, min(count, i + 1 + diagonal))
                if kept_scale != one:
                    weigh_backward_dropped(weights, dscores, i, n, norms[i0 + i], deltas[i0 + i], dropout,
                                           head * time + i0 + i, j0, paired)
                else:
                    weigh_backward(weights, dscores, i, n, norms[i0 + i], deltas[i0 + i], paired)
                if visible.size:
                    hide(weights[i], n, visible[j0:j0 + count], zero)
                    hide(dscores[i], n, visible[j0:j0 + count], zero)
            if paired is not None:
                for x, pairs in ((weights, weight_pairs), (dscores, dscore_pairs)):
                    pair_down(x.reshape(-1), 0, block_rows, block_rows, rows, pairs, block_rows)
                pair_rows(dscores, rows)
            multiply_rows(dscores, block_rows, key_block, 0, dqueries, at, padded,
                          rows, count, tile, diagonal, paired)
            if paired is not None:
                multiply_columns(weight_pairs, block_rows, dout_pairs.reshape(-1), elements(i0, paired),
                                 dout_pairs.shape[1], dvalues, dvalues.shape[1], padded,
                                 rows, count, tile, diagonal, paired)
                multiply_columns(dscore_pairs, block_rows, query_pairs.reshape(-1), elements(i0, paired),
                                 query_pairs.shape[1], dkeys, dkeys.shape[1], padded,
                                 rows, count, tile, diagonal, paired)
            else:
                multiply_columns(weights.reshape(-1), block_rows, douts.reshape(-1), i0, padded,
                                 dvalues, padded, padded, rows, count, tile, diagonal, paired)
                multiply_columns(dscores.reshape(-1), block_rows, queries.reshape(-1), i0, padded,
                                 dkeys, padded, padded, rows, count, tile, diagonal, paired)
        for x, at in ((dkeys, key_at), (dvalues, value_at)):
            if paired is not None and TILES:
                turn_over(x, upright)
                unpack_rows(upright, count, depth, one, dkv, at, kv_row)
            else:
                unpack_rows(x, count, depth, one, dkv, at, kv_row)
    stop_tiles(paired is not None)
    if parts == 1:
        unpack_rows(dqueries, time, depth, scale, dq, start, q_row)


@helper
def keys_of(part, parts, keys, block):
    """The first key of a part, and the one behind its last: parts are whole blocks."""
    count = (keys + block - 1) // block
    return count * part // parts * block, min(keys, count * (part + 1) // parts * block)


@helper
def first_seeing(key, time, keys, causal, most):
    """Where the first block begins of which a query sees a key."""
    return max(0, key - (keys - time)) // most * most if causal else 0


@helper
def add_parts(dqueries, dq, task, time, parts, layout, causal, blocks):
    """dq of a block of queries of a head, from the sums that parts of the keys gave."""
    _, _, block, most = blocks
    keys, _, depth, q_row, _, _ = layout
    of_each = (time + most - 1) // most
    head, i0 = task // of_each, task % of_each * most
    rows = min(most, time - i0)
    total = dqueries[head * parts, i0:i0 + rows].reshape(-1)
    for part in range(1, parts):
        first_key, _ = keys_of(part, parts, keys, block)
        if first_seeing(first_key, time, keys, causal, most) <= i0:
            more = dqueries[head * parts + part, i0:i0 + rows].reshape(-1)
            for at in range(total.size):
                total[at] += more[at]
    start, _, _, _ = starts(head, time, layout)
    unpack_rows(dqueries[head * parts, i0:], rows, depth, dq.dtype.type(1 / math.sqrt(depth)), dq,
                start + i0 * q_row, q_row)


@helper
def weigh_backward(weights, dscores, i, n, norm, delta, paired):
    """p = exp(s - n), ds = p (dp - δ), in place of s and dp of query i, for n keys; 0 for the others."""
    base, end = end_backward(weights, dscores, i, n, norm, paired)
    for j in range(end):
        p = exp_below(weights[i, j] - base)
        weights[i, j] = p
        dscores[i, j] = p * (dscores[i, j] - delta)


@helper
def weigh_backward_dropped(weights, dscores, i, n, norm, delta, dropout, mask_row, first_column, paired):
    """As that, with dropout of dp, and of p for the sums of dv."""
    limit, kept_scale, start = dropout
    low, high = halves(start, mask_row)
    base, end = end_backward(weights, dscores, i, n, norm, paired)
    zero = weights.dtype.type(0)
    for j in range(end):
        p = exp_below(weights[i, j] - base)
        stays = kept(low, high, first_column + j, limit)
        weights[i, j] = p * kept_scale if stays else zero
        dscores[i, j] = p * ((dscores[i, j] * kept_scale if stays else zero) - delta)


@helper
def end_backward(weights, dscores, i, n, norm, paired):
    """What makes weights and dscores 0 from n on; the norm, or 0 for a query that sees no key; the end."""
    start, end = i * weights.shape[1], read(n, weights.shape[1], paired)
    fill_vectors(weights, start, n, end, weights.dtype.type(-math.inf))
    fill_vectors(dscores, start, n, end, weights.dtype.type(0))
    return weights.dtype.type(0) if norm == -math.inf else norm, end        # NaN goes on


@helper
def inner(x, y):
    total = y.dtype.type(0)
    for d in range(y.size):
        total += x[d] * y[d]
    return total


@mover
def hide(row, n, visible, value):
    """value in the place of what is not visible, in the first n of a row."""
    out_of_line()
    for j in range(n):
        if not visible[j]:
            row[j] = value


@mover
def drop(weights, i, n, dropout, mask_row, first_column, paired):
    """Dropout of the first n of row i of weights, behind which are zeros."""
    out_of_line()
    limit, kept_scale, start = dropout
    low, high = halves(start, mask_row)
    zero = weights.dtype.type(0)
    for j in range(read(n, weights.shape[1], paired)):
        weights[i, j] = weights[i, j] * kept_scale if kept(low, high, first_column + j, limit) else zero
