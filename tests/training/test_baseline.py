"""Dense baselines: trained once, kept by what determines them, and trained again when their file is not what it was."""

import json
import multiprocessing
import time

import pytest
import torch
from training import small

import niwaki
from niwaki.errors import InputError
from niwaki.tasks import Data
from niwaki.training import baseline as module
from niwaki.training import job, run
from niwaki.training.baseline import Sitting
from niwaki.training.state import Interrupted


@pytest.fixture
def trainings(monkeypatch):
    """The phases that were trained, one entry for each training, wherever it began."""
    phases = []
    original = module.train

    def counted(trainer, identity, folder, sitting, phase):
        phases.append(phase)
        return original(trainer, identity, folder, sitting, phase)

    monkeypatch.setattr(module, "train", counted)
    monkeypatch.setattr("niwaki.training.jobs.train", counted)
    return phases


def make(method="gmp", *, task=None, seed=0, model=None, start=None, **training):
    recipe = niwaki.method(method, sparsity=0.5)
    settings = {"epochs": 1} | training
    return job(task or small.plane(), recipe, method=method, seed=seed, model=model, start=start, training=settings)


def baselines(folder):
    return sorted(path.name for path in (folder / ".baselines").iterdir())


def test_it_is_trained_once_for_many_runs(tmp_path, trainings):
    first, second = (run(make(method), tmp_path / method) for method in ("gmp", "rigl"))
    run(make("gmp", start=None), tmp_path / "gmp")
    assert trainings == ["dense", "sparse", "sparse"]
    assert len(baselines(tmp_path)) == 1
    assert first.results.dense_history == second.results.dense_history
    assert [measure.dense for measure in first.results.measures[:1]] == [measure.dense for measure in second.results.measures[:1]]
    [folder] = (tmp_path / ".baselines").iterdir()
    assert folder.name == make().choices.baseline()[:16]
    assert sorted(path.name for path in folder.iterdir()) == ["baseline.json", "model.safetensors"]


def test_it_equals_a_dense_training(tmp_path):
    run(make(), tmp_path / "run")
    [folder] = (tmp_path / ".baselines").iterdir()
    made = small.trainer(epochs=1)
    history = made.run().history
    stored = small.plane().build("small", small.plane().data(None), 7)
    niwaki.load(folder / "model.safetensors", model=stored)
    assert all(torch.equal(stored.state_dict()[name], value) for name, value in made.model.state_dict().items())
    assert json.loads((folder / "baseline.json").read_text())["history"] == [epoch.model_dump(mode="json") for epoch in history]


def test_whatever_determines_it_has_a_folder_of_its_own(tmp_path, trainings):
    other = small.plane(data=lambda folder: Data(small.examples(200, 5), small.examples(90, 1), classes=("below", "above")))
    changed = small.plane(code="0" * 64)
    renamed = small.plane(name="another plane")
    niwaki.save(small.plane().build("small", small.plane().data(None), 9), tmp_path / "start.safetensors")
    jobs = [
        make(),
        make(seed=1),
        make(model="plain"),
        make(learning_rate=0.05),
        make(task=other),
        make(task=changed),
        make(task=renamed),
        make(start=tmp_path / "start.safetensors"),
    ]
    for number, one in enumerate(jobs):
        run(one, tmp_path / f"run {number}")
        assert len(baselines(tmp_path)) == number + 1
    assert trainings == ["dense", "sparse"] * len(jobs)


def test_a_place_for_baselines_can_be_chosen(tmp_path, trainings):
    run(make(), tmp_path / "a" / "run", baselines=tmp_path / "shared")
    run(make(), tmp_path / "b" / "run", baselines=tmp_path / "shared")
    assert trainings == ["dense", "sparse", "sparse"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "shared"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["run"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no record", "broken record", "old record", "record of another"])
def test_what_was_damaged_is_trained_again(tmp_path, trainings, damage):
    run(make(), tmp_path / "first")
    [folder] = (tmp_path / ".baselines").iterdir()
    model, known = folder / "model.safetensors", folder / "baseline.json"
    whole, said = model.read_bytes(), json.loads(known.read_text())
    if damage == "flip":
        model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "truncate":
        model.write_bytes(whole[:-5])
    elif damage == "remove":
        model.unlink()
    elif damage == "no record":
        known.unlink()
    elif damage == "broken record":
        known.write_text(known.read_text()[:50])
    elif damage == "old record":
        known.write_text(json.dumps({key: value for key, value in said.items() if key != "seconds"}))
    else:
        known.write_text(json.dumps(said | {"identity": "0" * 64}))
    record = run(make("rigl"), tmp_path / "second")
    assert trainings == ["dense", "sparse", "dense", "sparse"]
    assert model.read_bytes() == whole
    assert json.loads(known.read_text())["history"] == said["history"]
    assert record.results.dense_history


def test_what_was_interrupted_goes_on_from_its_checkpoint(tmp_path, trainings):
    expected = run(make(), tmp_path / "whole" / "run")
    steps = []

    def hear(phase, step, total, epoch):
        steps.append((phase, step))

    taken = iter([False] * 4 + [True])
    with pytest.raises(Interrupted, match=r"^dense training interrupted at step 5 of 13; .*checkpoint\.safetensors holds all of it$"):
        run(make(), tmp_path / "run", sitting=Sitting(stop=lambda: next(taken), progress=hear))
    assert run(make(), tmp_path / "run", sitting=Sitting(progress=hear)).results.model == expected.results.model
    assert steps == [("dense", step) for step in range(1, 14)] + [("sparse", step) for step in range(1, 14)]
    assert trainings == ["dense", "sparse", "dense", "dense", "sparse"]


def test_the_checkpoint_of_another_training_is_refused(tmp_path):
    taken = iter([False, True])
    with pytest.raises(Interrupted):
        run(make(), tmp_path / "run", sitting=Sitting(stop=lambda: next(taken)))
    [folder] = (tmp_path / ".baselines").iterdir()
    folder.rename(folder.with_name(make(seed=1).choices.baseline()[:16]))
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: the checkpoint of another training; delete it to begin anew"):
        run(make(seed=1), tmp_path / "other")


def test_who_waits_for_another_process_can_be_interrupted(tmp_path):
    with module.locked(tmp_path / ".baselines" / make().choices.baseline()[:16]):
        asked = iter([False, False, True])
        with pytest.raises(Interrupted, match="interrupted while another process trains the same dense baseline"):
            run(make(), tmp_path / "run", sitting=Sitting(stop=lambda: next(asked)))


def train_in_a_process(folder, name, trained, both_are_here):
    """What each of two processes does; a dense training takes a while, so that they meet."""
    torch.set_num_threads(1)
    original = module.train

    def slow(trainer, identity, place, sitting, phase):
        if phase == "dense":
            with trained.get_lock():
                trained.value += 1
            time.sleep(1.0)
        return original(trainer, identity, place, sitting, phase)

    module.train = slow
    both_are_here.wait(120)
    run(make(name), folder / name)


def test_two_processes_at_once_train_it_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    trained, both_are_here = context.Value("i", 0), context.Barrier(2)
    both = [context.Process(target=train_in_a_process, args=(tmp_path, name, trained, both_are_here)) for name in ("gmp", "rigl")]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert trained.value == 1
    records = [niwaki.training.read(tmp_path / name) for name in ("gmp", "rigl")]
    assert records[0].results.dense_history == records[1].results.dense_history
    assert len(baselines(tmp_path)) == 1
