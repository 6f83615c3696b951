"""A run that was stopped and taken up again is the run that was not, in every bit."""
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt import command
from gpt import train as training
from gpt.checkpoint import load, load_run, save, save_run
from gpt.config import Config
from gpt.errors import BadInput
from gpt.run import Progress, Run
from gpt.tokenizer import CharTokenizer
from gpt.verse import verse

ROOT = Path(__file__).parents[2]
TINY = ["--layers", "2", "--heads", "2", "--width", "16", "--context", "16", "--batch", "4", "--steps", "200",
        "--eval-every", "40", "--warmup", "10", "--lr", "0.001", "--dropout", "0.2", "--bias", "--sample",
        "20"]
OF_THE_CLOCK = {"seconds", "tokens_per_s"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "verse.txt"
    path.write_text(verse(3000))
    return path


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The run that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert train(text, out) == 0
    return out


def train(text, out, *more, config=TINY):
    return command.main([*config, "--data", str(text), "--out", str(out), "--quiet", *more])


def metrics(out):
    """What metrics.jsonl says, but for the clock's fields."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_THE_CLOCK} for line in lines]


def assert_same(a, b):
    """The weights, the optimizer, the metrics and the samples of two folders agree in every bit."""
    for name in ("checkpoint.safetensors", "best.safetensors"):
        (arrays, said), (others, said_there) = load(a / name), load(b / name)
        assert arrays.keys() == others.keys()
        for key, array in arrays.items():
            assert array.tobytes() == others[key].tobytes(), (name, key)
        here, there = (json.loads(words["progress"]) for words in (said, said_there))
        for key in ("step", "random", "samples", "lap_losses", "lap_norms", "done"):
            assert here[key] == there[key], (name, key)
        assert said["config"] == said_there["config"] and said["source"] == said_there["source"]
    assert metrics(a) == metrics(b)


@pytest.mark.parametrize("stops", [[100], [1, 40, 41, 199, 200]], ids=str)
def test_stopped_and_resumed_is_the_same_run(stops, text, whole, tmp_path):
    for i, stop in enumerate(stops):
        assert train(text, tmp_path, "--stop-after", str(stop), *["--resume"] * (i > 0)) == 0
        assert load_run(tmp_path / "checkpoint.safetensors").progress.step == stop
        if stop < 200:
            assert not (tmp_path / "sample.txt").exists()
    assert train(text, tmp_path, "--resume") == 0
    assert_same(tmp_path, whole)
    assert len(metrics(tmp_path)) == 5
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds) and seconds[0] > 0, "the clock goes on from where it was"
    assert (tmp_path / "sample.txt").read_bytes() == (whole / "sample.txt").read_bytes()


def test_options_that_are_not_given_are_the_runs(text, whole, tmp_path, monkeypatch):
    assert train(text, tmp_path, "--stop-after", "100") == 0
    monkeypatch.delenv("MINITENSOR_DATA", raising=False)
    assert command.main(["--out", str(tmp_path), "--resume", "--sample", "20", "--quiet"]) == 0
    assert_same(tmp_path, whole)


def test_a_finished_run_has_nothing_to_resume(text, whole, tmp_path, capsys):
    before = (whole / "checkpoint.safetensors").read_bytes()
    assert command.main(["--out", str(whole), "--resume", "--sample", "20"]) == 0
    assert (whole / "checkpoint.safetensors").read_bytes() == before
    assert (whole / "sample.txt").read_text() in capsys.readouterr().out


def test_another_config_is_refused_with_a_list(text, tmp_path, capsys):
    assert train(text, tmp_path, "--stop-after", "3") == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = tmp_path.parent / "other.txt"
    other.write_text(verse(3000, seed=5))
    capsys.readouterr()
    assert train(other, tmp_path, "--resume", "--lr", "0.5", "--heads", "4") == 2
    said = capsys.readouterr().err
    for part in ("--lr is 0.5, the run has 0.001", "--heads is 4, the run has 2", "the text is other.txt"):
        assert part in said
    assert "--width" not in said and said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("more, said", [
    (["--out", "{tmp}/none"], "No such file"),
    (["--init-from", "{tmp}/x"], "give one of them"),
    (["--recipe", "lecture"], "--layers is 6, the run has 2"),
    (["--stop-after", "0"], "--stop-after is 0"),
])
def test_what_cannot_be_resumed(more, said, text, tmp_path, capsys):
    assert train(text, tmp_path, "--stop-after", "3") == 0
    capsys.readouterr()
    arguments = [argument.format(tmp=tmp_path) for argument in more]
    assert command.main(["--out", str(tmp_path), "--resume", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_ended_by_a_signal_and_resumed_is_the_same_run(text, whole, tmp_path):
    """Wherever the signal comes, also where an evaluation is due."""
    command_line = [sys.executable, "examples/train_shakespeare.py", *TINY, "--data", str(text), "--out",
                    str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)                    # a line must be flushed to be seen
    process = subprocess.Popen(command_line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "step " not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    if process.returncode != 0:                                  # unless it was done before
        assert process.returncode == 130 and "interrupted after" in printed
    assert train(text, tmp_path, "--resume") == 0
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("windows", [1, 3])
def test_interrupted_inside_an_evaluation_and_resumed_is_the_same_run(windows, text, whole, tmp_path,
                                                                      monkeypatch):
    """A signal is heard after each of its windows."""
    seen, heard = [], []
    plain = training.windows

    def watched(*arguments, **options):
        for window in plain(*arguments, **options):
            seen.append(window)
            yield window

    @contextlib.contextmanager
    def interruptible():
        def check():
            if len(seen) == windows:
                heard.append(len(seen))
                raise KeyboardInterrupt
        yield check
    with monkeypatch.context() as patch:
        patch.setattr(training, "windows", watched)
        patch.setattr(command, "interruptible", interruptible)
        assert train(text, tmp_path) == 130 and heard == [windows]
    assert load_run(tmp_path / "checkpoint.safetensors").progress.step == 40
    assert not (tmp_path / "metrics.jsonl").exists()
    assert train(text, tmp_path, "--resume") == 0
    assert_same(tmp_path, whole)


def test_every_field_of_progress_comes_back():
    progress = Progress(step=3, samples=[(3, "é\n")])
    progress.after_step(1 / 3, 0.1, 1e-3, 0.7)
    progress.after_evaluation(2.0, 1e-17, 0.5, 64)
    progress.after_step(0.1 + 0.2, 1e300, 1e-3, 0.7)
    assert Progress.from_json(progress.to_json()) == progress


HOSTILE = {
    "not JSON": ("progress", "{"),
    "a list": ("progress", "[]"),
    "deep": ("progress", "[" * 100_000),
    "a missing field": ("progress", '{"step": 1, "evaluations": [], "samples": []}'),
    "an unknown field": ("progress", '{"steps": 1, "evaluations": [], "samples": []}'),
    "a step that is none": ("step", "1"),
    "a negative step": ("step", -1),
    "not a number": ("seconds", float("nan")),
    "infinite": ("lap_losses", float("inf")),
    "evaluations that are none": ("evaluations", [[1, 2]]),
    "a sample that is none": ("samples", [[1, 2]]),
    "random numbers that are none": ("random", {"generator": {}, "seed": 0, "count": 0}),
    "a random state out of range": ("random", {"generator": {
        "bit_generator": "PCG64", "state": {"state": 2**200, "inc": 1}, "has_uint32": 0, "uinteger": 0},
        "seed": 0, "count": 0}),
    "no config": ("config", "{}}"),
    "a config of a huge model": ("config", '{"width": 16777216, "heads": 1, "layers": 1000000}'),
    "a config of another kind": ("config", '{"layers": "many"}'),
    "a source that is none": ("source", '{"data": 3}'),
    "a tokenizer that is none": ("tokenizer", "{}"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_checkpoint_with_hostile_content_is_one_line(name, tmp_path):
    run = Run.new(Config(layers=1, heads=1, width=4, context=4), CharTokenizer("ab"), {"data": ""})
    save_run(tmp_path / "c", run)
    arrays, metadata = load(tmp_path / "c")
    key, value = HOSTILE[name]
    if key not in metadata:
        key, value = "progress", json.dumps({**json.loads(metadata["progress"]), key: value})
    save(tmp_path / "c", arrays, {**metadata, key: value})
    with pytest.raises(BadInput) as caught:
        load_run(tmp_path / "c")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    lambda arrays: arrays.pop("optimizer.first.0"),
    lambda arrays: arrays.pop("norm.weight"),
    lambda arrays: arrays.update({"optimizer.first.0": arrays["optimizer.first.0"].astype(np.float64)}),
    lambda arrays: arrays.update({"norm.weight": arrays["norm.weight"].astype(np.int32)}),
    lambda arrays: arrays.update({"norm.weight": arrays["norm.weight"][None]}),
    lambda arrays: arrays.update({"optimizer.steps": arrays["optimizer.steps"] - 1}),
    lambda arrays: arrays.update({"optimizer.more": np.zeros(3)}),
], ids=["no moment", "no weight", "moment float64", "weight int32", "shape", "negative steps", "more"])
def test_arrays_that_do_not_fit_are_refused(change, tmp_path):
    save_run(tmp_path / "c", Run.new(Config(layers=1, heads=1, width=4, context=4), CharTokenizer("ab"), {}))
    arrays, metadata = load(tmp_path / "c")
    change(arrays)
    save(tmp_path / "c", arrays, metadata)
    with pytest.raises(BadInput, match="load_state_dict"):
        load_run(tmp_path / "c")
