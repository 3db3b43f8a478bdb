"""Units that are the same number for every input, and biases that take that number over.

A unit whose weights are all masked is a constant ``c`` wherever it is read, if nothing on the way depends on the input (a gate would).
What reads it can take it over exactly: ``b <- b + W[:, c] c``; a convolution only where its padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.counter import key, uniform
from niwaki.dependency import Example
from niwaki.layout import is_transposed_linear
from niwaki.removed import named_modules
from niwaki.structured.running import run

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Values = dict[tuple[str, int], Tensor]
"""(weight, its input dimension) -> what it reads in each entry: a number, nan where that differs between places or inputs."""


def observe(model: nn.Module, example: Example, weights: Iterable[tuple[str, int]]) -> Values:
    """Return what weights read, of those that are read by modules known to read them in their forward.

    The model runs on the example as it is, and once more with other weights: what is then the same number everywhere depends on no
    input. Weights that are zero stay zero, and biases, normalizations and buffers stay as they are.
    """
    modules = named_modules(model)
    readers: dict[tuple[str, int], tuple[nn.Module, int]] = {}
    for name, dim in weights:
        module = modules.get(name.rpartition(".")[0])
        axis = None if module is None else _axis(module, name.rpartition(".")[2], dim)
        if module is not None and axis is not None:
            readers[name, dim] = module, axis
    first = _seen(model, example, readers)
    with _other_weights(model):
        second = _seen(model, example, readers)
    found = {}
    for reader, seen in first.items():
        everywhere = torch.cat([seen, second[reader].to(seen)], dim=1) if reader in second else seen
        value = everywhere[:, :1]
        rounding = 100 * torch.finfo(value.dtype).eps
        same = torch.isclose(everywhere, value, rtol=rounding, atol=0.0).all(dim=1) & value[:, 0].isfinite()
        found[reader] = value[:, 0].masked_fill(~same, torch.nan)
    return found


def takes_over(model: nn.Module, weight: str, values: Tensor, bias_mask: Tensor | None) -> Tensor:
    """Return for which entries a weight's module can take constants over: bool, one for each value; zeros need nothing."""
    module = named_modules(model)[weight.rpartition(".")[0]]
    own = getattr(module, "bias", None)
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and not is_transposed_linear(module):
        return values == 0
    if own is None or _pads(module) or getattr(module, "groups", 1) != 1:
        return values == 0
    takes = values.isfinite()
    if bias_mask is not None and not bias_mask.all():
        shares = _by_output(module) * values[:, None].nan_to_num()
        takes &= (shares[:, ~bias_mask.to(shares.device)] == 0).all(dim=1)
    return takes


def fold(model: nn.Module, weight: str, values: Tensor, entries: Tensor) -> None:
    """Give a weight's module another bias: with what entries that are constants contribute to every output."""
    module: Any = named_modules(model)[weight.rpartition(".")[0]]
    chosen = entries & (values != 0) & values.isfinite()  # what is no constant is not read where it goes
    if chosen.any():
        module.bias.data = module.bias.data + values[chosen].to(module.bias) @ _by_output(module)[chosen].to(module.bias.dtype)


def _axis(module: nn.Module, own: str, dim: int) -> int | None:
    """Return the dimension of a module's input that a dimension of its weight reads, or None for what it does not read in its forward."""
    if isinstance(module, CONVOLUTIONS) and (own, dim) == ("weight", 1) and module.groups == 1:
        return -1 - len(module.kernel_size)
    if isinstance(module, TRANSPOSED) and (own, dim) == ("weight", 0):
        return -1 - len(module.kernel_size)
    if isinstance(module, nn.Linear) and (own, dim) == ("weight", 1):
        return -1
    if is_transposed_linear(module) and (own, dim) == ("weight", 0):
        return -1
    if isinstance(module, nn.RNNBase) and own in ("weight_ih_l0", "weight_ih_l0_reverse") and dim == 1:
        return -1
    return None


def _seen(model: nn.Module, example: Example, readers: Mapping[tuple[str, int], tuple[nn.Module, int]]) -> Values:
    """Return what each reader gets, all calls together: ``[entries, places]``."""
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def watch(key: tuple[str, int], axis: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if given is not None:
                seen.setdefault(key, []).append(given.detach().movedim(axis, 0).flatten(1))

        return hook

    handles = [module.register_forward_pre_hook(watch(key, axis), with_kwargs=True) for key, (module, axis) in readers.items()]
    try:
        run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return {key: torch.cat(parts, dim=1) for key, parts in seen.items()}


@contextmanager
def _other_weights(model: nn.Module) -> Iterator[None]:
    """Multiply every weight by a random number between -2 and 2 for a while."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1 and parameter.is_floating_point()]
    kept = [weight.detach().clone() for weight in weights]
    try:
        for place, weight in enumerate(weights):
            noise = uniform(key(0, place, "other weights"), 0, weight.numel()).view(weight.shape)
            weight.data.mul_((4.0 * noise - 2.0).to(weight))
        yield
    finally:
        for weight, before in zip(weights, kept, strict=True):
            weight.data.copy_(before)


def _pads(module: nn.Module) -> bool:
    """Return whether a convolution reads zeros around its input; other modes pad a constant with itself."""
    if not isinstance(module, CONVOLUTIONS) or module.padding_mode != "zeros":
        return False
    return module.padding == "same" or (module.padding != "valid" and any(module.padding))


def _by_output(module: Any) -> Tensor:
    """Return what one of each input adds to each output, summed over the kernel: ``[inputs, outputs]``."""
    weight: Tensor = module.weight.detach()
    if is_transposed_linear(module):
        return weight
    return weight.reshape(*weight.shape[:2], -1).sum(dim=2).T
