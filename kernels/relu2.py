"""The squared rectifier, elementwise. Source: So et al. 2021 (Primer).

    y = max(x, 0)²            dy/dx = 2 max(x, 0)
"""
from __future__ import annotations

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


def relu2_backward(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dx, from the gradient and the input of the forward pass."""
    check("relu2_backward", "dy", dy)
    check("relu2_backward", "x", x, dy.shape, like=dy)
    dx = memory.empty(x.shape, x.dtype)
    launch(_relu2_backward, flat_tasks(x.size), dy.reshape(-1), x.reshape(-1), dx.reshape(-1))
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
def _relu2_backward(dy, x, dx, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        first, last = x.size * task // tasks, x.size * (task + 1) // tasks
        relu2_row_backward(dy[first:last], x[first:last], dx[first:last])


@helper
def relu2_row_backward(dy, x, dx):
    for i in range(x.size):
        positive = x.dtype.type(0) if x[i] < 0 else x[i]
        dx[i] = dy[i] * (positive + positive)
