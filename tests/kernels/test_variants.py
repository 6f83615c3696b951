"""The kernels' tests again for every vector unit that this CPU has beside its best."""
import os
import subprocess
import sys

import pytest

from kernels import cpu

FILES = [f"tests/kernels/test_{name}.py" for name in ("matmul", "attention", "cross_attention",
                                                         "rows")]
NARROWER = [name for name, target in cpu.targets().items() if target.vector_bytes < cpu.TARGET.vector_bytes]


@pytest.mark.parametrize("name", NARROWER)
def test_kernels_of_a_narrower_cpu(name):
    """Of the kernels by row only those that use vectors by hand."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               "-k", "matmul or attention or (rows and (softmax or cross_entropy))", *FILES]
    run = subprocess.run(command, env={**os.environ, "MINITENSOR_CPU": name}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_a_cpu_that_is_not_there_is_an_error():
    run = subprocess.run([sys.executable, "-c", "import kernels"], capture_output=True, text=True,
                         env={**os.environ, "MINITENSOR_CPU": "abacus"})
    assert run.returncode == 1
    assert "MINITENSOR_CPU is 'abacus'; this machine can run" in run.stderr and "128" in run.stderr
