"""A trace: the order of its steps, their gradients, where they came from, their table, and what it costs."""
import contextlib
import gc
import math
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

import minitensor as mt
from gpt.config import Config
from gpt.model import GPT
from minitensor import nn
from minitensor.tensor import Tensor, _state
from minitensor.trace import Summary, Trace, place, summary

HERE = Path(__file__)


def leaf(*values, dtype=np.float64):
    return Tensor(np.array(values, dtype), requires_grad=True)


def line_of(marker):
    """The number of the line of this file that ends in a comment."""
    return next(i for i, text in enumerate(HERE.read_text().splitlines(), 1) if text.endswith(f"# {marker}"))


def gpt_loss(layers=2):
    mt.seed(0)
    model = GPT(Config(layers=layers), 65)
    ids = np.random.default_rng(0).integers(0, 65, (2, 12, 64))
    return model, lambda: mt.cross_entropy(model(ids[0]), ids[1])


def micrograd():
    """The expression of micrograd's README."""
    a, b = Tensor(np.float64(-4.0), True), Tensor(np.float64(2.0), True)
    c = a + b
    d = a * b + b ** 3
    c = c + (c + 1)
    c = c + (1 + c + (-a))
    d = d + (d * 2 + np.maximum(b + a, 0))
    d = d + (3 * d + np.maximum(b - a, 0))
    e = c - d
    f = e ** 2
    g = f / 2.0
    g = g + 10.0 / f
    return a, b, g


# ---- the steps ---------------------------------------------------------------------------------------------

def test_a_trace_is_a_backward():
    (a, b, g), (a2, b2, g2) = micrograd(), micrograd()
    a.grad = Tensor(np.float64(1.0))
    before = a.grad
    steps = mt.trace(g)
    g2.backward()
    assert a.grad is before and a.grad.item() == 1 + a2.grad.item() and b.grad.item() == b2.grad.item()
    found = {s.name: round(s.gradient.mean, 4) for s in steps if s.op == "leaf"}
    assert found == {"a": 138.8338, "b": 645.5773}
    with pytest.raises(RuntimeError, match="released by an earlier backward"):
        mt.trace(g)


def test_retain_graph_and_gradient():
    x = leaf(1.0, 2.0)
    y = x * x
    first = mt.trace(y, gradient=[1.0, 10.0], retain_graph=True)
    second = mt.trace(y, gradient=[1.0, 10.0])
    np.testing.assert_array_equal(x.grad.numpy(), [4, 80])
    assert first[1].gradient.max == second[1].gradient.max == 40     # of this pass alone


@pytest.mark.parametrize("unfused", [False, True])
def test_gradients_are_those_of_grad(unfused):
    """Every step's gradient, as grad finds it for the tensors on the way, and the flows that add up to it."""
    _, loss_of = gpt_loss()
    with mt.unfused() if unfused else contextlib.nullcontext():
        loss = loss_of()
        reached, waiting = {id(loss): loss}, [loss]
        while waiting:
            node = waiting.pop().node
            for x in node.inputs if node else ():
                if isinstance(x, Tensor) and x.requires_grad and id(x) not in reached:
                    reached[id(x)] = x
                    waiting.append(x)
        tensors = sorted((x for x in reached.values() if x.node), key=lambda x: -x.node.serial)
        gradients = mt.grad(loss, tensors, retain_graph=True)
        trace = mt.trace(loss)
    ops = [step for step in trace if step.op != "leaf"]
    assert len(ops) == len(tensors) and len(trace) == len(reached)
    for step, x, g in zip(ops, tensors, gradients, strict=True):
        assert step.op == x.node.op.__name__.lstrip("_") and step.shape == g.shape == x.shape
        for found, array in ((step.value, x.data), (step.gradient, g.data)):
            expected = summary(array)
            assert found[:8] == expected[:8]
            np.testing.assert_array_equal(found.sample, expected.sample)
    for step in trace:
        if len(step.received) > 1:
            total = sum(flow.gradient.sample.astype(np.float64) for flow in step.received)
            np.testing.assert_allclose(total, step.gradient.sample, rtol=1e-4, atol=1e-8)
    for i, step in enumerate(trace):
        for flow in step.sent:
            assert flow.step > i                                     # a walk only goes down
            back = [f for f in trace[flow.step].received if f.step == i and f.argument == flow.argument]
            assert len(back) == 1 and back[0].gradient is flow.gradient


