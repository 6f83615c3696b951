"""The register tile of every matrix product, and what feeds it, as vector instructions.

    C (rows x 2 vectors)   =   A (rows x k)   times   B (k x 2 vectors)

            B[p]:   [ vector 0 ][ vector 1 ]          one step of k: two loads of B, and for each row
    A[0, p]  ->     [ sum 0,0  ][ sum 0,1  ]          one scalar of A broadcast to a vector and two
    A[1, p]  ->     [ sum 1,0  ][ sum 1,1  ]          fused multiply-adds. The sums stay in registers
      ...                  ...                        for all of k and touch memory once.

numba cannot say "keep this in registers", so the tile is LLVM vector code; LLVM emits what the host has.
"""
from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels import amx
from kernels.cpu import TARGET

ROWS = TARGET.rows
LINE = 64                # bytes that a cache fetches at once
I32, INDEX = ir.IntType(32), ir.IntType(64)


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


@intrinsic
def out_of_line(typing):
    """Keep the caller from being inlined: without sums its copies cannot differ, and compile faster."""
    def generate(context, build, signature, args):
        build.function.attributes.add("noinline")
        return context.get_dummy_value()
    return types.void(), generate


def columns(dtype) -> int:
    """The width of the register tile: two vectors."""
    return 2 * TARGET.vector_bytes // dtype.itemsize


def height(bf16: bool) -> int:
    """The rows of the register tile."""
    return amx.ROWS if bf16 and TARGET.tiles else ROWS


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
def register_tile(typing, like, a, a_row, a_step, b, b_step, c, c_row, k, first, first_row, wide, bf16):
    """C[ROWS, 2 vectors] = first + A[ROWS, k] @ B[k, 2 vectors], or of 1 vector if not wide.

    like: any array of the dtype. a, b, c, first: addresses of the first elements; first is C itself to add to
    it, a bias, or 0 for nothing. a_row, a_step: elements from one row, and from one k, to the next; likewise
    b_step, c_row and first_row, which is 0 for a bias. Nothing checks bounds here.
    bf16: elements of A and B are pairs of bfloat16 that follow each other in K, k counts the pairs (float32
    C and a CPU that has such products only). On a tile unit C has `height(True)` rows, both vectors are
    written always, a_step must be 1 and k a multiple of `amx.PAIRS`.
    """
    n, flag = types.intp, types.boolean
    signature = types.void(like, n, n, n, n, n, n, n, n, n, n, flag, flag)

    def generate(context, build, signature, args):
        _, a, a_row, a_step, b, b_step, c, c_row, k, first, first_row, wide, bf16 = args
        real = context.get_value_type(signature.args[0].dtype)
        a, b, c, first = (build.inttoptr(x, real.as_pointer()) for x in (a, b, c, first))
        for pairs in [False, True][:1 + (TARGET.bf16 and real == ir.FloatType())]:
            for vectors in (1, 2):
                wanted = build.and_(wide if vectors == 2 else build.not_(wide),
                                    bf16 if pairs else build.not_(bf16))
                with build.if_then(wanted):
                    build.call(_tile_function(build.module, real, vectors, pairs),
                               [a, a_row, a_step, b, b_step, c, c_row, k, first, first_row])
        return context.get_dummy_value()

    return signature, generate


