"""Every fused op in one table, run against its reference, finite differences and PyTorch."""
import contextlib
import functools
import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitensor
from kernels import dropout_mask, flat_mask, get_num_threads, set_num_threads
from minitensor import (
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
from minitensor.tensor import Tensor, fused, grad, no_grad, unfused
from minitensor.testing import gradcheck
from tests.minitensor.gradients import gradients

module = importlib.import_module("minitensor.fused")        # `minitensor.fused` is the decorator
TINY, SMALL, LARGE = 2, 4, 70                               # the longest axes that are drawn
dtypes = pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-5)],
                                 ids=["float64", "float32"])


# ---- what is drawn for each: shapes and options; size() draws a length from 1 up, size(0) from 0 up --------

def leading(draw, size):
    """No axis, one or two in front of those that an op is about, and now and then no rows at all."""
    return tuple(size(0) for _ in range(draw(st.integers(0, 2))))


def anything(draw, size):
    return [leading(draw, size)], {}


def linear_shapes(draw, size, bias=False):
    inputs, outputs = size(), size()
    return [(*leading(draw, size), inputs), (outputs, inputs), (outputs,)][:2 + bias], {}


def layernorm_shapes(draw, size, bias=False):
    width = size() + 2                  # two numbers become ±1, and what is left of the gradient is rounding
    return [(*leading(draw, size), width), (width,), (width,)][:2 + bias], {}


def axis_shapes(draw, size):
    lengths, axis = [*leading(draw, size), size(0)], draw(st.integers(-3, 2))
    axis = max(-len(lengths), min(axis, len(lengths) - 1))
    lengths[axis] = size()
    return [tuple(lengths)], {"axis": axis}


def attention_shapes(draw, size):
    heads, width = min(3, size()), size()
    batch, time = min(2, size(0)), 1 + size(0)
    return [(batch, time, 3 * heads * width)], {"heads": heads}


def cross_attention_shapes(draw, size, causal=False):
    heads, width = min(3, size()), size()
    batch, time, keys = min(2, size(0)), 2 + size(0), 3 + size(0)     # of one key, dq is rounding alone
    time = min(time, keys) if causal else time
    return [(batch, time, heads * width), (batch, keys, 2 * heads * width)], {"heads": heads}


def masked(shapes):
    """The same shapes, with a mask of keys among the options; where causal, some queries see no key."""
    def with_mask(draw, size):
        drawn, options = shapes(draw, size)
        random = np.random.default_rng(draw(st.integers(0, 1000)))
        mask = random.random(drawn[-1][:2]) < 0.4
        mask[:, -2:] = True
        return drawn, {**options, "mask": mask}
    return with_mask


def rotary_shapes(draw, size):
    """Heads of even width, and a queries-and-keys norm in every second case."""
    (batch, time, width), options = (value := attention_shapes(draw, size))[0][0], value[1]
    eps, start = draw(st.sampled_from([None, 1e-6])), draw(st.integers(0, 40))
    return [(batch, time, 2 * width)], {**options, "eps": eps, "start": start}


def dropped(shapes):
    """The same shapes, with a probability and a seed among the options."""
    def with_dropout(draw, size):
        drawn, options = shapes(draw, size)
        p, seed = draw(st.sampled_from([0.1, 0.5, 0.9])), draw(st.integers(0, 2**64 - 1))
        return drawn, {**options, "p": p, "seed": seed}
    return with_dropout


def embedding_shapes(draw, size):
    rows, shape = size(), leading(draw, size)
    ids = np.random.default_rng(0).integers(rows, size=shape)
    return [(rows, size())], {"ids": ids.astype(draw(st.sampled_from([np.int32, np.int64, np.uint8])))}


def cross_entropy_shapes(draw, size):
    symbols, shape = size(), leading(draw, size)
    targets = np.array(np.random.default_rng(0).integers(-1, symbols, size=shape))
    return [(*shape, symbols)], {"targets": targets, "ignore_index": -1}


# ---- the same in PyTorch, where it is more than one function; F is torch.nn.functional ---------------------

