"""Arguments are checked here, before any kernel runs: a kernel never reads out of bounds."""
from __future__ import annotations

from typing import Any

import numpy as np

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
INTEGERS = (np.dtype(np.int32), np.dtype(np.int64))


def check(kernel: str, name: str, x: Any, shape: tuple[int | None, ...] | None = None,
          like: Any = None) -> None:
    """Raise unless x is a C-contiguous array of float32 or float64, of this shape and of like's dtype.

    shape: None stands for any length.
    """
    if not isinstance(x, np.ndarray) or x.dtype not in FLOATS:
        raise TypeError(f"{kernel}: {name} is {_kind(x)}; it must be an array of float32 or float64")
    if like is not None and x.dtype != like.dtype:
        raise TypeError(f"{kernel}: {name} is {x.dtype}, but the other arrays are {like.dtype}; "
                        "convert one of them")
    if not x.flags.c_contiguous:
        raise ValueError(f"{kernel}: {name} is not C-contiguous; pass np.ascontiguousarray({name})")
    _check_shape(kernel, name, x, shape)


def check_integers(kernel: str, name: str, x: Any, shape: tuple[int | None, ...] | None = None) -> None:
    """Raise unless x is a C-contiguous int32 or int64 array of this shape (None: any length)."""
    if not isinstance(x, np.ndarray) or x.dtype not in INTEGERS:
        raise TypeError(f"{kernel}: {name} is {_kind(x)}; it must be an array of int32 or int64")
    if not x.flags.c_contiguous:
        raise ValueError(f"{kernel}: {name} is not C-contiguous; pass np.ascontiguousarray({name})")
    _check_shape(kernel, name, x, shape)


def check_range(kernel_name: str, name: str, ids: np.ndarray, limit: int) -> None:
    """IndexError unless all ids are in 0 to limit - 1."""
    if ids.size and not (0 <= ids.min() and ids.max() < limit):
        wrong = ids[(ids < 0) | (ids >= limit)]
        raise IndexError(f"{kernel_name}: {name} holds {wrong.flat[0]}; it must be in 0 to {limit - 1}")


def _check_shape(kernel: str, name: str, x: np.ndarray, shape: tuple[int | None, ...] | None) -> None:
    if shape is None or shape == x.shape:
        return
    if len(shape) != x.ndim or any([n is not None and n != m for n, m in zip(shape, x.shape, strict=True)]):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{kernel}: {name} has shape {x.shape}; it must be ({wanted})")


def _kind(x: Any) -> str:
    return f"an array of {x.dtype}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"
