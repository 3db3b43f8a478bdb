"""Noise of weights, added to what their modules return: the local reparametrization.

With independent Gaussian weights of mean ``m`` and variance ``v`` a linear map's output is Gaussian with mean ``x m`` and variance
``x^2 v``. Drawing that, for each example by itself, has far less variance in its gradients than drawing the weights (Kingma, Salimans,
Welling 2015, variational dropout and the local reparameterization trick).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.interpose import Handle, interpose, unreached
from niwaki.masked import MaskedTensor

SMALLEST_VARIANCE = 1e-16
"""Added before the square root, whose derivative has no value at zero."""

Spread = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""A module, its squared input, and the variance of its weight -> the variance of its output."""


def _linear(module: Any, squared: Tensor, variance: Tensor) -> Tensor:
    return F.linear(squared, variance)


def _convolution(module: Any, squared: Tensor, variance: Tensor) -> Tensor:
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[variance.ndim]
    return convolve(squared, variance, None, module.stride, module.padding, module.dilation, module.groups)


SPREADS: Mapping[type[nn.Module], Spread] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
}


def add_noise(model: nn.Module, tensors: Iterable[MaskedTensor]) -> list[Handle]:
    """Add the noise of these tensors to the outputs of their modules while they train; the handles take it off.

    Raises:
        InputError: a tensor belongs to a module whose output's variance is not known, or that its parents do not call.
    """
    owners = {
        module.weight: (path, module) for path, module in model.named_modules() if isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    silent = unreached(model)
    handles: list[Handle] = []
    try:
        for tensor in tensors:
            path, module = owners.get(tensor.bound.parameter, ("", None))
            reason = None
            if tensor.bound.group is not None:
                reason = "it is sharded"
            elif module is None or type(module) not in SPREADS or getattr(module, "padding_mode", "zeros") != "zeros":
                kinds = ", ".join(kind.__name__ for kind in SPREADS)
                reason = f"it is not the weight of one of {kinds} with zero padding"
            elif path in silent and "MultiheadAttention" in silent[path]:
                reason = silent[path]
            if reason is not None:
                name = tensor.recipe.relaxation.name
                raise InputError(
                    f"relaxation.{name}: noise cannot be added to the outputs of {tensor.bound.name}: {reason}; say noise: weight"
                )
            assert module is not None
            handles.append(interpose(module, _Noise(module, tensor)))
    except InputError:
        for handle in handles:
            handle.remove()
        raise
    return handles


class _Noise:
    """Adds noise to the output of one module."""

    def __init__(self, module: nn.Module, tensor: MaskedTensor) -> None:
        self._module, self._tensor = module, tensor

    def __call__(self, forward: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        outputs = forward(inputs)
        if not self._module.training:
            return outputs
        weight = self._module.weight
        assert isinstance(weight, Tensor)
        variance = self._tensor.recipe.relaxation.variance(weight.view(self._tensor.bound.here.shape), self._tensor.own)
        assert variance is not None
        with torch.autocast(inputs.device.type, enabled=False):  # squares leave the range of float16
            spread = SPREADS[type(self._module)](self._module, inputs.to(variance.dtype).square(), variance.view(weight.shape))
        return outputs + (spread + SMALLEST_VARIANCE).sqrt().to(outputs.dtype) * torch.randn_like(outputs)
