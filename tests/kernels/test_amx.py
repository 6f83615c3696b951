"""Products of the tile unit, on any CPU: its instructions are played by functions of the same arguments.

Where there is a tile unit, test_matmul.py and the rest run on it; this test shows that what is asked of it is
right. The functions follow the "Operation" sections of Intel's manual, volume 2: TILELOADD, TDPBF16PS, ...
"""
import os
import subprocess
import sys

import pytest

SCRIPT = '''
import ctypes, importlib.util, pathlib, sys
import llvmlite.binding as llvm
import numpy as np

path = pathlib.Path("kernels/cpu.py").resolve()
spec = importlib.util.spec_from_file_location("kernels.cpu", path)
cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cpu)
cpu.TARGET = cpu.Target("a tile unit that is played", 64, 14, True, True)
sys.modules["kernels.cpu"] = cpu                      # before the package reads it
import kernels
from kernels import amx
from kernels.simd import ROUNDS
from kernels.matmul import symmetric_matmul
amx.PREFIX = "played."

tiles = np.full((8, 16, 64), 0xFF, np.uint8)          # NaN, until they are loaded
layout, calls = [], []

def memory(address, count):
    return np.frombuffer((ctypes.c_uint8 * count).from_address(address), np.uint8)

def floats(bf16):                                     # (16, 32) of 16 bits -> float32
    return (bf16.view("<u2").astype(np.uint32) << 16).view(np.float32)

def ldtilecfg(address):
    config = memory(address, 64)
    assert config[0] == 1 and (config[16:32:2] == 64).all() and (config[17:32:2] == 0).all()
    assert (config[48:56] == 16).all() and not config[1:16].any() and not config[32:48].any()
    layout.append(True)

def tilerelease():
    layout.pop()
    tiles[:] = 0xFF

def tilezero(t):
    assert layout
    tiles[t] = 0

def tileloadd64(t, address, stride):
    assert layout and stride % 4 == 0
    for row in range(16):
        tiles[t, row] = memory(address + row * stride, 64)

def tilestored64(t, address, stride):
    assert layout and stride >= 64
    for row in range(16):
        memory(address + row * stride, 64)[:] = tiles[t, row]

def tdpbf16ps(c, a, b):
    calls.append(c)
    x, y = floats(tiles[a]).reshape(16, 16, 2), floats(tiles[b]).reshape(16, 16, 2)
    sums = tiles[c].view(np.float32)
    for k in range(16):
        for half in (0, 1):
            sums += x[:, k, half][:, None] * y[k, :, half]

kinds = {"ldtilecfg": "p", "tilerelease": "", "tilezero": "b", "tileloadd64": "bpq", "tilestored64": "bpq",
         "tdpbf16ps": "bbb"}
c_types = {"p": ctypes.c_void_p, "b": ctypes.c_int8, "q": ctypes.c_int64}
kept = []
for name, arguments in kinds.items():
    function = ctypes.CFUNCTYPE(None, *[c_types[a] for a in arguments])(globals()[name])
    kept.append(function)
    llvm.add_symbol(f"played.{name}", ctypes.cast(function, ctypes.c_void_p).value)

def rounded(x):                                       # to bfloat16, to nearest even, in float64
    n = np.ascontiguousarray(x).view(np.uint32)
    return ((n + 0x7FFF + (n >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)

def close(actual, expected):
    assert np.abs(actual - expected).max() <= 1e-5 * max(1, np.abs(expected).max()), (actual, expected)

random = np.random.default_rng(0)
def normal(*shape):
    return random.standard_normal(shape).astype(np.float32)

kernels.set_num_threads(1)
kernels.set_matmul_precision("bf16")
for m, k, n in [(1, 1, 1), (32, 32, 32), (31, 33, 65), (65, 31, 33), (33, 127, 1), (96, 800, 40), (2, 3, 70)]:
    for transpose_a in (False, True):
        for transpose_b in (False, True):
            a, b = normal(*((k, m) if transpose_a else (m, k))), normal(*((n, k) if transpose_b else (k, n)))
            left, right = rounded(a), rounded(b)
            close(kernels.matmul(a, b, transpose_a, transpose_b),
                  (left.T if transpose_a else left) @ (right.T if transpose_b else right))
assert set(calls) == {0, 1, 2, 3} and not layout
a, b = normal(3, 40, 50), normal(3, 50, 34)
close(kernels.matmul(a, b), rounded(a) @ rounded(b))
x, weight, bias = normal(70, 45), normal(66, 45), normal(66)
y, before = kernels.linear_forward(x, weight, bias, "relu2")[0], kernels.linear_forward(x, weight, bias)[0]
close(before, rounded(x) @ rounded(weight).T + bias)
close(y, np.square(np.maximum(before.astype(np.float64), 0)))
x = normal(2, 90, 20)
gram = symmetric_matmul(x, x, transpose_b=True, scale=0.5, shift=2.0)
close(gram, 0.5 * rounded(x) @ rounded(x).swapaxes(1, 2) + 2 * np.eye(90))
assert np.array_equal(gram, gram.swapaxes(1, 2))
qkv, dout = normal(1, 200, 24), normal(1, 200, 8)
done = len(calls)
for causal in (True, False):
    kernels.set_matmul_precision("highest")
    out, norms = kernels.attention_forward(qkv, 1, causal)
    dqkv = kernels.attention_backward(dout, qkv, out, norms, 1, causal)
    assert len(calls) == done
    kernels.set_matmul_precision("bf16")
    if ROUNDS:                                        # else attention stays in float32
        low = kernels.attention_forward(qkv, 1, causal)
        for x, y in zip((*low, kernels.attention_backward(dout, qkv, *low, 1, causal)), (out, norms, dqkv)):
            assert np.abs(x - y).max() < 0.02 * np.abs(y).max()
        assert len(calls) > done and not layout
        done = len(calls)
close(kernels.matmul(a, b, exact=True), a.astype(np.float64) @ b)
a, b = a.astype(np.float64), b.astype(np.float64)
assert np.abs(kernels.matmul(a, b) - a @ b).max() < 1e-12 and len(calls) == done
print("played", done)
'''


@pytest.mark.skipif(sys.byteorder != "little", reason="tile registers are little-endian")
def test_products_ask_the_right_things_of_a_tile_unit(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr[-3000:]    # an error in a callback ends nothing
    assert run.stdout.startswith("played ")
