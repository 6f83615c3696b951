"""How long a run lasts, in parts or at once, and how one starts from another's weights."""
import json
import math
import time

import numpy as np
import pytest

import minitensor as mt
from gpt import command
from gpt.checkpoint import load_model, load_run
from gpt.config import Config
from gpt.data import batch
from gpt.model import GPT
from gpt.results import Results
from gpt.run import Progress
from gpt.schedule import Schedule
from gpt.train import loss_and_gradients
from gpt.verse import verse
from minitensor.optim import warmup_cosine

TINY = ["--recipe", "classic", "--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch",
        "4", "--warmup", "10", "--sample", "0"]


@pytest.fixture
def train(tmp_path):
    (tmp_path / "verse.txt").write_text(verse(3000))

    def run(out, *more):
        return command.main([*TINY, "--data", f"{tmp_path}/verse.txt", "--out", str(tmp_path / out), *more])
    return run


def test_by_steps_it_is_warm_up_and_cosine():
    config = Config(steps=100, warmup=10)
    progress = Progress()
    schedule = Schedule(config, progress, 1000)
    for step in range(100):
        assert schedule.lr() == warmup_cosine(step, 100, 10, config.lr, config.min_lr) and not schedule.over()
        progress.after_step(1.0, 1.0, schedule.lr(), 0.5)
        assert math.isnan(schedule.remaining()) if step == 0 else \
            0 <= schedule.remaining() <= 0.5 * (100 - step - 1) + 4
    assert schedule.over() and schedule.remaining() == 0


def test_hold_is_the_share_at_the_full_rate():
    config = Config(steps=100, warmup=10, hold=0.5)
    progress = Progress()
    schedule, rates = Schedule(config, progress, 1000), []
    for _ in range(100):
        rates.append(schedule.lr())
        progress.after_step(1.0, 1.0, rates[-1], 0.5)
    assert rates.index(config.lr) == 10 and rates[10:51] == 41 * [config.lr]
    assert np.allclose(rates[50:], np.linspace(config.lr, config.min_lr, 51)[:-1])    # then linear


def test_a_slow_second_step_does_not_end_a_run_by_the_clock():
    """An evaluation is expected to take as long as 50 of them, more than there is: half is left to train."""
    config = Config(minutes=1, batch=1, context=1)
    progress = Progress()
    schedule = Schedule(config, progress, 150)
    for seconds in (1.0, 2.0, *100 * [0.1]):
        assert not schedule.over()
        progress.after_step(1.0, 1.0, config.lr, seconds)


@pytest.mark.parametrize("hold", [0.0, 0.5])
@pytest.mark.parametrize("step_seconds", [0.1, 0.7])
def test_by_the_clock_it_is_the_same_curve_over_the_time(step_seconds, hold):
    """A first step that took 20 s to compile, one second for each evaluation, two minutes in all."""
    config = Config(steps=1000, warmup=100, minutes=2, hold=hold)
    progress = Progress()
    schedule = Schedule(config, progress, 0)
    rates, times = [], []
    while not schedule.over():
        rates.append(schedule.lr())
        times.append(progress.seconds)
        progress.after_step(1.0, 1.0, rates[-1], step_seconds if progress.step else 20.0)
        if progress.step % 50 == 0:
            progress.after_evaluation(1.0, 1.0, 1.0, 64)
    progress.after_evaluation(1.0, 1.0, 1.0, 64)
    assert 120 - 1 <= progress.seconds <= 120 + step_seconds
    top = int(np.argmax(rates))
    assert max(rates) == pytest.approx(config.lr, rel=0.05) and rates[-1] < config.min_lr + 0.02 * config.lr
    if hold:
        held = [at for at, rate in zip(times, rates, strict=True) if rate == config.lr]
        assert held[-1] == pytest.approx(20 + hold * 99, abs=2)
    assert top * step_seconds == pytest.approx(0.1 * 99, abs=2), "warm-up is a tenth of the time"
    assert (np.diff(rates[:top]) >= 0).all() and (np.diff(rates[top:]) <= 0).all()


def test_a_run_of_four_seconds_takes_that(train, tmp_path, capsys):
    started = time.perf_counter()
    assert train("out", "--minutes", "0.0667", "--eval-every", "300") == 0
    assert time.perf_counter() - started < 10
    printed = capsys.readouterr().out
    assert "run      0.0667 minutes of" in printed and "left" in printed
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 2 < last["seconds"] < 7 and last["lr"] < 1.2e-4 and math.isfinite(last["val_loss"])
    run = load_run(tmp_path / "out" / "checkpoint.safetensors")
    assert run.progress.done and run.progress.evaluations[-1].step == run.progress.step


def test_an_evaluation_that_takes_the_rest_of_the_time_is_the_last(train, tmp_path, monkeypatch):
    """It is not known how long one takes before the first."""
    from gpt import train as module
    plain = module.evaluate

    def slow(model, ids, after_window):
        time.sleep(1.0)
        return plain(model, ids, after_window)
    monkeypatch.setattr(module, "evaluate", slow)
    assert train("out", "--minutes", "0.05", "--eval-every", "20") == 0
    run = load_run(tmp_path / "out" / "checkpoint.safetensors")
    assert run.progress.done and len(run.progress.evaluations) == 1


