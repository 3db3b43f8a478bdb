"""Tables of measured results, from the files in results/: for the pages, and for the README.

``python docs/results.py`` writes them into README.md, between the markers, and draws the pictures; a test checks that all are up to date.
"""

import json
import re
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from niwaki.bench.blocks import METRICS
from niwaki.bench.oneshot import METHODS
from niwaki.bench.phenomena import EXPERIMENTS
from niwaki.bench.results import stored
from niwaki.metrics.units import show
from niwaki.report import occams_hill, write
from niwaki.report.groups import Labelled, families
from niwaki.training.record import read

sys.path.insert(0, str(Path(__file__).parent))

import league

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"(<!-- results: (\S+) -->)\n.*?<!-- end -->", re.DOTALL)
STRUCTURED = re.compile(r"(<!-- structured: (\S+) -->)\n.*?<!-- end -->", re.DOTALL)
ONESHOT = re.compile(r"(<!-- oneshot: (\S+) -->)\n.*?<!-- end -->", re.DOTALL)
LEAGUE = re.compile(r"(<!-- league (table|relations|alone): (\S+) -->)\n.*?<!-- end -->", re.DOTALL)
PHENOMENON = re.compile(r"(<!-- phenomenon: (\S+) -->)\n.*?<!-- end -->", re.DOTALL)
COLUMNS = (("file size", "file"), ("forward FLOPs", "FLOPs of a forward pass"), ("training FLOPs", "training FLOPs"))


def fill(markdown: str) -> str:
    """Return a page with every ``<!-- results: FOLDER --> ... <!-- end -->`` filled with the table of that folder in results/.

    ``<!-- structured: NAME -->`` is filled with what ``niwaki bench structured`` wrote into results/structured/NAME.json, and
    ``<!-- oneshot: NAME -->`` with what ``niwaki bench oneshot`` or ``niwaki bench blocks`` wrote into results/oneshot/NAME.json.
    ``<!-- league table: NAME -->`` (or ``relations``, ``alone``) is filled with what :mod:`league` says of results/league/NAME.json.
    ``<!-- phenomenon: NAME -->`` is filled with what ``niwaki bench phenomena NAME`` wrote into results/phenomena/NAME.json.
    """
    markdown = PHENOMENON.sub(lambda found: _filled(found[1], phenomenon(found[2])), markdown)
    markdown = LEAGUE.sub(lambda found: _filled(found[1], getattr(league, found[2])(found[3])), markdown)
    markdown = ONESHOT.sub(lambda found: _filled(found[1], oneshot(found[2])), markdown)
    markdown = STRUCTURED.sub(lambda found: _filled(found[1], structured(found[2])), markdown)
    return MARKER.sub(lambda found: _filled(found[1], table(found[2])), markdown)


def _filled(marker: str, content: str) -> str:
    return f"{marker}\n\n{content}\n\n<!-- end -->"


