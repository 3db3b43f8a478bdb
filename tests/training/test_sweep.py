"""Sweep files in this process; sweeps with real worker processes are in tests/cli/test_sweep.py."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from niwaki import workers
from niwaki.errors import InputError
from niwaki.recipe.text import parse
from niwaki.training import sweep
from niwaki.training.sweep import Outcome
from niwaki.training.sweep_file import Point, plan, points, read_points


def read(text):
    return points(parse(text, "sweep.yaml"), "sweep.yaml")


def test_lists_are_axes_and_the_last_one_is_fastest():
    found = read("task: digits\nmethod: [gmp, rigl]\nmodel: convnet\nsparsity: [0.5, 0.9]\nseed: [0, 3]\n")
    expected = [(method, sparsity, seed) for method in ("gmp", "rigl") for sparsity in (0.5, 0.9) for seed in (0, 3)]
    assert [(point.method, point.sparsity, point.seed) for point in found] == expected
    assert {point.task for point in found} == {"digits"}
    assert {point.model for point in found} == {"convnet"}


def test_settings_of_the_training_are_axes_too():
    found = read("task: digits\nmethod: gmp\nepochs: [1, 2]\ntraining: {learning_rate: [0.1, 1e-2], momentum: 0.5}\n")
    settings = [{"epochs": e, "learning_rate": r, "momentum": 0.5} for e in (1, 2) for r in (0.1, 0.01)]
    assert [point.training for point in found] == settings


def test_one_file_holds_several_sweeps():
    found = read("task: digits\nseed: [0, 1]\nruns:\n- {method: gmp, sparsity: 0.5}\n- {method: [str, rigl], seed: 7, epochs: 2}\n")
    expected = [("gmp", 0.5, 0, {}), ("gmp", 0.5, 1, {}), ("str", None, 7, {"epochs": 2}), ("rigl", None, 7, {"epochs": 2})]
    assert [(point.method, point.sparsity, point.seed, point.training) for point in found] == expected
    assert {point.task for point in found} == {"digits"}


def test_a_point_says_what_was_asked():
    (point,) = read("task: digits\nmethod: gmp\nfrom: a.safetensors\nepochs: 2\n")
    assert str(point) == "task digits, method gmp, from a.safetensors, epochs 2"
    assert point.start == "a.safetensors"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected fields"),
        ("- digits", "expected fields"),
        ("task: digits\nmethods: gmp\n", "unknown field 'methods'; did you mean 'method'?"),
        ("task: digits\n1: gmp\n", "unknown field '1'"),
        ("task: digits\n", "method: this field is required"),
        ("method: gmp\n", "task: this field is required"),
        ("task: digits\nmethod: []\n", "method: an empty list"),
        ("task: digits\nmethod: gmp\ntraining: {learning_rate: []}\n", "training.learning_rate: an empty list"),
        ("task: digits\nmethod: gmp\ntraining: [0.1]\n", "training: expected settings"),
        ("task: digits\nmethod: gmp\nepochs: 3\ntraining: {epochs: 4}\n", "epochs: stands twice"),
        ("task: digits\nmethod: gmp\nseed: [0, 1.5]\n", "seed: "),
        ("task: digits\nmethod: gmp\nseed: -1\n", "seed: "),
        ("task: digits\nmethod: gmp\nseed: true\n", "seed: "),
        ("task: digits\nmethod: gmp\nsparsity: much\n", "sparsity: "),
        ("task: digits\nmethod: {gmp: 1}\n", "method: "),
        ("task: digits\nmethod: [[gmp]]\n", "method: "),
        ("task: [digits\n", "line 2"),
        ("task: digits\nruns: []\n", "runs: expected a list of fields"),
        ("task: digits\nruns: {method: gmp}\n", "runs: expected a list of fields"),
        ("task: digits\nruns: [gmp]\n", "runs: expected a list of fields"),
        ("task: digits\nruns: [{method: gmp}, {methods: gmp}]\n", "runs[1]: unknown field 'methods'"),
        ("task: digits\nruns: [{seed: 1}]\n", "runs[0]: method: this field is required"),
        ("task: digits\nmethod: gmp\nruns: [{runs: [{seed: 1}]}]\n", "runs[0]: unknown field 'runs'"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_that_names_the_field(text, said):
    with pytest.raises(InputError) as error:
        read(text)
    assert str(error.value).startswith("sweep.yaml")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read: No such file"):
        read_points(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"task: \xff")
    with pytest.raises(InputError, match=r"latin\.yaml: cannot be read"):
        read_points(tmp_path / "latin.yaml")


def point(**fields):
    return Point(**{"task": "digits", "method": "gmp", "training": {"epochs": 1}, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"task": "digts"}, "did you mean 'digits'?"),
        ({"method": "rigel"}, "did you mean 'rigl'?"),
        ({"model": "conv"}, "did you mean 'convnet'?"),
        ({"sparsity": 90.0}, "a fraction, not per cent: 0.9"),
        ({"method": "str", "sparsity": 0.9}, "strength of 'str' decides"),
        ({"method": "gmp", "sparsity": 0.9, "cut": True}, "without a final cut"),
        ({"method": "none.yaml"}, "none.yaml: cannot be read"),
        ({"training": {"epoch": 1}}, "did you mean 'epochs'?"),
        ({"training": {"learning_rate": -1.0}}, "learning_rate"),
        ({"training": {"batch_size": 100_000}}, "more than the 1,442 training examples"),
        ({"start": "none.safetensors"}, "none.safetensors is no file"),
        ({"method": "pattern.yaml"}, "'conv9*' matches no weight"),
    ],
)
def test_all_points_are_checked_before_anything_runs(fields, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pattern.yaml").write_text("sparsity: 0.5\ntarget: {weights: {include: ['conv9*']}}\n")
    wrong = point(**fields)
    with pytest.raises(InputError) as error:
        plan([point(), wrong], "sweep.yaml")
    assert str(error.value).startswith(f"sweep.yaml: {wrong}: ")
    assert said in str(error.value)


def test_a_broken_task_file_shows_its_own_traceback(tmp_path):
    (tmp_path / "mine.py").write_text("import json\njson.loads('{')\n")
    with pytest.raises(InputError) as error:
        plan([point(task=f"{tmp_path / 'mine.py'}:task")], "sweep.yaml")
    assert "json.loads('{')" in error.value.details


def test_points_that_come_to_the_same_run_are_one():
    first = point(sparsity=0.5, seed=0)
    same = point(sparsity=0.5, model="mlp", training={"epochs": 1, "learning_rate": 0.1})
    runs = plan([first, first, same, point(sparsity=0.5, seed=1)], "sweep.yaml")
    assert [run.point for run in runs] == [first, point(sparsity=0.5, seed=1)]


def test_folders_are_readable_and_named_by_what_determines_the_run(tmp_path):
    (tmp_path / "mine.yaml").write_text("sparsity: 0.25\nsaliency: random\n")
    asked = [point(sparsity=0.5, seed=3), point(method="str"), point(method=str(tmp_path / "mine.yaml"))]
    runs = plan(asked, "sweep.yaml")
    starts = ["gmp-0.5-seed3-", "str-seed0-", "mine-0.25-seed0-"]
    for run, start in zip(runs, starts, strict=True):
        assert run.folder == start + run.choices.identity()[:8]
    (other,) = plan([point(sparsity=0.5, seed=3, training={"epochs": 2})], "sweep.yaml")
    assert other.folder != runs[0].folder


def test_folders_show_every_axis_with_several_values():
    training = [{"epochs": 1, "learning_rate": rate} for rate in (0.1, 0.01)]
    asked = [point(sparsity=0.5, model=model, training=one) for model in ("mlp", "convnet") for one in training]
    runs = plan(asked, "sweep.yaml")
    assert [run.folder for run in runs] == [
        f"gmp-0.5-model_{model}-learning_rate_{rate}-seed0-{run.choices.identity()[:8]}"
        for (model, rate), run in zip([("mlp", 0.1), ("mlp", 0.01), ("convnet", 0.1), ("convnet", 0.01)], runs, strict=True)
    ]


def test_values_in_the_name_of_a_folder_are_short_and_plain(tmp_path):
    for name in ("one", "o" * 100):
        (tmp_path / f"{name}.py").write_text(f"from niwaki.tasks import TASKS\ntask = TASKS['digits']  # {name}\n")
    runs = plan([point(task=f"{tmp_path / name}.py:task") for name in ("one", "o" * 100)], "sweep.yaml")
    assert [run.folder.rpartition("-")[0] for run in runs] == ["gmp-0.9-task_one.py_task-seed0", f"gmp-0.9-task_{'o' * 16}.py_task-seed0"]


def test_a_sweep_that_got_another_axis_finds_the_folders_that_it_had(tmp_path):
    (before,) = plan([point(sparsity=0.5)], "sweep.yaml")
    assert sweep.placed([before], tmp_path / "none") == [before]
    (tmp_path / before.folder).mkdir()
    (tmp_path / "sweep.json").touch()
    old, new = plan([point(sparsity=0.5), point(sparsity=0.5, training={"epochs": 2})], "sweep.yaml")
    assert old.folder != before.folder
    assert [run.folder for run in sweep.placed([old, new], tmp_path)] == [before.folder, new.folder]


def test_the_data_folder_is_the_environments_where_none_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("NIWAKI_DATA", str(tmp_path / "from-environment"))
    for data, named in ((None, "from-environment"), (str(tmp_path / "given"), "given")):
        with pytest.raises(InputError, match=named):
            plan([point(task="mnist", data=data)], "sweep.yaml")


def test_as_many_processes_as_cores_for_the_threads_of_a_run(monkeypatch):
    runs = plan([point(training={"epochs": 1, "threads": 1}), point(training={"epochs": 1, "threads": 3})], "sweep.yaml")
    for cores, expected in ((8, 2), (2, 1)):
        monkeypatch.setattr(sweep, "cores", lambda cores=cores: cores)
        assert sweep.default_processes(runs) == expected
        assert sweep.default_processes(runs[:1]) == cores


def test_runs_of_different_baselines_come_first(tmp_path, monkeypatch):
    runs = plan([point(sparsity=s, seed=seed) for seed in (0, 1) for s in (0.5, 0.6, 0.7)], "sweep.yaml")
    given = []
    monkeypatch.setattr(workers, "distribute", lambda target, orders, *_, **__: given.extend(orders))
    sweep.carry_out(runs, [Outcome() for _ in runs], tmp_path / "out", processes=2)
    assert [(order["point"]["seed"], order["point"]["sparsity"]) for order in given] == [
        (0, 0.5), (1, 0.5), (0, 0.6), (0, 0.7), (1, 0.6), (1, 0.7),
    ]  # fmt: skip


def test_a_run_that_another_sweep_is_at_is_left_to_it(tmp_path):
    identity = "ab" * 32
    program = f"""
