"""What a thread does of attention, forward and backward: blocks of a head of a sequence.
See `kernels.attention`.

A block of scores has a row for each key, and its queries side by side. So a query's largest score, and the
sum of its weights, are found for a vector of queries at once, and no sum goes across a vector. Loops over
QUERIES, a number known when they are compiled, have no remainders.
"""
from __future__ import annotations

import math

import numpy as np

from kernels.amx import start_tiles, stop_tiles
from kernels.blocks import (
    TILES,
    elements,
    multiply_panels,
    pack_panel,
    pack_rows,
    pair_across,
    pair_down,
    pair_rows,
    pair_scores,
    sum_over_keys,
    sum_over_queries,
    tile_rows,
    turn_over,
    unpack_rows,
)
from kernels.dropout import halves, kept
from kernels.elementary import exp_below
from kernels.jit import helper, mover
from kernels.plan import SAME_SET
from kernels.rows import scale_row
from kernels.share import next_piece
from kernels.simd import out_of_line

QUERIES = 64                         # in a block: whole register tiles and one of SHORT, exactly
FEW_QUERIES = 16                     # that a block has when a text is written token by token
SELDOM = 256                         # rows of a head, which are multiplied too seldom to pay for a copy
BAND = 64                            # keys, in whole register tiles: what is done with their scores, one by
                                     # one, is done while these are in the first-level cache. Even, as rows
                                     # and pairs are taken two at a time
AT_ONCE = 2                          # rows of scores, to load and store what belongs to their columns once


@helper
def forward_pieces(q, kv, mask, out, norms, layout, causal, dropout, blocks, of_each, scratch, thread,
                   threads, counters, paired):
    """The blocks of queries that one thread gets, of_each of a head, or whole heads where that is 1."""
    units, packed = len(norms) * of_each, -1
    first, end, whose = next_piece(counters, thread, threads, units, units, 1)
    while first < end:
        head = first // of_each
        start, stop = first - head * of_each, min(of_each, end - head * of_each)
        i0, i1 = (start * QUERIES, stop * QUERIES) if of_each > 1 else (0, norms.shape[1])
        head_forward(q, kv, mask, out, norms[head], head, head != packed, i0, min(i1, norms.shape[1]), layout,
                     causal, dropout, blocks, scratch, thread, paired)
        packed = head
        first += stop - start
        if first == end:
            first, end, whose = next_piece(counters, whose, threads, units, units, 1)


