"""Sweeps on the command line, with real worker processes and a task of the user that trains in a moment."""

import json
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from cli.driving import essence, start, until

from niwaki import tasks, training
from niwaki.catalogue import method
from niwaki.cli import main
from niwaki.training import read

TASK = """
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from niwaki.tasks import Data, Metric, Model, Task, Training

HERE = Path(__file__).parent


def examples(count, seed):
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs @ torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0, 1.0]) > 0).long())


def build(data):
    if torch.initial_seed() == 7 and (HERE / "unlucky").exists():
        raise RuntimeError("bad luck")
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))


def augment(inputs, generator):
    if (HERE / "slow").exists():
        time.sleep(0.02)
    return inputs


task = Task(
    name="plane",
    models={"small": Model(build, Training(epochs=4, batch_size=16, learning_rate=0.1, threads=1))},
    data=lambda folder: Data(train=examples(200, 0), test=examples(90, 1)),
    loss=functional.cross_entropy,
    metrics={"accuracy": Metric(lambda outputs, targets: outputs.argmax(1) == targets, "share of right answers")},
    augment=augment,
)
"""
SWEEP = "task: task.py:task\nmethod: [gmp, rigl]\nsparsity: [0.5, 0.75]\nseed: [0, 7]\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a task and a sweep, which is the current one."""
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(TASK)
    Path("sweep.yaml").write_text(SWEEP)
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def states(folder):
    return {row["folder"]: row["status"] for row in json.loads((folder / "sweep.json").read_text())["runs"]}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = path.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if parent == str(pid):
            found.append(int(path.parent.name))
    return found


def test_a_sweep_with_runs_that_fail_and_later_do_not(niwaki_command, folder):
    out = folder / "out"
    (folder / "unlucky").touch()
    first = niwaki_command("sweep", "sweep.yaml", "--out", out, "--jobs", 2)
    assert first.code == 1
    *lines, last = first.err.splitlines()
    assert last == "niwaki: error: 4 of 8 runs failed; give the same command again to try them again"
    assert sorted(line.split()[0] for line in lines) == ["done"] * 4 + ["failed"] * 4
    assert all("RuntimeError: bad luck" in line and "seed7" in line for line in lines if line.startswith("failed"))
    assert all(status == ("failed" if "seed7" in name else "done") for name, status in states(out).items())
    stored = json.loads((out / "sweep.json").read_text())["runs"]
    assert all('raise RuntimeError("bad luck")' in row["traceback"] for row in stored if row["status"] == "failed")
    records = {name: read(out / name) for name, status in states(out).items() if status == "done"}
    for name, record in records.items():
        assert f"{100 * record.headline.sparse:.2f} %" in first.out
        assert name in (out / "report.html").read_text()

    before = contents(out)
    (folder / "unlucky").unlink()
    second = niwaki_command("sweep", "sweep.yaml", "--out", out, "--jobs", 1, "--json")
    assert second.code == 0
    assert [line.split()[0] for line in second.err.splitlines()] == ["done"] * 4
    assert set(states(out).values()) == {"done"}
    after = contents(out)
    assert all(after[name] == before[name] for name in before if name.split("/")[0] in records)
    printed = json.loads(second.out)
    assert printed.pop("folder") == str(out)
    assert printed == json.loads(after["sweep.json"])
    assert [(row["method"], row["sparsity"], row["seeds"]) for row in printed["summary"]] == [
        ("gmp", 0.5, [0, 7]),
        ("gmp", 0.75, [0, 7]),
        ("rigl", 0.5, [0, 7]),
        ("rigl", 0.75, [0, 7]),
    ]
    assert len(list((out / ".baselines").iterdir())) == 2  # one for each seed, for all methods and sparsities

    log = (out / "sweep.log").stat().st_mtime_ns
    third = niwaki_command("sweep", "sweep.yaml", "--out", out)
    assert (third.code, third.err) == (0, "")
    assert "8 of 8 runs done" in third.out
    unchanged = {name for name in after if name not in ("report.html", "sweep.json")}
    assert all(contents(out)[name] == after[name] for name in unchanged)
    assert (out / "sweep.log").stat().st_mtime_ns == log  # no worker was started