import fcntl, sys
file = open({str(tmp_path / ".locks")!r}, "ab")
fcntl.lockf(file, fcntl.LOCK_EX, 1, int({identity[:15]!r}, 16))
print("locked", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(workers.Busy), sweep._claimed(tmp_path / ".locks", identity):
        pytest.fail("two processes have it")
    with sweep._claimed(tmp_path / ".locks", "cd" * 32):
        pass  # another run is free
    other.communicate()
    with sweep._claimed(tmp_path / ".locks", identity):
        pass


def finished(run, dense, sparse, sparsity):
    """A record with nothing but a few measures and two epochs, not validated."""
    from niwaki.training.record import Epoch, Measure, Record, Results

    measures = [
        Measure(name="accuracy", unit="share", definition="", dense=dense, sparse=sparse),
        Measure(name=sweep.SPARSITY, unit="share", definition="", dense=0, sparse=sparsity),
        Measure(name="active parameters", unit="weights", definition="", dense=1000, sparse=1000 - 900 * sparsity),
        Measure(name="training FLOPs", unit="number", definition="", dense=1.0, sparse=0.25),
        Measure(name="forward FLOPs", unit="FLOPs", definition="", dense=2000.0, sparse=300.0),
    ]
    epochs = [
        Epoch(epoch=e, step=10 * e, train_loss=1.0, learning_rate=0.1, metrics={"accuracy": a, "other": 0.0}, sparsity=0.0)
        for e, a in ((1.0, sparse / 2), (1.5, sparse))
    ]
    return Record.model_construct(
        identity="", choices=run.choices, results=Results.model_construct(measures=measures, sparse_history=epochs)
    )


def test_the_summary_is_over_seeds():
    runs = plan([point(sparsity=s, seed=seed) for s in (0.5, 0.9) for seed in (0, 1, 2)], "sweep.yaml")
    values = [(0.96, 0.95, 0.5), (0.97, 0.93, 0.51), (0.98, 0.94, 0.52), (0.96, 0.9, 0.9)]
    found = [Outcome("done", finished(run, *value)) for run, value in zip(runs, values, strict=False)]
    found += [Outcome("failed", error="no"), Outcome("interrupted")]
    first, second = sweep.summary(runs, found)
    assert (first["method"], first["seeds"], first["metric"], first["unit"]) == ("gmp", [0, 1, 2], "accuracy", "share")
    assert first["sparsity"] == pytest.approx(0.51)
    for which, numbers in (("dense", [0.96, 0.97, 0.98]), ("sparse", [0.95, 0.93, 0.94])):
        assert first[which] == {
            "values": numbers,
            "mean": pytest.approx(statistics.fmean(numbers)),
            "sd": pytest.approx(statistics.stdev(numbers)),
        }
    assert second["seeds"] == [0]
    assert second["sparse"] == {"values": [0.9], "mean": 0.9, "sd": None}
    data = sweep.to_data(runs, found)
    assert [row["status"] for row in data["runs"]] == ["done"] * 4 + ["failed", "interrupted"]
    assert data["runs"][4]["error"] == "no"
    assert data["runs"][4]["found"] is None
    assert data["runs"][3]["found"] == {
        "sparsity": 0.9, "active_parameters": 190.0, "training_flops": 0.25, "forward_flops": 300.0, "dense_forward_flops": 2000.0,
        "epochs": 1.5, "history": [0.45, 0.9],
    }  # fmt: skip
    text = sweep.to_text(data)
    assert json.loads(text) == data
    assert [json.loads(line.rstrip(",")) for line in text.splitlines() if '"folder"' in line] == data["runs"]
    assert json.loads(sweep.to_text(sweep.to_data([], []))) == {"schema": sweep.SCHEMA, "runs": [], "summary": []}


def test_a_folder_that_cannot_take_its_run_fails_that_run_alone(tmp_path):
    runs = plan([point(sparsity=0.5), point(sparsity=0.6)], "sweep.yaml")
    (tmp_path / runs[0].folder).mkdir()
    (tmp_path / runs[0].folder / "thesis.tex").write_text("years of work")
    first, second = sweep.outcomes(runs, tmp_path)
    assert first.status == "failed"
    assert "not empty" in first.error
    assert second.status == "waiting"


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    runs = plan([point()], "sweep.yaml")
    with pytest.raises(InputError):
        sweep.carry_out(runs, [Outcome()], tmp_path / "out", processes=1)
