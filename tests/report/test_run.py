import json
import re

import pytest
from report.reading import Page
from report.records import CLASSES, record

from niwaki.errors import InputError
from niwaki.report import run_report
from niwaki.training.record import Record, Stage, Storage

EVIL = '<script>alert("x & y")</script>'


@pytest.fixture(scope="module")
def example() -> Record:
    return record()


@pytest.fixture(scope="module")
def html(example) -> str:
    return run_report(example)


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_every_measure_stands_there_with_all_its_digits_and_its_definition(example, page):
    assert page.column("numbers", "measure") == [measure.name for measure in example.results.measures]
    for side in ("dense", "sparse"):
        assert [float(value) for value in page.column("numbers", side)] == [getattr(measure, side) for measure in example.results.measures]
    assert page.column("numbers", "what it is") == [measure.definition for measure in example.results.measures]


def test_the_history_is_exact(example, page):
    for which, epochs in (("dense", example.results.dense_history), ("sparse", example.results.sparse_history)):
        table = f"history-{which}"
        assert [float(value) for value in page.column(table, "accuracy")] == [epoch.metrics["accuracy"] for epoch in epochs]
        assert [float(value) for value in page.column(table, "training loss")] == [epoch.train_loss for epoch in epochs]
        assert [float(value) for value in page.column(table, "learning rate")] == [epoch.learning_rate for epoch in epochs]
        assert [int(value) for value in page.column(table, "step")] == [epoch.step for epoch in epochs]
    assert [int(value) for value in page.column("history-sparse", "pruned")] == [
        epoch.dynamics.pruned for epoch in example.results.sparse_history
    ]
    assert set(page.column("history-dense", "pruned")) == {""}


def test_layers_formats_classes_and_stages_are_exact(example, page):
    found = example.results
    assert [int(value) for value in page.column("layers", "active")] == [layer.active for layer in found.layers]
    assert page.column("layers", "role") == ["target" if layer.target else "stays dense" for layer in found.layers]
    by_size = sorted(found.storage, key=lambda row: row.bits)
    assert page.column("storage", "format") == [row.format for row in by_size]
    assert [float(value) * 8 for value in page.column("storage", "size")] == [row.bits for row in by_size]
    bound = next(row.bits for row in found.storage if row.format == "entropy bound")
    assert [float(value) for value in page.column("storage", "size / entropy bound")] == [row.bits / bound for row in by_size]
    assert page.column("classes", "class") == list(CLASSES)
    assert [float(value) for value in page.column("classes", "change")] == [c.sparse_recall - c.dense_recall for c in found.classes]
    assert page.column("stages", "what it did") == [stage.says for stage in found.stages]


def test_what_determines_the_run_and_where_it_ran_is_told(example, page):
    said = dict(zip(page.column("choices", "choice"), page.column("choices", "value"), strict=True))
    assert said["task"] == "fashion_mnist"
    assert said["seed"] == "0"
    assert said["batch size"] == "64"
    assert said["identity"] == example.identity
    assert said["data"] == "d" * 64
    assert page.column("environment", "what") == list(example.environment)
    assert example.results.notes[0] in page.text
    assert "saliency: magnitude" in page.text
    assert "Size of the weights of a piece." in page.text  # the recipe in words


def test_agreement_counts_every_test_example(page):
    shares = [float(value) for value in page.column("agreement", "share")]
    assert sum(shares) == pytest.approx(1)
    right_in_both, only_dense, only_sparse, *_ = shares
    accuracy = page.column("numbers", "measure").index("accuracy")
    assert right_in_both + only_dense == pytest.approx(float(page.column("numbers", "dense")[accuracy]))
    assert right_in_both + only_sparse == pytest.approx(float(page.column("numbers", "sparse")[accuracy]))


def test_it_can_be_rebuilt_from_run_json_alone(example, html):
    text = json.dumps(example.model_dump(mode="json", by_alias=True))
    assert run_report(Record.model_validate(json.loads(text))) == html


