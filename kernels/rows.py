"""Loops over a row of numbers as vector instructions: short and quick to compile, where LLVM would unroll."""
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu import TARGET
from kernels.simd import I32, INDEX, everywhere


@intrinsic
def scale_row(typing, x, start, n, scale, to, to_start):
    """to[to_start + j] = scale x[start + j] for j < n, both read as flat memory."""
    def generate(context, build, signature, args):
        x, start, n, scale, to, to_start = args
        real = context.get_value_type(signature.args[3])
        size = context.get_abi_sizeof(real)
        lanes = TARGET.vector_bytes // size
        vector, width = ir.VectorType(real, lanes), ir.Constant(INDEX, lanes)
        x = build.gep(context.make_array(signature.args[0])(context, build, x).data, [start])
        to = build.gep(context.make_array(signature.args[4])(context, build, to).data, [to_start])
        scales = everywhere(build, scale, lanes)
        whole = build.mul(build.udiv(n, width), width)
        with cgutils.for_range_slice(build, ir.Constant(INDEX, 0), whole, width) as (j, _):
            from_, into = (build.bitcast(build.gep(p, [j]), vector.as_pointer()) for p in (x, to))
            build.store(build.fmul(build.load(from_, align=size), scales), into, align=size)
        with cgutils.for_range(build, n, start=whole) as step:
            build.store(build.fmul(build.load(build.gep(x, [step.index])), scale),
                        build.gep(to, [step.index]))
        return context.get_dummy_value()

    n = types.intp
    return types.void(x, n, n, x.dtype, to, n), generate


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
        half, value = lanes // 2, build.load(best)
        while half:                                    # the larger of two halves, until one lane is left
            order = [ir.Constant(ir.VectorType(I32, half), list(range(k, k + half))) for k in (0, half)]
            low, high = (build.shuffle_vector(value, value, lanes_of) for lanes_of in order)
            value = build.select(build.fcmp_ordered(">", low, high), low, high)
            half //= 2
        keep(largest, build.extract_element(value, ir.Constant(I32, 0)))
        return build.load(largest)

    return x.dtype(x, types.intp, types.intp), generate
