"""The Gaussian error linear unit, elementwise. Source: Hendrycks, Gimpel 2016.

    y = x Φ(x),  Φ(x) = (1 + erf(x / √2)) / 2            dy/dx = Φ(x) + x φ(x),  φ(x) = exp(-x²/2) / √(2π)

    "tanh" (GPT-2):  y = x s,  s = (1 + tanh(u / 2)) / 2 = sigmoid(u),  u = √(8/π) (x + 0.044715 x³)
                     dy/dx = s + x s (1 - s) u',  u' = √(8/π) (1 + 0.134145 x²)

Value and slope share their exponential, so the forward pass makes both, and the slope is kept in place of x:
the backward pass is a product.
"""
from __future__ import annotations

import math

import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check
from kernels.elementary import normal, sigmoid
from kernels.jit import exact, flat_tasks, helper, kernel, launch

SCALE, CUBIC = math.sqrt(8 / math.pi), 0.044715


def gelu_forward(x: np.ndarray, approximate: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """x of any shape -> y, and dy/dx, which the backward pass takes; approximate: the tanh form."""
    check("gelu_forward", "x", x)
    y, slope = memory.empty(x.shape, x.dtype), memory.empty(x.shape, x.dtype)
    launch(_gelu_forward, flat_tasks(x.size), x.reshape(-1), approximate, y.reshape(-1), slope.reshape(-1))
    return y, slope


def gelu_backward(dy: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """dx, from the gradient and the slope that the forward pass gave."""
    check("gelu_backward", "dy", dy)
    check("gelu_backward", "slope", slope, dy.shape, like=dy)
    dx = memory.empty(dy.shape, dy.dtype)
    launch(_gelu_backward, flat_tasks(dy.size), dy.reshape(-1), slope.reshape(-1), dx.reshape(-1))
    return dx


@kernel
def _gelu_forward(x, approximate, y, slope, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        first, last = x.size * task // tasks, x.size * (task + 1) // tasks
        gelu_row(x[first:last], approximate, y[first:last], slope[first:last])


@exact
def gelu_row(x, approximate, y, slope):
    real = x.dtype.type
    if approximate:
        for i in range(x.size):
            square = x[i] * x[i]
            s = sigmoid(real(SCALE) * x[i] * (real(1) + real(CUBIC) * square))
            du = real(SCALE) * (real(1) + real(3 * CUBIC) * square)
            y[i] = x[i] * s
            slope[i] = s + x[i] * s * (real(1) - s) * du
    else:
        for i in range(x.size):
            below, density = normal(x[i])
            y[i] = x[i] * below
            slope[i] = below + x[i] * density


@kernel
def _gelu_backward(dy, slope, dx, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        first, last = dy.size * task // tasks, dy.size * (task + 1) // tasks
        multiply_row(dy[first:last], slope[first:last], dx[first:last])


@helper
def multiply_row(x, y, z):
    for i in range(x.size):
        z[i] = x[i] * y[i]
