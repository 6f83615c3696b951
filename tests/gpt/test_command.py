"""The command line: what it leaves behind, and one clear line with exit code 2 for what cannot be used."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gpt
import kernels
from gpt import command
from gpt.checkpoint import load, load_model
from gpt.cli import interruptible, run
from gpt.data import find_text
from gpt.errors import BadInput
from gpt.run import Evaluation
from gpt.verse import verse
from kernels.cpu import TARGET

ROOT = Path(__file__).parents[2]
TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch", "4", "--steps", "6",
        "--eval-every", "3", "--warmup", "2", "--sample", "40"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "verse.txt"
    path.write_text(verse(6000))
    return path


def train(text, out, *more):
    return command.main([*TINY, "--data", str(text), "--out", str(out), *more])


def test_a_run_leaves_checkpoint_metrics_plot_and_sample(text, tmp_path, capsys):
    out = tmp_path / "out" / "run"
    assert train(text, out) == 0
    files = sorted(path.name for path in out.iterdir())
    assert files == ["best.safetensors", "checkpoint.safetensors", "loss.png", "metrics.jsonl",
                     "report.html", "sample.txt"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert set(lines[0]) == {"step", "batch_loss", "train_loss", "val_loss", "val_bits", "lr",
                             "gradient_norm", "seconds", "tokens_per_s"}
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    sample = (out / "sample.txt").read_text()
    printed = capsys.readouterr().out
    assert len(sample) == 40 and sample in printed
    assert re.search(r"tables   uniform \d\.\d{4} \(.* bits\), unigram .*, bigram .* on the validation split",
                     printed)
    model, tokenizer = load_model(out / "checkpoint.safetensors")
    assert model.config.width == 16 and tokenizer.vocabulary == "".join(sorted(set(text.read_text())))


def test_the_same_command_gives_the_same_bits(text, tmp_path):
    for name in ("a", "b"):
        assert train(text, tmp_path / name, "--dropout", "0.1") == 0
    files = [tmp_path / name / "checkpoint.safetensors" for name in "ab"]
    (arrays, metadata), (again, metadata_again) = map(load, files)
    assert metadata["config"] == metadata_again["config"] and arrays.keys() == again.keys()
    assert all(np.array_equal(array, again[name]) for name, array in arrays.items())
    assert (tmp_path / "a" / "sample.txt").read_bytes() == (tmp_path / "b" / "sample.txt").read_bytes()
    runs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in "ab"]
    losses = [[(line["train_loss"], line["val_loss"]) for line in map(json.loads, run)] for run in runs]
    assert losses[0] == losses[1]


def test_the_schema_of_the_metrics_is_documented():
    for name in Evaluation._fields:
        assert re.search(rf"^        {name}   ", gpt.__doc__, re.MULTILINE), name


def test_quiet_is_quiet(text, tmp_path, capsys):
    assert train(text, tmp_path / "out", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert train(text, tmp_path / "out", "--quiet", "--lr", "-1") == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: --lr is -1.0")


@pytest.mark.skipif(sys.platform == "win32", reason="opens a pseudo-terminal")
def test_a_progress_bar_is_for_terminals_alone(text, tmp_path):
    import pty
    import termios
    command_line = [sys.executable, "examples/train_shakespeare.py", *TINY, "--data", str(text), "--out",
                    str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    piped = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert piped.stderr == b"" and b"\r" not in piped.stdout and b"%" not in piped.stdout
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    subprocess.run(command_line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 2**16).decode()
    os.close(ours)
    assert "6/6 steps" in shown and "left" in shown and "tokens/s" in shown


def test_another_seed_gives_another_run(text, tmp_path):
    for seed in ("1", "2"):
        assert train(text, tmp_path / seed, "--seed", seed) == 0
    assert (tmp_path / "1" / "checkpoint.safetensors").read_bytes() \
        != (tmp_path / "2" / "checkpoint.safetensors").read_bytes()


def test_bf16_trains_where_the_cpu_can_and_says_so_where_not(text, tmp_path, capsys):
    assert train(text, tmp_path / "bf16", "--precision", "bf16") == 0
    assert kernels.get_matmul_precision() == "highest"
    said = capsys.readouterr()
    if TARGET.bf16:
        assert "products in bfloat16" in said.out and not said.err
    else:
        assert "products in float32" in said.out and "no products in bfloat16" in said.err
        assert said.err.count("\n") == 1
    assert train(text, tmp_path / "float32", "--precision", "highest") == 0
    assert "products in float32" in capsys.readouterr().out
    last = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
            for name in ("bf16", "float32")]
    assert last[0] == pytest.approx(last[1], abs=0.02)


def test_precision_is_left_to_the_cpu_and_a_run_keeps_its_own(text, tmp_path, capsys):
    products = "products in bfloat16" if TARGET.bf16 else "products in float32"
    assert train(text, tmp_path / "auto", "--stop-after", "2") == 0
    assert products in capsys.readouterr().out
    assert train(text, tmp_path / "float32", "--precision", "highest", "--stop-after", "2") == 0
    assert train(text, tmp_path / "float32", "--resume") == 0
    assert capsys.readouterr().out.count("products in float32") == 2
    with pytest.raises(BadInput, match="in half, which cannot be had here"), command._precision("half"):
        pass


BAD = {
    "missing text": (["--data", "{tmp}/none.txt"], "no such file"),
    "empty text": (["--data", "{tmp}/empty.txt"], "is empty"),
    "binary text": (["--data", "{tmp}/binary.txt"], "is binary"),
    "undecodable text": (["--data", "{tmp}/latin.txt"], "is not UTF-8"),
    "short text": (["--data", "{tmp}/short.txt"], "too short"),
    "folder without text": (["--data", "{tmp}/folder"], "is a folder without a .txt file in it"),
    "glob without text": (["--data", "{tmp}/*.text"], "matches no file"),
    "one of several": (["--data", "{tmp}/verse.txt", "{tmp}/latin.txt"], "is not UTF-8"),
    "heads": (["--width", "30", "--heads", "4"], "--heads is 4; it must be a divisor of the width, 30"),
    "zero": (["--layers", "0"], "--layers is 0; it must be at least 1"),
    "negative": (["--batch", "-3"], "--batch is -3; it must be at least 1"),
    "nan": (["--lr", "nan"], "--lr is nan; it must be a positive number"),
    "dropout": (["--dropout", "1"], "--dropout is 1.0; it must be in [0, 1)"),
    "not a number": (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    "unknown flag": (["--depth", "4"], "unrecognized arguments: --depth 4"),
    "abbreviated flag": (["--lay", "4"], "unrecognized arguments: --lay 4"),
    "unknown recipe": (["--recipe", "cake"], "invalid choice: 'cake'"),
    "precision": (["--precision", "half"], "invalid choice: 'half'"),
    "threads": (["--threads", "0"], "--threads: "),
    "sample": (["--sample", "-1"], "--sample is -1; it must be in 0 to 1,000,000,000"),
    "huge": (["--width", "99999999999999999999", "--heads", "1"], "it must be at least 1, and at most 2**24"),
    "no memory": (["--width", "16777216", "--heads", "1", "--data", "{tmp}/two.txt"],
                  "the memory does not hold this"),
    "out": (["--out", "{tmp}/empty.txt/run"], "which cannot be written"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(name, text, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"ab\0cd" * 1000)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 9000)
    (tmp_path / "two.txt").write_text("ab" * 5000)               # symbols
    (tmp_path / "short.txt").write_text("to be or not")
    (tmp_path / "folder").mkdir()
    arguments, said = BAD[name]
    before = sorted(tmp_path.rglob("*"))
    assert train(text, tmp_path / "out", *(a.format(tmp=tmp_path) for a in arguments)) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert "Traceback" not in printed.err and printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


def test_interrupted_run_saves_and_exits_with_130(text, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "examples/train_shakespeare.py", *TINY, "--steps", "1000000", "--eval-every", "20",
         "--data", str(text), "--out", str(out)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (out / "checkpoint.safetensors").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted after" in printed and "Traceback" not in errors
    load_model(out / "checkpoint.safetensors")


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("--layers", "--eval-every", "--recipe", "--data", "--out", "--seed", "--no-bias",
                 "--threads"):
        assert flag in printed


def example(name, *arguments):
    return subprocess.run([sys.executable, f"examples/{name}", *arguments], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def sample(*arguments):
    """examples/sample.py in this process."""
    from examples import sample as module
    return run(module.main, list(arguments))


def test_sample_py(text, tmp_path, capsys):
    assert train(text, tmp_path / "out") == 0
    checkpoint = str(tmp_path / "out" / "checkpoint.safetensors")
    prompt = text.read_text()[:5]
    run = example("sample.py", checkpoint, "--prompt", prompt, "--count", "30", "--temperature", "0.8",
                  "--top-k", "3")
    assert run.returncode == 0 and run.stdout.startswith(prompt) and len(run.stdout) == 5 + 30 + 1
    capsys.readouterr()
    assert sample("--prompt", prompt, "--count", "30", "--temperature", "0.8", "--top-k", "3", "--stream",
                  checkpoint) == 0
    assert capsys.readouterr().out == run.stdout
    (tmp_path / "broken").write_bytes(Path(checkpoint).read_bytes()[:-7])
    for arguments, said in [([checkpoint, "--prompt", "☃"], "'☃'"), ([checkpoint, "--count", "-1"], "-1"),
                            ([checkpoint, "--prompt", ""], "--prompt is empty"),
                            ([checkpoint, "--top-k", "0", "--stream"], "--top-k is 0"),
                            ([checkpoint, "--top-p", "2"], "--top-p is 2"), ([str(text)], "verse.txt"),
                            ([checkpoint, "--temperature", "-1"], "--temperature is -1"),
                            ([str(tmp_path / "none")], "train_shakespeare.py makes one"),
                            ([str(tmp_path / "broken")], "broken")]:
        assert sample(*arguments) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and said in printed.err and not printed.out, arguments


def test_bigram_reaches_the_lectures_loss():
    if find_text(download=False).name != "tinyshakespeare":
        pytest.skip("the text is not here; $MINITENSOR_DATA names it")
    run = example("bigram.py")
    assert run.returncode == 0, run.stderr
    assert abs(float(run.stdout.split("validation loss ")[1].split()[0]) - 2.49) < 0.02


def test_an_interruption_before_the_first_step_changes_nothing(text, tmp_path, capsys, monkeypatch):
    assert train(text, tmp_path / "out") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def interrupt(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(command, "train", interrupt)
    assert train(text, tmp_path / "out") == 130
    assert "interrupted before the first step; nothing was written" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert kernels.jit.compiling is None


def test_a_folder_where_a_file_should_be_is_found_before_training(text, tmp_path, capsys):
    (tmp_path / "out" / "sample.txt").mkdir(parents=True)
    assert train(text, tmp_path / "out") == 2
    assert "sample.txt in it is a folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sample.txt"]


def test_a_text_without_new_lines_can_be_sampled_without_a_prompt(tmp_path, capsys):
    (tmp_path / "line.txt").write_text("hello world " * 300)
    assert train(tmp_path / "line.txt", tmp_path / "out") == 0
    checkpoint = str(tmp_path / "out" / "checkpoint.safetensors")
    capsys.readouterr()
    for place in (checkpoint, str(tmp_path / "out")):
        assert sample(place, "--count", "20") == 0 and len(capsys.readouterr().out) == 22
    assert sample(checkpoint, "--seed", "-1") == 2
    refused = capsys.readouterr().err
    assert refused.startswith("error: --seed is -1;") and refused.count("\n") == 1


def test_signals_are_noted_and_raised_at_a_place_of_choice():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with interruptible() as check:
            check()
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            with pytest.raises(KeyboardInterrupt):
                check()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_an_interrupted_command_ends_in_one_line(capsys):
    def command(arguments):
        raise KeyboardInterrupt
    assert run(command) == 130
    assert capsys.readouterr().err == "interrupted\n"
