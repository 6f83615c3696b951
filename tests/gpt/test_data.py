"""Texts are found where they should be or refused aloud; batches and windows cover what they must."""

import errno
import hashlib
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt import data
from gpt.errors import BadInput
from gpt.verse import verse

GOOD = "Not the bard, but his stand-in:\n\tünïcödé.\r\n".encode() * 50


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        body = {"/other": b"<html>log in first</html>", "/huge": GOOD * 1000}.get(self.path, GOOD)
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body[:100] if self.path == "/truncated" else body)
        except ConnectionError:
            pass  # the client had enough

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path, server):
    """A cache of our own, no $MINITENSOR_DATA, and GOOD in the place of tinyshakespeare."""
    server.asked = 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MINITENSOR_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "SHA256", hashlib.sha256(GOOD).hexdigest())
    monkeypatch.setattr(data, "SIZE", len(GOOD))


@pytest.fixture
def cached(tmp_path):
    return tmp_path / "cache" / "minitensor" / "tinyshakespeare.txt"


def test_download_then_cache(server, cached):
    first = data.find_text(url=server.url)
    assert (first.name, first.comparable, first.text.encode()) == ("tinyshakespeare", True, GOOD)
    assert server.url in first.source and str(cached) in first.source
    assert [p.name for p in cached.parent.iterdir()] == [cached.name] and cached.read_bytes() == GOOD
    for download in (True, False):
        again = data.find_text(url=server.url, download=download)
        assert again.text == first.text and again.comparable and "cache" in again.source
    assert server.asked == 1


def test_corrupted_cache_is_fetched_again(server, cached):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(GOOD[:-1] + b"!")
    assert data.find_text(url=server.url).comparable
    assert server.asked == 1 and cached.read_bytes() == GOOD


@pytest.mark.parametrize("page, reason", [
    ("/other", "something else, 25 bytes"),
    ("/truncated", "something else, 100 bytes"),
    ("/huge", "something else"),
    ("/missing", "404"),
])  # fmt: skip
def test_a_failed_download_is_said_aloud(server, cached, page, reason):
    built_in(data.find_text(url=server.url + page), reason)
    assert not cached.exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "nonsense", "http://[", "gopher://127.0.0.1/"])
def test_no_connection(url):
    built_in(data.find_text(url=url), "failed")


def test_a_server_that_says_nothing_is_given_up(monkeypatch):
    def silent(*_, timeout):
        assert 0 < timeout <= 10
        raise TimeoutError

    monkeypatch.setattr("urllib.request.urlopen", silent)
    built_in(data.find_text(), "TimeoutError")


def test_download_off(server):
    built_in(data.find_text(url=server.url, download=False), "downloading is off")
    assert server.asked == 0


def built_in(found, reason):
    assert (found.name, found.comparable) == ("built-in verse", False)
    assert found.text == verse(data.SIZE)
    assert reason in found.source and "NOT comparable" in found.source and "\n" not in found.source


