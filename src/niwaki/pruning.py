"""Pruning at one moment: a trained model to a sparsity, or a fraction of what is active, as the ``prune`` of a stage says."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from niwaki import catalogue
from niwaki.binding import Bound
from niwaki.calibration import Arguments, first_pair, mean_loss
from niwaki.choosing import sum_counts
from niwaki.collecting import requests_of
from niwaki.counter import key
from niwaki.dependency import Example, Group
from niwaki.errors import InputError
from niwaki.formats import save
from niwaki.granularity import Eigenbasis, Grouped
from niwaki.masks import Masks, canonical_name, shard
from niwaki.metrics.units import show
from niwaki.oneshot.blocks import Blocks, find_blocks
from niwaki.oneshot.blockwise import at_once, prune_blocks
from niwaki.ranking import find_groups_with, rank_targets
from niwaki.recipe import Prune, Recipe, Stage
from niwaki.recipe.stages import sparsity_after
from niwaki.sparsifier import Sparsifier
from niwaki.structured import permute as reorder
from niwaki.structured.eigendamage import eigendamage
from niwaki.target import select_targets


@dataclass(frozen=True)
class Row:
    """One tensor, before and after.

    Attributes:
        name: canonical parameter name.
        shape: of the parameter.
        active: its active weights.
        elements: all of them.
        error: relative error ``‖y' - y‖ / ‖y‖`` of what it puts out on the data, where it was measured (block by block); else None.
    """

    name: str
    shape: tuple[int, ...]
    active: int
    elements: int
    error: float | None = None

    @property
    def sparsity(self) -> float:
        """Share of its elements that is masked."""
        return 1.0 - self.active / max(self.elements, 1)


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` returns: the model, its masks, and what pruning has changed.

    Attributes:
        model: the model that was given; its pruned weights are zero.
        masks: of the tensors that were pruned.
        recipe: what was carried out.
        rows: the pruned tensors.
        loss_before: mean loss over the data before; None without ``loss=``.
        loss_after: the same after.
        seconds: time that it took, without the losses before and after.
        statistics_bytes: what statistics took at most.
        notes: what a user should know.
    """

    model: nn.Module
    masks: Masks
    recipe: Recipe
    rows: tuple[Row, ...]
    loss_before: float | None
    loss_after: float | None
    seconds: float
    statistics_bytes: int
    notes: tuple[str, ...] = field(default=())

    @property
    def sparsity(self) -> float:
        """Share of the pruned tensors' elements that is masked."""
        return 1.0 - sum(row.active for row in self.rows) / max(sum(row.elements for row in self.rows), 1)

    def save(self, path: str | Path) -> None:
        """Write the model with its masks to a container file (:func:`niwaki.save`)."""
        save(self.model, path, masks=self.masks)

    def to_data(self) -> dict[str, Any]:
        """Return everything but the model as plain data for JSON."""
        return {
            "recipe": self.recipe.to_data(),
            "sparsity": self.sparsity,
            "tensors": [
                {"name": r.name, "shape": list(r.shape), "active": r.active, "sparsity": r.sparsity, "error": r.error} for r in self.rows
            ],
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "seconds": self.seconds,
            "statistics_bytes": self.statistics_bytes,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        measured = any(row.error is not None for row in self.rows)
        head = ("tensor", "shape", "weights", "active", "sparsity", *(("output error",) if measured else ()))
        table = [head]
        for row in self.rows:
            error = (f"{row.error:.4f}" if row.error is not None else "",) if measured else ()
            shape = " x ".join(map(str, row.shape))
            table.append((row.name, shape, f"{row.elements:,}", f"{row.active:,}", f"{100 * row.sparsity:.2f} %", *error))
        elements, active = sum(row.elements for row in self.rows), sum(row.active for row in self.rows)
        table.append(("all of these", "", f"{elements:,}", f"{active:,}", f"{100 * self.sparsity:.2f} %", *(("",) if measured else ())))
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        aligned = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in table
        ]
        lines = [aligned[0], "-" * len(aligned[0]), *aligned[1:-1], "-" * len(aligned[0]), aligned[-1]]
        if self.loss_before is not None and self.loss_after is not None:
            lines.append(f"mean loss over the data: {self.loss_before:.4f} before, {self.loss_after:.4f} after")
        took = f"took {self.seconds:.1f} s" + (f", statistics {show(self.statistics_bytes, 'bytes')}" if self.statistics_bytes else "")
        return "\n".join([*lines, took, *self.notes])


