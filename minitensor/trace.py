"""A backward pass, watched: `trace(loss)` is `loss.backward()` that remembers every step.

>>> import minitensor as mt
>>> a, b = mt.Tensor(2.0, requires_grad=True), mt.Tensor(3.0, requires_grad=True)
>>> steps = mt.trace(a * b + a)
>>> [(step.op, step.name) for step in steps]
[('add', ''), ('multiply', ''), ('leaf', 'a'), ('leaf', 'b')]
>>> steps[2].gradient.mean, [received.step for received in steps[2].received]    # from the sum, the product
(4.0, [0, 1])

`print(steps)` is a table and `steps.to_html("backward.html")` a page to step through.
"""
from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import itertools
import linecache
import math
import os
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import numpy as np

from minitensor.tensor import Node, Tensor, _accumulate, _set, _state, _walk

SAMPLE = 32                                  # rows and columns of an array that a trace keeps


class Summary(NamedTuple):
    """Statistics of an array, of its finite elements, and a sample: a matrix of at most 32 x 32 of them.

    The sample is of the last two axes, at the first index of all others; of a longer axis it holds elements
    at even distances.
    """
    shape: tuple[int, ...]
    dtype: str
    min: float
    max: float
    mean: float
    std: float
    zeros: float                             # the share of elements that are 0
    nonfinite: int                           # how many elements are infinite or NaN
    sample: np.ndarray


class Flow(NamedTuple):
    """A gradient that one step sent to another."""
    step: int                                # the step at the other end
    argument: int                            # the input of the sender's op that it belongs to
    gradient: Summary


class Step(NamedTuple):
    """One step back: the op whose vjp ran, or the leaf (op "leaf") that got its gradient."""
    op: str
    name: str                                # the variable, or the path of the parameter
    module: str                              # the path of the module that called it
    file: str
    line: int
    code: str                                # the user's expression
    options: str
    constants: dict[int, str]                # inputs that need no gradient, by argument
    shape: tuple[int, ...]
    dtype: str
    value: Summary
    gradient: Summary
    received: list[Flow]                     # their sum is the gradient
    sent: list[Flow]
    source: str                              # of the op and its vjp; of its reference too, if it is fused
    vjp_lines: list[int]                     # the lines of source that belong to the vjp


class Trace:
    """The steps of a backward pass in the order in which they ran; the leaves come last."""

    def __init__(self, steps: list[Step]):
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Step:
        return self.steps[index]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __repr__(self) -> str:
        """A table of at most 110 columns: mean ± standard deviation, or the number if there is only one."""
        head = ("step", "op", "where", "module", "shape", "value", "gradient", "sent to")
        rows = [(str(i), step.op, f"{os.path.basename(step.file)}:{step.line}" if step.file else "",
                 step.module if step.op != "leaf" else step.name,
                 str(step.shape), _spread(step.value), _spread(step.gradient),
                 ", ".join(str(flow.step) for flow in step.sent)) for i, step in enumerate(self)]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        while sum(widths) > 110 - 2 * (len(widths) - 1):
            widest = max((1, 2, 3, 4, 7), key=lambda i: widths[i])       # names give way, numbers do not
            widths[widest] -= 1
        lines = ["  ".join(_fit(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True))
                 for row in (head, *rows)]
        note = ["* and numbers that are not finite"] * any("*" in line for line in lines)
        return "\n".join(line.rstrip() for line in (*lines, *note))

    def to_html(self, path: str | os.PathLike) -> None:
        """Write a page that needs nothing else: the graph, and every step's arrays, gradients and code."""
        from minitensor.page import trace_html
        Path(path).write_text(trace_html(self), encoding="utf-8")

    def _repr_html_(self) -> str:
        from minitensor.page import frame_html
        return frame_html(self)


