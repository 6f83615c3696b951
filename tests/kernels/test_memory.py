"""Recycled memory: aligned, reused when the last view dies, never before."""
import collections
import gc
import itertools
import math
import runpy
import signal
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels import memory

CASES = runpy.run_path(str(Path(__file__).with_name("every_kernel.py")))["CASES"]
NEAR_POWERS = st.builds(lambda power, off: max(0, 2**power + off), st.integers(0, 22), st.integers(-2, 2))
SIZES = st.one_of(st.integers(0, 10_000), st.integers(0, 2**22), NEAR_POWERS)


def address(x):
    return x.__array_interface__["data"][0]


def require_disjoint(arrays):
    """Fail if two of these arrays of bytes overlap."""
    spans = sorted((address(x), address(x) + x.size) for x in arrays if x.size)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.fixture(autouse=True)
def without_collector():
    """Buffers come back by reference counting alone; no rubbish of other tests may come in between."""
    gc.collect()
    gc.disable()
    memory._free.clear()
    yield
    gc.enable()


@given(SIZES, st.sampled_from([np.float32, np.float64, np.int32, np.uint8, np.bool_]))
def test_aligned_contiguous_and_writable(size, dtype):
    x = memory.empty(size, dtype)
    assert x.shape == (size,) and x.dtype == dtype
    assert address(x) % 64 == 0
    assert x.flags.c_contiguous and x.flags.writeable and x.flags.aligned
    x.fill(1)
    assert x.sum() == size


@given(st.lists(st.integers(0, 7), max_size=5).map(tuple))
def test_shapes(shape):
    x = memory.empty(shape)
    assert x.shape == shape and x.dtype == np.float32 and x.size == math.prod(shape)
    assert not memory.zeros(shape, np.float64).any() and memory.zeros(shape, np.int32).dtype == np.int32


def test_zeros_are_zeros_in_used_memory():
    for size in (1, 100, 5000, 100_000):
        memory.empty(size).fill(np.nan)
        assert not memory.zeros(size).any()


@given(SIZES)
def test_same_memory_after_the_last_view_died(size):
    x = memory.empty(size, np.uint8)
    place = address(x)
    del x
    assert address(memory.empty(size, np.uint8)) == place


VIEWS = [
    lambda x: x[5:], lambda x: x[::-1], lambda x: x[7:8].squeeze(), lambda x: x.view(np.int32), memoryview,
    lambda x: x.reshape(10, -1), lambda x: x.reshape(10, -1)[3:7, 2],
    lambda x: x.reshape(4, 5, -1).transpose(2, 0, 1)[::3], lambda x: x[None].astype(np.float32, copy=False),
    lambda x: np.broadcast_to(x, (3, x.size)), lambda x: np.lib.stride_tricks.sliding_window_view(x, 4)[9],
]


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_keeps_the_memory(view):
    x = memory.empty(1000)
    x[:] = np.arange(1000)
    place, kept = address(x), view(x)
    expected = np.array(kept)
    del x
    others = [memory.empty(1000) for _ in range(3)]
    for other in others:
        other.fill(-1)
    assert place not in map(address, others)
    np.testing.assert_array_equal(np.asarray(kept), expected)
    del kept
    assert address(memory.empty(1000)) == place


def test_a_view_of_a_view_keeps_the_memory():
    x = memory.empty(1000)
    place = address(x)
    for cut in (np.s_[1:], np.s_[None], np.s_[:, 1:], np.s_[0], np.s_[::2]):
        x = x[cut]
        assert address(memory.empty(1000)) != place
    del x
    assert address(memory.empty(1000)) == place


@given(st.lists(SIZES, max_size=20))
def test_arrays_that_live_never_overlap(sizes):
    arrays = [memory.empty(size, np.uint8) for size in sizes]
    require_disjoint(arrays)


@given(SIZES)
def test_a_new_buffer_wastes_a_quarter_at_most(size):
    memory._free.clear()
    x = memory.empty(size, np.uint8)
    assert memory.free_bytes() == 0
    del x
    assert size <= memory.free_bytes() <= max(1.25 * size, 4096)


