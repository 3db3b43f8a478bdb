"""Taking channels and units out of a model, exactly, and doing the same to a fresh one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, NiwakiError
from niwaki.masks import Masks
from niwaki.structured.chains import CONVOLUTIONS, NORMS, Chain, find_chains

Removed = dict[str, dict[str, list[int]]]
"""Tensor name -> dimension (as text) -> indices of the original tensor that were kept, increasing."""


@dataclass(frozen=True)
class Smaller:
    """What :func:`shrink` returns.

    Attributes:
        model: the smaller model.
        removed: what :func:`replay` needs to make a fresh model as small.
        masks: the masks of what is left.
        notes: sentences about what is masked as a whole and could not be removed, and why.
    """

    model: nn.Module
    removed: Removed
    masks: Masks
    notes: list[str]


def shrink(model: nn.Module, masks: Masks, example: tuple[Any, ...]) -> Smaller:
    """Return a copy of a model without the channels and units that do nothing, after checking that it computes the same.

    Linear layers and ungrouped convolutions become smaller, with the batch normalizations behind them; between a layer and those
    that read it there may be activation functions, dropout, pooling, flattening and means over other dimensions. Where outputs meet
    others (sums, concatenations) or go through anything else, the layer is left as it is. A channel goes when

    - no weight that reads it is active, or
    - no weight that makes it is active, so that it is a constant ``c`` for every input, and each layer that reads it can take that
      over: ``b <- b + W[:, c] c``, for a convolution only where its padding changes nothing. If ``c = 0`` there is nothing to take over.

    One channel of every layer stays in any case.

    Args:
        model: stays as it is; masked weights count as zero whatever they hold.
        masks: True = active; a weight without a mask is active.
        example: positional arguments of a forward pass.

    Raises:
        InputError: a mask that does not fit the model.
        NiwakiError: the smaller model's outputs on the example differ (in evaluation mode) by more than rounding.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> reads = torch.tensor([[True, False, True, False]]).expand(2, 4)
    >>> smaller = shrink(model, Masks({"2.weight": reads}), (torch.ones(1, 3),))
    >>> smaller.model[0].weight.shape, smaller.removed["0.bias"]
    (torch.Size([2, 3]), {'0': [0, 2]})
    """
    work = copy.deepcopy(model)
    masks.apply_(work)
    modes = [(module, module.training) for module in work.modules()]
    work.eval()
    removal = _Removal(work, dict(masks), example)
    with torch.no_grad():
        expected = work(*example)
        removal.run()
        _require_equal(work(*example), expected)
    for module, mode in modes:
        module.training = mode
    return Smaller(work, removal.removed, Masks(removal.masks), removal.notes)


def replay(model: nn.Module, removed: Mapping[str, Mapping[str, Sequence[int]]]) -> nn.Module:
    """Make a model of the original shape as small as :func:`shrink` made its copy, in place, and return it.

    The parameters are new ones: make optimizers afterwards.

    Raises:
        InputError: a tensor, dimension or index that the model does not have; the model is unchanged then.

    >>> replay(nn.Linear(3, 2), {"weight": {"1": [0, 2]}})
    Linear(in_features=2, out_features=2, bias=True)
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, dimensions in removed.items():
        for dimension, kept in dimensions.items():
            if name not in tensors or not 0 <= int(dimension) < tensors[name].ndim:
                raise InputError(f"removed: this {type(model).__name__} has no tensor {name!r} with a dimension {dimension}")
            size = tensors[name].shape[int(dimension)]
            if not kept or min(kept) < 0 or max(kept) >= size:
                raise InputError(f"removed: {name!r} has {size} entries along dimension {dimension}; the removal is of another model")
    for name, dimensions in removed.items():
        for dimension, kept in dimensions.items():
            _select(model, name, int(dimension), torch.tensor(kept))
    return model