@helper
def head_forward(q, kv, mask, out, norms, head, fresh, first_query, last_query, layout, causal, dropout,
                 blocks, scratch, thread, paired):
    """Some queries of one head of one sequence. fresh: what is copied of it is not yet in the scratch.
    paired: as `_paired` has it.
    """
    kept_scale = dropout[1]
    tile, padded, block = blocks
    key_rows, values = scratch[0][thread], scratch[1][thread]                             # of the head
    queries, scores, sums = scratch[2][thread], scratch[3][thread], scratch[4][thread]    # of a query block
    tops, pairs, upright = scratch[5][thread], scratch[6][thread], scratch[7][thread]
    time, across = norms.size, scores.shape[1]
    keys, heads, depth, q_row, kv_row, _ = layout
    start, key_start, value_start, out_start = starts(head, time, layout)
    width = heads * depth
    visible = mask[head // heads * keys:(head // heads + 1) * keys]
    first = first_visible(visible)
    zero, one = norms.dtype.type(0), norms.dtype.type(1)
    scale = norms.dtype.type(1 / math.sqrt(depth))
    deep, band = elements(depth, paired), band_keys(paired)
    in_place = visible.size == 0 and read_in_place(kv, kv_row, keys, depth, padded, paired)
    flat_values, value_at, value_row = rows_of(kv, value_start, kv_row, values, in_place)
    if fresh:
        pack_rows(kv, key_start, kv_row, keys, depth, scale, visible, key_rows)
        if paired is not None:
            pair_rows(key_rows, keys, padded)
            pair_across(kv, value_start, kv_row, depth, keys, values.reshape(-1), values.shape[1])
        elif not in_place:
            pack_rows(kv, value_start, kv_row, keys, depth, one, visible, values)
    start_tiles(paired is not None)
    for i0 in range(first_query, last_query, QUERIES):
        rows = min(QUERIES, time - i0)
        for i in range(0, rows, tile):
            pack_panel(q, start + (i0 + i) * q_row, q_row, min(tile, rows - i), depth, queries, i * deep,
                       tile, paired)
        sums[:] = 0
        tops[0] = -math.inf
        tops[1] = 0
        if kept_scale != one:
            low, high = halves_of_rows(dropout, head * time + i0)
        few = rows <= FEW_QUERIES
        reach = i0 + keys - time if causal else keys                   # query i sees the keys to i + reach
        for j0 in range(0, min(keys, rows + reach), block):
            diagonal = reach - j0
            count = min(block, keys - j0, rows + diagonal)
            tops[3] = tops[0]
            for j in range(0, count, band):
                s, of_band = scores[j:], min(band, count - j)
                multiply_panels(key_rows.reshape(-1), (j0 + j) * padded, padded, queries, deep, s,
                                across, of_band, rows, tile, diagonal - j, paired)
                hide(s, of_band, diagonal - j, visible[j0 + j:j0 + j + of_band], -math.inf)
                if few:
                    find_tops(s, of_band, FEW_QUERIES, tops[3])
                else:
                    find_tops(s, of_band, QUERIES, tops[3])
            update_tops(tops)
            if j0 > 0:
                shrink(sums, rows, tops[2], paired)
            for j in range(0, count, band):
                s, of_band = scores[j:], min(band, count - j)
                if few:
                    weigh(s, of_band, FEW_QUERIES, tops[3], tops[1])
                else:
                    weigh(s, of_band, QUERIES, tops[3], tops[1])
                if kept_scale != one:
                    drop(s, of_band, dropout, low, high, j0 + j)
                if paired is not None:
                    pair_scores(s, of_band, QUERIES, pairs[j // 2 * across:])
            if paired is not None:
                sum_over_keys(pairs, across, flat_values,
                              elements(j0, paired) * (1 if TILES else padded), value_row,
                              sums.reshape(-1), 0, sums.shape[1], padded, count, rows, tile, diagonal, paired)
            else:
                sum_over_keys(scores.reshape(-1), across, flat_values, value_at + j0 * value_row, value_row,
                              sums.reshape(-1), 0, padded, padded, count, rows, tile, diagonal, paired)
        if paired is not None and TILES:
            turn_over(sums, upright)
        for i in range(rows):
            norms[i0 + i] = tops[0, i] + norms.dtype.type(math.log(tops[1, i]))
            to = out_start + (i0 + i) * width
            if first > min(keys - 1, i + reach):
                out[to:to + depth] = zero
            elif paired is not None and TILES:
                scale_row(upright, i * padded, depth, one / tops[1, i], out, to)
            else:
                scale_row(sums, i * padded, depth, one / tops[1, i], out, to)
    stop_tiles(paired is not None)


@helper
def band_keys(paired):
    """BAND in whole register tiles."""
    return (BAND + tile_rows(paired) - 1) // tile_rows(paired) * tile_rows(paired)


@helper
def read_in_place(x, row, count, depth, padded, paired):
    """Are so many rows of a head multiplied where they are, so far apart in x? If they are whole register
    tiles, and few.
    """
    return paired is None and depth == padded and count <= SELDOM and row * x.itemsize % SAME_SET != 0


@helper
def rows_of(x, start, row, copy, in_place):
    """An array, where in it the rows begin that are multiplied, and elements from one to the next."""
    if in_place:
        return x, start, row
    return copy.reshape(-1), 0, copy.shape[1]


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


@mover
def hide(x, count, diagonal, visible, value):
    """value in the place of what queries do not see of x, and in the rows behind the last key, so that rows
    can be taken AT_ONCE.
    """
    out_of_line()
    value = x.dtype.type(value)
    for j in range(max(0, diagonal + 1), count):
        for i in range(QUERIES):
            x[j, i] = value if i < j - diagonal else x[j, i]
    for j in range(count, (count + AT_ONCE - 1) // AT_ONCE * AT_ONCE):
        for i in range(QUERIES):
            x[j, i] = value
    for j in range(visible.size):
        if not visible[j]:
            for i in range(QUERIES):
                x[j, i] = value


@helper
def find_tops(scores, count, queries, top):
    """The largest scores of the queries, those in top among them."""
    for j in range(0, count, AT_ONCE):
        a, b = scores[j], scores[j + 1]
        for i in range(queries):
            x = a[i] if a[i] > b[i] else b[i]
            top[i] = x if x > top[i] else top[i]


@helper
def update_tops(tops):
    """The rows of tops: m, Σ p, exp(m' - m), and what is to be taken from scores. The last has m with what a
    block adds, the first as yet m', the m before.
    """
    zero, lowest = tops.dtype.type(0), tops.dtype.type(-math.inf)
    top, total, shrinks, base = tops[0], tops[1], tops[2], tops[3]
    for i in range(QUERIES):
        before = top[i]
        top[i] = base[i]
        base[i] = base[i] if base[i] > lowest else zero    # scores of -inf alone: exp(s - 0) is 0
        shrinks[i] = exp_below(before - base[i])
        total[i] *= shrinks[i]


@helper
def weigh(scores, count, queries, base, total):
    """p = exp(s - m) in place, and added to Σ p."""
    for j in range(0, count, AT_ONCE):
        a, b = scores[j], scores[j + 1]
        for i in range(queries):
            x, y = exp_below(a[i] - base[i]), exp_below(b[i] - base[i])
            a[i], b[i] = x, y
            total[i] += x + y


@mover
def shrink(sums, rows, factors, paired):
    """Earlier sums, whose m was smaller, times exp(m' - m)."""
    out_of_line()
    if paired is not None and TILES:
        for d in range(len(sums)):
            for i in range(QUERIES):
                sums[d, i] *= factors[i]
    else:
        for i in range(rows):
            if factors[i] != 1:
                scale_row(sums, i * sums.shape[1], sums.shape[1], factors[i], sums, i * sums.shape[1])


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
    tile, padded, block = blocks
    dqueries = scratch[0][thread if parts == 1 else head * parts + part]
    queries, douts = scratch[1][thread], scratch[2][thread]        # of the head: what is summed over queries,
    query_panels, dout_panels = scratch[3][thread], scratch[4][thread]                 # and what makes scores
    of_queries = scratch[5][thread]                                                     # n and δ
    key_rows, value_rows = scratch[6][thread], scratch[7][thread]                       # of a key block
    dkeys, dvalues = scratch[8][thread], scratch[9][thread]
    weights, dscores = scratch[10][thread], scratch[11][thread]     # p and ds of a query block with it
    key_pairs, dscore_pairs, turned = scratch[12][thread], scratch[13][thread], scratch[14][thread]
    across, flat_dqueries = weights.shape[1], dqueries.reshape(-1)
    time = norms.size
    keys, heads, depth, q_row, kv_row, _ = layout
    start, key_start, value_start, out_start = starts(head, time, layout)
    width = heads * depth
    visible = mask[head // heads * keys:(head // heads + 1) * keys]
    zero, one = norms.dtype.type(0), norms.dtype.type(1)
    scale = norms.dtype.type(1 / math.sqrt(depth))
    first_key, last_key = keys_of(part, parts, keys, block)
    deep, band = elements(depth, paired), band_keys(paired)
    if paired is not None and TILES:
        turned[:] = 0
    else:
        for at in range(first_seeing(first_key, time, keys, causal) * padded, flat_dqueries.size):
            flat_dqueries[at] = zero
    q_in_place = read_in_place(q, q_row, time, depth, padded, paired)
    dout_in_place = read_in_place(dout, width, time, depth, padded, paired)
    flat_q, q_at, q_step = rows_of(q, start, q_row, queries, q_in_place)
    flat_dout, dout_at, dout_step = rows_of(dout, out_start, width, douts, dout_in_place)
    if fresh:
        for i in range(0, time, tile):
            count = min(tile, time - i)
            pack_panel(q, start + i * q_row, q_row, count, depth, query_panels, i * deep, tile, paired)
            pack_panel(dout, out_start + i * width, width, count, depth, dout_panels, i * deep, tile, paired)
        if paired is not None:
            for i0 in range(0, time, QUERIES):
                rows, to = min(QUERIES, time - i0), elements(i0, paired) * padded
                pair_down(q, start + i0 * q_row, q_row, depth, rows, queries.reshape(-1), to, padded)
                pair_down(dout, out_start + i0 * width, width, depth, rows, douts.reshape(-1), to, padded)
        else:
            if not q_in_place:
                pack_rows(q, start, q_row, time, depth, one, visible[:0], queries)
            if not dout_in_place:
                pack_rows(dout, out_start, width, time, depth, one, visible[:0], douts)
        of_queries[:] = 0                                           # of those beyond the last, too
        for i in range(time):
            at = out_start + i * width
            of_queries[0, i] = norms[i] if norms[i] != -math.inf else zero       # that one sees no key
            of_queries[1, i] = inner(dout[at:at + depth], out[at:at + depth])
    start_tiles(paired is not None)
    for j0 in range(first_key, last_key, block):
        count = min(block, keys - j0)
        key_at, value_at = key_start + j0 * kv_row, value_start + j0 * kv_row
        seen = visible[j0:j0 + count]
        pack_rows(kv, key_at, kv_row, count, depth, scale, seen, key_rows)
        pack_rows(kv, value_at, kv_row, count, depth, one, seen, value_rows)
        if paired is not None:
            pair_across(key_rows.reshape(-1), 0, padded, padded, count, key_pairs.reshape(-1),
                        key_pairs.shape[1])
            pair_rows(key_rows, count, padded)
            pair_rows(value_rows, count, padded)
        dkeys[:] = 0
        dvalues[:] = 0
        for i0 in range(first_seeing(j0, time, keys, causal), time, QUERIES):
            rows = min(QUERIES, time - i0)
            diagonal = (i0 + keys - time if causal else keys) - j0
            n = rows + diagonal + tile_rows(paired) - 1           # whole register tiles, as they add to sums
            n = min(count, n // tile_rows(paired) * tile_rows(paired))
            norm, delta = of_queries[0, i0:i0 + QUERIES], of_queries[1, i0:i0 + QUERIES]
            if kept_scale != one:
                low, high = halves_of_rows(dropout, head * time + i0)
            for j in range(0, n, band):
                p, ds, of_band = weights[j:], dscores[j:], min(band, n - j)
                multiply_panels(key_rows.reshape(-1), j * padded, padded, query_panels[i0 * deep:], deep, p,
                                across, of_band, rows, tile, diagonal - j, paired)
                multiply_panels(value_rows.reshape(-1), j * padded, padded, dout_panels[i0 * deep:], deep, ds,
                                across, of_band, rows, tile, diagonal - j, paired)
                hide(p, of_band, diagonal - j, seen[j:j + of_band], -math.inf)
                hide(ds, of_band, diagonal - j, seen[j:j + of_band], 0.0)
                if kept_scale != one:
                    weigh_backward_dropped(p, ds, of_band, norm, delta, dropout, low, high, j0 + j)
                else:
                    weigh_backward(p, ds, of_band, norm, delta)
                if paired is not None:
                    pair_scores(ds, of_band, QUERIES, dscore_pairs[j // 2 * across:])
                    pair_rows(p, of_band, QUERIES)
                    pair_rows(ds, of_band, QUERIES)
            if paired is not None:
                at, row = (i0, turned.shape[1]) if TILES else (i0 * padded, padded)
                sum_over_keys(dscore_pairs, across, key_pairs.reshape(-1), 0, key_pairs.shape[1],
                              turned.reshape(-1) if TILES else flat_dqueries, at, row, padded, n, rows, tile,
                              diagonal, paired)
            else:
                sum_over_keys(dscores.reshape(-1), across, key_rows.reshape(-1), 0, padded, flat_dqueries,
                              i0 * padded, padded, padded, n, rows, tile, diagonal, paired)
            at = elements(i0, paired)
            sum_over_queries(weights.reshape(-1), across, flat_dout, dout_at + at * dout_step, dout_step,
                             dvalues.reshape(-1), padded, n, rows, tile, diagonal, paired)
            sum_over_queries(dscores.reshape(-1), across, flat_q, q_at + at * q_step, q_step,
                             dkeys.reshape(-1), padded, n, rows, tile, diagonal, paired)
        unpack_rows(dkeys, count, depth, scale, dkv, key_at, kv_row)
        unpack_rows(dvalues, count, depth, one, dkv, value_at, kv_row)
    stop_tiles(paired is not None)
    if paired is not None and TILES:
        turn_over(turned, dqueries)
    if parts == 1:
        unpack_rows(dqueries, time, depth, one, dq, start, q_row)


@helper
def keys_of(part, parts, keys, block):
    """The first key of a part, and the one behind its last: parts are whole blocks."""
    count = (keys + block - 1) // block
    return count * part // parts * block, min(keys, count * (part + 1) // parts * block)


@helper
def first_seeing(key, time, keys, causal):
    """Where the first block begins of which a query sees a key."""
    return max(0, key - (keys - time)) // QUERIES * QUERIES if causal else 0


@helper
def add_parts(dqueries, dq, task, time, parts, layout, causal, blocks):
    """dq of a block of queries of a head, from the sums that parts of the keys gave."""
    _, _, block = blocks
    keys, _, depth, q_row, _, _ = layout
    of_each = (time + QUERIES - 1) // QUERIES
    head, i0 = task // of_each, task % of_each * QUERIES
    rows = min(QUERIES, time - i0)
    total = dqueries[head * parts, i0:i0 + rows].reshape(-1)
    for part in range(1, parts):
        first_key, _ = keys_of(part, parts, keys, block)
        if first_seeing(first_key, time, keys, causal) <= i0:
            more = dqueries[head * parts + part, i0:i0 + rows].reshape(-1)
            for at in range(total.size):
                total[at] += more[at]
    start, _, _, _ = starts(head, time, layout)
    unpack_rows(dqueries[head * parts, i0:], rows, depth, dq.dtype.type(1), dq,
                start + i0 * q_row, q_row)


@helper
def weigh_backward(weights, dscores, count, norm, delta):
    """p = exp(s - n), ds = p (dp - δ), in place of s and dp."""
    for j in range(0, count, AT_ONCE):
        s0, s1, d0, d1 = weights[j], weights[j + 1], dscores[j], dscores[j + 1]
        for i in range(QUERIES):
            p0, p1 = exp_below(s0[i] - norm[i]), exp_below(s1[i] - norm[i])
            s0[i], s1[i] = p0, p1
            d0[i], d1[i] = p0 * (d0[i] - delta[i]), p1 * (d1[i] - delta[i])


@helper
def weigh_backward_dropped(weights, dscores, count, norm, delta, dropout, low, high, first_column):
    """As that, with dropout of dp, and of p for the sums of dv. low, high: as `halves_of_rows` has them."""
    limit, kept_scale, _ = dropout
    zero = weights.dtype.type(0)
    for j in range(count):
        scores, ds = weights[j], dscores[j]
        for i in range(QUERIES):
            p = exp_below(scores[i] - norm[i])
            factor = kept_scale if kept(low[i], high[i], first_column + j, limit) else zero
            scores[i] = p * factor
            ds[i] = p * (ds[i] * factor - delta[i])


@mover
def drop(weights, count, dropout, low, high, first_column):
    """Dropout of the weights of so many keys. low, high: as `halves_of_rows` has them."""
    out_of_line()
    limit, kept_scale, _ = dropout
    zero = weights.dtype.type(0)
    for j in range(count):
        row = weights[j]
        for i in range(QUERIES):
            row[i] = row[i] * kept_scale if kept(low[i], high[i], first_column + j, limit) else zero


@helper
def halves_of_rows(dropout, first_row):
    """The halves of the keys of QUERIES rows of dropout's mask, from the first on."""
    low, high = np.empty(QUERIES, np.uint32), np.empty(QUERIES, np.uint32)
    for i in range(QUERIES):
        low[i], high[i] = halves(dropout[2], first_row + i)
    return low, high


@helper
def inner(x, y):
    total = y.dtype.type(0)
    for d in range(y.size):
        total += x[d] * y[d]
    return total