def prune(
    model: nn.Module,
    method: str | Recipe,
    *,
    sparsity: float | None = None,
    data: Iterable[tuple[Any, Any]] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    blocks: str | Sequence[str] | None = "auto",
    masks: Masks | None = None,
    groups: Sequence[Group] | None = None,
    example: Example | None = None,
    memory: int | None = None,
    permute: bool = False,
    seed: int = 0,
    progress: bool = False,
    **fields: Any,
) -> Pruned:
    """Prune a trained model at once, in place, with the few batches that a method wants to see; no training follows.

    With ``granularity: eigenbasis`` (EigenDamage) layers are replaced, so it is a copy that becomes smaller.

    Of the method, what chooses and compensates is used: saliency, granularity, allocation, compensation, and the rounds of a one-shot
    schedule. Times, growth and relaxations are not.

    Args:
        model: its pruned weights become zero, and survivors what the method gives them. It runs in evaluation mode meanwhile.
        method: name of the catalogue, a YAML file, or a recipe.
        sparsity: in [0, 1); None: the method's own.
        data: batches ``(inputs, targets)``: a list, or anything that can be gone through several times.
        loss: ``loss(outputs, targets)``; with it the table tells the loss before and after.
        blocks: for pretrained networks, the path of their repeated blocks (such as ``model.layers``), which are then pruned one after the
            other, each on what the pruned ones before it put out. ``auto``: found, for methods that only look at inputs (wanda,
            sparsegpt, obc) and models that have such blocks. None: the whole model at once.
        masks: to start from; what they prune stays pruned.
        groups: dependency groups, for granularities of units; None: found with ``example`` or the first batch.
        example: arguments of a forward pass to find them with.
        memory: most bytes that statistics may take; None for no limit.
        permute: with an N:M pattern along the inputs, put channels into an order first in which the pattern keeps larger weights; the model
            computes the same (:func:`niwaki.structured.permute`).
        seed: of everything random.
        progress: show what is collected on standard error, the estimated memory first.
        **fields: slots that replace the method's, such as ``granularity="2:4"``.

    Raises:
        InputError: the method needs data or a loss that were not given, does not rank to a sparsity, or does not fit the model.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> data = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(4)]
    >>> round(prune(model, "magnitude", sparsity=0.75, data=data, loss=nn.functional.cross_entropy).sparsity, 2)
    0.75
    """
    recipe = _at_once(method, sparsity, fields)
    if data is not None and iter(data) is data:
        data = list(data)  # it is gone through more than once
    if "gradient" in recipe.saliency.needs and (data is None or loss is None):
        raise InputError(f"saliency: {recipe.saliency.name!r} needs data= and loss= to collect gradients from")
    if isinstance(recipe.granularity, Eigenbasis) and (data is None or loss is None):
        raise InputError(f"granularity: {recipe.granularity.name!r} needs data= and loss= to find the basis")
    before = None if data is None or loss is None else _evaluated(model, data, loss)
    begin = time.perf_counter()
    reordered = _reordered(model, recipe, data, groups, example, seed) if permute else ()
    found = _blocks(model, recipe, blocks)
    errors: Mapping[str, float | None] = {}
    with _shown(data, progress) as (watched, tell), warnings.catch_warnings(), _evaluating(model):
        warnings.simplefilter("ignore")  # what is warned of is among the notes
        if isinstance(recipe.granularity, Eigenbasis):
            assert watched is not None
            assert loss is not None
            return _rotated(model, recipe, watched, data, loss, before, seed, memory, begin)
        if found is not None:
            if data is None:
                raise InputError("data: blocks are pruned one after the other on what they are given, so data= is needed")
            assert watched is not None
            told = None if tell is None else lambda done, total: tell(f"block {done} of {total} done")
            walked = prune_blocks(model, recipe, watched, blocks=found.names, masks=masks, seed=seed, memory=memory, progress=told)
            kept, notes, taken = walked.masks, walked.notes, walked.statistics_bytes
            errors = {layer.name: layer.error for layer in walked.layers}
        else:
            sparsifier = Sparsifier(
                model,
                recipe,
                masks=masks,
                total_steps=1,
                seed=seed,
                data=watched,
                loss=loss,
                groups=groups,
                example=example,
                memory=memory,
                progress=tell,
            ).finalize()
            kept, notes, taken = sparsifier.masks, tuple(sparsifier.notes), sparsifier.statistics_bytes
    seconds = time.perf_counter() - begin
    after = None if before is None or data is None or loss is None else _evaluated(model, data, loss)
    shapes = {canonical_name(name): tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    rows = tuple(Row(name, shapes[name], int(mask.sum()), mask.numel(), errors.get(name)) for name, mask in kept.items())
    return Pruned(model, kept, recipe, rows, before, after, seconds, taken, (*reordered, *notes))


def _at_once(method: str | Recipe, sparsity: float | None, fields: Mapping[str, Any]) -> Recipe:
    """Return the recipe that masks at one moment what a method does."""
    recipe = catalogue.find(method) if isinstance(method, str) else method
    name = method if isinstance(method, str) else "the recipe"
    _require_no_training(recipe, name)
    said = fields if sparsity is None else {**fields, "sparsity": sparsity}
    if sparsity is not None and recipe.stages is None and recipe.final_sparsity is None:
        recipe = recipe.replace(sparsity=sparsity)
    recipe = at_once(recipe)
    recipe = recipe.replace(**said) if said else recipe
    return recipe


def _require_no_training(recipe: Recipe | Stage, name: str) -> None:
    """Refuse scores of what a training does, in stages too."""
    saliency = recipe.saliency
    if recipe.selects and ("score" in saliency.needs or any(request.source == "steps" for request in requests_of(saliency))):
        raise InputError(f"prune: {name} ranks by what it has seen of the training, and there is none; choose another, or niwaki run")
    for stage in recipe.stages or ():
        _require_no_training(stage, name)


def _reordered(
    model: nn.Module,
    recipe: Recipe,
    data: Iterable[tuple[Any, Any]] | None,
    groups: Sequence[Group] | None,
    example: Example | None,
    seed: int,
) -> tuple[str, ...]:
    """Put the channels of a model into an order that suits an N:M pattern, in place; return sentences for the user."""
    if example is None and data is None:
        raise InputError("permute: which channels go together is found in a forward pass: pass data=, or example=, its arguments")
    if example is None and data is not None:
        (inputs, _), _ = first_pair(data)
        if isinstance(inputs, Arguments):
            inputs = inputs.args or inputs.kwargs
        example = inputs if isinstance(inputs, tuple | Mapping) else (inputs,)
    assert example is not None
    readers = [target.name for target in select_targets(model, recipe.target)[0]]
    done = reorder(model, recipe.granularity, example, groups=groups, readers=readers, seed=seed)
    model.load_state_dict(done.model.state_dict())
    before, after = (sum(shares) / max(len(shares), 1) for shares in zip(*done.kept.values(), strict=True)) if done.kept else (1.0, 1.0)
    told = f"channels were reordered: the pattern keeps {100 * after:.2f} % of a tensor's size on average, and not {100 * before:.2f} %"
    return (told, *done.notes)


def _rotated(
    model: nn.Module,
    recipe: Recipe,
    watched: Iterable[tuple[Any, Any]],
    data: Iterable[tuple[Any, Any]] | None,
    loss: Callable[[Any, Any], Tensor],
    before: float | None,
    seed: int,
    memory: int | None,
    begin: float,
) -> Pruned:
    """Prune in the eigenbasis of Kronecker factors: a copy of the model with smaller layers, and no masks."""
    assert isinstance(recipe.granularity, Eigenbasis)
    assert recipe.sparsity is not None
    assert data is not None
    cap = recipe.granularity.cap
    done = eigendamage(model, recipe.sparsity, watched, loss, cap=cap, target=recipe.target, seed=seed, memory=memory)
    seconds = time.perf_counter() - begin
    rows = tuple(Row(one.name, (one.outputs, one.inputs), one.parameters_after, one.parameters) for one in done.layers)
    told = f"{100 * done.sparsity:.2f} % of the rotated units are gone; the weights of rotations are counted, and the model is a copy"
    return Pruned(done.model, Masks(), recipe, rows, before, _evaluated(done.model, data, loss), seconds, 0, (told, *done.notes))


def _blocks(model: nn.Module, recipe: Recipe, blocks: str | Sequence[str] | None) -> Blocks | None:
    """Return the blocks that are pruned one after the other, or None to prune the whole model at once."""
    if blocks is None or (blocks == "auto" and not looks_at_inputs(recipe)):
        return None
    targets = [target.name for target in select_targets(model, recipe.target)[0]]
    try:
        return find_blocks(model, targets, blocks)
    except InputError:
        if blocks != "auto":
            raise
        return None


def looks_at_inputs(recipe: Recipe) -> bool:
    """Return whether a recipe sees a layer by what goes into it alone, so that blocks can be pruned one after the other."""
    requests = [*requests_of(recipe.saliency), *requests_of(recipe.compensation), *requests_of(recipe.allocation)]
    inputs = all(request.source == "inputs" for request in requests) and not recipe.allocation.wants
    single = recipe.granularity.name in ("element", "n_m") and not recipe.allocation.joint
    return bool(requests) and inputs and single and "gradient" not in recipe.saliency.needs


def _evaluated(model: nn.Module, data: Iterable[tuple[Any, Any]], loss: Callable[[Any, Any], Tensor]) -> float:
    with _evaluating(model):
        return mean_loss(model, data, loss)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode inside the block."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Counted:
    """Data that tell how many batches were read."""

    def __init__(self, data: Iterable[tuple[Any, Any]], read: Callable[[], None]) -> None:
        self.data, self.read = data, read

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in self.data:
            yield batch
            self.read()


@contextmanager
def _shown(
    data: Iterable[tuple[Any, Any]] | None, progress: bool
) -> Iterator[tuple[Iterable[tuple[Any, Any]] | None, Callable[[str], None] | None]]:
    """Show what is done and how many batches were read, on standard error, where that is asked for."""
    if not progress:
        yield data, None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed} batches read"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        row = bars.add_task("pruning", total=None)

        def tell(what: str) -> None:
            bars.update(row, description=what)
            console.print(what, highlight=False, soft_wrap=True)

        yield None if data is None else _Counted(data, lambda: bars.advance(row)), tell


