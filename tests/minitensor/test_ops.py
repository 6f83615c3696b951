"""Every op in one table, run through value, dtype, layout, first and second gradient, and against PyTorch."""
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitensor.linalg
import minitensor.ops
import minitensor.shape
from minitensor.ops import erf, logsumexp, relu, sigmoid
from minitensor.shape import scatter
from minitensor.tensor import Tensor, grad
from minitensor.testing import gradcheck, strategies
from tests.minitensor.gradients import gradients

FEW = settings(max_examples=6)
ANY = strategies.shapes(max_dims=2, min_side=0).map(lambda shape: (shape,))
PAIR = strategies.broadcastable_shapes(2, max_dims=2, min_side=0)
CUBE = strategies.shapes(min_dims=3, max_dims=3, min_side=1, max_side=2).map(lambda shape: (shape,))
MASK = np.array([[True, False, True]])
ROWS = np.array([[1, -1], [0, 1]])


def fixed(*shapes: tuple[int, ...]) -> st.SearchStrategy:
    return st.just(shapes)


class Case(NamedTuple):
    """An op, the domain in which it is smooth, and PyTorch's name for it (t is the torch module)."""
    name: str
    f: Callable
    torch: Callable | None = None
    shapes: st.SearchStrategy = ANY
    low: float = -2
    high: float = 2
    away_from: tuple = ()
    distinct: bool = False
    gap: float = 1 / 64

    def arrays(self, shapes, dtype=np.float64):
        """One array for each shape, drawn as one, so that `distinct` holds between operands too."""
        sizes = [math.prod(shape) for shape in shapes]
        whole = strategies.arrays((sum(sizes),), dtype, self.low, self.high, self.away_from,
                                  gap=self.gap, distinct=self.distinct)
        bounds = np.cumsum(sizes)[:-1]
        return whole.map(lambda flat: [part.reshape(shape) for part, shape in
                                       zip(np.split(flat, bounds), shapes, strict=True)])


