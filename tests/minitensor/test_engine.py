"""The engine: what a graph records, how the walk goes, what it frees, and what a Tensor answers to numpy."""
import gc
import threading
import weakref

import numpy as np
import pytest

import minitensor.linalg
import minitensor.ops
import minitensor.shape  # noqa: F401  (ops register when they are imported)
from minitensor.fused import linear
from minitensor.ops import relu
from minitensor.tensor import NUMPY, Tensor, fused, grad, no_grad, op, unfused
from minitensor.testing import gradcheck


def leaf(*values, dtype=np.float64):
    return Tensor(np.array(values, dtype), requires_grad=True)


# ---- the walk ----------------------------------------------------------------------------------------------

def test_broadcasting_is_undone():
    x, y = Tensor(np.ones((2, 1, 3)), True), Tensor(np.full((4, 1), 2.0), True)
    np.sum(x * y).backward()
    assert x.grad.shape == (2, 1, 3) and np.all(x.grad.numpy() == 8)
    assert y.grad.shape == (4, 1) and np.all(y.grad.numpy() == 6)


def test_broadcasting_of_large_arrays_is_undone_by_a_kernel():
    x, y = (Tensor(np.random.default_rng(n).standard_normal(shape), True)
            for n, shape in enumerate([(30, 70, 40), (70, 40)]))
    z, g = x + y, np.random.default_rng(2).standard_normal(x.shape)
    z.backward(g)
    np.testing.assert_array_equal(z.numpy(), x.numpy() + y.numpy())
    np.testing.assert_array_equal(x.grad.numpy(), g)
    np.testing.assert_allclose(y.grad.numpy(), g.sum(axis=0), rtol=1e-12, atol=1e-12)
    y.grad.data[...] = 0                                        # it is y's own
    np.testing.assert_array_equal(x.grad.numpy(), g)


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_gradient_summed_down_to_few_numbers_is_as_exact_as_numpy_s(shape):
    g = np.random.default_rng(0).random((400_000, 3), dtype=np.float32)
    s = Tensor(np.zeros(shape, np.float32), True)
    (Tensor(np.zeros(g.shape, np.float32)) + s).backward(g)
    axes = (0,) if shape == (3,) else (0, 1)
    np.testing.assert_array_equal(s.grad.numpy(), g.sum(axis=axes).reshape(shape))


def test_chain_of_100_000_ops():
    x = y = leaf(1.0)
    for _ in range(100_000):
        y = y + 1
    y.backward()
    assert x.grad.item() == 1


def test_a_tensor_used_often_gets_the_sum():
    for x in (leaf(3.0), Tensor(3.0, True), Tensor(np.float64(3.0), True)):
        np.sum(x * x * x + x + x).backward()
        assert x.grad.item() == 29 and x.grad.dtype == x.dtype and x.grad.shape == x.shape


def test_diamond_is_walked_once_per_op():
    calls = []

    @op()
    def counted(x):
        return x * 1, lambda g: calls.append(1) or g
    x = leaf(2.0)
    y = counted(x)
    np.sum(y * y + np.exp(y) - y).backward()
    assert len(calls) == 1


def test_leaves_accumulate():
    x = leaf(1.0, 2.0)
    for turn in (1, 2, 3):
        np.sum(x * x).backward()
        np.testing.assert_array_equal(x.grad.numpy(), turn * 2 * x.numpy())


def test_gradients_share_no_memory():
    a, b = leaf(1.0, 2.0), leaf(3.0, 4.0)
    y = a + b
    seed = np.ones(2)
    y.backward(gradient=seed)
    da, db = a.grad.data, b.grad.data
    for first, second in ((da, db), (da, seed), (db, seed), (da, a.data), (da, y.data)):
        assert not np.shares_memory(first, second)
    a.grad.data += 1
    assert b.grad.numpy().tolist() == [1, 1] and seed.tolist() == [1, 1]
    da, db = grad(a + b, (a, b), gradient=seed)
    assert not np.shares_memory(da.data, db.data) and not np.shares_memory(da.data, seed)