@given(SIZES, SIZES)
def test_a_reused_buffer_is_not_much_too_large(first, second):
    memory._free.clear()
    x = memory.empty(first, np.uint8)
    place = address(x)
    del x
    large = memory.free_bytes()
    y = memory.empty(second, np.uint8)
    if address(y) == place and memory.free_bytes() == 0:
        assert second <= large <= max(2.5 * second, 8192)


def test_release_gives_back_what_is_large_and_free():
    small, large, kept = memory.empty(1000), memory.empty(memory.LARGE), memory.empty(memory.LARGE)
    kept.fill(3)
    place, mapping = address(small), weakref.ref(root(large))
    del small, large
    assert mapping() is not None
    memory.release()
    assert mapping() is None and (kept == 3).all()
    assert address(memory.empty(1000)) == place, "small ones are parts of slabs, and stay"


def test_outputs_are_aligned_and_recycled():
    x = np.ones((33, 65), np.float32)
    y = kernels.relu2_forward(x)
    place = address(y)
    assert place % 64 == 0
    del y
    assert address(kernels.relu2_forward(x)) == place


def test_threads_do_not_get_one_anothers_memory():
    """Four threads take memory, mark it, hand it on to one another, and let go of it in any order."""
    failures, shared, start = [], [], threading.Barrier(4)

    def hammer(number):
        rng = np.random.default_rng(number)
        held = []
        start.wait()
        for turn in range(1500):
            x = memory.empty(int(rng.integers(1, 20_000)), np.int64)
            mark = 10_000 * number + turn
            x.fill(mark)
            held.append((x, mark))
            del x
            if turn % 5 == 0:
                shared.append(held.pop(int(rng.integers(len(held)))))
            if turn % 7 == 0 and shared:
                try:
                    held.append(shared.pop())
                except IndexError:
                    pass                                     # another thread was faster
            while len(held) > 6:
                x, mark = held.pop(int(rng.integers(len(held))))
                if not (x == mark).all():
                    failures.append((number, turn))
                del x

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all((x == mark).all() for x, mark in shared)


def test_threads_cut_slabs_without_overlap():
    """All that six threads take lives at once, so that none is memory used before."""
    taken, start = [], threading.Barrier(6)

    def take(number):
        sizes = np.random.default_rng(number).integers(1, 100_000, 400)
        start.wait()
        taken.extend([memory.empty(int(size), np.uint8) for size in sizes])

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 2400
    require_disjoint(taken)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no timers that send signals")
def test_a_signal_handler_may_take_memory():
    """It runs between any two instructions of this thread, that take memory, too."""
    inside, outside = [], []
    before = signal.signal(signal.SIGALRM, lambda *_: inside.append(memory.empty(3000, np.uint8)))
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        while len(inside) < 100:
            outside.append(memory.empty(5000, np.uint8))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    require_disjoint([*inside, *outside])


