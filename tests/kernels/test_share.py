"""Every unit of the work goes to one thread, whichever asks when."""
import numba
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numba import prange

from kernels.jit import helper, kernel, launch
from kernels.share import new_counters, next_piece, num_threads


@numba.njit
def hand_out(asking, threads, units, most, least):
    """Threads ask for pieces in this order: whose share each is of, and its units."""
    counters, given = new_counters(threads), np.zeros((asking.size, 3), np.int64)
    whose = np.arange(threads)
    for i, thread in enumerate(asking):
        first, end, whose[thread] = next_piece(counters, whose[thread], threads, units, most, least)
        given[i] = whose[thread] % threads, first, end
    return given


@given(st.integers(1, 9), st.integers(0, 300), st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
def test_every_unit_is_handed_out_once(threads, units, most, least, seed):
    asking = np.random.default_rng(seed).integers(threads, size=units + 3 * threads)
    asking[-threads:] = np.arange(threads)                 # at last each asks, and so empties all shares
    given = hand_out(asking, threads, units, most, least)
    count = np.zeros(units, int)
    for _, first, end in given:
        count[first:end] += 1
        assert end - first <= most
    assert (count == 1).all() and (given[-1, 1:] == 0).all()


def test_a_thread_takes_half_of_what_is_left_of_its_share_then_of_the_others():
    pieces = [tuple(piece) for piece in hand_out(np.ones(8, int), 2, 32, 100, 2)]
    own = [(1, 16, 24), (1, 24, 28), (1, 28, 30), (1, 30, 32)]
    assert pieces == [*own, *((0, first - 16, end - 16) for _, first, end in own)]


@kernel
def _mark(times, tasks):
    threads = min(tasks, num_threads())
    counters = new_counters(threads)
    for index in prange(threads):
        mark_pieces(times, np.int64(index), threads, counters)


@helper
def mark_pieces(times, thread, threads, counters):
    first, end, whose = next_piece(counters, thread, threads, times.size, times.size, 1)
    while first < end:
        times[first:end] += 1
        first, end, whose = next_piece(counters, whose, threads, times.size, times.size, 1)


def test_threads_that_run_at_once_take_different_pieces():
    times = np.zeros(1000, np.int64)
    for run in range(1, 500):
        launch(_mark, 1000, times)
        assert (times == run).all()
