"""The squared rectifier, elementwise. Source: So et al. 2021 (Primer).

    y = max(x, 0)²            dy/dx = 2 max(x, 0) = 2 √y

The root of a square that was rounded once is the number itself to the bit, unless the square is too small or
too large to be a normal number. So the backward pass needs y alone, which the next product keeps anyway.
"""
from __future__ import annotations

import math

import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check
from kernels.jit import flat_tasks, helper, kernel, launch


def relu2_forward(x: np.ndarray) -> np.ndarray:
    """x of any shape -> y."""
    check("relu2_forward", "x", x)
    y = memory.empty(x.shape, x.dtype)
    launch(_relu2_forward, flat_tasks(x.size), x.reshape(-1), y.reshape(-1))
    return y


def relu2_backward(dy: np.ndarray, y: np.ndarray) -> np.ndarray:
    """dx, from the gradient and the output of the forward pass."""
    check("relu2_backward", "dy", dy)
    check("relu2_backward", "y", y, dy.shape, like=dy)
    dx = memory.empty(y.shape, y.dtype)
    launch(_relu2_backward, flat_tasks(y.size), dy.reshape(-1), y.reshape(-1), dx.reshape(-1))
    return dx


@kernel
def _relu2_forward(x, y, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        first, last = x.size * task // tasks, x.size * (task + 1) // tasks
        relu2_row(x[first:last], y[first:last])


@helper
def relu2_row(x, y):
    for i in range(x.size):
        positive = x.dtype.type(0) if x[i] < 0 else x[i]             # NaN stays
        y[i] = positive * positive


@kernel
def _relu2_backward(dy, y, dx, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        first, last = y.size * task // tasks, y.size * (task + 1) // tasks
        relu2_row_backward(dy[first:last], y[first:last], dx[first:last])


@helper
def relu2_row_backward(dy, y, dx):
    for i in range(y.size):
        positive = math.sqrt(y[i])
        dx[i] = dy[i] * (positive + positive)