def test_leaves_hold_their_gradients_by_path():
    model, loss_of = gpt_loss(1)
    trace = mt.trace(loss_of())
    leaves = {step.name: step for step in trace if step.op == "leaf"}
    parameters = dict(model.named_parameters())
    assert leaves.keys() == parameters.keys() and "blocks.0.attention.qkv.weight" in leaves
    for name, parameter in parameters.items():
        assert leaves[name].gradient[:8] == summary(parameter.grad.data)[:8]
    assert len(leaves["tokens.weight"].received) == 2                # the tied head and the embedding


def test_order_of_the_walk():
    x = leaf(3.0)
    a = np.exp(x)
    b = a + a
    c = b + b
    trace = mt.trace(np.sum(c))
    assert [(s.op, s.name) for s in trace] == [
        ("sum", ""), ("add", "c"), ("add", "b"), ("exp", "a"), ("leaf", "x")]
    assert [len(s.received) for s in trace] == [0, 1, 2, 2, 1]
    assert [f.argument for f in trace[2].received] == [0, 1]
    assert trace[3].gradient.mean == 4 and isinstance(trace[0].value, Summary)


def test_a_leaf_alone():
    x = Tensor(np.float64(2.0), True)
    trace = mt.trace(x)
    assert [(s.op, s.name, s.gradient.mean) for s in trace] == [("leaf", "x", 1)] and x.grad.item() == 1
    with pytest.raises(ValueError, match="does not depend on any tensor with requires_grad"):
        mt.trace(Tensor(1.0))


def test_statistics():
    s = summary(np.array([[0.0, 1, 2], [0, np.nan, -np.inf]]))
    assert s[:8] == ((2, 3), "float64", 0, 2, 0.75, math.sqrt(11 / 16), 1 / 3, 2)
    assert s.sample.shape == (2, 3)
    big = np.arange(3 * 100 * 64, dtype=np.float32).reshape(3, 100, 64)
    s = summary(big)
    assert s.sample.shape == (32, 32) and s.sample[0, 0] == 0 and s.sample[-1, -1] == big[0, -1, -1]
    s = summary(np.float32(3e38) * np.array([1, -1, 1, -1], np.float32))
    assert s.nonfinite == 0 and s.std == pytest.approx(3e38)                 # though its square is too large
    assert summary(np.zeros((0, 4))).sample.size == 0 and math.isnan(summary(np.zeros(0)).mean)


def test_constants_and_options():
    x = leaf(1.0, 2.0)
    trace = mt.trace(np.sum(np.where(np.array([True, False]), x, -np.inf) * 0.5, axis=0, keepdims=True)[0])
    by_op = {step.op: step for step in trace}
    assert by_op["multiply"].constants == {1: "0.5"}
    assert by_op["select"].constants == {0: "bool (2,)", 2: "-inf"}
    assert by_op["sum"].options == "axis=0, keepdims=True" and by_op["getitem"].options == "index=0"
    x, ids = Tensor(np.ones((6, 4, 2)), True), np.array([0, 1])
    for index, text in ((np.s_[1:], "1:"), (np.s_[:, ::2, -1], "(:, ::2, -1)"), (np.s_[:], ":"),
                        (np.s_[..., None], "(Ellipsis, None)"), (np.s_[ids], "int64 (2,)")):
        assert mt.trace(np.sum(x[index]))[1].options == f"index={text}"


# ---- where a step came from --------------------------------------------------------------------------------

class Doubled(nn.Module):
    def forward(self, x):
        return x + x                                                     # doubled


class Net(nn.Module):
    def __init__(self):
        self.first = nn.Sequential(lambda x: np.tanh(x), Doubled())      # lambda
        self.parts = {"<script>alert(1)</script>": Doubled()}

    def forward(self, x):
        x = self.first(x)
        for part in self.parts.values():
            x = part(x)
        return np.square(Doubled()(x))                                   # net