def trace(loss: Tensor, gradient: Any = None, retain_graph: bool = False) -> Trace:
    """Do what `loss.backward(gradient, retain_graph)` does, and return each step of it.

    The leaves' `.grad` grow and the graph is released as by `backward`, so `trace(loss)` can stand in its
    place. Nothing has to be set up before the forward pass.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"trace: loss is a {type(loss).__name__}; it must be a Tensor that ops have made")
    frame = sys._getframe(1)
    variables = {id(x): name for name, x in {**frame.f_globals, **frame.f_locals}.items()
                 if isinstance(x, Tensor) and not name.startswith("_")}
    tensors = _in_order(loss)
    nodes = [x.node for x in tensors if x.node is not None]
    inputs, vjps = [node.inputs for node in nodes], [node.vjp for node in nodes]
    recorder = _Recorder(tensors, nodes)
    with _set(observers=(*_state.observers, recorder)):
        found = _walk(loss, gradient, (), retain_graph, False)
    for leaf, g, _ in found:
        recorder.arrived(leaf, g)
    _accumulate(found, False)

    names = _Names()
    steps = []
    for i, (x, node) in enumerate(zip(tensors, [*nodes, *[None] * len(found)], strict=True)):
        value, flows = summary(x.data), recorder.flows[i]
        if node is None:
            steps.append(Step("leaf", names.tensors.get(id(x)) or variables.get(id(x), ""), "", "", 0, "", "",
                              {}, x.shape, str(x.dtype), value, recorder.gradients[i], *flows, "", []))
            continue
        steps.append(Step(node.op.__name__, variables.get(id(x), ""), names.module(node.modules),
                          *place(node.code, node.instruction), _options(node.options),
                          {j: _constant(y) for j, y in enumerate(inputs[i])
                           if not (isinstance(y, Tensor) and y.requires_grad)},
                          x.shape, str(x.dtype), value, recorder.gradients[i], *flows,
                          *_source(node.op, vjps[i])))
    return Trace(steps)


def _in_order(loss: Tensor) -> list[Tensor]:
    """What the walk back from loss reaches, in its order: results of ops by falling serial, then leaves."""
    reached, waiting = {id(loss): loss}, [loss]
    while waiting:
        for x in _differentiable(waiting.pop()):
            if id(x) not in reached:
                reached[id(x)] = x
                waiting.append(x)
    results = [x for _, x in sorted(((-x.node.serial, x) for x in reached.values() if x.node),
                                    key=lambda pair: pair[0])]
    leaves = {id(x): x for result in results for x in _differentiable(result) if not x.node}
    return [*results, *leaves.values()] if results else [loss]


def _differentiable(x: Tensor) -> Iterator[Tensor]:
    return (y for y in (x.node.inputs if x.node else ()) if isinstance(y, Tensor) and y.requires_grad)


class _Recorder:
    """The observer: the gradient of each step, and what it received and sent."""

    def __init__(self, tensors: list[Tensor], nodes: list[Node]):
        self.step = {id(x): i for i, x in enumerate(tensors)} | {id(node): i for i, node in enumerate(nodes)}
        self.gradients: dict[int, Summary] = {}
        self.flows: list[tuple[list[Flow], list[Flow]]] = [([], []) for _ in tensors]    # received, sent

    def arrived(self, what: Tensor | Node, g: Any) -> None:
        """All of its gradient, g, is there."""
        i = self.step[id(what)]
        if i not in self.gradients:
            received = self.flows[i][0]
            self.gradients[i] = received[0].gradient if len(received) == 1 else summary(g)

    def forward(self, op: Callable, inputs: tuple, result: Tensor) -> None:
        """What runs forward is no part of a trace."""

    def added(self, x: Tensor, before: Any, g: Any) -> None:
        """The sum is seen when all of it has arrived."""

    def backward(self, node: Node, inputs: tuple, g: Any, argument: int, gx: Any) -> None:
        """Keep what there is to say of gx now: the walk may add to it in place."""
        self.arrived(node, g)
        sender, receiver = self.step[id(node)], self.step[id(inputs[argument])]
        s = self.gradients[sender] if gx is g else summary(gx)
        self.flows[sender][1].append(Flow(receiver, argument, s))
        self.flows[receiver][0].append(Flow(sender, argument, s))


# ---- arrays ------------------------------------------------------------------------------------------------

def summary(array: Any) -> Summary:
    """The statistics and the sample of an array."""
    array = np.asarray(array)
    with np.errstate(all="ignore"):
        total = array.sum(dtype=np.float64)
    finite = array
    if not np.isfinite(total):
        finite = array[np.isfinite(array)]
        total = finite.sum(dtype=np.float64)
    low = high = mean = std = math.nan
    if finite.size:
        low, high, mean = float(finite.min()), float(finite.max()), float(total) / finite.size
        with np.errstate(over="ignore"):
            centred = np.ravel(finite - finite.dtype.type(mean))
            std = math.sqrt(np.vdot(centred, centred) / centred.size)
            if math.isinf(std):                              # the squares are too large for float32
                std = float(np.std(finite, dtype=np.float64))
    zeros = float(np.count_nonzero(array == 0) / max(array.size, 1))
    return Summary(array.shape, str(array.dtype), low, high, mean, std, zeros, array.size - finite.size,
                   _sample(array))


def _sample(array: np.ndarray) -> np.ndarray:
    if not array.size:
        return np.zeros((0, 0), array.dtype)
    matrix = np.atleast_2d(array[(0,) * (array.ndim - 2)])
    return matrix[np.ix_(*map(_spaced, matrix.shape))]


@functools.cache
def _spaced(n: int) -> np.ndarray:
    """At most 32 indices into n, the first and the last among them."""
    return np.arange(n) if n <= SAMPLE else np.linspace(0, n - 1, SAMPLE).round().astype(int)


def number(x: float, digits: int = 4) -> str:
    """x to so many significant digits."""
    return f"{x:.{digits}g}"


def _spread(s: Summary) -> str:
    if s.sample.size == 1 == math.prod(s.shape):
        return number(s.sample.item(), 6)
    return f"{_short(s.mean)} ± {_short(s.std)}" + " *" * (s.nonfinite > 0)


def _short(x: float) -> str:
    return f"{x:.1e}" if 0 < abs(x) < 1e-3 else number(x, 2)


def _fit(cell: str, width: int) -> str:
    return cell if len(cell) <= width else "…" + cell[len(cell) - width + 1:]        # the end tells most


# ---- names, places and source ------------------------------------------------------------------------------

class _Names:
    """The paths of modules and of their tensors, worked out once for each outermost module."""

    def __init__(self) -> None:
        self.modules: dict[int, dict[int, str]] = {}
        self.tensors: dict[int, str] = {}

    def module(self, stack: tuple) -> str:
        """The path of the innermost module of a stack that still lives; its class's name if it has none."""
        living = []
        while stack:
            reference, stack = stack
            living += [module] if (module := reference()) is not None else []
        if not living:
            return ""
        innermost, outermost = living[0], living[-1]
        if id(outermost) not in self.modules:
            named = list(outermost.named_modules())[::-1]        # the first of several paths is written last
            self.modules[id(outermost)] = {id(module): path for path, module in named}
            self.tensors.update((id(x), path) for path, x in outermost.named_tensors())
        return self.modules[id(outermost)].get(id(innermost)) or type(innermost).__name__


