"""The Gaussian error linear unit, elementwise. Source: Hendrycks, Gimpel 2016.

    y = x Φ(x),  Φ(x) = (1 + erf(x / √2)) / 2            dy/dx = Φ(x) + x φ(x),  φ(x) = exp(-x²/2) / √(2π)

    "tanh" (GPT-2):  y = x (1 + tanh u) / 2,  u = √(2/π) (x + 0.044715 x³)
                     dy/dx = (1 + tanh u) / 2 + x (1 - tanh² u) u' / 2,  u' = √(2/π) (1 + 0.134145 x²)
"""
from __future__ import annotations

import math

import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check
from kernels.elementary import normal_cdf, normal_pdf, tanh
from kernels.jit import flat_tasks, helper, kernel, launch

SLOPE, CUBIC = math.sqrt(2 / math.pi), 0.044715


def gelu_forward(x: np.ndarray, approximate: bool = False) -> np.ndarray:
    """x of any shape -> y; approximate: the tanh form."""
    check("gelu_forward", "x", x)
    y = memory.empty(x.shape, x.dtype)
    launch(_gelu_forward, flat_tasks(x.size), x.reshape(-1), approximate, y.reshape(-1))
    return y


def gelu_backward(dy: np.ndarray, x: np.ndarray, approximate: bool = False) -> np.ndarray:
    """dx, from the gradient and the input of the forward pass."""
    check("gelu_backward", "dy", dy)
    check("gelu_backward", "x", x, dy.shape, like=dy)
    dx = memory.empty(x.shape, x.dtype)
    launch(_gelu_backward, flat_tasks(x.size), dy.reshape(-1), x.reshape(-1), approximate, dx.reshape(-1))
    return dx


@kernel
def _gelu_forward(x, approximate, y, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        first, last = x.size * task // tasks, x.size * (task + 1) // tasks
        gelu_row(x[first:last], y[first:last], approximate)


@helper
def gelu_row(x, y, approximate):
    real = x.dtype.type
    if approximate:
        for i in range(x.size):
            u = real(SLOPE) * (x[i] + real(CUBIC) * x[i] * x[i] * x[i])
            y[i] = real(0.5) * x[i] * (real(1) + tanh(u))
    else:
        for i in range(x.size):
            y[i] = x[i] * normal_cdf(x[i])


@kernel
def _gelu_backward(dy, x, approximate, dx, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        first, last = x.size * task // tasks, x.size * (task + 1) // tasks
        gelu_row_backward(dy[first:last], x[first:last], approximate, dx[first:last])


@helper
def gelu_row_backward(dy, x, approximate, dx):
    real = x.dtype.type
    if approximate:
        for i in range(x.size):
            square = x[i] * x[i]
            t = tanh(real(SLOPE) * x[i] * (real(1) + real(CUBIC) * square))
            du = real(SLOPE) * (real(1) + real(3 * CUBIC) * square)
            dx[i] = dy[i] * real(0.5) * (real(1) + t + x[i] * (real(1) - t * t) * du)
    else:
        for i in range(x.size):
            dx[i] = dy[i] * (normal_cdf(x[i]) + x[i] * normal_pdf(x[i]))
