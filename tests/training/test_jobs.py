import hashlib
import json
import math
from dataclasses import replace
from math import prod

import pytest
import torch
from safetensors.torch import save_file
from training import small
from training.small import ELEMENTS, TARGETS, contents, make

import niwaki
from niwaki.errors import InputError, NiwakiError
from niwaki.tasks import Data, Model, Training
from niwaki.training import job, read, run
from niwaki.training import jobs as module
from niwaki.training.baseline import Sitting
from niwaki.training.folder import finished_before
from niwaki.training.record import SCHEMA, Predictions, Record, Start, write
from niwaki.training.state import Interrupted


def trained_file(folder, seed=5, epochs=2):
    """A file with trained weights, and their model."""
    made = small.trainer(seed=seed, epochs=epochs)
    made.run()
    niwaki.save(made.model, folder / "trained.safetensors")
    return folder / "trained.safetensors", made.model.eval()


# ---------------------------------------------------------------- before a run


@pytest.mark.parametrize(
    ("method", "looks"), [("owl", "the scores of all pieces"), ("amc", "a loss over data"), ("evolutionary", "a loss over data")]
)
def test_an_allocation_that_looks_at_what_is_not_known_yet_is_planned(small_task, method, looks):
    [plan] = [plan for leaf, plan in make(small_task, method, sparsity=0.5).plans() if leaf.recipe.selects]
    assert [one.keep for one in plan.tensors] == [None, None]
    assert all(looks in one.why for one in plan.tensors)
    assert plan.final_sparsity == 0.5


def test_a_run_whose_allocation_looks_at_scores(small_task, tmp_path):
    record = run(make(small_task, "l_obs", sparsity=0.5, epochs=20), tmp_path / "run")
    assert record.measure("sparsity of the targets").sparse == 0.5


# ---------------------------------------------------------------- what a run leaves


def test_a_run_writes_a_record_and_a_model_that_agree(small_task, tmp_path):
    folder = tmp_path / "new" / "run"
    record = run(make(small_task), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "run.json"]
    assert sorted(path.name for path in folder.parent.iterdir()) == [".baselines", "run"]
    assert read(folder) == record
    assert json.loads((folder / "run.json").read_text())["schema"] == SCHEMA

    data = small_task.data(None)
    model = small_task.build("small", data, 99)
    loaded = niwaki.load(folder / "model.safetensors", model=model)
    assert {name: tuple(mask.shape) for name, mask in loaded.masks.items()} == TARGETS
    active = {name: int(mask.sum()) for name, mask in loaded.masks.items()}
    assert sum(active.values()) == round((1 - 0.75) * ELEMENTS)
    assert all((dict(model.named_parameters())[name][~mask] == 0).all() for name, mask in loaded.masks.items())
    assert record.results.masks_hash == loaded.masks.hash()

    inputs, targets = data.test[torch.arange(90)]
    said = model.eval()(inputs).argmax(1)
    assert record.headline == record.measure("accuracy")
    assert record.measure("accuracy").sparse == (said == targets).sum().item() / 90
    assert record.measure("sparsity of the targets").sparse == 1 - sum(active.values()) / ELEMENTS
    parameters = sum(p.numel() for p in model.parameters())
    assert record.measure("sparsity of all parameters").sparse == pytest.approx((ELEMENTS - sum(active.values())) / parameters)
    assert record.measure("forward FLOPs").dense == 2 * (ELEMENTS + 32)
    assert record.measure("forward FLOPs").sparse == 2 * (sum(active.values()) + 32)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    stored = folder / "model.safetensors"
    assert record.measure("file size").dense == (tmp_path / "dense.safetensors").stat().st_size
    assert record.measure("file size").sparse == stored.stat().st_size == record.results.model.bytes
    assert record.results.model.sha256 == hashlib.sha256(stored.read_bytes()).hexdigest()
    assert {layer.name: layer.active for layer in record.results.layers if layer.target} == active
    assert all(measure.definition for measure in record.results.measures)

    for number, row in enumerate(record.results.classes):
        assert (row.name, row.examples) == (("below", "above")[number], int((targets == number).sum()))
        assert row.sparse_recall == int(((said == number) & (targets == number)).sum()) / row.examples
    assert Predictions.unpack(record.results.predictions.true).tolist() == targets.tolist()
    assert Predictions.unpack(record.results.predictions.sparse).tolist() == said.tolist()
    right = (Predictions.unpack(record.results.predictions.dense) == targets.numpy()).mean()
    assert record.measure("accuracy").dense == right


