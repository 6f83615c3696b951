"""Modules: functions that own their parameters, the Tensor attributes that require a gradient."""
from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minitensor import explain
from minitensor.fused import dropout, embedding, layernorm, linear
from minitensor.random import generator
from minitensor.tensor import Tensor, _state, note_change


class Module:
    """Tensors and modules as attributes or in lists, tuples and dicts, and `forward`, which a call runs.

    A parameter is a Tensor that requires a gradient.

    >>> class Shift(Module):
    ...     def __init__(self, width):
    ...         self.by = Tensor(np.zeros(width), requires_grad=True)
    ...
    ...     def forward(self, x):
    ...         return x + self.by
    >>> model = Sequential(Linear(3, 2), np.tanh, Shift(2))
    >>> [(name, p.shape) for name, p in model.named_parameters()]
    [('steps.0.weight', (2, 3)), ('steps.0.bias', (2,)), ('steps.2.by', (2,))]
    """
    training = True

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the module computes."""
        raise NotImplementedError(f"{type(self).__name__} has no forward method")

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        outside = _state.modules
        _state.modules = (weakref.ref(self), outside)        # weak, as a module may keep what it computed
        try:
            return self.forward(*inputs, **options)
        finally:
            _state.modules = outside

    def _attributes(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """Attributes, and what is in those that are lists, tuples or dicts, with their paths."""
        return _contents(vars(self), f"{prefix}." if prefix else "")

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, with their paths, such as "blocks.2.attention"."""
        yield prefix, self
        for path, value in self._attributes(prefix):
            if isinstance(value, Module):
                yield from value.named_modules(path)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each Tensor once, under the first of its paths, in the order of the attributes."""
        seen = set()
        for prefix, module in self.named_modules():
            for path, value in module._attributes(prefix):
                if isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    yield path, value

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The Tensors that require a gradient, as `named_tensors`."""
        return ((path, tensor) for path, tensor in self.named_tensors() if tensor.requires_grad)

    def parameters(self) -> list[Tensor]:
        """Each parameter once."""
        return [parameter for _, parameter in self.named_parameters()]

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """The arrays of all Tensors by path, frozen or not; memory is shared."""
        return {path: tensor.data for path, tensor in self.named_tensors()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Copy arrays into the Tensors; ValueError, and no change, unless names, shapes, dtypes agree."""
        explain.require_fit(self, state, self.state_dict())
        for name, tensor in self.named_tensors():
            tensor.data[...] = state[name]
            note_change([tensor])

    def train(self, mode: bool = True) -> Module:
        """Switch this module and all below it to training (dropout on), or to evaluation for mode=False."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """Switch to evaluation: dropout off."""
        return self.train(False)

    def __repr__(self) -> str:
        children = [f"  {name}: {module!r}".replace("\n", "\n  ") for name, module in vars(self).items()
                    if isinstance(module, Module)]
        children += [f"  {name}: [{len(value)} x {value[0]!r}]".replace("\n", "\n  ")
                     for name, value in vars(self).items()
                     if isinstance(value, (list, tuple)) and value and isinstance(value[0], Module)]
        own = [f"{name} {value.shape}" for name, value in vars(self).items() if isinstance(value, Tensor)]
        return "\n".join([f"{type(self).__name__}({', '.join(own)})", *children])


def _contents(values: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """What is in a list, tuple or dict, and in those in it, with paths."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, (dict, list, tuple)):
            yield from _contents(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _uniform(bound: float, shape: tuple[int, ...]) -> Tensor:
    return Tensor(generator().uniform(-bound, bound, shape).astype(np.float32), requires_grad=True)


class Linear(Module):
    """x weightᵀ + bias: weight (outputs, inputs) and bias (outputs,).

    Both start uniform in ±1/√inputs, as in PyTorch.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        if inputs < 1 or outputs < 1:
            raise ValueError(f"Linear: inputs is {inputs}, outputs is {outputs}; both must be at least 1")
        bound = 1 / math.sqrt(inputs)
        self.weight = _uniform(bound, (outputs, inputs))
        self.bias = _uniform(bound, (outputs,)) if bias else None

    def forward(self, x, activation=None):
        return linear(x, self.weight, self.bias, activation=activation)


class Embedding(Module):
    """Row ids of a table: weight (rows, width), which starts from N(0, 1)."""

    def __init__(self, rows: int, width: int):
        self.weight = Tensor(generator().standard_normal((rows, width), np.float32), requires_grad=True)

    def forward(self, ids):
        return embedding(ids, self.weight)


class LayerNorm(Module):
    """Normalise the last axis, of length width, then scale by weight and shift by bias (if there is one)."""

    def __init__(self, width: int, bias: bool = True, eps: float = 1e-5):
        self.weight = Tensor(np.ones(width, np.float32), requires_grad=True)
        self.bias = Tensor(np.zeros(width, np.float32), requires_grad=True) if bias else None
        self.eps = eps

    def forward(self, x):
        return layernorm(x, self.weight, self.bias, eps=self.eps)


class Dropout(Module):
    """In training each element is 0 with probability p, else divided by 1 - p; evaluation changes nothing."""

    def __init__(self, p: float):
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p is {p}; it must be in [0, 1)")
        self.p = p

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


class Sequential(Module):
    """Modules and functions, each applied to the result of the one before.

    >>> Sequential(np.negative, np.exp)(Tensor(0.0))
    Tensor(1.)
    """

    def __init__(self, *steps: Any):
        self.steps = list(steps)

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x