def test_file_line_and_module():
    net, x = Net(), leaf(0.1, 0.2)
    y = net(x)
    z = np.exp(y)                                                        # exp
    w = z * 2 if z.ndim else z                                           # operator
    v = w[0]                                                             # index
    loss = v.reshape(())                                                 # method
    trace = mt.trace(loss)
    assert [(s.op, s.line, s.module, s.code) for s in trace if s.op != "leaf"] == [
        ("reshape", line_of("method"), "", "v.reshape(())"),
        ("getitem", line_of("index"), "", "w[0]"),
        ("multiply", line_of("operator"), "", "z * 2"),
        ("exp", line_of("exp"), "", "np.exp(y)"),
        ("square", line_of("net"), "Net", "np.square(Doubled()(x))"),
        ("add", line_of("doubled"), "Net", "x + x"),                     # its module is no more
        ("add", line_of("doubled"), "parts.<script>alert(1)</script>", "x + x"),
        ("add", line_of("doubled"), "first.steps.1", "x + x"),
        ("tanh", line_of("lambda"), "first", "np.tanh(x)"),
    ]
    assert all(Path(s.file) == HERE for s in trace if s.op != "leaf")
    assert {s.name for s in trace if s.name} == {"x", "y", "z", "w", "v", "loss"}


def test_ops_of_the_package_count_as_the_line_that_called_them():
    mt.seed(0)
    layer, x = nn.Linear(3, 2), leaf(1.0, 2.0, 3.0, dtype=np.float32)
    with mt.unfused():
        y = mt.softmax(layer(x))                                         # softmax
    trace = mt.trace(y[0])
    assert {(s.op, s.line) for s in trace if s.op != "leaf"} >= {
        ("exp", line_of("softmax")), ("product", line_of("softmax")), ("transpose", line_of("softmax"))}
    assert {s.module for s in trace if s.op in ("product", "transpose")} == {"Linear"}
    assert {s.module for s in trace if s.op in ("exp", "divide")} == {""}


def test_modules_that_raise_leave_the_stack():
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError(x)
    with pytest.raises(KeyError):
        Broken()(1)
    assert _state.modules == ()
    assert mt.trace(np.exp(leaf(1.0)[0]))[0].module == ""


def test_code_without_a_file():
    names = {"np": np, "x": leaf(2.0)}
    exec(compile("y = np.exp(x)\nz = (y *\n y)", "<a & b>", "exec"), names)
    step = mt.trace(names["z"][0])[1]
    assert (step.op, step.file, step.line, step.code) == ("multiply", "<a & b>", 2, "")
    assert place(compile("1", "gone.py", "eval"), 0)[0] == "gone.py"


def test_source_and_vjp():
    @mt.op()
    def cube(x):
        square = x * x
        def vjp(g):
            return g * (3 * square)                                      # cubed
        return square * x, vjp

    x = leaf(2.0)
    step, extreme, soft = (mt.trace(np.sum(f(x)))[1] for f in (cube, np.max, mt.softmax))
    lines = step.source.splitlines()
    assert lines[0] == "@mt.op()" and [lines[i].strip() for i in step.vjp_lines] == [
        "def vjp(g):", "return g * (3 * square)                                      # cubed"]
    lines = extreme.source.splitlines()                                  # its vjp is in what it calls
    assert "def max(x" in extreme.source and "def _extreme(" in extreme.source
    assert lines[extreme.vjp_lines[0]].strip() == "def vjp(g):"
    assert "def _softmax(x)" in soft.source and "def _softmax_reference(x)" in soft.source
    assert "softmax_backward" in soft.source.splitlines()[soft.vjp_lines[0]]


def test_the_same_code_in_two_files():
    for file in ("one.py", "two.py"):
        names = {"mt": mt, "x": leaf(2.0)}
        exec(compile("@mt.op()\ndef f(x):\n    return x, lambda g: g\ny = f(x)", file, "exec"), names)
        assert mt.trace(names["y"][0])[1].file == file


def test_a_vjp_is_not_kept():
    arrays = []

    def run():
        @mt.op()
        def local(x):
            kept = x * 2
            arrays.append(weakref.ref(kept))
            return kept, lambda g: g + 0 * kept
        return mt.trace(np.sum(local(leaf(1.0))))[1].vjp_lines

    assert run() == [4]
    gc.collect()
    assert arrays[0]() is None


def test_source_that_is_nowhere():
    names = {"mt": mt}
    exec("@mt.op()\ndef nowhere(x):\n    return x + 1, lambda g: g", names)
    step = mt.trace(names["nowhere"](leaf(1.0))[0])[1]
    assert step.source == "# its source is in no file" and step.vjp_lines == []


# ---- the table ---------------------------------------------------------------------------------------------

