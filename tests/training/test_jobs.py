import hashlib
import json
import os
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import niwaki
from niwaki.errors import InputError, NiwakiError
from niwaki.training import job, read, run
from niwaki.training import jobs as module
from niwaki.training.record import SCHEMA, Record, write_atomically

TARGETS = {"0.weight": (24, 6), "3.weight": (16, 24)}
"""Of the small network: every linear layer but the last."""


def make(task, method="gmp", sparsity=0.75, seed=0, epochs=None, **fields):
    recipe = niwaki.method(method, sparsity=sparsity, **fields)
    return job(task, recipe, method=method, seed=seed, epochs=epochs)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_writes_a_record_and_a_model_that_agree(small_task, tmp_path):
    folder = tmp_path / "new" / "run"
    record = run(make(small_task), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "run.json"]
    assert read(folder) == record
    assert json.loads((folder / "run.json").read_text())["schema"] == SCHEMA

    model = small_task.build("small", 99)
    loaded = niwaki.load(folder / "model.safetensors", model=model)
    assert {name: tuple(mask.shape) for name, mask in loaded.masks.items()} == TARGETS
    total = sum(prod(shape) for shape in TARGETS.values())
    active = {name: int(mask.sum()) for name, mask in loaded.masks.items()}
    assert sum(active.values()) == round((1 - 0.75) * total)
    assert all((dict(model.named_parameters())[name][~mask] == 0).all() for name, mask in loaded.masks.items())

    inputs, targets = small_task.data().test[torch.arange(90)]
    right = (model.eval()(inputs).argmax(1) == targets).sum().item()
    assert record.measure("accuracy").sparse == right / 90
    assert record.measure("sparsity of the targets").sparse == 1 - sum(active.values()) / total
    parameters = sum(p.numel() for p in model.parameters())
    assert record.measure("sparsity of all parameters").sparse == pytest.approx((total - sum(active.values())) / parameters)
    assert record.measure("forward FLOPs").dense == 2 * (total + 32)
    assert record.measure("forward FLOPs").sparse == 2 * (sum(active.values()) + 32)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    stored = folder / "model.safetensors"
    assert record.measure("file size").dense == (tmp_path / "dense.safetensors").stat().st_size
    assert record.measure("file size").sparse == stored.stat().st_size == record.results.model.bytes
    assert record.results.model.sha256 == hashlib.sha256(stored.read_bytes()).hexdigest()
    assert {layer.name: layer.active for layer in record.results.layers if layer.target} == active
    assert all(measure.definition for measure in record.results.measures)


def test_dense_and_sparse_start_alike_and_have_the_same_length(small_task, tmp_path):
    # Without any sparsity the second training is the first one again.
    record = run(make(small_task, sparsity=0.0), tmp_path / "run")
    dense, sparse = record.results.dense_history, record.results.sparse_history
    assert dense == sparse
    assert len(dense) == 4
    assert record.measure("accuracy").dense == record.measure("accuracy").sparse > 0.9


def test_the_sparse_history_shows_the_schedule(small_task, tmp_path):
    record = run(make(small_task, epochs=8), tmp_path / "run")
    sparsities = [epoch.sparsity for epoch in record.results.sparse_history]
    assert sparsities[0] == 0
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == record.measure("sparsity of the targets").sparse