def test_targets_that_are_no_classes_have_no_predictions(tmp_path):
    recipe = niwaki.Recipe(sparsity=0.5, target={"weights": {"include": ["weight"]}})
    record = run(make(small.regression(), recipe=recipe), tmp_path / "run")
    assert (record.results.classes, record.results.predictions) == ([], None)
    assert record.headline.name == "error"
    assert not record.headline.higher_is_better


def test_dense_and_sparse_start_alike_and_have_the_same_length(small_task, tmp_path):
    # Without any sparsity the second training is the first one again.
    record = run(make(small_task, sparsity=0.0), tmp_path / "run")
    dense, sparse = record.results.dense_history, record.results.sparse_history
    assert dense == sparse
    assert len(dense) == 4
    assert record.measure("accuracy").dense == record.measure("accuracy").sparse > 0.9
    assert record.measure("training FLOPs").sparse == record.measure("training FLOPs").dense == 1.0


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
        run(make(small_task, method, sparsity, seed), tmp_path / name, baselines=tmp_path / "baselines" / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    first, second = (read(tmp_path / name) for name in "ab")
    times = {"training time", "latency"}
    assert [m for m in first.results.measures if m.name not in times] == [m for m in second.results.measures if m.name not in times]
    assert first.results.sparse_history == second.results.sparse_history
    assert first.results.dense_history == second.results.dense_history
    assert first.results.predictions == second.results.predictions
    assert first.identity == second.identity != read(tmp_path / "c").identity


def test_the_teacher_is_the_dense_baseline(small_task, tmp_path, monkeypatch):
    teachers = []
    original = module.Job.trainer

    def seen(self, model, recipe=None, teacher=None, memory=None):
        teachers.append(teacher)
        return original(self, model, recipe, teacher, memory)

    monkeypatch.setattr(module.Job, "trainer", seen)
    recipe = niwaki.Recipe(sparsity=0.5, objective={"distillation": {"weight": 0.9}})
    run(make(small_task, recipe=recipe, epochs=1), tmp_path / "run")
    [folder] = (tmp_path / ".baselines").iterdir()
    stored = small_task.build("small", small_task.data(None), 7)
    niwaki.load(folder / "model.safetensors", model=stored)
    teacher = teachers[-1]
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in stored.state_dict().items())
    assert not teacher.training


def test_a_smaller_model_is_stored_and_its_record_says_how_to_load_it(small_task, tmp_path):
    recipe = small.recipe(
        "stages: [{for: 1 run, sparsity: 0.5, granularity: input_channel, target: {weights: {include: [3.weight]}}, finish: shrink}]"
    )
    record = run(make(small_task, recipe=recipe, epochs=1), tmp_path / "run")
    model = small_task.build("small", small_task.data(None), 99)
    niwaki.load(tmp_path / "run" / "model.safetensors", model=model)
    assert tuple(model[0].weight.shape) == (12, 6)
    inputs, targets = small_task.data(None).test[torch.arange(90)]
    assert record.measure("accuracy").sparse == (model.eval()(inputs).argmax(1) == targets).sum().item() / 90
    assert (record.measure("parameters").dense, record.measure("parameters").sparse) == (650, 650 - 12 * 9 - 12 * 16)


# ---------------------------------------------------------------- trained weights to start from


def test_both_trainings_start_from_the_given_weights(small_task, tmp_path):
    file, model = trained_file(tmp_path)
    inputs, targets = small_task.data(None).test[torch.arange(90)]
    expected = (model(inputs).argmax(1) == targets).sum().item() / 90
    record = run(make(small_task, sparsity=0.0, start=file, epochs=1, learning_rate=1e-9), tmp_path / "run")
    assert record.results.start_metrics == {"accuracy": expected}
    assert record.choices.start.file == "trained.safetensors"
    assert record.choices.start.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    stored = small_task.build("small", small_task.data(None), 0)
    niwaki.load(tmp_path / "run" / "model.safetensors", model=stored)
    torch.testing.assert_close(stored[0].weight, model[0].weight, rtol=1e-4, atol=1e-6)


