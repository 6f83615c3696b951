"""The cache of compiled kernels: used by the next process, never stale, done without if need be."""
import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest

import kernels
from kernels import jit

ROOT = Path(kernels.__file__).parents[1]
EVERY_KERNEL = Path(__file__).with_name("every_kernel.py")

CHEAP = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import numpy as np, kernels
    from kernels import jit
    PATCH
    compiled = []
    jit.compiling = compiled.append
    x = np.linspace(-3, 3, 1000, dtype=np.float32).reshape(10, 100)
    results = [kernels.sum_of_squares([x]), *map(float, kernels.gelu_forward(x)[0][:, 33]),
               *map(float, kernels.cross_entropy_forward(x, np.arange(10))[1].sum(axis=1))]
    kernels.sum_of_squares([x])
warned = [[w.category.__name__, str(w.message)] for w in caught]
print(json.dumps([results, compiled, warned, jit.source_hash()]))
"""


def start(arguments, root=ROOT, **environment):
    """A new process, without the caches of this one, but for what is in environment."""
    inherited = {name: value for name, value in os.environ.items()
                 if name not in ("PYTHONPATH", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    environment = {**inherited, "PYTHONPATH": str(root), **environment}
    return subprocess.Popen([sys.executable, *arguments], cwd=root, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def result(process):
    """What a process prints."""
    with process:
        printed, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return json.loads(printed)


def run(arguments, root=ROOT, **environment):
    """What a new process prints."""
    return result(start(arguments, root, **environment))


def cheap(root=ROOT, patch="", **environment):
    """The results of three cheap kernels in a new process, which were compiled, warnings, source_hash()."""
    return run(["-c", CHEAP.replace("PATCH", patch)], root, **environment)


@pytest.fixture
def package(tmp_path):
    """A folder with a copy of the sources, free to be changed."""
    root = tmp_path / "copy"
    shutil.copytree(ROOT / "kernels", root / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture(scope="module")
def every_kernel_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", autouse=True)
def every_kernel_compiling(every_kernel_cache):
    """A process that compiles everything; as that takes long, it runs beside the other tests of this file."""
    process = start([str(EVERY_KERNEL), "float32"], NUMBA_CACHE_DIR=every_kernel_cache)
    yield process
    if process.poll() is None:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def expected():
    """What the cheap kernels give in this process."""
    x = np.linspace(-3, 3, 1000, dtype=np.float32).reshape(10, 100)
    return [kernels.sum_of_squares([x]), *map(float, kernels.gelu_forward(x)[0][:, 33]),
            *map(float, kernels.cross_entropy_forward(x, np.arange(10))[1].sum(axis=1))]


HASH = "import json; from kernels import jit; print(json.dumps(jit.source_hash()))"
FOLDER = "import json; from kernels import jit; print(json.dumps(str(jit.cache_folder())))"
NAMES = ["_sum_of_squares", "_gelu_forward", "_cross_entropy_forward"]


def test_second_process_compiles_nothing(tmp_path, expected):
    cache = tmp_path / "new" / "cache"
    results, compiled, warned, source_hash = cheap(NUMBA_CACHE_DIR=str(cache))
    assert (results, compiled, warned) == (expected, NAMES, [])
    files = {path.name for path in cache.rglob("*.nb?")}
    assert all(any(name in file for file in files) for name in NAMES)
    assert {path.parent.name for path in cache.rglob("*.nb?")} == {f"kernels-{source_hash}"}
    assert cheap(NUMBA_CACHE_DIR=str(cache)) == [expected, [], [], source_hash]
    assert {path.name for path in cache.rglob("*.nb?")} == files
    for path in cache.rglob("*.nbc"):
        path.unlink()                                    # code that is gone is compiled again
    assert cheap(NUMBA_CACHE_DIR=str(cache)) == [expected, NAMES, [], source_hash]


COUNT = """
import json
import numpy as np, kernels
from kernels.adamw import _sum_of_squares
kernels.sum_of_squares([np.ones(3, np.float32)])
print(json.dumps([len(_sum_of_squares.stats.cache_misses), len(_sum_of_squares.stats.cache_hits)]))
"""


@pytest.mark.skipif(jit.fcntl is None, reason="no locks on this system: each process compiles for itself")
def test_processes_that_start_together_compile_once(tmp_path):
    processes = [start(["-c", COUNT], NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(3)]
    assert sorted(map(result, processes)) == [[0, 1], [0, 1], [1, 0]]


@pytest.mark.skipif(jit.fcntl is None, reason="no locks on this system: each process compiles for itself")
def test_waits_for_no_process_for_ever(tmp_path):
    lock = tmp_path / f"kernels-{jit.source_hash()}" / "_sum_of_squares.lock"
    lock.parent.mkdir()
    with open(lock, "w") as file:
        jit.fcntl.flock(file, jit.fcntl.LOCK_EX)
        impatient = COUNT.replace("import json", "import json; from kernels import jit; jit.PATIENCE = 0.1")
        assert run(["-c", impatient], NUMBA_CACHE_DIR=str(tmp_path)) == [1, 0]


BACKWARDS = """
import json
import numpy as np, kernels
from kernels import jit
compiled, x = [], np.full(5000, 2.0)
jit.compiling = compiled.append
def function():
    y, slope = kernels.gelu_forward(x)
    kernels.sum_of_squares([x])
    kernels.gelu_backward(y, slope)
    kernels.gelu_forward(x)