CASES = [
    # elementwise
    Case("add", np.add, lambda t, x, y: x + y, PAIR),
    Case("add scalar", lambda x: 2 + x + 1.5, lambda t, x: x + 3.5),
    Case("subtract", np.subtract, lambda t, x, y: x - y, PAIR),
    Case("subtract from scalar", lambda x: 2 - x, lambda t, x: 2 - x),
    Case("multiply", np.multiply, lambda t, x, y: x * y, PAIR),
    Case("divide", np.divide, lambda t, x, y: x / y, PAIR, 0.25, 2),
    Case("divide scalar", lambda x: 3 / x, lambda t, x: 3 / x, low=0.25),
    Case("power", np.power, lambda t, x, y: x ** y, PAIR, 0.25, 2),
    Case("power 0", lambda x: x ** 0, lambda t, x: x ** 0),
    Case("power 1", lambda x: x ** 1, lambda t, x: x ** 1),
    Case("power 2", lambda x: x ** 2, lambda t, x: x ** 2),
    Case("power 3.0", lambda x: x ** 3.0, lambda t, x: x ** 3.0),
    Case("power -1.5", lambda x: x ** -1.5, lambda t, x: x ** -1.5, low=0.25),
    Case("power of scalar", lambda x: 2 ** x, lambda t, x: 2 ** x),
    Case("negative", np.negative, lambda t, x: -x),
    Case("abs", np.abs, lambda t, x: abs(x), away_from=(0,)),
    Case("square", np.square, lambda t, x: t.square(x)),
    Case("sqrt", np.sqrt, lambda t, x: t.sqrt(x), low=0.25),
    Case("reciprocal", np.reciprocal, lambda t, x: t.reciprocal(x), low=0.25),
    Case("exp", np.exp, lambda t, x: t.exp(x)),
    Case("expm1", np.expm1, lambda t, x: t.expm1(x)),
    Case("log", np.log, lambda t, x: t.log(x), low=0.25),
    Case("log1p", np.log1p, lambda t, x: t.log1p(x), low=-0.5),
    Case("sin", np.sin, lambda t, x: t.sin(x)),
    Case("cos", np.cos, lambda t, x: t.cos(x)),
    Case("tanh", np.tanh, lambda t, x: t.tanh(x)),
    Case("sigmoid", sigmoid, lambda t, x: t.sigmoid(x)),
    Case("erf", erf, lambda t, x: t.erf(x)),
    Case("relu", relu, lambda t, x: t.relu(x), away_from=(0,)),
    Case("maximum", np.maximum, lambda t, x, y: t.maximum(x, y), PAIR, distinct=True),
    Case("minimum", np.minimum, lambda t, x, y: t.minimum(x, y), PAIR, distinct=True),
    Case("maximum scalar", lambda x: np.maximum(x, 0.5), lambda t, x: x.clamp(min=0.5), away_from=(0.5,)),
    Case("where", lambda x, y: np.where(MASK, x, y), lambda t, x, y: t.where(t.tensor(MASK), x, y),
         fixed((2, 3), (2, 1))),
    Case("where scalar", lambda x: np.where(MASK, x, 0.5), lambda t, x: t.where(t.tensor(MASK), x, 0.5),
         fixed((2, 3))),
    Case("clip", lambda x: np.clip(x, -0.5, 1), lambda t, x: t.clamp(x, -0.5, 1), away_from=(-0.5, 1)),
    Case("clip below", lambda x: np.clip(x, 0, None), lambda t, x: t.clamp(x, 0), away_from=(0,)),
    Case("clip above", lambda x: np.clip(x, max=0), lambda t, x: t.clamp(x, max=0), away_from=(0,)),
    Case("clip tensors", np.clip, lambda t, x, a, b: t.clamp(x, a, b), fixed((2, 3), (3,), (2, 1)),
         distinct=True),
    Case("copy", np.copy, lambda t, x: t.clone(x)),
    # reductions
    Case("sum", np.sum, lambda t, x: t.sum(x)),
    Case("sum axis", lambda x: np.sum(x, 1), lambda t, x: t.sum(x, 1), CUBE),
    Case("sum axes", lambda x: np.sum(x, axis=(0, -1), keepdims=True),
         lambda t, x: t.sum(x, (0, -1), keepdim=True), CUBE),
    Case("mean", lambda x: np.mean(x, axis=-1, keepdims=True), lambda t, x: t.mean(x, -1, True), CUBE),
    Case("var", lambda x: np.var(x, axis=(0, 2)), lambda t, x: t.var(x, (0, 2), correction=0), CUBE),
    Case("std", lambda x: np.std(x, axis=1), lambda t, x: t.std(x, 1, correction=0), fixed((2, 3)),
         distinct=True, gap=0.25),
    Case("max", np.max, lambda t, x: t.amax(x), CUBE, distinct=True),
    Case("max axis", lambda x: np.max(x, axis=1), lambda t, x: t.amax(x, 1), CUBE, distinct=True),
    Case("amin axes", lambda x: np.amin(x, axis=(0, 2), keepdims=True),
         lambda t, x: t.amin(x, (0, 2), keepdim=True), CUBE, distinct=True),
    Case("prod", np.prod, lambda t, x: t.prod(x)),
    Case("prod axis", lambda x: np.prod(x, axis=1, keepdims=True), lambda t, x: t.prod(x, 1, keepdim=True),
         fixed((2, 5, 2))),
    Case("logsumexp", logsumexp, lambda t, x: t.logsumexp(x, tuple(range(x.ndim))), CUBE),
    Case("logsumexp axis", lambda x: logsumexp(x, axis=(0, -1), keepdims=True),
         lambda t, x: t.logsumexp(x, (0, -1), keepdim=True), CUBE),
    Case("cumsum", np.cumsum, lambda t, x: t.cumsum(x.ravel(), 0)),
    Case("cumsum axis", lambda x: np.cumsum(x, axis=-2), lambda t, x: t.cumsum(x, -2), CUBE),
    # shape
    Case("reshape", lambda x: np.reshape(x, (4, -1)), lambda t, x: x.reshape(4, -1), fixed((2, 3, 2))),
    Case("ravel", np.ravel, lambda t, x: x.ravel()),
    Case("transpose", np.transpose, lambda t, x: x.permute(tuple(reversed(range(x.ndim))))),
    Case("transpose axes", lambda x: np.transpose(x, (-1, 0, 1)), lambda t, x: x.permute(-1, 0, 1), CUBE),
    Case("swapaxes", lambda x: np.swapaxes(x, 0, -1), lambda t, x: x.swapaxes(0, -1), CUBE),
    Case("moveaxis", lambda x: np.moveaxis(x, 0, -1), lambda t, x: x.moveaxis(0, -1), CUBE),
    Case("expand_dims", lambda x: np.expand_dims(x, -1), lambda t, x: x.unsqueeze(-1)),
    Case("squeeze", np.squeeze, lambda t, x: x.squeeze(), CUBE),
    Case("squeeze axis", lambda x: np.squeeze(x, axis=1), lambda t, x: x.squeeze(1), fixed((2, 1, 1))),
    Case("broadcast_to", lambda x: np.broadcast_to(x, (2, 2, 3)), lambda t, x: x.expand(2, 2, 3),
         fixed((2, 1))),
    Case("flip", lambda x: np.flip(x, axis=(0, 2)), lambda t, x: x.flip(0, 2), CUBE),
    Case("concatenate", lambda x, y: np.concatenate([x, y], axis=1), lambda t, x, y: t.cat([x, y], 1),
         fixed((2, 3), (2, 2))),
    Case("concatenate flat", lambda x, y: np.concatenate([x, y], axis=None),
         lambda t, x, y: t.cat([x.ravel(), y.ravel()]), fixed((2, 3), (2,))),
    Case("concatenate twice", lambda x: np.concatenate([x, np.ones((1, 3)).astype(x.dtype), x]),
         lambda t, x: t.cat([x, t.ones(1, 3, dtype=x.dtype), x]), fixed((2, 3))),
    Case("stack", lambda x, y: np.stack([x, y], axis=-1), lambda t, x, y: t.stack([x, y], -1),
         fixed((2, 3), (2, 3))),
    Case("split", lambda x: np.concatenate(np.split(x, [1, 3], axis=1)[::2], axis=1),
         lambda t, x: t.cat([x[:, :1], x[:, 3:]], 1), fixed((2, 5))),
    Case("pad", lambda x: np.pad(x, ((1, 0), (2, 1))), lambda t, x: t.nn.functional.pad(x, (2, 1, 1, 0)),
         fixed((2, 3))),
    Case("pad ones", lambda x: np.pad(x, 1, constant_values=1),
         lambda t, x: t.nn.functional.pad(x, (1, 1, 1, 1), value=1), fixed((2, 3))),
    Case("repeat", lambda x: np.repeat(x, 2, axis=1), lambda t, x: x.repeat_interleave(2, 1), fixed((2, 3))),
    Case("repeat each", lambda x: np.repeat(x, [1, 0, 3], axis=-1),
         lambda t, x: x.repeat_interleave(t.tensor([1, 0, 3]), -1), fixed((2, 3))),
    Case("tile", lambda x: np.tile(x, (2, 1, 3)), lambda t, x: t.tile(x, (2, 1, 3)), fixed((2, 3))),
    Case("tril", lambda x: np.tril(x, -1), lambda t, x: t.tril(x, -1), CUBE),
    Case("triu", lambda x: np.triu(x, 1), lambda t, x: t.triu(x, 1), CUBE),
    Case("slices", lambda x: x[::-2, None, ..., 1:], lambda t, x: x.flip(0)[::2, None, ..., 1:],
         fixed((3, 2, 3))),
    Case("integer array", lambda x: x[ROWS, ..., 1], lambda t, x: x[t.tensor(ROWS), ..., 1], fixed((2, 3))),
    Case("boolean array", lambda x: x[:, MASK[0]], lambda t, x: x[:, t.tensor(MASK[0])], fixed((2, 3))),
    Case("scatter", lambda g: scatter(g, (ROWS,), (3, 2)),
         lambda t, g: t.zeros(3, 2, dtype=g.dtype).index_put((t.tensor(ROWS),), g, accumulate=True),
         fixed((2, 2, 2))),
    # linear algebra
    Case("matmul", np.matmul, lambda t, x, y: x @ y, fixed((2, 3), (3, 2))),
    Case("matmul vectors", np.matmul, lambda t, x, y: x @ y, fixed((3,), (3,))),
    Case("matmul row", np.matmul, lambda t, x, y: x @ y, fixed((3,), (2, 3, 2))),
    Case("matmul column", np.matmul, lambda t, x, y: x @ y, fixed((2, 2, 3), (3,))),
    Case("matmul weight", np.matmul, lambda t, x, y: x @ y, fixed((2, 2, 3), (3, 2))),
    Case("matmul batch right", np.matmul, lambda t, x, y: x @ y, fixed((2, 3), (2, 3, 2))),
    Case("matmul batches", np.matmul, lambda t, x, y: x @ y, fixed((2, 1, 2, 3), (2, 3, 1))),
    Case("matmul empty", np.matmul, lambda t, x, y: x @ y, fixed((2, 3, 0), (0, 2))),
    Case("dot", np.dot, lambda t, x, y: x @ y, fixed((2, 3), (3,))),
    Case("outer", np.outer, lambda t, x, y: t.outer(x, y), fixed((3,), (2,))),
]
EINSUMS = [
    ("ij,jk->ik", (2, 3), (3, 2)), ("ij,jk", (2, 3), (3, 2)), ("ba", (2, 3)), ("ij->", (2, 3)),
    ("ii", (3, 3)), ("ii->i", (3, 3)), ("iji->j", (2, 3, 2)), ("i...->...", (2, 3)),
    ("i,i", (3,), (3,)), ("i,i->i", (3,), (3,)), ("i,j->ij", (2,), (3,)), ("ij,k->i", (2, 3), (2,)),
    ("bhtd,bhsd->bhts", (2, 1, 3, 2), (2, 1, 2, 2)), ("...ij,...jk->...ik", (2, 1, 2), (1, 2, 3)),
    ("ij,jk,kl->il", (2, 3), (3, 2), (2, 2)), ("ij,ij,ij->j", (2, 3), (2, 3), (2, 3)),
    (",ij->ji", (), (2, 3)),
]
CASES += [Case(f"einsum {subscripts}", lambda *x, s=subscripts: np.einsum(s, *x),
               lambda t, *x, s=subscripts: t.einsum(s, *x), fixed(*shapes))
          for subscripts, *shapes in EINSUMS]

cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@cases
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data())
@FEW
def test_value_is_numpys_and_dtype_is_kept(case, dtype, data):
    arrays = data.draw(case.arrays(data.draw(case.shapes), dtype))
    y, dxs, _ = gradients(case.f, arrays)
    expected = np.asarray(case.f(*arrays))
    assert y.shape == expected.shape and y.dtype == dtype == expected.dtype
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-6 if dtype == np.float32 else 1e-14, atol=1e-14)
    for x, dx in zip(arrays, dxs, strict=True):
        assert dx.shape == x.shape and dx.dtype == dtype


@cases
@given(data=st.data())
@FEW
def test_first_and_second_gradient(case, data):
    gradcheck(case.f, *data.draw(case.arrays(data.draw(case.shapes))), name=case.name)


THIRD = ["power", "divide", "exp", "tanh", "sigmoid", "erf", "std", "prod axis", "logsumexp axis",
         "integer array", "matmul weight", "einsum ij,ij,ij->j"]


@pytest.mark.parametrize("case", [case for case in CASES if case.name in THIRD], ids=lambda case: case.name)
@given(data=st.data())
@settings(max_examples=3)
def test_third_gradient(case, data):
    arrays = data.draw(case.arrays(data.draw(case.shapes)))
    gradcheck(case.f, *arrays, order=3, rtol=1e-5, name=case.name)


