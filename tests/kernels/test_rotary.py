"""Rotary positions and QK-norm against the same in numpy and float64."""
import math

import numpy as np
import pytest

import kernels

BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float64])
WAYS = pytest.mark.parametrize(("base", "eps"), [(10_000.0, None), (None, 1e-6), (100.0, 1e-3)],
                               ids=["rotary", "norm", "both"])
# B, T, H, D
SHAPES = [(1, 1, 1, 2), (2, 3, 1, 2), (3, 33, 2, 6), (2, 65, 5, 34), (1, 127, 3, 66), (7, 1, 3, 32)]


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def matrices(time, width, base, start):
    """The rotation of a head at each position, (T, D, D)."""
    result = np.zeros((time, width, width))
    for t in range(time):
        for j in range(width // 2):
            angle = (start + t) * base ** (-2 * j / width)
            pair = [j, j + width // 2]
            result[t][np.ix_(pair, pair)] = [[math.cos(angle), -math.sin(angle)],
                                             [math.sin(angle), math.cos(angle)]]
    return result


def rotary(qkv, heads, base, eps, start):
    """y, and the derivative of a head's y by its x as matrices: both from the definition."""
    batch, time, _ = qkv.shape
    parts = qkv.reshape(batch, time, 3, heads, -1).copy()
    width = parts.shape[-1]
    scale = np.ones((*parts.shape[:-1], 1))
    if eps is not None:
        scale = 1 / np.sqrt((parts**2).mean(axis=-1, keepdims=True) + eps)
    jacobian = scale[..., None] * np.eye(width)
    if eps is not None:                                              # d r / d x = -r³ x / D
        jacobian = jacobian - scale[..., None]**3 * parts[..., None] * parts[..., None, :] / width
    rotations = np.eye(width) if base is None else matrices(time, width, base, start)[:, None, None]
    y, jacobian = (rotations @ (scale * parts)[..., None])[..., 0], rotations @ jacobian
    y[:, :, 2], jacobian[:, :, 2] = parts[:, :, 2], np.eye(width)
    return y.reshape(qkv.shape), jacobian


@BOTH
@WAYS
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(shape, base, eps, dtype, close):
    batch, time, heads, width = shape
    qkv, dy = (normal(batch, time, 3 * heads * width, dtype=dtype, seed=seed) for seed in range(2))
    y, scales = kernels.rotary_forward(qkv, heads, base, eps, start=3)
    dx = kernels.rotary_backward(dy, y, scales, heads, base, start=3)
    expected, jacobian = rotary(qkv.astype(np.float64), heads, base, eps, 3)
    exact_dy = dy.astype(np.float64).reshape(batch, time, 3, heads, width)
    expected_dx = (np.swapaxes(jacobian, -1, -2) @ exact_dy[..., None])[..., 0]
    by_head = qkv.reshape(batch, time, 3, heads, width)
    r = np.linalg.norm(np.linalg.norm(jacobian, axis=-1), axis=-1)[..., None]
    size = np.abs(by_head).max(axis=-1, keepdims=True) * r
    size_dx = np.abs(dy.reshape(by_head.shape)).max(axis=-1, keepdims=True) * r * width
    close(y, expected, np.broadcast_to(size, by_head.shape).reshape(y.shape), 20 + math.sqrt(width))
    close(dx, expected_dx.reshape(dx.shape), np.broadcast_to(size_dx, by_head.shape).reshape(y.shape), 20)
    values = slice(2 * heads * width, None)
    np.testing.assert_array_equal(y[..., values], qkv[..., values])
    np.testing.assert_array_equal(dx[..., values], dy[..., values])
    assert scales.shape == (batch * time, 0 if eps is None else 2 * heads)


def test_products_depend_on_the_distance_alone():
    """Moving all tokens by 1000 places changes no product of a query and a key."""
    qkv = normal(1, 20, 3 * 2 * 8)
    scores = []
    for start in (0, 1000):
        y, _ = kernels.rotary_forward(qkv, 2, start=start)
        q, k, _ = np.moveaxis(y.reshape(20, 3, 2, 8), 1, 0)
        scores.append(np.einsum("thd,shd->hts", q, k))
    np.testing.assert_allclose(*scores, atol=1e-10)
    q, k, _ = np.moveaxis(qkv.reshape(20, 3, 2, 8), 1, 0)
    assert np.abs(scores[0] - np.einsum("thd,shd->hts", q, k)).max() > 1


def test_a_later_start_is_the_same_table_cut_later(same_bits):
    qkv = normal(2, 50, 3 * 6, dtype=np.float32)
    whole, _ = kernels.rotary_forward(qkv, 1, eps=1e-6)
    last, _ = kernels.rotary_forward(np.ascontiguousarray(qkv[:, 33:]), 1, eps=1e-6, start=33)
    same_bits([np.ascontiguousarray(whole[:, 33:])], [last])


def test_angles_are_rounded_from_float64():
    cos, sin = kernels.rotary_angles(70, 6, 10_000.0, np.dtype(np.float32), start=60)
    angles = np.arange(60, 130)[:, None] * 10_000.0 ** (-np.arange(3) / 3)
    np.testing.assert_array_equal(cos, np.cos(angles).astype(np.float32))
    np.testing.assert_array_equal(sin, np.sin(angles).astype(np.float32))


@BOTH
@WAYS
def test_nan_stays_in_its_head(base, eps, dtype, same_bits):
    clean = normal(2, 9, 3 * 2 * 6, dtype=dtype)
    bad = clean.copy()
    bad[1, 4, 7] = np.nan                                        # of the second query at position 4
    y, scales = kernels.rotary_forward(clean, 2, base, eps)
    y_bad, scales_bad = kernels.rotary_forward(bad, 2, base, eps)
    dx, dx_bad = (kernels.rotary_backward(clean, *results, 2, base)
                  for results in ((y, scales), (y_bad, scales_bad)))
    for ours, unspoiled in ((y_bad, y), (dx_bad, dx)):
        if eps is not None:
            assert np.isnan(ours[1, 4, 6:12]).all()
        ours[1, 4, 6:12] = unspoiled[1, 4, 6:12]
        same_bits([ours], [unspoiled])
    assert np.isnan(kernels.rotary_forward(bad, 2, base, eps)[0][1, 4, 7])


def test_what_does_not_fit_is_refused():
    for arguments, said in (((np.ones((1, 2, 9)), 1), "even width"), ((np.ones((1, 2, 12)), 5), "dividing C"),
                            ((np.ones((1, 2, 12)), 0), "dividing C"),
                            ((np.ones((1, 2, 12)), 1, -1.0), "base must be above 0"),
                            ((np.ones((1, 2, 12)), 1, 10.0, None, -1), "start at least 0")):
        with pytest.raises(ValueError, match=f"rotary_forward: .*{said}"):
            kernels.rotary_forward(*arguments)
