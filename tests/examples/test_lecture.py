"""Every rung of the lecture: its size, its gradients, what it may see, and the command that trains it."""
import json

import numpy as np
import pytest

import minitensor as mt
from examples import lecture
from gpt.cli import BAD_INPUT, run
from gpt.data import batch
from gpt.tokenizer import CharTokenizer
from gpt.verse import verse

PARAMETERS = {"bigram": 4225, "positions": 4481, "head": 7553, "heads": 7553, "feedforward": 8609,
              "residual": 41921, "layernorm": 42369, "dropout": 42369, "scaled": 10_788_929}
rungs = pytest.mark.parametrize("name", [name for name in lecture.RUNGS if name != "scaled"])


@pytest.mark.parametrize("name", lecture.RUNGS)
def test_as_many_parameters_as_in_the_lecture(name):
    rung = lecture.RUNGS[name]
    assert sum(p.size for p in rung.model(65, rung.sizes).parameters()) == PARAMETERS[name]


@rungs
def test_a_few_steps_on_verse(name, monkeypatch):
    """The loss falls, and each parameter has a gradient."""
    monkeypatch.setattr(lecture, "EVALUATE_EVERY", 20)
    text = verse(20_000)
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    model, evaluations, seconds = lecture.train(lecture.RUNGS[name]._replace(evaluation_batches=4),
                                                len(tokenizer), ids, ids, 50, 0, lambda evaluation: None)
    assert [e.step for e in evaluations] == [0, 20, 40, 50] and seconds > 0
    losses = [e.validation for e in evaluations]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.2
    mt.cross_entropy(model(ids[None, :8]), ids[None, 1:9]).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad.data.any(), path


@rungs
def test_no_logits_depend_on_a_later_character(name):
    rung = lecture.RUNGS[name]
    model = rung.model(10, rung.sizes).eval()
    ids = np.arange(16).reshape(2, 8) % 10
    logits = model(ids).numpy()
    assert logits.shape == (2, 8, 10)
    for first in range(1, 8):
        changed = ids.copy()
        changed[:, first:] = (ids[:, first:] + 1) % 10
        new = model(changed).numpy()
        np.testing.assert_array_equal(new[:, :first], logits[:, :first])
        assert (new[:, first] != logits[:, first]).any()


@pytest.mark.parametrize("name", ["bigram", "positions"])
def test_before_attention_nothing_looks_back(name):
    rung = lecture.RUNGS[name]
    model = rung.model(10, rung.sizes)
    ids = np.arange(8)[None]
    changed = np.where(np.arange(8) < 4, ids + 1, ids)
    np.testing.assert_array_equal(model(changed).numpy()[:, 4:], model(ids).numpy()[:, 4:])


def test_many_heads_are_heads_side_by_side():
    mt.seed(3)
    heads, width, x = 4, 32, np.random.default_rng(0).standard_normal((2, 8, 32), np.float32)
    many = lecture.MultiHead(width, heads)
    y = many(mt.Tensor(x)).numpy()
    weights = many.qkv.weight.data.reshape(3, heads, width // heads, width)
    for h in range(heads):
        one = lecture.Head(width, width // heads)
        for layer, weight in zip((one.query, one.key, one.value), weights[:, h], strict=True):
            layer.weight.data[...] = weight
        np.testing.assert_allclose(y[..., 8 * h:8 * h + 8], one(mt.Tensor(x)).numpy(), atol=1e-6)


def test_dropout_in_training_alone():
    rung = lecture.RUNGS["dropout"]
    model, ids = rung.model(10, rung.sizes), np.arange(8)[None]
    assert (model(ids).numpy() != model(ids).numpy()).any()
    model.eval()
    np.testing.assert_array_equal(model(ids).numpy(), model(ids).numpy())


def test_evaluation_is_the_mean_of_its_batches():
    rung = lecture.RUNGS["bigram"]._replace(evaluation_batches=3)
    model, ids = rung.model(65, rung.sizes), np.random.default_rng(0).integers(65, size=1000)
    expected = [mt.cross_entropy(model(x), y).item()
                for x, y in (batch(ids, 32, 8, 5, i, rank=1) for i in (21, 22, 23))]
    assert lecture.evaluate(model, ids, rung, 5, 7) == pytest.approx(np.mean(expected))
    assert model.training


def test_command(monkeypatch, tmp_path, capsys):
    few = {name: rung._replace(evaluation_batches=2) for name, rung in lecture.RUNGS.items()}
    monkeypatch.setattr(lecture, "RUNGS", few)
    (tmp_path / "my.txt").write_text(verse(3000))
    out = tmp_path / "out"
    arguments = ["--data", str(tmp_path / "my.txt"), "--steps", "3", "--out", str(out)]
    assert run(lecture.main, arguments) == 0
    printed = capsys.readouterr().out
    assert "scaled" not in printed and "my.txt" in printed
    curves = json.loads((out / "losses.json").read_text())
    assert list(curves) == [name for name in lecture.RUNGS if name != "scaled"]
    table = {line.split()[0]: line.split() for line in printed.split("seconds\n")[1].splitlines() if line}
    for name, curve in curves.items():
        assert [step for step, *_ in curve] == [0, 3]
        assert table[name][2] == "3" and float(table[name][3]) == pytest.approx(curve[-1][2], abs=6e-4)
        assert table[name][4] == "-"                       # references are tinyshakespeare's
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert run(lecture.main, [*arguments, "--rung", "heads"]) == 0
    assert "head  " not in capsys.readouterr().out


def test_the_table_takes_the_loss_after_the_step_of_the_reference():
    rung = lecture.RUNGS["layernorm"]
    model = rung.model(65, rung.sizes)
    curve = [lecture.Evaluation(step, 0.0, step / 1000) for step in (4000, 4500, 5000)]
    assert lecture.row("layernorm", model, curve, 1.0, True).split() == [
        "layernorm", "42,369", "4500", "4.500", "2.10", "1.0"]
    assert lecture.row("dropout", model, curve, 1.0, True).split()[2:5] == ["5000", "5.000", "-"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--rung", "attic"], "argument --rung: invalid choice: 'attic'"), (["--steps", "0"], "--steps is 0"),
    (["--seed", "-1"], "--seed -1"), (["--data", "none.txt"], "none.txt")])
def test_bad_input(arguments, message, capsys):
    assert run(lecture.main, arguments) == BAD_INPUT
    assert message in capsys.readouterr().err
