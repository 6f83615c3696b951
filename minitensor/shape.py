"""Ops that move elements and compute nothing: shapes, axes, joining, indexing.

Each vjp moves the gradient back the same way. `getitem` and `scatter` are each other's vjp, and what else
picks elements is composed of them.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_index, normalize_axis_tuple

from minitensor import tensor
from minitensor.explain import listed, out_of_range
from minitensor.ops import _alike, _values
from minitensor.tensor import Tensor, implements, op

# ---- axes --------------------------------------------------------------------------------------------------

@op(np.reshape)
def reshape(x, shape):
    """The same elements in another shape, in C order; one length may be -1."""
    return np.reshape(x, shape), lambda g: np.reshape(g, x.shape)

@implements(np.ravel)
def ravel(x):
    """The elements along one axis, in C order."""
    return np.reshape(x, (math.prod(x.shape),))

@op(np.transpose)
def transpose(x, axes=None):
    """The axes in the order of axes, or reversed for None."""
    back = None if axes is None else np.argsort(normalize_axis_tuple(axes, x.ndim))
    return np.transpose(x, axes), lambda g: np.transpose(g, back)

@op(np.swapaxes)
def swapaxes(x, axis1, axis2):
    """Two axes exchanged."""
    return np.swapaxes(x, axis1, axis2), lambda g: np.swapaxes(g, axis1, axis2)

@op(np.moveaxis)
def moveaxis(x, source, destination):
    """The axes source, moved to destination; the others keep their order."""
    return np.moveaxis(x, source, destination), lambda g: np.moveaxis(g, destination, source)

@op(np.expand_dims)
def expand_dims(x, axis):
    """New axes of length one, at axis of the result."""
    return np.expand_dims(x, axis), lambda g: np.reshape(g, x.shape)

@op(np.squeeze)
def squeeze(x, axis=None):
    """Without the axes of length one: all of them, or those in axis."""
    return np.squeeze(x, axis=axis), lambda g: np.reshape(g, x.shape)

@op(np.broadcast_to)
def broadcast_to(x, shape):
    """x repeated to shape by broadcasting, without a copy."""
    return np.broadcast_to(x, shape), lambda g: g

@op(np.flip)
def flip(x, axis=None):
    """The elements in reverse order along axis, or along all axes for None."""
    return np.flip(x, axis=axis), lambda g: np.flip(g, axis=axis)


# ---- indexing ----------------------------------------------------------------------------------------------

def _parts(index: Any) -> tuple:
    return index if isinstance(index, tuple) else (index,)

def _is_basic(i: Any) -> bool:
    return i is None or i is Ellipsis or isinstance(i, (slice, int, np.integer))

@op(tensor.getitem)
def getitem(x, index):
    """x[index], by all of numpy's indices; an element that is taken twice gets both gradients."""
    if any(isinstance(i, Tensor) or getattr(i, "dtype", np.dtype(int)).kind == "f" for i in _parts(index)):
        raise IndexError("getitem: an index is a Tensor or an array of floats; indices are integers, slices, "
                         "None, ... and integer or boolean arrays, as in x[i.numpy().astype(int)]")
    try:
        value = x[index]
    except IndexError as error:
        raise out_of_range(x.shape, error) from None
    return value, lambda g: scatter(g, index, x.shape)

@op()
def scatter(g, index, shape):
    """The adjoint of getitem: zeros of shape, with g added at index."""
    value = np.zeros(shape, g.dtype)
    if all(_is_basic(i) or np.asarray(i).dtype == bool for i in _parts(index)):
        value[index] = _values(g)
    else:                                                   # an array of integers may name an element twice
        np.add.at(value, index, _values(g))
    return value, lambda h: h[index]

@implements(np.array_split)
def array_split(x, indices_or_sections, axis=0):
    """x cut along axis: before the given indices, or into so many parts, as equal as can be."""
    return _pieces(np.array_split, x, indices_or_sections, axis)

