"""Products that are symmetric, such as X Xᵀ, or of symmetric matrices that commute: one half is computed.

    C = scale op(A) op(B) + shift I
"""
from __future__ import annotations

import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check
from kernels.jit import helper, kernel, launch
from kernels.matmul import product
from kernels.simd import columns, transpose_block


def symmetric_matmul(a: np.ndarray, b: np.ndarray, transpose_a: bool = False, transpose_b: bool = False,
                     exact: bool = False, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """a (n, ., .), b (n, ., .) -> scale op(a) @ op(b) + shift I (n, M, M), which must be symmetric.

    Arguments else as `matmul`'s. What is above the diagonal is computed, and copied below it.
    """
    check("symmetric_matmul", "a", a, (None, None, None))
    k, m = a.shape[1:] if transpose_a else a.shape[:0:-1]
    check("symmetric_matmul", "b", b, (len(a), m, k) if transpose_b else (len(a), k, m), like=a)
    c = memory.empty((len(a), m, m), a.dtype)
    if c.size:
        product(a, b, c, k, transpose_a, transpose_b, exact=exact, half=True)
        stripes = -(-m // columns(c.dtype))
        launch(_mirror, len(a) * stripes, c, stripes, columns(c.dtype), c.dtype.type(scale),
               c.dtype.type(shift))
    return c


@kernel
def _mirror(c, stripes, width, scale, shift, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        mirror_stripe(c[task // stripes], task % stripes * width, width, scale, shift)


@helper
def mirror_stripe(c, j0, width, scale, shift):
    """Scale columns j0 to j0 + width down to the diagonal, shift that, and copy them to those rows."""
    m, lanes = len(c), width // 2
    j1 = min(m, j0 + width)
    for i in range(j1):
        row = c[i, max(i, j0):j1]
        for j in range(row.size):
            row[j] *= scale
        if i >= j0:
            row[0] += shift
    whole = j0 if j1 == j0 + width else 0
    for i in range(0, whole, lanes):
        for j in range(j0, j1, lanes):
            transpose_block(c, i * m + j, m, c, j * m + i, m)
    for i in range(whole, j1):
        for j in range(max(i + 1, j0), j1):
            c[j, i] = c[i, j]
