"""Options that mean the same in several commands."""

import json

from cli.driving import TASK

import niwaki
from niwaki import tasks

PRINTS = TASK.replace("def data(folder):\n", "def data(folder):\n    print('loading')\n")


def test_json_stands_alone_where_a_task_prints(niwaki_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(PRINTS)
    outcome = niwaki_command("run", "gmp", "--task", "task.py:task", "--dry-run", "--json")
    assert (outcome.code, outcome.err) == (0, "loading\n")
    assert json.loads(outcome.out)["choices"]["task"] == "sign of a product"
    assert "loading" in niwaki_command("run", "gmp", "--task", "task.py:task", "--dry-run").out  # and nothing stays redirected

    (tmp_path / "sweep.yaml").write_text("task: task.py:task\nmethod: gmp\n")
    outcome = niwaki_command("sweep", "sweep.yaml", "--out", "out", "--dry-run", "--json")
    assert (outcome.code, outcome.err) == (0, "loading\n")
    assert len(json.loads(outcome.out)["runs"]) == 1


def test_the_epochs_of_fine_tuning_may_be_a_setting_and_are_0_where_nothing_says_them(niwaki_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    task = tasks.find("task.py:task")
    niwaki.save(task.build("mlp", task.data(None), 0), tmp_path / "trained.safetensors")
    given = ("prune", "magnitude", "--task", "task.py:task", "--from", "trained.safetensors", "--sparsity", "0.5", "--json")
    for number, (more, epochs) in enumerate([((), 0), (("--set", "epochs=1"), 1), (("--epochs", "1"), 1)]):
        outcome = niwaki_command(*given, "--out", f"out{number}", *more)
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["choices"]["training"]["epochs"] == epochs
