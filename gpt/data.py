"""From a text to batches: find it, read it, split it, and cut windows from it."""

import errno
import hashlib
import http.client
import os
import secrets
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt.errors import BadInput
from gpt.verse import verse
from kernels.jit import user_cache

# tinyshakespeare
URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    "/data/tinyshakespeare/input.txt"
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SIZE = 1_115_394  # bytes, and characters

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Text:
    """A training text, and where it came from."""

    text: str
    name: str  # "tinyshakespeare", the file's name, or "built-in verse"
    source: str  # a phrase for people
    comparable: bool  # is it tinyshakespeare, so that losses compare with other people's?


def find_text(path: str | PathLike[str] | None = None, *, download: bool = True, url: str = URL) -> Text:
    """Find the training text: path, else $MINITENSOR_DATA, else tinyshakespeare, else built-in verse.

    $MINITENSOR_DATA is a file, or a folder that holds tinyshakespeare.txt. Without either, tinyshakespeare is
    read from the user's cache, or downloaded and kept there. A path or $MINITENSOR_DATA that cannot be used
    raises BadInput; a download that fails does not: `source` then says why, and `comparable` is False.
    """
    if path is not None:
        return _from_file(Path(path), f"file {str(path)!r}")
    if named := os.environ.get("MINITENSOR_DATA"):
        file = Path(named, "tinyshakespeare.txt") if os.path.isdir(named) else Path(named)
        try:
            return _from_file(file, f"file {str(file)!r}, from $MINITENSOR_DATA")
        except BadInput as error:
            raise BadInput(f"$MINITENSOR_DATA is {named!r}: {error}") from error
    folder = user_cache()
    cached = folder and Path(folder, "tinyshakespeare.txt")
    try:
        content = cached.read_bytes() if cached else b""
        if _is_tinyshakespeare(content):
            return Text(content.decode(), "tinyshakespeare", f"the cache, {str(cached)!r}", True)
    except OSError:
        pass  # absent, or as good as absent: it is fetched again
    if not download:
        return _built_in("it is not in the cache and downloading is off")
    try:
        content = _download(url)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _built_in(f"downloading {url} failed ({str(error) or type(error).__name__})")
    if not _is_tinyshakespeare(content):
        return _built_in(f"what came from {url} is something else, {len(content)} bytes")
    source = f"downloaded from {url}, {_keep(content, cached)}"
    return Text(content.decode(), "tinyshakespeare", source, True)


def _keep(content: bytes, cached: Path | None) -> str:
    """Write content to the cache, and say how it went."""
    if cached is None:
        return "not kept, because there is no home to keep it in"
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as temporary:
            temporary.write_bytes(content)
        return f"kept in {str(cached)!r}"
    except OSError as error:
        return f"not kept, because {str(cached)!r} cannot be written: {error.strerror}"


