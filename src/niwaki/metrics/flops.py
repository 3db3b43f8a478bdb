"""Floating-point operations of a forward pass, dense and sparse, from the shapes that an example really has.

A weight that is used ``u`` times in a forward pass (once for each output position of a convolution, each token of a linear layer, each
time step of a recurrent one) costs ``u`` multiply-adds, and a multiply-add is 2 FLOPs. A masked weight costs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from niwaki.layout import is_transposed_linear
from niwaki.masks import canonical_name

DEFINITION = (
    "2 per multiply-add, per example: each active weight as often as the forward pass uses it, and products between activations, without"
    " biases, normalization, activation functions and look-ups; saved only by software that skips masked weights"
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_COUNTED = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED, *_EMBEDDINGS, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class LayerFlops:
    """Forward FLOPs per example of one weight tensor.

    Attributes:
        name: canonical parameter name.
        elements: number of weights.
        active: number of weights that are not masked.
        dense: FLOPs when all are used.
        sparse: FLOPs when only the active ones are used.
    """

    name: str
    elements: int
    active: int
    dense: float
    sparse: float


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs per example of a model: its weight tensors, and the products between activations (attention)."""

    layers: tuple[LayerFlops, ...]
    activation_products: float

    @property
    def dense(self) -> float:
        """FLOPs when all weights are used."""
        return sum(layer.dense for layer in self.layers) + self.activation_products

    @property
    def sparse(self) -> float:
        """FLOPs when only the active weights are used."""
        return sum(layer.sparse for layer in self.layers) + self.activation_products


def forward_flops(
    model: nn.Module, example: tuple[Any, ...], *, examples: int | None = None, masks: Mapping[str, Tensor] | None = None
) -> Flops:
    """Count the forward FLOPs per example of a model, dense and with masks.

    ``FLOPs = 2 Σ_w uses(w)`` over all weights (dense) or those that are not masked (sparse), plus the products between activations.

    Args:
        model: any model; it is run once in evaluation mode without gradients, and left as it was.
        example: positional arguments of one forward pass.
        examples: how many examples ``example`` holds; by default the first dimension of its first tensor.
        masks: canonical parameter name -> bool tensor, True = active; parameters without a mask are dense.

    >>> from torch import nn
    >>> flops = forward_flops(nn.Linear(3, 4), (torch.ones(5, 3),))
    >>> flops.dense
    24.0
    """
    count = _examples(example) if examples is None else examples
    masks = masks or {}
    model = _eager(model)
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    with observing(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        uses, counted, measured = _record(model, lambda: model(*example), counter.get_total_flops)
        total = counter.get_total_flops()
    layers = []
    for name, chunks in uses.items():
        weight = chunks.weight if chunks.weight is not None else parameters[name]
        mask = masks.get(name)
        active = torch.ones((), dtype=torch.bool, device=weight.device).expand(weight.shape) if mask is None else mask
        per_chunk = active.reshape(len(chunks.uses), -1).sum(dim=1).tolist()
        size = weight.numel() // len(chunks.uses)
        layers.append(
            LayerFlops(
                name=name,
                elements=weight.numel(),
                active=sum(per_chunk),
                dense=2 * size * sum(chunks.uses) / count,
                sparse=2 * sum(n * u for n, u in zip(per_chunk, chunks.uses, strict=True)) / count,
            )
        )
    return Flops(tuple(layers), max(0.0, total - counted + measured) / count)


def weight_uses(model: nn.Module, example_call: Callable[[], Any], *, examples: int = 1) -> dict[str, float]:
    """Return how often one forward pass uses each weight of every parameter: multiply-adds per weight and example.

    1 for a linear layer on one vector, the number of tokens on a sequence, the number of output positions for a convolution (of input
    positions for a transposed one), the number of time steps for a recurrent layer, 0 for an embedding; tied weights add up. For the
    packed projection of attention it is the mean over query, key and value. Parameters that no layer with weights uses are left out.

    Args:
        model: any model; it is observed in evaluation mode without gradients, and left as it was.
        example_call: runs the forward pass, such as ``lambda: model(inputs)``.
        examples: how many examples that pass holds.

    >>> from torch import nn
    >>> layer = nn.Conv2d(1, 1, 3)
    >>> weight_uses(layer, lambda: layer(torch.ones(2, 1, 6, 6)), examples=2)
    {'weight': 16.0}
    """
    inner = _eager(model)
    with observing(inner), torch.no_grad():
        uses, _, _ = _record(inner, example_call, lambda: 0)
    return {name: sum(chunks.uses) / len(chunks.uses) / examples for name, chunks in uses.items()}


@dataclass
class _Chunks:
    """Uses of equal parts of a weight along its first dimension; the weight itself when it is no parameter of the model."""

    uses: list[float]
    weight: Tensor | None = None


def _record(model: nn.Module, call: Callable[[], Any], flops_so_far: Callable[[], int]) -> tuple[dict[str, _Chunks], float, float]:
    """Run ``call`` and return the uses by parameter, the FLOPs that the counter saw inside the counted layers, and the part of those
    that are products between activations (inside attention)."""
    names = {id(parameter): canonical_name(name) for name, parameter in model.named_parameters()}
    uses: dict[str, _Chunks] = {}
    starts: list[int] = []
    counted = measured = 0.0

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        starts.append(flops_so_far())

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal counted, measured
        seen = flops_so_far() - starts.pop()
        own = 0.0
        for attribute, parts in _uses(module, args, kwargs, output):
            weight = getattr(module, attribute) if "." not in attribute else module.get_parameter(attribute)
            name = names.get(id(weight))
            key = f"{paths[id(module)]}.{attribute}".lstrip(".") if name is None else name
            entry = uses.setdefault(key, _Chunks([0.0], weight if name is None else None))
            longest = max(len(entry.uses), len(parts))  # 1 or 3: a tied weight may be plain in one layer and packed in another
            entry.uses = [entry.uses[i % len(entry.uses)] + parts[i % len(parts)] for i in range(longest)]
            own += 2 * weight.numel() * sum(parts) / len(parts)
        if not starts:  # the outermost counted layer
            counted += seen
            measured += max(0.0, seen - own) if isinstance(module, nn.MultiheadAttention) else 0.0

    paths = {id(module): canonical_name(path) for path, module in model.named_modules()}
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _COUNTED) or is_transposed_linear(module):
                # Hooks of nested counted layers (the output projection inside attention) never fire: attention bypasses their forward.
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        call()
    return uses, counted, measured


