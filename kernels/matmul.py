"""Matrix products: A B, A Bᵀ, Aᵀ B, over batches.

    y = x Wᵀ          dx = dy W          dW = dyᵀ x

Operands are copied into panels as wide as the register tile, or rows as tall, so that it reads them in order,
or read where they are: see `kernels.plan`, which cuts C into pieces. For products in bfloat16 both are
copied, and rounded on the way. Every sum over K runs in the same order however C is cut up, so the bits do
not depend on the number of threads.

A large C goes past the caches: it would not be there when it is read, and a line that is not fetched to be
overwritten takes half the time.
"""
from __future__ import annotations

import math
import threading

import numpy as np
from numba import prange

from kernels import memory
from kernels.add import add_up
from kernels.check import check
from kernels.copies import copy_pieces
from kernels.cpu import TARGET
from kernels.jit import helper, kernel, launch, row_tasks
from kernels.pack import mirror_stripe
from kernels.plan import Plan, plan_product
from kernels.product import GELU, GELU_TANH, RELU2, multiply_pieces
from kernels.share import new_counters, num_threads

ACTIVATIONS = {"gelu": GELU, "gelu_tanh": GELU_TANH, "relu2": RELU2}
AS_IT_IS = 1.0, 0.0         # a scale, and a shift of the diagonal


class _State(threading.local):
    """What a thread asked for."""
    precision = "highest"


_state = _State()


def set_matmul_precision(precision: str) -> None:
    """How `matmul`, `linear_forward` and attention multiply float32 in this thread: "highest" in float32,
    "bf16" with operands rounded to bfloat16 (relative error up to 2**-8 of each product).

    Sums are float32 either way; float64 and column sums are as always, as is attention under a mask, or of
    few keys (fewer than 192, on a tile unit 128). RuntimeError where there are no such products.
    """
    if precision not in ("highest", "bf16"):
        raise ValueError(f"set_matmul_precision: precision is {precision!r}; it must be 'highest' or 'bf16'")
    if precision == "bf16" and not TARGET.bf16:
        raise RuntimeError(f"set_matmul_precision: this CPU ({TARGET.name}) has no products in bfloat16; "
                           "'highest' works everywhere")
    _state.precision = precision


def get_matmul_precision() -> str:
    """What `set_matmul_precision` was given in this thread: "highest" if nothing."""
    return _state.precision


def matmul(a: np.ndarray, b: np.ndarray, transpose_a: bool = False, transpose_b: bool = False,
           exact: bool = False) -> np.ndarray:
    """op(a) @ op(b), where op swaps the last two axes if asked: (..., M, K) @ (..., K, N) -> (..., M, N).

    Leading axes are broadcast. Both arrays C-contiguous, both float32 or both float64. exact: in their own
    precision, whatever `set_matmul_precision` says.
    """
    for name, x in (("a", a), ("b", b)):
        check("matmul", name, x)
        if x.ndim < 2:
            raise ValueError(f"matmul: {name} has shape {x.shape}; it must have two axes or more")
    if a.dtype != b.dtype:
        raise TypeError(f"matmul: a is {a.dtype}, b is {b.dtype}; convert one of them")
    m, k = a.shape[-2:] if not transpose_a else a.shape[:-3:-1]
    k_b, n = b.shape[-2:] if not transpose_b else b.shape[:-3:-1]
    if k != k_b:
        raise ValueError(f"matmul: inner sizes differ: a is {a.shape}{' transposed' * transpose_a}, "
                         f"b is {b.shape}{' transposed' * transpose_b}")
    batch = () if a.ndim == b.ndim == 2 else np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    c = memory.empty((*batch, m, n), a.dtype)
    if c.size:
        _product(_flat_batch(a, batch), _flat_batch(b, batch), c.reshape(-1, m, n) if batch else c[None], k,
                 transpose_a, transpose_b, exact=exact)
    return c


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
        _product(a, b, c, k, transpose_a, transpose_b, exact=exact, mirrored=(float(scale), float(shift)))
    return c


def _flat_batch(x: np.ndarray, batch: tuple[int, ...]) -> np.ndarray:
    """x as (1, ., .), if it is one matrix for the whole batch, else as (count, ., .)."""
    if not batch and x.size:
        return x[None]
    if math.prod(x.shape[:-2]) not in (1, math.prod(batch)):
        x = np.broadcast_to(x, batch + x.shape[-2:]).copy()
    return x.reshape(-1, *x.shape[-2:]) if x.size else np.zeros((1, *x.shape[-2:]), x.dtype)


