"""What numba cannot say, as intrinsics: single instructions, and vectors of whole registers."""
from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu import TARGET
from kernels.jit import helper

LINE = 64                # bytes that a cache fetches at once
I32, INDEX = ir.IntType(32), ir.IntType(64)
LANES = TARGET.vector_bytes // 4         # float32 in a vector
# Can the CPU round vectors to bfloat16? (One whose tile unit is played by a test may not.)
ROUNDS = TARGET.bf16 and bool(llvm.get_host_cpu_features().get("avx512bf16"))


@intrinsic
def fma(typing, x, y, z):
    """x * y + z, rounded once where the CPU has the instruction, and never re-associated."""
    def generate(context, build, signature, args):
        real = context.get_value_type(signature.return_type)
        name = f"llvm.fmuladd.{'f32' if signature.return_type == types.float32 else 'f64'}"
        return build.call(
            cgutils.get_or_insert_function(build.module, ir.FunctionType(real, [real] * 3), name), args)
    return x(x, x, x), generate


@intrinsic
def bits(typing, x):
    """The bits of a float32 as an int32."""
    return types.int32(types.float32), lambda context, build, signature, args: build.bitcast(args[0], I32)


@intrinsic
def from_bits(typing, n):
    """The float32 that has the bits of an int32."""
    return (types.float32(types.int32),
            lambda context, build, signature, args: build.bitcast(args[0], ir.FloatType()))


def _marking(*attributes):
    """An intrinsic that gives these to the function that calls it."""
    @intrinsic
    def mark(typing):
        def generate(context, build, signature, args):
            for attribute in attributes:
                build.function.attributes.add(attribute)
            return context.get_dummy_value()
        return types.void(), generate
    return mark


# Not inlined: without sums a function's copies cannot differ, and compile faster. Where compact, without the
# unrolled and vectorised forms of its loops, too: they run seldom, or over vector instructions already.
out_of_line, compact = _marking("noinline"), _marking("noinline", "optsize")


def everywhere(build, scalar, lanes):
    """A vector of it."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = build.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return build.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


@intrinsic
def address(typing, x, start):
    """The address of element start of an array read as flat memory; the caller keeps the array alive."""
    def generate(context, build, signature, args):
        data = context.make_array(signature.args[0])(context, build, args[0]).data
        return build.ptrtoint(build.gep(data, [args[1]]), INDEX)
    return types.intp(x, types.intp), generate


@intrinsic
def pointer(typing, like, address):
    """An address as a pointer to elements of like's dtype."""
    def generate(context, build, signature, args):
        return build.inttoptr(args[1], context.get_value_type(signature.return_type))
    return types.CPointer(like.dtype)(like, types.intp), generate


@intrinsic
def transpose_block(typing, x, x_start, x_row, to, to_start, to_row):
    """to[p, j] = x[j, p] for a square as wide as a vector; *_row: elements from a row to the next.

    Rows of x are vectors. In stage s = 1, 2, 4, ... rows j and j + s exchange the lanes that differ from
    their row in bit s, so that after the last stage lane j of row p holds what was lane p of row j.
    """
    n = types.intp
    signature = types.void(x, n, n, to, n, n)

    def generate(context, build, signature, args):
        x, x_start, x_row, to, to_start, to_row = args
        real = context.get_value_type(signature.args[0].dtype)
        size = context.get_abi_sizeof(real)
        lanes = TARGET.vector_bytes // size
        vector = ir.VectorType(real, lanes)
        x = build.gep(context.make_array(signature.args[0])(context, build, x).data, [x_start])
        to = build.gep(context.make_array(signature.args[3])(context, build, to).data, [to_start])

        def row(p, stride, j):
            return build.bitcast(build.gep(p, [build.mul(stride, ir.Constant(INDEX, j))]),
                                 vector.as_pointer())

        def shuffle(a, b, lanes_of_both):
            mask = ir.Constant(ir.VectorType(I32, lanes), lanes_of_both)
            return build.shuffle_vector(a, b, mask)

        rows = [build.load(row(x, x_row, j), align=size) for j in range(lanes)]
        s = 1
        while s < lanes:
            for j in range(lanes):
                if not j & s:
                    a, b = rows[j], rows[j + s]
                    rows[j] = shuffle(a, b, [k if not k & s else lanes + k - s for k in range(lanes)])
                    rows[j + s] = shuffle(a, b, [k + s if not k & s else lanes + k for k in range(lanes)])
            s *= 2
        for p in range(lanes):
            build.store(rows[p], row(to, to_row, p), align=size)
        return context.get_dummy_value()

    return signature, generate


