"""Tensors that are kept in memory as long as there is room, and on disk beyond that."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from niwaki.formats.files import raw_bytes, reading

TENSOR = "tensor"
"""Name of the one tensor in a file."""


@dataclass
class Kept:
    """A tensor in a :class:`Store`: itself, or the file that it is in."""

    tensor: Tensor | None
    file: Path | None
    device: torch.device


class Store:
    """Keeps tensors within a budget of memory; the others are safetensors files in a temporary folder, mapped into memory when read.

    It is a context manager: at its end the folder goes.

    Args:
        budget: bytes of tensors that may be in memory; None for no limit.

    >>> with Store(budget=8) as store:
    ...     first, second = store.put(torch.tensor([1.0, 2.0])), store.put(torch.tensor([3.0, 4.0]))
    ...     store.get(second), second.file is not None
    (tensor([3., 4.]), True)
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self.bytes_in_memory = 0
        self.bytes_written = 0
        """Bytes of all tensors for which there was no room in memory."""
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0
        self._shared: dict[bytes, Kept] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def put(self, tensor: Tensor) -> Kept:
        """Keep a copy of a tensor."""
        kept = Kept(None, None, tensor.device)
        self.replace(kept, tensor)
        return kept

    def put_shared(self, tensor: Tensor) -> Kept:
        """Keep a tensor that may be the same again and again, such as a mask of every batch: equal ones are kept once."""
        flat = tensor.detach().cpu().contiguous()
        digest = hashlib.blake2b(f"{flat.dtype} {tuple(flat.shape)} {tensor.device} ".encode())
        digest.update(raw_bytes(flat))
        found = self._shared.get(digest.digest())
        if found is None:
            found = self._shared[digest.digest()] = self.put(tensor)
        return found

    def replace(self, kept: Kept, tensor: Tensor) -> None:
        """Keep a copy of another tensor instead."""
        self.drop(kept)
        tensor = tensor.detach()
        kept.device = tensor.device
        if self.budget is None or self.bytes_in_memory + tensor.nbytes <= self.budget:
            kept.tensor = tensor.cpu() if tensor.device.type != "cpu" else tensor.clone()
            self.bytes_in_memory += kept.tensor.nbytes
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="niwaki-")
        self._files += 1
        kept.file = Path(self._folder.name) / f"{self._files}.safetensors"
        save_file({TENSOR: tensor.cpu().contiguous()}, kept.file)  # nothing that must outlive a power cut
        self.bytes_written += tensor.nbytes

    def get(self, kept: Kept) -> Tensor:
        """Return the tensor, on its device, in memory of its own."""
        if kept.tensor is not None:
            return kept.tensor.to(kept.device) if kept.device.type != "cpu" else kept.tensor.clone()
        assert kept.file is not None
        with reading(kept.file) as file:
            return file.read(TENSOR).to(kept.device)

    def drop(self, kept: Kept) -> None:
        """Forget what is kept; nothing else of it may be asked."""
        if kept.tensor is not None:
            self.bytes_in_memory -= kept.tensor.nbytes
        if kept.file is not None:
            kept.file.unlink()
        kept.tensor = kept.file = None

    def clear(self) -> None:
        """Forget what is shared; what was put otherwise is dropped one by one."""
        for kept in self._shared.values():
            self.drop(kept)
        self._shared.clear()
