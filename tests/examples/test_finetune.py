"""Fine-tuning bends a trained model towards another text."""
import re

import pytest

from examples import finetune
from gpt import command
from gpt.checkpoint import load_run
from gpt.cli import run
from gpt.verse import verse

TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch", "4", "--steps", "30",
        "--sample", "0", "--quiet"]


@pytest.fixture
def trained(tmp_path):
    (tmp_path / "verse.txt").write_text(verse(3000))
    assert command.main([*TINY, "--data", str(tmp_path / "verse.txt"), "--out", str(tmp_path / "old")]) == 0
    return tmp_path / "old" / "best.safetensors"


def test_it_learns_and_says_how_much(trained, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("the same line again and again ☃\n" * 100)
    out = tmp_path / "tuned"
    arguments = [str(tmp_path / "mine.txt"), "--checkpoint", str(trained), "--steps", "40", "--out", str(out)]
    capsys.readouterr()
    assert run(finetune.main, arguments) == 0
    printed = capsys.readouterr().out
    before, after = (float(x) for x in re.findall(r"^---- \w+: (\d\.\d{4}) nats", printed, re.M))
    tuned, old = load_run(out / "checkpoint.safetensors"), load_run(trained)
    assert after < before - 0.3
    assert after == pytest.approx(tuned.progress.best().val_loss, abs=0.01), "products there may be bfloat16"
    assert "vocabulary lacks were left out: '☃'" in printed
    assert tuned.config.muon_lr == old.config.muon_lr / 5 and tuned.progress.step == 40


@pytest.mark.parametrize("arguments, said", [
    (["{tmp}/none.txt"], "no such file"), (["{tmp}/verse.txt", "--steps", "0"], "--steps is 0"),
    (["{tmp}/verse.txt", "--checkpoint", "{tmp}/verse.txt"], "not a whole safetensors file"),
])
def test_bad_input_is_one_line(arguments, said, trained, tmp_path, capsys):
    given = ["--checkpoint", str(trained), "--out", str(tmp_path / "tuned"), *arguments]
    capsys.readouterr()
    assert run(finetune.main, [argument.format(tmp=tmp_path) for argument in given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "tuned").exists()
