"""What a weight reads: hooks on its modules, and their inputs cut into observations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.calibration.run import Watched
from niwaki.errors import InputError
from niwaki.layout import Layout, is_transposed_linear, layout_of
from niwaki.masks import canonical_name, is_sharded

OBSERVED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)
"""Module classes whose inputs can be observed."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

CHUNK = 2**22
"""How many numbers are cut out at a time: memory stays bounded, whatever a batch holds."""


def modules_of(model: nn.Module, tensors: Sequence[Watched]) -> Iterator[tuple[Watched, nn.Module]]:
    """Yield every module that reads with one of the weights, and can be observed; shared weights come several times."""
    by_parameter = {one.parameter: one for one in tensors}
    sharded = {one.name: one for one in tensors if is_sharded(one.parameter)}  # while it is gathered, the parameter is another object
    for path, module in model.named_modules():
        if isinstance(module, OBSERVED) or is_transposed_linear(module):
            for name, weight in module.named_parameters(recurse=False):
                one = by_parameter.get(weight) or sharded.get(canonical_name(f"{path}.{name}".lstrip(".")))
                own = None if one is None else layout_of(module, name, tuple(weight.shape))
                if (
                    one is not None and own is not None and own.roles == one.layout.roles
                ):  # an embedding may share its weight with a linear layer
                    yield one, module


