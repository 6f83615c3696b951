"""minitensor: reverse-mode autograd for tensors, in numpy and numba.

>>> import numpy as np, minitensor as mt
>>> x = mt.Tensor([1.0, 2.0, 3.0], requires_grad=True)
>>> y = np.sum(np.exp(x) * x)
>>> y.backward()
>>> x.grad                                               # (x + 1) exp(x)
Tensor([ 5.4365635, 22.167168 , 80.34215  ])
"""
from minitensor import nn, optim
from minitensor.fused import (
    attention,
    cross_entropy,
    dropout,
    embedding,
    gelu,
    layernorm,
    linear,
    log_softmax,
    softmax,
)
from minitensor.linalg import *
from minitensor.ops import *
from minitensor.random import seed
from minitensor.shape import *
from minitensor.tensor import Tensor, fused, grad, no_grad, op, unfused