def _uses(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Iterator[tuple[str, list[float]]]:
    """Yield each weight of a layer with the uses of its equal parts along the first dimension."""
    if isinstance(module, nn.MultiheadAttention):
        query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value")))
        tokens = [query.numel() / module.embed_dim, key.numel() / module.kdim, value.numel() / module.vdim]
        if module.in_proj_weight is not None:
            yield "in_proj_weight", tokens
        else:
            for attribute, count in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), tokens, strict=True):
                yield attribute, [count]
        yield "out_proj.weight", [tokens[0]]
        return
    first: Any = args[0] if args else kwargs.get("input")
    if isinstance(module, nn.Linear):
        yield "weight", [output.numel() / module.out_features]
    elif is_transposed_linear(module):
        yield "weight", [output.numel() / module.nf]
    elif isinstance(module, _CONVOLUTIONS):
        yield "weight", [output.numel() / module.out_channels]
    elif isinstance(module, _TRANSPOSED):
        yield "weight", [first.numel() / module.in_channels]
    elif isinstance(module, _EMBEDDINGS):
        yield "weight", [0.0]
    else:
        inputs: Any = first.data if isinstance(first, nn.utils.rnn.PackedSequence) else first
        for attribute in [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight_")]:
            yield attribute, [inputs.numel() / module.input_size]


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Run the model plainly (evaluation mode, no compiled graph, no fused attention) and leave modes and random state as they were."""
    modes = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        if "torch._dynamo" in sys.modules:  # slow to import, and without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, training in modes:
                module.training = training


def _eager(model: nn.Module) -> nn.Module:
    """Return the module that a compiled model wraps."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def _examples(example: tuple[Any, ...]) -> int:
    return next((len(value) for value in example if isinstance(value, Tensor) and value.dim() > 0), 1)
