import importlib
import json
import subprocess
import sys

import click
import pytest

from niwaki.catalogue import METHODS
from niwaki.cli import main, niwaki
from niwaki.errors import NiwakiError
from niwaki.training import read

QUICK = ("--task", "digits", "--epochs", "2")


def commands(group: click.Group, path: tuple[str, ...] = ()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("path", [path for path, _ in commands(niwaki)], ids=" ".join)
def test_every_command_has_json_and_an_example(path, niwaki_command):
    outcome = niwaki_command(*path, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "--json" in outcome.out
    assert f"niwaki {' '.join(path)}" in outcome.out.split("Example")[1]


def test_without_a_command_there_is_help(niwaki_command):
    outcome = niwaki_command()
    assert outcome.code == 0
    assert all(name in outcome.out for name in ("run", "compare", "methods", "bench"))
    assert niwaki_command("--help").out == outcome.out


def test_a_run_is_shown_stored_and_shown_again(niwaki_command, tmp_path):
    arguments = ("run", "gmp", *QUICK, "--sparsity", "0.8", "--out", tmp_path / "run")
    first = niwaki_command(*arguments)
    assert (first.code, first.err) == (0, "")
    record = read(tmp_path / "run")
    for measure in record.results.measures:
        assert measure.name in first.out
        assert measure.definition in words(first.out)
    assert "80.00 %" in first.out
    accuracy = record.measure("accuracy")
    assert f"{100 * accuracy.dense:.2f} %" in first.out
    assert f"{100 * accuracy.sparse:.2f} %" in first.out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    again = niwaki_command(*arguments)
    assert again.code == 0
    assert "nothing was computed again" in again.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_json_of_a_run_is_its_record(niwaki_command, tmp_path):
    outcome = niwaki_command("run", "rigl", *QUICK, "--model", "convnet", "--out", tmp_path / "run", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    printed = json.loads(outcome.out)
    assert printed.pop("folder") == str(tmp_path / "run")
    assert printed == json.loads((tmp_path / "run" / "run.json").read_text())
    assert printed["choices"]["model"] == "convnet"


def test_a_recipe_file_with_another_sparsity(niwaki_command, tmp_path):
    (tmp_path / "mine.yaml").write_text("sparsity: 0.5\nsaliency: magnitude\nallocation: global\n")
    outcome = niwaki_command("run", tmp_path / "mine.yaml", *QUICK, "--sparsity", "0.75", "--out", tmp_path / "run")
    assert outcome.code == 0
    record = read(tmp_path / "run")
    assert record.choices.recipe["allocation"] == "global"
    assert record.measure("sparsity of the targets").sparse == 0.75


def test_a_final_cut_where_strength_decides(niwaki_command, tmp_path):
    outcome = niwaki_command("run", "str", *QUICK, "--cut", "--sparsity", "0.9", "--out", tmp_path / "run")
    assert outcome.code == 0
    assert read(tmp_path / "run").measure("sparsity of the targets").sparse == 0.9


def test_a_dry_run_shows_the_plan_and_writes_nothing(niwaki_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = niwaki_command("run", "gmp", *QUICK, "--sparsity", "0.9", "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    for part in ("1.weight", "19,200", "1,920", "3.weight", "30,000", "3,000", "90.00 %", "last layer", "5.weight"):
        assert part in outcome.out
    data = json.loads(niwaki_command("run", "gmp", *QUICK, "--sparsity", "0.9", "--dry-run", "--json").out)
    assert {row["name"]: row["keep"] for row in data["tensors"]} == {"1.weight": 1920, "3.weight": 3000}
    assert list(tmp_path.iterdir()) == []


def test_compare_puts_runs_of_one_baseline_side_by_side(niwaki_command, tmp_path):
    for method in ("gmp", "static_erk"):
        niwaki_command("run", method, *QUICK, "--out", tmp_path / method)
    niwaki_command("run", "gmp", *QUICK, "--seed", "1", "--out", tmp_path / "other")
    folders = [tmp_path / name for name in ("gmp", "static_erk", "other")]
    outcome = niwaki_command("compare", *folders)
    assert outcome.code == 0
    headers = [line.split() for line in outcome.out.splitlines() if line.split()[:1] == ["dense"]]
    assert headers == [["dense", "gmp", "static_erk"], ["dense", "gmp"]]
    row = next(line for line in outcome.out.splitlines() if line.startswith("accuracy"))
    records = [read(folder) for folder in folders]
    shown = [records[0].measure("accuracy").dense, *(record.measure("accuracy").sparse for record in records[:2])]
    assert [part for part in row.split() if part[0].isdigit()] == [f"{100 * value:.2f}" for value in shown]
    printed = json.loads(niwaki_command("compare", *folders, "--json").out)
    assert [run["folder"] for run in printed] == [str(folder) for folder in folders]


def test_an_unfinished_run_is_not_compared(niwaki_command, tmp_path):
    niwaki_command("run", "gmp", *QUICK, "--out", tmp_path / "run")
    data = json.loads((tmp_path / "run" / "run.json").read_text())
    data["results"] = None
    (tmp_path / "run" / "run.json").write_text(json.dumps(data))
    outcome = niwaki_command("compare", tmp_path / "run")
    assert outcome.code == 2
    assert "has not finished" in outcome.err


def test_methods_lists_the_catalogue(niwaki_command):
    outcome = niwaki_command("methods")
    assert outcome.code == 0
    rows = {line.split()[0]: line.split() for line in outcome.out.splitlines() if line.strip()}
    for name, method in METHODS.items():
        assert rows[name][1] == str(method.year)
        assert rows[name][-1] == method.fidelity
    assert [row["name"] for row in json.loads(niwaki_command("methods", "--json").out)] == list(METHODS)


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_shows_one(name, niwaki_command):
    outcome = niwaki_command("methods", name)
    assert outcome.code == 0
    method = METHODS[name]
    assert method.citation.title in words(outcome.out)
    assert all(line in words(outcome.out) for line in method.differs)
    recipe = "\n".join(line.strip() for line in method.recipe.to_yaml().splitlines())
    assert recipe in "\n".join(line.strip() for line in outcome.out.splitlines())
    assert json.loads(niwaki_command("methods", name, "--json").out)["name"] == name


@pytest.mark.parametrize("name", ["upkeep", "select"])
def test_benchmarks_show_their_rows_with_definitions(name, niwaki_command, monkeypatch):
    measurement = importlib.import_module(f"niwaki.bench.{name}")
    asked = {}
    row = ROWS[name]

    def measure(*arguments, **options):
        asked.update(options, arguments=arguments)
        return [row]

    monkeypatch.setattr(measurement, "run", measure)
    outcome = niwaki_command("bench", name, "--sparsity", "0.8", "--rounds", "11")
    assert (outcome.code, outcome.err) == (0, "")
    assert asked["sparsity"] == 0.8
    assert 11 in (asked.get("rounds"), *asked["arguments"])
    assert all(definition in words(outcome.out) for definition in measurement.DEFINITIONS)
    assert json.loads(niwaki_command("bench", name, "--json").out) == [row]


ROWS = {
    "upkeep": {
        "network": "resnet20",
        "description": "a network",
        "method": "rigl",
        "threads": 2,
        "dense_step_ms": 500.0,
        "masked_step_ms": 510.0,
        "hooks_ms": 9.0,
        "floor_ms": 2.0,
        "upkeep_by_hooks": 0.018,
        "upkeep_by_steps": 0.02,
        "update_ms": 50.0,
        "update_amortised": 0.001,
    },
    "select": {
        "scores": 1000,
        "tensors": 1,
        "method": "niwaki",
        "threads": 2,
        "seconds": 0.5,
        "speedup_over_topk": 4.0,
        "times_bound": 3.0,
        "working_bytes": None,
        "result_bytes": 1000,
        "exact": True,
    },
}


def test_what_runs_and_fails_exits_1_in_one_line(niwaki_command, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise NiwakiError("training: the loss became nan\nin epoch 3")

    monkeypatch.setattr("niwaki.training.jobs.fit", fail)
    outcome = niwaki_command("run", "gmp", *QUICK, "--out", tmp_path / "run")
    assert outcome == (1, "", "niwaki: error: training: the loss became nan in epoch 3\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyboardInterrupt(), "interrupted"), (OSError(28, "No space left on device", "x/y"), "x/y: No space left on device")],
)
def test_interruptions_exit_1_in_one_line(error, said, niwaki_command, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("niwaki.training.jobs.fit", fail)
    outcome = niwaki_command("run", "gmp", *QUICK, "--out", tmp_path / "run")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.strip() == f"niwaki: error: {said}"  # click ends the line that shows ^C
    assert list(tmp_path.iterdir()) == []


def test_a_defect_is_not_hidden(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("niwaki.training.jobs.fit", fail)
    with pytest.raises(ZeroDivisionError):
        main(["run", "gmp", *QUICK, "--out", str(tmp_path / "run")])


def test_a_reader_that_goes_away_is_no_defect(tmp_path):
    program = "import sys; from niwaki.cli import main; sys.exit(main(['methods', '--json']))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), error) == (1, b"")
