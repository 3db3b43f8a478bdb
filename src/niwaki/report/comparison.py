"""The report of several runs, from their records alone: one part for each family of runs with the same dense baseline but for its seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, sqrt
from statistics import mean

from niwaki.errors import InputError
from niwaki.metrics import efficiency
from niwaki.report import damage, drawing, figures
from niwaki.report.groups import ACTIVE, FILE_SIZE, FLOPS, SPARSITY_OF_ALL, Family, Labelled, Setting, families, find, pareto_front
from niwaki.report.page import Cell, Content, Picture, count, number, page, pictures, section, table, yes
from niwaki.report.words import change, deviation, difference
from niwaki.training.record import Measure

COSTS = {FILE_SIZE: "file size (bytes)", FLOPS: "forward FLOPs per example"}
"""What accuracy is traded against, and how the axis is called."""

FEWEST = 3
"""Sparsities that a curve needs to be divided into regions."""

LEFT_OUT = {
    SPARSITY_OF_ALL,
    "parameters",
    "weights of the targets",
    "zeros among active weights",
    "zeros of all parameters",
    "peak memory of a forward pass",
    "accuracy density",
    "parameter efficiency (odds)",
    "parameter efficiency (bits)",
}
"""Measures that the table of every run does without: they are in the run's own report, or in another table here."""


def comparison_report(records: Sequence[Labelled], links: Mapping[str, str] | None = None) -> str:
    """Return one self-contained HTML document about finished runs; the same records give the same text.

    Args:
        records: (label, record) of each run; the label says which it is, such as its folder.
        links: label -> address of the run's own report, where there is one.

    Raises:
        InputError: no run, or one that has not finished.
    """
    found = families(records)
    runs = sum(len(family.runs) for family in found)
    settings = sum(len(family.settings) for family in found)
    methods = dict.fromkeys(setting.name for family in found for setting in family.settings)
    sections: list[str] = []
    for i, family in enumerate(found, 1):
        sections += _family(family, f"part{i}", f"{i}. {family.title}: " if len(found) > 1 else "", links or {})
    about = f"{runs} runs in {settings} settings; methods: {', '.join(methods)}"
    return page(_and(list(dict.fromkeys(family.title for family in found))), about, *sections)


def occams_hill(records: Sequence[Labelled]) -> str:
    """Return the headline metric of runs of one task over their sparsity, as an SVG file of its own: light, on white.

    With one method its three regions are shaded, if they can be told.

    Raises:
        InputError: no run, one that has not finished, or runs with different tasks, models or trainings.
    """
    found = families(records)
    if len(found) > 1:
        raise InputError(f"Occam's hill: the runs have different dense baselines ({_and([one.title for one in found])}); give runs of one")
    family, metric = found[0], found[0].first.headline.name
    if not family.dense.values(metric) or not any(_over_sparsity(family, settings) for settings in family.methods().values()):
        raise InputError(f"Occam's hill: the runs have no {metric} of dense and sparse models")
    return drawing.standalone(_hill(family, family.methods()))


def _and(names: Sequence[str], most: int = 2) -> str:
    return " and ".join([*names[:most], f"{len(names) - most} more"] if len(names) > most else names)


def _family(family: Family, key: str, title: str, links: Mapping[str, str]) -> list[str]:
    """Return the sections of a family; ``key`` makes the names of its tables unique, ``title`` starts their headings."""
    seeds = len({record.choices.seed for _, record in family.runs})
    counted = f"Means over {seeds} seeds" if seeds > 1 else "One seed, so that differences may be chance"
    return [
        section(
            f"{title}settings",
            _settings(family, key),
            about=f"{counted}. A setting is a method with all its choices but the seed; the change is to the dense model of the same seed,"
            " ± the standard deviation.",
        ),
        section(
            f"{title}{family.first.headline.name} over sparsity",
            _hills(family),
            _limits(family, key),
            about="Occam's hill: at first, pruning helps or costs nothing (A), then it costs a little (B), then the model collapses (C).",
        ),
        section(
            f"{title}trade-offs",
            _trade_offs(family),
            about="A setting is on the Pareto front when no other one is at least as good in both and better in one.",
        ),
        section(f"{title}parameter efficiency", _efficiency(family, key)),
        section(f"{title}subgroup damage", *damage.parts(family, key), about=damage.ABOUT),
        section(f"{title}every run", _runs(family, key, links), _baselines(family, key), _definitions(family, key)),
    ]


def _settings(family: Family, key: str) -> str:
    first = family.first.headline
    units = {measure.name: measure.unit for measure in family.measures}
    costs = [name for name in (FILE_SIZE, FLOPS, ACTIVE, "training FLOPs", "training time") if name in units]
    fronts = {name: _on_front(family, name) for name in COSTS if name in units}
    rows: list[list[Content]] = []
    for setting in family.all:
        values, changes = setting.values(first.name), setting.changes(first.name)
        around = deviation(values)
        rows.append(
            [
                setting.name,
                number(setting.sparsity, "share"),
                count(len(setting.runs)),
                number(setting.mean(first.name), first.unit),
                Cell(difference([around], first.unit).lstrip("+") if around is not None else "-", "" if around is None else around),
                Cell(difference(changes, first.unit), mean(changes)) if changes and setting is not family.dense else number(None),
                *(number(setting.mean(name), units[name]) for name in costs),
                *(yes(setting in front) for front in fronts.values()),
            ]
        )
    columns = ["method", "sparsity", "seeds", first.name, "standard deviation", "change", *costs]
    return table(f"{key}-settings", "Settings, dense first", [*columns, *(f"on the front of {name}" for name in fronts)], rows)


