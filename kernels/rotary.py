"""What queries and keys meet before attention, in one pass: QK-norm, then rotary positions; values pass as
they are. Sources: Henry et al. 2020 (QK-norm), Su et al. 2021 (rotary positions).

    x̂ = r x,  r = 1 / √(mean(x²) + ε)                     over the D numbers of a head
    y = R x̂,  (y_j, y_{j+D/2}) = (x̂_j cos θ - x̂_{j+D/2} sin θ,  x̂_{j+D/2} cos θ + x̂_j sin θ)

θ = t base^(-2j/D), t the token's position: the product of a query and a key depends on their distance alone.

    Rotations keep inner products, so that x̂ · Rᵀdy = y · dy. With dx̂ = Rᵀdy, dx = r (dx̂ - x̂ mean(x̂ dx̂)) is
    dx = r Rᵀ(dy - y mean(y dy)),  which needs y and r, but not x.
"""
from __future__ import annotations

import functools
import math

import numpy as np
from numba import prange

from kernels import memory
from kernels.check import check
from kernels.jit import helper, kernel, launch, row_tasks


def rotary_forward(qkv: np.ndarray, heads: int, base: float | None = 10_000.0, eps: float | None = None,
                   start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """qkv (B, T, 3C) -> y (B, T, 3C) and r of each query's and key's head: (B T, 2H), or (B T, 0).

    base: of the angles, None for no rotation. eps: ε, None for no norm. start: the first token's position.
    """
    check("rotary_forward", "qkv", qkv, (None, None, None))
    cos, sin = _tables("rotary_forward", qkv, heads, base, start)
    y = memory.empty(qkv.shape, qkv.dtype)
    rows = qkv.reshape(-1, qkv.shape[2])
    scales = memory.empty((len(rows), 0 if eps is None else 2 * heads), qkv.dtype)
    launch(_rotary_forward, row_tasks(rows), rows, heads, cos, sin, qkv.dtype.type(eps or 0),
           y.reshape(rows.shape), scales)
    return y, scales


def rotary_backward(dy: np.ndarray, y: np.ndarray, scales: np.ndarray, heads: int,
                    base: float | None = 10_000.0, start: int = 0) -> np.ndarray:
    """dqkv (B, T, 3C), from the gradient and what the forward pass gave."""
    check("rotary_backward", "dy", dy, (None, None, None))
    check("rotary_backward", "y", y, dy.shape, like=dy)
    rows = dy.reshape(-1, dy.shape[2])
    check("rotary_backward", "scales", scales, (len(rows), None), like=dy)
    if scales.shape[1] not in (0, 2 * heads):
        raise ValueError(f"rotary_backward: scales has shape {scales.shape}; it must be ({len(rows)}, "
                         f"{2 * heads}), or ({len(rows)}, 0) if nothing was normalised")
    cos, sin = _tables("rotary_backward", dy, heads, base, start)
    dqkv = memory.empty(dy.shape, dy.dtype)
    launch(_rotary_backward, row_tasks(rows), rows, y.reshape(rows.shape), scales, heads, cos, sin,
           dqkv.reshape(rows.shape))
    return dqkv


def rotary_angles(time: int, width: int, base: float, dtype: np.dtype,
                  start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """cos θ and sin θ of positions from start on, for heads of this width: two of (time, width / 2)."""
    cos, sin = _rows_of_angles(time, width, base, dtype, start)
    return cos.copy(), sin.copy()


def _rows_of_angles(time: int, width: int, base: float, dtype: np.dtype,
                    start: int) -> tuple[np.ndarray, np.ndarray]:
    """As `rotary_angles`, from tables that are kept."""
    longest = 1 << max(0, start + time - 1).bit_length()         # few tables, however long a text is by now
    cos, sin = _angles(longest, width, base, dtype)
    return cos[start:start + time], sin[start:start + time]


@functools.lru_cache(maxsize=32)
def _angles(time: int, width: int, base: float, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    frequencies = base ** (np.arange(0, width, 2) / -width)
    angles = np.arange(time)[:, None] * frequencies
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def _tables(name: str, qkv: np.ndarray, heads: int, base: float | None,
            start: int) -> tuple[np.ndarray, np.ndarray]:
    """The angles of qkv's tokens, (T, 0) each for no rotation; ValueError for heads that do not fit."""
    time, width = qkv.shape[1], qkv.shape[2] // (3 * max(1, heads))
    if heads < 1 or qkv.shape[2] != 3 * heads * width:
        raise ValueError(f"{name}: qkv has shape {qkv.shape}; it must be (B, T, 3C) with {heads} heads "
                         "dividing C")
    if base is None:
        nothing = np.empty((time, 0), qkv.dtype)
        return nothing, nothing
    if width % 2 or base <= 0 or start < 0:
        raise ValueError(f"{name}: qkv has shape {qkv.shape}, {heads} heads, base {base}, start {start}; "
                         "pairs need heads of an even width, base must be above 0, start at least 0")
    return _rows_of_angles(time, width, base, qkv.dtype, start)


@kernel
def _rotary_forward(x, heads, cos, sin, eps, y, scales, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        for i in range(len(x) * task // tasks, len(x) * (task + 1) // tasks):
            t = i % len(cos)
            rotary_row(x[i], heads, cos[t], sin[t], eps, y[i], scales[i])


@helper
def rotary_row(x, heads, cos, sin, eps, y, scales):
    width = x.size // (3 * heads)
    for h in range(2 * heads):
        head = x[h * width:(h + 1) * width]
        scale = x.dtype.type(1)
        if scales.size:
            scale = inverse_rms(head, eps)
            scales[h] = scale
        rotate_head(head, scale, cos, sin, y[h * width:(h + 1) * width])
    values, to = x[2 * heads * width:], y[2 * heads * width:]    # j from 0 on: else numba gathers
    for j in range(values.size):
        to[j] = values[j]


@helper
def inverse_rms(x, eps):
    real = x.dtype.type
    squares = real(0)
    for j in range(x.size):
        squares += x[j] * x[j]
    return real(1) / real(math.sqrt(squares / real(x.size) + eps))


@helper
def rotate_head(x, scale, cos, sin, y):
    half = cos.size
    for j in range(half):
        y[j] = scale * (x[j] * cos[j] - x[half + j] * sin[j])
        y[half + j] = scale * (x[half + j] * cos[j] + x[j] * sin[j])
    for j in range(0 if half else x.size):                       # no rotation
        y[j] = scale * x[j]


@kernel
def _rotary_backward(dy, y, scales, heads, cos, sin, dx, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        for i in range(len(dy) * task // tasks, len(dy) * (task + 1) // tasks):
            t = i % len(cos)
            rotary_row_backward(dy[i], y[i], scales[i], heads, cos[t], sin[t], dx[i])


@helper
def rotary_row_backward(dy, y, scales, heads, cos, sin, dx):
    real, width = dy.dtype.type, dy.size // (3 * heads)
    for h in range(2 * heads):
        first, last = h * width, (h + 1) * width
        scale, mean = real(1), real(0)
        if scales.size:
            scale, mean = scales[h], mean_product(y[first:last], dy[first:last])
        rotate_head_back(dy[first:last], y[first:last], scale, mean, cos, sin, dx[first:last])
    dvalues, to = dy[2 * heads * width:], dx[2 * heads * width:]
    for j in range(dvalues.size):
        to[j] = dvalues[j]


@helper
def mean_product(x, y):
    total = x.dtype.type(0)
    for j in range(x.size):
        total += x[j] * y[j]
    return total / x.dtype.type(x.size)


@helper
def rotate_head_back(dy, y, scale, mean, cos, sin, dx):
    half = cos.size
    for j in range(half):
        first, second = dy[j] - y[j] * mean, dy[half + j] - y[half + j] * mean
        dx[j] = scale * (first * cos[j] + second * sin[j])
        dx[half + j] = scale * (second * cos[j] - first * sin[j])
    for j in range(0 if half else dy.size):                      # no rotation
        dx[j] = scale * (dy[j] - y[j] * mean)