def test_the_table_has_every_primitive():
    """So that each has been through the second-order check; astype alone changes the dtype."""
    gradcheck(lambda x: x.astype(np.float64) ** 3, [0.5, -1.0])
    primitives = {f.__name__ for module in (minitensor.ops, minitensor.shape, minitensor.linalg)
                  for f in vars(module).values() if hasattr(f, "body")}
    ran = {"astype"}

    def seen(case):
        @given(case.shapes.flatmap(case.arrays))
        @settings(max_examples=1)
        def one(arrays):
            ran.update(ops_below(case.f(*(Tensor(x, requires_grad=True) for x in arrays))))
        return one
    for case in CASES:
        seen(case)()
    assert ran == primitives
    assert {case.name for case in CASES} >= set(THIRD)


def ops_below(y):
    if y.node is None:
        return set()
    return {y.node.op.__name__}.union(*(ops_below(x) for x in y.node.inputs if isinstance(x, Tensor)))


@cases
@pytest.mark.parametrize("view", [
    lambda x: np.moveaxis(np.moveaxis(x, 0, -1).copy(), -1, 0),
    lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    lambda x: np.flip(np.flip(x).copy()),
], ids=["transposed", "stepped", "reversed"])
@given(data=st.data())
@settings(max_examples=2)
def test_layout_does_not_matter(case, view, data):
    arrays = data.draw(case.arrays(data.draw(case.shapes)))
    views = [view(x) if x.ndim else x for x in arrays]
    y, dxs, _ = gradients(case.f, arrays)
    y_view, dxs_view, _ = gradients(case.f, views)
    for ours, theirs in zip([y, *dxs], [y_view, *dxs_view], strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-12, atol=1e-14)


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-10)])
@given(data=st.data())
@settings(max_examples=3)
def test_value_and_gradient_are_pytorchs(case, dtype, tolerance, data):
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    arrays = data.draw(case.arrays(data.draw(case.shapes), dtype))
    y, dxs, weights = gradients(case.f, arrays)
    inputs = [torch.tensor(x, requires_grad=True) for x in arrays]
    expected = case.torch(torch, *inputs)
    (expected * torch.tensor(weights)).sum().backward()
    pairs = [(y, expected.detach()), *((dx, x.grad) for dx, x in zip(dxs, inputs, strict=True))]
    for ours, theirs in pairs:
        theirs = np.zeros(ours.shape) if theirs is None else theirs.numpy()
        largest = np.max(np.abs(theirs), initial=1e-30)
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=tolerance * largest)


