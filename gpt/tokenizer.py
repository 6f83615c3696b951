"""Characters to numbers and back: a token is the place of a character in the sorted vocabulary."""

import json
import os
from collections import Counter
from os import PathLike

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt.data import read_text, replacing
from gpt.errors import BadInput


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class CharTokenizer:
    """Numbers the characters of a vocabulary, sorted and distinct, from 0 to len(tokenizer) - 1.

    Raises BadInput for a vocabulary that is empty, unsorted, repeats a character or is not UTF-8.
    """

    def __init__(self, vocabulary: str):
        if not vocabulary:
            raise BadInput("vocabulary is empty: a tokenizer needs at least one character")
        codes = _code_points(vocabulary)
        if (codes[1:] <= codes[:-1]).any():
            raise BadInput(f"vocabulary {_shorten(vocabulary)} must hold distinct characters in sorted order")
        if ((codes >= 0xD800) & (codes < 0xE000)).any():
            raise BadInput(f"vocabulary {_shorten(vocabulary)} holds half a surrogate pair; give whole ones")
        self.vocabulary = vocabulary
        self._codes = codes
        # id of every code point up to the highest in the vocabulary; the last entry catches all above it
        self._ids = np.full(int(codes[-1]) + 2, -1, np.int32)
        self._ids[codes] = np.arange(len(codes), dtype=np.int32)

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Make the tokenizer of the characters that occur in text; BadInput when there is none."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids (N,) of N characters; BadInput names the first one outside the vocabulary."""
        ids = self._ids.take(_code_points(text), mode="clip")
        if ids.size and ids.min() < 0:
            position = int(ids.argmin())
            character = text[position]
            raise BadInput(
                f"character {character!r} (U+{ord(character):04X}) at position {position} is not among "
                f"the {len(self)} of the vocabulary: {_shorten(self.vocabulary)}"
            )
        return ids

    def encode_known(self, text: str) -> tuple[NDArray[np.int32], dict[str, int]]:
        """Return the ids of the characters that the vocabulary has, and how often each of the others came."""
        ids = self._ids.take(_code_points(text), mode="clip")
        known = ids >= 0
        if known.all():
            return ids, {}
        return ids[known], dict(Counter(text[i] for i in np.flatnonzero(~known)))

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of integer ids (N,); BadInput names the first id outside the vocabulary."""
        ids = np.asarray(ids)
        if not ids.size:
            return ""
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise BadInput(f"decode: ids are {ids.dtype} of shape {ids.shape}; integers of shape (N,) work")
        outside = (ids < 0) | (ids >= len(self))
        if outside.any():
            position = int(outside.argmax())
            raise BadInput(
                f"id {ids[position]} at position {position} has no character: the ids of "
                f"{_shorten(self.vocabulary)} are 0 to {len(self) - 1}"
            )
        codes: NDArray[np.uint32] = self._codes[ids]
        return codes.tobytes().decode("utf-32-le")

    def to_json(self) -> str:
        """Return the tokenizer as one line of JSON, which `from_json` reads."""
        return json.dumps({"vocabulary": self.vocabulary})

    @classmethod
    def from_json(cls, line: str) -> "CharTokenizer":
        """Make the tokenizer that `to_json` wrote; BadInput when it is not such JSON."""
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"the tokenizer is not JSON: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("vocabulary"), str):
            raise BadInput(f'the tokenizer is {_shorten(line)}, not JSON of the form {{"vocabulary": "abc"}}')
        return cls(content["vocabulary"])

    def save(self, path: str | PathLike[str]) -> None:
        """Write the tokenizer to a JSON file, whole or not at all; BadInput when it cannot be written."""
        try:
            with replacing(path) as temporary:
                temporary.write_text(self.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise BadInput(f"{os.fspath(path)!r}: cannot write the tokenizer: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "CharTokenizer":
        """Make the tokenizer that `save` wrote; BadInput when the file is missing or malformed."""
        content = read_text(path)
        try:
            return cls.from_json(content)
        except BadInput as error:
            raise BadInput(f"{os.fspath(path)!r}: {error}") from error


def _shorten(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 200 else f"{shown[:200]}... ({len(text)} characters)"
