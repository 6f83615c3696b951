"""The recipes, and what each idea in them must hold to."""
import dataclasses
import json

import numpy as np
import pytest

import minitensor as mt
from gpt import checkpoint, command
from gpt.config import DEFAULT, RECIPES, Config
from gpt.data import batch
from gpt.errors import BadInput
from gpt.generate import generate, window_start
from gpt.model import GPT
from gpt.optimizer import make_optimizer
from gpt.run import Progress, Run
from gpt.tokenizer import CharTokenizer
from minitensor.optim import AdamW, Muon, Together
from minitensor.tensor import unfused

SMALL = Config(layers=2, heads=2, width=16, context=8, batch=4, lr=1e-2)
IDEAS = {"positions": "rotary", "qk_norm": True, "mlp": "relu2", "optimizer": "muon"}
ALONE = {name: dataclasses.replace(SMALL, **{name: value}) for name, value in IDEAS.items()}
EACH = {"none": SMALL, **ALONE, "all": dataclasses.replace(SMALL, **IDEAS)}
each = pytest.mark.parametrize("config", EACH.values(), ids=EACH.keys())
TOKENIZER = CharTokenizer("abcdefghijklm")
IDS = np.random.default_rng(0).integers(len(TOKENIZER), size=200).astype(np.int32)


def make(config, seed=1):
    mt.seed(seed)
    return GPT(config, len(TOKENIZER))


def save(path, model):
    optimizer = make_optimizer(model, model.config)
    checkpoint.save_run(path, Run(model.config, TOKENIZER, model, optimizer, Progress(), {}))


def parsed(*arguments):
    """The config that a new run has of these arguments."""
    return dataclasses.replace(RECIPES[DEFAULT], **command.parse(list(arguments))[0])


def train_a_little(model, steps=3):
    optimizer = make_optimizer(model, model.config)
    for step in range(steps):
        x, y = batch(IDS, model.config.batch, model.config.context, 0, step)
        mt.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_the_command_line_gives_by_its_name(name):
    assert parsed("--recipe", name) == RECIPES[name]
    assert parsed("--recipe", name, "--mlp", "gelu", "--seed", "3") \
        == dataclasses.replace(RECIPES[name], mlp="gelu", seed=3)


def test_quick_is_the_default_and_classic_is_nanogpts():
    assert DEFAULT == "quick" and parsed() == RECIPES["quick"]
    classic = dict(layers=4, heads=4, width=128, context=64, dropout=0.0, bias=False, positions="learned",
                   token_std=0.02, qk_norm=False, mlp="gelu", batch=12, steps=2000, optimizer="adamw",
                   lr=1e-3, min_lr=1e-4, warmup=100, hold=0.0, beta1=0.9, beta2=0.99, decay=0.1, clip=1.0,
                   eval_every=500, seed=0)
    assert classic.items() <= dataclasses.asdict(RECIPES["classic"]).items()
    for name in ("quick", "modern", "lecture-modern"):
        assert IDEAS.items() <= dataclasses.asdict(RECIPES[name]).items()
    size = ("layers", "heads", "width", "context", "bias")
    assert all(getattr(RECIPES["modern"], name) == getattr(RECIPES["classic"], name) for name in size)
    assert all(getattr(RECIPES["lecture-modern"], name) == getattr(RECIPES["lecture"], name) for name in size)


@pytest.mark.parametrize(("wrong", "said"), [
    ({"positions": "absolute"}, "--positions is absolute; it must be one of learned, rotary"),
    ({"mlp": "relu"}, "--mlp is relu; it must be one of gelu, relu2"),
    ({"optimizer": "sgd"}, "--optimizer is sgd; it must be one of adamw, muon"),
    ({"positions": "rotary", "width": 12, "heads": 4},
     "--heads is 4; it must be such that width / heads, 3, is even"),
    ({"muon_lr": 0.0}, "--muon-lr is 0.0; it must be a positive number"),
    ({"token_std": 0.0}, "--token-std is 0.0; it must be a positive number"),
    ({"momentum": 1.0}, "--momentum is 1.0; it must be in"),
    ({"hold": 1.5}, "--hold is 1.5; it must be in"),
])
def test_what_cannot_be_is_named(wrong, said):
    with pytest.raises(BadInput, match=f"^{said}"):
        Config(**wrong)


