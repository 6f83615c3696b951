"""Optimizers, clipping and the learning-rate schedule."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import kernels
from minitensor import explain
from minitensor.tensor import Tensor, note_change


def grad_norm(parameters: Iterable[Tensor]) -> float:
    """The Euclidean norm of all gradients taken together, summed in float64."""
    groups: dict[Any, list[Tensor]] = {}                 # of one dtype each: nearly always one
    for p in _listed(parameters):
        if p.grad is not None:
            groups.setdefault(p.dtype, []).append(p)
    return math.sqrt(sum(kernels.sum_of_squares([_gradient(p) for p in group])
                         for group in groups.values()))


def _listed(parameters: Iterable[Tensor]) -> list[Tensor]:
    """As a list; TypeError for one Tensor, which would be taken for its rows."""
    if isinstance(parameters, Tensor):
        raise TypeError("grad_norm: parameters is a Tensor; it must be a list of Tensors")
    return list(parameters)


def _gradient(p: Tensor) -> np.ndarray:
    assert p.grad is not None
    return np.asarray(p.grad.data, order="C")


def clip_scale(norm: float, max_norm: float) -> float:
    """The factor that brings gradients of this norm down to max_norm; 1 if they are within."""
    return min(1.0, max_norm / (norm + 1e-6))


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients in place so that their norm is at most max_norm; returns the norm before.

    >>> x = Tensor([3.0, 4.0], requires_grad=True)
    >>> np.sum(x * x).backward()
    >>> clip_grad_norm([x], 1.0)
    10.0
    >>> np.round(x.grad.numpy(), 3)
    array([0.6, 0.8], dtype=float32)
    """
    parameters = _listed(parameters)
    norm = grad_norm(parameters)
    scale = clip_scale(norm, max_norm)
    for p in parameters:
        if p.grad is not None and scale != 1:
            p.grad.data *= p.grad.dtype.type(scale)
    return norm


def warmup_cosine(step: float, steps: int, warmup: int, lr: float, min_lr: float) -> float:
    """The learning rate of a step counted from 0: linear from 0 up to lr over so many steps of warm-up, then
    half a cosine to min_lr.
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def trapezoid(step: float, steps: int, warmup: int, lr: float, min_lr: float, hold: float) -> float:
    """As `warmup_cosine`, but lr up to the step `hold`, then linear to min_lr. Source: Hägele et al. 2024."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    falls = max(warmup, hold)
    return lr + (min_lr - lr) * min(1.0, max(0.0, step - falls) / max(1, steps - falls))


def _require_decay(name: str, weight_decay: float) -> None:
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"{name}: weight_decay is {weight_decay!r}; it must be 0 or a positive number")


def _described(p: Any) -> str:
    if not isinstance(p, Tensor):
        return f"a {type(p).__name__}"
    return "the result of an op" if p.node is not None else "a Tensor without requires_grad"


