"""Errors that teach: each names what, where, and what to write instead. Word for word."""
import warnings
from typing import Any

import numpy as np
import pytest

import minitensor as mt
from minitensor.explain import INSTEAD
from minitensor.tensor import Tensor


def of(*shape: int) -> Tensor:
    return Tensor(np.ones(shape, np.float32), requires_grad=True)


# ---- what goes wrong, each in a function that does it ------------------------------------------------------

def second_backward():
    loss = np.sum(np.exp(of(2)))
    loss.backward()
    loss.backward()

def second_backward_over_a_shared_part():
    shared = np.exp(of(2))
    np.sum(shared).backward()
    np.sum(shared * 2).backward()

def data_replaced():
    x = of(2)
    y = np.exp(x * x)
    x.data = np.zeros(2, np.float32)
    np.sum(y).backward()

def data_changed_in_place():
    x = of(2)
    y = np.sum(x * x)
    x.data += 1
    y.backward()

def value_of_an_op_changed():
    y = np.exp(of(2))
    y.data *= 2
    np.sum(y).backward()

def constant_changed():
    x, constant = of(2), Tensor([1.0, 2.0])
    y = np.sum(x * constant)
    constant.data -= 1
    mt.grad(y, x)

def optimizer_stepped_between(optimizer=mt.optim.AdamW, shape=(2,)):
    x = of(*shape)
    loss = np.sum(x * x)
    loss.backward(retain_graph=True)
    optimizer([x], lr=0.1).step()
    loss.backward()

def weights_loaded_between():
    layer = mt.nn.Linear(2, 1)
    loss = np.sum(layer(of(2)))
    layer.load_state_dict(mt.nn.Linear(2, 1).state_dict())
    mt.grad(loss, layer.weight, create_graph=True)

def assigned_into():
    of(2)[0] = 3

def op_without_parentheses():
    @mt.op
    def cube(x):
        return x ** 3, lambda g: g * 3 * x ** 2

def fused_without_parentheses():
    @mt.fused
    def cube(x):
        return x ** 3, lambda g: g * 3 * x ** 2

def op_of_ones_own():
    @mt.op()
    def cube(x):
        if x.ndim != 2:
            raise NotImplementedError("only matrices")
        return x.reshape(3, 3) ** 3, lambda g: g * 3 * x ** 2
    cube(of(2, 2))

def op_without_vjp():
    @mt.op()
    def cube(x):
        return x ** 3
    cube(of(2))


BROADCAST = ("do not broadcast; from the right, lengths must agree or be 1, "
             "and x[:, None] has a new axis of length 1")
CHANGED = ("was changed through .data after the op had run, so its gradient may be wrong; change it before "
           "the forward pass or after backward(), or build a new Tensor")
NO_OP = ("has no op that can be differentiated; use t.numpy() to compute outside the graph, "
         "or write it with minitensor.op")
RELEASED = ("was released by an earlier backward(); pass retain_graph=True to the first one to walk it twice")