# ---- reductions over every axis, every index ---------------------------------------------------------------

@pytest.mark.parametrize("reduce", [np.sum, np.mean, np.var, np.prod, np.max, np.min, logsumexp])
@given(data=st.data())
@FEW
def test_reductions_take_every_axis(reduce, data):
    x = data.draw(strategies.arrays(strategies.shapes(max_side=2), distinct=True))
    axis, keepdims = data.draw(strategies.axes(x.ndim)), data.draw(st.booleans())
    y = reduce(Tensor(x), axis=axis, keepdims=keepdims)
    np.testing.assert_allclose(y.numpy(), reduce(x, axis=axis, keepdims=keepdims), rtol=1e-13)
    gradcheck(lambda x: reduce(x, axis=axis, keepdims=keepdims), x)


@given(data=st.data())
@settings(max_examples=60)
def test_getitem_takes_every_index(data):
    x = data.draw(strategies.shapes(min_side=0).flatmap(strategies.arrays))
    index = data.draw(strategies.indices(x.shape))
    y, (dx,), weights = gradients(lambda x: x[index], [x])
    np.testing.assert_array_equal(y.numpy(), x[index])
    expected = np.zeros_like(x)
    np.add.at(expected, index, weights)
    np.testing.assert_allclose(dx.numpy(), expected, rtol=1e-14)


def test_getitem_adds_the_gradients_of_what_is_taken_twice():
    x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
    np.sum(x[[0, 2, 2, -1]] * np.array([1, 10, 100, 1000])).backward()
    np.testing.assert_array_equal(x.grad.numpy(), [1, 0, 1110])
    gradcheck(lambda x: x[[0, 2, 2, -1]] ** 3, [0.5, 1.0, -1.5])


@pytest.mark.parametrize("index", [
    ((0, 0, 2),), (slice(None), [1, 1]), (ROWS, np.array(1)), (np.int64(2), -1), (MASK[0], [0, 1]), True,
    (1, None, ..., slice(None, None, -1)),
])
def test_getitem_takes_numpys_odder_indices(index):
    x = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(Tensor(x)[index].numpy(), x[index])
    gradcheck(lambda x: x[index] ** 2, x)


def test_getitem_refuses_tensors_and_floats_as_indices():
    x = Tensor([1.0, 2.0])
    for index in (Tensor([0.0]), (None, Tensor([0.0])), np.array([0.0], np.float32), np.array([0.0])):
        with pytest.raises(IndexError, match="getitem: an index is a Tensor or an array of floats"):
            x[index]
    with pytest.raises(IndexError, match=r"index 2 is out of range for axis 0 of x, which is \(2,\)"):
        x[2]


# ---- where derivatives are easily wrong --------------------------------------------------------------------

