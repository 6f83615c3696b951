"""Steps by replay are steps as usual, bit for bit, or are not replayed."""
import sys

import numpy as np
import pytest

import kernels
import minitensor as mt
from gpt import replay
from gpt.config import Config
from gpt.data import batch
from gpt.model import GPT
from gpt.optimizer import make_optimizer
from gpt.replay import Replay
from gpt.train import evaluate, loss_and_gradients

VOCABULARY = 65
SIZES = dict(layers=2, heads=2, width=64, context=64, batch=16)    # from here on sums of arrays are kernels
IDS = np.random.default_rng(3).integers(VOCABULARY, size=5000).astype(np.int32)


@pytest.fixture
def make():
    """A function: a model of a config, what finds its gradients as usual, and a Replay of that."""
    def model_and_replay(config=None, kind=GPT):
        mt.seed(1)
        model = kind(config or Config(**SIZES), VOCABULARY)

        def plain(x, y):
            calls.append(len(x))
            return loss_and_gradients(model, x, y, 0)
        calls = []
        return model, calls, Replay(model, plain)
    return model_and_replay


def train(model, step, steps=7):
    """The losses of some steps, the gradients of the last, and the weights after it."""
    optimizer, losses = make_optimizer(model, model.config), []
    for n in range(steps):
        losses.append(step(*batch(IDS, model.config.batch, model.config.context, 0, n)))
        gradients = [p.grad.data.copy() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return np.array(losses), *gradients, *(p.data for p in model.parameters())


@pytest.mark.parametrize("more", [{}, dict(bias=True), dict(positions="rotary", qk_norm=True, mlp="relu2",
                                                         optimizer="muon", muon_lr=0.01)],
                         ids=["default", "bias", "modern"])
def test_the_bits_are_those_of_steps_as_usual(make, more):
    config = Config(**SIZES, **more)
    model, calls, step = make(config)
    found = train(model, step)
    assert step.verified and len(calls) == 3, "the first, the one that is noted, the one that is compared"
    model, _, step = make(config)
    for i, (x, y) in enumerate(zip(found, train(model, step.plain), strict=True)):
        assert x.tobytes() == y.tobytes(), i


def test_with_dropout_no_step_is_replayed(make):
    model, calls, step = make(Config(**SIZES, dropout=0.1))
    train(model, step)
    assert len(calls) == 7


class Scaled(GPT):
    """Its logits are scaled by a number that is not in any kernel."""
    def forward(self, ids):
        return super().forward(ids) * np.float32(1 + 0.1 * np.abs(self.norm.weight.numpy()).max())


def test_a_model_that_computes_beside_its_kernels_is_found_out(make):
    model, calls, step = make(kind=Scaled)
    train(model, step)
    assert not step.verified and len(calls) == 7 and not step.pool and not step.tape


def test_what_has_changed_is_seen(make, monkeypatch):
    model, calls, step = make()
    train(model, step)
    x, y = batch(IDS, 16, 64, 0, 9)
    kept = [g.copy() for g in gradients_of(model, step, x, y)]

    def usual():
        """Is this step one as usual? It is the same either way."""
        before = len(calls)
        found = gradients_of(model, step, x, y)
        assert all((g is None) == (h is None) and (g is None or g.tobytes() == h.tobytes())
                   for g, h in zip(found, gradients_of(model, step.plain, x, y), strict=True))
        return len(calls) == before + 2
    assert not usual()
    model.norm.weight.data[...] *= 2                                   # in place: the kernels read it
    assert not usual()
    model.norm.weight.data = model.norm.weight.data / 2                # another array
    assert usual()
    model.norm.weight.data = step.arrays[step.parameters.index(model.norm.weight)]
    model.norm.weight.data[...] /= 2
    assert not usual()
    model.positions.requires_grad = False
    assert usual()
    model.positions.requires_grad = True
    x, y = x[:8], y[:8]
    assert usual()
    x, y = batch(IDS, 16, 64, 0, 9)
    x, y = x.astype(np.int64), y.astype(np.int64)
    assert usual()
    x, y = batch(IDS, 16, 64, 0, 9)
    y[3, 5] = -100                                                     # which does not count
    assert usual()
    y[3, 5] = 0
    assert not usual()
    monkeypatch.setattr(kernels, "get_matmul_precision", lambda: "bf16")
    assert usual()
    monkeypatch.undo()
    x, y = batch(IDS, 16, 64, 0, 9)
    assert all(g.tobytes() == h.tobytes() for g, h in zip(gradients_of(model, step, x, y), kept, strict=True))
    assert not usual()


def gradients_of(model, step, x, y):
    for p in model.parameters():
        p.grad = None
    step(x, y)
    return [None if p.grad is None else p.grad.data for p in model.parameters()]


def test_what_is_computed_between_steps_is_in_nobody_s_way(make):
    results = []
    for replayed in (True, False):
        model, _, step = make()
        optimizer, found = make_optimizer(model, model.config), []
        for n in range(9):
            x, y = batch(IDS, 16, 64, 0, n)
            found.append((step if replayed else step.plain)(x, y))
            losses = mt.cross_entropy(model(x), y, reduction="none")     # lives on beside the next step
            optimizer.step()
            optimizer.zero_grad()
            found.append(evaluate(model, IDS[:500]))
            found.append((step if replayed else step.plain)(x[:7], y[:7]))
            optimizer.zero_grad()
            found.append(losses.numpy().tobytes())
        results.append(found)
    assert results[0] == results[1]


@pytest.mark.parametrize("when", [2, 3, 4])
def test_an_interrupted_step_is_made_again(make, monkeypatch, when):
    model, _, step = make()
    x, y = batch(IDS, 16, 64, 0, 0)
    expected = [g.copy() for g in gradients_of(model, step, x, y)]
    for _ in range(when - 2):
        gradients_of(model, step, x, y)
    count, real = [0], kernels.jit.launch

    def interrupted(*arguments):
        count[0] += 1
        if count[0] == 20:
            raise KeyboardInterrupt
        real(*arguments)
    for module in (sys.modules["kernels.matmul"], replay):
        monkeypatch.setattr(module, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gradients_of(model, step, x, y)
    monkeypatch.undo()
    for _ in range(3):
        found = gradients_of(model, step, x, y)
        assert all(g.tobytes() == h.tobytes() for g, h in zip(found, expected, strict=True))


def test_gradients_that_are_there_are_added_to(make):
    model, calls, step = make()
    train(model, step)
    x, y = batch(IDS, 16, 64, 0, 9)
    gradients = [g.copy() for g in gradients_of(model, step, x, y)]
    step(x, y)
    assert len(calls) == 4
    for p, g in zip(model.parameters(), gradients, strict=True):
        np.testing.assert_array_equal(p.grad.data, g + g)


def test_an_id_beyond_the_vocabulary_is_refused(make):
    model, _, step = make()
    train(model, step)
    x, y = batch(IDS, 16, 64, 0, 9)
    for bad, message in (((np.full_like(x, VOCABULARY), y), "ids holds 65"),
                         ((x, np.full_like(y, -1)), "targets holds -1")):
        with pytest.raises(IndexError, match=message):
            step(*bad)
    with pytest.raises(ValueError, match="targets are"):
        step(x, y[:1])
