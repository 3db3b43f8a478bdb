"""What the README and the pages say was measured is what the committed run.json files say."""

import importlib.util
import json
import math
import re
from pathlib import Path
from statistics import fmean

import pytest
import scipy.stats

from niwaki.training.record import read

ROOT = Path(__file__).resolve().parents[2]
LEAGUES = ["fashion_mnist"]


def results_module():
    spec = importlib.util.spec_from_file_location("docs_results", ROOT / "docs" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_readme_are_up_to_date():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- results: " in text
    assert results_module().fill(text) == text, "run: python docs/results.py"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results").rglob("run.json")), ids=lambda path: str(path.parent.relative_to(ROOT / "results"))
)
def test_every_committed_record_is_whole(path):
    record = read(path)
    assert record.results is not None
    assert record.identity == record.choices.identity()


def test_a_table_says_what_the_records_say():
    """Computed again from the plain JSON."""
    table = results_module().table("fashion_mnist")
    runs = [json.loads(path.read_text()) for path in (ROOT / "results" / "fashion_mnist").rglob("run.json")]
    rigl = [run for run in runs if run["choices"]["method"] == "rigl" and run["choices"]["recipe"]["sparsity"] == 0.98]
    values = [100 * run["results"]["measures"][0]["sparse"] for run in rigl]
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    assert len(values) == 3
    line = next(line for line in table.splitlines() if line.startswith("| `rigl` | 98 %"))
    assert re.search(rf"\| {mean:.2f} ± {deviation:.2f} % \|", line)


def test_the_picture_is_drawn_from_the_committed_runs():
    module = results_module()
    assert (ROOT / "docs" / "occams_hill.svg").read_text(encoding="utf-8") == module.picture("digits_occams_hill")


