"""What the CPU offers, and the sizes that follow from it."""
from __future__ import annotations

import ctypes
import os
import platform
from typing import NamedTuple

import llvmlite.binding as llvm


class Target(NamedTuple):
    """The vector unit that kernels are written for."""
    name: str
    vector_bytes: int      # width of a vector register
    rows: int              # height of the matmul's register tile: rows x 2 vectors of sums fit the registers
    bf16: bool             # products of pairs of bfloat16, added up in float32
    tiles: bool = False    # those by the tile unit, AMX: see kernels/amx.py


def targets() -> dict[str, Target]:
    """What this machine can run, the best first, by the names that MINITENSOR_CPU takes."""
    features = llvm.get_host_cpu_features()
    found = {}
    if features.get("avx512f"):                                # 32 registers: 28 sums, 2 of B, 1 of A
        if features.get("avx512bf16"):
            if features.get("amx-bf16") and _tile_registers_granted():
                found["amx"] = Target("AVX-512 with AMX", 64, 14, True, True)
            found["avx512bf16"] = Target("AVX-512 with bfloat16", 64, 14, True)
        found["avx512"] = Target("AVX-512", 64, 14, False)
    if features.get("avx2") and features.get("fma"):           # 16 registers: 12 sums, 2 of B, 1 of A
        found["avx2"] = Target("AVX2", 32, 6, False)
    if features.get("neon"):                                   # 32 registers
        found["neon"] = Target("NEON", 16, 14, False)
    return found | {"128": Target("128-bit vectors", 16, 6, False)}


def _tile_registers_granted() -> bool:
    """Ask Linux for the tile registers, which it gives to a process on request, as they are large to save."""
    if platform.system() != "Linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _choose() -> Target:
    """The best target, or that of the environment variable MINITENSOR_CPU, so that each can be tested."""
    found = targets()
    name = os.environ.get("MINITENSOR_CPU") or next(iter(found))
    if name not in found:
        raise ImportError(f"MINITENSOR_CPU is {name!r}; this machine can run {', '.join(found)}")
    return found[name]


TARGET = _choose()