def test_pruning_without_training_is_pruning_by_hand(small_task, tmp_path):
    file, model = trained_file(tmp_path)
    recipe = niwaki.Recipe(sparsity=0.75, allocation="global")
    record = run(make(small_task, recipe=recipe, start=file, kind="prune", epochs=0), tmp_path / "run")
    assert not (tmp_path / ".baselines").exists()
    magnitudes = torch.cat([model.get_parameter(name).flatten() for name in TARGETS]).abs()
    kept = magnitudes >= magnitudes.sort(descending=True).values[131]
    assert kept.sum() == 132
    inputs, targets = small_task.data(None).test[torch.arange(90)]
    before = (model(inputs).argmax(1) == targets).sum().item() / 90
    with torch.no_grad():
        for name, mask in zip(TARGETS, kept.split([144, 384]), strict=True):
            model.get_parameter(name).mul_(mask.view(TARGETS[name]))
    after = (model(inputs).argmax(1) == targets).sum().item() / 90
    stored = small_task.build("small", small_task.data(None), 9)
    niwaki.load(tmp_path / "run" / "model.safetensors", model=stored)
    assert all(torch.equal(stored.state_dict()[name], value) for name, value in model.state_dict().items())
    results = record.results
    assert (record.headline.dense, record.headline.sparse) == (before, after)
    assert (results.start_metrics, results.dense_history, results.sparse_history) == ({"accuracy": before}, [], [])
    assert [(stage.begin, stage.end, stage.sparsity) for stage in results.stages] == [(0, 0, 0.75)]
    assert record.measure("training FLOPs").dense is None
    assert record.measure("training time").dense is None


def test_pruning_with_fine_tuning_keeps_the_trained_model_as_the_dense_one(small_task, tmp_path):
    file, model = trained_file(tmp_path)
    inputs, targets = small_task.data(None).test[torch.arange(90)]
    before = (model(inputs).argmax(1) == targets).sum().item() / 90
    record = run(make(small_task, start=file, kind="prune", epochs=2), tmp_path / "run")
    assert record.headline.dense == before
    assert (len(record.results.dense_history), len(record.results.sparse_history)) == (0, 2)
    assert record.measure("sparsity of the targets").sparse == 0.75
    assert not (tmp_path / ".baselines").exists()


# ---------------------------------------------------------------- doing it again


