"""Statistics of batch normalization, estimated anew."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from niwaki.calibration.passes import forward, pairs, preserved
from niwaki.calibration.run import plain
from niwaki.errors import InputError
from niwaki.metrics.flops import observing
from niwaki.statistics import Covariance


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, data: Iterable[tuple[Any, Any]]) -> int:
    """Replace the running statistics of every batch normalization by those of the data; return how many were replaced.

    The model runs in evaluation mode but for its batch normalizations, which normalize by the batch, as in training. A running mean is then
    the mean of all that was read, and a running variance the variance around it (denominator: observations less one), over all batches and
    ranks: a cumulative average in which larger batches weigh more and the differences between batches count. Everything else stays.

    Args:
        model: any module.
        data: batches ``(inputs, targets)``; targets are not looked at.

    Raises:
        InputError: there is no batch, or a channel has a single value in one.

    >>> model = nn.BatchNorm1d(1)
    >>> recalibrate_batchnorm(model, [(torch.tensor([[1.0], [2.0]]), None), (torch.tensor([[3.0], [6.0]]), None)])
    1
    >>> model.running_mean.item(), round(model.running_var.item(), 4)
    (3.0, 4.6667)
    """
    model = plain(model)
    found: dict[_BatchNorm, Covariance] = {}

    def look(name: str, module: _BatchNorm, args: tuple[Tensor, ...]) -> None:
        values = args[0].movedim(1, -1).flatten(0, -2)
        if len(values) < 2:
            raise InputError(f"data: a batch has a single value for each channel of {name}, and no variance; give larger batches")
        found.setdefault(module, Covariance(full=False)).update(values)

    with preserved(model), observing(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.train()
                hooks.callback(module.register_forward_pre_hook(partial(look, name)).remove)
        for inputs, _ in pairs(data):
            forward(model, inputs)
    for module, covariance in found.items():
        covariance.all_reduce()
        assert module.running_mean is not None
        assert module.running_var is not None
        module.running_mean.copy_(covariance.mean)
        module.running_var.copy_(covariance.value(unbiased=True))
    return len(found)
