"""A text of 2 GB is trained on by a process that may use 1 GB of memory.

    python tests/gpt/large_text.py --gigabytes 2 --limit 1

Writes files of verse, its speeches in another order in each, and trains a small model on the folder in a
control group whose memory is limited (Linux, as a user who may make one): once as a new text, then again with
the tokens that were kept. Prints what the group's memory came to; all is removed at the end.

Last figures, of 2,147,560,756 bytes under a limit of 1024 MB: both runs ended well and gave the same losses,
the group's memory, of which the pages of files that can be dropped are a part, at its limit and never beyond.
"""
import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from gpt.verse import verse

ROOT = Path(__file__).parents[2]
TRAINER = [sys.executable, str(ROOT / "examples" / "train_shakespeare.py"), "--layers", "1", "--heads", "2",
           "--width", "32", "--context", "32", "--steps", "50", "--sample", "0"]


def write_text(folder: Path, size: int, files: int = 32) -> None:
    """So many bytes of verse in files."""
    speeches = np.array(re.findall(r".*?\n\n", verse(2**21), re.DOTALL), object)
    random = np.random.default_rng(0)
    mean = sum(map(len, speeches)) / len(speeches)
    for i in range(files):
        drawn = random.integers(len(speeches), size=int(size / files / mean) + 1)
        (folder / f"{i:02}.txt").write_text("".join(speeches[drawn]))


@contextlib.contextmanager
def group(limit: int) -> Iterator[tuple[Path, str]]:
    """A control group whose memory is limited, and the name of the file that says the most it had."""
    if Path("/sys/fs/cgroup/memory").is_dir():
        folder, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.max_usage_in_bytes")
    else:
        folder, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.peak")
    folder /= f"minitensor-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / names[0]).write_text(str(limit))
        yield folder, names[1]
    finally:
        folder.rmdir()


def train(data: Path, out: Path, cache: Path, limit: int) -> dict:
    """One run; its exit code, its seconds and the most memory of the group, files' pages among it."""
    with group(limit) as (folder, peak):
        enter = f"echo $$ > {folder}/cgroup.procs && exec \"$@\""
        started = time.perf_counter()
        command = ["sh", "-c", enter, "sh", *TRAINER, "--data", str(data), "--out", str(out)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        return {"exit code": run.returncode, "seconds": round(time.perf_counter() - started),
                "peak of the group, MB": int((folder / peak).read_text()) >> 20,
                "said": (run.stdout + run.stderr).splitlines()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train on a text larger than memory.")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of text")
    parser.add_argument("--limit", type=float, default=1.0, help="gigabytes of memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        (here / "text").mkdir()
        write_text(here / "text", int(options.gigabytes * 2**30))
        for i in range(2):
            done = train(here / "text", here / "out", here / "cache", int(options.limit * 2**30))
            print(json.dumps(done, indent=1), flush=True)
            assert done["exit code"] == 0
            assert any("reading" in line for line in done["said"]) == (i == 0)
