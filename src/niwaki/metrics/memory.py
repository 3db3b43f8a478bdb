"""Peak memory: of the tensors that a call makes, and of the whole process."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from niwaki.errors import InputError

DEFINITION = (
    "largest total size of tensors alive at one time that one forward pass in evaluation mode makes: activations, without parameters and"
    " inputs; on a GPU as its allocator saw it, elsewhere without what operations use inside"
)
DEFINITION_RESIDENT = "largest physical memory that the process had since it began, with Python, torch and data"


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return how many bytes of tensors a call needs at its peak, beyond those that exist before it.

    On a CUDA device this is what the allocator handed out, workspaces and rounding to its blocks included. Elsewhere it is the sum over the
    storages of all tensors that torch operations return and that are still alive, each counted once: the same on every machine, without
    what an operation uses inside itself. Gradients are recorded or not as they are outside.

    Args:
        call: what to observe, without arguments; runs once, off CUDA without compiled graphs.
        device: where its tensors are.

    >>> x = torch.ones(1000)
    >>> peak_bytes(lambda: (x + 1).mul_(2).sum())  # x + 1, and the sum; what is done in place and x itself need nothing
    4004
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    alive = _Alive()
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # slow to import, and without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(alive)
        call()
    return alive.peak


def peak_resident_bytes() -> int:
    """Return the largest physical memory in bytes that this process had since it began; it never falls.

    Raises:
        InputError: the system (Windows) does not tell.
    """
    try:
        import resource
    except ImportError:
        raise InputError("peak resident memory: this system does not tell it; Linux and macOS do") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._bytes = 0
        self._made: dict[int, int] = {}
        self._found: dict[int, torch.UntypedStorage] = {}  # held, so that no new storage gets the address of one of them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._found[storage._cdata] = storage
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._add(storage)
        self.peak = max(self.peak, self._bytes)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._found:
            return
        if key not in self._made:
            weakref.finalize(storage, self._free, key)
        self._bytes += size - self._made.get(key, 0)
        self._made[key] = size

    def _free(self, key: int) -> None:
        self._bytes -= self._made.pop(key)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_iter(values) if isinstance(value, Tensor) and value.layout == torch.strided]
