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


def test_a_budget_of_memory_is_told_first_and_kept(niwaki_command, tmp_path, monkeypatch):
    """Woodfisher's 400 gradients of the network's 16 x 64 + 2 x 64 x 64 weights (the last layer is no target), in float32."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    task = tasks.find("task.py:task")
    niwaki.save(task.build("mlp", task.data(None), 0), tmp_path / "trained.safetensors")
    needed = 400 * (16 * 64 + 2 * 64 * 64) * 4
    given = ("prune", "woodfisher", "--task", "task.py:task", "--from", "trained.safetensors", "--sparsity", "0.5", "--json")

    outcome = niwaki_command(*given, "--out", "small", "--memory", needed - 1)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "niwaki: error: memory: the statistics need 14.7 MB, 14.7 MB of it for GradientBank, and 14.7 MB are allowed;"
        " gradients: 399 would fit\n"
    )
    assert not (tmp_path / "small").exists()

    outcome = niwaki_command(*given, "--out", "kept", "--memory", needed)
    assert (outcome.code, outcome.err.splitlines()[0]) == (0, "statistics take 14.7 MB at most")
    free = niwaki_command(*given, "--out", "free")
    assert free.err == outcome.err
    kept, free = (json.loads(one.out) for one in (outcome, free))
    assert kept["identity"] == free["identity"]
    assert (tmp_path / "kept" / "model.safetensors").read_bytes() == (tmp_path / "free" / "model.safetensors").read_bytes()
    assert niwaki_command(*given, "--out", "free", "--memory", "1B").code == 0  # it is finished: there is nothing to collect
    assert niwaki_command(*given, "--out", "other", "--memory", "much").code == 2


def test_a_dry_run_tells_what_statistics_take(niwaki_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    given = ("--task", "task.py:task", "--sparsity", "0.5", "--dry-run")
    outcome = niwaki_command("run", "woodfisher", *given)
    assert (outcome.code, outcome.err) == (0, "statistics take 14.7 MB at most\n")
    assert json.loads(niwaki_command("run", "woodfisher", *given, "--json").out)["statistics_bytes"] == 400 * (16 * 64 + 2 * 64 * 64) * 4
    assert niwaki_command("run", "gmp", *given, "--memory", "0").err == ""
    assert "gradients: 271 would fit" in niwaki_command("run", "woodfisher", *given, "--memory", "10MB").err