def module_path(stack: tuple) -> str:
    """The path of the module that was being called, such as "blocks.2.attention"."""
    return _Names().module(stack)


def place(code: CodeType, instruction: int) -> tuple[str, int, str]:
    """The file, the line and the text of the expression at an instruction."""
    return code.co_filename, *_expression(code, code.co_filename, instruction)


@functools.lru_cache(4096)
def _expression(code: CodeType, file: str, instruction: int) -> tuple[int, str]:
    """file is code's: the same code in two files is equal."""
    positions = next(itertools.islice(code.co_positions(), instruction // 2, None))
    first, last, start, end = positions
    if first is None:
        return code.co_firstlineno, ""
    source = linecache.getlines(file)
    lines = source[first - 1:last]
    if lines and (first, last, start, end) in _spans("".join(source)):        # or the file is not what ran
        lines[-1] = lines[-1].encode()[:end].decode()            # columns are counted in bytes
        lines[0] = lines[0].encode()[start:].decode()
    text = " ".join(" ".join(lines).split())
    return first, text if len(text) <= 200 else text[:199] + "…"


@functools.lru_cache(64)
def _spans(source: str) -> set[tuple]:
    """The first and last line and column of each expression and statement; none if it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return set()
    return {(x.lineno, x.end_lineno, x.col_offset, x.end_col_offset) for x in ast.walk(tree)
            if isinstance(x, (ast.expr, ast.stmt))}


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_constant(x)}" for name, x in options.items())


def _constant(x: Any) -> str:
    if isinstance(x, Tensor):
        x = x.data
    if isinstance(x, np.ndarray) and x.ndim:
        return f"{x.dtype} {x.shape}"
    if isinstance(x, slice):
        ends = ["" if end is None else str(end) for end in (x.start, x.stop, x.step)]
        return ":".join(ends[:2] if x.step is None else ends)
    if isinstance(x, (tuple, list)):
        text = ", ".join(map(_constant, x[:8])) + ", …" * (len(x) > 8)
        return f"({text})"
    return reprlib.repr(x.item() if isinstance(x, (np.ndarray, np.generic)) else x)


def _source(op: Callable, vjp: Any) -> tuple[str, list[int]]:
    """The text of the op, of what else holds its vjp, and of its reference; and the lines of the vjp."""
    vjps = [f for f in (vjp if isinstance(vjp, tuple) else (vjp,)) if inspect.isfunction(f)]
    makers = [f.__globals__.get(f.__qualname__.partition(".")[0]) for f in vjps]     # what each is inside of
    body, reference = op.body, op.reference                  # type: ignore[attr-defined]
    codes = [_code(body), *map(_code, makers), *(f.__code__ for f in vjps), _code(reference)]
    return _text(tuple(codes), tuple(code and code.co_filename for code in codes))


def _code(function: Any) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None


@functools.lru_cache(1024)
def _text(codes: tuple[CodeType | None, ...], files: tuple) -> tuple[str, list[int]]:
    """Of the codes of an op, the makers of its vjps, the vjps, and a reference; files: equal code may differ.

    Only code is remembered here: a vjp would keep its arrays alive.
    """
    op, reference, count = codes[0], codes[-1], len(codes) // 2 - 1
    text: list[str] = []
    shown: list[tuple[CodeType, int, int]] = []              # a code, how many lines it has, where in text

    def show(code: CodeType | None) -> None:
        if code is not None:
            with contextlib.suppress(OSError):               # its file cannot be read: typed, or made by exec
                lines, _ = inspect.getsourcelines(code)
                text.extend([""] * bool(text))
                shown.append((code, len(lines), len(text)))
                text.extend(line.rstrip() for line in inspect.cleandoc("\n" + "".join(lines)).splitlines())

    def lines_of(code: CodeType) -> range:
        last = max(line for *_, line in code.co_lines() if line is not None)
        for whole, n, at in shown:
            offset = code.co_firstlineno - whole.co_firstlineno
            if code.co_filename == whole.co_filename and 0 <= offset < n:
                return range(at + offset, at + last - whole.co_firstlineno + 1)
        return range(0)

    show(op)
    marked: set[int] = set()
    for maker, vjp in zip(codes[1:1 + count], codes[1 + count:-1], strict=True):
        assert vjp is not None
        if not lines_of(vjp):
            show(maker or vjp)
        marked.update(lines_of(vjp))
    show(reference)
    return "\n".join(text) or "# its source is in no file", sorted(marked)
