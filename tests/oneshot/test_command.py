"""``niwaki prune --text``: folders from the command line."""

from __future__ import annotations

import json

import pytest

from niwaki.cli import main
from niwaki.cli.options import Memory
from niwaki.oneshot.folder import read_masks


@pytest.fixture
def given(folder, text, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    return ["--model", str(folder()), "--text", str(tmp_path / "text.txt"), "--examples", "4", "--length", "12"]


def test_a_folder_is_pruned(given, tmp_path, capsys):
    assert main(["prune", "wanda", *given, "--sparsity", "0.5", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj.weight" in shown
    assert "model.layers.0 ... model.layers.2: 3 blocks of LlamaDecoderLayer" in shown
    assert read_masks(tmp_path / "out").sparsity == 0.5


def test_json(given, tmp_path, capsys):
    assert main(["prune", "sparsegpt", *given, "--granularity", "2:4", "--out", str(tmp_path / "out"), "--json", "--memory", "1MiB"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["sparsity"] == 0.5
    assert data["recipe"]["granularity"] == {"n_m": {"n": 2, "m": 4}}
    assert data["blocks"] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert len(data["layers"]) == 21
    for mask in read_masks(tmp_path / "out").values():
        assert (mask.view(mask.shape[0], -1, 4).sum(dim=2) == 2).all()


def test_all_blocks_together(given, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["prune", "magnitude", *given, "--sparsity", "0.5", "--out", out]) == 2
    assert "--together" in capsys.readouterr().err
    assert main(["prune", "magnitude", *given, "--sparsity", "0.5", "--out", out, "--together"]) == 0
    assert len({round(float(mask.float().mean()), 4) for mask in read_masks(out).values()}) > 1
    other = str(tmp_path / "other")
    assert (
        main(["prune", "magnitude", *given, "--sparsity", "0.5", "--out", other, "--allocation", "uniform", "--blocks", "model.layers"])
        == 0
    )
    assert {float(mask.float().mean()) for mask in read_masks(other).values()} == {0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "digits"], "--task: is for the trained model of a task"),
        (["--from", "x.safetensors"], "--from: is for the trained model of a task"),
        (["--epochs", "3"], "--epochs: is for the trained model of a task"),
        (["--rounds", "3"], "--rounds: is for the trained model of a task"),
        (["--granularity", "2:5:1"], "granularity"),
        (["--memory", "much"], "'much' is no amount of memory, such as 2GiB or 500MB"),
        (["--out", ""], "--out"),
    ],
)
def test_bad_input(given, tmp_path, capsys, arguments, message):
    assert main(["prune", "wanda", *given, "--sparsity", "0.5", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_told(given, tmp_path, capsys):
    assert main(["prune", "wanda", *given, "--sparsity", "0.5"]) == 2
    assert "--out: missing; with --text it is a new folder" in capsys.readouterr().err
    assert main(["prune", "wanda", *given[2:], "--sparsity", "0.5", "--out", str(tmp_path / "out")]) == 2
    assert "--model: missing; with --text it is the folder of the model" in capsys.readouterr().err
    assert main(["prune", "wanda", "--task", "digits"]) == 2
    assert "Missing option '--from'" in capsys.readouterr().err
    assert main(["prune", "wanda", "--task", "digits", "--from", "x", "--examples", "3"]) == 2
    assert "--examples: is for a folder of a pretrained model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2 * 1024**3), ("500MB", 500 * 1000**2), ("1.5 kib", 1536), ("12", 12), ("12B", 12), ("3K", 3000), ("1tb", 10**12)],
)
def test_amounts_of_memory(text, count):
    assert Memory().convert(text, None, None) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "1XB", "1iB", "1 2", "1e3"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(Exception, match="is no amount of memory"):
        Memory().convert(text, None, None)
