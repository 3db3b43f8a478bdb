"""The file of a sweep: axes, their product, and the runs that it comes to, all of them checked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from niwaki import catalogue, tasks
from niwaki.errors import InputError, did_you_mean
from niwaki.recipe.strict import Strict
from niwaki.recipe.text import parse
from niwaki.tasks import Task
from niwaki.training import jobs
from niwaki.training.record import Choices


class Point(Strict):
    """What one run was asked to be; the fields are the options of ``niwaki run``, and mean the same.

    Attributes:
        training: settings of the training that differ from the model's own.
    """

    model_config = ConfigDict(strict=True)

    task: str
    method: str
    model: str | None = None
    sparsity: float | None = None
    cut: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: str | None = None
    start: Annotated[str | None, Field(alias="from")] = None
    training: dict[str, Any] = Field(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        """What the file says of it: field or setting -> value."""
        return self.model_dump(by_alias=True, exclude_unset=True, exclude={"training"}) | self.training

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.given.items())


NAMED = ("method", "sparsity", "seed")
"""Fields that the name of a folder always has."""

IDENTITY = 8
"""Digits of a run's identity in the name of its folder."""

LONGEST_VALUE, LONGEST_NAME = 24, 160
"""Characters of a value in the name of a folder, and of the whole name."""

FIELDS = (*(field.alias or name for name, field in Point.model_fields.items()), "epochs")
"""What a sweep file can have; ``epochs`` is short for ``training: {epochs: ...}``."""

RUNS = "runs"
"""The field that holds several sweeps in one file."""


@dataclass(frozen=True)
class Run:
    """A run of a sweep, checked: what was asked, what it comes to, and the name of its folder."""

    point: Point
    choices: Choices
    folder: str


def read_points(path: Path) -> list[Point]:
    """Read a sweep file: a list is an axis, any other value is fixed, and the points are the product, the last axis fastest.

    Raises:
        InputError: the file cannot be read, or one of its fields is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return points(parse(text, str(path)), str(path))


def points(data: Any, where: str) -> list[Point]:
    """Return the points of a sweep that is given as plain data; ``where`` names it in errors.

    With ``runs``, a list of further fields, they are those of one product after the other: each item says more than the fields around
    it, or other things.

    >>> [str(point) for point in points({"task": "digits", "method": ["gmp", "rigl"], "sparsity": 0.9}, "example")]
    ['task digits, method gmp, sparsity 0.9', 'task digits, method rigl, sparsity 0.9']
    >>> [str(point) for point in points({"task": "digits", "runs": [{"method": "gmp"}, {"method": "str", "seed": 1}]}, "example")]
    ['task digits, method gmp', 'task digits, method str, seed 1']

    Raises:
        InputError: an unknown or missing field, a value of the wrong type, or an empty list.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected fields such as `task: digits` and `method: [gmp, rigl]`, got {data!r:.60}")
    if RUNS not in data:
        return _product(data, where)
    around = {name: value for name, value in data.items() if name != RUNS}
    if not isinstance(data[RUNS], list) or not data[RUNS] or not all(isinstance(one, Mapping) for one in data[RUNS]):
        raise InputError(f"{where}: {RUNS}: expected a list of fields such as [{{method: gmp}}, {{method: str, cut: true}}]")
    return [point for i, one in enumerate(data[RUNS]) for point in _product(around | one, f"{where}: {RUNS}[{i}]")]


def _product(data: Mapping[str, Any], where: str) -> list[Point]:
    axes: dict[tuple[str, ...], list[Any]] = {}
    for name, value in data.items():
        if name not in FIELDS:
            raise InputError(f"{where}: unknown field {str(name)!r}; {did_you_mean(str(name), FIELDS)}")
        if name == "training" and not isinstance(value, Mapping):
            raise InputError(f"{where}: training: expected settings such as {{learning_rate: [0.1, 0.01]}}, got {value!r:.60}")
        for place, values in _axes(name, value):
            if place in axes:
                raise InputError(f"{where}: epochs: stands twice, also in training; say it once")
            if values == []:
                raise InputError(f"{where}: {'.'.join(place)}: an empty list has nothing to run; give values, or leave the field out")
            axes[place] = values if isinstance(values, list) else [values]
    found = []
    for values in product(*axes.values()):
        fields: dict[str, Any] = {}
        for place, value in zip(axes, values, strict=True):
            if place[0] == "training":
                fields.setdefault("training", {})[place[1]] = value
            else:
                fields[place[0]] = value
        try:
            found.append(Point(**fields))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return found


def _axes(name: str, value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if name == "training":
        yield from ((("training", str(setting)), values) for setting, values in value.items())
    else:
        yield (("training", "epochs") if name == "epochs" else (name,)), value


def plan(points: Sequence[Point], where: str) -> list[Run]:
    """Return the runs of a sweep, all of them checked before the first one begins; points that come to the same run are one.

    Raises:
        InputError: a point that cannot be run: which, and why.
    """
    known: dict[tuple[str | None, ...], Task] = {}
    axes = _several(points)
    runs: dict[str, Run] = {}
    fits: set[str] = set()
    for point in points:
        try:
            job = resolve(point, known)
            alike = point.model_copy(update={"seed": 0}).model_dump_json()
            if alike not in fits:
                job.plans()
                fits.add(alike)
        except InputError as error:
            error.args = (f"{where}: {point}: {error}",)  # the same error, as it may carry the traceback of a user's own file
            raise
        runs.setdefault(job.choices.identity(), Run(point, job.choices, _folder(point, job.choices, axes)))
    return list(runs.values())


def _several(points: Sequence[Point]) -> list[str]:
    """Return the fields and settings that differ between points, without those that a folder's name has anyway."""
    given = [point.given for point in points]
    names = dict.fromkeys(name for one in given for name in one if name not in NAMED)
    return [name for name in names if len({repr(one.get(name)) for one in given}) > 1]


def _folder(point: Point, choices: Choices, axes: Sequence[str]) -> str:
    """Return the name of a run's folder: readable, and unlike that of any other run, as it ends with its identity."""
    sparsity = choices.recipe.get("sparsity")
    words = [Path(point.method).stem, *([] if sparsity is None else [f"{sparsity:g}"])]
    for name in axes:
        value = Path(str(point.given.get(name))).name
        words.append(re.sub(r"[^A-Za-z0-9._]+", "_", f"{name}_{value[-LONGEST_VALUE:]}"))
    return f"{'-'.join([*words, f'seed{point.seed}'])[:LONGEST_NAME]}-{choices.identity()[:IDENTITY]}"


def resolve(point: Point, known: dict[tuple[str | None, ...], Task]) -> jobs.Job:
    """Return the job of a point; ``known`` keeps tasks, whose data are loaded once.

    Raises:
        InputError: one of the point's fields is wrong.
    """
    name = (point.task, point.model, point.data)
    if name not in known:
        task = tasks.find(point.task, point.model)
        known[name] = replace(task, data=cache(task.data))
    folder = point.data or os.environ.get("NIWAKI_DATA")
    return jobs.job(
        known[name],
        catalogue.find(point.method, point.sparsity, point.cut),
        method=point.method,
        data_folder=None if folder is None else Path(folder),
        model=point.model,
        seed=point.seed,
        training=point.training,
        start=None if point.start is None else Path(point.start),
    )
