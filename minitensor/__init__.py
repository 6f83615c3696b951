"""minitensor: reverse-mode autograd for tensors, in numpy and numba.

>>> import numpy as np, minitensor as mt
>>> x = mt.Tensor([1.0, 2.0, 3.0], requires_grad=True)
>>> y = np.sum(x ** 3 - 2 * x)
>>> y.backward()
>>> x.grad                                               # 3 x² - 2
Tensor([ 1., 10., 25.])

What follows is the table of contents; `minitensor.testing`, for gradient checks, is imported on demand.
"""
from minitensor import nn, optim
from minitensor.derivatives import hessian, hvp, jacobian, jvp, vjp
from minitensor.fused import (
    attention,
    cross_attention,
    cross_entropy,
    dropout,
    embedding,
    gelu,
    layernorm,
    linear,
    log_softmax,
    qk_norm,
    relu2,
    rotary,
    softmax,
)
from minitensor.linalg import dot, einsum, matmul, outer
from minitensor.nan import detect_nan
from minitensor.ops import (
    abs,
    add,
    astype,
    clip,
    copy,
    cos,
    cumsum,
    divide,
    erf,
    exp,
    expm1,
    log,
    log1p,
    logsumexp,
    max,
    maximum,
    mean,
    min,
    minimum,
    multiply,
    negative,
    power,
    prod,
    reciprocal,
    relu,
    sigmoid,
    sin,
    sqrt,
    square,
    std,
    subtract,
    sum,
    tanh,
    var,
    where,
)
from minitensor.random import seed
from minitensor.shape import (
    array_split,
    broadcast_to,
    concatenate,
    expand_dims,
    flip,
    moveaxis,
    pad,
    ravel,
    repeat,
    reshape,
    split,
    squeeze,
    stack,
    swapaxes,
    tile,
    transpose,
    tril,
    triu,
)
from minitensor.tensor import Tensor, fused, grad, no_grad, op, unfused
from minitensor.trace import Trace, trace

__all__ = [  # noqa: RUF022
    "Tensor", "grad", "no_grad", "op", "fused", "unfused", "seed", "nn", "optim",
    # derivatives
    "jacobian", "hessian", "hvp", "vjp", "jvp",
    # to watch and to mend
    "trace", "Trace", "detect_nan",
    # fused: one kernel forward, one backward
    "linear", "gelu", "relu2", "layernorm", "softmax", "log_softmax", "rotary", "qk_norm", "attention",
    "cross_attention", "dropout", "embedding", "cross_entropy",
    # arithmetic
    "add", "subtract", "multiply", "divide", "power", "negative", "abs", "square", "sqrt", "reciprocal",
    # exponentials and their kin
    "exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "sigmoid", "erf",
    # choices
    "relu", "maximum", "minimum", "where", "clip", "copy", "astype",
    # reductions
    "sum", "mean", "var", "std", "max", "min", "prod", "logsumexp", "cumsum",
    # linear algebra
    "matmul", "dot", "outer", "einsum",
    # axes
    "reshape", "ravel", "transpose", "swapaxes", "moveaxis", "expand_dims", "squeeze", "broadcast_to", "flip",
    # parts, joining and filling
    "split", "array_split", "repeat", "concatenate", "stack", "pad", "tile", "tril", "triu",
]  # fmt: skip
