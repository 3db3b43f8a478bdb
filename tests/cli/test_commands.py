import importlib
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from cli.driving import TASK

from niwaki.catalogue import METHODS
from niwaki.cli import main, niwaki, tables
from niwaki.errors import NiwakiError
from niwaki.formats import load
from niwaki.tasks import find
from niwaki.training import read

QUICK = ("--task", "digits", "--epochs", "1")


def commands(group: click.Group, path: tuple[str, ...] = ()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def words(text: str) -> str:
    return " ".join(text.split())


def files(folder: Path) -> dict[str, int]:
    """Return when each file below a folder was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def plain_reports(monkeypatch) -> None:
    """Drawing takes most of the time of a small run; reports have tests of their own, and runs in other processes draw them."""
    monkeypatch.setattr("niwaki.report.run_report", lambda record: f"about {record.identity}")


@pytest.fixture
def in_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", [path for path, _ in commands(niwaki)], ids=" ".join)
def test_every_command_has_json_and_an_example(path, niwaki_command):
    outcome = niwaki_command(*path, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "--json" in outcome.out
    assert f"niwaki {' '.join(path)}" in outcome.out.split("Example")[1]


def test_without_a_command_there_is_help(niwaki_command):
    outcome = niwaki_command()
    assert outcome.code == 0
    assert all(name in outcome.out for name in ("run", "prune", "compare", "methods", "bench"))
    assert niwaki_command("--help").out == outcome.out


# -- run -------------------------------------------------------------------------------------------------------------------------


def test_a_run_is_shown_stored_and_shown_again(niwaki_command, tmp_path):
    arguments = ("run", "gmp", *QUICK, "--sparsity", "0.8", "--out", tmp_path / "run")
    first = niwaki_command(*arguments)
    assert (first.code, first.err) == (0, "")
    assert set(files(tmp_path / "run")) == {"run.json", "model.safetensors", "report.html"}
    record = read(tmp_path / "run")
    accuracy = record.measure("accuracy")
    for shown in ("80.00 %", f"{100 * accuracy.dense:.2f} %", f"{100 * accuracy.sparse:.2f} %", "forward FLOPs", "file size"):
        assert shown in first.out
    before = files(tmp_path)
    again = niwaki_command(*arguments)
    assert again.code == 0
    assert "nothing was computed again" in again.out
    assert files(tmp_path) == before
    (tmp_path / "run" / "report.html").unlink()
    niwaki_command(*arguments)
    assert (tmp_path / "run" / "report.html").read_text() == f"about {record.identity}"


def test_all_numbers_and_their_definitions_are_shown_on_request(niwaki_command, tmp_path):
    arguments = ("run", "gmp", *QUICK, "--sparsity", "0.8", "--out", tmp_path / "run")
    brief = niwaki_command(*arguments)
    full = words(niwaki_command(*arguments, "--definitions").out)
    results = read(tmp_path / "run").results
    starts = [line.split("  ")[0] for line in brief.out.splitlines()]
    hidden = [measure for measure in results.measures if measure.name not in starts]
    assert {measure.name for measure in hidden} == tables.DETAILS
    assert set(tables.FIRST) < {measure.name for measure in results.measures}
    assert f"{len(hidden)} more numbers" in brief.out
    for measure in results.measures:
        assert measure.name in full
        assert measure.definition in full
    for row in results.storage:
        assert row.format in full
        assert row.definition in full


def test_json_of_a_run_is_its_record(niwaki_command, tmp_path):
    outcome = niwaki_command("run", "rigl", *QUICK, "--model", "convnet", "--out", tmp_path / "run", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    printed = json.loads(outcome.out)
    assert printed.pop("folder") == str(tmp_path / "run")
    assert printed == json.loads((tmp_path / "run" / "run.json").read_text())
    assert printed["schema"] == "niwaki.run/4"
    assert printed["choices"]["model"] == "convnet"


def test_shrink_takes_dead_units_out_and_the_file_says_which(niwaki_command, tmp_path):
    """Everything else is as without the option."""
    masked, shrunk = tmp_path / "masked", tmp_path / "shrunk"
    niwaki_command("run", "gmp", *QUICK, "--sparsity", "0.98", "--out", masked)
    outcome = niwaki_command("run", "gmp", *QUICK, "--sparsity", "0.98", "--shrink", "--out", shrunk)
    assert (outcome.code, "finish: shrink made the model smaller" in outcome.out) == (0, True)
    results = [read(folder).results for folder in (masked, shrunk)]
    assert results[0].sparse_history == results[1].sparse_history
    assert results[1].measures[0].sparse == pytest.approx(results[0].measures[0].sparse, abs=0.005)
    removed = results[1].removed
    assert not results[0].removed
    task = find("digits", "mlp")
    model = task.build("mlp", task.data(None), 5)
    loaded = load(shrunk / "model.safetensors", model=model)
    assert loaded.removed == removed
    assert model[1].out_features == len(removed.tensors["1.weight"]["0"]) < 300
    outcome = niwaki_command("inspect", shrunk)
    assert f"removed: {model[1].out_features} entries of 1.weight kept along dimension 0" in outcome.out
    assert json.loads(niwaki_command("inspect", shrunk, "--json").out)["removed"] == removed.model_dump()
    assert json.loads(niwaki_command("inspect", masked, "--json").out)["removed"] is None


def test_without_out_the_folder_is_named_by_what_determines_the_run(niwaki_command, in_folder):
    niwaki_command("run", "gmp", *QUICK)
    niwaki_command("run", "gmp", *QUICK, "--seed", "1")
    before = files(in_folder)
    assert "nothing was computed again" in niwaki_command("run", "gmp", *QUICK).out
    assert files(in_folder) == before
    found = [folder for folder in (in_folder / "runs").iterdir() if folder.name != ".baselines"]
    assert {folder.name for folder in found} == {f"digits-mlp-gmp-{read(folder).identity[:10]}" for folder in found}
    assert sorted(read(folder).choices.seed for folder in found) == [0, 1]


def test_the_dense_baseline_is_trained_once_and_kept_beside_the_runs(niwaki_command, tmp_path):
    niwaki_command("run", "gmp", *QUICK, "--out", tmp_path / "runs" / "gmp")
    [folder] = (tmp_path / "runs" / ".baselines").iterdir()
    before = files(folder)
    assert set(before) == {"baseline.json", "model.safetensors"}
    niwaki_command("run", "rigl", *QUICK, "--out", tmp_path / "runs" / "rigl")
    assert list((tmp_path / "runs" / ".baselines").iterdir()) == [folder]
    assert files(folder) == before
    dense = [read(tmp_path / "runs" / name).measure("accuracy").dense for name in ("gmp", "rigl")]
    assert dense[0] == dense[1]
    niwaki_command("run", "rigl", *QUICK, "--out", tmp_path / "elsewhere", "--baselines", tmp_path / "runs" / ".baselines")
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "elsewhere"}
    assert files(folder) == before


def test_several_seeds_are_run_and_summed_up(niwaki_command, tmp_path):
    arguments = ("run", "gmp", *QUICK, "--seed", "5", "--seeds", "3", "--sparsity", "0.8", "--out", tmp_path)
    outcome = niwaki_command(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    records = [read(tmp_path / f"seed-{seed}") for seed in (5, 6, 7)]
    assert [record.choices.seed for record in records] == [5, 6, 7]
    assert "seeds 5, 6, 7" in outcome.out
    values = [record.measure("accuracy").sparse for record in records]
    mean = sum(values) / 3
    deviation = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
    assert f"{100 * mean:.2f} ± {100 * deviation:.2f} %" in outcome.out
    printed = json.loads(niwaki_command(*arguments, "--json").out)
    assert [run["identity"] for run in printed] == [record.identity for record in records]


def test_settings_reach_the_training(niwaki_command, tmp_path):
    settings = {"precision": "bfloat16", "ema": 0.9, "accumulate": 2, "clip_norm": 1.5, "optimizer": "adamw", "threads": None}
    given = [word for key, value in settings.items() for word in ("--set", f"{key}={'none' if value is None else value}")]
    outcome = niwaki_command("run", "gmp", *QUICK, *given, "--set", "learning_rate=1e-3", "--out", tmp_path / "run")
    assert (outcome.code, outcome.err) == (0, "")
    training = read(tmp_path / "run").choices.training.model_dump()
    assert {key: training[key] for key in settings} == settings
    assert (training["learning_rate"], training["epochs"]) == (0.001, 1)


def test_trainings_that_start_from_a_file(niwaki_command, tmp_path):
    niwaki_command("run", "gmp", *QUICK, "--out", tmp_path / "first")
    [trained] = tmp_path.glob(".baselines/*/model.safetensors")
    outcome = niwaki_command("run", "rigl", *QUICK, "--from", trained, "--out", tmp_path / "second")
    assert (outcome.code, outcome.err) == (0, "")
    first, second = read(tmp_path / "first"), read(tmp_path / "second")
    assert second.results.start_metrics["accuracy"] == first.measure("accuracy").dense
    assert second.choices.start.file == "model.safetensors"
    assert "from model.safetensors" in outcome.out


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


def test_a_dry_run_shows_the_plan_and_writes_nothing(niwaki_command, in_folder):
    outcome = niwaki_command("run", "gmp", *QUICK, "--sparsity", "0.9", "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    for part in ("1.weight", "19,200", "1,920", "3.weight", "30,000", "3,000", "90.00 %", "last layer", "5.weight"):
        assert part in outcome.out
    data = json.loads(niwaki_command("run", "gmp", *QUICK, "--sparsity", "0.9", "--dry-run", "--json").out)
    [stage] = data["stages"]
    assert {row["name"]: row["keep"] for row in stage["tensors"]} == {"1.weight": 1920, "3.weight": 3000}
    assert list(in_folder.iterdir()) == []


def test_a_dry_run_shows_every_stage(niwaki_command, in_folder):
    (in_folder / "staged.yaml").write_text(
        "stages:\n- {for: 1 epochs}\n"
        "- {for: 1 epochs, sparsity: 0.5, schedule: one_shot}\n- {for: 1 epochs, sparsity: 0.75, schedule: one_shot}\n"
    )
    data = json.loads(niwaki_command("run", "staged.yaml", *QUICK, "--dry-run", "--json").out)
    kept = [(stage["stage"], [tensor["keep"] for tensor in stage.get("tensors", [])]) for stage in data["stages"]]
    assert kept == [(1, []), (2, [9600, 15000]), (3, [4800, 7500])]
    shown = niwaki_command("run", "staged.yaml", *QUICK, "--dry-run").out
    assert "9,600" in shown
    assert "4,800" in shown


def test_a_dry_run_of_stages_that_only_prune(niwaki_command, in_folder):
    (in_folder / "ticket.yaml").write_text("stages: [{repeat: 2, stages: [{for: 1 run}, {prune: {fraction: 0.2, saliency: magnitude}}]}]")
    outcome = niwaki_command("run", "ticket.yaml", *QUICK, "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "prune 20 % of what is active" in outcome.out
    data = json.loads(niwaki_command("run", "ticket.yaml", *QUICK, "--dry-run", "--json").out)
    assert [stage["says"].partition(":")[0] for stage in data["stages"]] == [
        f"stage 1.{part}, round {number} of 2" for number in (1, 2) for part in (1, 2)
    ]


# -- prune -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(niwaki_command, tmp_path) -> Path:
    """A file with a trained dense model."""
    niwaki_command("run", "gmp", *QUICK, "--out", tmp_path / "trained" / "run")
    [path] = tmp_path.glob("trained/.baselines/*/model.safetensors")
    return path


def test_a_trained_model_is_pruned_at_once(niwaki_command, trained, tmp_path):
    given = ("prune", "magnitude", "--task", "digits", "--from", trained, "--sparsity", "0.75")
    outcome = niwaki_command(*given, "--out", tmp_path / "run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "not fine-tuned" in outcome.out
    record = read(tmp_path / "run")
    assert record.choices.kind == "prune"
    assert record.measure("accuracy").dense == read(tmp_path / "trained" / "run").measure("accuracy").dense
    assert record.measure("sparsity of the targets").sparse == 0.75
    assert record.measure("training FLOPs").dense is None
    assert not (tmp_path / ".baselines").exists()


def test_of_a_method_with_stages_the_one_that_says_a_sparsity_prunes(niwaki_command, trained, tmp_path):
    given = ("prune", "filter_l1", "--task", "digits", "--from", trained, "--sparsity", "0.5")
    outcome = niwaki_command(*given, "--out", tmp_path / "run")
    assert (outcome.code, outcome.err) == (0, "")
    masks = load(tmp_path / "run" / "model.safetensors").masks
    assert int(masks["3.weight"].any(dim=1).sum()) == 50  # of 100 units
    assert torch.equal(masks["3.bias"], masks["5.weight"].any(dim=0))


def test_pruning_in_rounds_with_fine_tuning(niwaki_command, trained, tmp_path):
    given = ("prune", "gmp", "--task", "digits", "--from", trained, "--sparsity", "0.75", "--epochs", "4", "--rounds", "3")
    outcome = niwaki_command(*given, "--out", tmp_path / "run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "fine-tuned for 4 epochs" in outcome.out
    by_epoch = [epoch.sparsity for epoch in read(tmp_path / "run").results.sparse_history]
    assert len(set(by_epoch)) >= 3
    assert by_epoch == sorted(by_epoch)
    assert by_epoch[-1] == 0.75


# -- compare ---------------------------------------------------------------------------------------------------------------------


def test_compare_has_a_row_for_each_setting_and_a_table_for_each_baseline(niwaki_command, tmp_path):
    for method in ("gmp", "static_erk"):
        niwaki_command("run", method, *QUICK, "--out", tmp_path / method)
    niwaki_command("run", "gmp", *QUICK, "--seed", "1", "--out", tmp_path / "seed")
    niwaki_command("run", "gmp", *QUICK, "--model", "convnet", "--out", tmp_path / "other")
    folders = [tmp_path / name for name in ("gmp", "static_erk", "seed", "other")]
    outcome = niwaki_command("compare", *folders)
    assert (outcome.code, outcome.err) == (0, "")
    starts = [line.split()[0] for line in outcome.out.splitlines() if line.split()[:1] and "%" in line]
    assert starts == ["dense", "gmp", "static_erk", "dense", "gmp"]
    found = {name: read(tmp_path / name).measure("accuracy") for name in ("gmp", "static_erk", "seed", "other")}
    gmp = (found["gmp"].sparse + found["seed"].sparse) / 2
    [first, second] = [line.split() for line in outcome.out.splitlines() if line.startswith("gmp")]
    assert first[1:5] == ["90.00", "%", "2", f"{100 * gmp:.2f}"]
    assert f"{100 * found['other'].sparse:.2f}" in second
    assert f"{100 * (found['other'].sparse - found['other'].dense):+.2f}" in second
    assert "forward FLOPs" in words(niwaki_command("compare", *folders, "--definitions").out)
    printed = json.loads(niwaki_command("compare", *folders, "--json").out)
    assert [run["folder"] for run in printed] == [str(folder) for folder in folders]


def test_a_comparison_drops_what_has_no_room_and_says_so(niwaki_command, tmp_path, monkeypatch):
    niwaki_command("run", "gmp", *QUICK, "--out", tmp_path / "gmp")
    for width in (60, 80, 100, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        out = niwaki_command("compare", tmp_path / "gmp").out
        assert max(map(len, out.splitlines())) <= width
        [row] = [line for line in out.splitlines() if line.startswith("gmp")]
        assert f"{100 * read(tmp_path / 'gmp').measure('accuracy').sparse:.2f} %" in row
        assert ("left out for lack of room" in out) == (width < 200)


def test_compare_writes_a_report(niwaki_command, tmp_path):
    for seed in (0, 1):
        niwaki_command("run", "gmp", *QUICK, "--seed", seed, "--out", tmp_path / f"gmp{seed}")
    outcome = niwaki_command("compare", tmp_path / "gmp0", tmp_path / "gmp1", "--report", tmp_path / "page.html")
    assert (outcome.code, outcome.err) == (0, "")
    assert str(tmp_path / "page.html") in outcome.out
    assert (tmp_path / "page.html").read_text().lower().startswith("<!doctype html>")
    niwaki_command("compare", tmp_path / "gmp0", "--report", tmp_path / "one.html")
    assert (tmp_path / "one.html").read_text() == f"about {read(tmp_path / 'gmp0').identity}"
    nowhere = niwaki_command("compare", tmp_path / "gmp0", "--report", tmp_path / "none" / "page.html")
    assert (nowhere.code, nowhere.out) == (2, "")
    assert "page.html: cannot be written" in nowhere.err


def test_an_unfinished_run_is_not_compared(niwaki_command, tmp_path):
    niwaki_command("run", "gmp", *QUICK, "--out", tmp_path / "run")
    data = json.loads((tmp_path / "run" / "run.json").read_text())
    data["results"] = None
    (tmp_path / "run" / "run.json").write_text(json.dumps(data))
    outcome = niwaki_command("compare", tmp_path / "run")
    assert outcome.code == 2
    assert "has not finished" in outcome.err


# -- methods and benchmarks ------------------------------------------------------------------------------------------------------


def test_methods_lists_the_catalogue(niwaki_command):
    outcome = niwaki_command("methods")
    assert outcome.code == 0
    table = outcome.out.partition("\nwhat ")[0]  # and then what the codes mean
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line.strip()}
    for name, method in METHODS.items():
        assert rows[name][1] == str(method.year)
        assert rows[name][-1] == ("alias" if method.of else method.fidelity)
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


# -- failures --------------------------------------------------------------------------------------------------------------------


def test_what_runs_and_fails_exits_1_and_keeps_its_folder(niwaki_command, tmp_path):
    out = tmp_path / "runs" / "run"
    outcome = niwaki_command("run", "gmp", *QUICK, "--set", "learning_rate=1e30", "--out", out)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("niwaki: error: dense training stopped at step ")
    assert "the loss became " in outcome.err
    assert "there is no checkpoint yet" in outcome.err
    assert outcome.err.count("\n") == 1
    assert read(out).results is None
    assert set(files(out)) == {"run.json"}
    assert niwaki_command("compare", out).code == 2


def test_a_failure_says_which_checkpoint_there_is(niwaki_command, tmp_path):
    given = ("--epochs", "9", "--set", "learning_rate=1e20", "--set", "warmup=0.99", "--set", "momentum=0", "--checkpoint-every", "0")
    outcome = niwaki_command("run", "gmp", "--task", "digits", *given, "--out", tmp_path / "run")
    assert (outcome.code, outcome.out) == (1, "")
    [checkpoint] = tmp_path.glob(".baselines/*/checkpoint.safetensors")
    assert f"is intact in {checkpoint}" in outcome.err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NiwakiError("it failed\nin epoch 3"), "it failed in epoch 3"),
        (KeyboardInterrupt(), "interrupted"),
        (OSError(28, "No space left on device", "x/y"), "x/y: No space left on device"),
    ],
)
def test_failures_exit_1_in_one_line(error, said, niwaki_command, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("niwaki.training.jobs.run", fail)
    outcome = niwaki_command("run", "gmp", *QUICK, "--out", tmp_path / "run")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.strip() == f"niwaki: error: {said}"  # click ends the line that shows ^C
    assert list(tmp_path.iterdir()) == []


def test_a_defect_is_not_hidden(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("niwaki.training.jobs.run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["run", "gmp", *QUICK, "--out", str(tmp_path / "run")])


def test_a_task_file_that_fails_shows_its_own_traceback_once(niwaki_command, in_folder):
    (in_folder / "task.py").write_text(TASK + "\n\ndef half(x):\n    return 1 / x\n\n\nhalf(0)\n")
    outcome = niwaki_command("run", "gmp", "--task", "task.py:task", "--out", "run")
    assert (outcome.code, outcome.out) == (2, "")
    *traceback, last = outcome.err.splitlines()
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "ZeroDivisionError: division by zero"
    assert outcome.err.count("Traceback") == 1
    frames = [line for line in traceback if line.lstrip().startswith("File ")]
    assert all("task.py" in line for line in frames)
    assert [line.split(" in ")[1] for line in frames] == ["<module>", "half"]
    assert last == "niwaki: error: --task task.py:task: cannot be imported: ZeroDivisionError: division by zero"
    assert not (in_folder / "run").exists()


def test_a_reader_that_goes_away_is_no_defect(tmp_path):
    program = "import sys; from niwaki.cli import main; sys.exit(main(['methods', '--json']))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), error) == (1, b"")