def test_a_finished_run_is_read_again_not_computed(small_task, tmp_path, monkeypatch):
    record = run(make(small_task), tmp_path / "run")
    before = contents(tmp_path)
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(module, "dense", lambda *_, **__: pytest.fail("trained again"))
    assert run(make(small_task), tmp_path / "run") == record
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"method": "rigl"}, "method 'gmp' there, 'rigl' here"),
        ({"sparsity": 0.8}, "recipe.sparsity 0.75 there, 0.8 here"),
        ({"seed": 3}, "seed 0 there, 3 here"),
        ({"epochs": 5}, "training.epochs 4 there, 5 here"),
        ({"model": "plain"}, "model 'small' there, 'plain' here"),
    ],
)
def test_the_folder_of_another_run_is_refused(small_task, tmp_path, change, difference):
    run(make(small_task), tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(InputError) as error:
        run(make(small_task, **change), tmp_path / "run")
    assert difference in str(error.value)
    assert contents(tmp_path) == before


def test_the_folder_of_a_run_from_other_weights_is_refused(small_task, tmp_path):
    file, _ = trained_file(tmp_path)
    run(make(small_task, epochs=1), tmp_path / "run")
    with pytest.raises(InputError, match=r"start None there, .*trained\.safetensors.* here"):
        run(make(small_task, epochs=1, start=file), tmp_path / "run")
    run(make(small_task, epochs=1, start=file), tmp_path / "other")
    with pytest.raises(InputError, match=r"start .*trained\.safetensors.* there, None here"):
        run(make(small_task, epochs=1), tmp_path / "other")


def test_the_folder_of_a_run_that_failed_before_its_first_checkpoint_is_free(small_task, tmp_path):
    folder, other = tmp_path / "run", make(small_task, seed=3).choices
    folder.mkdir()
    unfinished = Record(identity=other.identity(), choices=other, environment={}).model_dump_json(by_alias=True)
    (folder / "run.json").write_text(unfinished)
    (folder / "checkpoint.safetensors").write_bytes(b"hours of work")
    with pytest.raises(InputError, match="holds another run"):
        run(make(small_task), folder)
    assert contents(folder) == {"run.json": unfinished.encode(), "checkpoint.safetensors": b"hours of work"}
    (folder / "checkpoint.safetensors").unlink()
    (folder / ".0123456789abcdef.tmp").write_bytes(b"{")
    record = run(make(small_task), folder)
    assert (record.choices.seed, read(folder)) == (0, record)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task_code": "b" * 64}, "(the code of the task file has changed)"),
        ({"data": "b" * 64}, "(the examples differ: other files, or random ones without a seed)"),
        ({"start": Start(file="same.safetensors", sha256="b" * 64)}, "(the weights of --from differ)"),
        ({"start": Start(file="other.safetensors", sha256="a" * 64), "seed": 1}, "(seed 0 there, 1 here)"),
        ({"start": None}, "(start 'same.safetensors' there, None here)"),
    ],
)
def test_hashes_that_differ_are_told_in_words(small_task, tmp_path, change, said):
    given = {"task_code": "a" * 64, "start": Start(file="same.safetensors", sha256="a" * 64)}
    before = make(small_task).choices.model_copy(update=given)
    write(Record(identity=before.identity(), choices=before, environment={}), tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(InputError) as error:
        finished_before(tmp_path, before.model_copy(update=change))
    assert said in str(error.value)


def test_a_changed_model_file_is_noticed(small_task, tmp_path):
    run(make(small_task), tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="was changed since its run"):
        run(make(small_task), tmp_path / "run")


@pytest.mark.parametrize("step", [1, 13, 17, 25])
def test_an_interrupted_run_goes_on_and_ends_the_same(small_task, tmp_path, step):
    this = make(small_task, "rigl", epochs=2)
    expected = run(this, tmp_path / "whole" / "run")
    now = []
    for phase in ("dense", "sparse"):
        sitting = Sitting(progress=lambda *heard: now.append(heard[:2]), stop=lambda phase=phase: now[-1] == (phase, step))
        with pytest.raises(Interrupted, match=f"^{phase} training interrupted at step {step} of 26; .* holds all of it$"):
            run(this, tmp_path / "run", sitting=sitting)
    assert read(tmp_path / "run").results is None
    again = run(this, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "run" / "model.safetensors").read_bytes()
    for field in ("sparse_history", "dense_history", "stages", "notes", "predictions", "layers", "storage", "masks_hash"):
        assert getattr(again.results, field) == getattr(expected.results, field), field
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model.safetensors", "run.json"]


def test_what_a_killed_process_left_is_taken_away(small_task, tmp_path):
    this = make(small_task)
    expected = run(this, tmp_path / "reference")
    folder = tmp_path / "run"
    folder.mkdir()
    unfinished = Record(identity=this.choices.identity(), choices=this.choices, environment={})
    (folder / "run.json").write_text(json.dumps(unfinished.model_dump(mode="json", by_alias=True)))
    (folder / "model.safetensors").write_bytes(b"half")
    (folder / ".0123456789abcdef.tmp").write_bytes(b"{")
    assert run(this, folder).results.model == expected.results.model
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "reference" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "run.json"]


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

    record = run(this, folder, sitting=Sitting(progress=second))
    assert seen
    assert run(this, folder) == record


# ---------------------------------------------------------------- failures, and what is not touched


def test_a_model_that_does_not_come_back_the_same_fails_the_run(small_task, tmp_path, monkeypatch):
    def save_other(model, path, masks=None, removed=None):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        state["5.bias"] += torch.tensor([100.0, 0.0])
        niwaki.save(state, path, masks=masks)

    monkeypatch.setattr("niwaki.training.results.save", save_other)
    with pytest.raises(NiwakiError, match="the reloaded model differs"):
        run(make(small_task), tmp_path / "run")
    assert read(tmp_path / "run").results is None


def test_an_error_of_the_users_code_comes_through(small_task, tmp_path):
    class Broken(torch.nn.Linear):
        def forward(self, x):
            raise RuntimeError("mine")

    task = replace(small_task, models={"broken": Model(lambda data: Broken(6, 2), Training(epochs=1, batch_size=16))})
    with pytest.raises(RuntimeError, match="mine"):
        run(make(task, recipe=niwaki.Recipe(sparsity=0.5, target={"weights": {"include": ["weight"]}})), tmp_path / "run")