def test_unwritable_cache_is_done_without(server, tmp_path):
    (tmp_path / "cache").touch()
    found = data.find_text(url=server.url)
    assert found.comparable and found.text.encode() == GOOD and "not kept" in found.source


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_nothing_behind(server, cached, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    found = data.find_text(url=server.url)
    assert found.comparable and "No space left" in found.source
    assert list(cached.parent.iterdir()) == []


def test_a_path_goes_first(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MINITENSOR_DATA", str(tmp_path / "absent"))
    mine = tmp_path / "mine.txt"
    mine.write_bytes(b"\xef\xbb\xbfmy text\r\n")
    found = data.find_text(str(mine), url=server.url)
    assert found == data.Text("\ufeffmy text\r\n", "mine.txt", f"file {str(mine)!r}", False)
    mine.write_bytes(GOOD)
    found = data.find_text(mine, url=server.url)
    assert (found.name, found.comparable) == ("tinyshakespeare", True)
    assert server.asked == 0


def test_environment_names_a_file_or_a_folder(server, tmp_path, monkeypatch):
    (tmp_path / "tinyshakespeare.txt").write_bytes(GOOD)
    (tmp_path / "mine.txt").write_bytes(b"mine")
    for named, name, comparable in ((".", "tinyshakespeare", True), ("mine.txt", "mine.txt", False)):
        monkeypatch.setenv("MINITENSOR_DATA", str(tmp_path / named))
        found = data.find_text(url=server.url)
        assert (found.name, found.comparable) == (name, comparable) and "$MINITENSOR_DATA" in found.source
    monkeypatch.setenv("MINITENSOR_DATA", "")
    assert "downloaded" in data.find_text(url=server.url).source


def test_a_bad_name_is_never_passed_over(server, tmp_path, monkeypatch):
    for bad in (tmp_path / "absent", tmp_path):
        with pytest.raises(BadInput):
            data.find_text(bad, url=server.url)
        monkeypatch.setenv("MINITENSOR_DATA", str(bad))
        with pytest.raises(BadInput, match="MINITENSOR_DATA"):
            data.find_text(url=server.url)
    assert server.asked == 0


@given(st.text(st.characters(exclude_characters="\0"), min_size=1))
def test_every_byte_is_kept(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "kept.txt"
    file.write_bytes(text.encode())
    assert data.read_text(file) == text


@pytest.mark.parametrize("content, reason", [
    (b"", "is empty"),
    (b"ab\0c", "binary .*byte 2"),
    ("utf-16".encode("utf-16"), "binary"),
    (b"caf\xe9 au lait", "byte 3 is 0xe9"),
    (b"\xff\xfe", "byte 0 is 0xff"),
    (b"cut \xe2\x82", "byte 4 is 0xe2"),
    (b"\xed\xa0\x80", "byte 0 is 0xed"),
])  # fmt: skip
def test_what_is_not_a_text(content, reason, tmp_path):
    file = tmp_path / "file\n.txt"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=reason) as caught:
        data.read_text(file)
    assert "\n" not in str(caught.value) and repr(str(file)) in str(caught.value)


def test_what_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path, reason in (("absent", "no such file"), ("", "is a folder"), ("file/below", "Not a directory")):
        with pytest.raises(BadInput, match=reason):
            data.read_text(tmp_path / path)

    def refuse(_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BadInput, match="Permission denied"):
        data.read_text(tmp_path / "file")


def test_shakespeare(monkeypatch):
    monkeypatch.undo()
    named = Path(os.environ.get("MINITENSOR_DATA") or Path(__file__).parents[3] / "shared" / "data")
    file = named / "tinyshakespeare.txt" if named.is_dir() else named
    if not file.is_file():
        pytest.skip(f"tinyshakespeare is not at {file}; $MINITENSOR_DATA names it")
    found = data.find_text(file)
    assert (found.name, found.comparable) == ("tinyshakespeare", True)
    assert len(found.text) == data.SIZE and len(set(found.text)) == 65
    train, validation = data.split(np.zeros(data.SIZE, np.int32))
    assert (len(train), len(validation)) == (1_003_854, 111_540)


@given(st.integers(0, 200), st.floats(0, 1))
def test_split_loses_nothing(n, fraction):
    ids = np.arange(n, dtype=np.int32)
    train, validation = data.split(ids, fraction)
    np.testing.assert_array_equal(np.concatenate([train, validation]), ids)
    assert len(train) == int(fraction * n)


def test_check_length():
    ids = np.zeros(100, np.int32)
    data.check_length(*data.split(ids), context=9)
    with pytest.raises(BadInput, match=r"10 of its 100 characters are for validation.* 10 needs 11"):
        data.check_length(*data.split(ids), context=10)
    with pytest.raises(BadInput, match="0 of its 0 characters are for training"):
        data.check_length(ids[:0], ids[:0], context=1)


def test_a_user_without_a_home_gets_the_text_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINITENSOR_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)     # as it does where there is no home
    monkeypatch.setattr(data, "_download", lambda url: b"to be")
    monkeypatch.setattr(data, "_is_tinyshakespeare", lambda content: content == b"to be")
    text = data.find_text()
    assert text.text == "to be" and "not kept, because there is no home" in text.source
    assert list(tmp_path.iterdir()) == []


words = st.integers(0, 2**64 - 1)


@example(1, 1, 1, 0, 2**64 - 1024)                          # numpy would take the list for floats
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), words, words)
def test_batch_is_windows_and_what_follows(size, context, more, seed, step):
    ids = np.arange(context + more, dtype=np.int32)
    x, y = data.batch(ids, size, context, seed, step)
    for a in (x, y):
        assert a.shape == (size, context) and a.dtype == np.int32 and a.flags.c_contiguous
    np.testing.assert_array_equal(x, x[:, :1] + np.arange(context))
    np.testing.assert_array_equal(y, x + 1)
    again = data.batch(ids, size, context, seed, step)
    np.testing.assert_array_equal(x, again[0])


def test_batches_of_other_seeds_steps_and_ranks_are_others():
    ids = np.arange(100_000, dtype=np.int32)
    keys = [(seed, step, rank) for seed in range(4) for step in range(4) for rank in range(4)]
    drawn = {tuple(data.batch(ids, 8, 1, *key)[0].ravel().tolist()) for key in keys}
    assert len(drawn) == len(keys)


def test_batch_reaches_every_window_equally():
    ids = np.arange(20 + 8, dtype=np.int32)
    starts = np.concatenate([data.batch(ids, 100, 8, 1, step)[0][:, 0] for step in range(200)])
    counts = np.bincount(starts, minlength=20)
    assert len(counts) == 20
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-squared with 19 degrees of freedom: 1 in 10,000


def test_batch_is_cheap():
    ids = np.zeros(1_000_000, np.int32)
    best = min(timed(lambda: data.batch(ids, 12, 64, 1, 5)) for _ in range(2000))
    assert best < 500e-6  # 40 us on an idle machine


def timed(run):
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@given(st.integers(0, 100), st.integers(1, 12), st.integers(1, 5))
def test_windows_meet_every_target_once(n, context, size):
    ids = np.arange(n, dtype=np.int32)
    found = list(data.windows(ids, context, size))
    assert all(x.shape == y.shape and len(x) <= size and (y == x + 1).all() for x, y in found)
    targets = np.concatenate([y.ravel() for _, y in found] or [ids[:0]])
    np.testing.assert_array_equal(targets, ids[1:])
    assert all(x.shape[1] == context for x, _ in found[:-1])
    if n > 1 and (n - 1) % context:
        assert found[-1][0].shape == (1, (n - 1) % context)
