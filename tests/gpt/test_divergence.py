"""A loss or a gradient that is not finite ends the run and is traced; what was saved stays."""
import json
import re

import numpy as np
import pytest

from gpt import command
from gpt import train as module
from gpt.checkpoint import load_run
from gpt.verse import verse

TINY = ["--recipe", "classic", "--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch",
        "4", "--steps", "8", "--eval-every", "2", "--sample", "0", "--dropout", "0.2", "--quiet"]


@pytest.fixture
def train(tmp_path):
    (tmp_path / "verse.txt").write_text(verse(3000))

    def run(*more):
        data, out = str(tmp_path / "verse.txt"), str(tmp_path / "out")
        return command.main([*TINY, "--data", data, "--out", out, *more])
    return run


@pytest.fixture
def spoil(monkeypatch):
    """A function that has a step's model and batch go through `change` before its loss is taken."""
    def at_step(n, change):
        plain, calls = module.loss_and_gradients, []

        def spoilt(model, x, y, micro_batch):
            calls.append(None)
            loss = plain(model, x, y, micro_batch)
            losses.append(loss)
            return change(model, loss) if len(calls) == n else loss
        monkeypatch.setattr(module, "loss_and_gradients", spoilt)
        losses = []
        return losses
    return at_step


def test_a_gradient_is_traced_to_its_parameter(train, tmp_path, spoil, capsys):
    def change(model, loss):
        model.blocks[0].mlp.up.weight.grad.data[3, 4] = np.inf
        model.norm.weight.grad.data[0] = np.nan
        return loss
    losses = spoil(5, change)
    assert train() == 3
    said = capsys.readouterr().err
    assert "a gradient of step 5 is not a finite number" in said and said.count("\n") == 1
    assert "the first bad gradient is that of 'blocks.0.mlp.up.weight'" in said
    assert "all ops are finite when it is done again" in said
    assert len(losses) == 6 and losses[5] == losses[4], "the same masks of dropout, the same weights"
    assert load_run(tmp_path / "out" / "checkpoint.safetensors").progress.step == 4


def test_a_loss_is_traced_to_its_op(train, tmp_path, capsys):
    assert train("--stop-after", "2") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with np.errstate(all="ignore"):
        assert train("--lr", "1e38", "--warmup", "0", "--eval-every", "8") == 3
    said = capsys.readouterr().err
    note, error = said.splitlines()
    assert note.startswith("note: the run in") and error.startswith("error: the loss of step")
    assert re.search(r"; detect_nan: op '\w+' made", error), "the op is named"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_loss_that_is_not_finite_takes_no_step(train, tmp_path, spoil, monkeypatch):
    spoil(5, lambda model, loss: float("inf"))                   # of gradients that are finite
    weights, plain = [], module.explain

    def explain(run, *rest):
        weights.append({name: x.copy() for name, x in run.model.state_dict().items()})
        return plain(run, *rest)
    monkeypatch.setattr(module, "explain", explain)
    assert train() == 3
    last = load_run(tmp_path / "out" / "checkpoint.safetensors")
    assert last.progress.step == 4
    for name, x in last.model.state_dict().items():
        np.testing.assert_array_equal(weights[0][name], x)


def test_bad_weights_are_named(train, capsys, spoil):
    def change(model, loss):
        model.positions.data[0, 0] = np.nan
        return float("nan")
    spoil(3, change)
    assert train() == 3
    said = capsys.readouterr().err
    assert "the loss of step 3 is nan" in said and "the weights 'positions' are not finite" in said


@pytest.mark.parametrize(("call", "split"), [(3, "training"), (4, "validation")])
def test_an_evaluation_that_is_not_finite_is_never_saved(call, split, train, tmp_path, monkeypatch, capsys):
    plain, calls = module.evaluate, []

    def bad(model, ids, after_window):
        calls.append(None)
        return float("nan") if len(calls) == call else plain(model, ids, after_window)
    monkeypatch.setattr(module, "evaluate", bad)
    assert train() == 3
    assert f"the {split} loss after step 4 is nan" in capsys.readouterr().err
    assert load_run(tmp_path / "out" / "checkpoint.safetensors").progress.step == 2
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]


def test_the_run_goes_on_from_the_last_good_checkpoint(train, tmp_path, spoil, monkeypatch):
    with monkeypatch.context():
        spoil(5, lambda model, loss: float("inf"))
        assert train() == 3
    monkeypatch.undo()
    assert train("--resume") == 0
    assert load_run(tmp_path / "out" / "checkpoint.safetensors").progress.done
