"""The part of a comparison about who pays for sparsity: classes and single examples, over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from niwaki.metrics.subgroups import P_VALUE, RELATIVE_CHANGE, ClassChange, Exemplar, class_changes, exemplars
from niwaki.report.groups import Family, Setting
from niwaki.report.page import Cell, Content, count, number, table
from niwaki.report.words import points
from niwaki.training.record import Predictions

ABOUT = (
    "Who pays for sparsity (Hooker et al. 2019). A class is damaged when it loses more than the average example does. Pruning-identified"
    " exemplars are test examples that most sparse models see differently from most dense ones; those of one seed are simply where the"
    " two models disagree."
)

SIGNIFICANT = 0.05
"""A class counts as damaged below this adjusted p-value."""

FIRST_EXEMPLARS = 12


@dataclass(frozen=True)
class Damage:
    """What a setting did to classes and examples; ``seeds`` models of each kind say so."""

    setting: Setting
    seeds: int
    examples: int
    classes: tuple[ClassChange, ...]
    exemplars: tuple[Exemplar, ...]
    names: Mapping[int, str]


def found(setting: Setting) -> Damage | None:
    """Return what a setting did; None when its runs have no predictions of the same test examples."""
    each = [record.results for _, record in setting.runs if record.results is not None and record.results.predictions is not None]
    known = [one.predictions for one in each if one.predictions is not None]
    true, dense, sparse = ([Predictions.unpack(getattr(one, which)) for one in known] for which in ("true", "dense", "sparse"))
    if not known or any(len(one) != len(true[0]) or (one != true[0]).any() for one in true) or len(true[0]) == 0:
        return None
    before, after = np.stack(dense), np.stack(sparse)
    numbers = np.unique(true[0]).tolist()  # the record names the classes that have test examples, in this order
    names = {number: one.name for number, one in zip(numbers, each[0].classes, strict=False)}
    return Damage(setting, len(known), len(true[0]), class_changes(true[0], before, after), exemplars(true[0], before, after), names)


def parts(family: Family, key: str) -> list[str]:
    """Return the tables of a family; nothing when its targets are no classes."""
    damages = [damage for setting in family.settings if (damage := found(setting)) is not None]
    summary = table(
        f"{key}-damage",
        "Damage by setting",
        (
            "method", "sparsity", "seeds", "classes damaged", "worst class", "its change beyond the average", "its adjusted p-value",
            "exemplars", "share of test examples", "the first of them",
        ),
        [_summary(damage) for damage in damages],
        about=f"Damaged: a change beyond the average below 0, with an adjusted p-value below {SIGNIFICANT}.",
    )  # fmt: skip
    classes = table(
        f"{key}-classes",
        "Every class",
        (
            "method", "sparsity", "class", "examples", "dense recall", "sparse recall", "change", "change beyond the average", "p-value",
            "adjusted p-value",
        ),
        [_class(damage, one) for damage in damages for one in damage.classes],
        about=f"Change beyond the average: {RELATIVE_CHANGE}. P-value: {P_VALUE}.",
        folded=True,
    )  # fmt: skip
    examples = table(
        f"{key}-exemplars",
        f"Pruning-identified exemplars, the first {FIRST_EXEMPLARS} of each setting",
        ("method", "sparsity", "test example", "true class", "most dense models", "most sparse models"),
        [_exemplar(damage, one) for damage in damages for one in damage.exemplars[:FIRST_EXEMPLARS]],
        folded=True,
    )
    return [summary, classes, examples]


def _summary(damage: Damage) -> list[Content]:
    worst = min(damage.classes, key=lambda one: one.relative_change)
    tested = [one for one in damage.classes if one.adjusted_p_value is not None]
    damaged = sum(one.relative_change < 0 and (one.adjusted_p_value or 0.0) < SIGNIFICANT for one in tested)
    return [
        damage.setting.name,
        number(damage.setting.sparsity, "share"),
        count(damage.seeds),
        Cell(f"{damaged} of {len(damage.classes)}", damaged) if tested else Cell("not tested", ""),
        _name(damage, worst.number) if worst.relative_change < 0 else "none",
        Cell(points(worst.relative_change), worst.relative_change),
        _p_value(worst.adjusted_p_value),
        count(len(damage.exemplars)),
        number(len(damage.exemplars) / damage.examples, "share"),
        " ".join(str(one.index) for one in damage.exemplars[:FIRST_EXEMPLARS]) + (" …" if len(damage.exemplars) > FIRST_EXEMPLARS else ""),
    ]


def _class(damage: Damage, one: ClassChange) -> list[Content]:
    return [
        damage.setting.name,
        number(damage.setting.sparsity, "share"),
        _name(damage, one.number),
        count(one.examples),
        number(one.dense_recall, "share"),
        number(one.sparse_recall, "share"),
        Cell(points(one.change), one.change),
        Cell(points(one.relative_change), one.relative_change),
        _p_value(one.p_value),
        _p_value(one.adjusted_p_value),
    ]


def _exemplar(damage: Damage, one: Exemplar) -> list[Content]:
    said = (_name(damage, number) for number in (one.true_class, one.dense_class, one.sparse_class))
    return [damage.setting.name, number(damage.setting.sparsity, "share"), count(one.index), *said]


def _p_value(value: float | None) -> Cell:
    return number(None) if value is None else Cell(f"{value:.2g}", value)


def _name(damage: Damage, number: int) -> str:
    return damage.names.get(number, str(number))
