"""What the tables of ops share."""
import numpy as np

from minitensor.tensor import Tensor, grad


def gradients(f, arrays):
    """The value of f, the gradients of its weighted sum, and the weights: no two elements count the same."""
    inputs = [Tensor(x, requires_grad=True) for x in arrays]
    y = f(*inputs)
    weights = np.cos(np.arange(y.size)).reshape(y.shape).astype(y.dtype)
    return y, grad(np.sum(y * weights), inputs), weights
