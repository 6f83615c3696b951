"""What errors say: the op, what was given, and what to write instead."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

INSTEAD: dict[Callable, str] = {            # numpy function without an op -> the same in ops, for x (and y)
    np.positive: "x",
    np.log2: "np.log(x) / np.log(2)",
    np.log10: "np.log(x) / np.log(10)",
    np.exp2: "2 ** x",
    np.cbrt: "np.sign(x) * np.abs(x) ** (1 / 3)",
    np.float_power: "x ** y",
    np.hypot: "np.sqrt(x * x + y * y)",
    np.logaddexp: "minitensor.logsumexp(np.stack([x, y]), axis=0)",
    np.fmax: "np.maximum(x, y)",
    np.fmin: "np.minimum(x, y)",
    np.tan: "np.sin(x) / np.cos(x)",
    np.sinh: "(np.exp(x) - np.exp(-x)) / 2",
    np.cosh: "(np.exp(x) + np.exp(-x)) / 2",
    np.arctanh: "(np.log1p(x) - np.log1p(-x)) / 2",
    np.arcsinh: "np.log(x + np.sqrt(x * x + 1))",
    np.linalg.norm: "np.sqrt(np.sum(x * x, axis=axis))",
    np.average: "np.sum(weights * x, axis=axis) / np.sum(weights)",
    np.ptp: "np.max(x) - np.min(x)",
    np.diff: "x[..., 1:] - x[..., :-1]",
    np.trace: "np.einsum('ii', x)",
    np.diagonal: "np.einsum('ii->i', x)",
    np.inner: "np.matmul(x, np.transpose(y))",
    np.vdot: "np.sum(x * y)",
    np.kron: "np.reshape(np.einsum('ij,kl->ikjl', x, y), (len(x) * len(y), -1))",
    np.vstack: "np.concatenate([np.reshape(x, (-1, x.shape[-1])), np.reshape(y, (-1, y.shape[-1]))])",
    np.hstack: "np.concatenate([x, y], axis=min(1, x.ndim - 1))",
    np.append: "np.concatenate([x, y], axis=None)",
    np.roll: "np.reshape(np.concatenate([np.ravel(x)[-shift:], np.ravel(x)[:-shift]]), x.shape)",
    np.take: "np.ravel(x)[i]",
}
CALLED = {"select": "where", "limit": "clip", "join": "concatenate"}    # op -> what a user calls, to get it


def no_op(function: Callable, name: str) -> TypeError:
    """A numpy function that was given a Tensor and has no op."""
    instead = f"write {INSTEAD[function]}" if function in INSTEAD else \
        "use t.numpy() to compute outside the graph, or write it with minitensor.op"
    return TypeError(f"{name} has no op that can be differentiated; {instead}")


def is_named(error: Exception) -> bool:
    """Whether an error says which op it comes from, or is of a kind that only its maker knows how to make."""
    if type(error) not in (ValueError, IndexError, np.exceptions.AxisError):
        return True
    return bool(re.match(r"\w+: ", str(error))) and type(error) is not np.exceptions.AxisError


def named(name: str, inputs: Sequence, error: Exception) -> Exception:
    """numpy's error, with the name of what the user called and the shapes of its inputs."""
    name = CALLED.get(name, name)
    shapes = [x.shape for x in inputs if hasattr(x, "shape")]
    if "broadcast together" in str(error) and len(shapes) > 1:
        return ValueError(f"{name}: shapes {listed(shapes)} do not broadcast; from the right, lengths must "
                          "agree or be 1, and x[:, None] has a new axis of length 1")
    inputs_are = "the input is" if len(shapes) == 1 else "the inputs are"
    return type(error)(f"{name}: {error}; {inputs_are} {listed(shapes)}")


def out_of_range(shape: tuple[int, ...], error: IndexError) -> IndexError:
    """numpy's error for an index that is too large or too small, with what would fit."""
    found = re.search(r"index (-?\d+) is out of bounds for axis (\d+) with size (\d+)", str(error))
    if not found:
        return IndexError(f"getitem: {error}; x is {shape}")
    index, axis, size = map(int, found.groups())
    allowed = f"it must be in {-size} to {size - 1}" if size else "there is no element to take"
    return IndexError(f"getitem: index {index} is out of range for axis {axis} of x, which is {shape}; "
                      f"{allowed}")


def stale(name: str, shape: tuple[int, ...], which: str) -> RuntimeError:
    """A tensor whose values were changed after an op had used them."""
    return RuntimeError(f"backward: the {which} of op '{name}', of shape {shape}, was changed through .data "
                        "after the op had run, so its gradient may be wrong; change it before the forward "
                        "pass or after backward(), or build a new Tensor")


def require_fit(owner: object, state: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray],
                optional: bool = False) -> None:
    """ValueError that lists how a state_dict's arrays differ from owner's; optional: some may be missing."""
    problems = [f"missing {name!r}" for name in own if name not in state and not optional]
    problems += [f"unexpected {name!r}" for name in state if name not in own]
    for name in own.keys() & state.keys():
        given, array = state[name], own[name]
        if given.shape != array.shape or given.dtype != array.dtype:
            problems.append(f"{name!r} is {given.dtype} {given.shape}, "
                            f"it must be {array.dtype} {array.shape}")
    if problems:
        raise ValueError(f"load_state_dict: {type(owner).__name__} does not fit: "
                         f"{'; '.join(sorted(problems))}")


def listed(shapes: Sequence[tuple[int, ...]]) -> str:
    """(2,), (3,) and (4,)."""
    return ", ".join(map(str, shapes[:-1])) + " and " * (len(shapes) > 1) + str(shapes[-1]) if shapes else ""
