"""What a model costs as a function of how many units of its dependency groups it keeps: FLOPs by counting, latency by measuring.

Both answer for many choices at once, so that a search does not make a model smaller to learn what that would save.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from niwaki.dependency import Example, Group
from niwaki.dependency.trace import arguments
from niwaki.errors import InputError
from niwaki.masks import Masks, canonical_name
from niwaki.metrics.flops import forward_flops, observing
from niwaki.metrics.latency import interleaved
from niwaki.structured.removal import shrink
from niwaki.structured.running import evaluating, run

Widths = NDArray[np.int64]
"""Units kept: shape ``[choices, groups]``."""

SMALLEST_SHARE = 1e-9


class Cost(Protocol):
    """What choices cost."""

    def __call__(self, widths: Widths, /) -> NDArray[np.float64]:
        """Return the cost of every choice as a share of that of the whole model: shape ``[choices]``."""
        ...


# -- masks of units ------------------------------------------------------------------------------------------------------------


def unit_masks(model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> Masks:
    """Return the masks of all parameters that have entries of units that are not kept; True = active.

    Args:
        model: whose groups they are.
        groups: at least those in ``kept``.
        kept: name of a group -> bool, one for each unit.

    >>> from niwaki.dependency import find_groups
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> masks = unit_masks(model, find_groups(model, torch.ones(1, 3)), {"0": torch.tensor([True, False])})
    >>> masks["2.weight"], masks["0.bias"]
    (tensor([[ True, False]]), tensor([ True, False]))
    """
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    masks: dict[str, Tensor] = {}
    for group in groups:
        if group.name not in kept:
            continue
        for member in group.members:
            if member.name not in parameters:  # a buffer
                continue
            parameter = parameters[member.name]
            units = member.units.to(parameter.device)
            entries = torch.where(units < 0, True, kept[group.name].to(parameter.device)[units.clamp(min=0)])
            across = entries.view([-1 if d == member.dim else 1 for d in range(parameter.ndim)]).expand(parameter.shape)
            masks[member.name] = masks[member.name] & across if member.name in masks else across.clone()
    return Masks(masks)


# -- FLOPs ---------------------------------------------------------------------------------------------------------------------

Entries = tuple[tuple[float, tuple[int, ...]], ...]
"""A dimension as parts: the share of its entries, and the groups of which an entry needs a unit each."""


@dataclass(frozen=True)
class FlopCost:
    """FLOPs of a forward pass as a function of widths, counted as :func:`niwaki.metrics.flops.forward_flops` does.

    ``FLOPs = Σ_w F_w Π_d Σ_p share_p Π_(g in p) width_g / size_g`` over the weights w, their dimensions d and the parts p of those.
    Products between activations shrink with the heads of the attention that they are in.

    Attributes:
        dense: FLOPs of the whole model on the example.
        sizes: of the groups.
        terms: FLOPs of each weight of the whole model, and its dimensions that belong to groups.
    """

    dense: float
    sizes: tuple[int, ...]
    terms: tuple[tuple[float, tuple[Entries, ...]], ...]

    @classmethod
    def of(cls, model: nn.Module, groups: Sequence[Group], example: Example) -> FlopCost:
        """Count the uses of every weight in one forward pass.

        Raises:
            InputError: the units of a group differ in size in some tensor, so that widths do not tell what is left of it.

        >>> from niwaki.dependency import find_groups
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> cost = FlopCost.of(model, find_groups(model, torch.ones(1, 3)).removable, torch.ones(1, 3))
        >>> cost.dense, cost(np.array([[4], [1]])).tolist()
        (40.0, [1.0, 0.25])
        """
        heads = {at: _scope(group) for at, group in enumerate(groups) if group.kind in ("head", "query_head")}
        flops, products = _counted(model, example, heads.values())
        terms = []
        for name, counted in flops.items():
            dims: dict[int, list[tuple[int, Tensor]]] = {}
            for at, group in enumerate(groups):
                for member in group.members:
                    own = dims.setdefault(member.dim, []) if member.name == name else []
                    if not any(at == other and torch.equal(member.units, units) for other, units in own):  # made and read alike, in an LSTM
                        own.append((at, member.units))
            terms.append((counted, tuple(_entries(units, groups, name) for units in dims.values())))
        for scope, counted in products.items():
            terms.append((counted, (((1.0, tuple(at for at, where in heads.items() if scope and where == scope)),),)))
        return cls(sum(counted for counted, _ in terms), tuple(group.size for group in groups), tuple(terms))

    def __call__(self, widths: Widths) -> NDArray[np.float64]:
        """Return the share of the whole model's FLOPs that each choice has."""
        kept = widths / np.array(self.sizes)
        total = np.zeros(len(widths))
        for flops, dims in self.terms:
            left = np.full(len(widths), flops)
            for parts in dims:
                left *= sum(share * np.prod(kept[:, list(needs)], axis=1) for share, needs in parts)
            total += left
        return np.asarray(total / max(self.dense, SMALLEST_SHARE), dtype=np.float64)