def compose(first: Mapping[str, Mapping[str, Sequence[int]]], second: Mapping[str, Mapping[str, Sequence[int]]]) -> Removed:
    """Return the removal that does what two do one after the other.

    >>> compose({"weight": {"0": [1, 3, 5]}}, {"weight": {"0": [0, 2]}})
    {'weight': {'0': [1, 5]}}
    """
    both: Removed = {name: {d: list(kept) for d, kept in dimensions.items()} for name, dimensions in first.items()}
    for name, dimensions in second.items():
        for d, kept in dimensions.items():
            before = both.setdefault(name, {}).get(d)
            both[name][d] = [i if before is None else before[i] for i in kept]
    return both


class _Removal:
    """A model in evaluation mode that is made smaller in place, its masks, and what was removed so far."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], example: tuple[Any, ...]) -> None:
        self.model, self.masks, self.example = model, masks, example
        self.removed: Removed = {}
        self.notes: list[str] = []

    def run(self) -> None:
        """Remove until nothing more can be: what is removed leaves other channels unread."""
        try:
            chains = find_chains(self.model, self.example)
        except Exception as error:  # whatever a model's own code raises when it is given proxies
            why = str(error).strip().partition("\n")[0]
            self.notes.append(f"shrink removed nothing, as the model cannot be traced symbolically ({type(error).__name__}: {why})")
            return
        more = True
        while more:
            more = False
            for chain in chains:
                more |= not chain.reason and self._shorten(chain)
        self._tell_what_is_left(chains)

    def _active(self, name: str) -> Tensor:
        """Return between which outputs and inputs of a layer there is an active weight: bool, ``[outputs, inputs]``."""
        weight = self.model.get_parameter(f"{name}.weight")
        mask = self.masks.get(f"{name}.weight")
        whole = torch.ones(weight.shape, dtype=torch.bool, device=weight.device) if mask is None else mask.to(weight.device)
        return whole.flatten(2).any(dim=2) if whole.ndim > 2 else whole

    def _shorten(self, chain: Chain) -> bool:
        """Remove the outputs of a layer that have no effect; return whether there were any."""
        made = self._active(chain.producer).any(dim=1)
        read = torch.zeros_like(made)
        for name, block in chain.consumers.items():
            read |= self._active(name).view(-1, len(made), block).any(dim=2).any(dim=0)
        constant = read & ~made
        values = self._constants(chain) if constant.any() else {}
        for name, value in values.items():
            constant &= self._can_fold(name, value)
        gone = ~read | constant
        if gone.all():
            gone[0] = False
        if not gone.any():
            return False
        for name, value in values.items():
            self._fold(name, value, gone & read)
        keep = (~gone).nonzero().flatten()
        self._cut(chain.producer, 0, keep)
        for name, block in chain.norms.items():
            self._cut(name, 0, _entries(keep, block))
        for name, block in chain.consumers.items():
            self._cut(name, 1, _entries(keep, block))
        return True

    def _constants(self, chain: Chain) -> dict[str, Tensor]:
        """Return what each consumer reads of each channel: ``[channels, block]``, nan where that differs between places of the example.

        A channel whose weights are all masked is the same for every input, so one example tells what it is.
        """
        seen: dict[str, Tensor] = {}

        def watch(name: str) -> Any:
            return lambda _, inputs: seen.__setitem__(name, inputs[0].detach())

        handles = [self.model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in chain.consumers]
        try:
            self.model(*self.example)
        finally:
            for handle in handles:
                handle.remove()
        values = {}
        for name, block in chain.consumers.items():
            layer = self.model.get_submodule(name)
            axis = -1 - len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else -1
            everywhere = seen[name].movedim(axis, 0).flatten(1)
            first = everywhere[:, :1]
            same = torch.isclose(everywhere, first, rtol=1e-5, atol=0.0).all(dim=1)
            values[name] = first[:, 0].masked_fill(~same, torch.nan).view(-1, block)
        return values

    def _can_fold(self, name: str, value: Tensor) -> Tensor:
        """Return for which channels a layer can take over the constant: bool, ``[channels]``."""
        layer = self.model.get_submodule(name)
        pads = False
        if isinstance(layer, CONVOLUTIONS) and layer.padding_mode == "zeros":  # other modes pad a constant with itself
            pads = layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))
        return (value == 0).all(dim=1) if layer.bias is None or pads else value.isfinite().all(dim=1)

    def _fold(self, name: str, value: Tensor, channels: Tensor) -> None:
        """Add to a layer's bias what the channels contribute to every output."""
        chosen = channels & (value != 0).any(dim=1)
        if not chosen.any():
            return
        weight = self.model.get_parameter(f"{name}.weight")
        columns = weight[:, _entries(chosen.nonzero().flatten(), value.shape[1])]
        self.model.get_parameter(f"{name}.bias").add_(columns.reshape(*columns.shape[:2], -1).sum(dim=2) @ value[chosen].flatten())

    def _cut(self, owner: str, dimension: int, keep: Tensor) -> None:
        """Keep entries of all tensors of a module that have a dimension (0: weight, bias, statistics; 1: the weight), and of masks."""
        module = self.model.get_submodule(owner)
        for own, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None or tensor.ndim <= dimension:
                continue
            name = f"{owner}.{own}" if owner else own
            self.removed = compose(self.removed, {name: {str(dimension): keep.tolist()}})
            _select(self.model, name, dimension, keep)
            if name in self.masks:
                self.masks[name] = self.masks[name].index_select(dimension, keep.to(self.masks[name].device))

    def _tell_what_is_left(self, chains: Sequence[Chain]) -> None:
        """Note for every layer what is masked as a whole and still there."""
        understood = {name for chain in chains for name in chain.consumers if not chain.reason}
        for chain in chains:
            active = self._active(chain.producer)
            rows, columns = (int((~active.any(dim=dim)).sum()) for dim in (1, 0))
            if rows:
                why = chain.reason or "what they are without weights cannot be folded into what reads them, or one has to stay"
                self.notes.append(f"{chain.producer}: {rows} masked outputs were not removed: {why}")
            if columns:
                why = "others read them too, or one has to stay"
                if chain.producer not in understood:
                    feeders = (c for c in chains if c.reason and chain.producer in c.consumers)
                    why = next((f"{c.producer} makes them, and {c.reason}" for c in feeders), f"it reads {chain.source}")
                self.notes.append(f"{chain.producer}: {columns} masked inputs were not removed: {why}")


