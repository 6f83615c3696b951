"""The register tile of every matrix product, as vector instructions.

    C (rows x 2 vectors)   =   A (rows x k)   times   B (k x 2 vectors)

            B[p]:   [ vector 0 ][ vector 1 ]          one step of k: two loads of B, and for each row
    A[0, p]  ->     [ sum 0,0  ][ sum 0,1  ]          one scalar of A broadcast to a vector and two
    A[1, p]  ->     [ sum 1,0  ][ sum 1,1  ]          fused multiply-adds. The sums stay in registers
      ...                  ...                        for all of k and touch memory once.

numba cannot say "keep this in registers", so the tile is emitted as LLVM vector code. LLVM emits what the host has.
"""
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu import TARGET

ROWS = TARGET.rows
I32, INDEX = ir.IntType(32), ir.IntType(64)


@intrinsic
def fma(typing, x, y, z):
    """x * y + z, rounded once where the CPU has the instruction, and never re-associated."""
    def generate(context, build, signature, args):
        real = context.get_value_type(signature.return_type)
        name = f"llvm.fmuladd.{'f32' if signature.return_type == types.float32 else 'f64'}"
        return build.call(cgutils.get_or_insert_function(build.module, ir.FunctionType(real, [real] * 3), name), args)
    return x(x, x, x), generate


@intrinsic
def bits(typing, x):
    """The bits of a float32 as an int32."""
    return types.int32(types.float32), lambda context, build, signature, args: build.bitcast(args[0], I32)


@intrinsic
def from_bits(typing, n):
    """The float32 that has the bits of an int32."""
    return types.float32(types.int32), lambda context, build, signature, args: build.bitcast(args[0], ir.FloatType())


def columns(dtype) -> int:
    """The width of the register tile: two vectors."""
    return 2 * TARGET.vector_bytes // dtype.itemsize


@intrinsic
def register_tile(typing, a, a_start, a_row, a_step, b, b_start, b_step, c, c_start, c_row, k, add):
    """C[ROWS, 2 vectors] = (C if add else 0) + A[ROWS, k] @ B[k, 2 vectors].

    a, b, c: arrays of one dtype, read and written as flat memory from element *_start on. a_row, a_step: elements
    from one row, and from one k, to the next; likewise b_step and c_row. Nothing checks bounds here.
    """
    n = types.intp
    signature = types.void(a, n, n, n, b, n, n, c, n, n, n, types.boolean)

    def generate(context, build, signature, args):
        a, a_start, a_row, a_step, b, b_start, b_step, c, c_start, c_row, k, add = args
        size = context.get_abi_sizeof(context.get_value_type(signature.args[0].dtype))
        lanes = TARGET.vector_bytes // size
        real = context.get_value_type(signature.args[0].dtype)
        vector = ir.VectorType(real, lanes)
        data = [context.make_array(t)(context, build, x).data
                for t, x in zip((signature.args[0], signature.args[4], signature.args[7]), (a, b, c), strict=True)]
        a, b, c = (build.gep(p, [start]) for p, start in zip(data, (a_start, b_start, c_start), strict=True))
        name = f"llvm.fmuladd.v{lanes}f{8 * size}"
        multiply_add = cgutils.get_or_insert_function(build.module, ir.FunctionType(vector, [vector] * 3), name)
        index = lambda i: ir.Constant(INDEX, i)
        vector_at = lambda p, i: build.bitcast(build.gep(p, [i]), vector.as_pointer())
        zero, undefined = ir.Constant(vector, [0.0] * lanes), ir.Constant(vector, ir.Undefined)
        first_lane = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        rows_of_c = [build.gep(c, [build.mul(c_row, index(i))]) for i in range(ROWS)]

        start, loop, store = build.block, build.append_basic_block("k"), build.append_basic_block("store")
        load, head = build.append_basic_block("load"), build.append_basic_block("head")
        build.cbranch(add, load, head)
        build.position_at_end(load)
        old = [[build.load(vector_at(row, index(j * lanes)), align=size) for j in range(2)] for row in rows_of_c]
        build.branch(head)
        build.position_at_end(head)
        begin = [[build.phi(vector) for _ in range(2)] for _ in range(ROWS)]
        for i in range(ROWS):
            for j in range(2):
                begin[i][j].add_incoming(old[i][j], load)
                begin[i][j].add_incoming(zero, start)
        build.cbranch(build.icmp_signed(">", k, index(0)), loop, store)

        build.position_at_end(loop)
        p = build.phi(INDEX)
        sums = [[build.phi(vector) for _ in range(2)] for _ in range(ROWS)]
        a_p, b_p = build.gep(a, [build.mul(p, a_step)]), build.gep(b, [build.mul(p, b_step)])
        b_vectors = [build.load(vector_at(b_p, index(j * lanes)), align=size) for j in range(2)]
        following = []
        for i in range(ROWS):
            scalar = build.load(build.gep(a_p, [build.mul(a_row, index(i))]))
            broadcast = build.shuffle_vector(build.insert_element(undefined, scalar, ir.Constant(I32, 0)),
                                             undefined, first_lane)
            following.append([build.call(multiply_add, [broadcast, b_vectors[j], sums[i][j]]) for j in range(2)])
        next_p = build.add(p, index(1))
        p.add_incoming(index(0), head)
        p.add_incoming(next_p, loop)
        build.cbranch(build.icmp_signed("<", next_p, k), loop, store)

        build.position_at_end(store)
        for i in range(ROWS):
            for j in range(2):
                sums[i][j].add_incoming(begin[i][j], head)
                sums[i][j].add_incoming(following[i][j], loop)
                total = build.phi(vector)
                total.add_incoming(begin[i][j], head)
                total.add_incoming(following[i][j], loop)
                following[i][j] = total
        for i in range(ROWS):
            for j in range(2):
                build.store(following[i][j], vector_at(rows_of_c[i], index(j * lanes)), align=size)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def row_max(typing, x, start, n):
    """The largest of x[start : start + n], read as flat memory; NaNs are passed over, -inf where n is 0."""
    def generate(context, build, signature, args):
        x, start, n = args
        real = context.get_value_type(signature.return_type)
        size = context.get_abi_sizeof(real)
        lanes = TARGET.vector_bytes // size
        vector = ir.VectorType(real, lanes)
        data = build.gep(context.make_array(signature.args[0])(context, build, x).data, [start])
        lowest = float("-inf")
        best = cgutils.alloca_once_value(build, ir.Constant(vector, [lowest] * lanes))
        largest = cgutils.alloca_once_value(build, ir.Constant(real, lowest))

        def keep(slot, value):
            before = build.load(slot)
            build.store(build.select(build.fcmp_ordered(">", value, before), value, before), slot)

        whole = build.udiv(n, ir.Constant(INDEX, lanes))
        with cgutils.for_range(build, whole) as step:
            at = build.gep(data, [build.mul(step.index, ir.Constant(INDEX, lanes))])
            keep(best, build.load(build.bitcast(at, vector.as_pointer()), align=size))
        with cgutils.for_range(build, n, start=build.mul(whole, ir.Constant(INDEX, lanes))) as step:
            keep(largest, build.load(build.gep(data, [step.index])))
        for lane in range(lanes):
            keep(largest, build.extract_element(build.load(best), ir.Constant(I32, lane)))
        return build.load(largest)

    return x.dtype(x, types.intp, types.intp), generate