def test_gradients_of_intermediate_tensors_are_not_kept():
    x = leaf(1.0)
    y = x * 2
    np.sum(y).backward()
    assert y.grad is None and x.grad is not None


def test_retain_graph():
    x = leaf(2.0)
    y = np.sum(x * x)
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.item() == 8


def test_dropping_the_loss_frees_the_graph_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        x = leaf(1.0, 2.0)
        loss = np.sum(np.tanh(x) * np.std(np.exp(x)) + relu(x) / np.max(x))
        alive = weakref.ref(loss.node)
        del loss
        assert alive() is None
        loss = np.sum(np.exp(x) ** 2)
        dx, = grad(loss, x, create_graph=True)
        alive = weakref.ref(loss.node), weakref.ref(dx.node)
        del loss, dx
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def test_a_vjp_of_the_wrong_shape_or_dtype_is_named():
    @op()
    def crooked(x):
        return x * 1, lambda g: g[:1]

    @op()
    def wide(x):
        return x * 1, lambda g: g.astype(np.float64)
    with pytest.raises(ValueError, match=r"the vjp of 'crooked' gave a gradient of shape \(1,\)"):
        np.sum(crooked(leaf(1.0, 2.0))).backward()
    with pytest.raises(TypeError, match="the vjp of 'wide' gave a float64 gradient for a float32 input"):
        np.sum(wide(leaf(1.0, 2.0, dtype=np.float32))).backward()


# ---- grad, and gradients of gradients ----------------------------------------------------------------------

@pytest.mark.parametrize(("f", "derivatives"), [
    (np.tanh, [lambda x: 1 - np.tanh(x) ** 2, lambda x: -2 * np.tanh(x) * (1 - np.tanh(x) ** 2),
               lambda x: (6 * np.tanh(x) ** 2 - 2) * (1 - np.tanh(x) ** 2)]),
    (np.exp, [np.exp, np.exp, np.exp]),
    (lambda x: x ** 3, [lambda x: 3 * x ** 2, lambda x: 6 * x, lambda x: 6 + 0 * x]),
])
def test_first_second_and_third_derivative(f, derivatives):
    x = leaf(-0.7, 0.0, 0.4, 1.3)
    y = f(x)
    for derivative in derivatives:
        y, = grad(np.sum(y), x, create_graph=True)
        np.testing.assert_allclose(y.numpy(), derivative(x.numpy()), rtol=1e-12, atol=1e-14)


def test_backward_with_create_graph_accumulates_tensors_that_can_be_differentiated():
    x = leaf(2.0)
    for _ in range(2):
        np.sum(x ** 3).backward(create_graph=True)
    first, x.grad = x.grad, None
    assert first.item() == 24
    np.sum(first).backward()
    assert x.grad.item() == 24


def test_grad_of_intermediate_and_of_unused_tensors():
    x, unused = leaf(2.0), leaf(1.0, 2.0)
    y = x * x
    dy, dx, nothing = grad(np.sum(y * 3), (y, x, unused))
    assert dy.item() == 3 and dx.item() == 12
    assert nothing.shape == (2,) and not nothing.numpy().any() and nothing.dtype == unused.dtype
    assert x.grad is None and y.grad is None
    with pytest.raises(ValueError, match="requires_grad=False"):
        grad(np.sum(x * x), Tensor([1.0]))


def test_grad_of_a_tensor_by_itself():
    x = leaf(2.0)
    y = np.sum(x * x)
    assert grad(y, y, retain_graph=True)[0].item() == 1
    assert grad(np.sum(x), (x, x))[1].item() == 1


# ---- what is recorded --------------------------------------------------------------------------------------

def test_detach_shares_values_and_stops_the_gradient():
    x = leaf(2.0)
    constant = (x * 3).detach()
    assert not constant.requires_grad and constant.node is None
    np.sum(x * constant).backward()
    assert x.grad.item() == 6
    assert np.shares_memory(x.detach().data, x.data)


