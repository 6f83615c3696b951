"""Checkpoints: named arrays and a few strings in one safetensors file, whole or not there at all."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpt.config import Config
from gpt.data import replacing
from gpt.errors import BadInput
from gpt.model import GPT
from gpt.tokenizer import CharTokenizer

Array = NDArray[Any]
FORMAT = {"format": "minitensor-gpt", "version": "1"}
# safetensors' name of each dtype that numpy has too
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


def save(path: str | PathLike[str], arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write arrays and metadata to path, replacing what was there only once the new file is on disk.

    Raises BadInput when the file cannot be written, for dtypes outside `DTYPES`, and for the metadata keys
    that are ours: format, version, sha256.
    """
    shown = repr(os.fspath(path))
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES.values():
            possible = ", ".join(DTYPES.values())
            raise BadInput(f"{shown}: array {name!r} is {array.dtype}; {possible} can be saved")
        if name == "__metadata__":
            raise BadInput(f"{shown}: array {name!r} has the name of the metadata; choose another name")
    if taken := sorted({*FORMAT, "sha256"} & metadata.keys()):
        raise BadInput(f"{shown}: metadata {taken[0]!r} is the file's own; choose another key")
    # safetensors writes raw memory, so strides and byte order must be plain
    plain = {name: np.asarray(a, a.dtype.newbyteorder("="), order="C") for name, a in arrays.items()}
    try:
        with replacing(path) as temporary:
            save_file(plain, temporary, {**metadata, **FORMAT, "sha256": _digest(plain, metadata)})
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{shown}: cannot write the checkpoint: {_line(error)}") from error


def load(path: str | PathLike[str]) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays and the metadata that `save` wrote, every bit of them checked.

    Raises BadInput for a file that is missing, cut short, changed since, or not a checkpoint of ours.
    """
    shown = repr(os.fspath(path))
    arrays: dict[str, Array] = {}
    try:
        with open(path, "rb"):
            pass  # for the system's own words when the file is missing or unreadable
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            for key, expected in FORMAT.items():
                if metadata.pop(key, None) != expected:
                    raise BadInput(f"{shown}: not a checkpoint of this program ({key} is not {expected!r})")
            for name in file.keys():
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    raise BadInput(f"{shown}: array {name!r} is {dtype}; {', '.join(DTYPES)} can be read")
                arrays[name] = file.get_tensor(name)
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"{shown}: cannot read the checkpoint: {_line(error)}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise BadInput(f"{shown}: not a whole safetensors file: {_line(error)}") from error
    if metadata.pop("sha256", None) != _digest(arrays, metadata):
        raise BadInput(f"{shown}: damaged: its content does not match its checksum; use an older checkpoint")
    return arrays, metadata


def _digest(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """The sha256 of everything that `load` returns: names, dtypes, shapes, bytes and metadata."""
    names = sorted(arrays)
    header = [[name, arrays[name].dtype.name, arrays[name].shape] for name in names]
    digest = hashlib.sha256(json.dumps([header, sorted(metadata.items())]).encode())
    for name in names:
        digest.update(arrays[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error.strerror if isinstance(error, OSError) and error.strerror else error).split())


# ---- a model and its tokenizer -----------------------------------------------------------------------------

def save_model(path: str | PathLike[str], model: GPT, tokenizer: CharTokenizer, step: int) -> None:
    """Write a model, its config and its tokenizer: all that `load_model` needs. Raises BadInput as `save`."""
    metadata = {"config": json.dumps(dataclasses.asdict(model.config)), "tokenizer": tokenizer.to_json(),
                "step": str(step)}
    save(path, model.state_dict(), metadata)


def load_model(path: str | PathLike[str]) -> tuple[GPT, CharTokenizer]:
    """Return the model and the tokenizer that `save_model` wrote; BadInput for anything else."""
    arrays, metadata = load(path)
    try:
        tokenizer = CharTokenizer.from_json(metadata["tokenizer"])
        model = GPT(Config(**json.loads(metadata["config"])), len(tokenizer))
        model.load_state_dict(arrays)
    except (KeyError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise BadInput(f"{os.fspath(path)!r}: not a model of this program: {_line(error)}") from error
    return model, tokenizer
