"""Hypothesis strategies for property tests of ops: shapes, arrays clear of kinks and ties, axes, indices.

>>> from hypothesis import given, settings
>>> from minitensor.testing import gradcheck, strategies
>>> @settings(max_examples=10)                                # hypothesis's own default is 100
... @given(strategies.shapes().flatmap(strategies.arrays))
... def test_tanh(x):
...     gradcheck(np.tanh, x)
>>> test_tanh()
"""
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

Shape = tuple[int, ...]


def shapes(min_dims: int = 0, max_dims: int = 3, min_side: int = 1,
           max_side: int = 3) -> st.SearchStrategy[Shape]:
    """Shapes of min_dims to max_dims axes; min_side=0 has empty arrays among them."""
    return hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=min_side, max_side=max_side)


def broadcastable_shapes(n: int = 2, min_dims: int = 0, max_dims: int = 3, min_side: int = 1,
                         max_side: int = 3) -> st.SearchStrategy[tuple[Shape, ...]]:
    """n shapes that broadcast against each other."""
    drawn = hnp.mutually_broadcastable_shapes(num_shapes=n, min_dims=min_dims, max_dims=max_dims,
                                              min_side=min_side, max_side=max_side)
    return drawn.map(lambda broadcastable: broadcastable.input_shapes)


def arrays(shape: Shape | st.SearchStrategy[Shape], dtype: Any = np.float64, low: float = -2, high: float = 2,
           away_from: Sequence[float] = (), gap: float = 1 / 64,
           distinct: bool = False) -> st.SearchStrategy[np.ndarray]:
    """Arrays of multiples of gap between low and high, of which failures shrink to 0, 1, -1 before 1 / 64.

    away_from: points, such as kinks, that every element is at least gap away from. distinct: no two elements
    are nearer than gap (and there must be room for them between low and high).
    """
    elements = st.sampled_from(_simplest_first(low, high, tuple(away_from), gap))
    return hnp.arrays(dtype, shape, elements=elements, fill=st.nothing(), unique=distinct)


@functools.lru_cache
def _simplest_first(low: float, high: float, away_from: tuple[float, ...], gap: float) -> list[float]:
    """The multiples of gap that may be drawn, as failures shrink to them: 0, 1, -1, 2, ..., 0.5, ..."""
    multiples = gap * np.arange(math.ceil(low / gap), math.floor(high / gap) + 1)
    allowed = [x for x in multiples.tolist() if all(abs(x - kink) >= gap for kink in away_from)]
    if not allowed:
        raise ValueError(f"arrays: no multiple of gap={gap} lies between low={low} and high={high}, "
                         f"away from {away_from}")
    return sorted(allowed, key=lambda x: (x.as_integer_ratio()[1], abs(x), x < 0))


def axes(ndim: int) -> st.SearchStrategy[int | Shape | None]:
    """What `axis=` takes for an array of ndim axes: None, an integer, a tuple."""
    drawn = st.none() | hnp.valid_tuple_axes(ndim)
    return drawn | st.integers(-ndim, ndim - 1) if ndim else drawn


def indices(shape: Shape) -> st.SearchStrategy[Any]:
    """What x[...] takes: integers, slices with steps, None, ..., integer and boolean arrays."""
    kinds: list[st.SearchStrategy[Any]]
    kinds = [hnp.basic_indices(shape, allow_newaxis=True), hnp.arrays(bool, shape, fill=st.nothing())]
    if shape and all(shape):
        rows = hnp.integer_array_indices(shape[:1], result_shape=hnp.array_shapes(max_dims=2, max_side=3))
        kinds += [hnp.integer_array_indices(shape), rows,
                  st.tuples(rows, hnp.basic_indices(shape[1:], allow_ellipsis=False)).map(_joined)]
    return st.one_of(kinds)


def _joined(parts: tuple[Any, Any]) -> tuple:
    rows, rest = parts
    return (*rows, *(rest if isinstance(rest, tuple) else (rest,)))