@implements(np.split)
def split(x, indices_or_sections, axis=0):
    """x cut along axis: before the given indices, or into so many parts (ValueError if not of one length)."""
    return _pieces(np.split, x, indices_or_sections, axis)

def _pieces(cut: Callable, x: Any, indices_or_sections: Any, axis: int) -> list:
    axis = normalize_axis_index(axis, x.ndim)
    ranges = [slice(p[0], p[-1] + 1) if len(p) else slice(0, 0)
              for p in cut(np.arange(x.shape[axis]), indices_or_sections)]
    return [x[(slice(None),) * axis + (part,)] for part in ranges]

@implements(np.repeat)
def repeat(x, repeats, axis=None):
    """Each element along axis (of the flattened x for None) repeats times in a row; repeats may vary."""
    if axis is None:
        x, axis = np.ravel(x), 0
    axis = normalize_axis_index(axis, x.ndim)
    return x[(slice(None),) * axis + (np.repeat(np.arange(x.shape[axis]), repeats),)]


# ---- joining and filling -----------------------------------------------------------------------------------

@op()
def join(*arrays, axis):
    """Arrays of one dtype, one after the other along axis: what `concatenate` comes down to."""
    bounds = np.cumsum([x.shape[axis] for x in arrays[:-1]])
    return np.concatenate(arrays, axis=axis), lambda g: tuple(np.split(g, bounds, axis=axis))

@implements(np.concatenate)
def concatenate(arrays, axis=0):
    """The arrays one after the other along axis, or flattened for None; their other axes must agree."""
    arrays = _alike("concatenate", arrays)
    if axis is None:
        arrays, axis = [np.ravel(x) for x in arrays], 0
    return join(*arrays, axis=axis)

@implements(np.stack)
def stack(arrays, axis=0):
    """Arrays of one shape along a new axis of the result."""
    arrays = _alike("stack", arrays)
    if len({x.shape for x in arrays}) > 1:
        raise ValueError(f"stack: the arrays are {listed([x.shape for x in arrays])}; all must have one "
                         "shape, and np.concatenate joins along an axis that is there")
    return np.concatenate([np.expand_dims(x, axis) for x in arrays], axis=axis)

@op(np.pad)
def pad(x, pad_width, mode="constant", *, constant_values=0):
    """x in a frame of constant_values; pad_width is n, (before, after), or one such pair for each axis."""
    if mode != "constant":
        raise ValueError(f"pad: mode is {mode!r}; only 'constant' has an op that can be differentiated")
    before = np.broadcast_to(pad_width, (x.ndim, 2))[:, 0]
    inside = tuple(slice(start, start + n) for start, n in zip(before, x.shape, strict=True))
    return np.pad(x, pad_width, constant_values=constant_values), lambda g: g[inside]

@implements(np.tile)
def tile(x, reps):
    """x laid out reps times along each axis, as numpy's tile."""
    reps = tuple(np.atleast_1d(reps).tolist())
    ndim = max(len(reps), x.ndim)
    reps, shape = (1,) * (ndim - len(reps)) + reps, (1,) * (ndim - x.ndim) + x.shape
    x = np.reshape(x, [k for n in shape for k in (1, n)])
    x = np.broadcast_to(x, [k for r, n in zip(reps, shape, strict=True) for k in (r, n)])
    return np.reshape(x, [r * n for r, n in zip(reps, shape, strict=True)])

@implements(np.tril)
def tril(x, k=0):
    """The lower triangle of the last two axes, up to and with diagonal k; zeros above."""
    return np.where(np.tri(*x.shape[-2:], k=k, dtype=bool), x, 0)

@implements(np.triu)
def triu(x, k=0):
    """The upper triangle of the last two axes, from diagonal k on; zeros below."""
    return np.where(np.tri(*x.shape[-2:], k=k - 1, dtype=bool), 0, x)