jit.compile_backwards(function, ["_sum_of_squares"])
def failing():
    kernels.gelu_forward(x)
    raise ValueError
try:
    jit.compile_backwards(failing)
except ValueError:
    pass
before = compiled.copy()
try:
    jit.compile_backwards(function, ["_sum_of_cubes"])
except ValueError as error:
    message = str(error)
print(json.dumps([before, kernels.sum_of_squares([x]), compiled, message]))
"""


def test_compile_backwards_compiles_the_named_then_from_the_last_and_runs_nothing(tmp_path):
    names = ["_sum_of_squares", "_gelu_backward", "_gelu_forward"]
    assert run(["-c", BACKWARDS], NUMBA_CACHE_DIR=str(tmp_path)) == [
        names, 20_000.0, names, "compile_backwards: first names _sum_of_cubes, which does not run"]


COLLECTOR = """
import gc, json
import numpy as np, kernels
from kernels import jit
during, after = [], []
jit.compiling = lambda name: during.append(gc.isenabled())
for enabled in (True, False):
    (gc.enable if enabled else gc.disable)()
    kernels.gelu_forward(np.ones(3, np.float32 if enabled else np.float64))
    after.append(gc.isenabled())
print(json.dumps([during, after]))
"""


def test_the_collector_rests_while_kernels_are_compiled(tmp_path):
    assert run(["-c", COLLECTOR], NUMBA_CACHE_DIR=str(tmp_path)) == [[False, False], [True, False]]


def test_a_changed_file_never_runs_stale_code(package, tmp_path, expected):
    """The sum that cross-entropy uses is in another file, which numba's own cache does not look at."""
    cache = str(tmp_path / "cache")
    first = cheap(package, NUMBA_CACHE_DIR=cache)
    assert first[:3] == [expected, NAMES, []]
    softmax = package / "kernels" / "softmax.py"
    original = softmax.read_text()
    softmax.write_text(f"{original}\n\n@helper\ndef log_sum_exp(x):\n"
                       "    return x.dtype.type(20), x.dtype.type(22)\n")
    results, compiled, _, source_hash = cheap(package, NUMBA_CACHE_DIR=cache)
    assert results[-10:] == [42] * 10 and results[:-10] == expected[:-10]
    assert compiled == NAMES and source_hash != first[3]
    softmax.write_text(original)
    assert cheap(package, NUMBA_CACHE_DIR=cache) == [expected, [], [], first[3]]   # nothing to do


def test_source_hash_sees_every_file(package):
    hashes = {run(["-c", HASH])}
    gelu, another = package / "kernels" / "gelu.py", package / "kernels" / "another.py"
    for change in (lambda: None, lambda: gelu.write_text(gelu.read_text() + "\n"),
                   lambda: another.write_text(""), lambda: another.rename(package / "kernels" / "other.py")):
        change()
        hashes.add(run(["-c", HASH], package))
    assert len(hashes) == 4                              # the unchanged copy has that of the original


def test_cache_lies_beside_the_sources_or_in_the_home(package, tmp_path):
    home = tmp_path / "home"
    assert Path(run(["-c", FOLDER], package, HOME=str(home))).parent == package / "kernels" / "__pycache__"
    shutil.rmtree(package / "kernels" / "__pycache__")
    (package / "kernels" / "__pycache__").write_text("")
    assert Path(run(["-c", FOLDER], package, HOME=str(home))).parent == home / ".cache" / "minitensor"
    xdg = tmp_path / "xdg"
    folder = Path(run(["-c", FOLDER], package, HOME=str(home), XDG_CACHE_HOME=str(xdg)))
    assert folder.parent == xdg / "minitensor"


