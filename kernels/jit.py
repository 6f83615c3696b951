"""The one decorator that compiles a kernel, its cache on disk, and the number of threads."""
from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:                                  # Windows: no process waits for another there
    fcntl = None                                     # type: ignore[assignment]

import numba
import numpy as np
from numba.core import caching
from numba.core.codegen import JITCodeLibrary, get_host_cpu_features
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from kernels import cpu

# Not "nnan" and "ninf", which plain fastmath=True implies: masks of -inf and NaN must go where numpy sends
# them; nor "arcp", which allows an approximate reciprocal that makes NaN of 1 / inf.
SAFE_MATH = {"contract", "reassoc", "nsz"}

# LLVM halves the vectors of loops on Intel CPUs, of which older ones lower their clock for whole ones. numba
# asks for the features once, before it first compiles, and for the whole process: functions of the caller's
# own get whole vectors, too.
WHOLE_VECTORS = "-prefer-256-bit"

PATIENCE = 60                                        # seconds to wait while another process compiles a kernel
compiling: Callable[[str], None] | None = None       # called with a kernel's name before it is compiled
_config: Any = numba.config                          # its attributes are set at run time
if cpu.TARGET.vector_bytes == 64 and _config.CPU_FEATURES is None:
    _config.CPU_FEATURES = f"{get_host_cpu_features()},{WHOLE_VECTORS}"
# numba's own threads, where there is neither OpenMP nor TBB, end the process if two Python threads call.
_one_at_a_time: Any = threading.Lock() if _config.THREADING_LAYER == "workqueue" else contextlib.nullcontext()
_planned: dict[tuple[Any, tuple], None] | None = None # what `compile_backwards` finds, in its order
_started = _forked = False                           # have kernels run, here or in the process forked from


class _Notes(threading.local):
    """Who is told of this thread's launches."""
    note: Callable[..., None] | None = None


_notes = _Notes()


def _note_fork() -> None:
    global _forked
    _forked = _started


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def kernel(body: Callable) -> Any:
    """Compile a parallel kernel: cached on disk, without the GIL, with the safe part of fast math.

    Work is cut by shape and partial sums are added in a fixed order, so that the result has the same bits on
    any number of threads: `prange` bodies write to disjoint places, and no scalar is reduced across a
    `prange`. Such a body only cuts out the task and calls a helper: numba's analysis of a longer one has been
    seen to lose an assignment. The index is made signed first: mixed with signed sizes numba would compute in
    float64, and compile each helper twice. What it calls is a part of it from then on: Python cannot call it.
    """
    dispatcher: Any = numba.njit(body, parallel=True, nogil=True, fastmath=SAFE_MATH, error_model="numpy")
    dispatcher.compile = functools.partial(_compile, dispatcher, body.__qualname__)
    _cache(dispatcher)
    return dispatcher


class _Whole(JITCodeLibrary):
    """A kernel with its parts, optimized twice: that a loop reads again what it has just stored is seen only
    when it is a loop of vectors.
    """
    def _optimize_final_module(self) -> None:
        super()._optimize_final_module()
        super()._optimize_final_module()


class _Part(JITCodeLibrary):
    """The code of a function that is compiled for another, which links it and is then optimized as a whole.

    numba would first make of each an executable of its own, optimized with all that it calls: of the time to
    compile a kernel that took two thirds.
    """
    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """For Python `PyObject_Call`, which raises TypeError: what it is to call is numba's closure."""
        if not name.startswith("_ZN7cpython"):
            raise RuntimeError(f"{self.name} is a part of what calls it; there is no function {name}")
        return ctypes.cast(ctypes.pythonapi.PyObject_Call, ctypes.c_void_p).value or 0

    @property
    def codegen(self) -> _Part:
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """`_compile` does it, where the executable is."""