def test_the_plans_change_and_write_nothing(small_task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    this = make(small_task, recipe=small.recipe("stages: [{for: 1 epochs, sparsity: 0.5}, {for: 1 epochs}, {sparsity: 0.75}]"))
    weights = this.build().state_dict()
    plans = this.plans()
    assert [leaf.number for leaf, _ in plans] == [1, 3]
    for _, plan in plans:
        assert {row.name: row.pieces for row in plan.tensors} == {name: prod(shape) for name, shape in TARGETS.items()}
    assert all(torch.equal(value, weights[name]) for name, value in this.build().state_dict().items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", [False, True])
def test_the_number_of_threads_is_given_back(small_task, tmp_path, fails):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if fails:
            with pytest.raises(Interrupted):
                run(make(small_task, epochs=1), tmp_path / "run", sitting=Sitting(stop=lambda: True))
        else:
            run(make(small_task, epochs=1), tmp_path / "run")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_name_of_a_method_does_not_decide_a_run(small_task, tmp_path):
    this = make(small_task, epochs=1)
    record = run(this, tmp_path / "run")
    renamed = job(small_task, niwaki.method("gmp", sparsity=0.75), method="my-copy.yaml", training={"epochs": 1})
    assert renamed.choices.identity() == this.choices.identity()
    assert run(renamed, tmp_path / "run") == record


def test_wall_times_are_of_all_sittings(small_task, tmp_path):
    this = make(small_task, epochs=1)
    for stop_at in (5, 18):
        taken = iter(range(stop_at))
        with pytest.raises(Interrupted):
            run(this, tmp_path / "run", sitting=Sitting(stop=lambda taken=taken: next(taken, None) is None))
    record = run(this, tmp_path / "run")
    assert all(
        math.isfinite(seconds) and seconds > 0
        for seconds in (record.measure("training time").dense, record.measure("training time").sparse)
    )


# ---------------------------------------------------------------- examples to validate with


def test_a_method_that_follows_a_validation_loss_holds_examples_out_of_both_trainings(small_task, tmp_path):
    plain, watched = make(small_task, "gmp"), make(small_task, "lprune", sparsity=None)
    assert plain.data.validation is None
    assert (len(watched.data.train), len(watched.data.validation), len(watched.data.test)) == (180, 20, 90)
    assert watched.data.test is not watched.data.validation
    assert plain.choices.baseline() != watched.choices.baseline()
    assert make(small_task, "autoprune", sparsity=None).choices.baseline() == watched.choices.baseline()
    again = make(small_task, "lprune", sparsity=None, seed=1)
    assert not torch.equal(again.data.validation.indices, watched.data.validation.indices)
    record = run(watched, tmp_path / "run")
    assert [note for note in record.results.notes if "20 examples that are not trained on" in note]
    dense = {epoch.step for epoch in record.results.dense_history}
    assert max(dense) == 4 * math.ceil(180 / 16)  # the baseline saw the 180 examples, too
    asked = make(small_task, "lprune", sparsity=0.25)
    assert asked.recipe.sparsity == 0.25
    assert asked.recipe.schedule.name == "adaptive"


def test_examples_to_validate_with_that_a_task_has_are_taken(small_task):
    own = small.examples(30, 7)
    task = small.plane(data=lambda folder: Data(small.examples(200, 0), small.examples(90, 1), validation=own))
    made = make(task, "lprune", sparsity=None)
    assert made.data.validation is own
    assert len(made.data.train) == 200
    assert made.data.fingerprint() != make(small_task, "gmp").data.fingerprint()
    with pytest.raises(InputError, match="has no validation examples"):
        make(small.plane(data=lambda folder: Data(small.examples(200, 0), own, validation=small.examples(0, 1))), "gmp")


def test_a_job_knows_how_to_begin_anew(small_task, tmp_path):
    recipe = niwaki.Recipe.from_yaml("stages: [{for: 1 epochs}, {prune: {fraction: 0.5}, restore: {weights: fresh}}, {for: 1 epochs}]")
    record = run(make(small_task, recipe=recipe), tmp_path / "run")
    assert record.measure("sparsity of the targets").sparse == 0.5
