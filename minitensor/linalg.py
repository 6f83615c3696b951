"""Matrix products, and einsum as a composition of them."""
from __future__ import annotations

import math
import string
from collections import Counter
from typing import Any

import numpy as np

import kernels
from minitensor.ops import _alike, _values
from minitensor.tensor import implements, op


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The product of arrays (..., M, K) and (..., K, N): the one place where matrices are multiplied."""
    (x, transpose_x), (y, transpose_y) = _plain(x), _plain(y)
    return kernels.matmul(x, y, transpose_x, transpose_y)

def _plain(x: np.ndarray) -> tuple[np.ndarray, bool]:
    """x in C order, or its last two axes exchanged where that saves a copy, and whether they are."""
    if not x.flags.c_contiguous and np.swapaxes(x, -1, -2).flags.c_contiguous:
        return np.swapaxes(x, -1, -2), True
    return np.ascontiguousarray(x), False

@op()
def product(x, y):
    """The product of (..., M, K) and (..., K, N), leading axes broadcast: what `matmul` comes down to."""
    return _product(_values(x), _values(y)), (lambda g: product(g, np.swapaxes(y, -1, -2)),
                                              lambda g: product(np.swapaxes(x, -1, -2), g))

@implements(np.matmul)
def matmul(x, y):
    """The matrix product x @ y: (..., M, K) and (..., K, N) give (..., M, N), leading axes broadcast.

    A vector stands for a row on the left and for a column on the right, and its axis leaves the result.
    ValueError if the inner sizes differ, the leading axes do not broadcast, or an operand has no axes.
    """
    x, y = _alike("matmul", (x, y))
    if not (x.ndim and y.ndim):
        raise ValueError(f"matmul: x is {x.shape}, y is {y.shape}; to scale by a number, use *")
    if y.ndim == 1 and x.shape[-1] == y.shape[0]:
        return np.squeeze(matmul(x, np.expand_dims(y, 1)), axis=-1)
    if x.ndim == 1 and y.ndim > 1 and x.shape[0] == y.shape[-2]:
        return np.squeeze(matmul(np.expand_dims(x, 0), y), axis=-2)
    inner = 0 if y.ndim == 1 else -2
    if x.shape[-1] != y.shape[inner]:
        raise ValueError(f"matmul: inner sizes differ: x is {x.shape}, y is {y.shape}; "
                         f"x.shape[-1] must equal y.shape[{inner}]")
    if x.ndim > 2 and y.ndim == 2:                          # one product, and one for the gradient of y
        rows = np.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
        return np.reshape(product(rows, y), (*x.shape[:-1], y.shape[-1]))
    try:
        np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except ValueError:
        raise ValueError(f"matmul: leading axes do not broadcast: x is {x.shape}, y is {y.shape}; "
                         f"{x.shape[:-2]} and {y.shape[:-2]} must agree from the right, or be 1") from None
    return product(x, y)

@implements(np.dot)
def dot(x, y):
    """x @ y for operands of up to two axes, x * y where one has none."""
    x, y = _alike("dot", (x, y))
    if x.ndim > 2 or y.ndim > 2:
        raise ValueError(f"dot: x is {x.shape}, y is {y.shape}; for more than two axes use matmul or einsum")
    return np.matmul(x, y) if x.ndim and y.ndim else x * y

@implements(np.outer)
def outer(x, y):
    """The product of every element of x with every element of y: (x.size, y.size)."""
    x, y = _alike("outer", (x, y))
    return np.reshape(x, (x.size, 1)) * np.reshape(y, (1, y.size))


# ---- einsum ------------------------------------------------------------------------------------------------

@implements(np.einsum)
def einsum(subscripts, *operands):
    """Einstein's sum: each letter names an axis, and letters missing from the output are summed over.

    subscripts: "ij,jk->ik"; without "->" the output has the letters that occur once, in alphabetic order.
    "..." stands for axes that broadcast; a letter twice in one operand is a diagonal. Operands are contracted
    in pairs, from left to right. ValueError if the subscripts do not fit the operands.
    """
    if not isinstance(subscripts, str):
        raise TypeError(f"einsum: subscripts is {subscripts!r}; give a string, as in 'ij,jk->ik'")
    operands = _alike("einsum", operands)
    terms, output = _parse(subscripts, [x.shape for x in operands])
    sizes = _sizes(subscripts, terms, operands)
    x, labels = _distinct(operands[0], terms[0], sizes)
    for position in range(1, len(terms)):
        asked = set(output).union(*terms[position + 1:])
        x, labels = _contract(x, labels, *_distinct(operands[position], terms[position], sizes), asked)
    x, labels = _sum_out(x, labels, set(output))
    return np.transpose(x, [labels.index(label) for label in output])

def _parse(subscripts: str, shapes: list[tuple[int, ...]]) -> tuple[list[list[str]], list[str]]:
    """The labels of each operand's axes and of the output's: letters, and "-2", "-1" for those of "..."."""
    def fail(reason: str) -> ValueError:
        return ValueError(f"einsum: {subscripts!r} for operands of shapes {shapes}: {reason}")

    left, arrow, right = subscripts.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(shapes):
        raise fail(f"there are {len(terms)} terms and {len(shapes)} operands")
    for term in [*terms, right]:
        if not set(term.replace("...", "", 1)) <= set(string.ascii_letters):
            raise fail(f"{term!r} has more than letters and one '...'")
    unnamed = [len(shape) - len(term.replace("...", "")) for term, shape in zip(terms, shapes, strict=True)]
    for term, shape, extra in zip(terms, shapes, unnamed, strict=True):
        if extra < 0 or (extra > 0 and "..." not in term):
            raise fail(f"{term!r} does not name the {len(shape)} axes of its operand")
    most = max((extra for term, extra in zip(terms, unnamed, strict=True) if "..." in term), default=0)

    def labels(term: str, extra: int) -> list[str]:
        before, dots, after = term.partition("...")
        return [*before, *(str(-i) for i in range(extra if dots else 0, 0, -1)), *after]

    named = [labels(term, extra) for term, extra in zip(terms, unnamed, strict=True)]
    times = Counter(left.replace(",", "").replace(".", ""))
    if not arrow:
        right = "..." * (most > 0) + "".join(sorted(letter for letter, n in times.items() if n == 1))
    output = labels(right, most)
    if most and "..." not in right:
        raise fail("the output has no '...', and the axes it stands for are not summed over")
    for letter, n in Counter(output).items():
        if n > 1 or not any(letter in term for term in named):
            raise fail(f"the output names {letter!r} " + ("twice" if n > 1 else "and no operand does"))
    return named, output

def _sizes(subscripts: str, terms: list[list[str]], operands: list) -> dict[str, int]:
    """The length of each label's axis: all operands agree, or have length one there."""
    sizes: dict[str, int] = {}
    for term, x in zip(terms, operands, strict=True):
        for label, n in zip(term, x.shape, strict=True):
            if sizes.setdefault(label, n) == 1:
                sizes[label] = n
            if n not in (1, sizes[label]):
                shapes = [x.shape for x in operands]
                raise ValueError(f"einsum: {subscripts!r} for operands of shapes {shapes}: "
                                 f"axis {label!r} has lengths {sizes[label]} and {n}")
    return sizes