class _Step:
    """A step with clipping, of one optimizer or of several together."""

    parameters: list[Tensor]
    max_norm: float | None = None

    def step(self) -> float | None:
        """Update all parameters with a gradient; the gradients' norm before clipping, None without max_norm.

        A norm that is not a finite number changes nothing: the caller sees it and finds all as it was. The
        gradients themselves are not changed, they are scaled on their way into the update.
        """
        if self.max_norm is None:
            self._update(1.0)
            return None
        norm = grad_norm(self.parameters)
        if math.isfinite(norm):
            self._update(clip_scale(norm, self.max_norm))
        return norm

    def _update(self, scale: float) -> None:
        """The step, by gradients times scale."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for p in self.parameters:
            p.grad = None


class _Optimizer(_Step):
    """One optimizer: its parameters and its learning rate."""

    def __init__(self, parameters: Iterable[Tensor], lr: float):
        name = type(self).__name__
        self.parameters = list(parameters)
        self.lr = lr
        for p in self.parameters:
            if not isinstance(p, Tensor) or not p.requires_grad or p.node is not None:
                raise TypeError(f"{name}: parameters are a list of Tensors with requires_grad=True that no "
                                f"op made, as from module.parameters(); among them is {_described(p)}")
        if not isinstance(lr, (int, float)) or not 0 <= lr < math.inf:
            raise ValueError(f"{name}: lr is {lr!r}; it must be 0 or a positive number")
        if not self.parameters:
            raise ValueError(f"{name}: there are no parameters")
        if len({id(p) for p in self.parameters}) < len(self.parameters):
            raise ValueError(f"{name}: a parameter is listed twice; list each once, "
                             "as module.parameters() does")


class SGD(_Optimizer):
    """p ← p - lr b,   b ← momentum b + g (b starts as g, as in PyTorch).

    >>> x = Tensor([1.0, -2.0], requires_grad=True)
    >>> optimizer = SGD([x], lr=0.25)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     np.sum(x * x).backward()
    ...     optimizer.step()                                # halves x
    >>> x.numpy()
    array([ 0.125, -0.25 ], dtype=float32)
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.0):
        super().__init__(parameters, lr)
        self.momentum = momentum
        self.buffers: list[np.ndarray | None] = [None] * len(self.parameters)

    def _update(self, scale: float) -> None:
        for i, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            g = p.grad.data if scale == 1 else p.grad.dtype.type(scale) * p.grad.data
            if self.momentum:
                before = self.buffers[i]
                g = self.buffers[i] = g.copy() if before is None else self.momentum * before + g
            p.data -= self.lr * g

    def state_dict(self) -> dict[str, np.ndarray]:
        """The buffer of each parameter that has had a gradient: "buffers.0" and so on; memory is shared."""
        return {f"buffers.{i}": buffer for i, buffer in enumerate(self.buffers) if buffer is not None}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the buffers that `state_dict` gave; ValueError, and no change, unless they fit."""
        own = {f"buffers.{i}": p.data for i, p in enumerate(self.parameters)}
        explain.require_fit(self, state, own, optional=True)
        self.buffers = [state[name].copy() if name in state else None for name in own]


class AdamW(_Optimizer):
    """Adam with decoupled weight decay on matrices only (two axes or more): gains and biases do not decay.
    Source: Loshchilov, Hutter 2019.

    max_norm: gradients are clipped to this norm, all taken together, on their way into the update.

    >>> x = Tensor([1.0, -2.0], requires_grad=True)
    >>> optimizer = AdamW([x], lr=0.1, max_norm=1.0)
    >>> np.sum(x * x * 2).backward()
    >>> print(f"{optimizer.step():.3f}")                    # the norm before clipping
    8.944
    >>> x.numpy()                                           # the first step is lr, whatever the gradient
    array([ 0.9, -1.9], dtype=float32)
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01,
                 max_norm: float | None = None):
        super().__init__(parameters, lr)
        if not (isinstance(betas, tuple) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"AdamW: betas is {betas!r}; it must be two numbers in [0, 1)")
        _require_decay("AdamW", weight_decay)
        self.betas, self.eps, self.weight_decay, self.max_norm = betas, eps, weight_decay, max_norm
        self.steps = [0] * len(self.parameters)          # of each that it had a gradient
        self.first = [np.zeros_like(p.data) for p in self.parameters]
        self.second = [np.zeros_like(p.data) for p in self.parameters]

    def _update(self, scale: float) -> None:
        alike: dict[Any, list[int]] = {}                 # nearly always one group
        for i, p in enumerate(self.parameters):
            if p.grad is not None:
                self.steps[i] += 1
                alike.setdefault((p.dtype, self.steps[i]), []).append(i)
        for (_, steps), group in alike.items():
            parameters = [self.parameters[i] for i in group]
            kernels.adamw([p.data for p in parameters], [_gradient(p) for p in parameters],
                          [self.first[i] for i in group], [self.second[i] for i in group],
                          [self.weight_decay if p.ndim > 1 else 0.0 for p in parameters], steps, self.lr,
                          *self.betas, self.eps, scale)
            note_change(parameters)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The moments, "first.0", "second.0" and so on, sharing memory, and "steps", those of each."""
        moments = {"first": self.first, "second": self.second}
        arrays = {f"{name}.{i}": array for name, group in moments.items() for i, array in enumerate(group)}
        return {**arrays, "steps": np.array(self.steps, np.int64)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Copy what `state_dict` gave; ValueError, and no change, unless names, shapes and dtypes agree."""
        own = self.state_dict()
        explain.require_fit(self, state, own)
        if (state["steps"] < 0).any():
            raise ValueError("load_state_dict: AdamW does not fit: 'steps' has a negative number")
        for name, array in own.items():
            array[...] = state[name]
        self.steps = own["steps"].tolist()


