"""AdamW: one pass over all parameters, gradients and moments, with the clipping factor applied on the way.
Source: Loshchilov, Hutter 2019.

    g ← s g,   m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²,
    p ← p - lr λ p - lr (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)
"""
from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Collection, Sequence

import numba
import numpy as np
from numba import prange

from kernels.check import check
from kernels.jit import flat_tasks, helper, kernel, launch
from kernels.simd import pointer


def adamw(parameters: Sequence[np.ndarray], gradients: Sequence[np.ndarray], firsts: Sequence[np.ndarray],
          seconds: Sequence[np.ndarray], decays: Sequence[float], step: int, lr: float, beta1: float,
          beta2: float, eps: float, scale: float = 1.0) -> None:
    """Update parameters and their moments, firsts and seconds, in place; all arrays of one dtype.

    decays: λ of each parameter. step: t, counted from 1. scale: s, the factor that clips the gradients (which
    themselves stay as they are).
    """
    groups = {"parameters": parameters, "gradients": gradients, "firsts": firsts, "seconds": seconds}
    addresses, ends = _joined("adamw", groups, groups.keys() - {"gradients"})
    if len(decays) != len(parameters):
        raise ValueError(f"adamw: decays holds {len(decays)} numbers; there are {len(parameters)} parameters")
    if step < 1:
        raise ValueError(f"adamw: step is {step}; steps are counted from 1")
    if not parameters:
        return
    like = parameters[0].reshape(-1)[:0]
    real = like.dtype.type
    constants = (real(scale), real(beta1), real(1 - beta1), real(beta2), real(1 - beta2),
                 real(lr / (1 - beta1**step)), real(math.sqrt(1 - beta2**step)), real(eps))
    shrinks = np.array([1 - lr * decay for decay in decays], like.dtype)
    launch(_adamw, flat_tasks(int(ends[-1])), like, addresses, ends, shrinks, constants)


def sum_of_squares(arrays: Sequence[np.ndarray]) -> float:
    """Σ x² over all arrays, which are of one dtype, in float64: for the norm of a gradient."""
    addresses, ends = _joined("sum_of_squares", {"arrays": arrays}, ())
    if not arrays:
        return 0.0
    partial = np.empty(flat_tasks(int(ends[-1])))
    launch(_sum_of_squares, len(partial), arrays[0].reshape(-1)[:0], addresses, ends, partial)
    return float(partial.sum())


def check_lists(name: str, groups: dict[str, Sequence[np.ndarray]], written: Collection[str]) -> None:
    """Raise unless each list is of the first one's shapes; written: those that are to be written into."""
    for list_name, arrays in groups.items():
        _check_list(name, list_name, arrays, next(iter(groups.values())))
        if list_name in written and not all([x.flags.writeable for x in arrays]):
            raise ValueError(f"{name}: {list_name} holds a read-only array; it is updated in place, "
                             "so pass a copy")


def _check_list(name: str, list_name: str, arrays: Sequence[np.ndarray], like: Sequence[np.ndarray]) -> None:
    """Raise unless arrays is a list of arrays of the shapes of like's, all of one dtype."""
    if not isinstance(arrays, (list, tuple)):
        raise TypeError(f"{name}: {list_name} is a {type(arrays).__name__}; it must be a list of arrays")
    if len(arrays) != len(like):
        raise ValueError(f"{name}: {list_name} holds {len(arrays)} arrays; there are {len(like)} parameters")
    for i, (x, other) in enumerate(zip(arrays, like, strict=True)):
        check(name, f"{list_name}[{i}]", x, None if x is other else other.shape, like=like[0])


_known: dict[tuple, tuple] = {}          # what `_joined` found, and for which arrays; it does not keep these
MOST_KNOWN = 16


def _joined(name: str, groups: dict[str, Sequence[np.ndarray]],
            written: Collection[str]) -> tuple[np.ndarray, np.ndarray]:
    """The addresses of the arrays (n, groups), and where each array of a group ends if they are joined.

    Arrays of an earlier call are not checked again, but for being writeable: to look at a hundred arrays
    takes as long as the kernel of a small model.
    """
    key: tuple = ()
    if all([isinstance(group, (list, tuple)) for group in groups.values()]):
        key = (name, *[tuple(map(id, group)) for group in groups.values()])
    found = _known.get(key)                                  # (another thread may clear it at any time)
    if found is not None:
        addresses, ends, known = found
        arrays = itertools.chain(*groups.values())
        if (all([reference() is x for reference, x in zip(known, arrays, strict=True)])
                and all([x.flags.writeable for list_name in written for x in groups[list_name]])):
            return addresses, ends
    check_lists(name, groups, written)
    # (Not x.__array_interface__: its keys, interned anew each time, make Python's table of strings grow.)
    addresses = np.array([[x.ctypes.data for x in group] for group in groups.values()], np.int64).T.copy()
    ends = np.cumsum([x.size for x in next(iter(groups.values()))])
    if len(_known) >= MOST_KNOWN:
        _known.clear()
    _known[key] = addresses, ends, [weakref.ref(x) for x in itertools.chain(*groups.values())]
    return addresses, ends


@helper
def part_of(ends, n, first, last):
    """What of array n lies between elements first and last of all, as if they were joined: from i to j."""
    start = ends[n - 1] if n else 0
    return max(first, start) - start, min(last, ends[n]) - start


@helper
def array_at(like, address, first, last):
    """Elements first to last of the flat array of like's dtype at this address."""
    return numba.carray(pointer(like, address + first * like.itemsize), last - first)


@kernel
def _adamw(like, addresses, ends, shrinks, constants, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        adamw_task(like, addresses, ends, shrinks, constants, ends[-1] * task // tasks,
                   ends[-1] * (task + 1) // tasks)


@helper
def adamw_task(like, addresses, ends, shrinks, constants, first, last):
    """Elements first to last of all parameters."""
    for n in range(len(ends)):
        i, j = part_of(ends, n, first, last)
        if i < j:
            adamw_part(array_at(like, addresses[n, 0], i, j), array_at(like, addresses[n, 1], i, j),
                       array_at(like, addresses[n, 2], i, j), array_at(like, addresses[n, 3], i, j),
                       shrinks[n], constants)


@helper
def adamw_part(p, g, m, v, shrink, constants):
    scale, beta1, rest1, beta2, rest2, rate, root, eps = constants
    for i in range(p.size):
        gi = g[i] * scale
        m[i] = beta1 * m[i] + rest1 * gi
        v[i] = beta2 * v[i] + rest2 * gi * gi
        p[i] = p[i] * shrink - rate * m[i] / (math.sqrt(v[i]) / root + eps)


@kernel
def _sum_of_squares(like, addresses, ends, partial, tasks):
    for index in prange(tasks):
        task = np.int64(index)
        partial[task] = squares_task(like, addresses, ends, ends[-1] * task // tasks,
                                     ends[-1] * (task + 1) // tasks)


@helper
def squares_task(like, addresses, ends, first, last):
    total = 0.0
    for n in range(len(ends)):
        i, j = part_of(ends, n, first, last)
        if i < j:
            total += squares_part(array_at(like, addresses[n, 0], i, j))
    return total


@helper
def squares_part(x):
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(x[i])
    return total
