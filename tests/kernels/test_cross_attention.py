"""Attention from one sequence to another, and masks of keys: against numpy, and against packed attention."""
import functools

import numpy as np
import pytest

import kernels
from kernels import memory
from tests.kernels.test_attention import (
    BF16_ROUNDINGS,
    BOTH,
    CAUSAL,
    cross_backward,
    cross_forward,
    cut,
    normal,
)

SIZES = (                                    # B, T, S, H, D: less than a tile, some tiles, more keys or fewer
    (1, 1, 1, 1, 1), (2, 1, 7, 2, 5), (1, 5, 130, 3, 8), (2, 47, 49, 1, 17), (1, 65, 300, 2, 16),
    (2, 130, 3, 2, 33), (1, 200, 64, 1, 32))


def run(dout, q, kv, heads, causal=False, p=0.0, seed=0, mask=None):
    """out, norms, dq, dkv."""
    out, norms = kernels.cross_attention_forward(q, kv, heads, causal, p, seed, mask)
    dq, dkv = kernels.cross_attention_backward(dout, q, kv, out, norms, heads, causal, p, seed, mask)
    return out, norms, dq, dkv


def draw(batch, time, keys, heads, depth, dtype):
    width = heads * depth
    return (normal(batch, time, width, dtype=dtype, seed=1), normal(batch, time, width, dtype=dtype),
            normal(batch, keys, 2 * width, dtype=dtype))


