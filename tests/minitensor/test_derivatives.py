"""Jacobians, Hessians and their products: against closed forms, finite differences and PyTorch."""
import numpy as np
import pytest

import minitensor as mt
from minitensor.tensor import Tensor
from minitensor.testing import gradcheck

RANDOM = np.random.default_rng(0)
X, Y, W = RANDOM.uniform(0.5, 1.5, (2, 3)), RANDOM.uniform(0.5, 1.5, 3), RANDOM.uniform(-1, 1, (4, 3))


def several(m):
    """A function of two arrays that mixes them, in m: numpy for us, torch for them."""
    return lambda x, y: m.exp(x * y) + x[:1] ** 2 / y


def scalar(m):
    return lambda x, y: m.sum(m.tanh(x) * y ** 3) + m.sum(x[0] * x[1])


def tensors(*arrays):
    return tuple(Tensor(a) for a in arrays)


def close(ours, theirs):
    if isinstance(ours, tuple):
        assert isinstance(theirs, tuple) and len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            close(*pair)
    else:
        assert ours.shape == tuple(theirs.shape) and ours.dtype == np.float64
        np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), rtol=1e-12, atol=1e-14)


# ---- closed forms ------------------------------------------------------------------------------------------

def test_closed_forms():
    x, v = Tensor(Y), RANDOM.standard_normal(3)
    A = RANDOM.standard_normal((3, 3))
    quadratic = lambda x: x @ A @ x                                             # noqa: E731
    close(mt.jacobian(lambda x: W @ x, x), W)
    close(mt.hessian(quadratic, x), A + A.T)
    close(mt.hvp(quadratic, x, v), (np.array(Y @ A @ Y), (A + A.T) @ v))
    close(mt.vjp(np.sin, x, v), (np.sin(Y), v * np.cos(Y)))
    close(mt.jvp(np.sin, x, v), (np.sin(Y), v * np.cos(Y)))
    close(mt.jvp(lambda x: W @ x, x, v), (W @ Y, W @ v))


def test_rosenbrocks_hessian_is_right_at_its_minimum():
    rosenbrock = lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2      # noqa: E731
    np.testing.assert_allclose(mt.hessian(rosenbrock, Tensor([1.0, 1.0])).numpy(), [[802, -400], [-400, 200]])


@pytest.mark.parametrize("create_graph", [False, True])
def test_functions_that_are_linear_constant_or_leave_an_input_out(create_graph):
    x, y = tensors(X, Y)
    options = {"create_graph": create_graph}
    close(mt.hessian(lambda x: np.sum(3 * x), x, **options), np.zeros((2, 3, 2, 3)))
    close(mt.jacobian(lambda x, y: y * y, (x, y), **options), (np.zeros((3, 2, 3)), np.diag(2 * Y)))
    close(mt.jvp(lambda x, y: y * 1, (x, y), (X, Y), **options)[1], Y)
    close(mt.jvp(lambda x: Tensor(np.ones(2)), x, X, **options)[1], np.zeros(2))
    close(mt.hvp(np.sum, x, X, **options)[1], np.zeros((2, 3)))
    close(mt.hessian(lambda x, y: np.sum(x) * y[0], (x, y), **options)[0][0], np.zeros((2, 3, 2, 3)))


def test_values_without_elements_and_without_axes():
    x = Tensor(Y)
    assert mt.jacobian(lambda x: x[:0], x).shape == (0, 3)
    close(mt.jacobian(np.sum, x), np.ones(3))
    close(mt.hessian(lambda x: x ** 3, Tensor(np.array(2.0))), np.array(12.0))


# ---- PyTorch -----------------------------------------------------------------------------------------------

def test_everything_is_pytorchs():
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    theirs = torch.autograd.functional
    ours_in, theirs_in = tensors(X, Y), (torch.tensor(X), torch.tensor(Y))
    v = (RANDOM.standard_normal((2, 3)), RANDOM.standard_normal(3))
    torch_v = tuple(torch.tensor(a) for a in v)
    u = RANDOM.standard_normal((2, 3))
    f, g, torch_f, torch_g = several(np), scalar(np), several(torch), scalar(torch)
    close(mt.jacobian(f, ours_in), theirs.jacobian(torch_f, theirs_in))
    close(mt.hessian(g, ours_in), theirs.hessian(torch_g, theirs_in))
    close(mt.vjp(f, ours_in, u), theirs.vjp(torch_f, theirs_in, torch.tensor(u)))
    close(mt.vjp(g, ours_in), theirs.vjp(torch_g, theirs_in))
    close(mt.jvp(f, ours_in, v), theirs.jvp(torch_f, theirs_in, torch_v))
    close(mt.hvp(g, ours_in, v), theirs.hvp(torch_g, theirs_in, torch_v))
    close(mt.hvp(g, list(ours_in), list(v)), theirs.hvp(torch_g, theirs_in, torch_v))
    close(mt.jacobian(lambda x: f(x, ours_in[1]), ours_in[0]),
          theirs.jacobian(lambda x: torch_f(x, theirs_in[1]), theirs_in[0]))


# ---- derivatives of these derivatives ----------------------------------------------------------------------

