"""Muon against its definition in numpy, in float64 and step by step."""
import numpy as np
import pytest

import kernels

BOTH = pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-11)],
                               ids=["float32", "float64"])
SHAPES = [(1, 1), (5, 5), (33, 31), (31, 33), (128, 128), (130, 64), (65, 131), (16, 200), (200, 16), (1, 7)]


def newton_schulz(u):
    """As Jordan et al. write it, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = u.astype(np.float64) / (np.linalg.norm(u.astype(np.float64)) + 1e-7)
    x = x.T if u.shape[0] > u.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_is_five_steps_of_newton_and_schulz(shape, dtype, tolerance):
    x = normal(3, *shape, dtype=dtype)
    before, y = x.copy(), kernels.orthogonal(x)
    assert y.dtype == dtype and np.array_equal(x, before)
    for ours, matrix in zip(y, x, strict=True):
        np.testing.assert_allclose(ours, newton_schulz(matrix), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(40, 40), (20, 70), (70, 20)])
def test_singular_values_become_nearly_one_and_the_directions_stay(shape):
    """From 1 down to 1/100 of the largest: u sᵢ vᵀ -> u s'ᵢ vᵀ, s' from 0.67 to 1.21."""
    u, _, vt = np.linalg.svd(normal(*shape), full_matrices=False)
    y = kernels.orthogonal(((u * np.geomspace(1, 0.01, len(vt))) @ vt)[None])[0]
    inside = u.T @ y @ vt.T
    values = np.diag(inside)
    np.testing.assert_allclose(inside, np.diag(values), atol=1e-12)
    assert 0.67 < values.min() and values.max() < 1.21


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_far_singular_values_stay_stable_in_float32(shape):
    """A gradient of nearly lower rank: what is small must not be noise blown up."""
    u, _, vt = np.linalg.svd(normal(*shape), full_matrices=False)
    x = ((u * np.geomspace(1, 1e-6, len(vt))) @ vt).astype(np.float32)
    np.testing.assert_allclose(kernels.orthogonal(x[None])[0], newton_schulz(x), rtol=0, atol=1e-3)


@BOTH
def test_a_step_is_its_definition(dtype, tolerance):
    shapes, parts = [(3 * 16, 16), (16, 16), (64, 16), (16, 64), (16, 16)], [3, 1, 1, 1, 2]
    parameters, momenta = [normal(*s, dtype=dtype) for s in shapes], [np.zeros(s, dtype) for s in shapes]
    expected = [(p.astype(np.float64), np.zeros(p.shape)) for p in parameters]
    for step in range(3):
        gradients = [normal(*s, seed=1 + step, dtype=dtype) for s in shapes]
        before = [g.copy() for g in gradients]
        kernels.muon(parameters, gradients, momenta, parts, 0.02, 0.95, 0.1, scale=0.5)
        for (p, b), g, count in zip(expected, before, parts, strict=True):
            b[...] = 0.95 * b + 0.05 * 0.5 * g
            u = 0.95 * b + 0.05 * 0.5 * g
            p *= 1 - 0.02 * 0.1
            for part, matrix in zip(np.split(p, count), np.split(u, count), strict=True):
                part -= 0.02 * np.sqrt(max(1, matrix.shape[0] / matrix.shape[1])) * newton_schulz(matrix)
        assert all(np.array_equal(g, was) for g, was in zip(gradients, before, strict=True))
    for p, b, (exact_p, exact_b) in zip(parameters, momenta, expected, strict=True):
        np.testing.assert_allclose(p, exact_p, rtol=0, atol=tolerance)
        np.testing.assert_allclose(b, exact_b, rtol=0, atol=tolerance)


def test_parts_are_matrices_of_their_own(same_bits):
    """Queries, keys and values in one array are stepped as three arrays are."""
    packed, gradient = normal(3 * 20, 20, dtype=np.float32), normal(3 * 20, 20, dtype=np.float32, seed=1)
    gradient[20:40] *= 1e-3                                     # one mixed with the rest would stand still
    apart, gradients = (np.split(x.copy(), 3) for x in (packed, gradient))
    kernels.muon([packed], [gradient], [np.zeros_like(packed)], [3], 0.1, 0.9, 0.0)
    kernels.muon(apart, gradients, [np.zeros_like(p) for p in apart], [1, 1, 1], 0.1, 0.9, 0.0)
    same_bits([packed], [np.concatenate(apart)])
    moved = [np.linalg.norm(x) for x in np.split(packed - normal(3 * 20, 20, dtype=np.float32), 3)]
    np.testing.assert_allclose(moved, moved[0], rtol=0.1)


def test_no_gradient_is_no_step_but_decay():
    p = normal(8, 8)
    before = p.copy()
    kernels.muon([p], [np.zeros((8, 8))], [np.zeros((8, 8))], [1], 0.1, 0.9, 0.5)
    np.testing.assert_allclose(p, before * (1 - 0.1 * 0.5), rtol=1e-14)


def test_nan_stays_in_its_matrix():
    p, g, b = normal(12, 4), normal(12, 4, seed=1), np.zeros((12, 4))
    g[5, 2] = np.nan
    kernels.muon([p], [g], [b], [3], 0.1, 0.9, 0.0)
    assert np.isnan(p[4:8]).all() and np.isfinite(p[:4]).all() and np.isfinite(p[8:]).all()


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_bf16_is_near(shape, bf16):
    """Square matrices are rounded on the way, as Jordan's are; long ones would not bear it."""
    x = normal(2, *shape, dtype=np.float32)
    y = kernels.orthogonal(x)
    kernels.set_matmul_precision("highest")
    exact = kernels.orthogonal(x)
    assert np.array_equal(y, exact) == (shape[0] != shape[1])
    assert np.linalg.norm(y - exact) < 0.1 * np.linalg.norm(exact)


def test_what_does_not_fit_is_refused():
    p = np.ones((4, 3))
    for arrays, parts, said in (([p], [], "parts holds 0 numbers"),
                                ([p], [3], r"parameters\[0\] has shape \(4, 3\)"),
                                ([p], [0], r"parameters.* must be a matrix, or 0 of"),
                                ([np.ones(3)], [1], r"parameters.* has shape \(3,\)")):
        with pytest.raises(ValueError, match=f"muon: {said}"):
            kernels.muon(arrays, [x.copy() for x in arrays], [x.copy() for x in arrays], parts, 0.1, 0.9, 0.0)
    frozen = np.ones((4, 3))
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="muon: parameters holds a read-only array"):
        kernels.muon([frozen], [p], [p.copy()], [1], 0.1, 0.9, 0.0)
    kernels.muon([], [], [], [], 0.1, 0.9, 0.0)
    kernels.muon([np.ones((0, 3))], [np.ones((0, 3))], [np.ones((0, 3))], [1], 0.1, 0.9, 0.0)