@contextmanager
def before_reading(model: nn.Module, tensors: Sequence[Watched], look: Callable[[Watched, Any, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``look(weight, module, inputs)`` whenever a module reads with one of the weights; what it returns is read instead.

    Raises:
        InputError: at the end, if a weight has read nothing.
    """
    seen: set[str] = set()

    def hook(one: Watched, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.add(one.name)
        instead = look(one, module, args[0] if args else kwargs["input"])
        if instead is None:
            return None
        return ((instead, *args[1:]), kwargs) if args else (args, {**kwargs, "input": instead})

    with ExitStack() as hooks:
        for one, module in modules_of(model, tensors):
            hooks.callback(module.register_forward_pre_hook(partial(hook, one), with_kwargs=True).remove)
        yield
    for one in tensors:
        if one.name not in seen:
            raise InputError(
                f"{one.name}: what it reads cannot be observed, for its module is not called on data (as the projections inside"
                " nn.MultiheadAttention), or is no linear, convolution or embedding layer; exclude it from the target"
            )


def entries(module: nn.Module, layout: Layout, inputs: Tensor) -> Tensor:
    """Return what a module reads as ``[examples, positions, inputs]``, a view where possible.

    An example is an entry of the first dimension; an input without that dimension is one example. Words are one-hot vectors.
    """
    if isinstance(module, nn.Embedding):
        words = inputs.reshape(len(inputs), -1) if inputs.ndim else inputs.reshape(1, 1)
        return functional.one_hot(words, module.num_embeddings)
    width = len(layout.kernel)
    if width:
        batched = inputs if inputs.ndim == width + 2 else inputs.unsqueeze(0)
        return batched.movedim(1, -1).flatten(1, -2)
    return inputs.reshape(1 if inputs.ndim == 1 else len(inputs), -1, inputs.shape[-1])


def input_chunks(module: nn.Module, layout: Layout, inputs: Tensor) -> Iterator[Tensor]:
    """Yield what a module reads as ``[observations, inputs]``, a part at a time."""
    if isinstance(module, nn.Embedding):
        for words in torch.split(inputs.flatten(), max(1, CHUNK // module.num_embeddings)):
            yield functional.one_hot(words, module.num_embeddings)
        return
    observations = entries(module, layout, inputs).flatten(0, 1)
    yield from torch.split(observations, max(1, CHUNK // max(1, observations.shape[1])))


def column_chunks(module: nn.Module, layout: Layout, inputs: Tensor, name: str) -> Iterator[Tensor]:
    """Yield the columns that a module multiplies with, ``[observations, groups, columns]``, a part of the observations at a time.

    Of a convolution they are what ``unfold`` cuts out at every output position, in the order of :func:`niwaki.layout.matrix`.

    Raises:
        InputError: of a transposed convolution, which reads no columns.
    """
    groups = layout.size("group")
    if isinstance(module, _TRANSPOSED):
        raise InputError(
            f"{name}: a transposed convolution spreads its inputs and reads no columns of them, so second moments of columns are not"
            " defined for it; choose a saliency of inputs or gradients, or exclude it from the target"
        )
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        for part in input_chunks(module, layout, inputs):
            yield part.reshape(len(part), groups, -1)
        return
    windows = _windows(module, inputs)
    places, depth = windows.shape[1 : 1 + len(layout.kernel)], len(layout.kernel)
    columns = windows.shape[1 + depth] * prod(layout.kernel)
    examples = max(1, CHUNK // max(1, prod(places) * columns))
    rows = max(1, CHUNK // max(1, prod(places[1:]) * columns)) if examples == 1 else places[0]
    for few in torch.split(windows, examples):
        for part in torch.split(few, max(1, rows), dim=1):
            yield part.reshape(-1, groups, columns // groups)


def column_squares(module: nn.Module, layout: Layout, inputs: Tensor, name: str) -> tuple[Tensor, int]:
    """Return the sum of the squares of each column, ``[groups, columns]``, and the number of observations, without cutting columns out.

    Raises:
        InputError: of a transposed convolution.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        windows = _windows(module, inputs.double().square())
        places = list(range(1 + len(layout.kernel)))
        return windows.sum(dim=places).reshape(layout.size("group"), -1), prod(windows.shape[: len(places)])
    total, count = torch.zeros(layout.size("group"), layout.size("input"), dtype=torch.float64, device=inputs.device), 0
    for columns in column_chunks(module, layout, inputs, name):
        total, count = total + columns.double().square().sum(dim=0), count + len(columns)
    return total, count


def _windows(module: Any, inputs: Tensor) -> Tensor:
    """Return the view ``[examples, *output positions, channels, *kernel]`` of the padded inputs of a convolution."""
    depth = len(module.kernel_size)
    batched = inputs if inputs.ndim == depth + 2 else inputs.unsqueeze(0)
    around = list(module._reversed_padding_repeated_twice)  # what padding= means, 'same' included, as functional.pad takes it
    padded = functional.pad(batched, around, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    for d, (size, step, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        padded = padded.unfold(2 + d, gap * (size - 1) + 1, step)[..., ::gap]
    return padded.movedim(1, 1 + depth)


@contextmanager
def after_writing(model: nn.Module, tensors: Sequence[Watched], change: Callable[[Watched, Tensor], Tensor]) -> Iterator[None]:
    """Put ``change(weight, outputs)`` in the place of whatever a module puts out that reads with one of the weights."""

    def hook(one: Watched, module: nn.Module, args: Any, outputs: Tensor) -> Tensor:
        return change(one, outputs)

    with ExitStack() as hooks:
        for one, module in modules_of(model, tensors):
            hooks.callback(module.register_forward_hook(partial(hook, one)).remove)
        yield


def positions(outputs: Tensor, layout: Layout) -> Tensor:
    """Return what a module puts out as ``[observations, groups, rows]``."""
    depth = len(layout.kernel)
    last = outputs
    if depth:
        last = (outputs if outputs.ndim == depth + 2 else outputs.unsqueeze(0)).movedim(1, -1)
    return last.reshape(-1, layout.size("group"), last.shape[-1] // layout.size("group"))


def zeros_like_reading(inputs: Tensor, name: str) -> Tensor:
    """Return a zero to add to what is read, whose gradient is that of what is read.

    Raises:
        InputError: words are read.
    """
    if not inputs.is_floating_point():
        raise InputError(f"{name}: it reads words, which have no gradient; exclude embeddings from the target")
    return torch.zeros_like(inputs, requires_grad=True)
