"""Which runs belong together, and what they have in common: pure functions over records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Literal, TypeVar

from niwaki.errors import InputError
from niwaki.training.record import Choices, Measure, Record, Results

SPARSITY = "sparsity of the targets"
SPARSITY_OF_ALL = "sparsity of all parameters"
FILE_SIZE = "file size"
FLOPS = "forward FLOPs"
ACTIVE = "active parameters"

Labelled = tuple[str, Record]

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def results(label: str, record: Record) -> Results:
    """Return what a finished run found; InputError for one that has not finished."""
    if record.results is None:
        raise InputError(f"{label}: this run has not finished; give the command that started it again to finish it")
    return record.results


def find(record: Record, name: str) -> Measure | None:
    """Return a measure of a finished run by its name, if it has one."""
    assert record.results is not None
    return next((measure for measure in record.results.measures if measure.name == name), None)


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but their seed, seen from one side.

    Attributes:
        name: of the method; numbered where one method has several settings at the same sparsity.
        runs: ordered by seed.
        side: of which model of a run it speaks.
    """

    name: str
    runs: tuple[Labelled, ...]
    side: Literal["dense", "sparse"] = "sparse"

    def values(self, measure: str) -> list[float]:
        """Return a measure, for each run that has it."""
        found = (getattr(m, self.side) for _, record in self.runs if (m := find(record, measure)) is not None)
        return [value for value in found if value is not None]

    def mean(self, measure: str) -> float | None:
        """Return the mean of a measure over the runs; None where no run has it."""
        values = self.values(measure)
        return mean(values) if values else None  # exact: the mean of equal numbers is that number

    def changes(self, measure: str) -> list[float]:
        """Return the difference of a measure to the dense model of the same run, for each run that has both."""
        pairs = ((getattr(m, self.side), m.dense) for _, record in self.runs if (m := find(record, measure)) is not None)
        return [value - dense for value, dense in pairs if value is not None and dense is not None]

    @property
    def sparsity(self) -> float:
        """Mean sparsity of the targets; 0 where it was not measured."""
        return self.mean(SPARSITY) or 0.0

    @property
    def title(self) -> str:
        """The method and its sparsity."""
        return f"{self.name} {100 * self.sparsity:.4g} %"


@dataclass(frozen=True)
class Family:
    """Settings with the same dense baseline but for its seed, ordered by method and sparsity, and one run of each baseline."""

    settings: tuple[Setting, ...]
    dense: Setting

    @property
    def all(self) -> tuple[Setting, ...]:
        """The dense baseline and the settings."""
        return (self.dense, *self.settings)

    @property
    def runs(self) -> list[Labelled]:
        """All runs."""
        return [run for setting in self.settings for run in setting.runs]

    @property
    def first(self) -> Record:
        """One of its runs, for what all have in common."""
        return self.dense.runs[0][1]

    @property
    def title(self) -> str:
        """The task and the model."""
        return f"{self.first.choices.task} · {self.first.choices.model}"

    @property
    def measures(self) -> list[Measure]:
        """One of each measure that a run has, the headline first."""
        found = {measure.name: measure for _, record in self.runs if record.results for measure in record.results.measures}
        return sorted(found.values(), key=lambda measure: measure.name != self.first.headline.name)

    def methods(self) -> dict[str, list[Setting]]:
        """Return the settings of each method, the sparser ones later."""
        return _grouped(self.settings, lambda setting: setting.name)


def families(runs: Sequence[Labelled]) -> list[Family]:
    """Return the families of runs, in the order in which they first appear. The same run given twice counts once.

    Raises:
        InputError: no run, or one that has not finished.
    """
    if not runs:
        raise InputError("a comparison needs at least one finished run")
    for label, record in runs:
        results(label, record)
    once = list({record.identity: (label, record) for label, record in reversed(runs)}.values())[::-1]
    return [_family(members) for members in _grouped(once, lambda run: _without_seed(run[1]).baseline()).values()]


def _family(members: Sequence[Labelled]) -> Family:
    by_seed = sorted(members, key=lambda run: run[1].choices.seed)
    settings = [Setting(group[0][1].choices.method_name, tuple(group)) for group in _grouped(by_seed, _setting).values()]
    baselines = {record.choices.baseline(): (label, record) for label, record in reversed(by_seed)}
    return Family(
        settings=tuple(sorted(_told_apart(settings), key=lambda setting: (setting.name, setting.sparsity))),
        dense=Setting("dense", tuple(baselines.values())[::-1], "dense"),
    )


def _setting(run: Labelled) -> Hashable:
    return _without_seed(run[1]).identity(), run[1].choices.method_name


def _without_seed(record: Record) -> Choices:
    return record.choices.model_copy(update={"seed": 0})


def _told_apart(settings: Sequence[Setting]) -> list[Setting]:
    """Number the settings of a method by what their recipes say beside the sparsity, if two of them are equally sparse."""
    found: list[Setting] = []
    for name, group in _grouped(settings, lambda setting: setting.name).items():
        if max(Counter(round(setting.sparsity, 6) for setting in group).values()) == 1:
            found += group
            continue
        variants = list(_grouped(group, _variant).values())
        found += [Setting(f"{name} ({i})" if len(variants) > 1 else name, one.runs) for i, same in enumerate(variants, 1) for one in same]
    return found


def _variant(setting: Setting) -> Hashable:
    choices = setting.runs[0][1].choices
    return choices.kind, json.dumps({slot: said for slot, said in choices.recipe.items() if slot != "sparsity"}, sort_keys=True)


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which points no other one beats: (cost, quality), where another one beats it that is no worse in both and better in one.

    >>> pareto_front([(1, 0.8), (2, 0.9), (2, 0.85), (3, 0.9)])
    [True, True, False, False]
    """
    return [not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points) for cost, quality in points]