@pytest.mark.parametrize("derivative", [
    lambda x, y: mt.jacobian(several(np), (x, y), create_graph=True),
    lambda x, y: mt.hessian(scalar(np), (x, y), create_graph=True)[0],
    lambda x, y: mt.vjp(several(np), (x, y), X, create_graph=True)[1],
    lambda x, y: mt.jvp(several(np), (x, y), (X, Y), create_graph=True),
    lambda x, y: mt.hvp(scalar(np), (x, y), (X, Y), create_graph=True)[1],
    lambda x, y: mt.jvp(np.sin, x[0] * y, y, create_graph=True)[1],             # through v as well
], ids=["jacobian", "hessian", "vjp", "jvp", "hvp", "through v"])
def test_finite_differences_of_derivatives(derivative):
    gradcheck(derivative, X, Y, order=1, rtol=1e-5)


def test_without_create_graph_results_are_constants():
    x = Tensor(X, requires_grad=True)
    value, product = mt.hvp(lambda x: np.sum(x ** 3), x, X)
    assert not value.requires_grad and not product.requires_grad and x.grad is None
    with mt.no_grad():                                                          # asked for, so recorded
        close(mt.hvp(lambda x: np.sum(x ** 3), x, X)[1], 6 * X * X)


def test_an_input_that_depends_on_another_is_a_variable_of_its_own():
    x = Tensor(Y, requires_grad=True)
    y = x * x
    close(mt.jacobian(lambda a, b: np.sum(a * b), (x, y), create_graph=True), (Y * Y, Y))


# ---- a model's parameters ----------------------------------------------------------------------------------

@pytest.fixture
def model():
    mt.seed(0)
    model = mt.nn.Sequential(mt.nn.Linear(3, 4), mt.nn.LayerNorm(4), np.tanh, mt.nn.Linear(4, 2))
    for p in model.parameters():
        p.data = p.data.astype(np.float64)
    return model


def test_hvp_of_a_computed_loss_by_parameters_is_the_hessians(model):
    parameters = model.parameters()
    loss = mt.cross_entropy(model(Tensor(W)), [0, 1, 1, 0])
    v = [RANDOM.standard_normal(p.shape) for p in parameters]
    value, product = mt.hvp(loss, parameters, v)
    again = mt.hvp(loss, parameters, v)[1]                                      # the graph is still there
    assert value.item() == loss.item()
    blocks = mt.hessian(loss, parameters)
    for row, found, p in zip(blocks, product, parameters, strict=True):
        expected = sum(np.tensordot(block.numpy(), part, part.ndim)
                       for block, part in zip(row, v, strict=True))
        assert found.shape == p.shape
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-13)
    close(again, tuple(p.numpy() for p in product))
    for i, row in enumerate(blocks):                                            # H is symmetric
        for j, block in enumerate(row):
            there = blocks[j][i].numpy().reshape(parameters[j].size, parameters[i].size)
            np.testing.assert_allclose(block.numpy().reshape(there.T.shape), there.T, rtol=1e-9, atol=1e-13)


def test_jacobian_and_products_of_computed_values(model):
    y = model(Tensor(W[0]))
    weight, _ = parameters = model.parameters()[-2:]
    dweight, dbias = mt.jacobian(y, parameters)
    close(dbias, np.eye(2))
    directions = [RANDOM.standard_normal(p.shape) for p in parameters]
    close(mt.jvp(y, parameters, directions)[1],
          np.tensordot(dweight.numpy(), directions[0], 2) + directions[1])
    close(mt.vjp(y, weight, [1.0, 0.0])[1], dweight.numpy()[0])


# ---- errors ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("wrong", "kind", "message"), [
    (lambda x: mt.jacobian(np.exp, Y), TypeError,
     "jacobian: input 0 is a ndarray; inputs are Tensors, as minitensor.Tensor(x) makes of an array"),
    (lambda x: mt.vjp(np.exp, [x, [1.0]]), TypeError,
     "vjp: input 1 is a list; inputs are Tensors, as minitensor.Tensor(x) makes of an array"),
    (lambda x: mt.jacobian(np.exp, []), ValueError, "jacobian: there are no inputs to differentiate by"),
    (lambda x: mt.jacobian(lambda x: x.numpy(), x), TypeError,
     "jacobian: f returned a ndarray; it must return one Tensor, made by ops (np.concatenate joins several)"),
    (lambda x: mt.hessian(np.exp, x), ValueError,
     "hessian: f is of shape (3,); it must be a scalar, as after np.sum: "
     "jacobian is for functions of several values"),
    (lambda x: mt.hvp(np.sum, x, [1.0]), ValueError,
     "hvp: v is (1,) for input 0, which is (3,); the two must be alike"),
    (lambda x: mt.jvp(np.add, (x, x), [Y]), ValueError,
     "jvp: v has 1 parts and there are 2 inputs; give one for each"),
    (lambda x: mt.hvp(np.sum(x), x, Y), ValueError,
     "hvp: input 0, of shape (3,), has requires_grad=False, so nothing was recorded of it; "
     "set it to True before f is computed, or give a function"),
    (lambda x: mt.vjp(np.exp, x), ValueError,
     "backward: the tensor has shape (3,), and only a scalar's gradient can be left out; "
     "reduce it first, as in t.sum(), or pass gradient= of shape (3,)"),
])
def test_errors_say_what_to_write_instead(wrong, kind, message):
    with pytest.raises(kind) as caught:
        wrong(Tensor(Y))
    assert str(caught.value) == message
