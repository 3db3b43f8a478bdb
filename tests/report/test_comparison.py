import json
from statistics import fmean, stdev

import numpy as np
import pytest
from report.reading import Page
from report.records import EXAMPLES, record, sweep
from scipy import stats

from niwaki import report
from niwaki.errors import InputError
from niwaki.report import comparison_report, occams_hill
from niwaki.training.record import Predictions, Record


@pytest.fixture(scope="module")
def runs() -> list[tuple[str, Record]]:
    return sweep()


@pytest.fixture(scope="module")
def html(runs) -> str:
    return comparison_report(runs, {"gmp-0.5-seed0": "gmp-0.5-seed0/report.html"})


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def of(runs, method: str, sparsity: float) -> list[Record]:
    return [one for label, one in runs if label.startswith(f"{method}-{sparsity}-")]


def with_accuracy(one: Record, accuracy: float) -> Record:
    """Return a run whose sparse model is so accurate."""
    measures = [
        measure.model_copy(update={"sparse": accuracy}) if measure.name == "accuracy" else measure for measure in one.results.measures
    ]
    return one.model_copy(update={"results": one.results.model_copy(update={"measures": measures})})


def find_row(page: Page, table: str, *begin: str) -> int:
    """Return the number of the row that begins so."""
    rows = [tuple(text if value is None else value for text, value in row[: len(begin)]) for row in page.tables[table][1:]]
    return rows.index(begin)


def test_settings_have_mean_and_standard_deviation_over_seeds(runs, page):
    settings = [(m, s) for m in ("gmp", "rigl") for s in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)]
    expected = [[one.headline.sparse for one in of(runs, *setting)] for setting in settings]
    expected.insert(0, [one.headline.dense for one in of(runs, "gmp", 0.5)])
    table = "part1-settings"
    assert page.column(table, "method") == ["dense", *(method for method, _ in settings)]
    assert [float(value) for value in page.column(table, "accuracy")] == pytest.approx([fmean(values) for values in expected], rel=1e-12)
    assert [float(value) for value in page.column(table, "standard deviation")] == pytest.approx(
        [stdev(values) for values in expected], rel=1e-12
    )
    assert page.column(table, "seeds") == ["3"] * 15
    changes = [fmean(one.headline.sparse - one.headline.dense for one in of(runs, *setting)) for setting in settings]
    assert [float(value) for value in page.column(table, "change")[1:]] == pytest.approx(changes, rel=1e-12)


def test_the_front_is_what_no_setting_beats(page):
    table = "part1-settings"
    points = list(zip(map(float, page.column(table, "file size")), map(float, page.column(table, "accuracy")), strict=True))
    best = [max(accuracy for size, accuracy in points if size <= limit) for limit, _ in points]
    assert page.column(table, "on the front of file size") == [
        "yes" if accuracy == most else "no" for (_, accuracy), most in zip(points, best, strict=True)
    ]


def test_every_run_has_its_numbers_and_its_link(runs, page):
    assert page.column("part1-runs", "run") == [label for label, _ in runs]
    assert [float(value) for value in page.column("part1-runs", "accuracy sparse")] == [one.headline.sparse for _, one in runs]
    assert [float(value) for value in page.column("part1-runs", "loss (number)")] == [one.measure("loss").sparse for _, one in runs]
    assert "gmp-0.5-seed0/report.html" in page.links
    baselines = {one.choices.baseline()[:8] for _, one in runs}
    assert set(page.column("part1-runs", "dense baseline")) == baselines == set(page.column("part1-baselines", "dense baseline"))