def test_no_grad_records_nothing_and_ends():
    x = leaf(1.0)
    with no_grad():
        y = np.exp(x)
        with no_grad():
            pass
        assert not np.exp(x).requires_grad
    assert not y.requires_grad and y.node is None
    assert np.exp(x).requires_grad
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert np.exp(x).requires_grad


def test_constants_record_nothing():
    y = np.exp(Tensor([1.0])) + 1
    assert not y.requires_grad and y.node is None


def test_recording_is_a_matter_of_each_thread():
    x, seen = leaf(1.0), []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append((x * 2).requires_grad))
        thread.start()
        thread.join()
        assert not (x * 2).requires_grad
    assert seen == [True]


def test_gradients_of_constants_are_not_computed():
    @op()
    def costly(x, y):
        def never(g):
            raise AssertionError("computed for a constant")
        return x * y, (lambda g: g * y, never)
    x = leaf(2.0)
    np.sum(costly(x, Tensor(np.array([3.0])))).backward()
    assert x.grad.item() == 3


def test_a_fused_op_runs_its_reference_where_the_graph_is_wanted():
    ran = []

    def reference(x):
        ran.append("reference")
        return np.exp(x) * 2

    @fused(reference=reference)
    def twice_exp(x):
        ran.append("kernel")
        y = 2 * np.exp(x)
        return y, lambda g: g * y
    x = leaf(0.5)
    np.sum(twice_exp(x)).backward()
    assert ran == ["kernel"] and x.grad.item() == 2 * np.exp(0.5)
    with unfused():
        twice_exp(x)
    assert ran == ["kernel", "reference"]
    dx, = grad(np.sum(twice_exp(x)), x, create_graph=True)
    assert grad(np.sum(dx), x)[0].item() == pytest.approx(2 * np.exp(0.5))
    with pytest.raises(TypeError, match="a fused op names its reference"):
        fused(reference=None)


def test_an_op_of_ones_own_needs_no_further_wiring():
    @op(np.hypot)
    def hypotenuse(x, y):
        z = np.sqrt(x * x + y * y)
        return z, (lambda g: g * x / z, lambda g: g * y / z)
    try:
        x, y = leaf(3.0, 6.0), Tensor(np.array([[4.0], [8.0]]), True)
        z = np.hypot(x, y)                                      # numpy's name, and broadcasting
        assert z.shape == (2, 2) and z.node.op.__name__ == "hypotenuse" and z[0, 0].item() == 5
        dx, dy = grad(np.sum(z), (x, y), create_graph=True)
        np.testing.assert_allclose(dx.numpy()[0], 3 / 5 + 3 / np.hypot(3, 8))
        assert dy.shape == (2, 1)
        second, = grad(dx[0], x)
        np.testing.assert_allclose(second.numpy(), [16 / 125 + 64 / np.hypot(3, 8) ** 3, 0])
        gradcheck(np.hypot, x.numpy(), y.numpy(), order=3)
        assert isinstance(hypotenuse(3.0, 4.0), float)          # with no Tensor, a plain function
    finally:
        del NUMPY[np.hypot]


# ---- a Tensor among numpy's arrays -------------------------------------------------------------------------

def test_equality_is_identity_and_tensors_hash():
    x, y = Tensor([1.0, 2.0]), Tensor([1.0, 2.0])
    assert x == x and x != y and len({x, y, x}) == 2 and x in [y, x]


def test_comparisons_are_boolean_arrays():
    x = Tensor([1.0, 2.0, 3.0])
    for mask, expected in ((x < 2, [1, 0, 0]), (x <= 2, [1, 1, 0]), (x > 2, [0, 0, 1]), (2 <= x, [0, 1, 1]),
                           (x >= Tensor([2.0, 2.0, 2.0]), [0, 1, 1])):
        assert isinstance(mask, np.ndarray) and mask.dtype == bool
        assert mask.astype(int).tolist() == expected


