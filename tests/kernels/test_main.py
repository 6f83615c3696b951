"""`python -m kernels`: that it measures what it says, not what the numbers are."""
import sys
import time

import pytest

from kernels import __main__ as roofline
from kernels import jit
from kernels.cpu import TARGET


def test_it_says_what_the_machine_is():
    found = dict(roofline.machine())
    assert TARGET.name in found["processor"] and f"{TARGET.rows} x 2 vectors" in found["processor"]
    assert found["threads"].startswith(f"{roofline.K.get_num_threads()} of {jit.max_threads()}, by ")
    assert str(jit.cache_folder()) in found["compiled kernels"]


def test_it_measures_every_kernel_and_draws_them(tmp_path):
    peak_rate, streaming = roofline.peak(), roofline.bandwidth()
    assert peak_rate > 1e8 and streaming > 1e8
    found = roofline.cases(n=64, c=48, heads=2, T=32, vocabulary=100)
    results = []
    for case in found:
        result = roofline.measure(case, peak_rate, streaming)
        assert result.name == case.name and result.seconds > 0
        bound = max(case.operations / peak_rate, case.bytes / streaming)
        assert result.share == pytest.approx(bound / result.seconds)
        results.append(result)
    roofline.plot(results, found, peak_rate, streaming, str(tmp_path / "roofline.png"))
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_it_prints_a_line_a_kernel(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels"])
    nothing = roofline.Case("nothing", lambda: time.sleep(1e-3), 1.0, 1.0)
    monkeypatch.setattr(roofline, "cases", lambda: [nothing])
    roofline.main()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("peak") and "GFLOP/s in float32" in line for line in lines)
    assert lines[-1].startswith("nothing ")


@pytest.mark.parametrize("path", ["", "roofline.jpg", "nowhere/roofline.png"])
def test_a_picture_that_cannot_be_drawn_is_refused_at_once(path, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kernels", "--plot", path])
    with pytest.raises(SystemExit, match="2"):
        roofline.main()
    assert f"{path!r} is not a .png in a folder that can be written to" in capsys.readouterr().err
