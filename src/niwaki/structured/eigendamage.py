"""EigenDamage: units that go are directions in the eigenbasis of a layer's Fisher matrix, and layers become bottlenecks.

Under K-FAC, ``F = A ⊗ G`` is the curvature of a layer ``s = W a``. In the eigenbases of both factors the weights ``W* = Q_Gᵀ W Q_A`` do
not interact, so that what the removal of a rotated unit costs is a plain sum, and correlated channels can be removed together.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from niwaki.calibration import Watched, collect, first_pair, forward
from niwaki.curvature.matrices import finite
from niwaki.errors import InputError
from niwaki.masks import canonical_name, is_sharded
from niwaki.metrics.units import show
from niwaki.selection import kept, select
from niwaki.statistics import KroneckerFactors
from niwaki.statistics.base import Labels
from niwaki.structured.running import evaluating
from niwaki.target import Target, TargetWeight, Weights, select_targets

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """What became of one layer.

    Attributes:
        name: path of the module in the model.
        inputs: rotated inputs, all of them.
        outputs: rotated outputs, all of them.
        kept_inputs: those that stay.
        kept_outputs: those that stay.
        parameters: of the weight before.
        parameters_after: of the weight, or of the rotations and the core, after.
        form: ``untouched``; ``projected``, the layer as it was with other weights; or the bottleneck that it became, by what is rotated:
            ``inputs``, ``outputs`` or ``both``.
        loss_change: ``½ tr(G Δ A Δᵀ)`` of the change Δ of its weight, what K-FAC expects the loss to rise by.
    """

    name: str
    inputs: int
    outputs: int
    kept_inputs: int
    kept_outputs: int
    parameters: int
    parameters_after: int
    form: str
    loss_change: float


@dataclass(frozen=True)
class EigenDamage:
    """What :func:`eigendamage` returns.

    Attributes:
        model: a copy of the model with bottlenecks.
        layers: its layers that could be rotated.
        notes: what a user should know.
    """

    model: nn.Module
    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def sparsity(self) -> float:
        """Share of all rotated units that is gone."""
        units = sum(layer.inputs + layer.outputs for layer in self.layers)
        return 1.0 - sum(layer.kept_inputs + layer.kept_outputs for layer in self.layers) / units

    def to_data(self) -> dict[str, Any]:
        """Return everything but the model as plain data for JSON."""
        return {"sparsity": self.sparsity, "layers": [asdict(layer) for layer in self.layers], "notes": list(self.notes)}

    def __str__(self) -> str:
        """Return a table of the layers."""
        head = ("layer", "inputs kept", "outputs kept", "weights", "after", "rotated", "loss change")
        rows = [
            (
                layer.name,
                f"{layer.kept_inputs} of {layer.inputs}",
                f"{layer.kept_outputs} of {layer.outputs}",
                f"{layer.parameters:,}",
                f"{layer.parameters_after:,}",
                layer.form,
                f"{layer.loss_change:.3g}",
            )
            for layer in self.layers
        ]
        before, after = (sum(getattr(layer, key) for layer in self.layers) for key in ("parameters", "parameters_after"))
        change = f"{sum(layer.loss_change for layer in self.layers):.3g}"
        rows.append(("all of these", "", "", f"{before:,}", f"{after:,}", "", change))
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *self.notes])


@dataclass(frozen=True)
class Basis:
    """The Kronecker eigenbasis of one layer, and what the removal of each of its units alone costs. All float64.

    Attributes:
        inputs: eigenvectors ``Q_A`` of the inputs, ``[inputs, inputs]``, one a column.
        outputs: eigenvectors ``Q_G`` of the outputs, ``[outputs, outputs]``, one a column.
        input_scores: ``[inputs]``.
        output_scores: ``[outputs]``.
    """

    inputs: Tensor
    outputs: Tensor
    input_scores: Tensor
    output_scores: Tensor


def basis_of(weight: Tensor, inputs: Tensor, gradients: Tensor) -> Basis:
    """Return the eigenbasis of a layer's Kronecker factors, with the scores of its rotated units.

    Of a linear layer the score of a unit is the sum of ``½ W*² ⊙ (λ_G λ_Aᵀ)`` over its row or column.

    Of a convolution, Q_A rotates channels, so that rotations are 1x1 convolutions and the kernel stays in the core: it has the eigenvectors
    of the mean of A's diagonal blocks over kernel positions. The score is ``½ tr(G Δ A Δᵀ)`` of the unit's removal Δ, which counts the
    correlation between its positions too.

    Args:
        weight: ``[outputs, inputs, positions]``.
        inputs: A, ``[inputs * positions, inputs * positions]``, positions the faster index.
        gradients: G, ``[outputs, outputs]``.

    >>> weight = torch.tensor([[[1.0], [0.0]], [[0.0], [2.0]]])
    >>> basis = basis_of(weight, torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([4.0, 5.0])))
    >>> basis.output_scores.tolist(), basis.input_scores.tolist()
    ([2.0, 30.0], [2.0, 30.0])
    """
    weight, inputs, gradients = (values.to(torch.float64) for values in (weight, inputs, gradients))
    _, columns, positions = weight.shape
    blocks = inputs.reshape(columns, positions, columns, positions)
    eigenvalues, rows = torch.linalg.eigh(gradients)
    eigenvalues = eigenvalues.clamp(min=0)
    _, turned = torch.linalg.eigh(blocks.diagonal(dim1=1, dim2=3).mean(-1))
    by_output = (rows.T @ weight.flatten(1)).reshape(weight.shape)
    output_scores = 0.5 * eigenvalues * ((by_output.flatten(1) @ inputs) * by_output.flatten(1)).sum(1)
    core = torch.einsum("oik,ia->oak", by_output, turned)
    own = torch.einsum("ikal,ia->akl", torch.einsum("ikjl,ja->ikal", blocks, turned), turned)  # A*, of each input with itself
    input_scores = 0.5 * torch.einsum("o,oak,akl,oal->a", eigenvalues, core, own, core)
    return Basis(turned, rows, input_scores.clamp(min=0), output_scores.clamp(min=0))


def chosen(scores: Sequence[Tensor], sparsity: float, cap: float) -> list[Tensor]:
    """Return which units stay (bool): ``round((1 - sparsity) n)`` of all n, the highest, and of each tensor at least ``1 - cap``, and one.

    Raises:
        InputError: a number out of range, or fewer stay than each tensor must keep.

    >>> [mask.tolist() for mask in chosen([torch.tensor([5.0, 6.0, 4.0]), torch.tensor([0.1, 0.2])], 0.6, 1.0)]
    [[False, True, False], [False, True]]
    """
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity: {sparsity!r} is not in [0, 1)")
    if not 0 <= cap <= 1:
        raise InputError(f"cap: {cap!r} is not in [0, 1]")
    # A share times a number of units may come out just below or above a whole number.
    protected = [select([one], max(1, ceil((1 - cap) * len(one) - 1e-9)))[0] for one in scores]
    units, least = sum(map(len, scores)), sum(int(mask.sum()) for mask in protected)
    keep = kept(sparsity, units)
    if keep < least:
        raise InputError(
            f"sparsity: {sparsity:g} leaves {keep} of {units} rotated units, and {least} must stay (one a side of each layer, and what the"
            f" cap of {cap:g} says); at most {1 - least / units:.4f} is possible"
        )
    more = select(list(scores), keep - least, eligible=[~mask for mask in protected])
    return [mask | other for mask, other in zip(protected, more, strict=True)]


def eigendamage(
    model: nn.Module,
    sparsity: float,
    data: Iterable[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    *,
    cap: float = 0.95,
    target: Target | None = None,
    labels: Labels = "sampled",
    seed: int = 0,
    memory: int | None = None,
) -> EigenDamage:
    """Return a copy of a trained model without the rotated units whose removal costs least; the copy is meant to be fine-tuned.

    For every layer ``W' = Q_G,kept (Q_G,keptᵀ W Q_A,kept) Q_A,keptᵀ``. It becomes the sequence of input rotation, core and output rotation,
    with both rotations or one (the other is multiplied out), whatever has the fewest parameters; where that is the layer as it was,
    it stays, with the weight W'. Stride, padding and kernel belong to the core, the bias to the last of the sequence.

    All layers are ranked together by the loss that K-FAC expects; that is what normalization would spoil. Eigenvalues are never inverted: a
    direction without curvature costs nothing, and goes first.

    Args:
        model: stays as it is.
        sparsity: share of all rotated inputs and outputs that go, in [0, 1).
        data: batches ``(inputs, targets)``.
        loss: ``loss(outputs, targets)``, the mean over the examples.
        cap: largest share of one side of a layer that goes.
        target: which weights; those of linear layers and ungrouped convolutions can be rotated, others are left as they are and told.
        labels: of the Fisher matrix: ``sampled`` from the model's prediction, or ``given``.
        seed: of the sampled labels.
        memory: most bytes that the factors may take; None for no limit.

    Raises:
        InputError: no layer can be rotated, the sparsity or the memory is out of reach, factors are not finite, or the model does not run
            with bottlenecks because it reads a layer's weight without calling the layer.

    Source: Wang C., Grosse, Fidler, Zhang 2019, "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis".
    """
    (inputs, _), data = first_pair(data)
    layers, notes = _layers(model, target or Weights())
    chosen([torch.zeros(size) for one in layers for size in one.parameter.shape[1::-1]], sparsity, cap)  # refuses before the work
    request = KroneckerFactors(labels=labels)
    _require_memory({one.name: request.memory(one.layout) for one in layers}, memory)
    watched = [Watched(one.name, one.parameter, one.layout) for one in layers]
    found = collect(model, data, loss, watched, [request], seed=seed)
    factors = {name: (values[request][0][0], values[request][1][0]) for name, values in found.items()}
    rows, smaller = decomposed(model, layers, factors, sparsity, cap)
    try:
        with evaluating(smaller), torch.no_grad():
            forward(smaller, inputs)
    except Exception as error:
        raise InputError(
            f"model: {type(model).__name__} does not run with bottlenecks ({error}): it reads the weight of a layer without calling the"
            " layer; exclude that one from the target"
        ) from error
    notes += [
        f"{row.name}: no bottleneck has fewer than its {row.parameters:,} weights; it keeps its shape, with the weight projected"
        for row in rows
        if row.form == "projected"
    ]
    return EigenDamage(smaller, rows, tuple(notes))


def decomposed(
    model: nn.Module, layers: Sequence[TargetWeight], factors: Mapping[str, tuple[Tensor, Tensor]], sparsity: float, cap: float
) -> tuple[tuple[Layer, ...], nn.Module]:
    """Return what becomes of each layer, and the copy of the model in which it has.

    Args:
        model: stays as it is.
        layers: of linear layers and ungrouped convolutions.
        factors: name of the weight -> A and G, as for :func:`basis_of`.
        sparsity: share of all rotated units that go.
        cap: largest share of one side of a layer that goes.
    """
    weights = {one.name: _matrices(one.parameter) for one in layers}
    bases = {}
    for name, (of_inputs, of_gradients) in factors.items():
        bases[name] = basis_of(weights[name], finite(of_inputs, name, "input factor"), finite(of_gradients, name, "gradient factor"))
    masks = chosen([scores for one in layers for scores in (bases[one.name].input_scores, bases[one.name].output_scores)], sparsity, cap)
    smaller, rows = copy.deepcopy(model), []
    for one, inputs, outputs in zip(layers, masks[::2], masks[1::2], strict=True):
        weight, basis = weights[one.name], bases[one.name]
        sides = (basis.inputs[:, inputs], basis.outputs[:, outputs])
        form, count = _smallest(weight, *sides)
        change = 0.0
        if form != "untouched":
            core = torch.einsum("ob,oik,ia->bak", sides[1], weight, sides[0])
            gone = (weight - torch.einsum("ob,bak,ia->oik", sides[1], core, sides[0])).flatten(1)
            a, g = (values.to(torch.float64) for values in factors[one.name])
            change = 0.5 * float(((g @ gone) * (gone @ a)).sum())
            smaller = _put(smaller, one.module_name, _bottleneck(smaller.get_submodule(one.module_name), core, sides, form))
        shape = (len(inputs), len(outputs), int(inputs.sum()), int(outputs.sum()))
        rows.append(Layer(one.module_name, *shape, weight.numel(), count, form, change))
    return tuple(rows), smaller


def _layers(model: nn.Module, target: Target) -> tuple[list[TargetWeight], list[str]]:
    """Return the layers that can be rotated, and why others cannot."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(canonical_name(name))
    found, notes = [], []
    for one in select_targets(model, target)[0]:
        module = model.get_submodule(one.module_name)
        if is_sharded(one.parameter):
            raise InputError(f"model: {one.name!r} is sharded; rotate the whole model, and shard the smaller one")
        why = ""
        if type(module) is not nn.Linear and type(module) not in CONVOLUTIONS:
            why = f"{type(module).__name__} is neither a linear layer nor a convolution"
        elif getattr(module, "groups", 1) > 1:
            why = "it is a grouped convolution, whose groups a rotation would mix"
        elif len(names[id(one.parameter)]) > 1:
            why = f"its weight is that of {names[id(one.parameter)][1]} too"
        if why:
            notes.append(f"{one.name} stays as it is: {why}")
        else:
            found.append(one)
    if not found:
        raise InputError(f"target: no layer can be rotated ({'; '.join(notes)}); linear layers and ungrouped convolutions can")
    return found, notes


