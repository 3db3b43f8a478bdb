"""Data files in the formats in which they are distributed: found, read strictly, and refused in one line that says what was expected.

- IDX (MNIST and its like; LeCun, Cortes & Burges 1998): two zero bytes, one byte for the data type, one for the number of dimensions,
  the size of each dimension (32 bits, big-endian), then the elements, big-endian, the last dimension fastest.
- CIFAR-10, binary version (Krizhevsky 2009): records of 3,073 bytes: the class, then 32×32 red, green and blue values, row by row.

Either may be packed with gzip, which is told by the content, not by the name.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from niwaki.errors import InputError

IDX_TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
"""The third byte of an IDX file -> its data type."""

CIFAR_SHAPE = (3, 32, 32)
CIFAR_RECORD = 1 + prod(CIFAR_SHAPE)
_CIFAR_CLASSES = 10

_GZIP = b"\x1f\x8b"
_MOST_DIMENSIONS = 32


def required(folder: Path | None, name: str, *, task: str, contents: str) -> Path:
    """Return the path of a data file that a task needs.

    Args:
        folder: that of ``--data`` or ``NIWAKI_DATA``; None when neither was given.
        name: where the file is in it, such as ``mnist/train-labels-idx1-ubyte``. The folder may also be the innermost one itself
            (here ``mnist``), and the file may have a further ``.gz``; the first that exists of these is taken.
        task: who needs it.
        contents: what should be in it, in words.

    Raises:
        InputError: no folder was given, there is no such folder, or the file is not in it.
    """
    remedy = "--data DIR or NIWAKI_DATA names the folder"
    if folder is None:
        raise InputError(f"task {task!r}: no data folder was given: {name} is needed, with {contents}; {remedy}")
    if not os.path.isdir(folder):
        raise InputError(f"task {task!r}: {folder}: there is no such folder; {remedy} that holds {name}")
    last = Path(name).name
    places = dict.fromkeys((folder / Path(name).parent, folder))
    for inside in places:
        for place in (inside / last, inside / f"{last}.gz"):
            if os.path.isfile(place):
                return place
    raise InputError(
        f"task {task!r}: there is no {last} (nor {last}.gz), with {contents}, in {', nor in '.join(map(str, places))}; {remedy}"
    )


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, unpacked if it is packed with gzip.

    Raises:
        InputError: it cannot be read, or is a damaged gzip file.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP) else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: a damaged gzip file ({error}); download or unpack it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of any of its six data types.

    Raises:
        InputError: it cannot be read, is no IDX file, holds no elements, or has not exactly the length that its header says.
    """
    content = read_bytes(path)
    start = content[:4]
    if len(start) < 4 or any(start[:2]) or start[2] not in IDX_TYPES or not 1 <= start[3] <= _MOST_DIMENSIONS:
        types = ", ".join(f"{code:02x} = {name}" for code, name in IDX_TYPES.items())
        raise InputError(
            f"{path}: not an IDX file: it begins with {start.hex(' ') or 'nothing'}; "
            f"expected 00 00, a data type ({types}), the number of dimensions (01 to {_MOST_DIMENSIONS:02x})"
        )
    dtype, dimensions = np.dtype(IDX_TYPES[start[2]]), start[3]
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise InputError(f"{path}: an IDX header of {dimensions} dimensions: {header} bytes expected, {len(content)} found")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = header + prod(shape) * dtype.itemsize
    says = f"its header says {' × '.join(map(str, shape))} {dtype}"
    if 0 in shape:
        raise InputError(f"{path}: {says}, which is nothing")
    if len(content) != expected:
        raise InputError(f"{path}: {says}: {expected:,} bytes expected, {len(content):,} found")
    elements = np.frombuffer(content, dtype.newbyteorder(">"), offset=header)
    return torch.from_numpy(elements.astype(dtype).reshape(shape))


def read_cifar10(path: Path) -> tuple[Tensor, Tensor]:
    """Read a batch of CIFAR-10 in its binary version: images ``[N, 3, 32, 32]`` and class numbers ``[N]``, both uint8.

    Raises:
        InputError: it cannot be read, is no whole number of records, or has a class that is not 0 to 9.
    """
    content = read_bytes(path)
    if not content or len(content) % CIFAR_RECORD:
        raise InputError(
            f"{path}: a multiple of {CIFAR_RECORD:,} bytes expected (1 for the class, {CIFAR_RECORD - 1:,} for the image), "
            f"{len(content):,} found"
        )
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD).copy())
    labels = records[:, 0].clone()
    check_labels(path, labels, _CIFAR_CLASSES)
    return records[:, 1:].reshape(-1, *CIFAR_SHAPE), labels


def check_labels(path: Path, labels: Tensor, classes: int) -> None:
    """Raise InputError, naming the first of them, when class numbers ``[N]`` of a file are not all from 0 to ``classes - 1``."""
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise InputError(f"{path}: example {index:,} (counted from 0) has label {labels[index]}, 0 to {classes - 1} are possible")
