"""The kernels' tests again for every vector unit that this CPU has beside its best."""
import os
import subprocess
import sys

import pytest

from kernels import cpu

FILES = [f"tests/kernels/test_{name}.py" for name in ("matmul", "attention", "cross_attention",
                                                         "rows")]
BEST = cpu.TARGET
LESSER = [name for name, target in cpu.targets().items()
          if target.vector_bytes < BEST.vector_bytes or (target.bf16 and target.tiles < BEST.tiles)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A process for each, all at once, as each mostly compiles; and what it prints."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               "-k", "matmul or attention or (rows and (softmax or cross_entropy))", *FILES]
    folder, started = tmp_path_factory.mktemp("runs"), {}
    for name in LESSER:
        with open(folder / name, "w") as file:
            started[name] = folder / name, subprocess.Popen(
                command, env={**os.environ, "MINITENSOR_CPU": name}, stdout=file, stderr=subprocess.STDOUT)
    yield started
    for _, process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", LESSER)
def test_kernels_of_a_lesser_cpu(name, runs):
    """Of the kernels by row only those that use vectors by hand."""
    printed, process = runs[name]
    assert process.wait() == 0, printed.read_text()[-5000:]
    assert " passed" in printed.read_text()


def test_a_cpu_that_is_not_there_is_an_error():
    run = subprocess.run([sys.executable, "-c", "import kernels"], capture_output=True, text=True,
                         env={**os.environ, "MINITENSOR_CPU": "abacus"})
    assert run.returncode == 1
    assert "MINITENSOR_CPU is 'abacus'; this machine can run" in run.stderr and "128" in run.stderr
