"""Sizes: parameters, masked weights, zeros and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
from torch import Tensor, nn

from niwaki.masks import canonical_name


@dataclass(frozen=True)
class Counts:
    """Counts of parameter elements (tied parameters counted once).

    Attributes:
        parameters: elements of all parameters.
        targets: elements of the parameters that have a mask.
        masked: elements that the masks remove.
        zeros: elements of the targets that are zero though no mask removes them.
    """

    parameters: int
    targets: int
    masked: int
    zeros: int

    @property
    def sparsity_of_targets(self) -> float:
        """Masked weights / weights of the tensors that have a mask."""
        return self.masked / self.targets if self.targets else 0.0

    @property
    def sparsity_of_parameters(self) -> float:
        """Masked weights / elements of all parameters."""
        return self.masked / self.parameters if self.parameters else 0.0


def count_parameters(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> Counts:
    """Count parameters, targets, masked weights and other zeros of a model.

    Args:
        model: any model.
        masks: canonical parameter name -> bool tensor, True = active.

    >>> import torch
    >>> layer = torch.nn.Linear(2, 2)
    >>> count_parameters(layer, {"weight": torch.tensor([[True, False], [False, True]])}).sparsity_of_targets
    0.5
    """
    masks = masks or {}
    parameters = {canonical_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    masked = {name: int((~mask).sum()) for name, mask in masks.items()}
    zeros = sum(int(((parameters[name] == 0) & mask.to(parameters[name].device)).sum()) for name, mask in masks.items())
    return Counts(
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        targets=sum(mask.numel() for mask in masks.values()),
        masked=sum(masked.values()),
        zeros=zeros,
    )


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
