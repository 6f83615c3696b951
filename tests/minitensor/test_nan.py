"""The NaN doctor: it stops at the op that made the first number that is not finite, and at no other."""
from pathlib import Path

import numpy as np
import pytest

import minitensor as mt
from gpt.config import Config
from gpt.model import GPT
from minitensor import nn
from minitensor.tensor import Tensor, grad

HERE = Path(__file__)


def leaf(*values, dtype=np.float32):
    return Tensor(np.array(values, dtype), requires_grad=True)


def line_of(marker):
    return next(i for i, text in enumerate(HERE.read_text().splitlines(), 1) if text.endswith(f"# {marker}"))


def complaint(run):
    with mt.detect_nan(), pytest.raises(FloatingPointError) as caught:
        run()
    return str(caught.value)


def test_forward_word_for_word(monkeypatch):
    monkeypatch.chdir(HERE.parent)

    class Entropy(nn.Module):
        def forward(self, p):
            return -np.sum(p * np.log(p))                                # log

    class Net(nn.Module):
        def __init__(self):
            self.parts = [Entropy(), Entropy()]

        def forward(self, p):
            return self.parts[1](p)

    assert complaint(lambda: Net()(leaf(0.0, 0.5, 1.0))) == (
        "detect_nan: op 'log' made 1 of 3 elements infinite\n"
        f"  at test_nan.py:{line_of('log')}, in parts.1: np.log(p)\n"
        "  argument 0 (3,) float32: 0 to 1, mean 0.5, std 0.4082, 33.3 % zeros")


def test_a_sum_of_gradients_that_overflows():
    def at_a_leaf():
        x = leaf(0.1)
        np.sum(x * 3e38 + x * 3e38).backward()

    def on_the_way():
        x = leaf(0.1)
        y = np.sin(x)
        np.sum(y * 3e38 + y * 3e38).backward()

    def in_two_walks():
        x = leaf(0.1)
        for _ in range(2):
            np.sum(x * 3e38).backward()
    assert complaint(at_a_leaf).startswith(
        "detect_nan: the sum of the gradients of a leaf of shape (1,) has 1 of 1 elements infinite")
    assert "sum of the gradients of the result of op 'sin' has" in complaint(on_the_way)
    assert "a leaf of shape (1,) has" in complaint(in_two_walks)


def test_backward_word_for_word(monkeypatch):
    monkeypatch.chdir(HERE.parent)

    def run():
        x = leaf(4.0, 0.0)
        np.sum(np.sqrt(x) * 2).backward()                                # sqrt
    assert complaint(run) == (
        "detect_nan: the vjp of 'sqrt' for argument 0 made 1 of 2 elements infinite\n"
        f"  at test_nan.py:{line_of('sqrt')}: np.sqrt(x)\n"
        "  gradient (2,) float32: 2 to 2, mean 2, std 0, 0 % zeros\n"
        "  argument 0 (2,) float32: 0 to 4, mean 2, std 2, 50 % zeros")


@pytest.mark.parametrize(("what", "f", "x"), [
    ("op 'divide' made 1 of 1 elements infinite", lambda x: 1 / x, 0.0),
    ("op 'divide' made 1 of 1 elements NaN", lambda x: x / x, 0.0),
    ("op 'exp' made 1 of 1 elements infinite", np.exp, 89.0),
    ("op 'sqrt' made 1 of 1 elements NaN", np.sqrt, -1.0),
    ("op 'power' made 1 of 1 elements NaN", lambda x: x ** 0.5, -1.0),
    ("op 'square' made 1 of 1 elements infinite", np.square, 1e30),
    ("op 'multiply' made 1 of 1 elements NaN", lambda x: np.where(np.array([True]), np.inf, x) * 0, 1.0),
])
def test_forward(what, f, x):
    assert what in complaint(lambda: f(leaf(x)))
    with mt.no_grad():                                       # with no graph as well
        message = complaint(lambda: f(leaf(x)))
        assert what in message and "test_nan.py" in message


def test_the_first_op_is_named():
    message = complaint(lambda: np.exp(np.log(leaf(0.0) * 3)) + 1)
    assert "op 'log'" in message and "argument 0 (1,) float32: 0 to 0" in message


def test_fused_ops():
    def forward():
        mt.linear(leaf(1e30, 1e30), Tensor(np.full((1, 2), 1e30, np.float32)))
    message = complaint(forward)
    assert "op 'linear' made 1 of 1 elements infinite" in message and "argument 1 (1, 2) float32" in message

    def backward():
        y = mt.softmax(leaf(1.0, 2.0))
        np.sum(y * Tensor(np.array([3e38, -3e38], np.float32))).backward()
    assert "the vjp of 'softmax' for argument 0 made 1 of 2 elements infinite" in complaint(backward)


def test_a_wrong_vjp():
    @mt.op()
    def halved(x):
        return x / 2, lambda g: g / np.zeros_like(g)

    message = complaint(lambda: np.sum(halved(leaf(1.0, 2.0))).backward())
    assert "the vjp of 'halved' for argument 0 made 2 of 2 elements infinite" in message


def test_second_derivatives():
    def run():
        x = leaf(0.0)
        grad(np.sum(x ** 1.5), x, create_graph=True)[0].backward()
    assert "made 1 of 1 elements infinite" in complaint(run)


def test_what_was_there_may_pass():
    with mt.detect_nan():
        x = leaf(np.inf, np.nan, 1.0)
        np.sum(np.exp(x) * 2 + x).backward()
        np.sum(leaf(1.0) * 2).backward(gradient=np.float32(np.nan))
        scores = np.where(np.tri(3, dtype=bool), Tensor(np.ones((3, 3), np.float32), True), -np.inf)
        np.sum(mt.softmax(scores) * 2).backward()
        with mt.unfused():
            scores = np.where(np.tri(3, dtype=bool), Tensor(np.ones((3, 3), np.float32), True), -np.inf)
            np.sum(mt.softmax(scores) * 2).backward()
        assert mt.logsumexp(leaf(-np.inf, -np.inf)).item() == -np.inf


def test_a_row_that_is_masked_wholly():
    with mt.unfused():
        message = complaint(lambda: mt.softmax(np.where(np.zeros(3, bool), leaf(1.0, 2.0, 3.0), -np.inf)))
    assert "op 'subtract' made 3 of 3 elements NaN" in message and "3 not finite" in message


@pytest.mark.parametrize("unfused", [False, True])
def test_a_sound_gpt_passes_and_a_sick_one_is_found(unfused):
    model = GPT(Config(layers=1, width=8, heads=2, context=4, dropout=0.1), 5)
    ids = np.array([[0, 1, 2, 3]])

    def run():
        if unfused:
            with mt.unfused():
                return mt.trace(mt.cross_entropy(model(ids), ids))
        return mt.trace(mt.cross_entropy(model(ids), ids))

    with mt.detect_nan():
        assert run()[0].op == ("multiply" if unfused else "cross_entropy")
    weight = model.blocks[0].mlp.up.weight
    weight.data[...] = 3e38 * np.sign(np.random.default_rng(0).standard_normal(weight.shape))
    message = complaint(run)
    assert "in blocks.0.mlp" in message and "model.py" in message and "float32: " in message


def test_outside_nothing_is_stopped():
    with pytest.raises(FloatingPointError), mt.detect_nan():
        np.log(leaf(0.0))
    with np.errstate(divide="ignore"):
        assert np.log(leaf(0.0)).item() == -np.inf