def _require_memory(needed: Mapping[str, int], memory: int | None) -> None:
    if memory is None or sum(needed.values()) <= memory:
        return
    fitting, left = [], memory
    for name, size in sorted(needed.items(), key=lambda one: one[1]):
        if size <= left:
            fitting.append(name)
            left -= size
    largest = max(needed, key=lambda name: needed[name])
    raise InputError(
        f"memory: the Kronecker factors need {show(sum(needed.values()), 'bytes')}, {show(needed[largest], 'bytes')} of it for {largest},"
        f" and {show(memory, 'bytes')} are allowed; "
        + (f"they would fit for {', '.join(fitting)}: exclude the other layers from the target" if fitting else "no layer would fit")
    )


def _matrices(weight: Tensor) -> Tensor:
    """Return a weight as ``[outputs, inputs, positions]``, float64."""
    return weight.detach().to(torch.float64).reshape(*weight.shape[:2], -1)


def _smallest(weight: Tensor, inputs: Tensor, outputs: Tensor) -> tuple[str, int]:
    """Return the form with the fewest weights, the one with fewest rotations among equal ones, and its number of weights."""
    (rows, columns, positions), a, b = weight.shape, inputs.shape[1], outputs.shape[1]
    if (a, b) == (columns, rows):
        return "untouched", weight.numel()
    sizes = {
        "projected": weight.numel(),
        "inputs": columns * a + a * rows * positions,
        "outputs": columns * b * positions + b * rows,
        "both": columns * a + a * b * positions + b * rows,
    }
    form = min(sizes, key=lambda one: sizes[one])
    return form, sizes[form]