def test_float32_and_float64_do_not_mix():
    x, y = Tensor(np.ones(2, np.float32)), Tensor(np.ones(2, np.float64))
    for mixed in (lambda: x + y, lambda: y * x.numpy(), lambda: np.ones(2) @ x):
        with pytest.raises(TypeError, match=r"float32 and float64 are mixed.*convert one with .astype"):
            mixed()
    assert (x.astype(np.float64) + y).dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("operand", [2, 2.0, True, np.float64(2), np.float32(2), np.int64(2), np.arange(3),
                                     np.array([True, False, True]), [1, 2, 3], np.array(2.0)])
def test_other_operands_take_the_tensors_dtype(dtype, operand):
    x = leaf(1.0, 2.0, 3.0, dtype=dtype)
    if isinstance(operand, np.ndarray) and operand.dtype == np.float64 != dtype:
        with pytest.raises(TypeError, match="mixed"):
            x + operand
        operand = operand.astype(dtype)
    for f in (np.add, np.subtract, np.multiply, np.power, np.maximum):
        for y in (f(x, operand), f(operand, x)):
            assert isinstance(y, Tensor) and y.dtype == dtype
            dx, = grad(np.sum(y), x)
            assert dx.dtype == dtype and dx.shape == x.shape
    assert (x / np.float64(2)).dtype == (np.float64(2) / x).dtype == dtype


def test_a_numpy_array_on_the_left():
    x = leaf(1.0, 2.0, 3.0)
    ones = np.ones(3)
    for y, expected in ((ones * x, [1, 2, 3]), (ones - x, [0, -1, -2]), (6 * ones / x, [6, 3, 2]),
                        (ones ** x, [1, 1, 1]), (ones @ x, 6), (np.ones((2, 3)) @ x, [6, 6])):
        assert isinstance(y, Tensor) and y.requires_grad and y.numpy().tolist() == expected
    assert (ones < x).tolist() == [False, True, True]


def test_dtypes_of_new_tensors():
    assert all(Tensor(data).dtype == np.float32 for data in ([1, 2], 1.0, np.arange(2), [0.5], True))
    assert Tensor(np.ones(2)).dtype == Tensor([1], dtype=np.float64).dtype == np.float64
    array = np.ones(2, np.float32)
    assert np.shares_memory(Tensor(array).data, array)
    for wrong in (np.ones(2, np.float16), np.ones(2, complex), ["a"]):
        with pytest.raises(TypeError, match="a Tensor holds float32 or float64"):
            Tensor(wrong)
    with pytest.raises(TypeError, match="already a Tensor"):
        Tensor(Tensor([1.0]))


def test_truth_length_iteration_and_numbers():
    x = Tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) is not true or false as a whole"):
        bool(x)
    assert Tensor([1.0]) and not Tensor(0.0)
    assert len(x) == 2
    with pytest.raises(TypeError, match="no axes has no length"):
        len(Tensor(1.0))
    first, second = x
    np.sum(first * second).backward()
    assert x.grad.numpy().tolist() == [[3, 4], [1, 2]]
    assert float(Tensor(1.5)) == Tensor([1.5]).item() == 1.5
    with pytest.raises(ValueError, match="only one with a single element has an item"):
        float(x)
    assert f"{Tensor(1.2345):.2f}" == "1.23" and f"{Tensor([1.0])}" == "Tensor([1.])"
    assert repr(x * 2).endswith("op=multiply)") and "requires_grad=True" in repr(x)
    assert "dtype=float64" in repr(Tensor(np.ones(1)))


