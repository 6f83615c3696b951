"""Softmax and its logarithm over the last axis, on (N, C).

    y_j = exp(x_j - max x) / Σ_k exp(x_k - max x)        dx_j = y_j (dy_j - Σ_k dy_k y_k)
    z_j = log y_j = x_j - logsumexp(x)                   dx_j = dz_j - y_j Σ_k dz_k
"""
from __future__ import annotations

import math

import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check
from kernels.elementary import exp_below
from kernels.jit import exact, helper, kernel, launch, row_tasks
from kernels.rows import row_max


def softmax_forward(x: np.ndarray) -> np.ndarray:
    """Softmax of each row: x (N, C) -> y (N, C). In float32 what is below the normal numbers may be 0."""
    check("softmax_forward", "x", x, (None, None))
    y = memory.empty(x.shape, x.dtype)
    launch(_softmax_forward, row_tasks(x), x, y)
    return y


def softmax_backward(dy: np.ndarray, y: np.ndarray) -> np.ndarray:
    """dx (N, C), from the gradient and the value of softmax."""
    check("softmax_backward", "dy", dy, (None, None))
    check("softmax_backward", "y", y, dy.shape, like=dy)
    dx = memory.empty(y.shape, y.dtype)
    launch(_softmax_backward, row_tasks(y), dy, y, dx)
    return dx


def log_softmax_forward(x: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax of each row: x (N, C) -> z (N, C)."""
    check("log_softmax_forward", "x", x, (None, None))
    z = memory.empty(x.shape, x.dtype)
    launch(_log_softmax_forward, row_tasks(x), x, z)
    return z


def log_softmax_backward(dz: np.ndarray, z: np.ndarray) -> np.ndarray:
    """dx (N, C), from the gradient and the value of log_softmax."""
    check("log_softmax_backward", "dz", dz, (None, None))
    check("log_softmax_backward", "z", z, dz.shape, like=dz)
    dx = memory.empty(z.shape, z.dtype)
    launch(_log_softmax_backward, row_tasks(z), dz, z, dx)
    return dx


@kernel
def _softmax_forward(x, y, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        for i in range(len(x) * task // tasks, len(x) * (task + 1) // tasks):
            softmax_row(x[i], y[i])


@helper
def softmax_row(x, y):
    top = row_max(x, 0, x.size)
    total = x.dtype.type(0)
    for j in range(x.size):
        e = exp_below(x[j] - top)
        y[j] = e
        total += e
    scale = x.dtype.type(1) / total
    for j in range(x.size):
        y[j] *= scale


@kernel
def _softmax_backward(dy, y, dx, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        for i in range(len(y) * task // tasks, len(y) * (task + 1) // tasks):
            softmax_row_backward(dy[i], y[i], dx[i])


@helper
def softmax_row_backward(dy, y, dx):
    total = y.dtype.type(0)
    for j in range(y.size):
        total += dy[j] * y[j]
    for j in range(y.size):
        dx[j] = y[j] * (dy[j] - total)


@kernel
def _log_softmax_forward(x, z, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        for i in range(len(x) * task // tasks, len(x) * (task + 1) // tasks):
            log_softmax_row(x[i], z[i])


@helper
def log_softmax_row(x, z):
    top, log_total = log_sum_exp(x)
    for j in range(x.size):
        z[j] = log_share(x[j], top, log_total)


@exact
def log_share(x, top, log_total):
    """log softmax of x, in the order that keeps its digits where all of the row is far from 0."""
    return (x - top) - log_total


@helper
def log_sum_exp(x):
    """log Σ exp(x) of one row in two parts: the largest x, and log Σ exp(x - largest).

    Their sum would lose the digits of the second where the first is large. A row of -inf gives 0 and -inf.
    """
    top = row_max(x, 0, x.size)
    if top == -math.inf:
        return x.dtype.type(0), x.sum()      # -inf, or NaN where there is one
    total = x.dtype.type(0)
    for j in range(x.size):
        total += exp_below(x[j] - top)
    return top, x.dtype.type(math.log(total))


@kernel
def _log_softmax_backward(dz, z, dx, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        for i in range(len(z) * task // tasks, len(z) * (task + 1) // tasks):
            log_softmax_row_backward(dz[i], z[i], dx[i])


@helper
def log_softmax_row_backward(dz, z, dx):
    total = z.dtype.type(0)
    for j in range(z.size):
        total += dz[j]
    for j in range(z.size):
        dx[j] = dz[j] - exp_below(z[j]) * total