def torch_tensor(array):
    """Floats as float64, so that float32 is held to the truth, and integers as int64."""
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    return torch.tensor(np.asarray(array, bool if array.dtype == bool else np.result_type(array, np.int64)))


def torch_attention(F, qkv, heads, **options):
    width = qkv.shape[2] // 3
    return torch_cross_attention(F, qkv[..., :width], qkv[..., width:], heads, **{"causal": True, **options})


def torch_cross_attention(F, q, kv, heads, causal=False, mask=None, p=0.0, seed=0):
    (batch, time, width), keys = q.shape, kv.shape[1]
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, *kv.split(width, dim=2)))
    visible = np.tri(time, keys, keys - time, dtype=bool) if causal else np.ones((time, keys), bool)
    visible = torch_tensor(visible if mask is None else visible & mask[:, None, None])
    if not p:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    else:
        scores = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).masked_fill(~visible, -math.inf)
        kept = dropout_mask(batch * heads * time, keys, p, seed).reshape(scores.shape)
        y = F.softmax(scores, 3) * torch_tensor(kept) / (1 - p) @ v
    return y.transpose(1, 2).flatten(2)


def torch_rotary(F, qkv, heads, base=10_000.0, eps=None, start=0):
    """By complex numbers: a pair is one, and turning it is a product."""
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    q, k, v = (x.unflatten(2, (heads, -1)) for x in qkv.split(qkv.shape[2] // 3, dim=2))
    width, angles = q.shape[3], torch.arange(start, start + qkv.shape[1], dtype=torch.float64)
    turned = []
    for x in (q, k):
        x = x if eps is None else F.rms_norm(x, (width,), eps=eps)
        if base is not None:
            frequencies = base ** (torch.arange(0, width, 2, dtype=torch.float64) / -width)
            turns = torch.exp(1j * angles[:, None] * frequencies)[:, None]
            pairs = torch.complex(*x.chunk(2, dim=3)) * turns
            x = torch.cat([pairs.real, pairs.imag], dim=3)
        turned.append(x)
    return torch.cat([x.flatten(2) for x in (*turned, v)], dim=2)


def torch_dropout(F, x, p, seed):
    return x * torch_tensor(flat_mask(tuple(x.shape), p, seed)) / (1 - p)


def torch_cross_entropy(F, logits, targets, **options):
    rows = logits.reshape(targets.size, logits.shape[-1])
    losses = F.cross_entropy(rows, torch_tensor(targets).flatten(), **options)
    return losses.reshape(targets.shape) if options["reduction"] == "none" else losses


class Case(NamedTuple):
    """A fused op, the same in PyTorch, and what is drawn for it. The first word of the name is the op's."""
    name: str
    f: Callable
    torch: Callable
    shapes: Callable

    def draw(self, data, largest, dtype=np.float64):
        """Arrays, and f and PyTorch's f with the options drawn."""
        shapes, options = self.shapes(data.draw, lambda low=1: data.draw(st.integers(low, largest)))
        random = np.random.default_rng(data.draw(st.integers(0, 1000)))
        arrays = [alternating(random, shape).astype(dtype) for shape in shapes]
        return arrays, functools.partial(self.f, **options), functools.partial(self.torch, **options)


def alternating(random, shape):
    """Numbers between 0.1 and 2 and, in turn, their likes below 0: no row is so even that it has no scale."""
    size = math.prod(shape)
    return (random.uniform(0.1, 2, size) * (-1.0) ** np.arange(size)).reshape(shape)


linear_biased, layernorm_biased = (functools.partial(f, bias=True) for f in (linear_shapes, layernorm_shapes))
linear_gelu, linear_gelu_tanh, linear_relu2 = (functools.partial(linear, activation=a)
                                               for a in ("gelu", "gelu_tanh", "relu2"))
CASES = [
    Case("linear", linear, lambda F, x, w: F.linear(x, w), linear_shapes),
    Case("linear bias", linear, lambda F, x, w, b: F.linear(x, w, b), linear_biased),
    Case("linear gelu", linear_gelu, lambda F, x, w: F.gelu(F.linear(x, w)), linear_shapes),
    Case("linear bias gelu", linear_gelu, lambda F, x, w, b: F.gelu(F.linear(x, w, b)), linear_biased),
    Case("linear gelu_tanh", linear_gelu_tanh,
         lambda F, x, w: F.gelu(F.linear(x, w), approximate="tanh"), linear_shapes),
    Case("linear bias gelu_tanh", linear_gelu_tanh,
         lambda F, x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"), linear_biased),
    Case("linear relu2", linear_relu2, lambda F, x, w: F.relu(F.linear(x, w))**2, linear_shapes),
    Case("linear bias relu2", linear_relu2, lambda F, x, w, b: F.relu(F.linear(x, w, b))**2, linear_biased),
    Case("gelu", gelu, lambda F, x: F.gelu(x), anything),
    Case("gelu tanh", functools.partial(gelu, approximate="tanh"),
         lambda F, x: F.gelu(x, approximate="tanh"), anything),
    Case("relu2", relu2, lambda F, x: F.relu(x)**2, anything),
    Case("layernorm", layernorm, lambda F, x, w: F.layer_norm(x, w.shape, w), layernorm_shapes),
    Case("layernorm bias", layernorm, lambda F, x, w, b: F.layer_norm(x, w.shape, w, b), layernorm_biased),
    Case("layernorm eps", functools.partial(layernorm, eps=0.1),
         lambda F, x, w: F.layer_norm(x, w.shape, w, eps=0.1), layernorm_shapes),
    Case("softmax", softmax, lambda F, x, axis: F.softmax(x, axis), axis_shapes),
    Case("log_softmax", log_softmax, lambda F, x, axis: F.log_softmax(x, axis), axis_shapes),
    Case("rotary", rotary, torch_rotary, rotary_shapes),
    Case("rotary as qk_norm", qk_norm, functools.partial(torch_rotary, base=None, eps=1e-6),
         attention_shapes),
    Case("attention causal", attention, torch_attention, attention_shapes),
    Case("attention", functools.partial(attention, causal=False),
         functools.partial(torch_attention, causal=False), attention_shapes),
    Case("attention causal dropout", attention, torch_attention, dropped(attention_shapes)),
    Case("attention dropout", functools.partial(attention, causal=False),
         functools.partial(torch_attention, causal=False), dropped(attention_shapes)),
    Case("attention causal mask", attention, torch_attention, masked(attention_shapes)),
    Case("attention mask", functools.partial(attention, causal=False),
         functools.partial(torch_attention, causal=False), masked(attention_shapes)),
    Case("cross_attention", cross_attention, torch_cross_attention, cross_attention_shapes),
    Case("cross_attention mask", cross_attention, torch_cross_attention, masked(cross_attention_shapes)),
    Case("cross_attention dropout", cross_attention, torch_cross_attention, dropped(cross_attention_shapes)),
    Case("cross_attention causal", functools.partial(cross_attention, causal=True),
         functools.partial(torch_cross_attention, causal=True),
         functools.partial(cross_attention_shapes, causal=True)),
    Case("dropout", dropout, torch_dropout, dropped(anything)),
    Case("embedding", lambda weight, ids: embedding(ids, weight),
         lambda F, weight, ids: F.embedding(torch_tensor(ids), weight), embedding_shapes),
    *(Case(f"cross_entropy {reduction}", functools.partial(cross_entropy, reduction=reduction),
           functools.partial(torch_cross_entropy, reduction=reduction), cross_entropy_shapes)
      for reduction in ("mean", "sum", "none")),
]
cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def close(ours, theirs, tolerance):
    """Equal to a tolerance of the largest element, or of 0.01 where all has cancelled."""
    assert ours.shape == theirs.shape
    largest = np.max(np.abs(theirs), initial=0.01, where=np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * largest)


# ---- the table ---------------------------------------------------------------------------------------------

@cases
@pytest.mark.parametrize("largest", [1, SMALL, LARGE])
@dtypes
@given(data=st.data())
@settings(max_examples=8)
def test_value_and_gradient_are_the_references(case, largest, dtype, tolerance, data):
    arrays, f, _ = case.draw(data, largest, dtype)
    y, dxs, _ = gradients(f, arrays)
    with unfused():
        expected, expected_dxs, _ = gradients(f, arrays)
    for ours, theirs in zip([y, *dxs], [expected, *expected_dxs], strict=True):
        assert ours.dtype == theirs.dtype == dtype
        close(ours.numpy(), theirs.numpy(), tolerance)
    plain = f(*arrays)
    assert not isinstance(plain, Tensor)
    np.testing.assert_array_equal(plain, y.numpy())


@cases
@pytest.mark.parametrize("largest", [1, SMALL, LARGE])
@dtypes
@given(data=st.data())
@settings(max_examples=8)
def test_value_and_gradient_are_pytorchs(case, largest, dtype, tolerance, data):
    functional = pytest.importorskip("torch", reason="PyTorch is the reference").nn.functional
    arrays, f, torch_f = case.draw(data, largest, dtype)
    y, dxs, weights = gradients(f, arrays)
    inputs = [torch_tensor(x).requires_grad_() for x in arrays]
    expected = torch_f(functional, *inputs)
    (expected * torch_tensor(weights)).sum().backward()
    close(y.numpy(), expected.detach().numpy(), tolerance)
    for dx, x in zip(dxs, inputs, strict=True):
        close(dx.numpy(), x.grad.numpy(), tolerance)


@cases
@given(data=st.data())
@settings(max_examples=3)
def test_first_and_second_gradient(case, data):
    arrays, f, _ = case.draw(data, TINY)
    with one_thread():
        gradcheck(f, *arrays, name=case.name)


@contextlib.contextmanager
def one_thread():
    """For thousands of tiny calls, each of which would otherwise wait for a second thread to wake up."""
    before = get_num_threads()
    set_num_threads(1)
    try:
        yield
    finally:
        set_num_threads(before)


@cases
@pytest.mark.parametrize("view", [
    lambda x: np.moveaxis(np.moveaxis(x, 0, -1).copy(), -1, 0),
    lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    lambda x: np.flip(np.flip(x).copy()),
], ids=["transposed", "stepped", "reversed"])
@given(data=st.data())
@settings(max_examples=4)
def test_layout_does_not_matter(case, view, data):
    arrays, f, _ = case.draw(data, SMALL)
    y, dxs, weights = gradients(f, arrays)
    views = [Tensor(view(x) if x.ndim else x, requires_grad=True) for x in arrays]
    y_view = f(*views)
    dxs_view = grad(y_view, views, gradient=view(weights) if weights.ndim else weights)
    for ours, theirs in zip([y_view, *dxs_view], [y, *dxs], strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


@cases
@given(data=st.data())
@settings(max_examples=6)
def test_gradients_are_arrays_of_their_own(case, data):
    """The walk adds into what a fused op hands back, so none of it may be the memory of anything else."""
    arrays, f, _ = case.draw(data, SMALL)
    inputs = [Tensor(x, requires_grad=True) for x in arrays]
    y = f(*inputs)
    seed = np.ones(y.shape)
    y.backward(gradient=seed)
    dxs = [x.grad.data for x in inputs]
    for i, dx in enumerate(dxs):
        for other in (*arrays, *dxs[:i], y.data, seed):
            assert not np.shares_memory(dx, other)
    assert np.all(seed == 1)


@cases
@given(data=st.data())
@settings(max_examples=2)
def test_only_what_is_needed_is_differentiated(case, data):
    arrays, f, _ = case.draw(data, SMALL)
    _, dxs, weights = gradients(f, arrays)
    for needed, expected in enumerate(dxs):
        inputs = [Tensor(x, requires_grad=i == needed) if i <= needed else x
                  for i, x in enumerate(arrays)]
        dx, = grad(np.sum(f(*inputs) * weights), inputs[needed])
        np.testing.assert_array_equal(dx.numpy(), expected.numpy())
    with no_grad():
        assert not f(*(Tensor(x, requires_grad=True) for x in arrays)).requires_grad


@cases
@given(data=st.data())
@settings(max_examples=2)
def test_unfused_records_primitive_ops_only(case, data):
    arrays, f, _ = case.draw(data, SMALL)
    inputs = [Tensor(x, requires_grad=True) for x in arrays]
    assert any(op.reference is not None for op in ops_below(f(*inputs)))
    with unfused():
        assert all(op.reference is None for op in ops_below(f(*inputs)))


def ops_below(y):
    found, waiting = [], [y]
    while waiting:
        x = waiting.pop()
        if isinstance(x, Tensor) and x.node is not None:
            found.append(x.node.op)
            waiting.extend(x.node.inputs)
    return found


def test_the_table_has_every_fused_op():
    fused_ops = {name.strip("_") for name, f in vars(module).items() if getattr(f, "reference", None)}
    assert fused_ops == {case.name.split()[0] for case in CASES}
    for name in fused_ops:
        assert getattr(minitensor, name).__doc__, f"{name} has no docstring"


def test_a_fused_op_without_a_reference_is_an_error_at_import():
    source = "@minitensor.fused({})\ndef double(x):\n    return 2 * x, lambda g: 2 * g\n"
    for nothing in ("lambda x: 2 * x", "reference=None", ""):
        with pytest.raises(TypeError, match="reference"):
            exec(source.format(nothing), {"minitensor": minitensor})
    exec(source.format("reference=lambda x: 2 * x"), {"minitensor": minitensor})
    with pytest.raises(TypeError, match=r"fused: a fused op names its reference, .*; got None"):
        fused(reference=None)


# ---- no rows, no batch, axes of length one -----------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [(0, 5), (2, 0, 5), (0, 3, 5), (1, 5), (1, 1, 5)])
def test_no_rows_and_single_rows(rows, dtype):
    x, weight, bias = np.ones(rows, dtype), np.ones((4, 5), dtype), np.ones(5, dtype)
    ids = np.zeros(rows[:-1], int)
    for f, arrays, shape in [
        (linear, (x, weight), (*rows[:-1], 4)), (linear, (x, weight, bias[:4]), (*rows[:-1], 4)),
        (linear_gelu, (x, weight, bias[:4]), (*rows[:-1], 4)),
        (linear_relu2, (x, weight), (*rows[:-1], 4)),
        (gelu, (x,), rows), (relu2, (x,), rows), (layernorm, (x, bias), rows),
        (layernorm, (x, bias, bias), rows),
        (softmax, (x,), rows), (log_softmax, (x,), rows), (functools.partial(dropout, p=0.5), (x,), rows),
        (functools.partial(embedding, ids), (weight,), (*rows[:-1], 5)),
        (lambda x: cross_entropy(x, ids, reduction="none"), (x,), rows[:-1]),
        (lambda x: cross_entropy(x, ids, reduction="sum"), (x,), ()),
    ]:
        y, dxs, _ = gradients(f, arrays)
        assert y.shape == shape and y.dtype == dtype
        assert [dx.shape for dx in dxs] == [array.shape for array in arrays]
        assert all(dx.dtype == dtype for dx in dxs)
        assert math.prod(rows) or not any(dx.numpy().any() for dx in dxs)       # sums over no rows are zeros


@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12), (1, 1, 12), (2, 1, 3)])
def test_attention_of_nothing_and_of_one_token(shape):
    heads = 1 if shape[2] == 3 else 2
    qkv = np.arange(float(math.prod(shape))).reshape(shape)
    y, (dqkv,), weights = gradients(lambda x: attention(x, heads), [qkv])
    width = shape[2] // 3
    assert y.shape == (*shape[:2], width) and dqkv.shape == shape
    if shape[1] == 1:                                           # one token can only look at itself
        np.testing.assert_array_equal(y.numpy(), qkv[..., 2 * width:])
        np.testing.assert_array_equal(dqkv.numpy()[..., 2 * width:], weights)
        np.testing.assert_array_equal(dqkv.numpy()[..., :2 * width], 0)


@pytest.mark.parametrize("time", [0, 3])
def test_cross_attention_to_no_keys_is_zeros(time):
    arrays = [np.ones((2, time, 4)), np.ones((2, 0, 8))]
    for context in (contextlib.nullcontext(), unfused()):
        with context:
            y, (dq, dkv), _ = gradients(lambda q, kv: cross_attention(q, kv, 2), arrays)
        assert y.shape == dq.shape == (2, time, 4) and dkv.shape == (2, 0, 8)
        assert not y.numpy().any() and not dq.numpy().any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keys_that_a_mask_hides_never_matter_nor_learn(dtype):
    """Not even NaNs, in the kernel nor in the reference; a sequence of padding alone gives zeros."""
    random = np.random.default_rng(0)
    q, kv = random.standard_normal((2, 5, 6)).astype(dtype), random.standard_normal((2, 7, 12)).astype(dtype)
    mask = np.array([[True, False, True, True, False, False, True], [False] * 7])
    for context in (contextlib.nullcontext, unfused):
        results = []
        for hidden in (0, np.nan, np.inf):
            with context():
                y, dxs, _ = gradients(lambda q, kv: cross_attention(q, kv, 3, mask=mask),
                                      [q, np.where(mask[..., None], kv, dtype(hidden))])
            results.append([x.numpy() for x in (y, *dxs)])
        for result in results:
            for x, first in zip(result, results[0], strict=True):
                np.testing.assert_array_equal(x, first)
        y, dq, dkv = results[0]
        assert y[0].all() and not y[1].any() and not dq[1].any() and not dkv[~mask].any()


@pytest.mark.parametrize("watched", [contextlib.nullcontext, minitensor.detect_nan])
@pytest.mark.parametrize(("use", "passes_on"), [
    (lambda table, other: linear(other, table), False),             # an array of its own: added to in place
    (lambda table, other: table + other, True),                     # one g for both
    (lambda table, other: table.T @ other + table.T @ (other * 2), False),     # two turned over, and added
], ids=["linear", "add", "transposed"])
def test_the_gradient_of_a_tied_table(use, passes_on, watched):
    """An embedding's is added to what came before, in place only where that array is nobody else's."""
    random = np.random.default_rng(0)
    table, other = (Tensor(random.integers(-9, 10, (4, 4)).astype(float), requires_grad=True)
                    for _ in range(2))                              # whole numbers, whose sums are exact
    ids = np.array([3, 0, 3])
    with watched():
        rows = embedding(ids, table)
        rest = use(table, other)
        mask = random.integers(-9, 10, rest.shape).astype(float)
        (np.sum(rest * mask) + np.sum(rows * rows)).backward()
    expected = grad(np.sum(use(table, other) * mask), table)[0].numpy().copy()
    np.add.at(expected, ids, 2 * table.numpy()[ids])
    np.testing.assert_array_equal(table.grad.numpy(), expected)
    if passes_on:
        np.testing.assert_array_equal(other.grad.numpy(), mask)


def test_cross_entropy_of_no_target_at_all():
    for logits, targets in ((np.ones((3, 4)), np.full(3, -100)), (np.ones((0, 4)), np.ones(0, int))):
        x = Tensor(logits, requires_grad=True)
        loss = cross_entropy(x, targets)
        loss.backward()
        assert np.isnan(loss.item()) and x.grad.shape == x.shape
        assert cross_entropy(x, targets, reduction="sum").item() == 0


# ---- numbers that are hard ---------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_numbers_do_not_overflow(dtype):
    x = np.array([[1e4, 0, -1e4], [-1e4, -1e4, -1e4]], dtype)
    close(softmax(x), np.array([[1, 0, 0], [1 / 3] * 3]), 1e-6)
    close(log_softmax(x), np.array([[0, -1e4, -2e4], [-math.log(3)] * 3]), 1e-6)
    close(cross_entropy(x, np.array([2, 0]), reduction="none"), np.array([2e4, math.log(3)]), 1e-6)
    for approximate in ("none", "tanh"):
        y = gelu(np.array([-1e4, -0.0, 0, 1e4], dtype), approximate)
        np.testing.assert_array_equal(y, [0, 0, 0, 1e4])
    for f in (linear, linear_gelu, linear_gelu_tanh):
        y, (dx, _), _ = gradients(f, [x, np.ones((1, 3), dtype)])
        assert np.isfinite(y.numpy()).all() and np.isfinite(dx.numpy()).all()


def test_masked_logits():
    x = Tensor(np.array([[-np.inf, 0.0, 0.0]]), requires_grad=True)
    np.testing.assert_allclose(softmax(x).numpy(), [[0, 0.5, 0.5]])
    loss = cross_entropy(x, np.array([1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    np.testing.assert_allclose(x.grad.numpy(), [[0, -0.5, 0.5]])


@pytest.mark.parametrize("width", [1, 4])
def test_layernorm_of_equal_numbers_is_the_bias(width):
    arrays = [np.full((2, width), 3.0), np.ones(width), np.arange(width) + 1.0]
    y, (dx, dweight, dbias), weights = gradients(layernorm, arrays)
    np.testing.assert_array_equal(y.numpy(), arrays[2:] * 2)
    np.testing.assert_array_equal(dweight.numpy(), 0)
    np.testing.assert_allclose(dbias.numpy(), weights.sum(axis=0))
    centred = weights - weights.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(dx.numpy(), centred / math.sqrt(1e-5), atol=1e-12)


# ---- dropout's seeds ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("f", [
    lambda x: dropout(x, 0.5),
    lambda x: attention(x, 2, p=0.5),
    lambda x: cross_attention(x, np.concatenate([x, x], axis=2), 2, p=0.5),
], ids=["dropout", "attention", "cross_attention"])
def test_the_seed_sets_all_masks_to_come(f):
    x = np.random.default_rng(0).standard_normal((2, 8, 12))
    minitensor.seed(3)
    first, second = f(x), f(x)
    assert not np.array_equal(first, second)
    minitensor.seed(3)
    np.testing.assert_array_equal(f(x), first)
    np.testing.assert_array_equal(f(x), second)
    minitensor.seed(4)
    assert not np.array_equal(f(x), first)


def test_dropout_of_probability_zero_is_nothing_at_all():
    x = Tensor([1.0, 2.0])
    assert dropout(x, 0) is x
    minitensor.seed(0)
    qkv = np.ones((1, 2, 6))
    attention(qkv, 1)                                           # takes no seed
    dropped = dropout(np.ones(64), 0.5)
    minitensor.seed(0)
    np.testing.assert_array_equal(dropout(np.ones(64), 0.5), dropped)


def test_dropout_keeps_the_mean():
    y = dropout(np.ones(100_000), 0.2, seed=1)
    assert set(np.unique(y)) == {0, 1.25}
    assert y.mean() == pytest.approx(1, abs=0.01)


# ---- errors ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("error", "message", "wrong"), [
    (ValueError, r"linear: inner sizes differ: x is \(2, 6\), weight is \(4, 5\)",
     lambda x: linear(x, np.ones((4, 5)))),
    (ValueError, r"inner sizes differ: x is \(2, 6\), weight is \(6,\)", lambda x: linear(x, np.ones(6))),
    (ValueError, r"linear: inner sizes differ: x is \(\)", lambda x: linear(x[0, 0], np.ones((4, 6)))),
    (ValueError, r"bias has shape \(3,\); it must be", lambda x: linear(x, np.ones((4, 6)), np.ones(3))),
    (ValueError, "linear: activation is 'relu'; it must be None or one of 'gelu', 'gelu_tanh', 'relu2'",
     lambda x: linear(x, np.ones((4, 6)), activation="relu")),
    (TypeError, "linear: float32 and float64 are mixed", lambda x: linear(x, np.ones((4, 6), np.float32))),
    (ValueError, "gelu: approximate is 'erf'; it must be 'none' or 'tanh'", lambda x: gelu(x, "erf")),
    (ValueError, r"layernorm: weight is \(5,\), x is \(2, 6\); weight.shape must",
     lambda x: layernorm(x, np.ones(5))),
    (ValueError, "axis", lambda x: softmax(x, axis=2)),
    (ValueError, "axis", lambda x: log_softmax(x, axis=-3)),
    (ValueError, r"attention: qkv is \(2, 6\); it must be \(B, T, 3C\)", lambda x: attention(x, 2)),
    (ValueError, "with 3 heads dividing C", lambda x: attention(x[None], 3)),
    (ValueError, "with 0 heads dividing C", lambda x: attention(x[None], 0)),
    (ValueError, r"rotary: qkv is \(2, 6\); it must be \(B, T, 3C\)", lambda x: rotary(x, 1)),
    (ValueError, r"rotary: qkv is \(1, 2, 6\), 2 heads, .* must be even", lambda x: rotary(x[None], 2)),
    (ValueError, r"base 0, start 0; .* base above 0", lambda x: rotary(x[None], 1, base=0)),
    (ValueError, r"start -1; .* start at least 0", lambda x: rotary(x[None], 1, start=-1)),
    (ValueError, "qk_norm: .* with 3 heads dividing C", lambda x: qk_norm(x[None], 3)),
    (ValueError, "qk_norm: eps is None; it must be 0 or", lambda x: qk_norm(x[None], 1, eps=None)),
    (ValueError, "rotary: eps is -1.0; it must be 0 or", lambda x: rotary(x[None], 1, eps=-1.0)),
    (ValueError, "base None, start 0; .* base above 0", lambda x: rotary(x[None], 1, base=None)),
    (ValueError, r"p is 1.0; .* must be in \[0, 1\)", lambda x: attention(x[None], 2, p=1.0)),
    (TypeError, "attention: mask is an array of float64; it must be an array of bool",
     lambda x: attention(x[None], 2, mask=np.ones((1, 2)))),
    (TypeError, "attention: mask is a Tensor; it must be an array of bool",
     lambda x: attention(x[None], 2, mask=x)),
    (ValueError, r"attention: mask is \(2, 1\); it must be \(1, 2\)",
     lambda x: attention(x[None], 2, mask=np.ones((2, 1), bool))),
    (ValueError, r"cross_attention: q is \(2, 6\); it must be \(B, T, C\) with 2 heads dividing C",
     lambda x: cross_attention(x, x[None], 2)),
    (ValueError, "with 4 heads dividing C", lambda x: cross_attention(x[None], x[None], 4)),
    (ValueError, r"cross_attention: kv is \(1, 2, 6\), q is \(1, 2, 6\); .* here \(1, S, 12\)",
     lambda x: cross_attention(x[None], x[None], 2)),
    (ValueError, r"cross_attention: q holds 2 queries, kv 1 keys; where causal",
     lambda x: cross_attention(x[None], np.ones((1, 1, 12)), 2, causal=True)),
    (TypeError, "cross_attention: float32 and float64 are mixed",
     lambda x: cross_attention(x[None], np.ones((1, 1, 12), np.float32), 2)),
    (ValueError, r"p is -0.1; .* must be in \[0, 1\)", lambda x: dropout(x, -0.1)),
    (ValueError, r"p is 1; .* must be in \[0, 1\)", lambda x: dropout(x, 1)),
    (IndexError, "embedding: ids holds 2; it must be in 0 to 1", lambda x: embedding([0, 2], x)),
    (IndexError, "embedding: ids holds -1; it must be in 0 to 1", lambda x: embedding([-1], x)),
    (TypeError, "ids is an array of float64; it must hold integers", lambda x: embedding([0.5], x)),
    (ValueError, r"cross_entropy: logits are \(2, 6\), targets are \(1,\)", lambda x: cross_entropy(x, [0])),
    (IndexError, "targets holds 6; it must be in 0 to 5", lambda x: cross_entropy(x, [0, 6])),
    (IndexError, "targets holds -1; it must be in 0 to 5", lambda x: cross_entropy(x, [0, -1])),
    (TypeError, "targets is an array of float64; it must", lambda x: cross_entropy(x, [0.0, 1.0])),
    (ValueError, "reduction is 'max'; it must be 'mean', 'sum' or 'none'",
     lambda x: cross_entropy(x, [0, 1], reduction="max")),
])
def test_wrong_arguments_are_named(error, message, wrong):
    with pytest.raises(error, match=message):
        wrong(Tensor(np.ones((2, 6))))
