"""The register tile of products in bfloat16 on the tile unit of newer CPUs, Intel's AMX.

A tile register holds 16 rows of 64 bytes. One instruction multiplies 16 rows of 16 pairs of A by 16 rows of
16 pairs of B, a row for each pair of k, and adds to 16 x 16 sums in float32. Four such stay in registers:

                        B[p : p + 16]:   [ tile 6 ][ tile 7 ]        one step of 16 pairs of k: four loads
    A[0 : 16, p : p + 16]  [ tile 4 ]    [ sums 0 ][ sums 1 ]        and four products
    A[16 : 32, ...]        [ tile 5 ]    [ sums 2 ][ sums 3 ]

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu import TARGET

ROWS, PAIRS = 32, 16                 # rows of C in a block; pairs of k in a step, of which k is a multiple
PREFIX = "llvm.x86."                 # of the instructions' names; a test puts its own in their place
I8, INDEX = ir.IntType(8), ir.IntType(64)
BYTES = I8.as_pointer()


def _call(build, name, *arguments):
    kinds = [x.type for x in arguments]
    build.call(cgutils.get_or_insert_function(
        build.module, ir.FunctionType(ir.VoidType(), kinds), PREFIX + name), arguments)


@intrinsic
def start_tiles(typing, bf16):
    """Make this thread's tile registers 16 rows of 64 bytes each, if bf16 and the CPU has them."""
    def generate(context, build, signature, args):
        if TARGET.tiles:
            with build.if_then(args[0]):
                layout = bytearray(64)                   # as the instruction reads it: the palette, ...
                layout[0] = 1
                layout[16:32:2] = [64] * 8               # bytes in a row, two bytes a tile, ...
                layout[48:56] = [16] * 8                 # and rows
                at = cgutils.alloca_once_value(build, ir.Constant(ir.ArrayType(I8, 64), layout))
                _call(build, "ldtilecfg", build.bitcast(at, BYTES))
        return context.get_dummy_value()
    return types.void(types.boolean), generate


@intrinsic
def stop_tiles(typing, bf16):
    """Let go of the tile registers, which make a switch between threads slow."""
    def generate(context, build, signature, args):
        if TARGET.tiles:
            with build.if_then(args[0]):
                _call(build, "tilerelease")
        return context.get_dummy_value()
    return types.void(types.boolean), generate


def fill(function):
    """The body of a register tile of `tile`: C[32, 32] = first + A[32, k] @ B[k, 32]."""
    a, a_row, _, b, b_row, c, c_row, k, first, first_row = function.args
    build = ir.IRBuilder(function.append_basic_block("start"))

    def corner(matrix, row, i, j):
        """The address of tile i, j of a matrix: i counts 16 rows, j 16 columns."""
        return build.bitcast(build.gep(matrix, [build.add(build.mul(row, ir.Constant(INDEX, 16 * i)),
                                                          ir.Constant(INDEX, 16 * j))]), BYTES)

    def load(tile, matrix, row, i, j):
        _call(build, "tileloadd64", ir.Constant(I8, tile), corner(matrix, row, i, j), in_bytes(row))

    def in_bytes(row):
        return build.mul(row, ir.Constant(INDEX, 4))

    sums = [(2 * i + j, i, j) for i in range(2) for j in range(2)]
    with build.if_else(build.icmp_unsigned("!=", first, ir.Constant(first.type, None))) as (given, nothing):
        with given:
            for tile, i, j in sums:
                load(tile, first, first_row, i, j)
        with nothing:
            for tile, _, _ in sums:
                _call(build, "tilezero", ir.Constant(I8, tile))
    with cgutils.for_range(build, build.udiv(k, ir.Constant(INDEX, PAIRS))) as step:
        p = build.mul(step.index, ir.Constant(INDEX, PAIRS))
        a_p, b_p = build.gep(a, [p]), build.gep(b, [build.mul(p, b_row)])
        for i in range(2):
            load(4 + i, a_p, a_row, i, 0)
        for j in range(2):
            load(6 + j, b_p, b_row, 0, j)
        for tile, i, j in sums:
            _call(build, "tdpbf16ps", *(ir.Constant(I8, t) for t in (tile, 4 + i, 6 + j)))
    for tile, i, j in sums:
        _call(build, "tilestored64", ir.Constant(I8, tile), corner(c, c_row, i, j), in_bytes(c_row))
    build.ret_void()
