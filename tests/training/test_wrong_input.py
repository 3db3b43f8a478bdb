"""What a run refuses before it trains: each error names what is wrong, in one line, and nothing is written or lost."""

import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset
from training import small
from training.small import contents, make

import niwaki
from niwaki.errors import InputError
from niwaki.tasks import Data, Training
from niwaki.training import run

# ---------------------------------------------------------------- folders that cannot take a run


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema": "other/7"}', '{"schema": "niwaki.run/1"}'])
def test_a_record_that_is_none_is_refused_and_kept(small_task, tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json") as error:
        run(make(small_task), tmp_path)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == {"run.json": text.encode()}


def test_a_foreign_folder_is_refused_and_kept(small_task, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not empty"):
        run(make(small_task), tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_file_in_the_way_is_refused_and_kept(small_task, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="is a file"):
            run(make(small_task), folder)
    assert contents(tmp_path) == {"file": b"x"}


@pytest.mark.parametrize("denied", ["access", "mkdir"])
def test_a_folder_that_cannot_be_written_is_refused(small_task, tmp_path, monkeypatch, denied):
    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    if denied == "access":
        monkeypatch.setattr(os, "access", lambda *_: False)
    else:
        monkeypatch.setattr(Path, "mkdir", deny)
    with pytest.raises(InputError, match="cannot be written"):
        run(make(small_task), tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- input that is wrong


def test_a_recipe_that_does_not_fit_the_model_writes_nothing(small_task, tmp_path):
    with pytest.raises(InputError, match=r"0\.weight"):
        run(make(small_task, recipe=niwaki.Recipe(granularity={"n_m": {"n": 1, "m": 4}})), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_does_not_fit_the_run_writes_nothing(small_task, tmp_path):
    recipe = small.recipe("stages: [{for: 1 epochs}, {for: 1 epochs, sparsity: 0.5, schedule: {cubic: {end: 99 steps}}}]")
    with pytest.raises(InputError, match=r"stages\[1\]\.schedule\.cubic: it ends at step 99, after the run's 13 steps"):
        run(make(small_task, recipe=recipe), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rat": 1}, r"^--set: unknown field 'learning_rat'; did you mean 'learning_rate'\? choices: accumulate, "),
        ({"precision": "float8"}, r"^--set: precision: .*float32"),
        ({"learning_rate": -1}, r"^--set: learning_rate: .*greater than 0, got -1"),
        ({"epochs": "many"}, r"^--set: epochs: .*integer.*got 'many'"),
        ({"ema": 1.0}, r"^--set: ema: .*less than 1"),
        ({"batch_size": 201}, r"^--set: batch_size=201 is more than the 200 training examples of plane; choose at most 200$"),
        ({"epochs": 0}, r"^--epochs: a run trains for at least 1 epoch; niwaki prune needs none$"),
    ],
)
def test_settings_that_are_wrong_are_named(small_task, settings, said):
    with pytest.raises(InputError, match=said) as error:
        make(small_task, **settings)
    assert "\n" not in str(error.value)


def test_settings_may_be_text():
    made = make(small.plane(), epochs="3", learning_rate="0.01", ema=None, clip_norm="1e-1")
    assert made.training == Training(epochs=3, batch_size=16, learning_rate=0.01, clip_norm=0.1, threads=1)


def test_an_unknown_model_is_named(small_task):
    with pytest.raises(InputError, match=r"^--model: the task 'plane' has no model 'smal'; did you mean 'small'\?"):
        make(small_task, model="smal")


@pytest.mark.parametrize("which", ["training", "test"])
def test_data_without_examples_is_refused(which):
    sizes = (0, 90) if which == "training" else (200, 0)
    data = Data(*(small.examples(size, 0) for size in sizes), classes=("below", "above"))
    with pytest.raises(InputError, match=f"^--task: plane has no {which} examples$"):
        make(small.plane(data=lambda folder: data))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.tensor([0, 1, 2]), "labels from 0 to 2, and 2 classes: whole numbers from 0 to 1 are possible"),
        (torch.tensor([0, -1, 1]), "labels from -1 to 1, and 2 classes"),
        (torch.tensor([0.0, 1.0, 1.0]), "labels from 0.0 to 1.0, and 2 classes"),
    ],
)
@pytest.mark.parametrize("which", ["training", "test"])
def test_labels_that_are_no_classes_are_refused(labels, said, which):
    wrong, right = TensorDataset(torch.zeros(3, 6), labels), small.examples(90, 1)
    data = Data(*((wrong, right) if which == "training" else (right, wrong)), classes=("below", "above"))
    with pytest.raises(InputError, match=f"^--task: plane has {which} {said}"):
        make(small.plane(data=lambda folder: data), batch_size=2)


def test_weights_to_start_from_that_cannot_be_had_are_named(small_task, tmp_path):
    with pytest.raises(InputError, match=r"^--from: .*none\.safetensors is no file; give a \.safetensors file"):
        make(small_task, start=tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"^--from: missing; give the \.safetensors file of the trained model$"):
        make(small_task, kind="prune")
    niwaki.save(torch.nn.Linear(3, 3), tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name, said in (("other", "other.safetensors"), ("text", "text.safetensors: not a valid safetensors file")):
        with pytest.raises(InputError, match=said) as error:
            run(make(small_task, start=tmp_path / f"{name}.safetensors"), tmp_path / "run")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()


def test_a_recipe_with_parts_to_come_is_refused(small_task):
    with pytest.raises(InputError, match="this version of Niwaki cannot run yet: objective 'adversarial'"):
        make(small_task, recipe=niwaki.Recipe(sparsity=0.5, objective="adversarial"))