TABLE: list[tuple[Any, type[Exception], str]] = [
    # backward
    (second_backward, RuntimeError, f"backward: the graph below op 'sum' {RELEASED}"),
    (second_backward_over_a_shared_part, RuntimeError, f"backward: the graph below op 'exp' {RELEASED}"),
    (lambda: (of(2) * 2).backward(), ValueError,
     "backward: the tensor has shape (2,), and only a scalar's gradient can be left out; "
     "reduce it first, as in t.sum(), or pass gradient= of shape (2,)"),
    (lambda: (of(2) * 2).backward(gradient=np.ones(3)), ValueError,
     "backward: gradient is float32 of shape (3,); the tensor is float32 of shape (2,), "
     "and the two must be alike"),
    (lambda: Tensor(1.0).backward(), ValueError,
     "backward: the tensor does not depend on any tensor with requires_grad=True"),
    (lambda: mt.grad(np.sum(of(2)), Tensor([1.0])), ValueError,
     "grad: an input of shape (1,) has requires_grad=False, so nothing was recorded of it"),
    # changes
    (assigned_into, TypeError,
     "a Tensor cannot be assigned into, as a graph may need the old values; build a new one with np.where or "
     "np.concatenate, or write t.data[...] = ... where no graph needs them"),
    (data_replaced, RuntimeError, f"backward: the input of op 'multiply', of shape (2,), {CHANGED}"),
    (data_changed_in_place, RuntimeError, f"backward: the input of op 'multiply', of shape (2,), {CHANGED}"),
    (value_of_an_op_changed, RuntimeError, f"backward: the value of op 'exp', of shape (2,), {CHANGED}"),
    (constant_changed, RuntimeError, f"backward: the input of op 'multiply', of shape (2,), {CHANGED}"),
    (optimizer_stepped_between, RuntimeError,
     f"backward: the input of op 'multiply', of shape (2,), {CHANGED}"),
    (lambda: optimizer_stepped_between(mt.optim.SGD), RuntimeError,
     f"backward: the input of op 'multiply', of shape (2,), {CHANGED}"),
    (lambda: optimizer_stepped_between(mt.optim.Muon, (2, 3)), RuntimeError,
     f"backward: the input of op 'multiply', of shape (2, 3), {CHANGED}"),
    (weights_loaded_between, RuntimeError,
     f"backward: the input of op 'linear', of shape (1, 2), {CHANGED}"),
    # a Tensor is not what it was taken for
    (lambda: 1 if of(2) else 0, ValueError,
     "bool: a tensor of shape (2,) is not true or false as a whole; "
     "use np.any(t.numpy()) or np.all(t.numpy())"),
    (lambda: of(2).item(), ValueError,
     "item: the tensor has shape (2,); only one with a single element has an item"),
    (lambda: of(2) == 0, TypeError,
     "==: a Tensor is equal to itself alone, not to a int; np.equal(t, y) compares the elements"),
    (lambda: np.asarray(of(2)), TypeError,
     "a Tensor does not turn into an array by itself, as the gradient would be lost; "
     "use t.numpy() for its values"),
    (lambda: Tensor(of(2)), TypeError,
     "Tensor: data is already a Tensor; use t.detach() to share its values outside the graph"),
    # dtypes
    (lambda: of(2) + np.ones(2), TypeError,
     "add: float32 and float64 are mixed: argument 1 is float64, another is float32; "
     "convert one with .astype(np.float32)"),
    (lambda: np.concatenate([of(2), Tensor(np.ones(2))]), TypeError,
     "concatenate: float32 and float64 are mixed: argument 1 is float64, another is float32; "
     "convert one with .astype(np.float32)"),
    (lambda: of(2) + "x", TypeError,
     "add: a str of dtype <U1 cannot be combined with a float32 Tensor; give numbers"),
    (lambda: np.where([True], of(1), None), TypeError,
     "where: a NoneType of dtype object cannot be combined with a float32 Tensor; give numbers"),
    (lambda: Tensor(np.ones(2, np.float16)), TypeError,
     "Tensor: dtype is float16; a Tensor holds float32 or float64 (indices and masks stay plain arrays)"),
    (lambda: mt.embedding(np.array([0.0, 1.0]), of(3, 2)), TypeError,
     "embedding: ids is an array of float64; it must hold integers, as after ids.astype(np.int64)"),
    (lambda: mt.embedding(Tensor([0, 1]), of(3, 2)), TypeError,
     "embedding: ids is a Tensor of float32; it must hold integers, which no Tensor does: "
     "give a list or an array, as np.array([0, 2])"),
    (lambda: mt.cross_entropy(of(2, 3), np.array([0.0, 1.0])), TypeError,
     "cross_entropy: targets is an array of float64; it must hold integers, "
     "as after targets.astype(np.int64)"),
    # indices
    (lambda: of(2, 3)[2], IndexError,
     "getitem: index 2 is out of range for axis 0 of x, which is (2, 3); it must be in -2 to 1"),
    (lambda: of(2, 3)[:, [0, -4]], IndexError,
     "getitem: index -4 is out of range for axis 1 of x, which is (2, 3); it must be in -3 to 2"),
    (lambda: of(0)[0], IndexError,
     "getitem: index 0 is out of range for axis 0 of x, which is (0,); there is no element to take"),
    (lambda: of(2)[0, 1], IndexError,
     "getitem: too many indices for array: array is 1-dimensional, but 2 were indexed; x is (2,)"),
    (lambda: of(2)[Tensor([0.0])], IndexError,
     "getitem: an index is a Tensor or an array of floats; indices are integers, slices, None, ... and "
     "integer or boolean arrays, as in x[i.numpy().astype(int)]"),
    (lambda: mt.embedding([3], of(3, 2)), IndexError, "embedding: ids holds 3; it must be in 0 to 2"),
    # shapes
    (lambda: of(3) + of(4), ValueError, f"add: shapes (3,) and (4,) {BROADCAST}"),
    (lambda: np.maximum(of(2, 3), np.ones((2, 1, 2), np.float32)), ValueError,
     f"maximum: shapes (2, 3) and (2, 1, 2) {BROADCAST}"),
    (lambda: np.where([True, False], of(3), 0.0), ValueError, f"where: shapes (2,), (3,) and () {BROADCAST}"),
    (lambda: np.clip(of(3), of(2), None), ValueError, f"clip: shapes (3,) and (2,) {BROADCAST}"),
    (lambda: of(4, 3) @ of(5, 2), ValueError,
     "matmul: inner sizes differ: x is (4, 3), y is (5, 2); x.shape[-1] must equal y.shape[-2]"),
    (lambda: mt.linear(of(2, 6), of(4, 5)), ValueError,
     "linear: inner sizes differ: x is (2, 6), weight is (4, 5); x.shape[-1] must equal weight.shape[1]"),
    (lambda: np.concatenate([of(2, 3), of(2, 2)]), ValueError,
     "concatenate: all the input array dimensions except for the concatenation axis must match exactly, but "
     "along dimension 1, the array at index 0 has size 3 and the array at index 1 has size 2; "
     "the inputs are (2, 3) and (2, 2)"),
    (lambda: np.stack([of(3), of(4), of(4)]), ValueError,
     "stack: the arrays are (3,), (4,) and (4,); all must have one shape, "
     "and np.concatenate joins along an axis that is there"),
    (lambda: of(2, 3).reshape(4, 2), ValueError,
     "reshape: cannot reshape array of size 6 into shape (4,2); the input is (2, 3)"),
    (lambda: np.sum(of(3), axis=2), np.exceptions.AxisError,
     "sum: axis 2 is out of bounds for array of dimension 1; the input is (3,)"),
    (lambda: np.swapaxes(of(3), 0, 1), np.exceptions.AxisError,
     "swapaxes: axis2: axis 1 is out of bounds for array of dimension 1; the input is (3,)"),
    # numpy functions
    (lambda: np.logaddexp(of(2), of(2)), TypeError,
     "numpy.logaddexp has no op that can be differentiated; "
     "write minitensor.logsumexp(np.stack([x, y]), axis=0)"),
    (lambda: np.linalg.norm(of(2)), TypeError,
     "numpy.linalg.norm has no op that can be differentiated; write np.sqrt(np.sum(x * x, axis=axis))"),
    (lambda: np.arctan(of(2)), TypeError, f"numpy.arctan {NO_OP}"),
    (lambda: np.median(of(2)), TypeError, f"numpy.median {NO_OP}"),
    (lambda: np.linalg.inv(of(2, 2)), TypeError, f"numpy.linalg.inv {NO_OP}"),
    (lambda: np.add.reduce(of(2)), TypeError, f"numpy.add.reduce {NO_OP}"),
    (lambda: np.exp(of(1), where=[True]), TypeError, f"numpy.exp(where=...) {NO_OP}"),
    (lambda: np.add(of(1), 1, out=np.zeros(1)), TypeError, f"numpy.add(out=...) {NO_OP}"),
    # an op of one's own
    (op_without_parentheses, TypeError,
     "op: 'cube' is not a function of numpy's; write the decorator with parentheses, as in @op()"),
    (fused_without_parentheses, TypeError,
     "fused: write the decorator with parentheses, and with the body's reference, as in @fused(reference=f)"),
    (lambda: mt.fused(), TypeError,
     "fused: a fused op names its reference, a function of primitive ops; got None"),
    (op_of_ones_own, ValueError,
     "cube: cannot reshape array of size 4 into shape (3,3); the input is (2, 2)"),
    (op_without_vjp, TypeError,
     "cube: an op returns its value and its vjp, as in 'return x * x, lambda g: g * (2 * x)'"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), TABLE, ids=[row[2][:40] for row in TABLE])
