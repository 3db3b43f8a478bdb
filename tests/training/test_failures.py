"""A disk that is full, a folder that is gone: what is said, what is left, and that the same run finishes afterwards with the same bytes."""

import errno
import os
import resource
import shutil

import pytest
from training import small

import niwaki
from niwaki.errors import InputError, NiwakiError
from niwaki.tasks import Metric
from niwaki.training import checkpoint, job, read, run
from niwaki.training.baseline import Sitting

EVERY_STEP = Sitting(every=0)
TICKET = "stages: [{for: 4 steps, save: early}, {for: 9 steps, restore: {weights: early}}, {prune: {fraction: 0.5}}, {for: 5 steps}]"


def make(recipe=None, task=None, **training):
    return job(task or small.plane(), recipe or niwaki.method("gmp", sparsity=0.5), method="gmp", training={"epochs": 1} | training)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    run(make(), folder / "run")
    return (folder / "run" / "model.safetensors").read_bytes()


class Disk:
    """A disk that takes ``room`` more files."""

    def __init__(self):
        self.room = 1e9

    def sync(self, descriptor):
        if os.fstat(descriptor).st_mode & 0o040000:
            return  # a folder
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(os, "fsync", disk.sync)
    return disk


@pytest.mark.parametrize(("room", "phase", "step"), [(1, "dense", 1), (5, "dense", 5), (20, "sparse", 4)])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, disk, reference, room, phase, step):
    """The files are run.json, then for both phases a checkpoint a step, one at the end, the model and what is known of it."""
    disk.room = room
    with pytest.raises(NiwakiError) as error:
        run(make(), tmp_path / "run", sitting=EVERY_STEP)
    assert type(error.value) is NiwakiError
    place = tmp_path / "run" if phase == "sparse" else next((tmp_path / ".baselines").iterdir())
    path = place / "checkpoint.safetensors"
    kept = f"the checkpoint of step {step - 1} is intact in {path}" if step > 1 else "there is no checkpoint yet"
    problem = f"{path}: cannot be written: No space left on device"
    assert str(error.value) == f"{phase} training stopped at step {step} of 13: {problem}; {kept}"
    if step > 1:
        assert checkpoint.load(path)["trainer"]["counters"]["step"] == step - 1
    assert sorted(p.name for p in place.iterdir()) == ["checkpoint.safetensors"] * (step > 1) + ["run.json"] * (phase == "sparse")

    disk.room = 1e9
    steps = []
    run(make(), tmp_path / "run", sitting=Sitting(progress=lambda phase, step, total, epoch: steps.append((phase, step))))
    assert steps[0] == (phase, step)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == reference


def test_a_file_that_becomes_too_large_leaves_the_last_checkpoint(tmp_path):
    """As with a quota: the checkpoint outgrows the limit when a snapshot comes into it."""
    recipe = small.recipe(TICKET)
    expected = run(make(recipe), tmp_path / "whole" / "run")
    sizes = {}
    made = small.trainer(TICKET, epochs=1)
    made.run(
        save=lambda state: checkpoint.save(tmp_path / "c", state()) or sizes.update({made.now.step: (tmp_path / "c").stat().st_size}),
        every=0,
    )
    assert max(sizes[step] for step in (1, 2, 3, 4)) + 2000 < sizes[5]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[4] + 1000, hard))
    try:
        with pytest.raises(NiwakiError, match=r"^sparse training stopped at step 5 .*: File too large; the checkpoint of step 4 is intact"):
            run(make(recipe), tmp_path / "run", sitting=EVERY_STEP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")["trainer"]["counters"]["step"] == 4
    assert run(make(recipe), tmp_path / "run").results.model == expected.results.model


@pytest.mark.parametrize(("room", "file"), [(15, "model.safetensors"), (16, "baseline.json"), (31, "model.safetensors"), (32, "run.json")])
def test_a_disk_that_is_full_at_the_end_costs_no_step(tmp_path, disk, reference, room, file):
    disk.room = room
    with pytest.raises(NiwakiError, match=rf"{file}: cannot be written: No space left on device") as error:
        run(make(), tmp_path / "run", sitting=EVERY_STEP)
    assert type(error.value) is NiwakiError
    place = tmp_path / "run" if room > 17 else next((tmp_path / ".baselines").iterdir())
    assert f"the checkpoint of step 13 is intact in {place / 'checkpoint.safetensors'}" in str(error.value)
    assert checkpoint.load(place / "checkpoint.safetensors")["trainer"]["counters"]["step"] == 13
    disk.room = 1e9
    steps = []
    run(make(), tmp_path / "run", sitting=Sitting(progress=lambda phase, step, total, epoch: steps.append(phase)))
    assert steps == ["sparse"] * 13 * (room < 17)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == reference
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model.safetensors", "run.json"]


@pytest.mark.parametrize("phase", ["dense", "sparse"])
@pytest.mark.parametrize("every", [0, 1e9])
def test_a_folder_that_is_gone_is_told(tmp_path, reference, phase, every):
    def remove(now, step, total, epoch):
        if (now, step) == (phase, 5):
            shutil.rmtree(tmp_path / "run" if phase == "sparse" else tmp_path / ".baselines")

    with pytest.raises(NiwakiError) as error:
        run(make(), tmp_path / "run", sitting=Sitting(every=every, progress=remove))
    assert type(error.value) is NiwakiError
    place = str(tmp_path / "run") if phase == "sparse" else str(tmp_path / ".baselines")
    assert "cannot be written: No such file or directory" in str(error.value)
    assert f"{place}" in str(error.value).rpartition("; ")[2]
    assert str(error.value).endswith(" is gone, and the checkpoints with it")
    run(make(), tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == reference


def test_a_loss_that_is_not_finite_stops_the_run_and_its_checkpoint_stays(tmp_path):
    task = small.regression()
    task.data(None).train.tensors[0][3] = float("nan")
    with pytest.raises(NiwakiError) as error:
        run(
            make(niwaki.Recipe(sparsity=0.5, target={"weights": {"include": ["weight"]}}), task, batch_size=4, epochs=3),
            tmp_path / "run",
            sitting=EVERY_STEP,
        )
    [folder] = (tmp_path / ".baselines").iterdir()
    step = checkpoint.load(folder / "checkpoint.safetensors")["trainer"]["counters"]["step"]
    assert 0 < step < 10
    assert str(error.value) == (
        f"dense training stopped at step {step} of 30: the loss became nan at step {step + 1} (epoch 1); a smaller learning rate may help;"
        f" the checkpoint of step {step} is intact in {folder / 'checkpoint.safetensors'}"
    )
    assert read(tmp_path / "run").results is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_told_by_name(tmp_path, value):
    metrics = {"accuracy": small.ACCURACY, "perplexity": Metric(lambda outputs, targets: outputs[:, 0] * 0 + value, "mean", False, False)}
    with pytest.raises(
        NiwakiError, match=rf"^dense training stopped at step 13 of 13: the metric 'perplexity' is {value} on the test examples"
    ):
        run(make(task=small.plane(metrics=metrics)), tmp_path / "run")


def test_a_damaged_checkpoint_is_told(tmp_path):
    taken = iter([False] * 20 + [True])
    with pytest.raises(NiwakiError):
        run(make(), tmp_path / "run", sitting=Sitting(stop=lambda: next(taken)))
    path = tmp_path / "run" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: not a valid safetensors file"):
        run(make(), tmp_path / "run")
    path.unlink()
    run(make(), tmp_path / "run")
