"""Attention on tiles against attention written with the whole T x T matrix, in numpy and float64."""
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kernels
from kernels import memory
from kernels.attention import MANY_KEYS
from kernels.cpu import TARGET
from kernels.simd import ROUNDS

BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float64])
CAUSAL = pytest.mark.parametrize("causal", [False, True])
TIMES = (1, 2, 3, 31, 33, 47, 48, 49, 65, 67, 71, 127)
DEPTHS = (1, 5, 8, 16, 17, 32, 33, 64)
BF16_ROUNDINGS = 4 * 2**16  # of float32: queries, keys, weights and what these multiply, in bfloat16


def normal(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def split(packed, parts, heads):
    """(B, T, parts x H x D) -> parts arrays (B, H, T, D) of float64."""
    batch, time, width = packed.shape
    cut = packed.astype(np.float64).reshape(batch, time, parts, heads, width // (parts * heads))
    return cut.transpose(2, 0, 3, 1, 4)


def join(*parts):
    """The way back: (B, H, T, D) each -> (B, T, parts x H x D)."""
    batch, heads, time, depth = parts[0].shape
    return np.stack(parts).transpose(1, 3, 0, 2, 4).reshape(batch, time, len(parts) * heads * depth)


def cut(qkv):
    """Queries, and keys with values, of a packed array."""
    width = qkv.shape[-1] // 3
    return np.ascontiguousarray(qkv[..., :width]), np.ascontiguousarray(qkv[..., width:])


def weights(q, kv, heads, causal, p, seed, mask):
    """Softmax of the scores, their norms, what dropout multiplies by, how large the terms of a score are."""
    q, k = split(q, 1, heads)[0], split(kv, 2, heads)[0]
    batch, _, time, depth = q.shape
    keys = k.shape[2]
    visible = np.tri(time, keys, keys - time, dtype=bool) if causal else np.ones((time, keys), bool)
    visible = visible & (mask if mask is not None else np.ones((batch, keys), bool))[:, None, None]
    s = np.where(visible, q @ k.swapaxes(-1, -2) / math.sqrt(depth), -np.inf)
    seeing = visible.any(axis=-1, keepdims=True)
    e = np.exp(s - np.where(seeing, s.max(axis=-1, keepdims=True), 0))
    kept = kernels.dropout_mask(batch * heads * time, keys, p, seed).reshape(s.shape) / (1 - p)
    terms = np.where(visible, np.abs(q) @ np.abs(k).swapaxes(-1, -2) / math.sqrt(depth), 0).max(axis=-1)
    return (e / np.where(seeing, e.sum(axis=-1, keepdims=True), 1), np.logaddexp.reduce(s, axis=-1), kept,
            terms)


def cross_forward(q, kv, heads, causal, p=0.0, seed=0, mask=None):
    """(out, norms), and how large what is rounded on the way to them is."""
    w, norms, kept, terms = weights(q, kv, heads, causal, p, seed, mask)
    v = split(kv, 2, heads)[1]
    out_size = (w * kept) @ np.abs(v) * (1 + terms[..., None])
    return (join((w * kept) @ v), norms), (join(out_size), 1 + np.abs(norms) + terms)


def cross_backward(dout, q, kv, heads, causal, p=0.0, seed=0, mask=None):
    """dq and dkv, and how large what is rounded on the way is."""
    w, _, kept, terms = weights(q, kv, heads, causal, p, seed, mask)
    (q,), (k, v), (do,) = split(q, 1, heads), split(kv, 2, heads), split(dout, 1, heads)
    scale = 1 / math.sqrt(q.shape[-1])

    def gradients(q, k, v, do, difference):
        dp = kept * (do @ v.swapaxes(-1, -2))
        ds = w * difference(dp, (w * dp).sum(axis=-1, keepdims=True)) * scale
        return join(ds @ k), join(ds.swapaxes(-1, -2) @ q, (w * kept).swapaxes(-1, -2) @ do)

    lost = 1 + terms.max()
    sizes = gradients(abs(q), abs(k), abs(v), abs(do), lambda dp, d: lost * (dp + d))
    return gradients(q, k, v, do, np.subtract), tuple(x + 0.01 * lost * abs(dout).max() for x in sizes)


def forward(qkv, heads, causal, p=0.0, seed=0):
    """As `cross_forward`, of a packed array."""
    return cross_forward(*cut(qkv), heads, causal, p, seed)


def backward(dout, qkv, heads, causal, p=0.0, seed=0):
    """As `cross_backward`, of a packed array."""
    return [np.concatenate(x, axis=-1) for x in cross_backward(dout, *cut(qkv), heads, causal, p, seed)]


def check(close, batch, time, heads, depth, dtype, causal, p=0.0, seed=5, roundings=0):
    where = f"B {batch}, T {time}, H {heads}, D {depth}"
    qkv = normal(batch, time, 3 * heads * depth, dtype=dtype)
    dout = normal(batch, time, heads * depth, dtype=dtype, seed=1)
    out, norms = kernels.attention_forward(qkv, heads, causal, p, seed)
    dqkv = kernels.attention_backward(dout, qkv, out, norms, heads, causal, p, seed)
    assert out.dtype == norms.dtype == dqkv.dtype == dtype
    roundings = roundings or 20 + math.sqrt(time) + math.sqrt(depth)
    for result, value, size in zip((out, norms), *forward(qkv, heads, causal, p, seed), strict=True):
        close(result, value, size, roundings, where)
    close(dqkv, *backward(dout, qkv, heads, causal, p, seed), roundings, where)


@BOTH
@CAUSAL
def test_equals_the_whole_matrix(dtype, causal, close):
    for (i, time), (j, depth) in itertools.product(enumerate(TIMES), enumerate(DEPTHS)):
        check(close, 1 + i % 2, time, 1 + (i + j) % 3, depth, dtype, causal, p=0.3 * ((i + j) % 2))


@BOTH
@CAUSAL
def test_equals_the_whole_matrix_over_many_tiles(dtype, causal, close):
    check(close, 2, 300, 2, 33, dtype, causal)
    check(close, 1, 300, 3, 16, dtype, causal, p=0.2)


@BOTH
@CAUSAL
def test_heads_in_parts_equal_the_whole_matrix(dtype, causal, parts, close, one_and_two_threads, same_bits):
    for batch, time, heads, depth, p in ((1, 300, 1, 33, 0.0), (1, 200, 4, 16, 0.2), (5, 129, 3, 8, 0.0),
                                         (2, 97, 7, 5, 0.1), (4, 97, 4, 8, 0.0)):
        check(close, batch, time, heads, depth, dtype, causal, p=p)
    test_same_bits_on_one_and_two_threads(dtype, causal, one_and_two_threads, same_bits)


@CAUSAL
def test_bf16_heads_in_parts_equal_the_whole_matrix(causal, parts, bf16_attention, close):
    check(close, 1, 300, 2, 33, np.float32, causal, roundings=BF16_ROUNDINGS)
    check(close, 3, 200, 4, 16, np.float32, causal, p=0.2, roundings=BF16_ROUNDINGS)


@CAUSAL
def test_bf16_equals_the_whole_matrix(causal, bf16_attention, close):
    for (i, time), (j, depth) in itertools.product(enumerate((*TIMES, 300)), enumerate(DEPTHS)):
        check(close, 1 + i % 2, time, 1 + (i + j) % 3, depth, np.float32, causal, p=0.3 * ((i + j) % 2),
              roundings=BF16_ROUNDINGS)
    check(close, 1, 33, 2, 5, np.float64, causal)                   # float64 is as always


@CAUSAL
def test_bf16_same_bits_on_one_and_two_threads(causal, bf16_attention, one_and_two_threads, same_bits):
    test_same_bits_on_one_and_two_threads(np.float32, causal, one_and_two_threads, same_bits)


@CAUSAL
def test_bf16_never_reads_what_it_has_not_written(causal, bf16_attention, poison, same_bits):
    qkv, dout = normal(1, 33, 3 * 17, dtype=np.float32), normal(1, 33, 17, dtype=np.float32)

    def run():
        out, norms = kernels.attention_forward(qkv, 1, causal)
        return out, norms, kernels.attention_backward(dout, qkv, out, norms, 1, causal)
    first = tuple(x.copy() for x in run())
    poison()
    same_bits(run(), first)
    assert np.isfinite(np.concatenate([x.reshape(-1) for x in first])).all()


@pytest.mark.parametrize("time", TIMES)
def test_bf16_rounds_values_to_nearest_even(time, bf16_attention, same_bits):
    """Equal weights are exact, and so are sums of whole numbers, once the values are rounded."""
    depth = 33
    qkv = np.zeros((1, time, 3 * depth), np.float32)
    qkv[..., 2 * depth:] = np.random.default_rng(time).integers(256, 512, (1, time, depth))
    out, _ = kernels.attention_forward(qkv, 1, causal=False)
    kernels.set_matmul_precision("highest")
    rounded, _ = kernels.attention_forward(2 * np.rint(qkv / 2), 1, causal=False)      # eight bits: two apart
    same_bits([out], [rounded])


def test_bf16_is_of_every_gradient_of_many_keys(bf16):
    for time in (MANY_KEYS - 1, MANY_KEYS):
        qkv, dout = normal(1, time, 3 * 32, dtype=np.float32), normal(1, time, 32, dtype=np.float32)
        kernels.set_matmul_precision("highest")
        out, norms = kernels.attention_forward(qkv, 1)
        exact = kernels.attention_backward(dout, qkv, out, norms, 1)
        kernels.set_matmul_precision("bf16")
        rounded = kernels.attention_backward(dout, qkv, out, norms, 1)
        coarse = time == MANY_KEYS and ROUNDS
        for part in range(0, 3 * 32, 32):
            assert (exact[..., part:part + 32] != rounded[..., part:part + 32]).any() == coarse
        assert (kernels.attention_forward(qkv, 1)[0] != out).any() == coarse


@pytest.mark.parametrize("p", [0.5, 0.95])
def test_mask_of_dropout_counts_sequences_heads_and_queries(p):
    """Uniform weights and values of one: an output is the share of keys kept, times 1 / (1 - p)."""
    batch, time, heads = 3, 70, 2
    qkv = np.zeros((batch, time, 3 * heads), np.float32)
    qkv[..., 2 * heads:] = 1
    out, _ = kernels.attention_forward(qkv, heads, False, p, 9)
    mask = kernels.dropout_mask(batch * heads * time, time, p, 9).reshape(batch, heads, time, time)
    np.testing.assert_allclose(out, mask.mean(axis=-1).swapaxes(1, 2) / (1 - p), rtol=1e-5)
    again = kernels.attention_forward(qkv, heads, False, p, 9)[0]
    other = kernels.attention_forward(qkv, heads, False, p, 10)[0]
    np.testing.assert_array_equal(out, again)
    assert (out != other).any()


@BOTH
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_no_output_depends_on_a_later_token(dtype, p, same_bits):
    heads, depth, time = 2, 17, 127
    width = heads * depth
    qkv, dout = normal(2, time, 3 * width, dtype=dtype), normal(2, time, width, dtype=dtype, seed=1)
    out, norms = kernels.attention_forward(qkv, heads, True, p, 3)
    dqkv = kernels.attention_backward(dout, qkv, out, norms, heads, True, p, 3)
    for first in (1, 5, 6, 7, 13, 14, 31, 32, 47, 48, 49, 63, 96, 126):
        changed = qkv.copy()
        changed[:, first:] = 100 * normal(2, time - first, 3 * width, dtype=dtype, seed=2)
        new_out, new_norms = kernels.attention_forward(changed, heads, True, p, 3)
        same_bits([new_out[:, :first], new_norms[..., :first]], [out[:, :first], norms[..., :first]])
        assert (new_out[:, first:] != out[:, first:]).any()
        new_dqkv = kernels.attention_backward(dout, changed, new_out, new_norms, heads, True, p, 3)
        same_bits([new_dqkv[:, :first, :width]], [dqkv[:, :first, :width]])      # dq: of earlier keys alone


@BOTH
def test_no_gradient_reaches_a_later_token(dtype):
    heads, width, time = 2, 34, 127
    qkv = normal(1, time, 3 * width, dtype=dtype)
    out, norms = kernels.attention_forward(qkv, heads)
    for last in (0, 5, 6, 13, 31, 47, 48, 100):
        dout = np.zeros_like(out)
        dout[:, last] = 1
        dqkv = kernels.attention_backward(dout, qkv, out, norms, heads)
        assert not dqkv[:, last + 1:].any()
        assert not dqkv[:, :last, :width].any()          # nor another query
        assert dqkv[:, :last + 1, 2 * width:].all()


@BOTH
@CAUSAL
def test_what_has_not_been_written_is_not_read(dtype, causal, close, poison):
    for time, depth in ((127, 64), (3, 5), (49, 33)):
        check(close, 1, time, 1, depth, dtype, causal)
        poison()
        check(close, 1, time, 1, depth, dtype, causal)


@BOTH
@CAUSAL
def test_same_bits_on_one_and_two_threads(dtype, causal, one_and_two_threads, same_bits):
    for batch, time, heads, depth, p in ((1, 127, 3, 17, 0.2), (5, 49, 1, 8, 0.0), (2, 300, 2, 32, 0.1)):
        width = heads * depth
        qkv, dout = normal(batch, time, 3 * width, dtype=dtype), normal(batch, time, width, dtype=dtype)

        def run(qkv=qkv, dout=dout, heads=heads, p=p):
            out, norms = kernels.attention_forward(qkv, heads, causal, p, 1)
            return out, norms, kernels.attention_backward(dout, qkv, out, norms, heads, causal, p, 1)
        same_bits(*one_and_two_threads(run))


def rows_of(qkv, q=None, k=None, v=None):
    """A (1, T, 3D) array with its queries, keys or values replaced."""
    depth = qkv.shape[-1] // 3
    for i, x in enumerate((q, k, v)):
        if x is not None:
            qkv[..., i * depth:(i + 1) * depth] = x
    return qkv


@BOTH
@CAUSAL
@pytest.mark.parametrize("size", [30.0, 1e3, 2.0**20])
def test_huge_scores_choose_one_key(dtype, causal, size, close):
    """Whole numbers, D = 16: scores are exact, up to ±1e13, and far apart."""
    rng = np.random.default_rng(0)
    for time in (3, 49, 127):
        qkv = normal(1, time, 48, dtype=dtype)
        rows_of(qkv, *(np.round(size) * rng.integers(-3, 4, (2, 1, time, 16))))
        out, norms = kernels.attention_forward(qkv, 1, causal)
        (expected, expected_norms), _ = forward(qkv, 1, causal)
        close(norms, expected_norms, 1 + np.abs(expected_norms), 4)
        close(out, expected, 1 + np.abs(qkv).max(axis=1)[:, None, 32:] + 0 * expected, 40)
        dout = normal(1, time, 16, dtype=dtype)
        dqkv = kernels.attention_backward(dout, qkv, out, norms, 1, causal)
        assert np.isfinite(dqkv).all()


@BOTH
@CAUSAL
@pytest.mark.parametrize("score", [-1e4, 1e4, -1e30, 1e30])
def test_equal_scores_share_alike_however_large(dtype, causal, score, close):
    time = 101
    qkv = normal(1, time, 3 * 4, dtype=dtype)
    rows_of(qkv, math.copysign(1, score), abs(score) / 2)                        # 4 terms over √4
    out, norms = kernels.attention_forward(qkv, 1, causal)
    v = qkv[..., 8:].astype(np.float64)
    count = np.arange(1, time + 1) if causal else np.full(time, time)
    expected = np.cumsum(v, axis=1) / count[:, None] if causal else v.mean(axis=1) + 0 * v
    close(out, expected, 4, 20)
    close(norms, score + np.log(count)[None, None], abs(score), 10)


@BOTH
@CAUSAL
def test_keys_of_minus_infinity_get_no_weight(dtype, causal):
    """Among them whole tiles of them, before and after others, and all that a query sees."""
    time = 127
    for hidden in (slice(2, 3), slice(0, 1), slice(0, 50), slice(0, 96), slice(60, 127), slice(0, 127)):
        k = np.ones((1, time, 8))
        k[:, hidden, 3] = -np.inf
        qkv = rows_of(normal(1, time, 24, dtype=dtype), 1, k)
        out, norms = kernels.attention_forward(qkv, 1, causal)
        with np.errstate(invalid="ignore"):
            (expected, expected_norms), _ = forward(qkv, 1, causal)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5, err_msg=f"{hidden}")
        np.testing.assert_allclose(norms, expected_norms, rtol=1e-5, err_msg=f"{hidden}")


@BOTH
@CAUSAL
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_a_query_stays_in_its_row(dtype, causal, value, same_bits):
    heads, depth, time = 2, 17, 65
    qkv, dout = normal(2, time, 3 * heads * depth, dtype=dtype), normal(2, time, heads * depth, dtype=dtype)
    clean = kernels.attention_forward(qkv, heads, causal)
    for t in (0, 5, 30, 48, 64):
        bad = qkv.copy()
        bad[1, t, depth + 4] = value                     # sequence 1, head 1
        out, norms = kernels.attention_forward(bad, heads, causal)
        row = np.s_[1, t, depth:]
        assert np.isnan(out[row]).all() and not np.isfinite(norms[1, 1, t])
        dqkv = kernels.attention_backward(dout, bad, out, norms, heads, causal)
        out[row], norms[1, 1, t] = clean[0][row], clean[1][1, 1, t]
        same_bits((out, norms), clean, f"token {t}")
        assert np.isfinite(dqkv[0]).all() and np.isnan(dqkv[row][:depth]).all()
        dq = np.delete(dqkv[..., :heads * depth].reshape(2, time, heads, depth).swapaxes(1, 2)[1, 1], t, 0)
        assert np.isfinite(dq).all()


@BOTH
def test_nan_in_a_key_reaches_every_query_that_sees_it(dtype):
    qkv = normal(1, 101, 24, dtype=dtype)
    qkv[0, 50, 8] = np.nan
    out, norms = kernels.attention_forward(qkv, 1)
    assert np.isnan(out[0, 50:]).all() and np.isnan(norms[..., 50:]).all()
    assert np.isfinite(out[0, :48]).all() and np.isfinite(norms[..., :50]).all()
    dqkv = kernels.attention_backward(np.ones_like(out), qkv, out, norms, 1)
    assert np.isnan(dqkv[0, 50:, :8]).all() and np.isnan(dqkv[0, :51, 16:]).all()     # dq; dv of their keys


def test_nothing_in_nothing_out():
    for shape, heads in (((0, 5, 12), 2), ((2, 0, 12), 2), ((2, 5, 0), 1)):
        qkv = np.zeros(shape)
        out, norms = kernels.attention_forward(qkv, heads)
        assert out.shape == (*shape[:2], shape[2] // 3) and norms.shape == (shape[0], heads, shape[1])
        assert kernels.attention_backward(out, qkv, out, norms, heads).shape == shape


@pytest.mark.parametrize("heads", [0, -1, 2, 5])
def test_heads_that_do_not_divide_the_width(heads):
    with pytest.raises(ValueError, match=f"attention_forward: qkv has a last axis of 9.*{heads} heads"):
        kernels.attention_forward(np.zeros((1, 2, 9)), heads)


@pytest.mark.parametrize("p", [1.0, -0.5, math.nan])
def test_bad_p(p):
    qkv, out, norms = np.zeros((1, 2, 9)), np.zeros((1, 2, 3)), np.zeros((1, 1, 2))
    with pytest.raises(ValueError, match="p is"):
        kernels.attention_forward(qkv, 1, True, p)
    with pytest.raises(ValueError, match="p is"):
        kernels.attention_backward(out, qkv, out, norms, 1, True, p)


def test_buffers_grow_with_time_and_not_its_square():
    def used(time):
        """Bytes of results and scratch together, for each token."""
        memory._free.clear()
        qkv = normal(1, time, 3 * 16, dtype=np.float32)
        out, norms = kernels.attention_forward(qkv, 1)
        dqkv = kernels.attention_backward(out, qkv, out, norms, 1)
        del out, norms, dqkv
        return memory.free_bytes() / time

    assert used(4096) < 1.3 * used(1024)                 # steps of a quarter between the sizes of buffers


PEAK = """
import numpy as np, kernels

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

def run(time):
    qkv = np.ones((1, time, 96), np.float32)
    out, norms = kernels.attention_forward(qkv, 1)
    kernels.attention_backward(out, qkv, out, norms, 1)

run(64)
before = peak()
run(8192)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_process_never_holds_a_matrix_of_time_by_time():
    root = Path(kernels.__file__).parents[1]
    command = [sys.executable, "-c", PEAK]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    one_array = 8192 * 32 * 4 / 1024                     # KiB in T x D; T x T would be 256 of them
    assert int(ran.stdout) < 50 * one_array


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1", [1], np.array([3])])
def test_a_wrong_seed_is_named(seed):
    with pytest.raises(ValueError, match=r"^dropout: seed is .*; it must be an integer in 0 to 2\*\*64 - 1$"):
        kernels.attention_forward(normal(1, 3, 12), 1, True, 0.5, seed)


def test_shapes_that_come_again_in_another_precision_and_dtype(same_bits):
    """How the work is cut up is kept by shape, but not by shape alone."""
    qkv, dout = normal(1, 200, 96), normal(1, 200, 32)

    def both_ways(dtype, precision="highest"):
        kernels.set_matmul_precision(precision)
        x, dy = qkv.astype(dtype), dout.astype(dtype)
        out, norms = kernels.attention_forward(x, 1)
        dx = kernels.attention_backward(dy, x, out, norms, 1)
        kernels.set_matmul_precision("highest")
        assert out.dtype == dx.dtype == dtype
        return out, dx

    first, exact = both_ways(np.float32), both_ways(np.float64)
    rounded = both_ways(np.float32, "bf16" if TARGET.bf16 else "highest")
    for result, value in zip((*first, *rounded), 2 * exact, strict=True):
        np.testing.assert_allclose(result, value, atol=0.05)
    same_bits(both_ways(np.float32), first)
    same_bits(both_ways(np.float64), exact)