def test_limits_are_those_of_the_means(runs, page):
    dense = fmean(one.headline.dense for one in of(runs, "gmp", 0.5))
    for row, method in enumerate(("gmp", "rigl")):
        means = {s: fmean(one.headline.sparse for one in of(runs, method, s)) for s in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)}
        for points in (1, 5):
            name = f"slack at {points} point{'s' * (points > 1)}, of all parameters"
            spared = max(sparsity for sparsity, mean in means.items() if mean >= dense - points / 100)
            slack = fmean(one.measure("sparsity of all parameters").sparse for one in of(runs, method, spared))
            assert slack != pytest.approx(spared, abs=1e-4)
            assert float(page.column("part1-limits", name)[row]) == pytest.approx(slack)
        assert float(page.column("part1-limits", "best at sparsity")[row]) == max(means, key=means.__getitem__)
        begins = float(page.column("part1-limits", "C begins")[row])
        collapsed = [sparsity for sparsity, mean in means.items() if mean < dense - 0.01]
        assert min(collapsed) > begins > max(means.keys() - collapsed)


def test_a_limit_that_no_sparsity_reaches_lies_beyond_the_last():
    dense = record().headline.dense
    runs = [(str(s), with_accuracy(record(sparsity=s), a)) for s, a in ((0.5, dense + 0.01), (0.9, dense), (0.98, dense - 0.004))]
    page = Page(comparison_report(runs))
    assert float(page.column("part1-limits", "A ends")[0]) == pytest.approx(0.94)
    assert page.column("part1-limits", "C begins") == ["beyond 98 %"]
    page = Page(comparison_report([*runs[:2], ("0.95", with_accuracy(record(sparsity=0.95), dense))]))
    assert page.column("part1-limits", "A ends") == page.column("part1-limits", "C begins") == ["beyond 95 %"]
    page = Page(comparison_report(runs[:2]))  # too few to tell
    assert page.column("part1-limits", "A ends") == page.column("part1-limits", "C begins") == [""]


def test_methods_at_one_sparsity_have_no_curve_and_no_limits():
    runs = [(f"{method}{seed}", record(method, seed=seed)) for method in ("gmp", "rigl") for seed in range(2)]
    page = Page(comparison_report(runs))
    assert "Accuracy over sparsity" not in page.headings
    assert "part1-limits" not in page.tables
    page = Page(comparison_report([*runs, ("more", record(sparsity=0.5))]))
    assert "Accuracy over sparsity" in page.headings
    assert page.column("part1-limits", "method") == ["gmp", "rigl"]


def test_efficiency_is_accuracy_by_active_parameters(runs, page):
    row = find_row(page, "part1-efficiency", "rigl", "0.9")
    chosen = of(runs, "rigl", 0.9)
    accuracy = fmean(one.headline.sparse for one in chosen)
    active = fmean(one.measure("active parameters").sparse for one in chosen)
    assert float(page.column("part1-efficiency", "accuracy density")[row]) == pytest.approx(100 * accuracy / (active / 1e6))
    assert float(page.column("part1-efficiency", "odds per million")[row]) == pytest.approx(accuracy / (1 - accuracy) / (active / 1e6))


def test_damage_is_what_the_predictions_say(runs, page):
    chosen = of(runs, "gmp", 0.9)
    true = Predictions.unpack(chosen[0].results.predictions.true)
    dense, sparse = (
        np.stack([Predictions.unpack(getattr(one.results.predictions, side)) for one in chosen]) for side in ("dense", "sparse")
    )
    modes = [stats.mode(predicted, axis=0).mode for predicted in (dense, sparse)]
    differ = np.flatnonzero(modes[0] != modes[1])
    row = find_row(page, "part1-damage", "gmp", "0.9")
    assert int(page.column("part1-damage", "exemplars")[row]) == len(differ)
    assert float(page.column("part1-damage", "share of test examples")[row]) == len(differ) / EXAMPLES
    assert page.column("part1-damage", "the first of them")[row].split()[:5] == [str(i) for i in differ[:5]]
    shirt = 6
    relative = [[(row[true == shirt] == shirt).mean() - (row == true).mean() for row in predicted] for predicted in (dense, sparse)]
    row = find_row(page, "part1-classes", "gmp", "0.9", "shirt")
    assert float(page.column("part1-classes", "change beyond the average")[row]) == pytest.approx(fmean(relative[1]) - fmean(relative[0]))
    assert float(page.column("part1-classes", "p-value")[row]) == pytest.approx(stats.ttest_ind(*relative, equal_var=False).pvalue)


