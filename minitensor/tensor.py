"""The engine: a Tensor, the decorator that records an op, and the walk back.

An op is one function written in array language: it returns its value and its vjp (vector-Jacobian product),
which pulls a gradient of the value back to the inputs. Run on ndarrays the body is fast; under
`create_graph=True` the walk runs the same body on Tensors, so that the gradient is itself a graph and can be
differentiated again.
"""
from __future__ import annotations

import contextlib
import functools
import heapq
import inspect
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CodeType
from typing import Any

import numpy as np

import kernels
from minitensor import explain

NUMPY: dict[Callable, Callable] = {}        # numpy function -> the op that answers for it
_np: Any = np                               # numpy as a Tensor meets it: its functions return Tensors
_serial = itertools.count()                 # one clock for all: of nodes, and of changes to .data
_last_change = 0
SHARED = 1 << 16                            # elements whose sum is worth a second thread
LONG = 1 << 8                               # and of what is added over and over, or summed down to


class _State(threading.local):
    """What a thread is doing: recording a graph, replacing fused ops by their references, being watched."""
    recording = True
    unfused = False
    modules: tuple = ()                     # the modules being called: (weak reference, those outside it)
    observers: tuple = ()                   # each gets forward(...) of an op, backward(...) of its vjps and
                                            # added(...) of gradients that meet


_state = _State()


@contextlib.contextmanager
def _set(**flags: Any) -> Iterator[None]:
    before = {name: getattr(_state, name) for name in flags}
    _state.__dict__.update(flags)
    try:
        yield
    finally:
        _state.__dict__.update(before)


def no_grad() -> contextlib.AbstractContextManager[None]:
    """Record nothing: `with no_grad():`. Tensors made inside do not require a gradient.

    >>> x = Tensor(2.0, requires_grad=True)
    >>> with no_grad():
    ...     print((x * x).requires_grad)
    False
    """
    return _set(recording=False)


def unfused() -> contextlib.AbstractContextManager[None]:
    """Run every fused op as its reference, composed of primitive ops: slower, and each step can be seen.

    >>> import minitensor as mt
    >>> x = Tensor([0.0, 1.0], requires_grad=True)
    >>> mt.softmax(x).node.op.__name__
    'softmax'
    >>> with unfused():
    ...     mt.softmax(x).node.op.__name__
    'divide'
    """
    return _set(unfused=True)


class Node:
    """One recorded application of an op; the graph is these, reached through the inputs."""
    __slots__ = ("__weakref__", "code", "inputs", "instruction", "modules", "op", "options", "serial", "vjp")

    def __init__(self, op: Callable, inputs: tuple, options: dict, vjp: Any):
        self.op, self.inputs, self.options, self.vjp, self.serial = op, inputs, options, vjp, next(_serial)
        self.code, self.instruction = _caller(2)             # the user's line, for `trace` and `detect_nan`
        self.modules = _state.modules


def _caller(depth: int) -> tuple[CodeType, int]:
    """The code outside this package and numpy that is running, and the offset of its instruction."""
    frame = sys._getframe(depth)
    while _inside(frame.f_code.co_filename) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


@functools.cache
def _inside(filename: str) -> bool:
    return filename.startswith((os.path.dirname(__file__) + os.sep, os.path.dirname(np.__file__) + os.sep))


