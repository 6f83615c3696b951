"""Modules: functions that own their parameters, the Tensor attributes that require a gradient."""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minitensor import fused
from minitensor.random import generator
from minitensor.tensor import Tensor


class Module:
    """Parameters and modules as attributes (or in lists of modules), and `forward`, which a call runs."""
    training = True

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the module computes."""
        raise NotImplementedError(f"{type(self).__name__} has no forward method")

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.forward(*inputs, **options)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, with their paths, such as "blocks.2.attention"."""
        yield prefix, self
        for name, value in vars(self).items():
            items = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
            for i, item in items:
                if isinstance(item, Module):
                    path = name if i is None else f"{name}.{i}"
                    yield from item.named_modules(f"{prefix}.{path}" if prefix else path)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter once, under the first of its paths, in the order of the attributes."""
        seen = set()
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value.requires_grad and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{prefix}.{name}" if prefix else name, value

    def parameters(self) -> list[Tensor]:
        """Each parameter once."""
        return [parameter for _, parameter in self.named_parameters()]

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """The parameters' arrays by path; memory is shared."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Copy arrays into the parameters; ValueError, and no change, unless names, shapes, dtypes agree."""
        own = self.state_dict()
        problems = [f"missing {name!r}" for name in own if name not in state]
        problems += [f"unexpected {name!r}" for name in state if name not in own]
        for name in own.keys() & state.keys():
            given, array = state[name], own[name]
            if given.shape != array.shape or given.dtype != array.dtype:
                problems.append(f"{name!r} is {given.dtype} {given.shape}, "
                                f"it must be {array.dtype} {array.shape}")
        if problems:
            raise ValueError(f"load_state_dict: {type(self).__name__} does not fit: "
                             f"{'; '.join(sorted(problems))}")
        for name, array in own.items():
            array[...] = state[name]

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


def _uniform(bound: float, shape: tuple[int, ...]) -> Tensor:
    return Tensor(generator().uniform(-bound, bound, shape).astype(np.float32), requires_grad=True)


class Linear(Module):
    """x weightᵀ + bias: weight (outputs, inputs) and bias (outputs,).

    Both start uniform in ±1/√inputs, as in PyTorch.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        bound = 1 / math.sqrt(inputs)
        self.weight = _uniform(bound, (outputs, inputs))
        self.bias = _uniform(bound, (outputs,)) if bias else None

    def forward(self, x, activation=None):
        return fused.linear(x, self.weight, self.bias, activation=activation)


class Embedding(Module):
    """Row ids of a table: weight (rows, width), which starts from N(0, 1)."""

    def __init__(self, rows: int, width: int):
        self.weight = Tensor(generator().standard_normal((rows, width), np.float32), requires_grad=True)

    def forward(self, ids):
        return fused.embedding(ids, self.weight)


class LayerNorm(Module):
    """Normalise the last axis, of length width, then scale by weight and shift by bias (if there is one)."""

    def __init__(self, width: int, bias: bool = True, eps: float = 1e-5):
        self.weight = Tensor(np.ones(width, np.float32), requires_grad=True)
        self.bias = Tensor(np.zeros(width, np.float32), requires_grad=True) if bias else None
        self.eps = eps

    def forward(self, x):
        return fused.layernorm(x, self.weight, self.bias, eps=self.eps)


class Dropout(Module):
    """In training each element is 0 with probability p, else divided by 1 - p; evaluation changes nothing."""

    def __init__(self, p: float):
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p is {p}; it must be in [0, 1)")
        self.p = p

    def forward(self, x):
        return fused.dropout(x, self.p) if self.training else x


class Sequential(Module):
    """Modules and functions, each applied to the result of the one before."""

    def __init__(self, *steps: Any):
        self.steps = list(steps)

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x