def linear_forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None,
                   activation: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """x (N, K), weight (M, K), bias (M,) or None -> y (N, M) and what the activation's backward pass takes.

    activation: None, "gelu", "gelu_tanh" or "relu2". For the GELUs the second result is their slope, else it
    is y itself.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"linear_forward: activation is {activation!r}; it must be None or one of "
                         f"{', '.join(map(repr, ACTIVATIONS))}")
    check("linear_forward", "x", x, (None, None))
    check("linear_forward", "weight", weight, (None, x.shape[1]), like=x)
    if bias is not None:
        check("linear_forward", "bias", bias, weight.shape[:1], like=x)
    kept = memory.empty((len(x), len(weight)), x.dtype)
    y = kept if activation in (None, "relu2") else memory.empty(kept.shape, x.dtype)
    if y.size:
        _product(x[None], weight[None], kept[None], x.shape[1], False, True, bias,
                 None if activation is None else y[None], ACTIVATIONS.get(activation or "", GELU))
    return y, kept


def column_sum(x: np.ndarray) -> np.ndarray:
    """The sum of the rows of x (N, C) -> (C,)."""
    check("column_sum", "x", x, (None, None))
    tasks = row_tasks(x)
    partial, total = memory.empty((tasks, x.shape[1]), x.dtype), memory.empty(x.shape[1], x.dtype)
    launch(_column_sum, tasks, x, partial, total)
    return total


@kernel
def _column_sum(x, partial, total, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        sum_rows(x, len(x) * task // tasks, len(x) * (task + 1) // tasks, partial[task])
    add_up(partial, total)


@helper
def sum_rows(x, first, last, total):
    """The sum of rows first to last, four at a time, as the total is read and written for each."""
    for j in range(total.size):
        total[j] = 0
    whole = first + (last - first) // 4 * 4
    for i in range(first, whole, 4):
        a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(total.size):
            total[j] += (a[j] + b[j]) + (c[j] + d[j])
    for i in range(whole, last):
        a = x[i]
        for j in range(total.size):
            total[j] += a[j]


def _product(a, b, c, k, transpose_a, transpose_b, bias=None, activated=None, activation=GELU, exact=False,
             mirrored=None):
    """c = op(a) @ op(b) + bias, all 3-D; a or b may have a batch of one.

    activated: takes activation(c), and c then what its backward pass needs; one array for "relu2". exact: in
    the arrays' own precision, whatever `set_matmul_precision` says. mirrored: (scale, shift) of a product
    that is symmetric, and has no bias.
    """
    count, m, n = c.shape
    bf16 = _state.precision == "bf16" and c.dtype == np.float32 and not exact
    sizes, tasks, size = plan_product(
        count, m, n, k, len(a), len(b), c.dtype, bf16, transpose_a, transpose_b, a.strides[1],
        mirrored is not None, activated is not None)
    launch(_multiply, tasks, a, b.reshape(-1), c, k, sizes, mirrored or AS_IT_IS, memory.empty(size, c.dtype),
           c[:0, 0, 0] if bias is None else bias, c[:0] if activated is None else activated, activation)


@kernel
def _multiply(a, b, c, k, sizes, mirrored, scratch, bias, activated, activation, tasks):
    plan, n, threads = Plan(*sizes), c.shape[2], min(tasks, num_threads())
    packed_a, packed_b = scratch[:plan.end_a], scratch[plan.end_a:plan.end_b]
    rooms = scratch[plan.end_b:].reshape((scratch.size - plan.end_b) // plan.room, plan.room)
    for n0 in range(0, n, plan.block_n):
        panels = (min(plan.block_n, n - n0) + plan.width - 1) // plan.width
        if plan.shared or not plan.own_b:
            counters = new_counters(threads)
            for index in prange(threads):
                copy_pieces(a, packed_a, b, packed_b, c.shape[1], n, k, n0, panels, plan, np.int64(index),
                            threads, counters)
        counters = new_counters(threads)
        for index in prange(threads):
            thread = np.int64(index)
            multiply_pieces(a, packed_a, b, packed_b, c, k, n0, panels, plan, rooms[thread], thread, threads,
                            counters, bias, activated, activation)
    if plan.half:
        stripes = (n + plan.width - 1) // plan.width
        for index in prange(len(c) * stripes):
            task = np.int64(index)
            mirror_stripe(c[task // stripes], task % stripes * plan.width, plan.width,
                          c.dtype.type(mirrored[0]), c.dtype.type(mirrored[1]))