@pytest.mark.parametrize("method", ["rigl", "snip", "str"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(small_task, tmp_path, method):
    sparsity = None if method == "str" else 0.75
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))  # the state of the process must not matter
        run(make(small_task, method, sparsity, seed), tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    first, second = (read(tmp_path / name) for name in "ab")
    times = {"training time"}
    assert [m for m in first.results.measures if m.name not in times] == [m for m in second.results.measures if m.name not in times]
    assert first.results.sparse_history == second.results.sparse_history
    assert first.identity == second.identity != read(tmp_path / "c").identity


def test_a_finished_run_is_read_again_not_computed(small_task, tmp_path, monkeypatch):
    record = run(make(small_task), tmp_path / "run")
    before = contents(tmp_path)
    monkeypatch.setattr(module, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert run(make(small_task), tmp_path / "run") == record
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"method": "rigl"}, "method 'gmp' there, 'rigl' here"),
        ({"sparsity": 0.8}, "recipe.sparsity 0.75 there, 0.8 here"),
        ({"seed": 3}, "seed 0 there, 3 here"),
        ({"epochs": 5}, "training.epochs 4 there, 5 here"),
    ],
)
def test_the_folder_of_another_run_is_refused(small_task, tmp_path, change, difference):
    run(make(small_task), tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(InputError) as error:
        run(make(small_task, **change), tmp_path / "run")
    assert difference in str(error.value)
    assert contents(tmp_path) == before


def test_a_changed_model_file_is_noticed(small_task, tmp_path):
    run(make(small_task), tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="was changed since its run"):
        run(make(small_task), tmp_path / "run")


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


@pytest.mark.parametrize("denied", ["access", "mkdir", "write"])
def test_a_folder_that_cannot_be_written_is_refused(small_task, tmp_path, monkeypatch, denied):
    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    if denied == "access":
        monkeypatch.setattr(os, "access", lambda *_: False)
    elif denied == "mkdir":
        monkeypatch.setattr(Path, "mkdir", deny)
    else:
        monkeypatch.setattr("niwaki.training.folder.write", deny)
    with pytest.raises(InputError, match="cannot be written"):
        run(make(small_task), tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_does_not_fit_the_model_writes_nothing(small_task, tmp_path):
    with pytest.raises(InputError, match=r"0\.weight"):
        run(make(small_task, sparsity=None, granularity={"n_m": {"n": 1, "m": 4}}), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_a_run_that_fails_takes_its_files_away(small_task, tmp_path, phase):
    def interrupt(now, step, total, epoch):
        assert (tmp_path / "a" / "run" / "run.json").exists()
        if now == phase and step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make(small_task), tmp_path / "a" / "run", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_is_done_again(small_task, tmp_path):
    this = make(small_task)
    expected = run(this, tmp_path / "reference")
    folder = tmp_path / "run"
    folder.mkdir()
    unfinished = Record(identity=this.choices.identity(), choices=this.choices, environment={})
    (folder / "run.json").write_text(json.dumps(unfinished.model_dump(mode="json", by_alias=True)))
    (folder / "model.safetensors").write_bytes(b"half")
    (folder / ".run.json.123.part").write_bytes(b"{")
    assert run(this, folder).results.model == expected.results.model
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "reference" / "model.safetensors").read_bytes()


def test_a_model_that_does_not_come_back_the_same_fails_the_run(small_task, tmp_path, monkeypatch):
    def save_other(model, path, masks=None):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        state["5.bias"] += torch.tensor([100.0, 0.0])
        niwaki.save(state, path, masks=masks)

    monkeypatch.setattr(module, "save", save_other)
    with pytest.raises(NiwakiError, match="the reloaded model differs"):
        run(make(small_task), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_plan_changes_and_writes_nothing(small_task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    this = make(small_task)
    weights = this.build().state_dict()
    plan = this.plan()
    assert {row.name: row.pieces for row in plan.tensors} == {name: prod(shape) for name, shape in TARGETS.items()}
    assert all(torch.equal(value, weights[name]) for name, value in this.build().state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_threads_is_given_back(small_task, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(make(small_task, epochs=1), tmp_path / "run")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_name_of_a_method_does_not_decide_a_run(small_task):
    this = make(small_task)
    assert replace(this, method="my copy of it").choices.identity() == this.choices.identity()
    assert replace(this, seed=1).choices.identity() != this.choices.identity()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_atomically(path, b"old")

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert contents(tmp_path) == {"run.json": b"old"}


def test_two_processes_do_not_write_one_folder(small_task, tmp_path):
    """A second run of the same command is refused while the first one writes, and takes nothing away."""
    this, folder = make(small_task), tmp_path / "run"
    seen = []

    def second(phase, step, total, epoch):
        if not seen:
            seen.append(contents(folder))
            with pytest.raises(InputError, match="being written by another niwaki run"):
                run(this, folder)  # a lock of an open file, so it holds within this process as well
            assert contents(folder) == seen[0]

    record = run(this, folder, second)
    assert seen
    assert run(this, folder) == record