def root(x):
    """What all memory of x was cut from."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


@pytest.mark.parametrize("size", [memory.LARGE - 1, memory.LARGE, memory.SLAB, 3 * memory.SLAB])
def test_large_buffers(size):
    x, y = memory.empty(size, np.uint8), memory.empty(size, np.uint8)
    places = {address(x), address(y)}
    x[[0, -1]], y[[0, -1]] = 1, 2
    assert x[0] == x[-1] == 1
    del x, y
    assert {address(memory.empty(size, np.uint8))} <= places


def test_what_cannot_be_had():
    with pytest.raises(ValueError, match=r"^empty: shape is \(2, -1\); it must not be negative"):
        memory.empty((2, -1))
    with pytest.raises(TypeError, match=r"^empty: dtype is object"):
        memory.empty(3, object)
    with pytest.raises(MemoryError, match=r"^the system has no [0-9,]+ bytes left for an array"):
        memory.empty(2**60, np.uint8)


def test_what_is_free_is_given_back_before_memory_runs_out(monkeypatch):
    wanted, given = [], memory._anonymous

    def scarce(size):
        wanted.append(size)
        if len(wanted) == 1:
            raise OSError(12, "Cannot allocate memory")
        return given(size)

    free = memory.empty(memory.LARGE)
    mapping = weakref.ref(root(free))
    del free
    monkeypatch.setattr(memory, "_anonymous", scarce)
    assert memory.empty(4 * memory.LARGE, np.float64).size == 4 * memory.LARGE
    assert len(wanted) == 2 and mapping() is None


def test_memory_without_huge_pages(monkeypatch):
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", 10**6, raising=False)     # the system refuses
    x = memory.empty(5000)
    x.fill(1)
    assert x.sum() == 5000


def test_a_loop_of_all_kernels_comes_to_need_no_new_memory():
    for _ in range(2):
        for case in CASES:
            case(np.float32)
    free = memory.free_bytes()
    for _ in range(3):
        for case in CASES:
            case(np.float32)
            assert memory.free_bytes() == free, case.__name__


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_kernels_stay_inside_their_memory_and_do_not_read_what_was_there(case, dtype, monkeypatch):
    """All they get is full of NaN, and lies between other bytes."""
    expected = [x.tobytes() for x in case(dtype)]
    blocks = []

    def surrounded(shape, dtype=np.float32):
        size = np.empty(shape, dtype).nbytes
        block = np.full(size + 512, 0xFF, np.uint8)
        start = 256 - address(block) % 64
        blocks.append((block, start, start + size))
        return block[start:start + size].view(dtype).reshape(shape)

    monkeypatch.setattr(memory, "empty", surrounded)
    assert [x.tobytes() for x in case(dtype)] == expected
    for block, start, end in blocks:
        assert (block[:start] == 0xFF).all() and (block[end:] == 0xFF).all()
    assert blocks or case.__name__ == "adamw"                # which writes into what it is given


def test_a_pool_apart_gives_to_no_other_and_takes_from_none():
    pool = collections.defaultdict(list)
    outside = memory.empty(5000, np.uint8)
    place = address(outside)
    del outside
    with memory.apart(pool):
        first, second = memory.empty(5000, np.uint8), memory.empty(5000, np.uint8)
        places = {address(first), address(second)}
        assert place not in places
        del second
        with pytest.raises(ZeroDivisionError), memory.apart(collections.defaultdict(list)):
            assert address(memory.empty(5000, np.uint8)) not in places
            raise ZeroDivisionError
        assert address(memory.empty(5000, np.uint8)) in places, "what died in here"
    del first                                                   # out there it comes back here, too
    assert address(memory.empty(5000, np.uint8)) == place
    with memory.apart(pool):
        assert {address(x) for x in [memory.empty(5000, np.uint8), memory.empty(5000, np.uint8)]} <= places


def test_buffers_go_with_their_pool():
    pool = collections.defaultdict(list)
    with memory.apart(pool):
        buffer = weakref.ref(memory.empty(5000, np.uint8).base.base)
    assert buffer() is not None
    del pool
    assert buffer() is None


def test_a_pool_apart_is_one_thread_s():
    pool, places = collections.defaultdict(list), []
    with memory.apart(pool):
        thread = threading.Thread(target=lambda: places.append(address(memory.empty(5000, np.uint8))))
        thread.start()
        thread.join()
    assert not pool and len(places) == 1


def test_without_its_lease_an_array_keeps_memory_that_others_get():
    array = memory.empty((50, 100))[10:, ::2]
    bare, place = memory.unleased(array), address(array)
    assert bare.shape == array.shape and bare.strides == array.strides and address(bare) == place
    start = place - 10 * 400
    del array
    again = memory.empty((50, 100))
    assert address(again) == start
    again[...] = 7
    assert (bare == 7).all()
    del again
    memory.release()
    assert (bare == 7).all()
    mine = np.zeros(3)
    assert memory.unleased(mine) is mine and memory.unleased(mine[1:]).base is mine