def _compile(dispatcher: Any, name: str | None, types: tuple) -> Any:
    """Compile for arguments of these types. name: of the library that becomes an executable; None: none does.
    Python's garbage collector rests: it would take a tenth of the time.
    """
    compile_it = functools.partial(type(dispatcher).compile, dispatcher, types)
    target = cpu_target.target_context
    with global_compiler_lock:
        codegen = target.codegen()
        if "create_library" in vars(codegen):        # for what is being compiled
            return compile_it()
        target.refresh()                             # may make executables that are not of the kernel
        enabled = gc.isenabled()
        try:
            codegen.create_library = lambda of: (_Whole if of == name else _Part)(codegen, of)
            gc.disable()
            entry = compile_it()
        finally:
            vars(codegen).pop("create_library", None)
            if enabled:
                gc.enable()
        if name is not None:                         # a print in a helper looks for it
            for environment in dispatcher.overloads[types]._find_referenced_environments():
                codegen.set_env(environment.env_name, environment)
        return entry


def _part(body: Callable, **options: Any) -> Any:
    """Compile what kernels call. Python cannot: TypeError; `py_func` is the function as it was written."""
    options |= {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    dispatcher: Any = numba.njit(body, **options)
    dispatcher.compile = functools.partial(_compile, dispatcher, None)
    return dispatcher


def helper(body: Callable) -> Any:
    """Compile a serial function that kernels call; it becomes a part of them and of their cache.

    Always inlined: of two copies of a function the linker may take either, and they need not round alike.
    """
    return _part(body, forceinline=True, fastmath=SAFE_MATH)


def mover(body: Callable) -> Any:
    """As `helper`, for code that adds up only in the register tile, so that it need not be inlined."""
    return _part(body, forceinline=False, fastmath=False)


def exact(body: Callable) -> Any:
    """As `helper`, for code whose order of additions has a meaning: no re-association, only contraction."""
    return _part(body, forceinline=True, fastmath={"contract"})


def set_num_threads(n: int) -> None:
    """Run the kernels that this thread calls on n threads; ValueError beyond `max_threads()`."""
    if not 1 <= n <= max_threads():
        raise ValueError(f"set_num_threads: n is {n}; this process can use 1 to {max_threads()} "
                         "(the environment variable NUMBA_NUM_THREADS raises the limit before the start)")
    numba.set_num_threads(n)


def get_num_threads() -> int:
    """How many threads the kernels called by this thread run on."""
    return numba.get_num_threads()


def max_threads() -> int:
    """How many threads this process was started with."""
    return _config.NUMBA_NUM_THREADS


def launch(kernel: Any, tasks: int, *arguments: Any) -> None:
    """Run a kernel on its arguments and the number of its tasks, on no more threads than there are tasks.

    A thread without a task would be waited for too, and on a busy machine that is long: 5 us become 2 ms.
    RuntimeError in a process that was forked after kernels had run: their threads did not come along, and
    OpenMP ends such a process or hangs.
    """
    global _started
    if _notes.note is not None:
        _notes.note(kernel, tasks, *arguments)
    if _planned is not None:
        _planned[kernel, tuple(map(kernel.typeof_pyval, (*arguments, tasks)))] = None
        return
    if _forked:
        raise RuntimeError("kernels cannot run in a process that was forked after kernels had run; start it "
                           'with multiprocessing.get_context("spawn"), or fork before the first kernel')
    _started = True
    with _one_at_a_time:
        if tasks >= max_threads():               # no need to ask, which takes as long as a small kernel
            kernel(*arguments, tasks)
            return
        threads = numba.get_num_threads()
        if tasks >= threads:
            kernel(*arguments, tasks)
            return
        numba.set_num_threads(tasks)
        try:
            kernel(*arguments, tasks)
        finally:
            numba.set_num_threads(threads)


@contextlib.contextmanager
def noting(note: Callable[..., None]) -> Iterator[None]:
    """Have note(kernel, tasks, *arguments) called for each launch of this thread: `launch` with the same does
    the same again, with what lies in the arrays by then.
    """
    before, _notes.note = _notes.note, note
    try:
        yield
    finally:
        _notes.note = before


def compile_backwards(function: Callable[[], Any], first: Sequence[str] = ()) -> None:
    """Compile the kernels that a function would run, the named ones and then the last one first, but for what
    another process is compiling. The function runs without them, on whatever lies in the memory that they
    would have written. ValueError if it runs none of a name.
    """
    global _planned
    planned = _planned = {}
    try:
        function()
    finally:
        _planned = None
    if unknown := set(first) - {kernel.py_func.__name__ for kernel, _ in planned}:
        raise ValueError(f"compile_backwards: first names {', '.join(sorted(unknown))}, which does not run")
    for kernel, types in sorted(reversed(planned), key=lambda found: found[0].py_func.__name__ not in first):
        if not (isinstance(kernel._cache, _Cache) and kernel._cache.taken()):
            kernel.compile(types)


def shares_work() -> bool:
    """Can a second process compile kernels for this one? For that there must be a cache and another core."""
    return fcntl is not None and cache_folder() is not None and max_threads() > 1


def row_tasks(x: np.ndarray) -> int:
    """How many tasks the rows of x (N, C) make: by shape alone, about 16,000 elements each, at most 64."""
    return max(1, min(64, len(x), x.size >> 14))


def flat_tasks(size: int) -> int:
    """How many tasks so many elements are cut into, as `row_tasks`."""
    return max(1, min(64, size >> 14))


# ---- the cache: one folder for one state of all kernel sources, so that no kernel runs stale code ----------
# numba's own cache sees a change of the file that defines a kernel, but not of the files that it calls.

@functools.cache
def source_hash() -> str:
    """A hash of every source file of this package, and of what was read off the CPU."""
    digest = hashlib.sha256(repr(cpu.TARGET).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def user_cache() -> Path | None:
    """The user's folder for what can be made or fetched again; None for a user without a home."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(user, "minitensor") if os.path.isabs(user) else None


@functools.cache
def cache_folder() -> Path | None:
    """Where compiled kernels are kept: beside the sources, else in the user's cache, else nowhere: None."""
    bases = [Path(__file__).parent / "__pycache__"]
    if user := user_cache():
        bases.append(user)
    if _config.CACHE_DIR:
        bases.insert(0, Path(_config.CACHE_DIR))
    for base in bases:
        folder = base / f"kernels-{source_hash()}"
        try:
            if not folder.exists():
                _remove_old(base)
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return folder
    return None


def _remove_old(base: Path) -> None:
    """Remove what earlier states of the sources compiled, unless another process may just be using it."""
    for folder in base.glob("kernels-" + 16 * "[0-9a-f]"):
        if folder.stat().st_mtime < time.time() - 3600:
            shutil.rmtree(folder, ignore_errors=True)


class _Locator(caching._CacheLocator):
    def __init__(self, line: int):
        self.line = line

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> str:
        return source_hash()

    def get_disambiguator(self) -> str:
        return str(self.line)

    @classmethod
    def from_function(cls, function: Callable, file: str) -> _Locator:
        return cls(function.__code__.co_firstlineno)


class _Implementation(caching.CompileResultCacheImpl):
    _locator_classes: list[Any] = [_Locator]        # noqa: RUF012 (numba's own attribute)


class _Cache(caching.FunctionCache):
    """numba's cache of one kernel, and the lock of the process that compiles it: others wait for it."""
    _impl_class = _Implementation
    _lock: Any = None                               # an open file; a lock ends with its file, or its process

    def load_overload(self, signature: Any, context: Any) -> Any:
        found = super().load_overload(signature, context)
        if found is None:
            if compiling is not None:
                compiling(self._py_func.__name__)
            deadline = time.monotonic() + PATIENCE
            while self.taken() and time.monotonic() < deadline:
                time.sleep(0.01)
            found = super().load_overload(signature, context)
            if found is not None:
                self._release()
        return found

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except OSError as error:
            self.disable()
            _warn_uncached(str(error))
        finally:
            self._release()

    def taken(self) -> bool:
        """Is another process compiling this kernel? If not, others see from now on that this one is."""
        if fcntl is None:
            return False
        self._release()                             # it may have been interrupted while it compiled
        try:
            self._lock = open(Path(self.cache_path, f"{self._py_func.__name__}.lock"), "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:                             # a file system without locks
            return False
        return False

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


@functools.cache
def _warn_uncached(reason: str) -> None:
    warnings.warn(f"compiled kernels cannot be kept, so every start compiles them again: {reason}; "
                  "NUMBA_CACHE_DIR names another folder", RuntimeWarning, stacklevel=3)


def _cache(dispatcher: Any) -> None:
    if cache_folder() is None:
        _warn_uncached("no writable folder")
    else:
        dispatcher._cache = _Cache(dispatcher.py_func)