def _hills(family: Family) -> str:
    """Draw all methods together, and by itself each that was measured at several sparsities."""
    methods = family.methods()
    metric = family.first.headline.name
    if not family.dense.values(metric):
        return ""
    how = "Means over seeds ± one standard error, every seed as a dot beside them. The axis is logarithmic in the share that stays."
    sizes = {name: len(_over_sparsity(family, settings)) for name, settings in methods.items()}
    chosen = [("All methods", methods)] if len(methods) > 1 and max(sizes.values()) > 1 else []
    chosen += [(name, {name: settings}) for name, settings in methods.items() if sizes[name] > 1]
    words = f"Curves of {metric} over sparsity:"
    return pictures(*(Picture(_hill(family, those), f"{name}. {how}", f"{words} {', '.join(those)}.") for name, those in chosen))


def _hill(family: Family, methods: Mapping[str, Sequence[Setting]]) -> str:
    first = family.first.headline
    curves = [figures.Curve(name, _over_sparsity(family, settings)) for name, settings in methods.items()]
    regions = _regions(family, next(iter(methods.values()))) if len(methods) == 1 else None
    return figures.occams_hill(curves, family.dense.values(first.name), metric=first.name, unit=first.unit, regions=regions)


def _over_sparsity(family: Family, settings: Sequence[Setting]) -> dict[float, list[float]]:
    """Return the headline metric of every run, by sparsity."""
    points: dict[float, list[float]] = {}
    for setting in settings:
        points.setdefault(setting.sparsity, []).extend(setting.values(family.first.headline.name))
    return {sparsity: values for sparsity, values in points.items() if values}


def _regions(family: Family, settings: Sequence[Setting]) -> efficiency.Regions | None:
    """Divide the sparsities of a method; None where too few were measured, or the metric is no share of right answers."""
    first = family.first.headline
    points = _over_sparsity(family, settings) | {0.0: family.dense.values(first.name)}
    if not _is_accuracy(first) or len(points) <= FEWEST or not points[0.0]:
        return None
    errors = [(deviation(values) or 0.0) / sqrt(len(values)) for values in points.values()]
    return efficiency.regions(list(points), [mean(values) for values in points.values()], errors)


def _is_accuracy(measure: Measure) -> bool:
    return measure.unit == "share" and measure.higher_is_better is True


def _limits(family: Family, key: str) -> str:
    """Tell for each method where its regions end, and how many of the parameters it can spare; nothing where no method was varied."""
    first = family.first.headline
    dense = family.dense.mean(first.name)
    if not _is_accuracy(first) or dense is None:
        return ""
    methods = {name: (settings, _over_sparsity(family, settings)) for name, settings in family.methods().items()}
    if max(len(points) for _, points in methods.values()) < 2:
        return ""
    rows: list[list[Content]] = []
    for name, (settings, points) in methods.items():
        if not points:
            continue
        measured = [(sparsity, mean(values)) for sparsity, values in points.items()]
        regions = _regions(family, settings)
        limits = (None, None) if regions is None else (regions.a_ends, regions.c_begins)
        beyond = number(None) if regions is None else Cell(f"beyond {100 * max(points):.4g} %")
        best = max(measured, key=lambda point: point[1])
        rows.append(
            [
                name,
                count(len(measured)),
                *(beyond if limit is None else number(limit, "share") for limit in limits),
                number(best[0], "share"),
                number(best[1], "share"),
                *(number(_slack(first.name, settings, dense, epsilon), "share") for epsilon in efficiency.EPSILONS),
            ]
        )
    slacks = [f"slack at {100 * epsilon:g} point{'s' * (epsilon > 0.01)}, of all parameters" for epsilon in efficiency.EPSILONS]
    columns = ("method", "sparsities", "A ends", "C begins", "best at sparsity", f"{first.name} there", *slacks)
    about = (
        f"As sparsities of the targets. A: within chance of the dense mean, or above. C: more than {100 * efficiency.TOLERANCE:g} point"
        f" below it. Both need {FEWEST} sparsities; “beyond” the sparsest one: none that was measured reaches so far. Slack: the largest"
        " measured sparsity of all parameters that costs no more than so many points. Single seeds leave chance unknown."
    )
    return table(f"{key}-limits", "Limits of each method", columns, rows, about=about)