def first_and_second(f, x):
    x = Tensor(np.array(x), requires_grad=True)
    dx, = grad(np.sum(f(x)), x, create_graph=True)
    second = grad(np.sum(dx), x)[0].numpy() if dx.requires_grad else np.zeros(x.shape)
    return dx.numpy().tolist(), second.tolist()


@pytest.mark.parametrize(("exponent", "first", "second"), [
    (0, [0, 0], [0, 0]), (1, [1, 1], [0, 0]), (2, [0, 4], [2, 2]), (3, [0, 12], [0, 12]),
    (2.0, [0, 4], [2, 2]), (np.array([0, 2]), [0, 4], [0, 2]), (np.array([1.0, 0.0]), [1, 0], [0, 0]),
    (Tensor(np.array([0.0, 2.0])), [0, 4], [0, 2]),
])
def test_power_at_zero(exponent, first, second):
    assert first_and_second(lambda x: x ** exponent, [0.0, 2.0]) == (first, second)


def test_power_at_zero_has_no_gradient_for_the_exponent_and_no_warning():
    x, y = Tensor([0.0, 0.0, 1.0], True), Tensor([0.0, 2.0, 2.0], True)
    dx, dy = grad(np.sum(x ** y), (x, y), create_graph=True)
    assert dx.numpy().tolist() == [0, 0, 2] and dy.numpy().tolist() == [0, 0, 0]
    assert grad(np.sum(dy), y)[0].numpy().tolist() == [0, 0, 0]
    x, y = Tensor([0.0, -2.0], True), Tensor([0.5, 2.0], True)
    dx, dy = grad(np.sum(x ** y), (x, y))
    np.testing.assert_array_equal(dx.numpy(), [np.inf, -4])
    np.testing.assert_array_equal(dy.numpy(), [0, np.nan])      # for a negative base there is none


def test_ties_share_the_gradient():
    x, y = Tensor([1.0, 2.0, 3.0], True), Tensor([1.0, 3.0, 2.0], True)
    for f, expected in ((np.maximum, [0.5, 0, 1]), (np.minimum, [0.5, 1, 0])):
        dx, dy = grad(np.sum(f(x, y)), (x, y))
        assert dx.numpy().tolist() == expected and dy.numpy().tolist() == [1 - g for g in expected]
    x = Tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]], True)
    np.testing.assert_allclose(grad(np.sum(np.max(x, axis=1)), x)[0].numpy(), [[0, 0.5, 0.5], [1 / 3] * 3])
    np.testing.assert_allclose(grad(np.min(x[1]), x)[0].numpy(), [[0, 0, 0], [1 / 3] * 3])


@pytest.mark.parametrize("zeros", [[], [0], [0, 3], [0, 1, 3]])
def test_prod_with_zeros(zeros):
    x = np.array([1.5, -2.0, 0.5, 3.0])
    x[zeros] = 0
    gradcheck(np.prod, x)
    others = [np.prod(np.delete(x, i)) for i in range(4)]
    np.testing.assert_allclose(first_and_second(np.prod, x)[0], others)


def test_std_of_equal_numbers_has_gradient_zero():
    assert first_and_second(lambda x: np.std(x, axis=1), [[2.0, 2.0], [1.0, 3.0]])[0] == [[0, 0], [-0.5, 0.5]]
    assert first_and_second(np.std, [2.0, 2.0]) == ([0, 0], [0, 0])


def test_clip_passes_the_gradient_at_the_boundary():
    x = Tensor([-2.0, -1.0, 0.0, 1.0, 2.0], True)
    assert grad(np.sum(np.clip(x, -1, 1)), x)[0].numpy().tolist() == [0, 1, 1, 1, 0]
    assert grad(np.sum(x.clip(max=1)), x)[0].numpy().tolist() == [1, 1, 1, 1, 0]
    low = Tensor(0.0, True)
    assert grad(np.sum(np.clip(x, low, 1)), low)[0].item() == 2


