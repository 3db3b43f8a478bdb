"""Pruning block by block: each block on what the pruned blocks before it write, with only its own data in memory."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from niwaki.calibration import Arguments, first_pair, forward, pairs
from niwaki.collecting import asking, reasons, requests_of
from niwaki.counter import key
from niwaki.errors import InputError
from niwaki.granularity import Grouped
from niwaki.masks import Masks, canonical_name
from niwaki.metrics.units import show
from niwaki.oneshot.blocks import Blocks, find_blocks
from niwaki.oneshot.capture import Captured, Segment, capture, primary, running, segments, without_caches
from niwaki.oneshot.layers import PrunedLayer, comparing, owners_of
from niwaki.oneshot.scratch import Settled
from niwaki.oneshot.store import Store
from niwaki.recipe import Recipe
from niwaki.recipe.stages import once
from niwaki.sparsifier import Sparsifier
from niwaki.target import Named, TargetWeight, select_targets

Data = Iterable[tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Blockwise:
    """What pruning block by block has done.

    Attributes:
        masks: of all pruned weights, by their names in the model.
        layers: one by one.
        blocks: the blocks; None where the model was pruned as a whole.
        notes: sentences for the user.
        statistics_bytes: what statistics took at most.
    """

    masks: Masks
    layers: tuple[PrunedLayer, ...]
    blocks: Blocks | None
    notes: tuple[str, ...] = ()
    statistics_bytes: int = 0

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        rows = [f"{'layer':{width}}  {'weights':>11}  sparsity  error"]
        for layer in self.layers:
            error = "-" if layer.error is None else f"{layer.error:.4f}"
            rows.append(f"{layer.name:{width}}  {layer.weights:11,}  {layer.sparsity:8.4f}  {error}")
        return "\n".join(rows)


def prune_blocks(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    *,
    blocks: str | Sequence[str] = "auto",
    sequential: bool = True,
    outside: Literal["keep", "prune"] = "keep",
    masks: Masks | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    memory: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    settled: Settled | None = None,
) -> Blockwise:
    """Prune a pretrained model in place, block by block, by any recipe that needs no loss: ``wanda``, ``sparsegpt``, ``obc``, ...

    The model runs on the data up to its first block, whose arguments are caught. Then each block in turn is pruned on what it is called
    with, and what it writes, pruned, is what the next one is pruned on. Blocks that are no such chain are told in the notes, and what
    they are called with is caught from the model, as it is then, for each of them.

    Args:
        model: any module; it runs in evaluation mode.
        recipe: what to do, at once: its schedule and growth have no meaning. Its target is of the whole model, and each block gets its
            sparsity.
        data: batches ``(inputs, targets)``, with ``None`` for targets where no loss is needed; read several times. Inputs are a tensor, a
            tuple of positional arguments, or :class:`niwaki.calibration.Arguments`.
        blocks: which; see :func:`niwaki.oneshot.blocks.find_blocks`.
        sequential: False to rank the weights of all blocks together, with statistics of the dense model collected at once.
        outside: whether targets outside the blocks stay dense, or are pruned at the end, all together, with statistics of the pruned model.
        masks: to start from; what they prune stays pruned.
        loss: ``loss(outputs, targets)`` of the whole model, where ``sequential=False`` or ``outside="prune"`` need it.
        seed: of random choices.
        memory: most bytes that the statistics of a block and the captured activations may take together. Activations for which there
            is no room go to disk. The weights of the block (twice) and what it computes with come on top.
        device: where a block is while it is pruned; by default where it is.
        progress: called as ``progress(blocks done, blocks)``.
        settled: keeps the weights of blocks that are not at work in files, and their masks when they are done.

    Raises:
        InputError: the recipe needs a loss or ranks all blocks together, no blocks are found, there are no data, or the model cannot be
            walked block by block.

    >>> layer = lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> model = nn.Sequential(*(layer() for _ in range(2)))
    >>> recipe = Recipe(sparsity=0.5, target={"weights": {"include": ["*linear*"]}})
    >>> done = prune_blocks(nn.ModuleDict({"layers": model}).layers, recipe, [(torch.randn(4, 3, 8), None)], blocks=["0", "1"])
    >>> [(layer.name, layer.sparsity) for layer in done.layers][:2]
    [('0.linear1.weight', 0.5), ('0.linear2.weight', 0.5)]
    """
    recipe = at_once(recipe)
    data = list(data) if iter(data) is data else data
    plan = _Plan(recipe, masks or Masks(), seed, memory, None if device is None else torch.device(device))
    targets, _ = select_targets(model, recipe.target)
    if not sequential:
        return _together(model, plan, data, targets, blocks, outside, loss)
    _require_blockwise(recipe)
    found = find_blocks(model, [target.name for target in targets], blocks)
    owned, left, notes = _assign(model, found, targets)
    kept: dict[str, Tensor] = {}
    rows: list[PrunedLayer] = []
    taken = 0
    room = None if memory is None else max(memory - _statistics_bytes(recipe, owned, targets), 0)
    with without_caches(model), Store(room) as store:
        (inputs, _), data = first_pair(data)
        parts, never = segments(model, found.names, inputs)
        notes += _told(parts, never)
        blocks_done, total = 0, sum(len(part.names) for part in parts)
        for part in parts:
            captured = capture(model, part, data, store)
            _require_repeatable(model.get_submodule(part.names[0]), captured)
            for name in part.names:
                if progress is not None:
                    progress(blocks_done, total)
                block = model.get_submodule(name)
                if settled is not None:
                    settled.take(block)
                done = _prune_block(name, block, owned.get(name, {}), captured, plan)
                kept |= done.masks if settled is None else settled.put(block, done.masks)
                rows += done.layers
                notes += done.notes
                taken = max(taken, done.statistics_bytes)
                blocks_done += 1
            captured.drop()
        if progress is not None:
            progress(blocks_done, total)
        if store.bytes_written:
            notes.append(f"memory: {show(store.bytes_written, 'bytes')} of activations went to disk")
        if left and outside == "prune":
            sparsifier = _sparsified(model, plan, left, Masks({**plan.masks, **kept}), data, loss)
            notes += [f"outside the blocks: {note}" for note in sparsifier.notes]
            taken = max(taken, sparsifier.statistics_bytes)
            rows += [_row(name, "", mask, None) for name, mask in sparsifier.masks.items() if name not in kept and name not in plan.masks]
            kept = dict(sparsifier.masks)
        elif left:
            notes.append(f"outside the blocks, and left dense: {_listed(left)}")
    order = {canonical_name(name): i for i, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    rows.sort(key=lambda row: order[row.name])
    every = Masks(dict(sorted({**plan.masks, **kept}.items(), key=lambda one: order[one[0]])))
    return Blockwise(every, tuple(rows), found, tuple(dict.fromkeys(notes)), taken)


@dataclass(frozen=True)
class _Plan:
    """What is the same for all blocks."""

    recipe: Recipe
    masks: Masks
    seed: int
    memory: int | None
    device: torch.device | None


def at_once(recipe: Recipe) -> Recipe:
    """Return the recipe as it prunes at one moment.

    Raises:
        InputError: it has no sparsity, or learns its scores by training.
    """
    if not recipe.selects and recipe.stages is None:
        raise InputError("recipe: it does not rank weights to a given sparsity; choose a method that does, such as magnitude or wanda")
    if "score" in recipe.saliency.needs:
        raise InputError(f"saliency: {recipe.saliency.name!r} learns its scores by training; choose another method, such as magnitude")
    recipe = once(recipe)
    recipe.require_complete()
    return recipe


def _require_blockwise(recipe: Recipe) -> None:
    """Refuse what looks at the whole model."""
    way_out = "pass sequential=False (--together) to prune the whole model at once, or choose another"
    allocation = recipe.allocation
    if allocation.joint or allocation.budget is not None or "loss" in allocation.wants:
        raise InputError(
            f"allocation: {allocation.name!r} compares the blocks, and each is pruned before the next is seen; {way_out} such as uniform"
        )
    for component in asking(recipe):
        for request in requests_of(component):
            if request.source != "inputs":
                kind = type(request).__name__
                raise InputError(f"{component.slot}: {component.name!r} needs {kind}, which is not of a block by itself; {way_out}")
    for slot, name, _, with_loss in reasons(recipe):
        if with_loss:
            raise InputError(f"{slot}: {name!r} needs a loss, and a block by itself has none; {way_out}")
    if "gradient" in recipe.saliency.needs:
        raise InputError(f"saliency: {recipe.saliency.name!r} needs gradients of a loss, and a block by itself has none; {way_out}")


def _assign(model: nn.Module, blocks: Blocks, targets: Sequence[TargetWeight]) -> tuple[dict[str, dict[str, str]], list[str], list[str]]:
    """Return of each block its targets (name in the block -> name in the model), the targets in no block, and notes."""
    names = {id(target.parameter): target.name for target in targets}
    owned: dict[str, dict[str, str]] = {}
    taken: dict[int, str] = {}
    notes = []
    for block in blocks.names:
        for name, parameter in model.get_submodule(block).named_parameters():
            if id(parameter) not in names:
                continue
            if id(parameter) in taken:
                notes.append(f"{names[id(parameter)]} is in {taken[id(parameter)]} and {block}; it was pruned with the first one")
                continue
            taken[id(parameter)] = block
            owned.setdefault(block, {})[canonical_name(name)] = names[id(parameter)]
    return owned, [name for one, name in names.items() if one not in taken], notes


def _statistics_bytes(recipe: Recipe, owned: Mapping[str, Mapping[str, str]], targets: Sequence[TargetWeight]) -> int:
    """Return the bytes of the statistics of the block that needs most."""
    requests = {request for component in asking(recipe) for request in requests_of(component)}
    layouts = {target.name: target.layout for target in targets}
    return max((sum(r.memory(layouts[name]) for r in requests for name in names.values()) for names in owned.values()), default=0)


def _told(parts: Sequence[Segment], never: Sequence[str]) -> list[str]:
    """Return notes on blocks that are not called, and on those whose inputs do not come from the block before."""
    notes = [f"not called in a forward pass, and left dense: {_listed(never)}"] if never else []
    again = [part for part in parts if part.reason]
    if again:
        names = _listed([part.names[0] for part in again])
        notes.append(f"the inputs of {names} were caught anew from the model, pruned so far: {again[0].reason}")
    return notes


def _prune_block(name: str, block: nn.Module, targets: Mapping[str, str], captured: Captured, plan: _Plan) -> Blockwise:
    """Prune a block on what was captured, and walk on to the next one.

    Args:
        name: its path.
        block: the module.
        targets: names of its targets in it -> in the model.
        captured: the walk, which has come to it.
        plan: what to do.

    Returns:
        its masks, layers and notes.
    """
    # Of dependency groups, tensors are masked that are no targets, such as biases.
    whole = {canonical_name(own): canonical_name(f"{name}.{own}") for own, _ in block.named_parameters(remove_duplicate=False)}
    whole |= targets
    given = Masks({own: plan.masks[full] for own, full in whole.items() if full in plan.masks})
    masks: Mapping[str, Tensor] = {}
    notes: list[str] = []
    taken = 0
    with _on_device(block, plan.device):
        before = owners_of(block, targets)
        if targets:
            seed = key(plan.seed, 0, name)
            data = captured.of(name, plan.device)
            sparsifier = _sparsified(block, replace(plan, seed=seed), targets, given, data, None, captured.arguments(0, name, plan.device))
            masks, notes, taken = sparsifier.masks, sparsifier.notes, sparsifier.statistics_bytes
        with running(block), comparing(before) as errors:
            for i in range(len(captured)):
                output = forward(block, captured.arguments(i, name, plan.device))
                if name != captured.segment.names[-1]:
                    captured.advance(i, output)
    found = errors()
    home = next(block.parameters()).device
    return Blockwise(
        masks=Masks({whole[own]: mask.to(home) for own, mask in masks.items()}),
        layers=tuple(_row(whole[own], name, mask, found.get(own)) for own, mask in masks.items()),
        blocks=None,
        notes=tuple(f"{name}: {note}" for note in notes),
        statistics_bytes=taken,
    )


def _sparsified(
    model: nn.Module, plan: _Plan, names: Iterable[str], masks: Masks, data: Data, loss: Loss | None, first: Arguments | None = None
) -> Sparsifier:
    """Prune some weights of a model, or of a block of which the first call is given."""
    assert isinstance(plan.recipe.target, Named)
    recipe = plan.recipe.replace(target=type(plan.recipe.target)(include=tuple(names)))
    example = None if first is None or not isinstance(recipe.granularity, Grouped) else _named_arguments(model, first)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"niwaki\.")  # what they say is in the notes
        return Sparsifier(model, recipe, masks=masks, seed=plan.seed, data=data, loss=loss, example=example, memory=plan.memory).finalize()


def _named_arguments(block: nn.Module, given: Arguments) -> dict[str, Any]:
    """Return the arguments of a call by their names.

    Raises:
        InputError: some have no name.
    """
    signature = inspect.signature(block.forward)
    named = signature.bind(*given.args, **given.kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and named.pop(name, ()):
            raise InputError(
                f"granularity: {type(block).__name__} is called with arguments that have no names; choose a granularity of weights"
            )
    return named


@contextmanager
def _on_device(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Have a block on a device inside; None: where it is."""
    home = next(block.parameters()).device
    block.to(device or home)
    try:
        yield
    finally:
        block.to(home)