def structured(name: str) -> str:
    """Return one line for each case of a structured benchmark, the best accuracy of a network first."""
    rows = json.loads((ROOT / "results" / "structured" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    heads = ["network", "criterion", "by", "widths", "FLOPs", "parameters", "latency, 1 image", "128 images", "dense", "cut", "fine-tuned"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in sorted(rows, key=lambda row: (row["network"], -row["accuracy"])):
        ratios = [row["flops_ratio"], row["parameters_ratio"], row["latency_ratio_1"], row["latency_ratio_128"]]
        shares = [row["accuracy_dense"], row["accuracy_before"], row["accuracy"]]
        cells = [row["network"], row["criterion"], row["by"], row["allocation"]]
        cells += [*(f"{ratio:.2f}×" for ratio in ratios), *(f"{100 * share:.2f} %" for share in shares)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def oneshot(name: str) -> str:
    """Return the table of a benchmark of criteria on trained networks, or block by block."""
    rows = json.loads((ROOT / "results" / "oneshot" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return _blocks(rows) if "pattern" in rows[0] else _cuts(rows)


def _cuts(rows: list[dict[str, Any]]) -> str:
    """Return a line for each method: accuracy after the cut at each sparsity, after recovery, and what it cost."""
    sparsities = sorted({row["sparsity"] for row in rows})
    recovered = sorted({row["sparsity"] for row in rows if row.get("accuracy_recovered") is not None})
    anew = any(row.get("accuracy_anew") is not None for row in rows)
    fields = [("accuracy_cut", sparsities), *([("accuracy_anew", sparsities)] if anew else []), ("accuracy_recovered", recovered)]
    words = {"accuracy_cut": "cut", "accuracy_anew": "statistics anew", "accuracy_recovered": "recovered"}
    heads = ["looks at", "method", "", *(f"{100 * s:g} %" for s in sparsities), "seconds", "memory"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * 3 + "--:|" * (len(heads) - 3)]
    for method in [name for name in METHODS if any(row["method"] == name for row in rows)]:
        own = [row for row in rows if row["method"] == method]
        costs = (
            (key, unit, [row[key] for row in own if row.get(key) is not None])
            for key, unit in (("seconds", "seconds"), ("memory", "bytes"))
        )
        cost = [show(max(values), unit) if values else "" for _, unit, values in costs]
        for number, (field, _) in enumerate(fields):
            cells = [_share([r[field] for r in own if r["sparsity"] == s and r.get(field) is not None]) for s in sparsities]
            first = [own[0]["family"], f"`{method}`"] if number == 0 else ["", ""]
            if any(cells):
                lines.append("| " + " | ".join([*first, words[field], *cells, *(cost if number == 0 else ["", ""])]) + " |")
    return "\n".join(lines)


def _blocks(rows: list[dict[str, Any]]) -> str:
    """Return a line for each network, method and pattern."""
    heads = ["network", "pattern", "method", *METRICS, "seconds", "memory"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * 3 + "--:|" * (len(heads) - 3)]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["pattern"], row["method"]), []).append(row)
    for (network, pattern, method), own in sorted(groups.items(), key=lambda one: one[0][:2]):
        cells = []
        for field in METRICS:
            values = [row[field] for row in own if row.get(field) is not None]
            cells.append(f"{fmean(values):.4f}" if values else "")
        costs = [
            show(max((r[key] for r in own if r.get(key) is not None), default=None), unit)
            for key, unit in (("seconds", "seconds"), ("memory", "bytes"))
        ]
        lines.append("| " + " | ".join([network, pattern or "dense", f"`{method}`", *cells, *costs]) + " |")
    return "\n".join(lines)


def _share(values: list[float]) -> str:
    """Return a mean in per cent, with half the range where there are several values."""
    if not values:
        return ""
    around = f" ± {50 * (max(values) - min(values)):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{around}"


def phenomenon(name: str) -> str:
    """Return the table of an experiment on a phenomenon."""
    return EXPERIMENTS[name].markdown(stored(ROOT / "results" / "phenomena" / f"{name}.json")["rows"])


def table(folder: str) -> str:
    """Return one line for the dense model, and one for each method and sparsity: means and standard deviations over the seeds."""
    lines = []
    for family in families(_runs(folder)):
        headline = family.first.headline
        seeds = max(len(setting.runs) for setting in family.all)
        spread = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ", 1 seed"
        heads = ["model", "sparsity", headline.name + spread, "change", *(name for _, name in COLUMNS)]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for setting in family.all:
            values, changes = setting.values(headline.name), setting.changes(headline.name)
            name = family.first.choices.model if setting is family.dense else setting.name
            cells = [
                f"{name}, dense" if setting is family.dense else f"`{name}`",
                "0" if setting is family.dense else f"{100 * setting.sparsity:.4g} %",
                _mean(values, headline.unit),
                "" if setting is family.dense else _change(changes, headline.unit),
            ]
            for measure, _ in COLUMNS:
                unit = next(one.unit for one in family.measures if one.name == measure)
                mean = setting.mean(measure)
                cells.append("" if mean is None else f"{mean:.2f}×" if measure == "training FLOPs" else show(mean, unit))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def picture(folder: str) -> str:
    """Return the accuracy of runs over their sparsity, as SVG."""
    return occams_hill(_runs(folder))


def _runs(folder: str) -> list[Labelled]:
    return [(path.parent.name, read(path)) for path in sorted((ROOT / "results" / folder).rglob("run.json"))]


def _mean(values: list[float], unit: str) -> str:
    if len(values) < 2:
        return show(values[0], unit)
    if unit == "share":
        return f"{100 * fmean(values):.2f} ± {100 * stdev(values):.2f} %"
    return f"{fmean(values):.4f} ± {stdev(values):.4f}"


def _change(values: list[float], unit: str) -> str:
    return f"{100 * fmean(values):+.2f} points" if unit == "share" else f"{fmean(values):+.4f}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8")), encoding="utf-8")
    write(picture("digits_occams_hill"), ROOT / "docs" / "occams_hill.svg")
    for name, file in league.PICTURES.items():
        write(league.picture(name), ROOT / "docs" / file)
