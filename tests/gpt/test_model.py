"""The GPT beside its PyTorch peer, and what must hold of it by itself."""
import json
import math
from pathlib import Path

import numpy as np
import pytest

import minitensor as mt
from gpt.config import Config
from gpt.data import batch
from gpt.generate import choose, generate
from gpt.model import GPT
from gpt.optimizer import make_optimizer
from gpt.train import evaluate
from minitensor.optim import AdamW
from minitensor.tensor import unfused

SMALL = Config(layers=2, heads=2, width=32, context=16, batch=4, lr=1e-2, beta2=0.99)
WITH_BIAS = Config(layers=2, heads=2, width=32, context=16, batch=4, lr=1e-2, beta2=0.99, bias=True)
MODERN = Config(layers=2, heads=2, width=32, context=16, batch=4, lr=1e-2, muon_lr=1e-2, beta2=0.99,
                positions="rotary", qk_norm=True, mlp="relu2", optimizer="muon")
NORM_ALONE = Config(layers=1, heads=2, width=32, context=16, batch=4, lr=1e-2, beta2=0.99, qk_norm=True)
GOLDEN = {"golden.json": WITH_BIAS, "golden_modern.json": MODERN}
VOCABULARY, STEPS = 19, 10
# Adam's first steps divide a gradient by its own size, so that one that has cancelled down to what float32
# rounds off (1e-8 here) moves its weight by a part of the learning rate that is chance, in PyTorch too.
# An eps above that keeps chance out of the comparison.
EPS = {np.float64: 1e-8, np.float32: 1e-4}
IDS = np.random.default_rng(3).integers(VOCABULARY, size=500).astype(np.int32)


def make(config, dtype=np.float32, seed=1):
    mt.seed(seed)
    model = GPT(config, VOCABULARY)
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(dtype)
    return model


def ten_steps(config, dtype):
    """The losses, the gradients by name and step, and the weights at the end."""
    model = make(config, dtype)
    optimizer = make_optimizer(model, config)
    getattr(optimizer, "optimizers", [optimizer])[0].eps = EPS[dtype]
    losses, gradients = [], {}
    for step in range(STEPS):
        x, y = batch(IDS, config.batch, config.context, 0, step)
        loss = mt.cross_entropy(model(x), y)
        loss.backward()
        gradients |= {f"{name}, step {step}": p.grad.data.copy() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients, model.state_dict()


def ten_steps_of_the_peer(config, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch is the reference; the golden run needs none")
    from tests.gpt import torch_peer
    peer = torch_peer.build(config, VOCABULARY).to(getattr(torch, np.dtype(dtype).name))
    torch_peer.load(peer, make(config, dtype).state_dict())
    parameters = dict(peer.named_parameters())
    optimizers = torch_peer.optimizers(peer, config, EPS[dtype])
    losses, gradients = [], {}
    for step in range(STEPS):
        pair = batch(IDS, config.batch, config.context, 0, step)
        x, y = (torch.from_numpy(ids.astype(np.int64)) for ids in pair)
        loss = torch.nn.functional.cross_entropy(peer(x).flatten(0, 1), y.flatten())
        loss.backward()
        gradients |= {f"{name}, step {step}": p.grad.numpy().copy() for name, p in parameters.items()}
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients, {name: p.detach().numpy() for name, p in parameters.items()}


@pytest.mark.parametrize("config", [SMALL, WITH_BIAS, MODERN, NORM_ALONE],
                         ids=["plain", "bias", "modern", "norm"])
@pytest.mark.parametrize(("dtype", "of_losses", "of_gradients"),
                         [(np.float64, 1e-10, 1e-8), (np.float32, 1e-4, 1e-4)], ids=["float64", "float32"])
def test_ten_steps_are_pytorchs(config, dtype, of_losses, of_gradients):
    losses, gradients, weights = ten_steps(config, dtype)
    expected_losses, expected_gradients, expected_weights = ten_steps_of_the_peer(config, dtype)
    np.testing.assert_allclose(losses, expected_losses, rtol=of_losses)
    assert gradients.keys() == expected_gradients.keys()
    for name, g in gradients.items():
        assert g.dtype == dtype
        scale = np.abs(expected_gradients[name]).max()
        np.testing.assert_allclose(g, expected_gradients[name], rtol=0, atol=of_gradients * scale,
                                   err_msg=name)
    if dtype is np.float64:
        for name, w in weights.items():
            np.testing.assert_allclose(w, expected_weights[name], rtol=0, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("name", GOLDEN)
def test_ten_steps_are_the_golden_run(name):
    """Recorded from PyTorch in float64: `python -m tests.gpt.test_model` records them again."""
    golden = json.loads(Path(__file__).with_name(name).read_text())
    losses, _, weights = ten_steps(GOLDEN[name], np.float64)
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-10)
    assert weights.keys() == golden["norms"].keys()
    for name, w in weights.items():
        np.testing.assert_allclose(np.linalg.norm(w), golden["norms"][name], rtol=1e-8, err_msg=name)


def test_fused_and_unfused_are_one_model():
    model, (x, y) = make(SMALL, np.float64), batch(IDS, 4, 16, 0, 0)
    mt.cross_entropy(model(x), y).backward()
    fused = {name: p.grad.data for name, p in model.named_parameters()}
    model.zero_grad()
    with unfused():
        mt.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad.data, fused[name], rtol=0, atol=1e-12, err_msg=name)


def test_a_later_token_never_changes_an_earlier_logit():
    model = make(Config(layers=2, heads=2, width=32, context=70)).eval()
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(2, 70)).astype(np.int32)
    with mt.no_grad():
        before = model(ids).numpy().copy()
        for t in (1, 33, 48, 69):
            changed = ids.copy()
            changed[:, t:] = (changed[:, t:] + 1) % VOCABULARY
            after = model(changed).numpy()
            assert np.array_equal(after[:, :t], before[:, :t])
            assert not np.array_equal(after[:, t], before[:, t])