class Tensor:
    """An array of float32 or float64 that remembers which op made it.

    data: a float32 or float64 ndarray is shared, not copied; Python numbers, lists, integers and booleans
    become float32. requires_grad: gradients are to be accumulated in `.grad`. Raises TypeError for any other
    dtype.

    >>> x = Tensor([1.0, 2.0], requires_grad=True)
    >>> np.square(x) + 1                                    # numpy's functions and operators are recorded
    Tensor([2., 5.], op=add)
    """
    __slots__ = ("__weakref__", "_changed", "_data", "grad", "node", "requires_grad")

    def __init__(self, data: Any, requires_grad: bool = False, dtype: Any = None):
        if isinstance(data, Tensor):
            raise TypeError("Tensor: data is already a Tensor; "
                            "use t.detach() to share its values outside the graph")
        array = np.asarray(data)
        if dtype is None:
            given_as_array = isinstance(data, (np.ndarray, np.generic)) and array.dtype.kind == "f"
            dtype = array.dtype if given_as_array or array.dtype.kind not in "fiub" else np.float32
        if np.dtype(dtype) not in (np.float32, np.float64):
            raise TypeError(f"Tensor: dtype is {np.dtype(dtype)}; a Tensor holds float32 or float64 "
                            "(indices and masks stay plain arrays)")
        self._data: np.ndarray = array.astype(dtype, copy=False)
        self._changed = 0
        self.requires_grad = requires_grad
        self.grad: Tensor | None = None
        self.node: Node | None = None

    # ---- what it is ----------------------------------------------------------------------------------------
    shape = property(lambda self: self._data.shape, doc="The length of each axis.")
    ndim = property(lambda self: self._data.ndim, doc="The number of axes.")
    size = property(lambda self: self._data.size, doc="The number of elements.")
    dtype = property(lambda self: self._data.dtype, doc="float32 or float64.")

    @property
    def data(self) -> np.ndarray:
        """The values, outside the graph. After `t.data = ...` or `t.data += ...` a walk back over an op that
        used the old values raises; after `t.data[i] = ...` nobody notices, and its gradients are wrong.
        """
        return self._data

    @data.setter
    def data(self, array: np.ndarray) -> None:
        given_as_array = isinstance(array, (np.ndarray, np.generic))
        self._data = Tensor(array, dtype=None if given_as_array else self.dtype)._data
        if self.grad is not None and (self.grad.shape, self.grad.dtype) != (self.shape, self.dtype):
            self.grad = None                                 # it was of another array
        note_change([self])

    @property
    def T(self) -> Tensor:
        """All axes in reverse order."""
        return _np.transpose(self)

    def numpy(self) -> np.ndarray:
        """The values as an ndarray, outside the graph; memory is shared."""
        return self._data

    def item(self) -> float:
        """The only element, as a Python float; ValueError if there are more or none."""
        if self.size != 1:
            raise ValueError(f"item: the tensor has shape {self.shape}; "
                             "only one with a single element has an item")
        return self.data.item()

    def detach(self) -> Tensor:
        """The same values (memory is shared) as a constant: no gradient flows through.

        >>> x = Tensor(3.0, requires_grad=True)
        >>> (x * x.detach()).backward()                     # as if it were x * 3
        >>> x.grad
        Tensor(3.)
        """
        return Tensor(self.data)

    def astype(self, dtype: Any) -> Tensor:
        """A copy in float32 or float64; the gradient is converted on its way back."""
        return NUMPY[np.astype](self, dtype)

    def __repr__(self) -> str:
        values = np.array2string(self.data, separator=", ", prefix="Tensor(")
        notes = "" if self.dtype == np.float32 else ", dtype=float64"
        notes += f", op={self.node.op.__name__}" if self.node else ", requires_grad=True" * self.requires_grad
        return f"Tensor({values}{notes})"

    def _repr_html_(self) -> str:
        from minitensor.page import tensor_html
        return tensor_html(self)

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len: a tensor of no axes has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(f"bool: a tensor of shape {self.shape} is not true or false as a whole; "
                             "use np.any(t.numpy()) or np.all(t.numpy())")
        return bool(self.data)

    def __float__(self) -> float:
        return self.item()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else repr(self)

    # ---- gradients -----------------------------------------------------------------------------------------
    def backward(self, gradient: Any = None, retain_graph: bool = False, create_graph: bool = False) -> None:
        """Add d self / d leaf to `.grad` of every leaf that requires a gradient, and release the graph.

        gradient: d loss / d self, of this shape; may be left out for a scalar. retain_graph: keep the graph
        for another walk. create_graph: make the gradients themselves differentiable (and keep the graph).

        >>> x = Tensor([1.0, 2.0], requires_grad=True)
        >>> np.sum(x * x).backward()
        >>> x.grad
        Tensor([2., 4.])
        """
        _accumulate(_walk(self, gradient, (), retain_graph, create_graph), create_graph)

    # ---- numpy's own protocols -----------------------------------------------------------------------------
    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if method != "__call__" or options or ufunc not in NUMPY:
            name = ufunc.__name__ + ("" if method == "__call__" else f".{method}")
            raise explain.no_op(ufunc, f"numpy.{name}{'(' + ', '.join(options) + '=...)' if options else ''}")
        return NUMPY[ufunc](*inputs)

    def __array_function__(self, function: Callable, types: Any, args: Any, options: Any) -> Any:
        if function not in NUMPY:
            raise explain.no_op(function, f"{function.__module__}.{function.__name__}")
        return NUMPY[function](*args, **options)

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        raise TypeError("a Tensor does not turn into an array by itself, as the gradient would be lost; "
                        "use t.numpy() for its values")

    # ---- operators and methods: numpy's, by numpy's functions ----------------------------------------------
    __hash__ = object.__hash__

    def __eq__(self, y: Any) -> bool:
        if isinstance(y, (int, float, np.ndarray, np.generic)):
            raise TypeError(f"==: a Tensor is equal to itself alone, not to a {type(y).__name__}; "
                            "np.equal(t, y) compares the elements")
        return self is y

    def __ne__(self, y: Any) -> bool:
        return not self == y

    def __lt__(self, y: Any) -> np.ndarray: return _np.less(self, y)
    def __le__(self, y: Any) -> np.ndarray: return _np.less_equal(self, y)
    def __gt__(self, y: Any) -> np.ndarray: return _np.greater(self, y)
    def __ge__(self, y: Any) -> np.ndarray: return _np.greater_equal(self, y)
    def __neg__(self) -> Tensor: return _np.negative(self)
    def __abs__(self) -> Tensor: return _np.abs(self)
    def __add__(self, y: Any) -> Tensor: return _np.add(self, y)
    def __radd__(self, y: Any) -> Tensor: return _np.add(y, self)
    def __sub__(self, y: Any) -> Tensor: return _np.subtract(self, y)
    def __rsub__(self, y: Any) -> Tensor: return _np.subtract(y, self)
    def __mul__(self, y: Any) -> Tensor: return _np.multiply(self, y)
    def __rmul__(self, y: Any) -> Tensor: return _np.multiply(y, self)
    def __truediv__(self, y: Any) -> Tensor: return _np.divide(self, y)
    def __rtruediv__(self, y: Any) -> Tensor: return _np.divide(y, self)
    def __pow__(self, y: Any) -> Tensor: return _np.power(self, y)
    def __rpow__(self, y: Any) -> Tensor: return _np.power(y, self)
    def __matmul__(self, y: Any) -> Tensor: return _np.matmul(self, y)
    def __rmatmul__(self, y: Any) -> Tensor: return _np.matmul(y, self)
    def __getitem__(self, index: Any) -> Tensor: return NUMPY[getitem](self, index=index)
    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("a Tensor cannot be assigned into, as a graph may need the old values; build a new "
                        "one with np.where or np.concatenate, or write t.data[...] = ... where no graph "
                        "needs them")

    def sum(self, axis=None, keepdims=False) -> Tensor: return _np.sum(self, axis=axis, keepdims=keepdims)
    def mean(self, axis=None, keepdims=False) -> Tensor: return _np.mean(self, axis=axis, keepdims=keepdims)
    def var(self, axis=None, keepdims=False) -> Tensor: return _np.var(self, axis=axis, keepdims=keepdims)
    def std(self, axis=None, keepdims=False) -> Tensor: return _np.std(self, axis=axis, keepdims=keepdims)
    def max(self, axis=None, keepdims=False) -> Tensor: return _np.max(self, axis=axis, keepdims=keepdims)
    def min(self, axis=None, keepdims=False) -> Tensor: return _np.min(self, axis=axis, keepdims=keepdims)
    def prod(self, axis=None, keepdims=False) -> Tensor: return _np.prod(self, axis=axis, keepdims=keepdims)
    def cumsum(self, axis=None) -> Tensor: return _np.cumsum(self, axis=axis)
    def argmax(self, axis=None) -> np.ndarray: return np.argmax(self.data, axis=axis)
    def argmin(self, axis=None) -> np.ndarray: return np.argmin(self.data, axis=axis)
    def reshape(self, *shape) -> Tensor: return _np.reshape(self, shape[0] if len(shape) == 1 else shape)
    def ravel(self) -> Tensor: return _np.reshape(self, -1)
    def transpose(self, *axes) -> Tensor:
        return _np.transpose(self, axes[0] if len(axes) == 1 else axes or None)
    def swapaxes(self, a: int, b: int) -> Tensor: return _np.swapaxes(self, a, b)
    def squeeze(self, axis=None) -> Tensor: return _np.squeeze(self, axis=axis)
    def repeat(self, repeats, axis=None) -> Tensor: return _np.repeat(self, repeats, axis=axis)
    def clip(self, min=None, max=None) -> Tensor: return _np.clip(self, min, max)
    def copy(self) -> Tensor: return _np.copy(self)


