"""What a run has saved stays, whatever happens: kills, a full disk, a read-only folder, a second Ctrl-C."""
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from gpt import command, results
from gpt.checkpoint import load, load_run, save, save_run
from gpt.config import Config
from gpt.data import sweep
from gpt.errors import BadInput
from gpt.run import Run
from gpt.tokenizer import CharTokenizer
from gpt.verse import verse
from tests.gpt import kill

ROOT = Path(__file__).parents[2]
TINY = ["--recipe", "classic", "--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch",
        "4", "--steps", "6", "--eval-every", "2", "--warmup", "2", "--sample", "0", "--quiet"]


def train(tmp_path, out, *more):
    (tmp_path / "verse.txt").write_text(verse(3000))
    return command.main([*TINY, "--data", str(tmp_path / "verse.txt"), "--out", str(out), *more])


def test_killed_five_times_it_goes_on_and_gives_the_same_bits(tmp_path):
    """`python tests/gpt/kill.py` does it 200 times."""
    kill.trial(tmp_path, kills=5)


@contextlib.contextmanager
def mounted(folder, options):
    """A small file system in memory at folder, for those who may mount one."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True,
                          text=True, check=False)
    if made.returncode:
        pytest.skip(f"a file system of its own cannot be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_is_said_and_the_checkpoint_before_stays(tmp_path, capsys):
    """The disk holds the first checkpoint, and not a second one beside it."""
    assert train(tmp_path, tmp_path / "free", "--stop-after", "2") == 0
    size = (tmp_path / "free" / "checkpoint.safetensors").stat().st_size
    with mounted(tmp_path / "disk", f"size={size * 3 // 2 + 8192}") as disk:
        assert train(tmp_path, disk) == 2
        said = capsys.readouterr().err
        assert "checkpoint.safetensors': cannot write the checkpoint: " in said and said.count("\n") == 1
        assert "No space left on device" in said
        for name in ("checkpoint.safetensors", "best.safetensors"):
            assert load_run(disk / name).progress.step == 2
        assert not list(disk.glob(".*.tmp")), "what was half written is taken away"
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert train(tmp_path, disk, "--resume") == 0
    assert load_run(tmp_path / "free" / "checkpoint.safetensors").progress.step == 2


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_folder_that_becomes_read_only_is_said(tmp_path, capsys):
    with mounted(tmp_path / "disk", "size=10m") as disk:
        assert train(tmp_path, disk, "--stop-after", "2") == 0
        before = {path.name: path.read_bytes() for path in disk.iterdir()}
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for more in (["--resume"], []):
            assert train(tmp_path, disk, *more) == 2
            said = capsys.readouterr().err
            assert "cannot be written: Read-only file system" in said and said.count("\n") == 1
        assert {path.name: path.read_bytes() for path in disk.iterdir()} == before


def test_between_evaluations_it_is_saved_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(results.Results, "interrupted", lambda self: None)       # as if it had no time for it
    steps = []

    def after_step(self, loss, remaining):
        plain(self, loss, remaining)
        steps.append(load_run(tmp_path / "out" / "checkpoint.safetensors").progress.step)
        if len(steps) == 5:
            raise KeyboardInterrupt
    plain = results.Results.after_step
    monkeypatch.setattr(results.Results, "after_step", after_step)
    assert train(tmp_path, tmp_path / "out", "--eval-every", "100") == 130
    assert steps == [1, 2, 3, 4, 5]


def test_a_new_run_in_the_folder_of_an_old_one_leaves_nothing_of_it(tmp_path):
    out = tmp_path / "out"
    assert train(tmp_path, out) == 0
    (out / "mine.txt").touch()
    assert train(tmp_path, out, "--seed", "5", "--stop-after", "1") == 0
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.safetensors", "mine.txt"]
    assert load_run(out / "checkpoint.safetensors").config.seed == 5


def test_a_damaged_checkpoint_is_not_resumed_and_the_best_one_can_be(tmp_path, capsys):
    out = tmp_path / "out"
    assert train(tmp_path, out, "--stop-after", "3") == 0
    whole = (out / "checkpoint.safetensors").read_bytes()
    for damaged in (whole[:-9], whole[:200], b"", whole[:3000] + b"!" + whole[3001:]):
        (out / "checkpoint.safetensors").write_bytes(damaged)
        assert train(tmp_path, out, "--resume") == 2
        said = capsys.readouterr().err
        assert "checkpoint.safetensors" in said and "best.safetensors beside it" in said
        assert said.count("\n") == 1
        assert (out / "checkpoint.safetensors").read_bytes() == damaged
    (out / "best.safetensors").rename(out / "checkpoint.safetensors")
    assert train(tmp_path, out, "--resume") == 0
    assert load_run(out / "checkpoint.safetensors").progress.done


def test_a_run_with_a_flipped_bit_or_cut_short_is_refused_or_whole(tmp_path):
    save_run(tmp_path / "c", Run.new(Config(layers=1, heads=1, width=4, context=4), CharTokenizer("ab"), {}))
    whole, expected = (tmp_path / "c").read_bytes(), load(tmp_path / "c")[0]
    drawn, refused = random.Random(0), 0
    for i in range(400):
        changed = bytearray(whole[:drawn.randrange(len(whole))] if i % 4 == 0 else whole)
        if i % 4 and changed:
            changed[drawn.randrange(len(changed))] ^= 1 << drawn.randrange(8)
        (tmp_path / "c").write_bytes(changed)
        try:
            run = load_run(tmp_path / "c")
        except BadInput:
            refused += 1
        else:
            assert all(array.tobytes() == expected[name].tobytes()
                       for name, array in run.model.state_dict().items())
    assert refused > 380


def test_a_config_of_a_huge_model_takes_no_memory(tmp_path):
    save_run(tmp_path / "c", Run.new(Config(layers=1, heads=1, width=4, context=4), CharTokenizer("ab"), {}))
    arrays, metadata = load(tmp_path / "c")
    for change in ({"width": 2**13}, {"layers": 2**12}, {"context": 2**24}):
        config = json.dumps({**json.loads(metadata["config"]), **change})
        save(tmp_path / "huge", arrays, {**metadata, "config": config})
        tracemalloc.start()
        with pytest.raises(BadInput, match="its config asks for"):
            load_run(tmp_path / "huge")
        assert tracemalloc.get_traced_memory()[1] < 2**22
        tracemalloc.stop()


def test_the_temporary_files_of_dead_processes_are_swept_away(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    names = [f".{process.pid}-{'0' * 16}.tmp", f".{os.getpid()}-{'0' * 16}.tmp", ".1-mine.tmp", ".vimrc.tmp"]
    for name in names:
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    code = ("import time; from gpt.cli import interruptible\n"
            "with interruptible():\n    print('ready', flush=True)\n    while True: time.sleep(0.01)")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert process.poll() is None, "the first one waits for a good place"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130
