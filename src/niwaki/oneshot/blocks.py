"""The repeated blocks of a network: found by their structure, or named by the user. No script for each model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from niwaki.errors import InputError
from niwaki.masks import canonical_name, nearest

CONTAINERS = (nn.ModuleList, nn.Sequential)
"""What holds blocks that are repeated."""


@dataclass(frozen=True)
class Blocks:
    """Blocks in the order in which the model has them.

    Attributes:
        names: path of each block, as ``model.get_submodule`` takes it.
        kinds: name of the class of each block.

    >>> print(Blocks(("layers.0", "layers.1", "head"), ("Layer", "Layer", "Linear")))
    layers.0 ... layers.1: 2 blocks of Layer
    head: 1 block of Linear
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for (_, kind), run in groupby(zip(self.names, self.kinds, strict=True), key=lambda pair: (pair[0].rpartition(".")[0], pair[1])):
            names = [name for name, _ in run]
            where = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            lines.append(f"{where}: {len(names)} block{'' if len(names) == 1 else 's'} of {kind}")
        return "\n".join(lines)


def find_blocks(model: nn.Module, targets: Collection[str], blocks: str | Sequence[str] = "auto") -> Blocks:
    """Return the blocks of a model, which are pruned one after the other.

    Found are the outermost lists (``nn.ModuleList``, ``nn.Sequential``) of modules that are all of one class, have parts themselves and
    hold targets: ``model.layers`` of Llama, ``encoder.block`` and ``decoder.block`` of T5, ``layer1`` ... ``layer4`` of a ResNet. A list of
    one counts where another list has blocks of its class.

    Args:
        model: any module.
        targets: names of the parameters that are to be pruned; what holds none of them is no block.
        blocks: ``auto`` to look for them; the path of a module that holds them as children; or the paths of the blocks themselves, any
            modules that are called with tensors.

    Raises:
        InputError: none are found, a path is none of the model's, or one block is inside another.

    >>> layer = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> model = nn.ModuleDict({"layers": nn.ModuleList(nn.TransformerEncoderLayer(4, 1) for _ in range(3)), "head": nn.Linear(4, 2)})
    >>> print(find_blocks(model, [name for name, _ in model.named_parameters()]))
    layers.0 ... layers.2: 3 blocks of TransformerEncoderLayer
    """
    holding = _holding(model, targets)
    if blocks != "auto":
        return _named(model, blocks, holding)
    lists = list(_lists(model, "", holding))
    count = Counter(type(module) for pairs in lists for _, module in pairs)
    chosen = [pair for pairs in lists for pair in pairs if count[type(pair[1])] > 1]
    if not chosen:
        raise InputError(_why_none(model, holding))
    return Blocks(tuple(name for name, _ in chosen), tuple(type(module).__name__ for _, module in chosen))


Pair = tuple[str, nn.Module]


def _holding(model: nn.Module, targets: Collection[str]) -> set[str]:
    """Return the paths of all modules that hold a target, the model's own included."""
    wanted = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if canonical_name(name) in targets}
    found = {""}
    for path, module in model.named_modules(remove_duplicate=False):
        if any(id(parameter) in wanted for parameter in module.parameters(recurse=False)):
            parts = path.split(".")
            found |= {".".join(parts[:length]) for length in range(len(parts) + 1)}
    return found


def _lists(module: nn.Module, path: str, holding: set[str]) -> Iterator[list[Pair]]:
    """Yield the outermost lists of blocks below a module."""
    children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
    children = [(name, child) for name, child in children if name in holding]
    if isinstance(module, CONTAINERS) and children and _alike(children):
        yield children
        return
    for name, child in children:
        yield from _lists(child, name, holding)


def _alike(children: Sequence[Pair]) -> bool:
    """Return whether modules are of one class that is no container and has parts of its own."""
    kind = type(children[0][1])
    same = all(type(child) is kind for _, child in children)
    return same and kind not in CONTAINERS and any(True for _ in children[0][1].children())


def _named(model: nn.Module, blocks: str | Sequence[str], holding: set[str]) -> Blocks:
    """Return the blocks that the user names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = [blocks] if isinstance(blocks, str) else list(blocks)
    for path in paths:
        if path not in modules or not path:
            raise InputError(f"blocks: {path!r} is no module of this {type(model).__name__}; {nearest(path, [m for m in modules if m])}")
    if isinstance(blocks, str):
        paths = [f"{blocks}.{name}" for name, _ in modules[blocks].named_children()]
        if not paths:
            raise InputError(f"blocks: {blocks!r} has no children; name the module whose children are the blocks, such as model.layers")
    for path in paths:
        outer = next((other for other in paths if path.startswith(f"{other}.") or (other == path and paths.count(path) > 1)), None)
        if outer is not None:
            raise InputError(f"blocks: {path!r} is in {outer!r}, which is a block too; blocks must not overlap")
    chosen = [path for path in paths if path in holding]
    if not chosen:
        raise InputError(f"blocks: none of {', '.join(paths[:5])} holds a target; choose other blocks, or name what to prune in target")
    return Blocks(tuple(chosen), tuple(type(modules[path]).__name__ for path in chosen))


def _why_none(model: nn.Module, holding: set[str]) -> str:
    """Return why no blocks were found, and what to do."""
    reasons = []
    for path, module in model.named_modules():
        children = [child for name, child in module.named_children() if f"{path}.{name}" in holding]
        kinds = list(dict.fromkeys(type(child).__name__ for child in children))
        if not isinstance(module, CONTAINERS) or not children or all(isinstance(child, CONTAINERS) for child in children):
            continue
        if len(kinds) > 1:
            reasons.append(f"{path} has several classes: {', '.join(kinds)}")
        else:
            reasons.append(f"{path} has {'a single' if len(children) == 1 else 'single layers,'} {kinds[0]}")
    why = "; ".join(reasons[:3]) or "it has no nn.ModuleList or nn.Sequential of modules that hold targets"
    return (
        f"blocks: no repeated blocks are found in this {type(model).__name__} ({why}); name them, such as blocks='model.layers' or a list"
        " of paths of modules"
    )