def getitem(x: Any, index: Any) -> Any:
    """`x[index]` under a name, so that an op can answer for it."""
    return x[index]


def implements(*numpy_functions: Callable) -> Callable:
    """Let a function composed of ops answer for numpy's where a Tensor is among the arguments."""
    def register(function: Callable) -> Callable:
        NUMPY.update(dict.fromkeys(numpy_functions, function))
        return function
    return register


def op(*numpy_functions: Callable, reference: Callable | None = None) -> Callable:
    """Make a recorded op of a body `(*inputs, **options) -> value, vjp`.

    The body is written in array language, so that it runs on ndarrays and on Tensors. vjp is one function of
    the gradient for each input, as a tuple (only those that somebody needs are called; a bare function for a
    single input), or one function that returns the gradients of all inputs as a tuple. A gradient may have
    the shape that broadcasting gave its input: the walk sums it down. The op answers for `numpy_functions`,
    and called with no Tensor at all it is a plain function of arrays.

    reference: for a fused op, the same function composed of primitive ops. It runs under `unfused()` and
    under `create_graph=True`; the body then need not be polymorphic, and hands back gradients in arrays of
    its own making. In the place of a gradient that is mostly zeros it may hand back a function that adds it
    to a C-contiguous array of the input's shape, in place, or makes one if it is given None.

    >>> @op(np.arctan)
    ... def arctan(x):
    ...     return np.arctan(x), lambda g: g / (1 + x * x)
    >>> x = Tensor([0.0, 1.0], requires_grad=True)
    >>> dx, = grad(np.sum(np.arctan(x)), x, create_graph=True)
    >>> dx.numpy()
    array([1. , 0.5], dtype=float32)
    >>> grad(np.sum(dx), x)                                 # -2 x / (1 + x^2)^2
    (Tensor([-0. , -0.5]),)
    >>> del NUMPY[np.arctan]                                # so that numpy's name is free again
    """
    elementwise = any(isinstance(f, np.ufunc) for f in numpy_functions)
    if any(inspect.isfunction(f) and f is not getitem for f in numpy_functions):
        raise TypeError(f"op: '{numpy_functions[0].__name__}' is not a function of numpy's; "
                        "write the decorator with parentheses, as in @op()")

    def decorate(body: Callable) -> Callable:
        if not inspect.isfunction(body):
            raise TypeError(f"op: a {type(body).__name__} is not a function; an op's decorator is written "
                            "with parentheses, as in @op()")
        name = body.__name__.lstrip("_")
        signature = inspect.signature(body)

        @functools.wraps(body)
        def recorded(*inputs: Any, **options: Any) -> Any:
            if options and any(isinstance(x, Tensor) for x in options.values()):
                bound = signature.bind(*inputs, **options)
                inputs, options = bound.args, bound.kwargs
            dtype = _common_dtype(name, inputs)
            if dtype is None:
                return body(*inputs, **options)[0]
            if reference is not None and _state.unfused:
                return reference(*inputs, **options)
            if elementwise:
                inputs = tuple([x if type(x) in (Tensor, float, int) else _weak(name, x, dtype)
                                for x in inputs])
            elif reference is not None:
                inputs = tuple([_listed(x, dtype) if isinstance(x, (list, tuple)) else x for x in inputs])
            try:
                returned = body(*[x._data if isinstance(x, Tensor) else x for x in inputs], **options)
            except (ValueError, IndexError) as error:
                if explain.is_named(error):
                    raise
                raise explain.named(name, inputs, error) from error
            if type(returned) is not tuple or len(returned) != 2 or not (
                    type(returned[1]) is tuple or callable(returned[1])):
                raise TypeError(f"{name}: an op returns its value and its vjp, as in "
                                "'return x * x, lambda g: g * (2 * x)'")
            value, vjp = returned
            result = Tensor.__new__(Tensor)
            result._data = value if type(value) is np.ndarray else np.asarray(value)
            if result._data.dtype.kind != "f":
                raise TypeError(f"{name}: the value is an array of {result._data.dtype}; an op gives float32 "
                                "or float64")
            result._changed, result.grad, result.node = 0, None, None
            result.requires_grad = _state.recording and _needs_gradient(inputs)
            if result.requires_grad:
                result.node = Node(recorded, inputs, options, vjp)
            for observer in _state.observers:
                observer.forward(recorded, inputs, result)
            return result

        recorded.__name__ = name
        recorded.body, recorded.reference = body, reference      # type: ignore[attr-defined]
        return implements(*numpy_functions)(recorded)
    return decorate


