"""Steps by replay are steps as usual, bit for bit, or are not replayed."""
import numpy as np
import pytest

import kernels
import minitensor as mt
from gpt.config import Config
from gpt.data import batch
from gpt.model import GPT
from gpt.optimizer import make_optimizer
from gpt.replay import Replay
from gpt.train import loss_and_gradients

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
    assert step.verified and len(calls) == 2, "the first, and the one that is compared"
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
    assert not step.verified and len(calls) == 6


def test_what_has_changed_is_seen(make):
    model, calls, step = make()
    train(model, step)
    x, y = batch(IDS, 16, 64, 0, 9)

    def loss(x=x, y=y):
        for p in model.parameters():
            p.grad = None
        return step(x, y)
    before, replayed = loss(), len(calls)
    assert len(calls) == replayed == 2
    model.norm.weight.data[...] *= 2                                   # in place: the kernels read it
    assert loss() != before and len(calls) == 2
    model.norm.weight.data = model.norm.weight.data / 2                # another array
    assert loss() == before and len(calls) == 3
    assert loss(x[:8], y[:8]) != before and len(calls) == 4
    assert loss(x.astype(np.int64), y.astype(np.int64)) == before and len(calls) == 5


def test_gradients_that_are_there_are_added_to(make):
    model, calls, step = make()
    train(model, step)
    x, y = batch(IDS, 16, 64, 0, 9)
    once = step(x, y)
    gradients = [p.grad.data.copy() for p in model.parameters()]
    assert step(x, y) == once and len(calls) == 3
    for p, g in zip(model.parameters(), gradients, strict=True):
        np.testing.assert_array_equal(p.grad.data, g + g)


def test_an_id_beyond_the_vocabulary_is_refused(make):
    model, _, step = make()
    train(model, step)
    x, y = batch(IDS, 16, 64, 0, 9)
    for bad in ((np.full_like(x, VOCABULARY), y), (x, np.full_like(y, -1))):
        with pytest.raises(IndexError, match="it must be in 0 to 64"):
            step(*bad)
    assert step(x, y) > 0


def test_another_precision_is_not_replayed(make, monkeypatch):
    model, calls, step = make()
    train(model, step)
    monkeypatch.setattr(kernels, "get_matmul_precision", lambda: "bf16")
    step(*batch(IDS, 16, 64, 0, 9))
    assert len(calls) == 3