def test_methods_are_numpys_functions():
    array = np.arange(6.0).reshape(2, 3)
    for method in (lambda x: x.sum(axis=1), lambda x: x.mean(), lambda x: x.var(0),
                   lambda x: x.std(keepdims=True),
                   lambda x: x.max(1), lambda x: x.min(), lambda x: x[:, 1:].prod(), lambda x: x.cumsum(1),
                   lambda x: x.T, lambda x: x.transpose(1, 0), lambda x: x.transpose(),
                   lambda x: x.swapaxes(0, 1),
                   lambda x: x.reshape(3, 2), lambda x: x.reshape((3, -1)), lambda x: x.ravel(),
                   lambda x: x[None].squeeze(0), lambda x: x.repeat(2, 1), lambda x: x.clip(1, 2),
                   lambda x: x.copy(), lambda x: -x, lambda x: abs(x - 3), lambda x: x.astype(np.float32)):
        ours, theirs = method(Tensor(array)), method(array)
        assert isinstance(ours, Tensor) and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-15)
    t = Tensor(array)
    assert t.argmax(axis=1).tolist() == [2, 2] and t.argmin() == 0
    assert (t.shape, t.ndim, t.size) == ((2, 3), 2, 6)
    assert not np.shares_memory(t.copy().data, t.data)


# ---- gradients that are shared, missing or wrong -----------------------------------------------------------

def test_differentiable_gradients_of_several_leaves_share_no_memory():
    a, b, seed = leaf(1.0, 2.0), leaf(3.0, 4.0), Tensor(np.array([1.0, 1.0]))
    (a + b).backward(gradient=seed, create_graph=True)
    np.sum(a * 3).backward()
    np.testing.assert_array_equal(a.grad.numpy(), [4, 4])
    np.testing.assert_array_equal(b.grad.numpy(), [1, 1])
    np.testing.assert_array_equal(seed.numpy(), [1, 1])


def test_a_vjp_with_too_few_gradients_is_named():
    @op()
    def lame(x, y):
        return x * y, lambda g: g * y

    with pytest.raises(TypeError, match="the vjp of 'lame' gave nothing for argument 1, which requires"):
        lame(leaf(1.0), leaf(2.0)).backward()

    @op()
    def floating(x):
        return 2 * x, lambda g: 2.0

    with pytest.raises(TypeError, match="the vjp of 'floating' gave a float for argument 0"):
        floating(leaf(1.0)).backward()


def test_an_op_that_returns_no_vjp_or_integers_is_named():
    @op()
    def forgetful(x):
        return x * 2

    @op()
    def counting(x):
        return np.ones(x.shape, int), lambda g: g

    with pytest.raises(TypeError, match="forgetful: an op returns its value and its vjp"):
        forgetful(leaf(1.0, 2.0))
    with pytest.raises(TypeError, match="counting: the value is an array of int64"):
        counting(leaf(1.0))


def test_comparing_with_a_number_is_an_error_as_equality_is_identity():
    x = leaf(1.0, 0.0)
    for wrong in (0, 1.0, np.float32(0), np.zeros(2)):
        with pytest.raises(TypeError, match=r"==: a Tensor is equal to itself alone.*np.equal"):
            x == wrong       # noqa: B015
        with pytest.raises(TypeError, match=r"np\.equal"):
            x != wrong       # noqa: B015
    assert x != None and x != "x" and not (x == x.detach())      # noqa: E711


def test_the_gradient_of_what_depends_on_nothing_is_zeros():
    x = leaf(1.0, 2.0)
    dx, = grad(np.sum(2 * x), x, create_graph=True)
    np.testing.assert_array_equal(grad(np.sum(dx), x)[0].numpy(), [0, 0])


def test_a_gradient_that_is_written_into_between_two_walks_is_taken_as_it_is():
    x, weight = (Tensor(np.ones((2, 3)), requires_grad=True) for _ in range(2))
    y = linear(x, weight, activation="relu2") + 1.0
    g = np.zeros((2, 2))
    found = []
    for i in range(2):
        g[:] = 0
        g[i, 0] = 1
        found.append(grad(y, x, g, retain_graph=True)[0].numpy())
    assert found[0][0].any() and found[1][1].any() and not found[0][1].any() and not found[1][0].any()