def fused(*body: Callable, reference: Callable | None = None) -> Callable:
    """Make an op of a body that is one kernel forward and one backward; reference: see `op`.

    >>> @fused(reference=lambda x: np.exp(x) - 1)
    ... def exp_minus_one(x):                               # numpy has a kernel for it
    ...     y = np.expm1(x)
    ...     return y, lambda g: g * (y + 1)
    >>> exp_minus_one(Tensor(0.0, requires_grad=True))
    Tensor(0., op=exp_minus_one)
    """
    if body:
        raise TypeError("fused: write the decorator with parentheses, and with the body's reference, "
                        "as in @fused(reference=f)")
    if not callable(reference):
        raise TypeError("fused: a fused op names its reference, a function of primitive ops; "
                        f"got {reference!r}")
    return op(reference=reference)


def grad(output: Tensor, inputs: Tensor | Sequence[Tensor], gradient: Any = None,
         retain_graph: bool = False, create_graph: bool = False) -> tuple[Tensor, ...]:
    """d output / d input for each of the inputs, as Tensors of their shapes; `.grad` is left alone.

    inputs: leaves or tensors on the way. gradient: d loss / d output; may be left out for a scalar output.
    retain_graph: keep the graph for another walk. create_graph: make the results differentiable again (keeps
    the graph). An input that output does not depend on gets zeros.

    >>> x = Tensor(2.0, requires_grad=True)
    >>> dx, = grad(x ** 3, x, create_graph=True)            # 3 x^2
    >>> grad(dx, x)                                         # 6 x
    (Tensor(12.),)
    """
    xs: tuple = (inputs,) if isinstance(inputs, (Tensor, np.ndarray)) else tuple(inputs)
    for x in (output, *xs):
        if not isinstance(x, Tensor):
            raise TypeError(f"grad: output and inputs are Tensors, and one of them is a {type(x).__name__}")
    for x in xs:
        if not x.requires_grad:
            raise ValueError(f"grad: an input of shape {x.shape} has requires_grad=False, "
                             "so nothing was recorded of it")
    found = {}
    if output.requires_grad:
        found = {id(x): g for x, g, _ in _walk(output, gradient, xs, retain_graph, create_graph)}
    results = (found.get(id(x), np.zeros_like(x.data)) for x in xs)
    return tuple(g if isinstance(g, Tensor) else Tensor(np.array(g)) for g in results)