def _is_tinyshakespeare(content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHA256


def _from_file(path: Path, source: str) -> Text:
    text = read_text(path)
    if _is_tinyshakespeare(text.encode()):
        return Text(text, "tinyshakespeare", source, True)
    return Text(text, path.name, source, False)


def _built_in(reason: str) -> Text:
    source = f"NOT tinyshakespeare, because {reason}: losses are NOT comparable"
    return Text(verse(SIZE), "built-in verse", " ".join(source.split()), False)


def _download(url: str) -> bytes:
    """The body at url, at most SIZE + 64 KiB of it, within 5 s for each answer and a minute for all."""
    started = time.monotonic()
    content = bytearray()
    with urllib.request.urlopen(url, timeout=5) as response:
        while len(content) <= SIZE and (piece := response.read1(1 << 16)):
            content += piece
            if time.monotonic() - started > 60:
                raise TimeoutError(f"{len(content)} bytes in a minute")
    return bytes(content)


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place, safely on disk, when the block succeeds.

    When the block or the move raises, the temporary file is removed and what was at `path` stays. Raises
    OSError, also for a path that is a folder or a device.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it is there already, and not a regular file")
    temporary = target.parent / f".{os.getpid()}-{secrets.token_hex(8)}.tmp"
    temporary.touch(exist_ok=False)  # a folder that is missing or read-only shows here
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # some writers make a file of their own, private to the user
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    with suppress(OSError):  # not every system can sync a folder; the file is whole either way
        _sync(target.parent, os.O_RDONLY)


def sweep(folder: str | PathLike[str]) -> None:
    """Remove what `replacing` left in folder when its process was killed; that of a living one stays."""
    for temporary in Path(folder).glob(".*-*.tmp"):
        process, _, rest = temporary.name[1:].partition("-")
        if process.isdecimal() and len(rest) == len("0123456789abcdef.tmp") and not _alive(int(process)):
            with suppress(OSError):
                temporary.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:                                              # somebody else's
        return True
    return True


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_text(path: str | PathLike[str]) -> str:
    """Return a file's text, UTF-8 with every byte kept: no newline is translated and a BOM stays a character.

    Raises BadInput for a file that is missing, a folder, unreadable, empty, binary or not UTF-8.
    """
    shown = repr(os.fspath(path))
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise BadInput(f"{shown}: no such file; give a text file in UTF-8") from error
    except IsADirectoryError as error:
        raise BadInput(f"{shown} is a folder; give a text file in UTF-8") from error
    except OSError as error:
        raise BadInput(f"{shown} cannot be read: {error.strerror}; give a text file in UTF-8") from error
    if not content:
        raise BadInput(f"{shown} is empty; give a text file in UTF-8")
    if (zero := content.find(0)) >= 0:
        raise BadInput(f"{shown} is binary (byte {zero} is 0x00); give a text file in UTF-8")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte {error.start} is 0x{content[error.start]:02x}, {error.reason}"
        raise BadInput(f"{shown} is not UTF-8 ({bad}); convert it to UTF-8 first") from error


def split(ids: Ids, fraction: float = 0.9) -> tuple[Ids, Ids]:
    """Cut ids (N,) into the first fraction, to train on, and the rest, to validate on."""
    cut = int(fraction * len(ids))
    return ids[:cut], ids[cut:]


def check_length(train: Ids, validation: Ids, context: int) -> None:
    """Raise BadInput unless both parts hold at least one window: context + 1 characters."""
    for name, ids in (("training", train), ("validation", validation)):
        if len(ids) <= context:
            raise BadInput(
                f"the text is too short: {len(ids)} of its {len(train) + len(validation)} characters are for "
                f"{name}, a context of {context} needs {context + 1}; use a longer text or a smaller context"
            )


def batch(ids: Ids, batch: int, context: int, seed: int, step: int, rank: int = 0) -> tuple[Ids, Ids]:
    """Draw windows x (B, T) uniformly from ids (N,), and y (B, T), the character that follows each.

    A function of its arguments alone: the bits are those of Philox with key (seed, rank), from a counter that
    starts with step; all three are from 0 to 2**64 - 1. N is at least context + 1 (see `check_length`).
    """
    key, counter = np.array([seed, rank], np.uint64), np.array([0, step, 0, 0], np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    starts = np.random.Generator(bits).integers(len(ids) - context, size=(batch, 1))
    at = starts + np.arange(context)
    return _plain(ids[at]), _plain(ids[at + 1])


def windows(ids: Ids, context: int, batch: int) -> Iterator[tuple[Ids, Ids]]:
    """Cut ids (N,) into consecutive windows x, y (up to B, T), in which each of N - 1 targets occurs once.

    The last window, when it is shorter, comes alone: (1, rest). Of ids in int32 the arrays are views.
    """
    targets = max(len(ids) - 1, 0)
    whole = targets // context * context
    x = ids[:whole].reshape(-1, context)
    y = ids[1 : whole + 1].reshape(-1, context)
    for i in range(0, len(x), batch):
        yield _plain(x[i : i + batch]), _plain(y[i : i + batch])
    if whole < targets:
        yield _plain(ids[None, whole:-1]), _plain(ids[None, whole + 1 :])


def _plain(ids: NDArray[Any]) -> Ids:
    """As int32, whatever they are kept in."""
    return ids.astype(np.int32, copy=False)