def test_table():
    w, x = leaf(0.5, -1.0), leaf(2.0, 4.0)
    h = np.tanh(w * x)                                                   # product
    loss = np.sum(h)                                                     # loss
    here = [f"test_trace.py:{line_of(marker)}" for marker in ("loss", "product")]
    assert str(mt.trace(loss)) == f"""\
step  op        where              module  shape  value         gradient     sent to
0     sum       {here[0]}          ()     -0.237735     1            1
1     tanh      {here[1]}          (2,)   -0.12 ± 0.88  1 ± 0        2
2     multiply  {here[1]}          (2,)   -1.5 ± 2.5    0.21 ± 0.21  3, 4
3     leaf                         w       (2,)   -0.25 ± 0.75  0.42 ± 0.42
4     leaf                         x       (2,)   3 ± 1         0.1 ± 0.11"""


def test_table_of_a_gpt_fits():
    _, loss_of = gpt_loss()
    with mt.unfused():
        text = str(mt.trace(loss_of()))
    assert max(map(len, text.splitlines())) <= 110
    assert "0.attention" in text and "logsumexp" in text
    assert text.splitlines()[-1] == "* and numbers that are not finite"   # the mask


# ---- unfused -----------------------------------------------------------------------------------------------

def test_unfused_agrees_with_fused():
    model, loss_of = gpt_loss(4)
    loss = loss_of()
    loss.backward()
    fused = {name: p.grad.numpy() for name, p in model.named_parameters()}
    model.zero_grad()
    with mt.unfused():
        other = loss_of()
        other.backward()
    assert abs(other.item() - loss.item()) <= 1e-5 * loss.item()
    for name, p in model.named_parameters():
        worst = np.max(np.abs(p.grad.numpy() - fused[name]))
        assert worst <= 1e-5 * np.max(np.abs(fused[name])), (name, worst)
        np.testing.assert_allclose(p.grad.numpy(), fused[name], rtol=0, atol=1e-5)


def test_unfused_attention_is_seen_in_its_parts():
    _, loss_of = gpt_loss(1)
    with mt.unfused():
        trace = mt.trace(loss_of())
    ops = [step.op for step in trace if step.module == "blocks.0.attention"][::-1]     # forward
    parts = ["product", "multiply", "select", "subtract", "exp", "sum", "divide", "product"]
    rest = iter(ops)
    assert all(part in rest for part in parts), ops          # scores, scale, mask, softmax, mix
    assert "attention" not in ops
    fused = [step.op for step in mt.trace(loss_of()) if step.module == "blocks.0.attention"]
    assert fused == ["attention"]


# ---- what it costs -----------------------------------------------------------------------------------------

def test_deep_chain():
    x, w = leaf(1.0), leaf(0.999)
    y = x
    for _ in range(5000):
        y = y * w
    trace = mt.trace(y[0])
    assert len(trace) == 5003 and len(str(trace).splitlines()) == 5004
    assert len(next(s for s in trace if s.name == "w").received) == 5000
    assert x.grad.item() == pytest.approx(0.999 ** 5000)


def test_nothing_is_kept_alive():
    """Freed by reference counting: no frame, module or loss stays behind a node or a trace."""
    class Keeper(nn.Module):
        def __init__(self):
            self.weight = leaf(1.0, 2.0)

        def forward(self, x):
            self.last = np.sum(x * self.weight)              # a module that keeps its result: no cycle
            return self.last

    def run():
        model = Keeper()
        loss = model(leaf(3.0, 4.0))
        alive = weakref.ref(loss.node), weakref.ref(model), weakref.ref(loss)
        return alive, mt.trace(loss, retain_graph=True)

    gc.collect()
    gc.disable()
    try:
        alive, trace = run()
        assert [ref() for ref in alive] == [None, None, None] and len(trace) == 4
    finally:
        gc.enable()


def test_off_there_is_no_hook():
    assert _state.observers == ()
    mt.trace(np.exp(leaf(1.0)[0]))
    with mt.detect_nan():
        seen = []
        thread = threading.Thread(target=lambda: seen.append(_state.observers))
        thread.start()
        thread.join()
        assert seen == [()] and len(_state.observers) == 1
    assert _state.observers == ()


def test_default_gpt_in_a_second():
    for context in (contextlib.nullcontext, mt.unfused):
        _, loss_of = gpt_loss(Config().layers)
        seconds = []
        for _ in range(3):
            with context():
                loss = loss_of()
                start = time.perf_counter()
                assert isinstance(mt.trace(loss), Trace)
                seconds.append(time.perf_counter() - start)
        assert min(seconds) < 1