class _BFloat(ir.Type):
    """bfloat16, which llvmlite does not name."""

    def __str__(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


def _tile_function(module, real, vectors, pairs):
    """The tile as a function of its own, once in a module: inlined at every call it would compile slowly."""
    lanes = TARGET.vector_bytes // (4 if real == ir.FloatType() else 8)
    pointer = real.as_pointer()
    arguments = [pointer, INDEX, INDEX, pointer, INDEX, pointer, INDEX, INDEX, pointer, INDEX]
    function = cgutils.get_or_insert_function(
        module, ir.FunctionType(ir.VoidType(), arguments),
        f"register_tile_{'bf16' if pairs else real}_{vectors}")
    if function.blocks:
        return function
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    if pairs and TARGET.tiles:
        amx.fill(function)
        return function
    a, a_row, a_step, b, b_step, c, c_row, k, given, given_row = function.args
    vector = ir.VectorType(real, lanes)
    align = TARGET.vector_bytes // lanes
    start, load, head, loop, store = (function.append_basic_block(name) for name in
                                      ("start", "load", "head", "k", "store"))
    build = ir.IRBuilder(start)

    def index(i):
        return ir.Constant(INDEX, i)

    def vector_at(p, j):
        return build.bitcast(build.gep(p, [index(j * lanes)]), vector.as_pointer())

    def multiply_add(x, y, z):
        if not pairs:
            fma = cgutils.get_or_insert_function(module, ir.FunctionType(vector, [vector] * 3),
                                                 f"llvm.fmuladd.v{lanes}f{8 * align}")
            return build.call(fma, [x, y, z])
        halves = ir.VectorType(_BFloat(), 2 * lanes)
        name = f"llvm.x86.avx512bf16.dpbf16ps.{8 * TARGET.vector_bytes}"
        dot = cgutils.get_or_insert_function(module, ir.FunctionType(vector, [vector, halves, halves]), name)
        return build.call(dot, [z, build.bitcast(x, halves), build.bitcast(y, halves)])

    zero, undefined = ir.Constant(vector, [0.0] * lanes), ir.Constant(vector, ir.Undefined)
    first_lane = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    rows_of_c = [build.gep(c, [build.mul(c_row, index(i))]) for i in range(ROWS)]
    for row in rows_of_c:                    # asked for by the stores at the end, each would be waited for
        _prefetch(build, row, vectors, write=True)
    places = [(i, j) for i in range(ROWS) for j in range(vectors)]
    build.cbranch(build.icmp_unsigned("!=", given, ir.Constant(pointer, None)), load, head)

    build.position_at_end(load)
    old = {(i, j): build.load(vector_at(build.gep(given, [build.mul(given_row, index(i))]), j), align=align)
           for i, j in places}
    build.branch(head)

    build.position_at_end(head)
    first = {place: build.phi(vector) for place in places}
    for place in places:
        first[place].add_incoming(zero, start)
        first[place].add_incoming(old[place], load)
    build.cbranch(build.icmp_signed(">", k, index(0)), loop, store)

    build.position_at_end(loop)
    p = build.phi(INDEX)
    sums = {place: build.phi(vector) for place in places}
    a_p, b_p = build.gep(a, [build.mul(p, a_step)]), build.gep(b, [build.mul(p, b_step)])
    b_vectors = [build.load(vector_at(b_p, j), align=align) for j in range(vectors)]
    following = {}
    for i in range(ROWS):
        scalar = build.load(build.gep(a_p, [build.mul(a_row, index(i))]))
        broadcast = build.shuffle_vector(
            build.insert_element(undefined, scalar, ir.Constant(I32, 0)), undefined, first_lane)
        for j in range(vectors):
            following[i, j] = multiply_add(broadcast, b_vectors[j], sums[i, j])
    next_p = build.add(p, index(1))
    p.add_incoming(index(0), head)
    p.add_incoming(next_p, loop)
    for place in places:
        sums[place].add_incoming(first[place], head)
        sums[place].add_incoming(following[place], loop)
    build.cbranch(build.icmp_signed("<", next_p, k), loop, store)

    build.position_at_end(store)
    for place in places:
        first_or_last = build.phi(vector)
        first_or_last.add_incoming(first[place], head)
        first_or_last.add_incoming(following[place], loop)
        following[place] = first_or_last
    for i, j in places:
        build.store(following[i, j], vector_at(rows_of_c[i], j), align=align)
    build.ret_void()
    return function


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


@intrinsic
def copy_columns(typing, x, x_start, to, to_start):
    """Copy two vectors, the width of the register tile."""
    signature = types.void(x, types.intp, to, types.intp)

    def generate(context, build, signature, args):
        x, x_start, to, to_start = args
        real = context.get_value_type(signature.args[0].dtype)
        size = context.get_abi_sizeof(real)
        vector = ir.VectorType(real, TARGET.vector_bytes // size).as_pointer()
        x = build.bitcast(
            build.gep(context.make_array(signature.args[0])(context, build, x).data, [x_start]), vector)
        to = build.bitcast(
            build.gep(context.make_array(signature.args[2])(context, build, to).data, [to_start]), vector)
        for j in range(2):
            at = [ir.Constant(INDEX, j)]
            build.store(build.load(build.gep(x, at), align=size), build.gep(to, at), align=size)
        return context.get_dummy_value()

    return signature, generate


def _prefetch(build, address, vectors, write):
    """Ask for the lines of so many vectors from an address on, before they are needed."""
    byte = ir.IntType(8).as_pointer()
    prefetch = cgutils.get_or_insert_function(
        build.module, ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]), "llvm.prefetch.p0")
    for line in range(0, vectors * TARGET.vector_bytes, LINE):
        at = build.gep(build.bitcast(address, byte), [ir.Constant(INDEX, line)])
        build.call(prefetch, [at, ir.Constant(I32, int(write)), ir.Constant(I32, 3), ir.Constant(I32, 1)])


@intrinsic
def prefetch_columns(typing, x, start):
    """Ask for two vectors, the width of the register tile, before they are needed; start may lie beyond x."""
    def generate(context, build, signature, args):
        data = context.make_array(signature.args[0])(context, build, args[0]).data
        _prefetch(build, build.gep(data, [args[1]]), 2, write=False)
        return context.get_dummy_value()
    return types.void(x, types.intp), generate


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
