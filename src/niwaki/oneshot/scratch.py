"""Folders that appear whole or not at all, and weights that are files until they are used."""

from __future__ import annotations

import fcntl
import gc
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from niwaki.errors import InputError, NiwakiError


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Yield a new folder that becomes ``out`` when the block ends well, and goes when it does not.

    It is beside ``out`` under a hidden name. What a killed process left there under such a name is taken away.

    Raises:
        InputError: ``out`` exists, or cannot be written.
        NiwakiError: no room.
    """
    out = Path(os.path.abspath(out))
    if out.exists() or out.is_symlink():
        raise InputError(f"--out: {out} exists; give a folder that is new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _take_away_leftovers(out)
        folder = out.parent / f".{out.name}.{secrets.token_hex(8)}.tmp"
        folder.mkdir()
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written ({error.strerror}); give a folder that can") from None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # says that somebody is alive
        yield folder
        if out.exists():
            raise InputError(f"--out: {out} was made by somebody else meanwhile; give a folder that is new")
        os.rename(folder, out)
    except OSError as error:
        raise NiwakiError(f"--out: {out} cannot be written: {error.strerror or error}") from error
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _take_away_leftovers(out: Path) -> None:
    for path in out.parent.glob(f".{out.name}.*.tmp"):
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # its process is at work
        finally:
            os.close(lock)


class Settled:
    """Keeps weights in files that are mapped into memory, so that they need none of their own, but for a block that is at work.

    Args:
        folder: for the files; whoever made it takes it away.

    >>> import tempfile
    >>> layer = nn.Linear(2, 1)
    >>> before = layer.weight.detach().clone()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     settled = Settled(Path(folder))
    ...     settled.take(layer)
    ...     masks = settled.put(layer, {"weight": torch.tensor([[True, False]])})
    ...     torch.equal(layer.weight, before), masks
    (True, {'weight': tensor([[ True, False]])})
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = 0

    def take(self, module: nn.Module) -> None:
        """Give the parameters of a module memory of their own: pages of a mapped file that are written to stay as long as the mapping."""
        for parameter in module.parameters():
            parameter.data = parameter.detach().clone()

    def put(self, module: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put the parameters of a module (which stay the same objects) and masks into a file; return the masks."""
        parameters = {f"parameter {name}": p for name, p in module.named_parameters() if p.device.type == "cpu"}
        tensors = {name: p.detach().contiguous() for name, p in parameters.items()}
        mapped = self._mapped(tensors | {f"mask {name}": mask.contiguous() for name, mask in masks.items()})
        for name, parameter in parameters.items():
            parameter.data = mapped[name]
        gc.collect()  # a sparsifier and its tensors refer to each other
        return {name: mapped[f"mask {name}"] for name in masks}

    def _mapped(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._files += 1
        path = self.folder / f"{self._files}.safetensors"
        with torch.no_grad():
            save_file(dict(tensors), path)
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in tensors}