def _slack(metric: str, settings: Sequence[Setting], dense: float, epsilon: float) -> float | None:
    """Return the slack of a method, as a share of all parameters; None where their sparsity was not measured."""
    pairs = ((setting.mean(SPARSITY_OF_ALL), setting.mean(metric)) for setting in settings)
    known = [(sparsity, value) for sparsity, value in pairs if sparsity is not None and value is not None]
    return efficiency.slack(known, dense, epsilon) if known else None


def _on_front(family: Family, cost: str) -> list[Setting]:
    """Return the settings that no other one beats in the headline metric and a cost."""
    first = family.first.headline
    sign = -1 if first.higher_is_better is False else 1
    known = [(one, c, m) for one in family.all if (c := one.mean(cost)) is not None and (m := one.mean(first.name)) is not None]
    front = pareto_front([(c, sign * m) for _, c, m in known])
    return [one for (one, _, _), is_on_front in zip(known, front, strict=True) if is_on_front]


def _trade_offs(family: Family) -> str:
    first = family.first.headline
    drawn = []
    for cost, axis in COSTS.items():
        front = _on_front(family, cost)
        points = [
            figures.Point(one.name, c, m, deviation(one.values(first.name)) or 0.0, one in front)
            for one in family.all
            if (c := one.mean(cost)) and (m := one.mean(first.name)) is not None
        ]
        if len(points) > 1 and points[0].series == family.dense.name:
            names = ", ".join(one.title for one in front)
            drawn.append(
                Picture(
                    figures.trade_off(points[1:], points[0], axis, first.name, first.unit),
                    f"{first.name.capitalize()} against {cost}, ± standard deviation. Filled: on the front, which the dashed line joins."
                    " Hollow: another setting is better.",
                    f"Points: {first.name} against {cost}. On the front: {names}.",
                )
            )
    return pictures(*drawn)


def _efficiency(family: Family, key: str) -> str:
    first = family.first.headline
    rows: list[list[Content]] = []
    for setting in family.all:
        accuracy, active = setting.mean(first.name), setting.mean(ACTIVE)
        if not _is_accuracy(first) or accuracy is None or not active:
            return ""
        rows.append(
            [
                setting.name,
                number(setting.sparsity, "share"),
                number(accuracy, "share"),
                number(active, "weights"),
                _figure(efficiency.accuracy_density(accuracy, round(active))),
                *(_figure(efficiency.parameter_efficiency(accuracy, round(active), name)) for name in ("odds", "bits")),
            ]
        )
    about = (
        f"Accuracy density: {efficiency.ACCURACY_DENSITY}. Odds: right answers per wrong one; bits: halvings of the error. Both say that"
        " the last points of accuracy are harder than the first, and are for a million active parameters."
    )
    columns = ("method", "sparsity", first.name, ACTIVE, "accuracy density", "odds per million", "bits per million")
    return table(f"{key}-efficiency", "Accuracy for each active parameter", columns, rows, about=about)


def _figure(value: float) -> Cell:
    """Return a number of any size, with four digits."""
    return Cell(f"{value:,.4g}" if isfinite(value) and abs(value) < 1e4 else f"{value:,.0f}", value)


def _runs(family: Family, key: str, links: Mapping[str, str]) -> str:
    first, *rest = family.measures
    others = [one for one in rest if one.name not in LEFT_OUT]
    rows: list[list[Content]] = []
    for setting in family.settings:
        for label, record in setting.runs:
            measure = find(record, first.name)
            rows.append(
                [
                    Cell(label, link=links.get(label)),
                    setting.name,
                    count(record.choices.seed),
                    record.choices.baseline()[:8],
                    *_both(measure, first),
                    *(number(None if (m := find(record, one.name)) is None else m.sparse, one.unit) for one in others),
                ]
            )
    headline = (f"{first.name} dense", f"{first.name} sparse", "change")
    columns = ("run", "method", "seed", "dense baseline", *headline, *(f"{one.name} ({one.unit})" for one in others))
    about = "All measures of a run are in its own report, and in its run.json."
    return table(f"{key}-runs", "Every run, its sparse model", columns, rows, about=about, folded=len(rows) > 12)


def _both(measure: Measure | None, like: Measure) -> tuple[Cell, Cell, Cell]:
    if measure is None:
        return number(None), number(None), number(None)
    exact = measure.sparse - measure.dense if measure.sparse is not None and measure.dense is not None else ""
    return number(measure.dense, like.unit), number(measure.sparse, like.unit), Cell(change(measure), exact)


def _baselines(family: Family, key: str) -> str:
    rows: list[list[Content]] = [
        [
            record.choices.baseline()[:8],
            str(record.choices.seed),
            *(number(None if (m := find(record, one.name)) is None else m.dense, one.unit) for one in family.measures),
        ]
        for _, record in family.dense.runs
    ]
    columns = ("dense baseline", "seed", *(f"{one.name} ({one.unit})" for one in family.measures))
    return table(f"{key}-baselines", "Dense baselines", columns, rows, folded=len(rows) > 12)


def _definitions(family: Family, key: str) -> str:
    rows = [(measure.name, measure.unit, measure.definition) for measure in family.measures]
    return table(f"{key}-definitions", "What the numbers are", ("measure", "unit", "what it is"), rows, folded=True)
