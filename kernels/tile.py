"""The register tile of every matrix product, as vector instructions.

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
from kernels.jit import helper
from kernels.simd import INDEX, BFloat, everywhere, prefetch

ROWS = TARGET.rows
SHORT = tuple(rows for rows in (8, 4, 2) if rows < ROWS <= 4 * rows)      # for what is left below whole tiles


def columns(dtype) -> int:
    """The width of the register tile: two vectors."""
    return 2 * TARGET.vector_bytes // dtype.itemsize


def height(bf16: bool) -> int:
    """The rows of the register tile."""
    return amx.ROWS if bf16 and TARGET.tiles else ROWS


@helper
def written(rows, bf16):
    """The rows that a register tile of two vectors writes where so many are wanted."""
    if bf16 and TARGET.tiles:
        return amx.ROWS
    least = ROWS
    for short in SHORT:
        if rows <= short:
            least = short
    return least


@intrinsic
def register_tile(typing, like, a, a_row, a_step, b, b_step, c, c_row, k, first, first_row, rows, wide, bf16):
    """C[rows, 2 vectors] = first + A[rows, k] @ B[k, 2 vectors], or C[ROWS, 1 vector] if not wide.

    rows: as `written` has it.

    like: any array of the dtype. a, b, c, first: addresses of the first elements; first is C itself to add to
    it, a bias, or 0 for nothing. a_row, a_step: elements from one row, and from one k, to the next; likewise
    b_step, c_row and first_row, which is 0 for a bias. Nothing checks bounds here.
    bf16: elements of A and B are pairs of bfloat16 that follow each other in K, k counts the pairs (float32
    C and a CPU that has such products only). On a tile unit both vectors are written always, a_step must be 1
    and k a multiple of `amx.PAIRS`.
    """
    n, flag = types.intp, types.boolean
    signature = types.void(like, n, n, n, n, n, n, n, n, n, n, n, flag, flag)

    def generate(context, build, signature, args):
        _, a, a_row, a_step, b, b_step, c, c_row, k, first, first_row, rows, wide, bf16 = args
        real = context.get_value_type(signature.args[0].dtype)
        a, b, c, first = (build.inttoptr(x, real.as_pointer()) for x in (a, b, c, first))

        def tile(of, vectors, pairs):
            build.call(_tile_function(build.module, real, of, vectors, pairs),
                       [a, a_row, a_step, b, b_step, c, c_row, k, first, first_row])

        for pairs in [False, True][:1 + (TARGET.bf16 and real == ir.FloatType())]:
            heights = (amx.ROWS,) if pairs and TARGET.tiles else (ROWS, *SHORT)
            with build.if_then(bf16 if pairs else build.not_(bf16)):
                with build.if_then(build.not_(wide)):
                    tile(heights[0], 1, pairs)
                for of in heights:
                    as_high = build.icmp_signed("==", rows, ir.Constant(INDEX, of))
                    with build.if_then(build.and_(wide, as_high)):
                        tile(of, 2, pairs)
        return context.get_dummy_value()

    return signature, generate


def _tile_function(module, real, rows, vectors, pairs):
    """The tile as a function of its own, once in a module: inlined at every call it would compile slowly."""
    lanes = TARGET.vector_bytes // (4 if real == ir.FloatType() else 8)
    pointer = real.as_pointer()
    arguments = [pointer, INDEX, INDEX, pointer, INDEX, pointer, INDEX, INDEX, pointer, INDEX]
    function = cgutils.get_or_insert_function(
        module, ir.FunctionType(ir.VoidType(), arguments),
        f"register_tile_{'bf16' if pairs else real}_{rows}x{vectors}")
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
        halves = ir.VectorType(BFloat(), 2 * lanes)
        name = f"llvm.x86.avx512bf16.dpbf16ps.{8 * TARGET.vector_bytes}"
        dot = cgutils.get_or_insert_function(module, ir.FunctionType(vector, [vector, halves, halves]), name)
        return build.call(dot, [z, build.bitcast(x, halves), build.bitcast(y, halves)])

    zero = ir.Constant(vector, [0.0] * lanes)
    rows_of_c = [build.gep(c, [build.mul(c_row, index(i))]) for i in range(rows)]
    for row in rows_of_c:                    # asked for by the stores at the end, each would be waited for
        prefetch(build, row, vectors, write=True)
    places = [(i, j) for i in range(rows) for j in range(vectors)]
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
    for i in range(rows):
        broadcast = everywhere(build, build.load(build.gep(a_p, [build.mul(a_row, index(i))])), lanes)
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
