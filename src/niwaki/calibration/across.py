"""What several processes find together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from niwaki.ranks import world_size


def rank() -> int:
    """Return the number of this process, 0 when it is alone."""
    return dist.get_rank() if world_size() > 1 else 0


def share(total: int) -> int:
    """Return how many of ``total`` things this rank contributes."""
    return total // world_size() + (rank() < total % world_size())


def gathered(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, one rank after the other; they may differ in number."""
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = max(int(n) for n in counts)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])