def _distinct(x: Any, labels: list[str], sizes: dict[str, int]) -> tuple[Any, list[str]]:
    """x without the axes that broadcast and on the diagonal of those named twice."""
    repeated = tuple(i for i, label in enumerate(labels) if x.shape[i] == 1 != sizes[label])
    x, labels = np.squeeze(x, axis=repeated), [label for i, label in enumerate(labels) if i not in repeated]
    for label in [label for label, n in Counter(labels).items() for _ in range(n - 1)]:
        i = labels.index(label)
        j = labels.index(label, i + 1)
        along = np.arange(sizes[label])
        x = np.moveaxis(x, (i, j), (0, 1))[along, along]
        labels = [label, *labels[:i], *labels[i + 1:j], *labels[j + 1:]]
    return x, labels

def _sum_out(x: Any, labels: list[str], asked: set[str]) -> tuple[Any, list[str]]:
    """x summed over the axes whose label nobody asks for."""
    axes = tuple(i for i, label in enumerate(labels) if label not in asked)
    return np.sum(x, axis=axes) if axes else x, [label for label in labels if label in asked]

def _contract(x: Any, a: list[str], y: Any, b: list[str], asked: set[str]) -> tuple[Any, list[str]]:
    """The product of x, of axes a, and y, of axes b, summed over the axes that nobody asks for later."""
    x, a = _sum_out(x, a, asked | set(b))
    y, b = _sum_out(y, b, asked | set(a))
    size = dict(zip(a, x.shape, strict=True)) | dict(zip(b, y.shape, strict=True))
    batch = [label for label in a if label in b and label in asked]
    inner = [label for label in a if label in b and label not in asked]
    left, right = [label for label in a if label not in b], [label for label in b if label not in a]
    x = np.transpose(x, [a.index(label) for label in batch + left + inner])
    y = np.transpose(y, [b.index(label) for label in batch + inner + right])
    B, L, K, R = ([size[label] for label in part] for part in (batch, left, inner, right))
    if inner:
        rows = np.reshape(x, (*B, math.prod(L), math.prod(K)))
        z = np.matmul(rows, np.reshape(y, (*B, math.prod(K), math.prod(R))))
    else:
        z = np.reshape(x, (*B, *L, *(1 for _ in R))) * np.reshape(y, (*B, *(1 for _ in L), *R))
    return np.reshape(z, (*B, *L, *R)), batch + left + right