def test_nowhere_to_write_is_one_warning(package, tmp_path, expected):
    """Folders below files: not even root can make them."""
    file = tmp_path / "file"
    file.write_text("")
    (package / "kernels" / "__pycache__").write_text("")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    nowhere = {"NUMBA_CACHE_DIR": f"{file}/numba", "HOME": f"{file}/home"}
    results, _, warned, _ = cheap(package, **nowhere)
    assert results == expected
    assert [category for category, _ in warned] == ["RuntimeWarning"]
    assert "NUMBA_CACHE_DIR" in warned[0][1] and "compile" in warned[0][1]
    assert run(["-c", FOLDER], package, **nowhere, XDG_CACHE_HOME=f"{file}/xdg") == "None"
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_user_without_a_home_is_no_error(package):
    """As in a container that runs under a number which has no name: there is no home to look for."""
    (package / "kernels" / "__pycache__").write_text("")
    homeless = """
import os.path
os.path.expanduser = lambda path: path          # as it does where there is no home
import warnings
warnings.simplefilter("ignore")
"""
    assert run(["-c", homeless + FOLDER], package) == "None"


FULL = """
    from numba.core.caching import FunctionCache
    def save_overload(self, signature, data):
        raise OSError(28, "No space left on device")
    FunctionCache.save_overload = save_overload
"""


def test_a_full_disk_is_one_warning(tmp_path, expected):
    results, _, warned, _ = cheap(patch=FULL.strip(), NUMBA_CACHE_DIR=str(tmp_path))
    assert results == expected
    assert [category for category, _ in warned] == ["RuntimeWarning"] and "No space left" in warned[0][1]


def test_same_bits_whether_compiled_or_loaded(every_kernel_compiling, every_kernel_cache):
    """Of all kernels, in a process that compiles them, in one that loads them, and in this one."""
    compiled = result(every_kernel_compiling)
    loaded = run([str(EVERY_KERNEL), "float32"], NUMBA_CACHE_DIR=every_kernel_cache)
    assert loaded == compiled
    assert runpy.run_path(str(EVERY_KERNEL))["hashes"](np.float32) == compiled


def test_a_helper_is_a_part_of_what_calls_it():
    @jit.helper
    def twice(x):
        return x + x

    @numba.njit
    def four_times(x):
        return twice(twice(x))

    assert four_times(2) == 8
    with pytest.raises(TypeError):
        twice(2)
    assert twice.py_func(2) == 4


@pytest.fixture
def uncached(monkeypatch):
    """So that kernels made in a test are compiled each time."""
    monkeypatch.setattr(jit, "_cache", lambda dispatcher: None)


def test_what_another_thread_compiles_meanwhile_is_no_part(uncached):
    def doubled(x, tasks):
        for i in numba.prange(tasks):
            x[i] *= 2

    def launch_all(arrays):
        compiled = jit.kernel(doubled)
        for x in arrays:
            jit.launch(compiled, 4, x)

    arrays = [[np.ones(4, dtype) for dtype in (np.float32, np.float64, np.int32, np.int64)] for _ in range(2)]
    threads = [threading.Thread(target=launch_all, args=(xs,)) for xs in arrays]
    for thread in threads:
        thread.start()
    results = []
    while any(thread.is_alive() for thread in threads):
        results.append(numba.njit(lambda y: y + 1)(len(results)))
    for thread in threads:
        thread.join()
    assert results == [i + 1 for i in range(len(results))]
    assert all((x == 2).all() for xs in arrays for x in xs)
    assert gc.isenabled()


def test_after_a_helper_that_cannot_be_compiled_all_is_as_it_was(uncached):
    @jit.helper
    def wrong(x):
        return x.nothing

    @jit.kernel
    def failing(x, tasks):
        for i in numba.prange(tasks):
            x[i] = wrong(x)

    with pytest.raises(numba.TypingError, match="nothing"):
        jit.launch(failing, 1, np.ones(1))
    assert gc.isenabled()
    assert numba.njit(lambda y: y + 1)(1) == 2


def test_a_helper_prints(uncached, capfd):
    @jit.helper
    def shown(x):
        print("x is", x)
        return x

    @jit.kernel
    def printing(x, tasks):
        for i in numba.prange(tasks):
            x[i] = shown(x[i])

    jit.launch(printing, 1, np.ones(1))
    assert capfd.readouterr().out == "x is 1.0\n"


def test_number_of_threads():
    before, limit = kernels.get_num_threads(), numba.config.NUMBA_NUM_THREADS
    try:
        for n in range(1, limit + 1):
            kernels.set_num_threads(n)
            assert kernels.get_num_threads() == n
        for n in (0, -1, limit + 1):
            with pytest.raises(ValueError, match=f"set_num_threads: n is {n}; .* 1 to {limit}"):
                kernels.set_num_threads(n)
        assert kernels.get_num_threads() == limit
        kernels.sum_of_squares([np.ones(3, np.float32)])   # has work for one thread alone
        assert kernels.get_num_threads() == limit
    finally:
        kernels.set_num_threads(before)
