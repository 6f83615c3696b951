"""Sums: of two arrays, a residual stream or a gradient from two sides, and of what tasks have added up.

    z = x + y            dx = dy = dz
"""
from __future__ import annotations

import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check
from kernels.jit import flat_tasks, helper, kernel, launch
from kernels.simd import address


def add(x: np.ndarray, y: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """x, y of the shape of x or of its last axes -> x + y, in out if that is given: it may be x, or be y if
    that has the shape of x.
    """
    check("add", "x", x)
    check("add", "y", y, like=x)
    if y.shape != x.shape[max(0, x.ndim - y.ndim):]:
        check("add", "y", y, x.shape)
    if out is None:
        out = memory.empty(x.shape, x.dtype)
    else:
        check("add", "out", out, x.shape, like=x)
    launch(_add, flat_tasks(x.size), x.reshape(-1), y.reshape(-1), out.reshape(-1))
    return out


@kernel
def _add(x, y, out, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        add_part(x, y, out, x.size * task // tasks, x.size * (task + 1) // tasks)


@helper
def add_part(x, y, out, first, last):
    """Elements first to last of x, to each of which belongs one of y, over and over."""
    while first < last:
        j = first % y.size
        end = min(last, first + y.size - j)
        if address(x, 0) == address(out, 0):
            add_to_row(out[first:end], y[j:j + end - first])
        elif address(y, 0) == address(out, 0):
            add_to_row(out[first:end], x[first:end])
        else:
            add_row(x[first:end], y[j:j + end - first], out[first:end])
        first = end


@helper
def add_to_row(out, y):
    """As `add_row` in place, of which LLVM would make a loop over single elements."""
    for i in range(out.size):
        out[i] += y[i]


@helper
def add_row(x, y, out):
    for i in range(x.size):
        out[i] = x[i] + y[i]


@helper
def add_up(parts, total):
    """The sum of the rows of parts, in their order: what tasks have added up, each for itself."""
    for j in range(total.size):
        total[j] = parts[0, j]
    for part in range(1, len(parts)):
        add_to_row(total, parts[part])