def _row(name: str, block: str, mask: Tensor, error: float | None) -> PrunedLayer:
    return PrunedLayer(name, block, mask.numel(), 1.0 - int(mask.sum()) / max(mask.numel(), 1), error)


def _require_repeatable(block: nn.Module, captured: Captured) -> None:
    """Refuse a block that writes something else when it is called with the same again."""
    name = captured.segment.names[0]
    with running(block):
        first, second = (primary(forward(block, captured.arguments(0, name))) for _ in range(2))
    if first is not None and second is not None and not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise InputError(
            f"blocks: {name!r} writes something else when it is called again with the same arguments, in evaluation mode; turn off what it"
            " remembers (a cache) or draws, or pass sequential=False"
        )


# ---------------------------------------------------------------- all blocks at once


def _together(
    model: nn.Module,
    plan: _Plan,
    data: Data,
    targets: Sequence[TargetWeight],
    blocks: str | Sequence[str],
    outside: Literal["keep", "prune"],
    loss: Loss | None,
) -> Blockwise:
    """Prune the targets of all blocks (or all targets) with statistics of the dense model."""
    notes: list[str] = []
    names = [target.name for target in targets]
    found = None
    owned: dict[str, str] = {}
    if outside == "keep":
        found = find_blocks(model, names, blocks)
        inside, left, notes = _assign(model, found, targets)
        owned = {whole: block for block, own in inside.items() for whole in own.values()}
        names = [name for name in names if name in owned]
        notes += [f"outside the blocks, and left dense: {_listed(left)}"] if left else []
    before = owners_of(model, names)
    with without_caches(model):
        sparsifier = _sparsified(model, plan, names, plan.masks, data, loss)
        with running(model), comparing(before) as errors:
            for inputs, _ in pairs(data):
                forward(model, inputs)
    error = errors()
    rows = tuple(_row(name, owned.get(name, ""), mask, error.get(name)) for name, mask in sparsifier.masks.items())
    return Blockwise(sparsifier.masks, rows, found, tuple(dict.fromkeys([*notes, *sparsifier.notes])), sparsifier.statistics_bytes)


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
