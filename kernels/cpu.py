"""What the CPU offers, and the sizes that follow from it."""
from __future__ import annotations

from typing import NamedTuple

import llvmlite.binding as llvm


class Target(NamedTuple):
    """The vector unit that kernels are written for."""
    name: str
    vector_bytes: int      # width of a vector register
    rows: int              # height of the matmul's register tile: rows x 2 vectors of sums fit the registers


def _detect() -> Target:
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return Target("AVX-512", 64, 14)       # 32 registers: 28 sums, 2 of B, 1 of A
    if features.get("avx2") and features.get("fma"):
        return Target("AVX2", 32, 6)           # 16 registers: 12 sums, 2 of B, 1 of A
    if features.get("neon"):
        return Target("NEON", 16, 14)          # 32 registers
    return Target("128-bit vectors", 16, 6)


TARGET = _detect()