def masks(batch, keys):
    """None, at random, the front and the back hidden, and all of one sequence hidden."""
    random = np.random.default_rng(keys).random((batch, keys)) < 0.6
    at = np.arange(keys)
    yield from (None, random, random & (at >= keys // 2), random & (at <= keys // 3),
                random & (np.arange(batch) > 0)[:, None])


def check(close, sizes, dtype, causal, p, roundings, where, mask=None):
    """Everything against the whole matrix."""
    dout, q, kv = draw(*sizes, dtype)
    arguments = sizes[3], causal, p, 5, mask
    out, norms, dq, dkv = run(dout, q, kv, *arguments)
    assert out.dtype == norms.dtype == dq.dtype == dkv.dtype == dtype
    (expected, expected_norms), (size, norm_size) = cross_forward(q, kv, *arguments)
    close(out, expected, size, roundings, where)
    seeing = np.isfinite(expected_norms)
    assert np.all(np.isneginf(norms[~seeing]))
    close(norms[seeing], expected_norms[seeing], norm_size[seeing], roundings, where)
    gradients, sizes_of = cross_backward(dout, q, kv, *arguments)
    for result, value, size in zip((dq, dkv), gradients, sizes_of, strict=True):
        close(result, value, size, roundings, where)


def sizes_for(causal):
    return [sizes for sizes in SIZES if not causal or sizes[1] <= sizes[2]]


@BOTH
@CAUSAL
def test_equals_the_whole_matrix(dtype, causal, close):
    for sizes in sizes_for(causal):
        batch, time, keys, _, depth = sizes
        for i, mask in enumerate(masks(batch, keys)):
            roundings = 20 + np.sqrt(time + keys) + np.sqrt(depth)
            check(close, sizes, dtype, causal, 0.3 * (i % 2), roundings, f"{sizes}, mask {i}", mask)


@CAUSAL
def test_bf16_equals_the_whole_matrix(causal, bf16_attention, close):
    for sizes in sizes_for(causal):
        check(close, sizes, np.float32, causal, 0.3, BF16_ROUNDINGS, f"{sizes}")


@CAUSAL
def test_under_a_mask_bf16_is_float32(causal, bf16_attention, same_bits):
    dout, q, kv = draw(2, 47, 49, 1, 17, np.float32)
    masked = functools.partial(run, dout, q, kv, 1, causal, mask=np.ones((2, 49), bool))
    coarse, rounded = run(dout, q, kv, 1, causal), masked()
    kernels.set_matmul_precision("highest")
    same_bits(masked(), rounded)
    same_bits(run(dout, q, kv, 1, causal), rounded)
    assert (coarse[0] != rounded[0]).any()


@BOTH
@CAUSAL
def test_a_sequence_to_itself_is_packed_attention(dtype, causal, same_bits):
    for batch, time, heads, depth, p in ((2, 127, 3, 17, 0.2), (1, 300, 2, 32, 0.0)):
        qkv = normal(batch, time, 3 * heads * depth, dtype=dtype)
        dout = normal(batch, time, heads * depth, dtype=dtype, seed=1)
        for mask in masks(batch, time):
            out, norms = kernels.attention_forward(qkv, heads, causal, p, 1, mask)
            dqkv = kernels.attention_backward(dout, qkv, out, norms, heads, causal, p, 1, mask)
            same_bits(run(dout, *cut(qkv), heads, causal, p, 1, mask), (out, norms, *cut(dqkv)))


@BOTH
def test_the_last_queries_are_those_of_packed_attention(dtype, same_bits):
    """So that whoever goes on with a text can keep its keys and values."""
    heads, time = 2, 300
    qkv, dout = normal(1, time, 3 * 34, dtype=dtype), normal(1, time, 34, dtype=dtype, seed=1)
    q, kv = cut(qkv)
    for last in (1, 2, 47, 64, 65, 172, 299):
        last_dout = np.where(np.arange(time)[:, None] < time - last, 0, dout)
        out, norms = kernels.attention_forward(qkv, heads)
        dq, dkv = cut(kernels.attention_backward(last_dout, qkv, out, norms, heads))
        packed = out[:, -last:], norms[..., -last:], dq[:, -last:], dkv
        rows = (np.ascontiguousarray(x[:, -last:]) for x in (dout, q))
        same_bits(run(*rows, kv, heads, causal=True), packed, f"last {last}")


@BOTH
@CAUSAL
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
def test_hidden_keys_never_matter(dtype, causal, value, same_bits):
    batch, time, keys, heads = 3, 65, 200, 2
    dout, q, kv = draw(batch, time, keys, heads, 9, dtype)
    for mask in list(masks(batch, keys))[1:]:
        expected = run(dout, q, kv, heads, causal, 0.1, 3, mask)
        changed = np.where(mask[:, :, None], kv, dtype(value))
        same_bits(run(dout, q, changed, heads, causal, 0.1, 3, mask), expected)
        assert not expected[3][~mask].any()


@BOTH
def test_a_query_that_sees_no_key_gets_zeros_and_passes_nothing_on(dtype):
    dout, q, kv = draw(2, 60, 60, 2, 9, dtype)
    mask = np.arange(60) >= np.array([[20], [60]])             # sequence 0 sees from key 20 on, 1 none
    for causal in (False, True):
        out, _, dq, dkv = run(dout, q, kv, 2, causal, mask=mask)
        for x in (out, dq):
            assert not x[1].any() and x[0, 21:].all() and bool(x[0, :20].any()) is not causal
        assert not dkv[1].any() and np.isfinite(dkv).all()


@BOTH
@CAUSAL
def test_heads_in_parts_equal_the_whole_matrix(dtype, causal, parts, close, one_and_two_threads, same_bits):
    for sizes in ((1, 65, 300, 3, 17), (2, 33, 100, 2, 8)):
        for mask in masks(sizes[0], sizes[2]):
            check(close, sizes, dtype, causal, 0.2, 60, f"{sizes}", mask)
    test_same_bits_on_one_and_two_threads(dtype, causal, one_and_two_threads, same_bits)


@BOTH
@CAUSAL
def test_same_bits_on_one_and_two_threads(dtype, causal, one_and_two_threads, same_bits):
    for sizes in ((1, 65, 300, 3, 17), (4, 7, 49, 1, 8)):
        dout, q, kv = draw(*sizes, dtype)
        for mask in masks(sizes[0], sizes[2]):
            call = functools.partial(run, dout, q, kv, sizes[3], causal, 0.2, 1, mask)
            same_bits(*one_and_two_threads(call))


@BOTH
def test_nan_in_a_query_stays_in_its_row_and_in_a_key_reaches_all(dtype, same_bits):
    _, q, kv = draw(2, 65, 130, 2, 9, dtype)
    clean = kernels.cross_attention_forward(q, kv, 2)
    bad = q.copy()
    bad[1, 50, 3] = np.nan
    out, norms = kernels.cross_attention_forward(bad, kv, 2)
    assert np.isnan(out[1, 50, :9]).all() and np.isnan(norms[1, 0, 50])
    out[1, 50, :9], norms[1, 0, 50] = clean[0][1, 50, :9], clean[1][1, 0, 50]
    same_bits((out, norms), clean)
    kv[1, 129, 0] = np.nan
    out, norms = kernels.cross_attention_forward(q, kv, 2)
    assert np.isnan(out[1, :, :9]).all() and np.isfinite(out[1, :, 9:]).all() and np.isfinite(out[0]).all()


def test_nothing_in_zeros_out():
    for batch, time, keys, width in ((0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)):
        q, kv = np.ones((batch, time, width)), np.ones((batch, keys, 2 * width))
        out, _, dq, dkv = run(q, q, kv, 1)
        assert out.shape == dq.shape == q.shape and dkv.shape == kv.shape
        assert not (out.any() or dq.any() or dkv.any())


@pytest.mark.parametrize("mask", [
    np.ones((2, 3), np.float32), np.ones((3, 2), bool), np.ones(3, bool), [[True] * 3] * 2, "ab"])
def test_masks_that_do_not_fit(mask):
    q, kv = np.ones((2, 1, 4)), np.ones((2, 3, 8))
    with pytest.raises(ValueError, match=r"cross_attention_forward: mask is .*; it must be .* \(2, 3\)"):
        kernels.cross_attention_forward(q, kv, 1, mask=mask)


def test_a_mask_of_any_layout():
    dout, q, kv = draw(2, 3, 6, 1, 4, np.float64)
    mask = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 1]], bool)
    read_only = np.asfortranarray(mask)
    read_only.flags.writeable = False
    for x, y in zip(run(dout, q, kv, 1, mask=mask), run(dout, q, kv, 1, mask=read_only), strict=True):
        np.testing.assert_array_equal(x, y)


def test_causal_needs_as_many_keys_as_queries():
    with pytest.raises(ValueError, match="cross_attention_forward: q has 3 queries and kv 2 keys; where"):
        kernels.cross_attention_forward(np.ones((1, 3, 1)), np.ones((1, 2, 2)), 1, causal=True)


def test_keys_and_values_are_never_taken_for_a_packed_array():
    x = np.ones((1, 2, 6))
    with pytest.raises(ValueError, match="cross_attention_forward: kv has shape"):
        kernels.cross_attention_forward(x, x, 1)


def test_buffers_grow_with_the_sequences_and_not_their_product():
    def used(tokens):
        """Bytes of results and scratch together, for each token."""
        memory._free.clear()
        run(*draw(1, tokens, 2 * tokens, 1, 16, np.float32), 1)
        return memory.free_bytes() / tokens

    assert used(2048) < 1.3 * used(512)                  # steps of a quarter between the sizes of buffers


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_the_width(heads):
    with pytest.raises(ValueError, match=rf"cross_attention_forward: q has a last axis of 4.*{heads} heads"):
        kernels.cross_attention_forward(np.ones((1, 3, 4)), np.ones((1, 2, 8)), heads)
