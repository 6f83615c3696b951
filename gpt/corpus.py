"""What a run is trained on: the tokens of a text of any size, whence they came, and what was noticed.

A text of up to 16 MB is read into memory. Of a larger one the tokens are kept in the user's cache, in a file
named by the sha256 of the text, and mapped into memory: of that, only what a step touches need be there.
"""
from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt.baselines import counts
from gpt.cli import writing
from gpt.data import Text, find_text, read_text, replacing, split
from gpt.errors import BadInput
from gpt.tokenizer import CharTokenizer
from kernels.jit import user_cache

IN_MEMORY = 2**24                            # bytes
PIECE = 2**22                                # bytes read at once
MOST_VALIDATION = 2**20                      # characters: an exact loss over more would take too long


@dataclass(frozen=True)
class Corpus:
    """Tokens to train and to validate on, one a character, of any integer dtype."""
    train: np.ndarray
    validation: np.ndarray
    tokenizer: CharTokenizer
    name: str
    where: str                               # a phrase for people
    sha256: str                              # of the text's bytes
    notes: tuple[str, ...]                   # on characters that somebody should know of


def open_corpus(paths: Sequence[str] | None, tokenizer: CharTokenizer | None = None) -> Corpus:
    """The text of files, of folders' .txt files and of globs, one after the other, or that of `find_text`.

    In tokens of its own vocabulary, or of the tokenizer given: characters that it lacks are left out, and a
    note says so. The last tenth, a million characters at the most, is to validate on.
    """
    files = find_files(paths) if paths else []
    if sum(file.stat().st_size for file in files) > IN_MEMORY:
        name, where, digest = _name(files), _where(files), _sha256(files)
        tokenizer, ids, unknown = _mapped(files, digest, tokenizer)
    else:
        text = _joined(files) if files else find_text()
        name, where, digest = text.name, text.source, hashlib.sha256(text.text.encode()).hexdigest()
        tokenizer = tokenizer or CharTokenizer.from_text(text.text)
        ids, unknown = tokenizer.encode_known(text.text)
    notes = []
    if unknown:
        notes.append(f"{sum(unknown.values()):,} characters that the model's vocabulary lacks were left out: "
                     + _shown(unknown))
    train, validation = split(ids, max(0.9, 1 - MOST_VALIDATION / max(1, len(ids))))
    seen = counts(train, len(tokenizer), 1) > 0
    new = counts(validation, len(tokenizer), 1) * ~seen
    if new.any():
        notes.append(f"{new.sum():,} characters to validate on never occur where it trains, and count: "
                     + _shown(tokenizer.vocabulary[i] for i in np.flatnonzero(new)))
    return Corpus(train, validation, tokenizer, name, where, digest, tuple(notes))


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that paths name, in that order; those of a folder or a glob are sorted, each comes once."""
    files: dict[Path, None] = {}
    for path in paths:
        if os.path.isdir(path):
            found = sorted(file for file in Path(path).rglob("*.txt") if file.is_file())
            lacks = "is a folder without a .txt file in it"
        elif not os.path.exists(path) and glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))
            found = [Path(match) for match in matches if os.path.isfile(match)]
            lacks = "matches no file"
        else:
            found, lacks = [Path(path)], ""
        if not found:
            raise BadInput(f"--data: {path!r} {lacks}; give text files in UTF-8")
        files |= dict.fromkeys(found)
    for file in files:
        if not os.path.isfile(file):
            raise BadInput(f"{str(file)!r}: no such file; give a text file in UTF-8")
    return list(files)


def _joined(files: Sequence[Path]) -> Text:
    if len(files) == 1:
        return find_text(files[0])
    return Text("".join(map(read_text, files)), _name(files), _where(files), False)


def _name(files: Sequence[Path]) -> str:
    return files[0].name if len(files) == 1 else f"{len(files):,} files"


def _where(files: Sequence[Path]) -> str:
    size = sum(file.stat().st_size for file in files)
    return f"{str(files[0])!r}" + (f" to {str(files[-1])!r}" if len(files) > 1 else "") + f", {size:,} bytes"


def _shown(characters: Iterable[str]) -> str:
    """At most ten of the characters, as Python writes them."""
    listed = [repr(character) for character in characters]
    return ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")


# ---- a text larger than memory -----------------------------------------------------------------------------

def _mapped(files: Sequence[Path], digest: str, tokenizer: CharTokenizer | None
            ) -> tuple[CharTokenizer, np.ndarray, dict[str, int]]:
    """The tokenizer, the tokens in a file mapped into memory, and how often each unknown character came.

    The file is made once for a text and a vocabulary. Beside it lies what else was found, in JSON, written
    last; where the two do not fit each other, they are made again.
    """
    cache = user_cache()
    if cache is None:
        raise BadInput("a text of this size needs a cache for its tokens; set XDG_CACHE_HOME to a folder")
    tokens = cache / "tokens" / f"{digest}-own"
    content = _found(tokens)
    if tokenizer and (content is None or content.get("vocabulary") != tokenizer.vocabulary):
        given = hashlib.sha256(tokenizer.vocabulary.encode()).hexdigest()[:16]
        tokens = cache / "tokens" / f"{digest}-{given}"
        content = _found(tokens)
    if content is None:
        print("reading  a text of this size, once on this machine", flush=True)
        tokenizer = tokenizer or CharTokenizer(_vocabulary(files))
        unknown: Counter[str] = Counter()
        with writing(tokens):
            tokens.parent.mkdir(parents=True, exist_ok=True)
            with replacing(tokens) as temporary, open(temporary, "wb") as file:
                for piece in _pieces(files):
                    ids, missing = tokenizer.encode_known(piece)
                    ids.astype(_dtype(tokenizer)).tofile(file)
                    unknown.update(missing)
            content = {"vocabulary": tokenizer.vocabulary, "unknown": unknown, "bytes": tokens.stat().st_size}
            with replacing(tokens.with_suffix(".json")) as temporary:
                temporary.write_text(json.dumps(content))
        if not tokens.stat().st_size:
            raise BadInput(f"{_where(files)}: no character of it is in the vocabulary")
    tokenizer = CharTokenizer(content["vocabulary"])
    return tokenizer, np.asarray(np.memmap(tokens, _dtype(tokenizer), "r")), content["unknown"]


def _found(tokens: Path) -> dict[str, Any] | None:
    """What lies beside the tokens, if both files are there, and as they were written."""
    try:
        content = json.loads(tokens.with_suffix(".json").read_text())
        return content if 0 < tokens.stat().st_size == content["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _dtype(tokenizer: CharTokenizer) -> type[np.unsignedinteger]:
    """The smallest that holds every token."""
    return np.uint8 if len(tokenizer) <= 2**8 else np.uint16 if len(tokenizer) <= 2**16 else np.uint32


def _sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        for piece in _bytes(file):
            digest.update(piece)
    return digest.hexdigest()


def _vocabulary(files: Sequence[Path]) -> str:
    """The characters that occur, sorted."""
    seen = np.zeros(0x110000, bool)
    for piece in _pieces(files):
        seen[np.frombuffer(piece.encode("utf-32-le"), "<u4")] = True
    return "".join(map(chr, np.flatnonzero(seen)))


def _pieces(files: Sequence[Path]) -> Iterator[str]:
    """The text, a piece at a time; BadInput for a file that is binary or not UTF-8."""
    for file in files:
        decoder = codecs.getincrementaldecoder("utf-8")()
        done = 0
        for piece in _bytes(file):
            if (zero := piece.find(0)) >= 0:
                raise BadInput(f"{str(file)!r} is binary (byte {done + zero} is 0x00); give a text in UTF-8")
            yield _decoded(file, decoder, piece, done)
            done += len(piece)
        yield _decoded(file, decoder, b"", done)


def _decoded(file: Path, decoder: codecs.IncrementalDecoder, piece: bytes, done: int) -> str:
    """The characters that end in a piece, which starts at byte `done`; an empty piece ends the file."""
    held = len(decoder.getstate()[0])
    try:
        return decoder.decode(piece, final=not piece)
    except UnicodeDecodeError as error:
        bad = f"byte {done - held + error.start} is 0x{error.object[error.start]:02x}, {error.reason}"
        raise BadInput(f"{str(file)!r} is not UTF-8 ({bad}); convert it to UTF-8 first") from error


def _bytes(file: Path) -> Iterator[bytes]:
    try:
        with open(file, "rb") as opened:
            while piece := opened.read(PIECE):
                yield piece
    except OSError as error:
        raise BadInput(f"{str(file)!r} cannot be read: {error.strerror}; give a text in UTF-8") from error
