"""Safetensors files: written whole or not at all, read strictly."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from niwaki.errors import InputError, NiwakiError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The safetensors codes of all data types that a file may hold."""

CODES = {dtype: code for code, dtype in DTYPES.items()}
"""The other way round."""

FilePath = str | os.PathLike[str]

_LARGEST_HEADER = 100_000_000  # the limit of the safetensors format
_OUT_OF_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def replacing(path: FilePath) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of ``path`` when the block ends well, and leaves no trace when it does not.

    The bytes go to a temporary name in the same folder, reach the disk, and only then get the final name. A link stays a link, and a
    file that is replaced hands on its permissions.

    Raises:
        InputError: the folder does not exist or cannot be written, or the path is no regular file.
        NiwakiError: no room, or the device failed.
    """
    target = Path(os.path.realpath(_checked(path)))
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        if target.exists() and not target.is_file():
            raise InputError(f"{path}: cannot be written: it is a {'folder' if target.is_dir() else 'device'}; give the path of a file")
        with open(temporary, "xb") as file:
            if target.exists():
                shutil.copymode(target, temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        kind = NiwakiError if error.errno in _OUT_OF_ROOM else InputError
        raise kind(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    with suppress(OSError):  # the file is whole either way: this makes its new name outlive a power cut, where a folder can be synced
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write(path: FilePath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous CPU tensors and text metadata as one safetensors file, atomically (``replacing``).

    Large items come first, so that every tensor is aligned to its item size in the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": CODES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(raw_bytes(tensors[name]))


class Reader:
    """An open safetensors file whose header has been checked; ``reading`` opens one."""

    def __init__(self, path: FilePath, file: Any) -> None:
        self.path = path
        self._file = file
        self.metadata: dict[str, str] = file.metadata() or {}
        self.names: list[str] = list(file.keys())

    def kind(self, name: str) -> tuple[str, list[int]]:
        """Return the dtype code and the shape of a tensor, without reading it."""
        piece = self._file.get_slice(name)
        return piece.get_dtype(), piece.get_shape()

    def read(self, name: str) -> Tensor:
        """Return a tensor in memory of its own.

        Raises:
            InputError: a dtype that torch does not have, a shape too large for it, or bytes that are no truth values.
        """
        dtype, shape = self.kind(name)
        if dtype not in DTYPES:
            raise InputError(f"{self.path}: {name!r} has data type {dtype}, known are {', '.join(DTYPES)}")
        check_shape(shape, f"{self.path}: {name!r}")
        tensor: Tensor = self._file.get_tensor(name)
        if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise InputError(f"{self.path}: {name!r} has bytes other than 0 and 1, which BOOL does not allow")
        return tensor.clone()


@contextmanager
def reading(path: FilePath) -> Iterator[Reader]:
    """Open a safetensors file for reading.

    Raises:
        InputError: it cannot be read, or is no valid safetensors file.
    """
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            yield Reader(path, file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise InputError(f"{path}: not a valid safetensors file: {str(error).splitlines()[0]}") from None


def check_shape(shape: list[int], name: str) -> None:
    """Raise InputError for a shape that torch cannot have, empty or not: more than 2^63 - 1 elements, or a negative size."""
    if any(size < 0 for size in shape) or prod(max(size, 1) for size in shape) >= 2**63:
        raise InputError(f"{name}: the shape {shape} is no shape of a tensor")


def unique_json(text: str | bytes) -> Any:
    """Parse JSON; raises ValueError for what is none, for a name that stands twice in one object, and for absurd nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands twice")
        return result

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _checked(path: FilePath) -> FilePath:
    if "\0" in os.fspath(path):
        raise InputError(f"{os.fspath(path)!r}: a path cannot have a null character")
    return path


def _check_header(path: FilePath) -> None:
    """Refuse what the safetensors library lets pass: one name twice (its last one would count)."""
    with open(_checked(path), "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _LARGEST_HEADER:
            raise InputError(f"{path}: not a valid safetensors file: a header of {size} bytes, at most {_LARGEST_HEADER} are allowed")
        text = file.read(size)
    if len(text) < size or size < 2:
        raise InputError(f"{path}: not a valid safetensors file: it ends within its header")
    try:
        unique_json(text)
    except ValueError as error:
        raise InputError(f"{path}: not a valid safetensors file: header: {' '.join(str(error).split())}") from None