def test_logsumexp_of_masks_and_of_large_numbers():
    x = Tensor([[-np.inf, 1.0, 1.0], [-np.inf] * 3, [1000.0, 1000.0, -1000.0]], True)
    y = logsumexp(x, axis=1)
    np.testing.assert_allclose(y.numpy(), [1 + np.log(2), -np.inf, 1000 + np.log(2)], rtol=1e-6)
    dx, = grad(np.sum(y[::2]) + np.sum(y[1:2]), x, create_graph=True)
    np.testing.assert_allclose(dx.numpy(), [[0, 0.5, 0.5], [0, 0, 0], [0.5, 0.5, 0]], atol=1e-7)
    second, = grad(np.sum(dx[:, 1]), x)
    np.testing.assert_allclose(second.numpy(), [[0, 0.25, -0.25], [0, 0, 0], [-0.25, 0.25, 0]], atol=1e-7)
    assert logsumexp(np.zeros((0, 2))) == -np.inf


def test_sigmoid_neither_overflows_nor_cancels():
    x = Tensor([-1000.0, -80.0, 0.0, 1000.0], True)
    y = sigmoid(x)
    np.testing.assert_allclose(y.numpy(), [0, np.exp(-80), 0.5, 1], rtol=1e-5)
    dx, = grad(np.sum(y), x, create_graph=True)
    np.testing.assert_allclose(dx.numpy(), [0, np.exp(-80), 0.25, 0], rtol=1e-5)
    gradcheck(sigmoid, [0.0])


def test_erf_is_exact():
    x = np.linspace(-6, 6, 1001)
    np.testing.assert_array_equal(erf(x), [math.erf(v) for v in x])


def test_gradient_of_a_masked_infinity_is_zero():
    x = Tensor([0.0, 2.0], True)
    y = np.where(np.greater(x, 0), np.log(np.where(np.greater(x, 0), x, 1)), 0)
    assert grad(np.sum(y), x)[0].numpy().tolist() == [0, 0.5]
    x = Tensor([-1.0, 1.0], True)
    assert grad(np.sum(relu(x)), x)[0].numpy().tolist() == [0, 1]


# ---- joining, splitting, casting ---------------------------------------------------------------------------

def test_split_gives_numpys_parts():
    x = np.arange(14.0).reshape(2, 7)
    for split, sections in ((np.split, [2, 5]), (np.split, 7), (np.array_split, 3), (np.split, [3, 9])):
        parts, expected = split(Tensor(x), sections, axis=1), split(x, sections, axis=1)
        assert [p.shape for p in parts] == [p.shape for p in expected]
        assert all(np.array_equal(p.numpy(), e) for p, e in zip(parts, expected, strict=True))
    with pytest.raises(ValueError, match="equal division"):
        np.split(Tensor(x), 2, axis=1)


def test_what_is_no_tensor_follows_the_tensor():
    x = Tensor([[1.0, 2.0]])
    i = np.array([[1, 2]])
    for y in (np.where(x > 1, x, i), np.where(x > 1, x, np.float64(0.1)), np.stack([x, [[1, 2]]]),
              np.concatenate([x, i]), np.clip(x, i, 2), i @ x.T, np.einsum("ij,j", x, [1, 2]),
              np.outer(x, [True, False])):
        assert y.dtype == np.float32
    for mixed in (lambda: np.where(x > 1, x, np.ones((1, 2))), lambda: np.concatenate([x, np.ones((1, 2))]),
                  lambda: x @ np.ones(2), lambda: np.einsum("ij,j", x, np.ones(2))):
        with pytest.raises(TypeError, match="float32 and float64 are mixed"):
            mixed()


def test_astype_converts_the_gradient_back():
    x = Tensor([1.0, 2.0], True)
    y = np.astype(x, np.float64) * Tensor(np.array([3.0, 4.0]))
    assert y.dtype == np.float64
    np.sum(y).backward()
    assert x.grad.dtype == np.float32 and x.grad.numpy().tolist() == [3, 4]
    with pytest.raises(TypeError, match="astype: a Tensor holds float32 or float64, not int64"):
        x.astype(np.int64)


def test_zeros_like_are_constants():
    x = Tensor([1.0, 2.0], True)
    for like, value in ((np.zeros_like, 0), (np.ones_like, 1)):
        assert isinstance(like(x), Tensor) and not like(x).requires_grad
        assert like(x).dtype == np.float32 and like(x).numpy().tolist() == [value, value]
    assert np.full_like(x, 7).numpy().tolist() == [7, 7]