def test_the_same_records_give_the_same_page(runs):
    some = runs[::7]
    again = [(label, Record.model_validate(json.loads(json.dumps(one.model_dump(mode="json", by_alias=True))))) for label, one in some]
    assert comparison_report(again) == comparison_report(some)


def test_the_page_is_sound(html, page):
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    sections = ["Settings", "Accuracy over sparsity", "Trade-offs", "Parameter efficiency", "Subgroup damage", "Every run"]
    assert page.headings == ["fashion_mnist · small_cnn", *sections]
    assert len(page.figures) == 3 + 2
    assert len(html) < 800_000


def test_families_with_other_baselines_stand_apart():
    two = [("a", record()), ("b", record(task="cifar10", method="<b>bold</b>", classes=False)), ("</td><script>", record(seed=1))]
    page = Page(comparison_report(two))
    assert page.headings[0] == "fashion_mnist · small_cnn and cifar10 · small_cnn"
    assert "1. fashion_mnist · small_cnn: settings" in page.headings
    assert page.column("part2-settings", "method") == ["dense", "<b>bold</b>"]
    assert "2. cifar10 · small_cnn: subgroup damage" not in page.headings
    assert page.tags.count("script") == 1
    assert page.tags.count("b") == len(page.tables)  # each caption's own
    assert len(page.ids) == len(set(page.ids))


def test_classes_without_test_examples_do_not_shift_the_names():
    one = record()
    shifted = {
        side: Predictions.pack(Predictions.unpack(getattr(one.results.predictions, side)) + 3) for side in ("true", "dense", "sparse")
    }
    results = one.results.model_copy(update={"predictions": Predictions(**shifted)})
    page = Page(comparison_report([("a", one.model_copy(update={"results": results}))]))
    assert page.column("part1-classes", "class") == [c.name for c in one.results.classes]


def test_one_seed_has_no_deviation_and_no_test():
    page = Page(comparison_report([("a", record()), ("b", record(sparsity=0.5))]))
    assert page.column("part1-settings", "standard deviation") == [""] * 3
    assert page.column("part1-damage", "classes damaged") == [""] * 2
    assert set(page.column("part1-classes", "p-value")) == {""}
    assert "differences may be chance" in page.text


def test_a_headline_where_less_is_better():
    def turned(one: Record) -> Record:
        measures = [one.results.measures[1], *one.results.measures[2:]]
        return one.model_copy(update={"results": one.results.model_copy(update={"measures": measures})})

    page = Page(comparison_report([(str(s), turned(record(sparsity=s))) for s in (0.5, 0.9, 0.99)]))
    loss = [float(value) for value in page.column("part1-settings", "loss")]
    expected = [all(value < other for other in loss[i + 1 :]) for i, value in enumerate(loss)]  # the files get smaller from row to row
    assert page.column("part1-settings", "on the front of file size") == ["yes" if on_front else "no" for on_front in expected]
    assert any(expected)
    assert not all(expected)
    assert "part1-limits" not in page.tables
    assert "part1-efficiency" not in page.tables


def test_runs_without_the_dense_number_have_no_hill():
    one = record()
    measures = [measure.model_copy(update={"dense": None}) for measure in one.results.measures]
    bare = one.model_copy(update={"results": one.results.model_copy(update={"measures": measures})})
    assert "part1-settings" in Page(comparison_report([("a", bare)])).tables
    with pytest.raises(InputError, match="no accuracy"):
        occams_hill([("a", bare)])


def test_occams_hill_of_one_method_has_its_regions(runs, tmp_path):
    gmp = [run for run in runs if run[0].startswith("gmp")]
    svg = occams_hill(gmp)
    assert [letter for letter in "ABC" if f">{letter}</text>" in svg] == ["A", "B", "C"]
    assert not any(f">{letter}</text>" in occams_hill(runs) for letter in "ABC")
    report.write(svg, tmp_path / "hill.svg")
    assert (tmp_path / "hill.svg").read_text(encoding="utf-8") == svg
    with pytest.raises(InputError, match="different dense baselines"):
        occams_hill([*gmp, ("other", record(task="cifar10"))])
