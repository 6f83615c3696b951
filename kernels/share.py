"""How the threads of a kernel share its work, so that all of them end together.

Two cores seldom run at one speed: one has a lower clock, or works for another program for a while, and of
work cut into equal parts the slower one's takes longest. So each thread takes its share in pieces, half of
what is left of it at a time, and after its own share pieces of the others'. From one kernel to the next most
of a share stays with its thread, which finds in its cache what it left there.
Sources: Hummel, Schonberg, Flynn 1992 (pieces that get smaller); Blumofe, Leiserson 1999 (work stealing).
"""
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.jit import helper
from kernels.simd import INDEX, LINE


@intrinsic
def num_threads(typing):
    """How many threads run a `prange`. A kernel that asked numba.get_num_threads() could not be cached."""
    def generate(context, build, signature, args):
        function = cgutils.get_or_insert_function(build.module, ir.FunctionType(INDEX, []), "get_num_threads")
        return build.call(function, [])
    return types.intp(), generate


@intrinsic
def new_counters(typing, threads):
    """The address of how many pieces were taken of each thread's share, 0 so far, each in a line of the cache
    of its own. They live in the frame of the kernel.
    """
    def generate(context, build, signature, args):
        counters = build.alloca(ir.ArrayType(ir.IntType(8), LINE), size=args[0])
        counters.align = LINE
        cgutils.memset(build, counters, build.mul(args[0], ir.Constant(INDEX, LINE)), 0)
        return build.ptrtoint(counters, INDEX)
    return types.intp(types.intp), generate


@intrinsic
def _take(typing, counter):
    """Count one piece more, and return how many were taken before; no other thread gets this number."""
    def generate(context, build, signature, args):
        return build.atomic_rmw("add", build.inttoptr(args[0], INDEX.as_pointer()), ir.Constant(INDEX, 1),
                                "monotonic")
    return types.intp(types.intp), generate


@helper
def next_piece(counters, whose, threads, units, most, least):
    """The first unit of the next piece, the one behind its last, and of whose share it is: begin with the
    thread's own, and go on with what was returned. A piece has least to most units; 0, 0 where none is left.
    """
    while whose < 2 * threads:
        share = whose % threads
        first, end = units * share // threads, units * (share + 1) // threads
        behind = first
        for _ in range(_take(counters + share * LINE) + 1):
            first, behind = behind, behind + min(most, max(least, (end - behind + 1) // 2))
        if first < end:
            return first, min(end, behind), whose
        whose += 1
    return 0, 0, whose