def note_change(tensors: Iterable[Tensor]) -> None:
    """Their arrays were written into: a walk back over an op that used the old values is to notice."""
    global _last_change
    _last_change = change = next(_serial)
    for tensor in tensors:
        tensor._changed = change


def add_arrays(x: np.ndarray, y: np.ndarray, out: np.ndarray) -> np.ndarray:
    """out = x + y, y of the shape of x's last axes; by a kernel, on all threads, where there is something to
    share (and arrays are writeable, as kernels are compiled for those).
    """
    if (x.size >= SHARED and y.size >= LONG and x.shape[x.ndim - y.ndim:] == y.shape and x.dtype == y.dtype
            and x.flags.carray and y.flags.carray):
        return kernels.add(x, y, out)
    return np.add(x, y, out=out)


def _walk(output: Tensor, gradient: Any, wanted: Sequence[Tensor], retain_graph: bool,
          create_graph: bool) -> list[tuple[Tensor, Any, bool]]:
    """Pull the gradient of output back: (tensor, gradient, owned) for every leaf and every wanted tensor.

    Nodes are visited in descending order of their serial numbers, so a node has all of its gradient when its
    turn comes. Nothing is written into an array unless it is owned: made by the walk itself, or by a fused
    op's kernel.
    """
    if not output.requires_grad:
        raise ValueError("backward: the tensor does not depend on any tensor with requires_grad=True")
    wanted_ids = {id(x) for x in wanted}
    heap: list[tuple[int, int]] = []
    pending: dict[int, tuple[Tensor, Any, bool]] = {}
    found = []

    def send(x: Tensor, g: Any, owned: bool) -> None:
        if id(x) in pending:
            _, before, owned_before = pending[id(x)]
            for observer in _state.observers:
                observer.added(x, before, g)
            if owned_before and not create_graph and isinstance(before, np.ndarray):    # not a numpy scalar
                g = add_arrays(before, g, before)
            elif owned and not create_graph and isinstance(g, np.ndarray):
                g = add_arrays(before, g, g)
            else:
                g = before + g
            owned = True
        elif x.node is not None:
            heapq.heappush(heap, (-x.node.serial, id(x)))
        pending[id(x)] = (x, g, owned)

    with _set(recording=create_graph):
        g = _seed(output, gradient)
        send(output, g if create_graph else g._data.copy(), False)       # the caller may write into theirs
        while heap:
            x, g, owned = pending.pop(heapq.heappop(heap)[1])
            if id(x) in wanted_ids:
                found.append((x, g, owned))
            node = x.node
            assert node is not None
            if node.vjp is None:
                raise RuntimeError(f"backward: the graph below op '{node.op.__name__}' was released "
                                   "by an earlier backward(); pass retain_graph=True to the first one "
                                   "to walk it twice")
            inputs, vjp, reference = node.inputs, node.vjp, node.op.reference   # type: ignore[attr-defined]
            for t in (x, *inputs) if _last_change > node.serial else ():
                if isinstance(t, Tensor) and t._changed > node.serial:
                    raise explain.stale(node.op.__name__, t.shape, "value" if t is x else "input")
            if create_graph and reference is not None:
                with unfused():
                    send(reference(*inputs, **node.options), g, False)
                continue
            if create_graph:
                vjp = node.op.body(*inputs, **node.options)[1]                  # type: ignore[attr-defined]
            elif not retain_graph:
                node.inputs, node.vjp = (), None
            if isinstance(vjp, tuple):
                gradients: tuple = tuple([f(g) if isinstance(x, Tensor) and x.requires_grad else None
                                          for f, x in zip(vjp, inputs, strict=False)])
            else:
                gradients = vjp(g)
                gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            for position, x in enumerate(inputs):
                if isinstance(x, Tensor) and x.requires_grad:
                    gx = gradients[position] if position < len(gradients) else None
                    if reference is not None and callable(gx):
                        _, before, owned_before = pending.get(id(x), (x, None, False))
                        if owned_before and before.flags.carray:               # not a numpy scalar
                            alone = gx(None) if _state.observers else None
                            for observer in _state.observers:
                                observer.backward(node, inputs, g, position, alone)
                                observer.added(x, before, alone)
                            gx(before)
                            continue
                        gx = gx(None)
                    given, gx = gx, _fitting(gx, x, node, position)
                    for observer in _state.observers:
                        observer.backward(node, inputs, g, position, gx)
                    send(x, gx, reference is not None or gx is not given)
    found.extend(entry for entry in pending.values())
    return found


