"""What the README and the pages say was measured is what the committed run.json files say."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from niwaki.training.record import read

ROOT = Path(__file__).resolve().parents[2]


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
