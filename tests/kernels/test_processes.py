"""Kernels called by several threads at once, and in processes that were forked."""
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import kernels

CALLS = """
import threading, numpy as np, kernels
x = np.ones((400, 300), np.float32)
expected = kernels.softmax_forward(x)
wrong = []
def call():
    for _ in range(50):
        if kernels.softmax_forward(x).tobytes() != expected.tobytes():
            wrong.append(1)
threads = [threading.Thread(target=call) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
print("wrong" if wrong else "right")
"""
FORK = """
import os, sys, numpy as np, kernels
x = np.ones((400, 300), np.float32)
if "after" in sys.argv:
    kernels.softmax_forward(x)
child = os.fork()
if not child:
    try:
        kernels.softmax_forward(x)
        os._exit(0)
    except RuntimeError as error:
        os._exit(7 if "forked after kernels had run" in str(error) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run(code, *arguments, **environment):
    return subprocess.run([sys.executable, "-c", code, *arguments], env={**os.environ, **environment},
                          capture_output=True, text=True, timeout=300)


def test_two_threads_may_call_at_once():
    x = np.random.default_rng(0).standard_normal((300, 200)).astype(np.float32)
    expected, results = kernels.matmul(x.T.copy(), x), []
    threads = [threading.Thread(target=lambda: results.extend(
        kernels.matmul(x, x, transpose_a=True) for _ in range(30))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 90 and all(np.array_equal(result, expected) for result in results)


def test_threads_of_numbas_own_are_called_one_at_a_time():
    process = run(CALLS, NUMBA_THREADING_LAYER="workqueue")
    assert (process.returncode, process.stdout.strip()) == (0, "right"), process.stderr[-2000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_works_before_the_first_kernel_and_is_a_clear_error_after():
    assert run(FORK).stdout.strip() == "0"
    assert run(FORK, "after").stdout.strip() == "7"