@each
def test_a_checkpoint_brings_the_model_back(config, tmp_path):
    model = train_a_little(make(config))
    save(tmp_path / "c", model)
    again, tokenizer = checkpoint.load_model(tmp_path / "c")
    assert again.config == config and tokenizer.vocabulary == TOKENIZER.vocabulary
    with mt.no_grad():
        assert np.array_equal(again(IDS[None, :8]).numpy(), model(IDS[None, :8]).numpy())


def test_a_checkpoint_from_before_these_ideas_is_a_model_without_them(tmp_path):
    model = make(SMALL)
    save(tmp_path / "c", model)
    arrays, metadata = checkpoint.load(tmp_path / "c")
    config = json.loads(metadata["config"])
    for name in ("positions", "qk_norm", "mlp", "optimizer", "muon_lr", "momentum"):
        del config[name]
    checkpoint.save(tmp_path / "old", arrays, {**metadata, "config": json.dumps(config)})
    again, _ = checkpoint.load_model(tmp_path / "old")
    assert again.config == SMALL
    with mt.no_grad():
        assert np.array_equal(again(IDS[None, :8]).numpy(), model(IDS[None, :8]).numpy())


@each
def test_sampling_goes_on_past_the_context(config):
    model = train_a_little(make(config))
    whole = generate(model, IDS[:3], 4 * config.context, seed=2)
    assert np.array_equal(whole, generate(model, IDS[:3], 4 * config.context, seed=2))
    seen = window_start(len(whole) - 1, config.context)
    cut = whole[seen:-1]                                         # the last token is drawn from what these say
    likeliest = generate(model, whole[:-1], 1, temperature=0)[-1]
    assert likeliest == generate(model, cut, 1, temperature=0)[-1]


@each
def test_a_token_does_not_see_later_ones(config):
    model, ids = train_a_little(make(config)), IDS[None, :8]
    changed = ids.copy()
    changed[0, 5:] = (changed[0, 5:] + 1) % len(TOKENIZER)
    with mt.no_grad():
        before, after = model(ids).numpy(), model(changed).numpy()
    assert np.array_equal(before[0, :5], after[0, :5]) and not np.array_equal(before[0, 5], after[0, 5])


@each
def test_fused_and_unfused_are_one_model(config):
    model = make(config)
    x, y = batch(IDS, 4, 8, 0, 0)
    losses, gradients = [], []
    for context in (mt.no_grad, unfused):                        # no_grad is for the loss alone
        with context():
            losses.append(mt.cross_entropy(model(x), y).item())
    for reference in (False, True):
        loss = mt.cross_entropy(model(x), y)
        gradients.append(mt.grad(loss, model.parameters(), create_graph=reference))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for fused, plain in zip(*gradients, strict=True):
        scale = np.abs(plain.numpy()).max()
        np.testing.assert_allclose(fused.numpy(), plain.numpy(), rtol=0, atol=1e-4 * scale + 1e-8)


def test_rotary_positions_have_no_parameters_and_tell_places_apart():
    learned, rotary = make(SMALL), make(ALONE["positions"])
    assert "positions" in learned.state_dict() and "positions" not in rotary.state_dict()
    with mt.no_grad():
        one, other = (rotary(np.array([ids], np.int32)).numpy()[0, -1] for ids in ([1, 2, 3], [2, 1, 3]))
    assert np.abs(one - other).max() > 1e-6
    mt.seed(0)
    assert sum(p.size for p in GPT(RECIPES["modern"], 65).parameters()) == 804_096 - 64 * 128


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = make(dataclasses.replace(EACH["all"], bias=True, muon_lr=0.03))
    optimizer = make_optimizer(model, model.config)
    assert isinstance(optimizer, Together)
    adamw, muon = optimizer.optimizers
    assert isinstance(adamw, AdamW) and isinstance(muon, Muon)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [names[id(p)] for p in muon.parameters]
    layer = ["attention.qkv.weight", "attention.projection.weight", "mlp.up.weight", "mlp.down.weight"]
    assert found == [f"blocks.{i}.{name}" for i in range(2) for name in layer]
    assert muon.parts == [3, 1, 1, 1] * 2
    assert {names[id(p)] for p in adamw.parameters} == set(names.values()) - set(found)
    optimizer.lr = model.config.lr / 2
    assert (adamw.lr, muon.lr) == (model.config.lr / 2, 0.03 / 2)
    assert isinstance(make_optimizer(make(SMALL), SMALL), AdamW)


@each
def test_the_same_seed_gives_the_same_bits(config):
    first, second = (train_a_little(make(config)).state_dict() for _ in range(2))
    assert all(np.array_equal(array, second[name]) for name, array in first.items())