def _fitting(gx: Any, x: Tensor, node: Node, position: int) -> Any:
    """What a vjp gave for input x, summed down to its shape; TypeError or ValueError unless it fits."""
    name = node.op.__name__
    if not isinstance(gx, (Tensor, np.ndarray, np.generic)):
        raise TypeError(f"backward: the vjp of '{name}' gave {_kind(gx)} for argument {position}, "
                        "which requires a gradient; give an array")
    wanted = x._data
    if gx.shape != wanted.shape:
        gx = _unbroadcast(gx, wanted.shape, name)
    if gx.dtype != wanted.dtype:
        raise TypeError(f"backward: the vjp of '{name}' gave a {gx.dtype} gradient for a {wanted.dtype} "
                        "input; keep Python scalars as they are, and convert constant arrays")
    return gx


def _accumulate(found: list[tuple[Tensor, Any, bool]], create_graph: bool) -> None:
    """Add what a walk found to the leaves' `.grad`."""
    for leaf, g, owned in found:
        for observer in _state.observers if leaf.grad is not None else ():
            observer.added(leaf, leaf.grad, g)
        if leaf.grad is None:
            leaf.grad = _np.copy(g) if create_graph else Tensor(g if owned else np.array(g))
        elif create_graph or leaf.grad.node is not None:
            leaf.grad = leaf.grad + g
        else:
            add_arrays(leaf.grad._data, g, leaf.grad._data)