def test_what_follows_an_evaluation_may_take_the_rest_of_the_time(train, tmp_path, monkeypatch, capsys):
    """Then there is no further step, and the run is done all the same."""
    plain = Results.after_evaluation

    def slow(self, *arguments):
        plain(self, *arguments)
        self.run.progress.seconds += 3600
    monkeypatch.setattr(Results, "after_evaluation", slow)
    assert train("out", "--minutes", "60", "--eval-every", "20") == 0
    run = load_run(tmp_path / "out" / "checkpoint.safetensors")
    assert run.progress.done and run.progress.step == 20 and len(run.progress.evaluations) == 1
    assert (tmp_path / "out" / "sample.txt").exists() and "stopped" not in capsys.readouterr().out
    assert '<b id="state">done</b>' in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_patience_ends_after_so_many_evaluations_without_a_new_best(train, tmp_path):
    assert train("out", "--steps", "100000", "--eval-every", "5", "--patience", "3", "--lr", "0.5") == 0
    assert load_run(tmp_path / "out" / "checkpoint.safetensors").progress.done
    losses = [json.loads(line)["val_loss"] for line in
              (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) - 1 - int(np.argmin(losses)) == 3
    assert load_run(tmp_path / "out" / "best.safetensors").progress.step == 5 * (1 + int(np.argmin(losses)))


@pytest.mark.parametrize("size", [1, 3, 4, 11, 12, 50])
def test_micro_batches_add_up_to_the_batch(size):
    """To rounding: float32 sums in another order."""
    config = Config(layers=2, heads=2, width=32, context=16, bias=True)
    mt.seed(1)
    model = GPT(config, 19)
    x, y = batch(np.random.default_rng(0).integers(19, size=500).astype(np.int32), 12, 16, 0, 0)
    whole = loss_and_gradients(model, x, y, 0)
    gradients = {name: p.grad.data for name, p in model.named_parameters()}
    model.zero_grad()
    plain = mt.cross_entropy(model(x), y)
    assert plain.item() == whole
    plain.backward()
    for name, p in model.named_parameters():
        assert p.grad.data.tobytes() == gradients[name].tobytes(), "all at once it is the loss, in every bit"
    model.zero_grad()
    assert loss_and_gradients(model, x, y, size) == pytest.approx(whole, rel=1e-6)
    for name, p in model.named_parameters():
        scale = np.abs(gradients[name]).max()
        np.testing.assert_allclose(p.grad.data, gradients[name], rtol=0, atol=2e-6 * scale, err_msg=name)


def test_a_run_in_micro_batches_is_the_run(train, tmp_path):
    for out, more in (("whole", []), ("parts", ["--micro-batch", "3"])):
        assert train(out, "--steps", "30", *more) == 0
    whole, parts = (load_run(tmp_path / out / "checkpoint.safetensors") for out in ("whole", "parts"))
    assert parts.progress.evaluations[-1].val_loss == pytest.approx(whole.progress.evaluations[-1].val_loss,
                                                                    rel=1e-5)


def test_init_from_takes_weights_and_vocabulary_and_leaves_out_what_it_lacks(train, tmp_path, capsys):
    assert train("old", "--steps", "20") == 0
    old = tmp_path / "old" / "checkpoint.safetensors"
    (tmp_path / "new.txt").write_text(verse(3000, seed=9).replace("a", "ä") + "☃☃")
    capsys.readouterr()
    arguments = ["--init-from", str(old), "--data", str(tmp_path / "new.txt"), "--out", str(tmp_path / "new"),
                 "--sample", "0", "--steps", "10", "--lr", "0.01", "--dropout", "0.1"]
    assert command.main([*arguments, "--stop-after", "1"]) == 0
    printed = capsys.readouterr().out
    (note,) = [line for line in printed.splitlines() if "that the model's vocabulary lacks were left" in line]
    assert "'ä'" in note and "'☃'" in note
    (model, tokenizer), run = load_model(old), load_run(tmp_path / "new" / "checkpoint.safetensors")
    assert run.tokenizer.vocabulary == tokenizer.vocabulary and "ä" not in tokenizer.vocabulary
    assert (run.config.width, run.config.steps, run.config.lr, run.config.dropout) == (16, 10, 0.01, 0.1)
    assert (run.optimizer.state_dict()["steps"] == 1).all(), "the optimizer is fresh"
    for name, array in run.model.state_dict().items():
        moved = np.abs(array - model.state_dict()[name]).max()
        assert 0 < moved < 0.01, "one step of warm-up away"
    assert command.main([*arguments[2:], "--resume"]) == 0


@pytest.mark.parametrize("more, said", [
    (["--heads", "4"], "--heads is 4, the run has 2"),
    (["--recipe", "lecture"], "--layers is 6, the run has 1"),
])
def test_init_from_another_model_is_refused(more, said, train, tmp_path, capsys):
    assert train("old", "--steps", "2") == 0
    capsys.readouterr()
    assert command.main(["--init-from", str(tmp_path / "old" / "checkpoint.safetensors"), "--out",
                         str(tmp_path / "new"), "--data", str(tmp_path / "verse.txt"), *more]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_characters_that_only_the_validation_part_has_are_said(tmp_path, capsys):
    (tmp_path / "verse.txt").write_text(verse(3000) + "☃☃")
    arguments = ["--data", f"{tmp_path}/verse.txt", "--out", f"{tmp_path}/out", "--steps", "2"]
    assert command.main([*TINY, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "to validate on never occur where it trains, and count: " in printed and "'☃'" in printed


def test_init_from_does_not_take_over_the_minutes(train, tmp_path):
    assert train("old", "--minutes", "60", "--stop-after", "2") == 0
    more = ["--init-from", str(tmp_path / "old" / "checkpoint.safetensors"), "--steps", "3"]
    assert train("old", *more) == 2, "it would be replaced"
    assert train("new", *more) == 0 and train("timed", *more, "--minutes", "30", "--stop-after", "1") == 0
    configs = [load_run(tmp_path / out / "checkpoint.safetensors").config for out in ("old", "new", "timed")]
    assert [config.minutes for config in configs] == [60, 0, 30]