def test_interrupted_and_killed_sweeps_end_as_uninterrupted_runs(niwaki_command, folder, capsys):
    Path("sweep.yaml").write_text("task: task.py:task\nmethod: [gmp, rigl]\nsparsity: 0.75\nseed: [0, 1]\nepochs: 6\n")
    out = folder / "out"
    command = ["sweep", "sweep.yaml", "--out", "out", "--jobs", "2", "--checkpoint-every", "0.1"]
    (folder / "slow").touch()

    def checkpoints():
        found = {}
        for path in out.glob("**/checkpoint.safetensors"):
            with suppress(FileNotFoundError):  # a training has just ended
                found[path] = path.stat().st_mtime_ns
        return found

    # Killed: the parent cannot say anything to its workers.
    parent = start(folder, *command)
    until(checkpoints, parent)
    workers = children(parent.pid)
    assert len(workers) == 2
    parent.kill()
    parent.communicate()
    until(lambda: not any(alive(pid) for pid in workers))
    assert set(states(out).values()) <= {"waiting", "done"}

    # Interrupted: a checkpoint of each run that had begun.
    known = checkpoints()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt():
        until(lambda: any(known.get(path) != changed for path, changed in checkpoints().items()))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code = main([*command, "--jobs", "1"])
    thread.join()
    signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err.splitlines()
    assert code == 1
    done = list(states(out).values()).count("done")
    assert said[-1] == f"niwaki: error: interrupted: {done} of 4 runs are done; give the same command again to go on"
    assert "stopping: each run saves a checkpoint; a second Ctrl-C stops at once" in said
    assert "interrupted" in states(out).values()

    # Finished, by two sweeps at the same time that share the work.
    (folder / "slow").unlink()
    another = start(folder, *command[:-4], "--jobs", "1")
    assert niwaki_command(*command[:-4], "--jobs", "1").code == 0
    said, _ = another.communicate()
    assert "4 of 4 runs done" in said
    assert another.returncode == 0
    for row in json.loads((out / "sweep.json").read_text())["runs"]:
        point = row["point"]
        recipe = method(point["method"], sparsity=point["sparsity"])
        task = tasks.find("task.py:task")
        job = training.job(task, recipe, method=point["method"], seed=point["seed"], training={"epochs": 6})
        alone = training.run(job, folder / "alone" / row["folder"])
        assert row["folder"].endswith(alone.identity[:8])
        together, separate = out / row["folder"], folder / "alone" / row["folder"]
        assert (together / "model.safetensors").read_bytes() == (separate / "model.safetensors").read_bytes()
        assert essence(together) == essence(separate)
    assert not checkpoints()


def test_a_dry_run_shows_the_runs_and_writes_nothing(niwaki_command, folder):
    before = contents(folder)
    outcome = niwaki_command("sweep", "sweep.yaml", "--out", "out", "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "8 runs, 0 of them done" in outcome.out
    assert outcome.out.count("waiting") == 8
    printed = json.loads(niwaki_command("sweep", "sweep.yaml", "--out", "out", "--dry-run", "--json").out)
    assert all(row["folder"] in outcome.out for row in printed["runs"])
    assert {name for name in contents(folder) if "__pycache__" not in name} == set(before)


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        (SWEEP, (), "--out is missing"),
        (SWEEP, ("--out", "out", "--jobs", "0"), "--jobs"),
        (SWEEP + "speed: 3\n", ("--out", "out"), "sweep.yaml: unknown field 'speed'"),
        (SWEEP.replace("rigl", "str"), ("--out", "out"), "method str, sparsity 0.5"),
        (SWEEP, ("--out", "task.py"), "task.py"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(niwaki_command, folder, text, arguments, said):
    Path("sweep.yaml").write_text(text)
    outcome = niwaki_command("sweep", "sweep.yaml", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err.splitlines()[-1]
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"task.py", "sweep.yaml"}