def test_the_head_and_the_embedding_are_one_matrix():
    model, (x, y) = make(SMALL, np.float64), batch(IDS, 4, 16, 0, 0)
    assert model.head.weight is model.tokens.weight
    assert [name for name in model.state_dict() if "head" in name] == []
    mt.cross_entropy(model(x), y).backward()
    both = model.tokens.weight.grad.data
    model.zero_grad()
    model.head.weight = model.tokens.weight.detach()
    mt.cross_entropy(model(x), y).backward()
    as_embedding = model.tokens.weight.grad.data
    model.zero_grad()
    model.head.weight, model.tokens.weight = model.tokens.weight, model.tokens.weight.detach()
    mt.cross_entropy(model(x), y).backward()
    np.testing.assert_allclose(as_embedding + model.head.weight.grad.data, both, rtol=0, atol=1e-12)


def test_overfits_one_batch():
    model, (x, y) = make(SMALL), batch(IDS, 4, 16, 0, 0)
    optimizer = AdamW(model.parameters(), 1e-2, weight_decay=0.0, max_norm=1.0)
    for _ in range(150):
        loss = mt.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


def test_evaluation_is_deterministic_and_training_is_not_without_dropout():
    model = make(Config(layers=1, heads=2, width=32, context=16, dropout=0.3))
    x = IDS[None, :16]
    with mt.no_grad():
        assert np.array_equal(model.eval()(x).numpy(), model(x).numpy())
        assert not np.array_equal(model.train()(x).numpy(), model(x).numpy())


def test_the_same_seed_gives_the_same_bits():
    config = Config(layers=2, heads=2, width=32, context=16, batch=4, dropout=0.2)
    (losses, _, weights), (again, _, weights_again) = (ten_steps(config, np.float32) for _ in range(2))
    assert losses == again
    assert all(np.array_equal(w, weights_again[name]) for name, w in weights.items())


def test_weights_start_as_the_config_has_them():
    config = Config(layers=8, heads=2, width=64, context=64, token_std=0.15)
    mt.seed(0)
    deviations = {name: p.data.std() for name, p in GPT(config, 65).named_parameters() if p.ndim == 2}
    assert deviations.pop("tokens.weight") == pytest.approx(0.15, rel=0.05)
    for name, deviation in deviations.items():
        into_stream = name.endswith(("projection.weight", "down.weight"))
        assert deviation == pytest.approx(0.02 / 4 if into_stream else 0.02, rel=0.05)


def test_sizes():
    mt.seed(0)
    model = GPT(Config(), 65)
    assert sum(p.size for p in model.parameters()) == 804_096
    x, y = np.random.default_rng(0).integers(65, size=(2, 12, 64)).astype(np.int32)
    assert abs(mt.cross_entropy(model(x), y).item() - math.log(65)) < 0.1
    with pytest.raises(ValueError, match=r"ids are \(1, 65\); the context holds 64 tokens"):
        model(np.zeros((1, 65), np.int32))


def test_generate_sees_the_context_and_repeats_itself_by_seed():
    model = make(SMALL)
    ids = generate(model, IDS[:3], 40, seed=5)
    assert ids.shape == (43,) and np.array_equal(ids[:3], IDS[:3]) and model.training
    assert np.array_equal(ids, generate(model, IDS[:3], 40, seed=5))
    assert not np.array_equal(ids, generate(model, IDS[:3], 40, seed=6))
    likeliest = generate(model, IDS[:3], 5, temperature=0)
    assert np.array_equal(likeliest, generate(model, IDS[:3], 5, top_k=1, seed=9))
    with mt.no_grad():
        assert likeliest[3] == model(IDS[None, :3]).numpy()[0, -1].argmax()


def test_choose_draws_from_the_softmax():
    logits = np.log([0.5, 0.2, 0.3])
    draws = np.array([choose(logits, 1.0, None, u) for u in (np.arange(1000) + 0.5) / 1000])
    assert np.array_equal(np.bincount(draws), [500, 200, 300])
    draws = np.array([choose(logits, 1.0, 2, u) for u in (np.arange(800) + 0.5) / 800])
    assert np.array_equal(np.bincount(draws, minlength=3), [500, 0, 300])
    assert choose(logits, 1.0, None, 1 - 2**-53) == 2 and choose(logits, 0.0, None, 0.9) == 0


def test_validation_is_the_mean_over_every_token_but_the_first():
    """Window by window, the last one shorter, dropout off, and the model left as it was."""
    model, ids = make(Config(layers=1, heads=2, width=16, context=16, dropout=0.5)), IDS[:16 * 9 + 8]
    losses = []
    with mt.no_grad():
        for start in range(0, len(ids) - 1, 16):
            x, y = ids[None, start:start + 16][:, :len(ids) - 1 - start], ids[None, start + 1:start + 17]
            logits = model.eval()(x).numpy().astype(np.float64)[0]
            losses += list(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), y[0]])
    assert len(losses) == len(ids) - 1
    model.train()
    assert evaluate(model, ids) == pytest.approx(np.mean(losses), rel=1e-6)
    assert model.training and model.blocks[0].mlp.dropout.training


if __name__ == "__main__":
    for file, config in GOLDEN.items():
        losses, _, weights = ten_steps_of_the_peer(config, np.float64)
        norms = {name: float(np.linalg.norm(w)) for name, w in weights.items()}
        found = json.dumps({"losses": losses, "norms": norms}, indent=1)
        Path(__file__).with_name(file).write_text(found + "\n")