def _seed(output: Tensor, gradient: Any) -> Tensor:
    if gradient is None:
        if output.size != 1:
            raise ValueError(f"backward: the tensor has shape {output.shape}, and only a scalar's gradient "
                             "can be left out; reduce it first, as in t.sum(), "
                             f"or pass gradient= of shape {output.shape}")
        return Tensor(np.ones_like(output.data))
    gradient = gradient if isinstance(gradient, Tensor) else Tensor(np.asarray(gradient, dtype=output.dtype))
    if gradient.shape != output.shape or gradient.dtype != output.dtype:
        raise ValueError(f"backward: gradient is {gradient.dtype} of shape {gradient.shape}; the tensor is "
                         f"{output.dtype} of shape {output.shape}, and the two must be alike")
    return gradient


def _kind(g: Any) -> str:
    return "nothing" if g is None else f"a {type(g).__name__}"


def _unbroadcast(g: Any, shape: tuple[int, ...], name: str) -> Any:
    """Sum g down to shape: the adjoint of broadcasting."""
    extra = g.ndim - len(shape)
    axes = tuple(i for i in range(g.ndim) if i < extra or (shape[i - extra] == 1 and g.shape[i] != 1))
    kept = tuple(1 if i in axes else n for i, n in enumerate(g.shape))[max(extra, 0):]
    if extra < 0 or kept != shape:
        raise ValueError(f"backward: the vjp of '{name}' gave a gradient of shape {g.shape} "
                         f"for an input of shape {shape}")
    size = math.prod(shape)
    if (isinstance(g, np.ndarray) and len(axes) == extra and g.size >= SHARED and size >= LONG
            and g.flags.carray):
        return kernels.column_sum(g.reshape(-1, size)).reshape(shape)
    return np.reshape(np.sum(g, axis=axes), shape)


def _common_dtype(name: str, inputs: tuple) -> np.dtype | None:
    """The dtype of the Tensors among inputs (None if there is no Tensor); TypeError if floats are mixed."""
    for x in inputs:
        if isinstance(x, Tensor):
            dtype = x._data.dtype
            break
    else:
        return None
    for position, x in enumerate(inputs):
        array = x._data if isinstance(x, Tensor) else x
        if isinstance(array, np.ndarray) and array.dtype != dtype and array.dtype.kind == "f":
            raise TypeError(f"{name}: float32 and float64 are mixed: argument {position} is {array.dtype}, "
                            f"another is {dtype}; convert one with .astype(np.{dtype})")
    return dtype


def _needs_gradient(inputs: tuple) -> bool:
    for x in inputs:                                         # (a generator would take three times as long)
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def _listed(x: Any, dtype: np.dtype) -> np.ndarray:
    """A list as an array, of the Tensors' dtype unless it holds integers or booleans."""
    array = np.asarray(x)
    return array.astype(dtype) if array.dtype.kind == "f" else array


def _weak(name: str, x: Any, dtype: np.dtype) -> Any:
    """An operand that is not a Tensor takes the Tensor's dtype, as a Python scalar does."""
    array = np.asarray(x)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: a {type(x).__name__} of dtype {array.dtype} cannot be combined "
                        f"with a {dtype} Tensor; give numbers")
    return float(array) if array.ndim == 0 else array.astype(dtype, copy=False)
