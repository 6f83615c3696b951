"""The NaN doctor: stop at the op that made the first number that is not finite."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import numpy as np

from minitensor.tensor import Node, Tensor, _caller, _set, _state
from minitensor.trace import module_path, number, place, summary


@contextlib.contextmanager
def detect_nan() -> Iterator[None]:
    """Raise FloatingPointError at the first op, forward or backward, that makes a non-finite number.

    Named are the op, the user's line, the module, and the statistics of the op's inputs. What was infinite or
    NaN already may pass, as the -inf of a mask does; but a NaN made of infinities, as inf - inf, is reported.
    Inside, numpy's own warnings of the same are silent.

    >>> import numpy as np, minitensor as mt
    >>> x = mt.Tensor([0.0, 1.0], requires_grad=True)
    >>> with mt.detect_nan():
    ...     np.sum(np.sqrt(x)).backward()
    Traceback (most recent call last):
    FloatingPointError: detect_nan: the vjp of 'sqrt' for argument 0 made 1 of 2 elements infinite
      at <doctest minitensor.nan.detect_nan[2]>:2: np.sqrt(x)
      gradient (2,) float32: 1 to 1, mean 1, std 0, 0 % zeros
      argument 0 (2,) float32: 0 to 1, mean 0.5, std 0.5, 50 % zeros
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"), \
            _set(observers=(*_state.observers, _Doctor())):
        yield


class _Doctor:
    """The observer: looks at every value, and at every gradient that is sent."""

    def forward(self, op: Callable, inputs: tuple, result: Tensor) -> None:
        if made := _made(result.data, inputs):
            node = result.node
            code, instruction = (node.code, node.instruction) if node else _caller(3)
            raise FloatingPointError(_report(f"op '{op.__name__}' made {made}", code, instruction,
                                             _state.modules, inputs, None))

    def added(self, x: Tensor, before: Any, g: Any) -> None:
        with np.errstate(over="ignore"):
            if made := _made(_array(before) + _array(g), (before, g)):
                where = (x.node.code, x.node.instruction, x.node.modules) if x.node else (*_caller(4), ())
                name = f"the result of op '{x.node.op.__name__}'" if x.node else f"a leaf of shape {x.shape}"
                raise FloatingPointError(_report(f"the sum of the gradients of {name} has {made}", *where,
                                                 (before, g), None))

    def backward(self, node: Node, inputs: tuple, g: Any, argument: int, gx: Any) -> None:
        if made := _made(gx, (g, *inputs)):
            raise FloatingPointError(_report(
                f"the vjp of '{node.op.__name__}' for argument {argument} made {made}", node.code,
                node.instruction, node.modules, inputs, g))


def _made(result: Any, inputs: tuple) -> str:
    """What an op made that was not there: "2 of 6 elements NaN", or nothing."""
    values = _array(result)
    if np.all(np.isfinite(values)):
        return ""
    given = [x for x in map(_array, inputs) if x.dtype.kind == "f"]
    for kind, count, there in (
            ("NaN", np.count_nonzero(np.isnan(values)), any(np.any(np.isnan(x)) for x in given)),
            ("infinite", np.count_nonzero(np.isinf(values)), not all(np.all(np.isfinite(x)) for x in given))):
        if count and not there:
            return f"{count} of {values.size} elements {kind}"
    return ""


def _array(x: Any) -> np.ndarray:
    return np.asarray(x.data if isinstance(x, Tensor) else x)


def _report(what: str, code: CodeType, instruction: int, modules: tuple, inputs: tuple, g: Any) -> str:
    file, line, text = place(code, instruction)
    module = module_path(modules)
    lines = [f"detect_nan: {what}", f"  at {os.path.relpath(file) if os.path.isfile(file) else file}:{line}"
             + f", in {module}" * bool(module) + f": {text}" * bool(text)]
    given = [] if g is None else [("gradient", _array(g))]
    given += [(f"argument {i}", _array(x)) for i, x in enumerate(inputs)]
    for name, array in given:
        if array.dtype.kind != "f":
            lines += [f"  {name} {array.shape} {array.dtype}"] * (array.dtype.kind in "iub")
            continue
        s = summary(array)
        lines.append(f"  {name} {s.shape} {s.dtype}: {number(s.min)} to {number(s.max)}, "
                     f"mean {number(s.mean)}, std {number(s.std)}, {number(100 * s.zeros, 3)} % zeros"
                     + f", {s.nonfinite} not finite" * (s.nonfinite > 0))
    return "\n".join(lines)
