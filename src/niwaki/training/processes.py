"""The processes of a run that ``torchrun`` started: each takes its part of every batch, and the first one speaks and writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from niwaki.ranks import world_size

__all__ = ["any_process", "joined", "local_device", "rank", "wait_for_all", "world_size"]


def started_by_torchrun() -> bool:
    """Return whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started, if it did, until the block ends."""
    if not started_by_torchrun() or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def local_device() -> torch.device:
    """Return the device that this process trains on: its GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def any_process(flag: bool) -> bool:
    """Return whether the flag is set in any process; all of them must ask together."""
    if world_size() == 1:
        return flag
    found = torch.tensor(float(flag), device=local_device() if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())