def test_it_needs_nothing_from_elsewhere(html, page):
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "url(http" not in html
    assert "@import" not in html
    assert len(html) < 400_000


def test_ids_are_unique_and_references_lead_somewhere(html, page):
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_headings_captions_and_figures_speak(page):
    assert page.headings[0] == "gmp on fashion_mnist · small_cnn"
    assert page.tags.count("h1") == 1
    assert all(page.captions[table] for table in page.tables)
    assert len(page.figures) == 4 + 3 + 1 + 1 + 1
    assert all(page.figures)


def test_names_from_a_file_cannot_become_markup():
    names = (EVIL, *CLASSES[1:])
    evil = record(
        method=EVIL, task=EVIL, model=EVIL, class_names=names, notes=[EVIL], recipe={EVIL: [EVIL]},
        stages=[Stage(number=1, says=EVIL, begin=0, end=600, sparsity=0.9)],
    )  # fmt: skip
    layers = [layer.model_copy(update={"name": EVIL}) for layer in evil.results.layers]
    measures = [measure.model_copy(update={"definition": EVIL}) for measure in evil.results.measures]
    storage = [*evil.results.storage, Storage(format=EVIL, bits=8, position_bits=0, definition=EVIL)]
    results = evil.results.model_copy(update={"layers": layers, "measures": measures, "storage": storage})
    html = run_report(evil.model_copy(update={"results": results, "environment": {EVIL: EVIL}}))
    page = Page(html)
    assert page.tags.count("script") == 1
    assert "<script>alert" not in html
    assert page.column("stages", "what it did") == [EVIL]
    assert page.column("environment", "what") == [EVIL]
    assert page.column("classes", "class")[0] == EVIL


def test_dollars_make_no_formula_and_a_recipe_that_nobody_knows_is_shown_as_data():
    names = ("$x_$", r"$\frac$", "c")
    page = Page(run_report(record(class_names=names, method="$a^$", recipe={"sparsity": 0.9, "saliency": "my_own_saliency"}, epochs=1)))
    assert page.column("classes", "class") == list(names)
    assert page.column("history-sparse", "step") == ["50"]
    assert "saliency: my_own_saliency" in page.text
    assert "cannot put the recipe into words" in page.text


def test_what_a_run_has_not_is_left_out():
    bare = record(classes=False, dynamics=False, latency=False, stages=[])
    results = bare.results.model_copy(update={"dense_history": [], "storage": [], "notes": [], "start_metrics": {"accuracy": 0.5}})
    page = Page(run_report(bare.model_copy(update={"results": results})))
    assert not {"Speed", "Classes", "Size", "Notes"} & set(page.headings)
    assert "before any training: accuracy 50.00 %" in page.text
    assert len(page.figures) == 2 + 3
    assert "history-dense" not in page.tables


def test_measures_may_be_missing_on_a_side():
    one = record()
    measures = [measure.model_copy(update={"dense": None}) for measure in one.results.measures]
    page = Page(run_report(one.model_copy(update={"results": one.results.model_copy(update={"measures": measures})})))
    assert set(page.column("numbers", "dense")) == {""}


def test_a_run_that_trained_nothing():
    pruned = record(kind="prune")
    results = pruned.results.model_copy(update={"dense_history": [], "sparse_history": []})
    page = Page(run_report(pruned.model_copy(update={"results": results})))
    assert "Over time" not in page.headings
    assert "a trained model, pruned" in page.text


def test_an_unfinished_run_is_refused(example):
    with pytest.raises(InputError, match="has not finished"):
        run_report(example.model_copy(update={"results": None}))


def test_definitions_know_how_many_columns_stand_above_them_on_a_phone(html):
    counted = dict(re.findall(r'<table id=(\w+) class=told style="--columns:(\d)"', html))
    assert counted == {"numbers": "4", "storage": "5"}  # without the definition, and the unit