def test_an_error_says_what_where_and_what_to_write_instead(wrong, kind, message):
    with pytest.raises(kind) as caught:
        wrong()
    assert str(caught.value) == message
    assert type(caught.value) is kind


# ---- changes to .data that no graph minds ------------------------------------------------------------------

def test_training_loops_change_data_between_backward_and_forward():
    x = Tensor(np.array([3.0, -2.0]), requires_grad=True)
    losses = []
    for _ in range(3):
        for _ in range(2):                                      # two micro-batches accumulate
            loss = np.sum(x * x)
            loss.backward(retain_graph=True)
            loss.backward()
        losses.append(loss.item())
        x.data -= 0.05 * x.grad.data
        x.grad = None
    np.testing.assert_allclose(losses, [13, 13 * 0.6 ** 2, 13 * 0.6 ** 4])


def test_a_tensor_that_the_graph_does_not_reach_may_change():
    x, other = Tensor([1.0], requires_grad=True), Tensor([1.0])
    y = np.sum(x * x)
    other.data += 1
    y.backward()
    assert x.grad.item() == 2


def test_changing_a_gradient_or_a_value_before_it_is_used():
    x = Tensor([1.0, 2.0], requires_grad=True)
    x.data = np.array([3.0, 4.0], np.float32)
    np.sum(x * x).backward()
    x.grad.data *= 2
    assert x.grad.numpy().tolist() == [12, 16]