def test_the_structured_table_has_every_case():
    """Counted and computed again from the plain JSON."""
    page = results_module().fill((ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    rows = json.loads((ROOT / "results" / "structured" / "cifar10.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        start = f"| {row['network']} | {row['criterion']} | {row['by']} | {row['allocation']} | {row['flops_ratio']:.2f}× |"
        [line] = [line for line in page.splitlines() if line.startswith(start)]
        assert line.endswith(f"| {100 * row['accuracy']:.2f} % |")
    assert page.count("| niwaki | uniform |") == sum(row["by"] == "niwaki" for row in rows)


@pytest.mark.parametrize("name", ["lenet_300_100", "resnet20"])
def test_the_table_of_criteria_says_what_was_measured(name):
    """Computed again from the plain JSON."""
    rows = json.loads((ROOT / "results" / "oneshot" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    table = results_module().oneshot(name)
    sparsities = sorted({row["sparsity"] for row in rows})
    for method in {row["method"] for row in rows}:
        line = next(line for line in table.splitlines() if f"| `{method}` | cut |" in line)
        cells = [cell.strip() for cell in line.split("|")[4 : 4 + len(sparsities)]]
        for sparsity, cell in zip(sparsities, cells, strict=True):
            values = [100 * row["accuracy_cut"] for row in rows if row["method"] == method and row["sparsity"] == sparsity]
            assert cell.split(" ± ")[0] == (f"{sum(values) / len(values):.1f}" if values else "")
            assert len(values) < 2 or float(cell.split(" ± ")[1]) == pytest.approx((max(values) - min(values)) / 2, abs=0.051)


def test_the_table_of_blocks_says_what_was_measured():
    rows = json.loads((ROOT / "results" / "oneshot" / "blocks.json").read_text(encoding="utf-8"))["rows"]
    table = results_module().oneshot("blocks")
    for row in rows:
        value = row["nats"] if row.get("nats") is not None else row["similarity"]
        assert f"| {row['network']} | {row['pattern'] or 'dense'} | `{row['method']}` |" in table
        assert f" {value:.4f} |" in table


# ---------------------------------------------------------------- the league


def league_rows(name):
    """The finished runs of a league, from the plain JSON."""
    return [row for row in json.loads((ROOT / "results" / "league" / f"{name}.json").read_text(encoding="utf-8"))["runs"] if row["found"]]


def cells_of(table, start):
    [line] = [line for line in table.splitlines() if start in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", LEAGUES)
def test_the_league_says_what_the_runs_say(name):
    """Every cell computed again: mean and half the range over seeds, the best of a column in bold, what the training cost."""
    table = results_module().league.table(name)
    asked = [row for row in league_rows(name) if row["point"].get("sparsity") is not None]
    sparsities = sorted({row["point"]["sparsity"] for row in asked})
    values = {}
    for row in asked:
        values.setdefault((Path(row["point"]["method"]).stem, row["point"]["sparsity"]), []).append(100 * row["headline"]["sparse"])
    for method in {method for method, _ in values}:
        cells = cells_of(table, f"| `{method}` |")
        for sparsity, cell in zip(sparsities, cells[3 : 3 + len(sparsities)], strict=True):
            found = values.get((method, sparsity), [])
            mean, _, around = cell.strip("*").partition(" ± ")
            assert mean == (f"{sum(found) / len(found):.2f}" if found else "")
            assert len(found) < 2 or float(around) == pytest.approx((max(found) - min(found)) / 2, abs=0.0051)
            if cell.startswith("**"):
                assert sum(found) / len(found) == max(sum(v) / len(v) for (_, s), v in values.items() if s == sparsity)
    for method in ("gmp", "rigl"):
        first = [row["found"] for row in asked if row["point"]["method"] == method and row["point"]["sparsity"] == sparsities[0]]
        cost = sum(row["training_flops"] for row in first) / len(first)  # these last as long as the dense training
        assert cells_of(table, f"| `{method}` |")[-2].startswith(f"{cost:.2f}")


def test_small_dense_networks_have_as_many_parameters_as_the_sparse_ones():
    rows = league_rows("fashion_mnist")
    left = {row["point"]["sparsity"]: row["found"]["active_parameters"] for row in rows if row["point"]["method"] == "static_uniform"}
    small = {float(row["point"]["model"].removeprefix("as_many_as_")): row["found"] for row in rows if "model" in row["point"]}
    assert small.keys() >= left.keys() >= {0.8}
    for sparsity, found in ((sparsity, small[sparsity]) for sparsity in left):
        assert found["active_parameters"] == pytest.approx(left[sparsity], rel=0.06)  # one unit more or less, where there are eight
        assert found["forward_flops"] == found["dense_forward_flops"]


@pytest.mark.parametrize("name", LEAGUES)
def test_relations_are_paired_by_seed(name):
    table = results_module().league.relations(name)
    rows = league_rows(name)
    heads, cells = cells_of(table, "| expected |"), cells_of(table, "| RigL ≥ SET |")
    for head, cell in zip(heads[1:], cells[1:], strict=True):
        here = [row for row in rows if row["point"].get("sparsity") == float(head.removesuffix(" %")) / 100]
        better, worse = (
            {row["point"]["seed"]: 100 * row["headline"]["sparse"] for row in here if row["point"]["method"] == method}
            for method in ("rigl", "set")
        )
        found = [better[seed] - worse[seed] for seed in better if seed in worse]
        assert bool(cell) == bool(found)
        if found:
            assert float(cell.strip("*").split(" ± ")[0]) == pytest.approx(sum(found) / len(found), abs=0.0051)
            assert cell.startswith("**") == (len(found) > 1 and max(found) < 0)


@pytest.mark.parametrize("name", LEAGUES)
def test_the_pictures_of_the_league_are_up_to_date(name):
    league = results_module().league
    assert (ROOT / "docs" / league.PICTURES[name]).read_text(encoding="utf-8") == league.picture(name), "run: python docs/results.py"


PHENOMENA = sorted((ROOT / "results" / "phenomena").glob("*.json"))


@pytest.mark.parametrize("path", PHENOMENA, ids=lambda path: path.stem)
def test_every_phenomenon_that_was_measured_is_told_and_shown(path):
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"<!-- phenomenon: {path.stem} -->" in page
    assert f"(phenomena_{path.stem}.svg)" in page
    assert (ROOT / "docs" / f"phenomena_{path.stem}.svg").is_file()
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert not [row for row in rows if "error" in row]
    table = results_module().phenomenon(path.stem)
    assert f"\n\n{table}\n\n" in results_module().fill(page)
    assert {row["network"] for row in rows} == {line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]}


def test_paired_differences_are_those_of_the_plain_json():
    rows = json.loads((ROOT / "results" / "phenomena" / "dense_sparse_dense.json").read_text(encoding="utf-8"))["rows"]
    table = results_module().phenomenon("dense_sparse_dense")
    gains = [100 * (row["accuracy"]["0.3"] - row["accuracy"]["dense"]) for row in rows]
    low, high = scipy.stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert f"| 30 % | {100 * fmean(row['accuracy']['dense'] for row in rows):.2f} ±" in table
    assert f"| {fmean(gains):+.2f} ± {(high - low) / 2:.2f} | {sum(gain > 0 for gain in gains)} of {len(gains)} |" in table
    rows = json.loads((ROOT / "results" / "phenomena" / "random_tickets.json").read_text(encoding="utf-8"))["rows"]
    own = [row["accuracy"] for row in rows if row["mask"] == "synflow" and row["sparsity"] == 0.99]
    changes = [100 * (accuracy["shuffled"] - accuracy["found"]) for accuracy in own]
    low, high = scipy.stats.ttest_1samp(changes, 0).confidence_interval(0.95)
    [line] = [line for line in results_module().phenomenon("random_tickets").splitlines() if "| 99 % | synflow |" in line]
    assert f"| {fmean(changes):+.2f} ± {(high - low) / 2:.2f} |" in line


def test_critical_compressions_are_those_of_the_plain_json():
    rows = json.loads((ROOT / "results" / "phenomena" / "layer_collapse.json").read_text(encoding="utf-8"))["rows"]
    table = results_module().phenomenon("layer_collapse")
    for row in rows:
        values = [other["critical"] for other in rows if (other["network"], other["method"]) == (row["network"], row["method"])]
        mean = math.exp(fmean(map(math.log, values)))
        [line] = [line for line in table.splitlines() if line.startswith(f"| {row['network']} | {row['method']} | {row['largest']:,.0f} |")]
        assert line.split(" | ")[3].split(" ")[0] == f"{mean:,.0f}"