def test_functions_without_a_derivative_give_plain_arrays_or_constants():
    t = Tensor([1.5, -2.0, np.inf, np.nan])
    x = t.numpy()
    for f in (np.isfinite, np.isnan, np.isinf, np.argsort, np.argmax, np.argmin,
              np.any, np.all, np.shape, np.ndim, np.size, np.count_nonzero):
        assert not isinstance(f(t), Tensor)
        np.testing.assert_array_equal(f(t), f(x))
    for f in (np.sign, np.floor, np.ceil, np.round, np.rint, np.ones_like, np.zeros_like):
        y = f(Tensor(x, requires_grad=True))
        assert isinstance(y, Tensor) and not y.requires_grad and y.dtype == t.dtype
        np.testing.assert_array_equal(y.numpy(), f(x))
        with pytest.raises(TypeError, match="dtype= is not for Tensors"):
            np.zeros_like(t, dtype=bool)
    for f in (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal, np.isclose):
        assert isinstance(f(t, 1.0), np.ndarray) and f(t, 1.0).dtype == bool
        np.testing.assert_array_equal(f(1.5, t), f(1.5, x))
    assert np.array_equal(t[:2], x[:2]) and np.allclose(t[:2], t[:2])


# ---- errors ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("x", "y", "message"), [
    ((4, 3), (5, 2), r"matmul: inner sizes differ: x is \(4, 3\), y is \(5, 2\); x.shape\[-1\] must equal"),
    ((4, 3), (2,), r"inner sizes differ: x is \(4, 3\), y is \(2,\); x.shape\[-1\] must equal y.shape\[0\]"),
    ((2, 4, 3), (3, 3, 2), r"leading axes do not broadcast: x is \(2, 4, 3\), y is \(3, 3, 2\)"),
    ((), (3, 2), r"matmul: x is \(\), y is \(3, 2\); to scale by a number, use \*"),
])
def test_matmul_says_what_does_not_fit(x, y, message):
    with pytest.raises(ValueError, match=message):
        np.matmul(Tensor(np.ones(x)), Tensor(np.ones(y)))


@pytest.mark.parametrize(("subscripts", "message"), [
    ("ij,jk->ik", "there are 2 terms and 1 operands"), ("ij->k", "the output names 'k' and no operand does"),
    ("ij->ii", "the output names 'i' twice"), ("i->i", "'i' does not name the 2 axes"),
    ("ij.->i", "more than letters"), ("ii->i", "axis 'i' has lengths 2 and 3"),
    ("i...->i", "the output has no"),
])
def test_einsum_says_what_does_not_fit(subscripts, message):
    with pytest.raises(ValueError, match=message):
        np.einsum(subscripts, Tensor(np.ones((2, 3))))


def test_einsum_wants_a_string():
    with pytest.raises(TypeError, match="give a string, as in 'ij,jk->ik'"):
        np.einsum(Tensor(np.ones(2)), [0])


@pytest.mark.parametrize(("reduce", "options"), [
    (np.sum, "where dtype out initial"), (np.prod, "where dtype out initial"), (np.max, "where out initial"),
    (np.min, "where out initial"), (np.mean, "where dtype out"), (np.var, "where dtype out ddof"),
    (np.std, "where dtype out ddof"),
])
def test_reductions_refuse_numpys_other_options(reduce, options):
    for option in options.split():
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            reduce(Tensor([1.0, 2.0]), **{option: np.array([True, True])})


def test_shape_errors_are_numpys():
    x = Tensor(np.ones((2, 3)))
    for wrong in (lambda: np.reshape(x, (4, 2)), lambda: np.sum(x, axis=2), lambda: np.squeeze(x, axis=0),
                  lambda: np.concatenate([x, x[:, :2]]), lambda: np.broadcast_to(x, (3, 3)),
                  lambda: x + x[:, :2], lambda: np.max(x[:0])):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(ValueError, match="pad: mode is 'reflect'; only 'constant'"):
        np.pad(x, 1, mode="reflect")


def test_every_public_op_says_what_it_does():
    for module in (minitensor.ops, minitensor.shape, minitensor.linalg):
        for name, function in vars(module).items():
            if callable(function) and function.__module__ == module.__name__ and not name.startswith("_"):
                assert function.__doc__, f"{module.__name__}.{name} has no docstring"


def test_log_of_zero_warns_as_numpy_does():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert np.log(Tensor(0.0)).item() == -np.inf
    assert "divide by zero" in str(caught[0].message)