def test_data_takes_what_a_tensor_takes():
    x = Tensor([1.0, 2.0])
    x.data = [3, 4]
    assert x.dtype == np.float32 and x.numpy().tolist() == [3, 4]
    x.data = x.data[0] * 2                                      # a numpy scalar
    assert x.shape == () and x.item() == 6
    with pytest.raises(TypeError, match="a Tensor holds float32 or float64"):
        x.data = np.ones(2, np.float16)


# ---- what the errors advise is right -----------------------------------------------------------------------

MATRICES = {np.trace, np.diagonal, np.kron}                     # the others take vectors as well
OPTIONS: dict[Any, tuple] = {np.roll: (2,), np.take: (np.array([0, 2]),)}


@pytest.mark.parametrize(("function", "shape"), [(f, shape) for f in INSTEAD for shape in [(5,), (3, 4)]
                                                 if f not in MATRICES or shape == (3, 4)],
                         ids=lambda value: getattr(value, "__name__", str(value)))
def test_what_to_write_instead_is_the_same(function, shape):
    random = np.random.default_rng(0)
    x, y = random.uniform(0.2, 0.9, (2, *(shape if function not in (np.trace, np.diagonal) else (4, 4))))
    names = {"np": np, "minitensor": mt, "i": OPTIONS.get(function, (None,))[0], "shift": 2, "axis": None,
             "weights": np.ones(x.shape)}
    binary = "y" in INSTEAD[function].replace("minitensor", "")
    def call(x, y):
        if function in (np.vstack, np.hstack):
            return function([x, y])
        return function(x, y) if binary else function(x, *OPTIONS.get(function, ()))
    inputs = {"x": Tensor(x, requires_grad=True), "y": Tensor(y, requires_grad=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = eval(INSTEAD[function], names | inputs)
    assert found.requires_grad
    np.testing.assert_allclose(found.numpy(), call(x, y), rtol=1e-13)
    with pytest.raises(TypeError) as caught:
        call(**inputs)
    assert str(caught.value).endswith(f"has no op that can be differentiated; write {INSTEAD[function]}")
