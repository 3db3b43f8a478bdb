"""Sizes in bytes."""

from __future__ import annotations

import safetensors.torch
from torch import Tensor, nn

from niwaki.masks import canonical_name


def dense_bytes(model: nn.Module) -> int:
    """Return the size in bytes of the plain safetensors file of a model's state dict (tensors that share memory are stored once)."""
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() == 0 or place not in seen:
            seen.add(place)
            tensors[canonical_name(name)] = tensor.detach().clone().contiguous()
    return len(safetensors.torch.save(tensors))