def _bottleneck(module: Any, core: Tensor, sides: tuple[Tensor, Tensor], form: str) -> nn.Module:
    """Return what stands for a layer: itself with a new weight, or a sequence.

    Args:
        module: linear or a convolution; it is changed.
        core: ``[kept outputs, kept inputs, positions]``.
        sides: kept eigenvectors of inputs and outputs, one a column.
        form: as in :class:`Layer`.
    """
    inputs, outputs = sides
    if form in ("outputs", "projected"):
        core = torch.einsum("bak,ia->bik", core, inputs)
    if form in ("inputs", "projected"):
        core = torch.einsum("ob,bak->oak", outputs, core)
    kernel = tuple(module.weight.shape[2:])
    if form == "projected":
        with torch.no_grad():
            module.weight.copy_(core.reshape(module.weight.shape))
        return module  # type: ignore[no-any-return]
    point = (1,) * len(kernel)
    parts: dict[str, nn.Module] = {}
    if form in ("inputs", "both"):
        parts["inputs"] = _like(module, inputs.T.reshape(*inputs.T.shape, *point), None, {})
    settings = {} if isinstance(module, nn.Linear) else {k: getattr(module, k) for k in ("stride", "padding", "dilation", "padding_mode")}
    last = form == "inputs"
    parts["core"] = _like(module, core.reshape(*core.shape[:2], *kernel), module.bias if last else None, settings)
    if not last:
        parts["outputs"] = _like(module, outputs.reshape(*outputs.shape, *point), module.bias, {})
    made = nn.Sequential(OrderedDict(parts))
    return made.train(module.training)


def _like(module: Any, weight: Tensor, bias: nn.Parameter | None, settings: Mapping[str, Any]) -> nn.Module:
    """Return a layer of the same class, with this weight and bias."""
    own, shape = module.weight, tuple(weight.shape)
    kernel = {} if isinstance(module, nn.Linear) else {"kernel_size": shape[2:]}
    settings = {**kernel, **settings, "bias": False, "device": own.device, "dtype": own.dtype}
    made: Any = skip_init(type(module), shape[1], shape[0], **settings)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        made.weight.copy_(weight)
    made.weight.requires_grad_(own.requires_grad)
    made.bias = bias
    return made  # type: ignore[no-any-return]


def _put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put a module where another one is, and return the model: the module itself where it stands for the whole."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module
    return model
