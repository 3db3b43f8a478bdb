"""``niwaki methods``: choosing among the rows, and what it says of one."""

import json
import re

import pytest

from niwaki.catalogue import METHODS, left_out
from niwaki.catalogue.search import command
from niwaki.cli import main
from niwaki.component import REGISTRY
from niwaki.recipe.stages import unroll
from niwaki.tasks import TASKS
from niwaki.training import job


def words(text):
    return " ".join(text.split())


def listed(niwaki_command, *options):
    """Return the names that the table and the JSON of a listing agree on."""
    outcome = niwaki_command("methods", *options)
    assert outcome.code == 0
    names = [row["name"] for row in json.loads(niwaki_command("methods", *options, "--json").out)]
    lines = [line.split() for line in outcome.out.splitlines()]
    assert [line[0] for line in lines if line and line[-1] in ("exact", "simplified", "alias")] == names
    assert (f"{len(names)} of {len(METHODS)} methods" in outcome.out) == (len(names) < len(METHODS))
    return names


def test_components_of_stages_are_shown_with_cost_and_use(niwaki_command):
    shown = words(niwaki_command("methods", "woodfisher").out)
    for slot, name in (("saliency", "woodfisher"), ("allocation", "global"), ("compensation", "obs")):
        component = REGISTRY[slot][name]
        assert words(f"{slot} {name}: {component.equation}") in shown
        assert words(f"cost: {component.effort}") in shown
        assert words(f"when to use it: {component.advice}") in shown