class Muon(_Optimizer):
    """Nesterov's momentum for matrices, each update made nearly orthogonal: a step turns as far in every
    direction, however much smaller than others its gradient is. With decoupled weight decay.
    Source: Jordan et al. 2024; equations in kernels/muon.py.

    parts: how many matrices lie one above the other in each parameter, such as 3 in the weight of packed
    queries, keys and values; 1 each if left out. max_norm: as `AdamW`'s.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95,
                 weight_decay: float = 0.0, parts: Sequence[int] | None = None,
                 max_norm: float | None = None):
        super().__init__(parameters, lr)
        self.parts = [1] * len(self.parameters) if parts is None else list(parts)
        if len(self.parts) != len(self.parameters):
            raise ValueError(f"Muon: parts holds {len(self.parts)} numbers; there are {len(self.parameters)} "
                             "parameters")
        for p, count in zip(self.parameters, self.parts, strict=True):
            if p.ndim != 2 or count < 1 or len(p) % count:
                raise ValueError(f"Muon: a parameter is {p.shape}; it must be a matrix, or {count} of them "
                                 "one above the other")
        if not 0 <= momentum < 1:
            raise ValueError(f"Muon: momentum is {momentum!r}; it must be in [0, 1)")
        _require_decay("Muon", weight_decay)
        self.momentum, self.weight_decay, self.max_norm = momentum, weight_decay, max_norm
        self.momenta = [np.zeros_like(p.data) for p in self.parameters]

    def _update(self, scale: float) -> None:
        alike: dict[Any, list[int]] = {}                 # nearly always one group
        for i, p in enumerate(self.parameters):
            if p.grad is not None:
                alike.setdefault(p.dtype, []).append(i)
        for group in alike.values():
            parameters = [self.parameters[i] for i in group]
            kernels.muon([p.data for p in parameters], [_gradient(p) for p in parameters],
                         [self.momenta[i] for i in group], [self.parts[i] for i in group], self.lr,
                         self.momentum, self.weight_decay, scale)
            note_change(parameters)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The momenta by name: "momentum.0" and so on; memory is shared."""
        return {f"momentum.{i}": array for i, array in enumerate(self.momenta)}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Copy the momenta that `state_dict` gave; ValueError, and no change, unless all fit."""
        own = self.state_dict()
        explain.require_fit(self, state, own)
        for name, array in own.items():
            array[...] = state[name]


class Together(_Step):
    """Several optimizers as one: one norm clips all gradients, and one `lr`, that of the first, moves all
    learning rates in the proportion in which they began."""

    def __init__(self, optimizers: Iterable[SGD | AdamW | Muon], max_norm: float | None = None):
        self.optimizers, self.max_norm = list(optimizers), max_norm
        if not self.optimizers or not self.optimizers[0].lr > 0:
            raise ValueError("Together: there must be an optimizer, and the first one's lr above 0")
        self.parameters = [p for optimizer in self.optimizers for p in optimizer.parameters]
        if len({id(p) for p in self.parameters}) < len(self.parameters):
            raise ValueError("Together: two optimizers have the same parameter; give each to one")
        if any(optimizer.max_norm is not None for optimizer in self.optimizers):
            raise ValueError("Together: an optimizer has a max_norm of its own; give it to Together")
        self.factors = [optimizer.lr / self.optimizers[0].lr for optimizer in self.optimizers]

    @property
    def lr(self) -> float:
        """The first optimizer's learning rate; setting it sets all of them."""
        return self.optimizers[0].lr

    @lr.setter
    def lr(self, lr: float) -> None:
        for optimizer, factor in zip(self.optimizers, self.factors, strict=True):
            optimizer.lr = lr * factor

    def _update(self, scale: float) -> None:
        for optimizer in self.optimizers:
            optimizer._update(scale)

    def state_dict(self) -> dict[str, np.ndarray]:
        """What each optimizer's `state_dict` holds, with its number in front: "1.momentum.0" and so on."""
        return {f"{n}.{name}": array for n, optimizer in enumerate(self.optimizers)
                for name, array in optimizer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Load what `state_dict` gave; ValueError, and no change, unless all of it fits."""
        numbers = {str(n) for n in range(len(self.optimizers))}
        if unknown := sorted(name for name in state if name.partition(".")[0] not in numbers):
            raise ValueError(f"load_state_dict: Together does not fit: unexpected {unknown[0]!r}")
        before = {name: array.copy() for name, array in self.state_dict().items()}
        try:
            self._load(state)
        except ValueError:
            self._load(before)
            raise

    def _load(self, state: Mapping[str, np.ndarray]) -> None:
        for n, optimizer in enumerate(self.optimizers):
            own = f"{n}."
            optimizer.load_state_dict({name.removeprefix(own): array for name, array in state.items()
                                       if name.startswith(own)})
