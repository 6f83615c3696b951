"""A text of any size, in one file or many, gives the same tokens."""
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import command, corpus
from gpt.checkpoint import load
from gpt.corpus import find_files, open_corpus
from gpt.data import batch, windows
from gpt.errors import BadInput
from gpt.tokenizer import CharTokenizer
from gpt.verse import verse


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minitensor" / "tokens"


@pytest.fixture
def large(monkeypatch):
    """Every text is too large for memory, and read in pieces of seven bytes."""
    monkeypatch.setattr(corpus, "IN_MEMORY", 0)
    monkeypatch.setattr(corpus, "PIECE", 7)


def same(a, b):
    assert a.tokenizer.vocabulary == b.tokenizer.vocabulary
    assert (a.sha256, a.notes) == (b.sha256, b.notes)
    np.testing.assert_array_equal(a.train, b.train)
    np.testing.assert_array_equal(a.validation, b.validation)


TEXTS = [verse(900), "naïve café, 東京 and 𝄞 and 👩‍🚀\r\n" * 30, "".join(map(chr, range(32, 800)))]


@pytest.mark.parametrize("text", TEXTS, ids=["verse", "of all widths", "of many symbols"])
def test_tokens_in_a_file_are_tokens_in_memory(text, tmp_path, cache, monkeypatch, capsys):
    cut = len(text) // 3
    for name, part in (("a.txt", text[:cut]), ("b.txt", text[cut:])):
        (tmp_path / name).write_text(part, encoding="utf-8", newline="")
    expected = open_corpus([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    assert expected.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert expected.tokenizer.decode([*expected.train, *expected.validation]) == text
    assert not cache.exists()
    monkeypatch.setattr(corpus, "IN_MEMORY", 0)
    monkeypatch.setattr(corpus, "PIECE", 7)
    found = open_corpus([str(tmp_path / "*.txt")])
    same(found, expected)
    assert found.train.dtype == (np.uint8 if len(set(text)) <= 256 else np.uint16)
    assert len(list(cache.iterdir())) == 2 and "once on this machine" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    same(open_corpus([str(tmp_path)]), expected)
    same(open_corpus([str(tmp_path)], expected.tokenizer), expected)         # as a resumed run asks for it
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before, "made once"
    assert "once" not in capsys.readouterr().out
    for path in cache.iterdir():                                 # what a cleaner or a full disk leaves
        for damage in (path.unlink, lambda path=path: path.write_bytes(path.read_bytes()[:-3])):
            damage()
            same(open_corpus([str(tmp_path)]), expected)


@given(st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=60), st.integers(1, 9))
def test_pieces_are_the_text(tmp_path_factory, text, size):
    file = tmp_path_factory.getbasetemp() / "pieces.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", size)
        assert "".join(corpus._pieces([file, file])) == 2 * text


@pytest.mark.parametrize("content, reason", [
    (b"to be or\0not", "binary .byte 8 is 0x00"),
    (b"to be or caf\xe9 not", "not UTF-8 .byte 12 is 0xe9"),
    ("to be 東京".encode()[:-1], "not UTF-8 .byte 9 is 0xe4"),
    ("to 東 \xe9".encode()[:-1], "not UTF-8 .byte 7 is 0xc3"),
])
def test_what_is_not_a_text_is_said_with_its_place(content, reason, tmp_path, large, cache):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(BadInput, match=reason):
        open_corpus([str(tmp_path / "a.txt")])
    assert not cache.exists() or not list(cache.iterdir())


def test_unknown_characters_are_left_out_alike(tmp_path, large, monkeypatch):
    (tmp_path / "a.txt").write_text("to be ☃ or ☃ not ❄ to be" * 20, encoding="utf-8")
    tokenizer = CharTokenizer("".join(sorted(" tobern")))
    mapped = open_corpus([str(tmp_path / "a.txt")], tokenizer)
    again = open_corpus([str(tmp_path / "a.txt")], tokenizer)
    monkeypatch.setattr(corpus, "IN_MEMORY", 2**20)
    same(mapped, open_corpus([str(tmp_path / "a.txt")], tokenizer))
    same(again, mapped)
    assert mapped.notes == ("60 characters that the model's vocabulary lacks were left out: '☃', '❄'",)


def test_files_folders_and_globs(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/er/d.txt", "e.md", "[x].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def found(*paths):
        files = find_files([str(tmp_path / path) for path in paths])
        return [str(file.relative_to(tmp_path)) for file in files]
    assert found("b.txt", "a.txt", "b.txt") == ["b.txt", "a.txt"]
    assert found("deep") == ["deep/c.txt", "deep/er/d.txt"]
    assert found("") == ["[x].txt", "a.txt", "b.txt", "deep/c.txt", "deep/er/d.txt"]
    assert found("*.txt") == ["[x].txt", "a.txt", "b.txt"]
    assert found("**/*.txt") == ["[x].txt", "a.txt", "b.txt", "deep/c.txt", "deep/er/d.txt"]
    assert found("[x].txt", "e.md") == ["[x].txt", "e.md"]
    for path, said in (("none", "no such file"), ("*.rst", "matches no file"), ("a.txt/x", "no such")):
        with pytest.raises(BadInput, match=said):
            found(path)


def test_batches_and_windows_are_int32_whatever_the_tokens_are_kept_in():
    ids = np.random.default_rng(0).integers(200, size=99)
    for dtype in (np.uint8, np.uint16, np.uint32):
        for made, expected in zip([*batch(ids.astype(dtype), 3, 8, 0, 0), *windows(ids.astype(dtype), 8, 4)],
                                  [*batch(ids.astype(np.int32), 3, 8, 0, 0),
                                   *windows(ids.astype(np.int32), 8, 4)], strict=True):
            np.testing.assert_array_equal(made, expected)
            assert all(np.asarray(a).dtype == np.int32 for a in (made if isinstance(made, tuple) else [made]))


def test_a_run_on_tokens_in_a_file_is_the_run_in_memory(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(verse(2000))
    options = ["--layers", "1", "--heads", "1", "--width", "8", "--context", "8", "--batch", "2",
               "--steps", "6", "--sample", "0", "--quiet", "--data", str(tmp_path / "text")]
    assert command.main([*options, "--out", str(tmp_path / "memory")]) == 0
    monkeypatch.setattr(corpus, "IN_MEMORY", 0)
    assert command.main([*options, "--out", str(tmp_path / "file"), "--stop-after", "3"]) == 0
    assert command.main(["--out", str(tmp_path / "file"), "--resume", "--sample", "0", "--quiet"]) == 0
    (arrays, _), (others, _) = (load(tmp_path / out / "checkpoint.safetensors") for out in ("memory", "file"))
    assert all(array.tobytes() == others[name].tobytes() for name, array in arrays.items())


def test_no_more_than_a_million_characters_are_validated_on(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MOST_VALIDATION", 50)
    (tmp_path / "a.txt").write_text(verse(2000))
    assert len(open_corpus([str(tmp_path / "a.txt")]).validation) == 50


def test_nowhere_to_keep_the_tokens(tmp_path, large, monkeypatch):
    (tmp_path / "a.txt").write_text(verse(500))
    (tmp_path / "cache").touch()
    with pytest.raises(BadInput, match="cannot be written"):
        open_corpus([str(tmp_path / "a.txt")])
    monkeypatch.setattr(corpus, "user_cache", lambda: None)
    with pytest.raises(BadInput, match="set XDG_CACHE_HOME"):
        open_corpus([str(tmp_path / "a.txt")])
