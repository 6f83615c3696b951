"""A checkpoint comes back bit by bit, or not at all."""

import errno
import json
import os
import random
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from gpt import checkpoint
from gpt.errors import BadInput

dtypes = st.sampled_from(sorted(checkpoint.DTYPES.values()))
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
names = st.text(max_size=8).filter(lambda name: name != "__metadata__")
ours = {"format", "version", "sha256"}
keys = st.text(max_size=8).filter(lambda key: key not in ours)
metadata = st.dictionaries(keys, st.text(max_size=20), max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def example():
    weights = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    return {"weight": weights, "step": np.array(3), "mask": np.eye(2, dtype=bool)}, {"config": '{"C": 4}'}


@given(st.dictionaries(names, arrays, max_size=4), metadata)
def test_round_trip(folder, stored, words):
    before = {name: array.copy() for name, array in stored.items()}
    checkpoint.save(folder / "round", stored, words)
    loaded, said = checkpoint.load(folder / "round")
    assert same(loaded, stored) and said == words
    assert same(stored, before) and not ours & words.keys()
    assert all(array.flags.writeable for array in loaded.values())


def test_any_layout_and_byte_order(tmp_path):
    x = np.arange(24.0).reshape(2, 3, 4)
    stored = {"transposed": x.T, "strided": x[:, ::-1, ::2], "big": x.astype(">f4"), "fortran": x.copy("F")}
    checkpoint.save(tmp_path / "c", stored, {})
    loaded, _ = checkpoint.load(tmp_path / "c")
    for name, array in stored.items():
        np.testing.assert_array_equal(loaded[name], array, strict=name != "big")


def test_other_programs_can_read_it(tmp_path):
    stored, words = example()
    checkpoint.save(tmp_path / "c.safetensors", stored, words)
    assert same(load_file(tmp_path / "c.safetensors"), stored)


def test_readable_by_whoever_the_umask_lets(tmp_path):
    checkpoint.save(tmp_path / "c", *example())
    (tmp_path / "plain").touch()
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "c")
    checkpoint.save(tmp_path / "link", *example())
    assert (tmp_path / "link").is_symlink() and same(checkpoint.load(tmp_path / "c")[0], example()[0])


def test_every_truncation_is_found(tmp_path):
    checkpoint.save(tmp_path / "c", *example())
    whole = (tmp_path / "c").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "c").write_bytes(whole[:length])
        with pytest.raises(BadInput) as caught:
            checkpoint.load(tmp_path / "c")
        assert "\n" not in str(caught.value)
    (tmp_path / "c").write_bytes(whole + b"\0")
    with pytest.raises(BadInput):
        checkpoint.load(tmp_path / "c")


def test_every_flipped_bit_is_found_or_harmless(tmp_path):
    stored, words = example()
    checkpoint.save(tmp_path / "c", stored, words)
    whole = (tmp_path / "c").read_bytes()
    refused = 0
    for place in random.Random(0).sample(range(8 * len(whole)), 2000):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / "c").write_bytes(flipped)
        try:
            loaded, said = checkpoint.load(tmp_path / "c")
        except BadInput:
            refused += 1
        else:
            assert same(loaded, stored) and said == words
    assert refused > 1900


@given(st.binary(max_size=300))
def test_any_bytes_at_all(folder, content):
    (folder / "noise").write_bytes(content)
    with pytest.raises(BadInput):
        checkpoint.load(folder / "noise")


@given(st.binary(max_size=200), st.binary(max_size=20))
def test_any_header_at_all(folder, header, body):
    (folder / "noise").write_bytes(struct.pack("<Q", len(header)) + header + body)
    with pytest.raises(BadInput):
        checkpoint.load(folder / "noise")


def write(path, tensors, body):
    header = json.dumps({"__metadata__": checkpoint.FORMAT, **tensors}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


@pytest.mark.parametrize("shape, size", [
    ([2**40], 2**42), ([2**40], 8), ([2**62, 2**62], 8), ([2**63, 0], 0), ([2**62, 0], 0), ([1] * 100, 4),
    ([-2], 8), (["2"], 8), ([2.5], 8), (2, 8),
])  # fmt: skip
def test_a_shape_that_the_file_does_not_hold(shape, size, tmp_path):
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    write(tmp_path / "c", {"a": tensor}, bytes(size % 64))
    with pytest.raises(BadInput, match="not a whole safetensors file"):
        checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize("dtype", ["BF16", "C64", "F8_E4M3", "Q7"])
def test_unknown_dtype_is_named(dtype, tmp_path):
    size = {"BF16": 16, "C64": 64}.get(dtype, 8)
    write(tmp_path / "c", {"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}, bytes(size))
    with pytest.raises(BadInput, match=dtype):
        checkpoint.load(tmp_path / "c")


def test_foreign_or_newer_file(tmp_path):
    for words in (None, {"format": "pt"}, {"format": "minitensor-gpt", "version": "2"}):
        save_file({"a": np.zeros(3)}, tmp_path / "c", words)
        with pytest.raises(BadInput, match="not a checkpoint of this program"):
            checkpoint.load(tmp_path / "c")


def test_missing_folder_or_empty(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        checkpoint.load(tmp_path / "absent")
    with pytest.raises(BadInput, match="directory"):
        checkpoint.load(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(BadInput, match="empty"):
        checkpoint.load(tmp_path / "empty")


@pytest.mark.parametrize("stored, words, named", [
    ({"a": np.zeros(1, complex)}, {}, "complex128"),
    ({"a": np.array(["x"])}, {}, "<U1"),
    ({"a": np.array([None])}, {}, "object"),
    ({"__metadata__": np.zeros(1)}, {}, "__metadata__"),
    ({}, {"sha256": ""}, "sha256"),
    ({}, {"format": ""}, "format"),
])  # fmt: skip
def test_what_cannot_be_saved(stored, words, named, tmp_path):
    with pytest.raises(BadInput, match=named):
        checkpoint.save(tmp_path / "c", stored, words)
    assert list(tmp_path.iterdir()) == []


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "safetensors.numpy.save_file"])
def test_a_save_that_fails_changes_nothing(where, tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c", *example())
    before = (tmp_path / "c").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(BadInput, match="No space left") as caught:
            checkpoint.save(tmp_path / "c", {"a": np.zeros(9)}, {})
    assert "\n" not in str(caught.value)
    assert (tmp_path / "c").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c"]


def test_an_interrupted_save_changes_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    checkpoint.save(tmp_path / "c", *example())
    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "c", {}, {})
    assert same(checkpoint.load(tmp_path / "c")[0], example()[0])
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_nowhere_to_save(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in ("file/c", "absent/c", "folder"):
        with pytest.raises(BadInput, match="cannot write"):
            checkpoint.save(tmp_path / path, *example())
    with pytest.raises(BadInput, match="not a regular file"):
        checkpoint.save(os.devnull, *example())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