def pruned(
    model: nn.Module,
    prune: Prune,
    masks: Masks | None = None,
    *,
    seed: int = 0,
    step: int = 0,
    data: Iterable[tuple[Any, Any]] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    groups: Sequence[Group] | None = None,
    example: Example | None = None,
    memory: int | None = None,
) -> Sparsifier:
    """Prune a fraction of the active pieces of the targets, in place; ``masks`` of what is returned are those of all tensors then.

    ``round((1 - fraction) active)`` pieces stay, of all targets together, ranked by their scores on the model as it is; the allocation
    decides how many of them are in which tensor. What ``masks`` prune stays pruned, in tensors that are no targets too.

    Args:
        model: its pruned weights become zero.
        prune: what to prune, and by which scores.
        masks: of the model so far; None when nothing is masked.
        seed: of random scores.
        step: of random scores too, so that rounds differ.
        data: batches ``(inputs, targets)``, for scores that need them.
        loss: ``loss(outputs, targets)``, for scores that need gradients.
        groups: the model's dependency groups, for granularities of their units; None: they are found.
        example: arguments of a forward pass to find them with; by default the inputs of the first batch of ``data``.
        memory: most bytes that statistics may take; None for no limit.

    Raises:
        InputError: the scores need data or a loss that were not given, or the recipe does not fit the model or the memory.

    >>> import torch
    >>> model = nn.Linear(4, 1, bias=False)
    >>> model.weight.data = torch.tensor([[0.1, 3.0, 2.0, 0.4]])
    >>> everything = {"weights": {"include": ["*"]}}
    >>> masks = pruned(model, Prune(fraction=0.25, target=everything)).masks
    >>> pruned(model, Prune(fraction=0.33, target=everything), masks).masks["weight"]
    tensor([[False,  True,  True, False]])
    """
    masks = masks or Masks()
    if "gradient" in prune.saliency.needs and (data is None or loss is None):
        raise InputError(f"prune.saliency: {prune.saliency.name!r} needs data= and loss=")
    if isinstance(prune.granularity, Grouped) and groups is None:
        groups, data = find_groups_with(model, prune.granularity, example, data)
    ranked, _ = rank_targets(model, prune, groups)

    def gone(bound: Bound) -> Tensor | None:
        mask = masks.get(bound.name)
        return None if mask is None else ~shard(mask, bound.parameter, bound.name).reshape(bound.here.shape)

    active = sum_counts([one.active(gone) for one in ranked], ranked)
    sparsity = sparsity_after(prune.fraction, sum(active), sum(one.pieces for one in ranked))
    slots = {field: getattr(prune, field) for field in Prune.model_fields if field != "fraction"}
    recipe = Recipe(sparsity=sparsity, **slots)
    seed = key(seed, step, "prune")
    return Sparsifier(model, recipe, masks=masks, seed=seed, data=data, loss=loss, groups=groups, memory=memory).finalize()
