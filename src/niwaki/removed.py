"""What was taken out of a model and what was added to it, as data; and doing the same to another model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from niwaki.errors import InputError
from niwaki.layout import is_transposed_linear
from niwaki.masks import canonical_name, is_sharded, nearest
from niwaki.slots import forget_history, fresh_values

BLOCK_NUMBERS = ("layer_idx", "layer_id", "layer_number", "block_idx")
"""What modules call their own position among the blocks of a model."""

ADDED = -1
"""Stands for an entry that the original does not have."""


class Removed(BaseModel):
    """A change of sizes: names and indices of what was kept, and places of what was added. All names are those of the original model.

    Attributes:
        tensors: parameter or buffer -> dimension (as text) -> indices that were kept, increasing; -1 for each entry that was added.
        attributes: path of an integer that no shape tells (``blocks.0.attn.num_heads``) -> its new value.
        layers: ``ModuleList`` or ``Sequential`` -> positions that were kept, increasing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tensors: dict[str, dict[str, list[int]]] = Field(default_factory=dict)
    attributes: dict[str, int] = Field(default_factory=dict)
    layers: dict[str, list[int]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_indices(self) -> Removed:
        dimensions = ((f"{name!r} along dimension {d}", d, kept) for name, one in self.tensors.items() for d, kept in one.items())
        old = ((where, d, [i for i in kept if i != ADDED]) for where, d, kept in dimensions)
        for where, d, kept in (*old, *((repr(name), "0", kept) for name, kept in self.layers.items())):
            if not d.isdigit() or not kept or kept[0] < 0 or any(a >= b for a, b in pairwise(kept)):
                raise ValueError(f"the indices kept of {where} must be at least one, from 0, and increasing")
        return self

    def __bool__(self) -> bool:
        return bool(self.tensors or self.attributes or self.layers)

    @classmethod
    def of(cls, data: Removed | Mapping[str, Any]) -> Removed:
        """Return a removal that may be given as plain data.

        Raises:
            InputError: the data are no removal.
        """
        if isinstance(data, Removed):
            return data
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(["removed", *map(str, problem["loc"])])
            raise InputError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None

    def in_words(self) -> list[str]:
        """Return a sentence for people about each dimension, number and row of blocks.

        >>> Removed(tensors={"up.weight": {"0": [0, 2, -1]}}, attributes={"heads": 3}, layers={"blocks": [1]}).in_words()
        ['2 entries of up.weight kept along dimension 0, and 1 added', 'heads is 3', '1 block of blocks kept: 1']
        """
        cuts = ((name, d, kept, kept.count(ADDED)) for name, dimensions in self.tensors.items() for d, kept in dimensions.items())
        entries = [
            f"{_count(len(kept) - new, 'entry', 'entries')} of {name} kept along dimension {d}" + (f", and {new:,} added" if new else "")
            for name, d, kept, new in cuts
        ]
        settings = [f"{path} is {value}" for path, value in self.attributes.items()]
        rows = ((name or "the model", kept) for name, kept in self.layers.items())
        blocks = [f"{_count(len(kept), 'block', 'blocks')} of {name} kept: {', '.join(map(str, kept))}" for name, kept in rows]
        return entries + settings + blocks

    def name_after(self, name: str) -> str | None:
        """Return what a tensor or module is called once the blocks are out; None when it went with one.

        >>> Removed(layers={"blocks": [0, 2]}).name_after("blocks.2.weight")
        'blocks.1.weight'
        """
        before: list[str] = []
        after: list[str] = []
        for part in name.split("."):
            kept = self.layers.get(".".join(before))
            before.append(part)
            if kept is not None and part.isdigit():
                if int(part) not in kept:
                    return None
                part = str(kept.index(int(part)))
            after.append(part)
        return ".".join(after)

    def name_before(self, name: str) -> str:
        """Return what a tensor or module was called before the blocks were taken out.

        >>> Removed(layers={"blocks": [0, 2]}).name_before("blocks.1.weight")
        'blocks.2.weight'
        """
        before: list[str] = []
        for part in name.split("."):
            kept = self.layers.get(".".join(before))
            before.append(str(kept[int(part)]) if kept is not None and part.isdigit() and int(part) < len(kept) else part)
        return ".".join(before)

    def shapes_after(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Return names and shapes of a model's tensors once all is out of it.

        >>> removed = Removed(tensors={"0.weight": {"0": [1]}}, layers={"": [0, 2]})
        >>> removed.shapes_after({"0.weight": [3, 4], "1.weight": [2], "2.weight": [1]})
        {'0.weight': [1, 4], '1.weight': [1]}
        """
        found = {}
        for name, shape in shapes.items():
            after = self.name_after(name)
            if after is not None:
                cuts = self.tensors.get(name, {})
                found[after] = [len(cuts[str(d)]) if str(d) in cuts else size for d, size in enumerate(shape)]
        return found


def _count(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"


def compose(first: Removed | Mapping[str, Any], second: Removed | Mapping[str, Any]) -> Removed:
    """Return the change that does what two do one after the other.

    >>> compose({"tensors": {"weight": {"0": [1, 3, 5]}}}, {"tensors": {"weight": {"0": [0, -1, 2]}}}).tensors
    {'weight': {'0': [1, -1, 5]}}
    """
    first, second = Removed.of(first), Removed.of(second)
    tensors = {name: {d: list(kept) for d, kept in dimensions.items()} for name, dimensions in first.tensors.items()}
    for given, dimensions in second.tensors.items():
        name = first.name_before(given)
        for d, kept in dimensions.items():
            before = tensors.setdefault(name, {}).get(d)
            tensors[name][d] = [i if before is None or i == ADDED else before[i] for i in kept]
    layers = dict(first.layers)
    for given, kept in second.layers.items():
        name = first.name_before(given)
        layers[name] = [layers[name][i] for i in kept] if name in layers else list(kept)
    attributes = first.attributes | {first.name_before(path): value for path, value in second.attributes.items()}
    both = Removed(layers=layers)
    return Removed(
        tensors={name: cuts for name, cuts in tensors.items() if both.name_after(name) is not None},
        attributes={path: value for path, value in attributes.items() if both.name_after(path) is not None},
        layers=layers,
    )


def replay(model: nn.Module, removed: Removed | Mapping[str, Any], optimizer: Optimizer | None = None) -> nn.Module:
    """Do to a model of the original shape what :func:`niwaki.shrink`, or what widens, did to its copy, in place, and return it.

    Parameters stay the objects that they are, with what is left of their values and gradients, so that ties hold and an optimizer goes
    on. Entries that are added are zero. A model that is wrapped (``torch.compile``, an average of weights) is replayed like a plain one;
    shard it afterwards.

    Args:
        model: fresh, or a copy of the original such as a moving average.
        removed: what to take out, and to add.
        optimizer: of the model; its state of the parameters' shapes is cut alike, fresh where entries are added, and it forgets parameters
            that went with their block.

    Raises:
        InputError: a tensor, dimension, index, number or container that the model does not have; the model is unchanged then.

    >>> replay(nn.Linear(3, 2), {"tensors": {"weight": {"1": [0, 2]}}})
    Linear(in_features=2, out_features=2, bias=True)
    """
    removed = Removed.of(removed)
    _check(model, removed)
    tensors = named_tensors(model)
    cuts = {tensors[name]: dimensions for name, dimensions in removed.tensors.items()}  # tied ones once
    for tensor, dimensions in cuts.items():
        for dimension, kept in dimensions.items():
            cut(tensor, int(dimension), torch.tensor(kept), optimizer)
    for path, value in removed.attributes.items():
        set_attribute(model, path, value)
    follow_shapes(model, cuts, removed.attributes)
    modules = named_modules(model)
    before = set(model.parameters())
    for name, kept in removed.layers.items():
        _keep_blocks(model, modules[name], kept)
    if optimizer is not None and removed.layers:
        _forget(optimizer, before - set(model.parameters()))
    return model


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by canonical name, tied ones under all their names."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {canonical_name(name): tensor for name, tensor in tensors}


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return modules by their names without wrappers; the innermost model is ``""``."""
    return {canonical_name(f"{name}.x")[:-2]: module for name, module in model.named_modules()}


def cut(tensor: Tensor, dimension: int, keep: Tensor, optimizer: Optimizer | None = None) -> None:
    """Keep indices of a parameter or buffer along a dimension, of its gradient, and of its slots in an optimizer, in place.

    Where ``keep`` is -1 an entry is added: zeros, and in slots what a fresh state holds.
    """
    shape, gradient = tensor.shape, tensor.grad
    new = _select(tensor.detach(), dimension, keep)
    tensor.grad = None
    # Of another type in between: only that makes autograd forget the old shape, which a loss that is still held would keep alive.
    tensor.data = torch.empty(0, dtype=torch.float16 if tensor.dtype != torch.float16 else torch.float32, device=tensor.device)
    tensor.data = new
    if gradient is not None:
        tensor.grad = _select(gradient.detach(), dimension, keep)
    if optimizer is None:
        return
    forget_history(optimizer)
    slots = {key: slot for key, slot in optimizer.state.get(tensor, {}).items() if isinstance(slot, Tensor) and slot.shape == shape}
    fresh = fresh_values(optimizer, tensor)[0] if slots and bool((keep < 0).any()) else {}
    for key, slot in slots.items():
        if slot.ndim:
            optimizer.state[tensor][key] = _select(slot, dimension, keep, fresh.get(key, 0.0))


def _select(values: Tensor, dimension: int, keep: Tensor, new: float = 0.0) -> Tensor:
    """Return entries along a dimension, and ``new`` where the index is -1."""
    index = keep.to(values.device)
    found = values.index_select(dimension, index.clamp(min=0))
    return found.index_fill_(dimension, (index < 0).nonzero().flatten(), new)


def resolve(model: nn.Module, path: str) -> tuple[Any, str]:
    """Return the object that owns an attribute and the attribute's own name; the path may go through a module's ``config``.

    Raises:
        InputError: the model has no such attribute.
    """
    modules = named_modules(model)
    parts = path.split(".")
    depth = next(i for i in range(len(parts) - 1, -1, -1) if ".".join(parts[:i]) in modules)
    owner: Any = modules[".".join(parts[:depth])]
    for part in parts[depth:-1]:
        owner = getattr(owner, part, None)
    if not hasattr(owner, parts[-1]):
        raise InputError(f"attributes: this {type(model).__name__} has no {path!r}")
    return owner, parts[-1]


def set_attribute(model: nn.Module, path: str, value: int) -> None:
    """Set a number of a module or of its configuration."""
    owner, name = resolve(model, path)
    setattr(owner, name, value)


def settings_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the plain objects that a module keeps, such as a configuration that it shares with others: their names and themselves."""
    for name, value in vars(module).items():
        plain = hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type | ModuleType) and not callable(value)
        if plain and not name.startswith("_"):
            yield name, value


def _check(model: nn.Module, removed: Removed) -> None:
    tensors, modules = named_tensors(model), named_modules(model)
    kind = type(model).__name__
    for name, dimensions in removed.tensors.items():
        if name not in tensors:
            raise InputError(f"removed: this {kind} has no tensor {name!r}; {nearest(name, tensors)}; the removal is of another model")
        if is_sharded(tensors[name]):
            raise InputError(f"removed: {name!r} is sharded; replay before the model is")
        for dimension, kept in dimensions.items():
            if int(dimension) >= tensors[name].ndim:
                raise InputError(f"removed: {name!r} of this {kind} has no dimension {dimension}; the removal is of another model")
            _require_indices(kept, tensors[name].shape[int(dimension)], f"{name!r} has {{}} entries along dimension {dimension}")
    for path, value in removed.attributes.items():
        owner, own = resolve(model, path)
        if type(getattr(owner, own)) not in (int, type(None)) or value < 1:
            raise InputError(f"attributes: {path!r} is {getattr(owner, own)!r} in this {kind}, and {value} cannot take its place")
    for name, kept in removed.layers.items():
        blocks: Any = modules.get(name)
        if not is_container(blocks):
            raise InputError(f"removed: this {kind} has no ModuleList or Sequential {name!r}; the removal is of another model")
        _require_indices(kept, len(blocks), f"{name!r} has {{}} blocks")


def is_container(module: nn.Module | None) -> bool:
    """Return whether blocks can be taken out of a module: it holds them in a row, and numbers them."""
    return isinstance(module, nn.ModuleList | nn.Sequential) and list(module._modules) == [str(i) for i in range(len(module))]


def _require_indices(kept: Sequence[int], size: int, has: str) -> None:
    if max(kept) >= size:
        raise InputError(f"removed: {has.format(size)}, and index {max(kept)} is to be kept; the removal is of another model")


def _keep_blocks(model: nn.Module, container: Any, kept: Sequence[int]) -> None:
    """Keep the blocks at some positions, number them anew, and shorten lists in the configuration that say something of each."""
    size, blocks = len(container), [container[i] for i in kept]
    container._modules.clear()
    for position, (old, block) in enumerate(zip(kept, blocks, strict=True)):
        container._modules[str(position)] = block
        for module in block.modules():
            for name in BLOCK_NUMBERS:
                if type(module.__dict__.get(name)) is int and module.__dict__[name] == old:
                    setattr(module, name, position)
    for config in {id(config): config for module in model.modules() for config in _configs(module)}.values():
        for name, value in vars(config).items():
            if isinstance(value, list) and len(value) == size:
                setattr(config, name, [value[i] for i in kept])


def _configs(module: nn.Module) -> Iterator[Any]:
    """Yield the Hugging Face configuration of a module, if it has one, and the one of its text part."""
    config = getattr(module, "config", None)
    if hasattr(config, "model_type"):
        yield config


def _forget(optimizer: Optimizer, gone: set[nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
    for parameter in gone:
        optimizer.state.pop(parameter, None)


# -- the numbers that shapes tell ----------------------------------------------------------------------------------------------


def follow_shapes(
    model: nn.Module, changed: Mapping[Tensor, Mapping[str, Sequence[int]]], told: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Bring the numbers of torch's own modules in line with their tensors, such as ``in_features`` with the weight.

    Args:
        model: its tensors were cut.
        changed: tensor -> dimension (as text) -> indices of it that were kept.
        told: path of a number of groups -> what it is now; others follow from the indices that were kept.

    Returns:
        path of each number of groups that followed and changed -> what it is now.

    Raises:
        InputError: a grouped convolution or normalization lost neither whole groups nor as much of each, or gained entries, and no number
            of groups is told.
    """
    found = {}
    for name, module in named_modules(model).items():
        tensors = {own: t for own, t in {**module._parameters, **module._buffers}.items() if t is not None and t in changed}
        rule = rule_of(module) if tensors else None
        if rule is None:
            continue
        own = GROUPS.get(rule)
        path = f"{name}.{own}".lstrip(".")
        kept = changed[tensors["weight"]].get("0") if own and "weight" in tensors else None
        if own and kept is not None and path not in (told or {}):
            before = getattr(module, own)
            setattr(module, own, _groups_left(before, _channels(module), kept, name))
            if getattr(module, own) != before:
                found[path] = getattr(module, own)
        rule(module)
    return found


def rule_of(module: nn.Module) -> Rule | None:
    """Return how the numbers of a module follow from the shapes of its tensors; None for a class that the table does not know."""
    return next((rule for classes, rule in SHAPED if isinstance(module, classes)), _gpt2_linear if is_transposed_linear(module) else None)


Rule = Callable[[Any], None]
"""Sets the numbers of a module that follow from the shapes of its tensors (and the number of groups, where there are any)."""


def _linear(module: Any) -> None:
    module.out_features, module.in_features = module.weight.shape


def _gpt2_linear(module: Any) -> None:
    module.nx, module.nf = module.weight.shape


def _bilinear(module: Any) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _convolution(module: Any) -> None:
    first, second = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
    setattr(module, first, module.weight.shape[0])
    setattr(module, second, module.weight.shape[1] * module.groups)


def _batch_norm(module: Any) -> None:
    module.num_features = len(module.running_mean if module.weight is None else module.weight)


def _layer_norm(module: Any) -> None:
    module.normalized_shape = tuple(module.weight.shape)


def _group_norm(module: Any) -> None:
    module.num_channels = len(module.weight)


def _slopes(module: Any) -> None:
    module.num_parameters = len(module.weight)


def _embedding(module: Any) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _recurrent(module: Any) -> None:
    projected = getattr(module, "weight_hr_l0", None)
    module.input_size = module.weight_ih_l0.shape[1]
    module.proj_size = 0 if projected is None else projected.shape[0]
    module.hidden_size = module.weight_hh_l0.shape[1] if projected is None else projected.shape[1]
    module.flatten_parameters()


def _recurrent_cell(module: Any) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


def _attention(module: Any) -> None:
    if module.k_proj_weight is not None:  # its other widths cannot change
        module.kdim, module.vdim = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]


SHAPED: tuple[tuple[Any, Rule], ...] = (
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (nn.modules.conv._ConvNd, _convolution),
    (nn.modules.batchnorm._NormBase, _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.GroupNorm, _group_norm),
    (nn.PReLU, _slopes),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent_cell),
    (nn.MultiheadAttention, _attention),
)
"""Class -> how its numbers follow from the shapes of its tensors. The first match counts."""

GROUPS: dict[Rule, str] = {_convolution: "groups", _group_norm: "num_groups"}
"""Rule -> the number of groups that its modules have."""


def _channels(module: Any) -> int:
    """Return how many entries a grouped module's weight has along its first dimension, by its numbers."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    return int(module.in_channels if module.transposed else module.out_channels)


def _groups_left(groups: int, channels: int, kept: Sequence[int], where: str) -> int:
    """Return how many groups have consecutive channels left; each of them must have lost as many."""
    if groups == 1:
        return groups
    if ADDED in kept:
        raise InputError(f"removed: {where} has {groups} groups and gains channels; tell the number of its groups among the attributes")
    each = channels // groups
    left = [count for count in torch.bincount(torch.tensor(kept) // each, minlength=groups).tolist() if count]
    if min(left) < max(left):
        raise InputError(f"removed: {where} has {groups} groups of {each} channels; take out whole groups, or as many channels of each")
    return len(left)