def _entries(channels: Tensor, block: int) -> Tensor:
    """Return the entries of channels that have ``block`` consecutive ones each."""
    return (channels[:, None] * block + torch.arange(block, device=channels.device)).flatten()


def _select(model: nn.Module, name: str, dimension: int, keep: Tensor) -> None:
    """Keep entries of a parameter or buffer along a dimension, and bring the module's own numbers in line."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, own)
    new = old.detach().index_select(dimension, keep.to(old.device)).contiguous()
    setattr(module, own, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)
    if isinstance(module, nn.Linear) and own == "weight":
        module.out_features, module.in_features = new.shape
    elif isinstance(module, CONVOLUTIONS) and own == "weight":
        module.out_channels, module.in_channels = new.shape[:2]
    elif isinstance(module, NORMS):
        module.num_features = len(new)


def _require_equal(found: Any, expected: Any) -> None:
    """Compare the outputs of two models.

    Raises:
        NiwakiError: they differ by more than rounding.
    """
    for a, b in zip(_tensors(found), _tensors(expected), strict=True):
        scale = max(float(b.abs().max()), 1.0) if b.numel() else 1.0
        worst = float((a - b).abs().max()) if a.shape == b.shape and b.numel() else 0.0
        if a.shape != b.shape or not worst <= min(1e3 * torch.finfo(b.dtype).eps, 0.05) * scale:
            raise NiwakiError(f"shrink changed what the model computes: outputs of size {scale:.3g} differ by {worst:.3g}")


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a model's outputs."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping):
        yield from (tensor for value in outputs.values() for tensor in _tensors(value))
    elif isinstance(outputs, list | tuple):
        yield from (tensor for value in outputs for tensor in _tensors(value))