def test_the_terms_of_a_sum_are_shown(niwaki_command):
    shown = words(niwaki_command("methods", "less_is_more").out)
    assert all(words(f"penalty {name}: {REGISTRY['penalty'][name].equation}") in shown for name in ("group_lasso", "nuclear_norm"))


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_narrow_table_leaves_out_columns_and_cuts_none(columns, niwaki_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = niwaki_command("methods").out
    rows = {line.split()[0]: line for line in shown.splitlines() if line and not line.startswith(" ")}
    for name, method in METHODS.items():
        assert len(rows[name]) <= columns
        assert rows[name].split()[1] == str(method.year)
        assert rows[name].split()[-1] in ("exact", "simplified", "alias")
    assert ("No room for what" in shown) == (columns < 120)


def test_components_of_a_prune_are_shown_once(niwaki_command):
    shown = words(niwaki_command("methods", "dropnet").out)
    assert shown.count("saliency activity: ") == 1
    assert shown.count("allocation uniform: ") == 1
    assert "schedule" not in shown.partition("equations")[2].partition("recipe")[0]


def test_an_alias_is_shown_with_the_recipe_of_the_other_row(niwaki_command):
    shown = niwaki_command("methods", "deep_compression").out
    assert "fidelity        alias of train_prune_retrain" in shown
    assert "recipe (of train_prune_retrain)" in shown
    assert "niwaki run deep_compression --task digits --out runs/deep_compression" in shown
    data = json.loads(niwaki_command("methods", "deep_compression", "--json").out)
    assert (data["fidelity"], data["of"]) == ("alias_of", "train_prune_retrain")
    assert data["recipe"] == METHODS["train_prune_retrain"].recipe.to_data()


def test_conditions_are_joined(niwaki_command):
    grown = [name for name, row in METHODS.items() if "grd" in row.columns.growth]
    assert "rigl" in grown
    assert listed(niwaki_command, "--growth", "grd") == grown
    assert listed(niwaki_command, "--growth", "grd", "--year", "2020", "--what", "W", "--fidelity", "exact") == [
        name for name in grown if METHODS[name].year == 2020 and METHODS[name].fidelity == "exact"
    ]
    either = listed(niwaki_command, "--when", "alt", "--when", "stat")
    assert either == [name for name, row in METHODS.items() if {"alt", "stat"} & set(row.columns.when)]
    assert {"dsd", "expander"} <= set(either)
    plain = listed(niwaki_command, "--criterion", "obs", "--growth", "-", "--regularization", "-")
    assert plain == [n for n, r in METHODS.items() if "obs" in r.columns.criterion and r.columns.growth == r.columns.regularization == ()]
    assert listed(niwaki_command, "--fidelity", "alias_of") == [name for name, row in METHODS.items() if row.of is not None]


@pytest.mark.parametrize(
    ("years", "first", "last"), [("1990..1993", 1990, 1993), ("2023..", 2023, 9999), ("..1990", 0, 1990), ("2012", 2012, 2012)]
)
def test_years_are_a_range(years, first, last, niwaki_command):
    names = listed(niwaki_command, "--year", years)
    assert names == [name for name, row in METHODS.items() if first <= row.year <= last]
    assert names


def test_words_are_looked_for_in_titles_citations_and_components(niwaki_command):
    assert "lottery_ticket" in listed(niwaki_command, "--search", "Frankle lottery")
    assert "bert_tickets" not in listed(niwaki_command, "--search", "Wen Liu Zhuang slimming")
    assert set(listed(niwaki_command, "--search", "woodfisher")) >= {"woodfisher", "woodtaylor"}
    assert all(
        any(leaf.recipe.allocation.name == "smart_ratio" for leaf in unroll(METHODS[name].recipe))
        for name in listed(niwaki_command, "--search", "smart_ratio")
    )
    assert listed(niwaki_command, "--search", "nuclear_norm") == ["less_is_more", "compression_aware"]  # terms of a sum
    assert "None is like that" in niwaki_command("methods", "--search", "no such words").out
    assert json.loads(niwaki_command("methods", "--search", "no such words", "--json").out) == []


def test_what_is_left_out_is_listed(niwaki_command):
    rows = json.loads(niwaki_command("methods", "--left-out", "--json").out)
    assert [row["row"] for row in rows] == list(left_out())
    shown = niwaki_command("methods", "--left-out", "--search", "router switch").out
    assert re.search(r"225 +Switch +2021 +target: router", shown)
    assert "1 row left out" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--when", "dny"), "--when: unknown code 'dny'; did you mean 'dyn'?"),
        (("--year", "soon"), "--year: 'soon' is no year, and no range such as 2017..2020, 2017.. or ..2020"),
        (("--year", ".."), "--year: '..' is no year"),
        (("--year", "2020..2017"), "--year: 2020 is after 2017"),
        (("--left-out", "--when", "dyn"), "--left-out: rows that are left out have no codes and no fidelity"),
        (("rigl", "--when", "dyn"), "methods: 'rigl' is one method, so there is nothing to choose from"),
    ],
)
def test_wrong_conditions_are_told(options, said, niwaki_command):
    outcome = niwaki_command("methods", *options)
    assert outcome.code == 2
    assert said in outcome.err


RUNS_ON_DIGITS = [name for name, row in METHODS.items() if "--task digits" in command(row)]


def test_commands_are_for_tasks_that_have_what_a_method_is_about():
    other = {name: command(row) for name, row in METHODS.items() if name not in RUNS_ON_DIGITS}
    assert other.pop("eigendamage") == 'niwaki.prune(model, "eigendamage", data=data, loss=loss)'
    assert {"head_importance", "layerdrop"} <= set(other)
    assert all("--task characters --data TEXT.txt" in said for said in other.values())


@pytest.mark.parametrize("name", RUNS_ON_DIGITS)
def test_the_command_of_a_method_asks_for_what_its_task_has(name):
    found = re.fullmatch(
        rf"niwaki run {name} --task digits(?: --model (\w+))?(?: --sparsity (\S+))? --out runs/{name}", command(METHODS[name])
    )
    assert found
    recipe = METHODS[name].recipe
    assert found[2] is None or float(found[2]) in [leaf.recipe.sparsity for leaf in unroll(recipe)]
    job(TASKS["digits"], recipe, method=name, seed=0, model=found[1], training={})


def test_a_command_that_is_shown_is_carried_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command(METHODS["snap_it"]).split()[1:], "--epochs", "1"]) == 0
    assert (tmp_path / "runs" / "snap_it" / "run.json").exists()
    assert "Saved in" in capsys.readouterr().out