class _Call(nn.Module):
    """A model that is called on an example, whatever its arguments. The prefix ``module`` is none of a canonical name."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.module = getattr(model, "_orig_mod", model)
        self.arguments = arguments(example)

    def forward(self) -> Any:
        args, kwargs = self.arguments
        return self.module(*args, **kwargs)


def _counted(model: nn.Module, example: Example, scopes: Iterable[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the FLOPs of every weight, and of the products between activations inside each module of ``scopes`` and (``""``) elsewhere."""
    call = _Call(model, example)
    found = forward_flops(call, (), examples=1)
    weights = {layer.name: layer.dense for layer in found.layers}
    products = {"": found.activation_products}
    if any(scopes):
        with observing(call), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
        counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
        for scope in dict.fromkeys(filter(None, scopes)):
            inside = sum(flops for name, flops in weights.items() if name.startswith(f"{scope}."))
            products[scope] = min(max(0.0, counts.get(f"_Call.module.{scope}", 0) - inside), products[""])
            products[""] -= products[scope]
    return weights, products


def _scope(group: Group) -> str:
    """Return the smallest module that holds all weights of a group."""
    levels = zip(*(member.name.split(".")[:-1] for member in group.members), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _entries(units: Sequence[tuple[int, Tensor]], groups: Sequence[Group], name: str) -> Entries:
    """Return the parts of a dimension: entries that need a unit of the same groups each, of one group twice in a product with itself."""
    table = torch.stack([row for _, row in units])
    needed = table >= 0
    parts = []
    for needs in torch.unique(needed, dim=1).T:
        chosen = (needed == needs[:, None]).all(dim=0)
        inside = [(at, row) for (at, row), is_needed in zip(units, needs.tolist(), strict=True) if is_needed]
        for at, row in inside:
            counts = torch.bincount(row[chosen], minlength=groups[at].size)
            if counts.min() != counts.max():
                raise InputError(
                    f"groups: units of {groups[at].name} have different numbers of entries in {name}, so their number does not tell what is"
                    " saved; leave the group out of the search"
                )
        parts.append((int(chosen.sum()) / table.shape[1], tuple(at for at, _ in inside)))
    return tuple(parts)


# -- latency -------------------------------------------------------------------------------------------------------------------


class LatencyCost(BaseModel):
    """Latency as a function of widths, from a measured table: ``1 - Σ_g (1 - share_g(width_g))``.

    Each share was measured with the other groups whole, so what two groups save together is an estimate; measure what was chosen.

    Attributes:
        seconds: median time of the whole model.
        shares: group -> units kept -> median time as a share of the whole model's in the same rounds.
        threads: torch's threads while measuring.
        rounds: how often each was timed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = Field(gt=0)
    shares: dict[str, dict[int, float]]
    threads: int
    rounds: int

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        groups: Sequence[Group],
        example: Example,
        *,
        points: int = 8,
        rounds: int = 15,
        round_to: int = 1,
        minimum: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> LatencyCost:
        """Make the model really smaller, one group and width at a time, and time it beside the whole one on this machine.

        Args:
            model: left as it was; it is timed in evaluation mode, with torch's number of threads.
            groups: to choose units of later; all removable.
            example: arguments of the forward pass that is timed.
            points: most widths of a group that are measured, evenly spaced, the smallest first.
            rounds: how often each is timed; medians count.
            round_to: widths are multiples of this.
            minimum: smallest width.
            progress: called with the groups done and all groups.
        """
        shares: dict[str, dict[int, float]] = {}
        seconds = []
        for done, group in enumerate(groups):
            if progress:
                progress(done, len(groups))
            widths = thinned(choices(group.size, round_to, minimum), points)
            models = {width: with_widths(model, groups, {group.name: torch.arange(group.size) < width}, example) for width in widths[1:]}
            times = timed({group.size: model, **models}, example, rounds)
            seconds.append(times[group.size])
            shares[group.name] = {width: times[width] / times[group.size] for width in widths}
        if progress:
            progress(len(groups), len(groups))
        return cls(seconds=statistics.median(seconds), shares=shares, threads=torch.get_num_threads(), rounds=rounds)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LatencyCost:
        """Read a table.

        Raises:
            InputError: no file, or no such table.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give a table that LatencyCost.save wrote") from None
        except (ValidationError, UnicodeDecodeError) as error:
            first = str(error).partition("\n")[2].partition("\n")[0] or str(error)
            raise InputError(f"{path}: is no table of latencies ({first}); measure one with LatencyCost.measure") from None

    def widths(self, group: Group) -> list[int]:
        """Return the widths of a group that were measured, decreasing.

        Raises:
            InputError: the table is of another model.
        """
        widths = sorted(self.shares.get(group.name, {}), reverse=True)
        if not widths or widths[0] != group.size:
            raise InputError(
                f"table: it has no latencies of {group.name} with {group.size} units; measure one for this model and these groups"
            )
        return widths

    def over(self, groups: Sequence[Group]) -> Cost:
        """Return the cost for groups in an order of one's own; widths that were not measured cost nan."""
        tables = []
        for group in groups:
            table = np.full(group.size + 1, np.nan)
            for width, share in self.shares[group.name].items():
                table[width] = share
            tables.append(table)
        return partial(_additive, tables)


def _additive(tables: Sequence[NDArray[np.float64]], widths: Widths) -> NDArray[np.float64]:
    saved: NDArray[np.float64] = sum((1.0 - table[widths[:, at]] for at, table in enumerate(tables)), np.zeros(len(widths)))
    return 1.0 - saved


def choices(size: int, round_to: int, minimum: int) -> list[int]:
    """Return the widths that a group may have, decreasing: its size, and smaller multiples of ``round_to``, at least ``minimum``.

    >>> choices(10, 4, 2)
    [10, 8, 4]
    """
    return [size, *(width for width in range(size - 1, 0, -1) if width % round_to == 0 and width >= minimum)]


def thinned(widths: Sequence[int], points: int) -> list[int]:
    """Return at most ``points`` of some widths, evenly spaced, with the first and the last."""
    count = min(max(points, 2), len(widths))
    return list(widths) if count == len(widths) else [widths[round(i * (len(widths) - 1) / (count - 1))] for i in range(count)]


def with_widths(model: nn.Module, groups: Sequence[Group], kept: Mapping[str, Tensor], example: Example) -> nn.Module:
    """Return a copy of a model that has only the units that are kept."""
    return shrink(model, unit_masks(model, groups, kept), example, groups=groups).model


def timed(models: Mapping[Any, nn.Module], example: Example, rounds: int) -> dict[Any, float]:
    """Return the median seconds of a forward pass of each model in evaluation mode, all taking turns."""
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluating(model))
        times = interleaved({name: partial(run, model, example) for name, model in models.items()}, rounds, warmup=2)
    return {name: statistics.median(seconds) for name, seconds in times.items()}