def _copying(count, past_caches=False):
    """An intrinsic that copies so many elements of a size in bytes.

    past_caches: what is not read again soon need not be fetched to be overwritten, which takes half the time.
    The place in `to` is then aligned to vectors, and `finish_streams` ends it.
    """
    @intrinsic
    def copy(typing, x, x_start, to, to_start):
        def generate(context, build, signature, args):
            x, x_start, to, to_start = args
            real = context.get_value_type(signature.args[0].dtype)
            size = context.get_abi_sizeof(real)
            vector = ir.VectorType(real, count(size)).as_pointer()
            x = build.gep(context.make_array(signature.args[0])(context, build, x).data, [x_start])
            to = build.gep(context.make_array(signature.args[2])(context, build, to).data, [to_start])
            stored = build.store(build.load(build.bitcast(x, vector), align=size), build.bitcast(to, vector),
                                 align=TARGET.vector_bytes if past_caches else size)
            if past_caches:
                stored.set_metadata("nontemporal", build.module.add_metadata([ir.Constant(I32, 1)]))
            return context.get_dummy_value()
        return types.void(x, types.intp, to, types.intp), generate
    return copy


def _two_vectors(size):
    return 2 * TARGET.vector_bytes // size


copy_columns, stream_columns = _copying(_two_vectors), _copying(_two_vectors, past_caches=True)


@helper
def copied_rows(size):
    """How many elements of so many bytes `copy_tile_rows` copies: as many as the register tile has rows, or a
    vector, which is one instruction.
    """
    return max(TARGET.rows, TARGET.vector_bytes // size)


copy_tile_rows = _copying(copied_rows.py_func)


class BFloat(ir.Type):
    """bfloat16, which llvmlite does not name."""

    def __str__(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, BFloat)

    def __hash__(self):
        return hash(BFloat)


def _rounding(interleaved):
    """An intrinsic that rounds two vectors of float32 to one of pairs of bfloat16, to nearest even: those of
    the first side by side, then those of the second; or, interleaved, each with its like of the second. Of
    each only `count` elements are read, zeros stand for the others; all pairs are written.

    Where ROUNDS; what is below the smallest normal number becomes 0 (`pack.pair` keeps it, and the products
    take it for 0, unless it rounds to that number).
    """
    @intrinsic
    def round_vectors(typing, x, first, second, to, to_start, count):
        def generate(context, build, signature, args):
            x, first, second, to, to_start, count = args
            real = context.get_value_type(signature.args[0].dtype)
            if not ROUNDS or real != ir.FloatType():                  # compiled along, and never run
                return context.get_dummy_value()
            vector, halves = ir.VectorType(real, LANES), ir.VectorType(BFloat(), 2 * LANES)
            lanes = ir.Constant(ir.VectorType(INDEX, LANES), list(range(LANES)))
            zero = ir.Constant(vector, [0.0] * LANES)
            mask = build.icmp_signed("<", lanes, everywhere(build, count, LANES))

            load = cgutils.get_or_insert_function(
                build.module, ir.FunctionType(vector, [vector.as_pointer(), I32, mask.type, vector]),
                f"llvm.masked.load.v{LANES}f32.p0")

            def at(array, place, start):
                data = context.make_array(signature.args[place])(context, build, array).data
                return build.bitcast(build.gep(data, [start]), vector.as_pointer())

            align = ir.Constant(I32, 4)
            low, high = (build.call(load, [at(x, 0, start), align, mask, zero]) for start in (first, second))
            convert = cgutils.get_or_insert_function(
                build.module, ir.FunctionType(halves, [vector, vector]),
                f"llvm.x86.avx512bf16.cvtne2ps2bf16.{8 * TARGET.vector_bytes}")
            pairs = build.bitcast(build.call(convert, [high, low]),
                                  ir.VectorType(ir.IntType(16), 2 * LANES))
            if interleaved:
                order = [place for i in range(LANES) for place in (i, LANES + i)]
                pairs = build.shuffle_vector(
                    pairs, pairs, ir.Constant(ir.VectorType(I32, 2 * LANES), order))
            build.store(build.bitcast(pairs, vector), at(to, 3, to_start), align=4)
            return context.get_dummy_value()
        n = types.intp
        return types.void(x, n, n, to, n, n), generate
    return round_vectors


round_in_turn, round_interleaved = _rounding(False), _rounding(True)


def prefetch(build, address, vectors, write):
    """Ask for the lines of so many vectors from an address on, before they are needed."""
    byte = ir.IntType(8).as_pointer()
    prefetch = cgutils.get_or_insert_function(
        build.module, ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]), "llvm.prefetch.p0")
    for line in range(0, vectors * TARGET.vector_bytes, LINE):
        at = build.gep(build.bitcast(address, byte), [ir.Constant(INDEX, line)])
        build.call(prefetch, [at, ir.Constant(I32, int(write)), ir.Constant(I32, 3), ir.Constant(I32, 1)])


@intrinsic
def prefetch_columns(typing, x, start, write):
    """Ask for two vectors, the width of the register tile, before they are read, or written; start may lie
    beyond x.
    """
    def generate(context, build, signature, args):
        data = context.make_array(signature.args[0])(context, build, args[0]).data
        for written in (False, True):
            with build.if_then(args[2] if written else build.not_(args[2])):
                prefetch(build, build.gep(data, [args[1]]), 2, written)
        return context.get_dummy_value()
    return types.void(x, types.intp, types.boolean), generate


@intrinsic
def finish_streams(typing):
    """Other threads see what was streamed before."""
    def generate(context, build, signature, args):
        build.fence("seq_cst")
        return context.get_dummy_value()
    return types.void(), generate
