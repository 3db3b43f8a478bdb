"""Models and settings that a training loop stumbles over: overflowing gradients, lazy layers, hidden buffers, randomness in evaluation."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from training.small import in_sittings, make, plane, trainer, weights

import niwaki
from niwaki.errors import InputError
from niwaki.recipe import Recipe
from niwaki.tasks import Data, Model, Training
from niwaki.training import job, run


def of(build, **settings):
    """Return the small task with another model."""
    return plane(models={"odd": Model(build, Training(epochs=2, batch_size=16, learning_rate=0.1, threads=1, **settings))})


class Counting(nn.Module):
    """Its outputs depend on a buffer that its state does not have."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x):
        if self.training:
            self.scale *= 0.98
        return self.layers(x) * self.scale


class Noisy(nn.Module):
    """It draws random numbers even in evaluation."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x + torch.randn_like(x))


def test_steps_that_overflow_are_taken_again_so_that_the_sparsity_is_reached():
    loud = plane(loss=lambda outputs, targets: functional.cross_entropy(outputs, targets) * 1e4)
    recipe = "{sparsity: 0.9, allocation: global, schedule: {cubic: {every: 1 steps, end: 1 run}}}"
    made = trainer(recipe, task=loud, model="plain", precision="float16", learning_rate=1e-5, epochs=1)
    steps = []
    done = made.run(progress=lambda step, total, epoch: steps.append(step))
    assert made.scaler.get_scale() < 2.0**16  # it did overflow
    assert steps == list(range(1, 14))
    assert done.masks.sparsity == pytest.approx(0.9, abs=0.001)


def test_gradients_that_overflow_at_any_scale_are_given_up():
    endless = plane(loss=lambda outputs, targets: (outputs.float() - outputs.detach().float()).sum() * 1e38 * 1e38 + 1)
    made = trainer(task=endless, model="plain", precision="float16", epochs=1)
    with pytest.raises(niwaki.NiwakiError, match=r"the gradients overflow at step 1 however|the loss became"):
        made.run()


def test_buffers_that_the_state_leaves_out_are_resumed(tmp_path):
    task = of(lambda data: Counting())
    whole = trainer(task=task)
    whole.run()
    made, _, sittings = in_sittings(lambda: trainer(task=task), tmp_path / "c", 5)
    assert sittings > 2
    assert torch.equal(made.model.scale, whole.model.scale)
    assert all(torch.equal(value, weights(made.model)[name]) for name, value in weights(whole.model).items())


def test_counts_in_buffers_are_not_averaged():
    made = trainer(epochs=2, ema=0.99)
    made.run()
    assert made.model[1].num_batches_tracked == 26


def test_a_model_that_is_random_in_evaluation_has_the_same_metrics_when_it_is_loaded(tmp_path):
    assert run(make(of(lambda data: Noisy())), tmp_path / "run").results is not None


def test_lazy_layers_get_the_weights_of_the_seed():
    def build(data: Data) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))

    task = of(build)
    data = task.data(None)
    first, again, other = (task.build("odd", data, seed) for seed in (0, 0, 1))
    assert first[0].weight.shape == (8, 6)
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


@pytest.mark.parametrize("settings", [{"batch_size": 199}, {"batch_size": 16, "accumulate": 16}])
def test_a_part_of_one_example_is_refused_where_batch_normalization_needs_two(tmp_path, settings):
    with pytest.raises(InputError, match=r"batch_size=\d+ leaves a part of a batch with a single example \(of 200 in all\)"):
        run(make(plane(), **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_parts_than_examples_are_refused():
    with pytest.raises(InputError, match=r"accumulate=17 "):
        make(plane(), batch_size=16, accumulate=17)


def test_a_sparse_model_is_no_start(tmp_path):
    record = run(make(plane()), tmp_path / "run")
    with pytest.raises(InputError, match=r"--from: .*model\.safetensors is a sparse model, with masks; give the weights of a dense one"):
        run(make(plane(), start=tmp_path / "run" / record.results.model.file), tmp_path / "next")


def test_pruning_without_fine_tuning_has_one_moment(tmp_path):
    model = plane().build("small", plane().data(None), 0)
    niwaki.save(model, tmp_path / "trained.safetensors")
    recipe = Recipe.from_yaml("{sparsity: 0.5, schedule: cubic}")
    with pytest.raises(InputError, match=r"without fine-tuning there is one moment to prune"):
        job(plane(), recipe, method="mine", training={"epochs": 0}, start=tmp_path / "trained.safetensors", kind="prune")


def test_a_snapshot_does_not_outlive_the_larger_model():
    said = r"stages\[2\]\.restore: no earlier stage saves 'a'"
    with pytest.raises(InputError, match=said):
        Recipe.from_yaml(
            "stages: [{for: 1 epochs, save: a}, {sparsity: 0.5, granularity: input_channel, finish: shrink}, {restore: {weights: a}}]"
        )


def test_a_metric_called_accuracy_need_not_be_a_share(tmp_path):
    right = niwaki.tasks.Metric(lambda o, t: 100.0 * (o.argmax(1) == t), "right answers of a hundred", percent=False)
    results = run(make(plane(metrics={"accuracy": right})), tmp_path / "run").results
    assert results.measures[0].sparse > 1
    assert all(not measure.name.startswith("parameter efficiency") for measure in results.measures)


def test_a_model_that_comes_in_evaluation_mode_is_trained_in_training_mode():
    """As pretrained ones do."""
    modes = []
    made = trainer(model="dropout", epochs=1)
    made.model.eval()
    made.model[2].register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    made.run()
    assert modes[:13] == [True] * 13


def test_weights_that_are_restored_last_are_masked():
    made = trainer("stages: [{for: 2 steps, save: a}, {for: 2 steps}, {prune: {fraction: 0.5}}, {restore: {weights: a}}]")
    masks = made.run().masks
    assert masks.sparsity == 0.5
    for name, mask in masks.items():
        assert (made.model.get_parameter(name)[~mask] == 0).all()
        assert (made.model.get_parameter(name)[mask] != 0).all()


def test_random_pruning_depends_on_the_step():
    first, second = (
        trainer(f"stages: [{{for: {steps} steps}}, {{prune: {{fraction: 0.5, saliency: random}}}}]").run().masks for steps in (2, 3)
    )
    assert first.active == second.active
    assert 0.2 < first.iou(second) < 0.5  # 1/3 for independent ones
