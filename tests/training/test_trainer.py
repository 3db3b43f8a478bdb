"""One training: against loops written by hand in float64."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils.data import TensorDataset
from training import small
from training.small import trainer

from niwaki.errors import NiwakiError
from niwaki.training.loop import batches, order


def by_hand(training, seed=0, clip_norm=None, ema=None):
    """Momentum SGD on the linear regression: yields weight, bias, their average and the loss after every step."""
    task = small.regression(torch.float64)
    data = task.data(None)
    weight, bias = (p.detach().clone() for p in task.build("linear", data, seed).parameters())
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    averages = None
    total, step = training.epochs * math.ceil(40 / training.batch_size), 0
    warm = round(training.warmup * total)
    for epoch in range(1, training.epochs + 1):
        for inputs, targets in batches(data.train, training.batch_size, seed, epoch):
            error = inputs @ weight.T + bias - targets
            gradients = [2 * error.T @ inputs / len(inputs), 2 * error.mean(0)]
            if clip_norm is not None:
                norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
                gradients = [g * min(1.0, clip_norm / (norm + 1e-6)) for g in gradients]
            rate = (step + 1) / (warm + 1) if step < warm else (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
            for parameter, gradient, speed in zip((weight, bias), gradients, velocity, strict=True):
                speed.mul_(training.momentum).add_(gradient + training.weight_decay * parameter)
                parameter.sub_(training.learning_rate * rate * speed)
            step += 1
            now = [weight.clone(), bias.clone()]
            averages = now if averages is None or ema is None else [ema * a + (1 - ema) * w for a, w in zip(averages, now, strict=True)]
            yield (*now, *averages, float(error.square().mean()))


def regression_trainer(**settings):
    given = {"epochs": 3, "batch_size": 8, "learning_rate": 0.05, "momentum": 0.8, "weight_decay": 0.01, "warmup": 0.2}
    return trainer(task=small.regression(torch.float64), **given | settings)


@pytest.mark.parametrize("seed", [0, 3])
def test_training_equals_a_loop_written_by_hand(seed):
    made = regression_trainer(seed=seed)
    steps = list(by_hand(made.training, seed))
    history = made.run().history
    torch.testing.assert_close(made.model.weight, steps[-1][0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(made.model.bias, steps[-1][1], rtol=1e-12, atol=1e-14)
    losses = [sum(step[4] for step in steps[i : i + 5]) / 5 for i in (0, 5, 10)]
    assert [epoch.train_loss for epoch in history] == pytest.approx(losses, rel=1e-6)
    assert [(epoch.epoch, epoch.step, epoch.stage) for epoch in history] == [(1, 5, 1), (2, 10, 1), (3, 15, 1)]
    assert [epoch.learning_rate for epoch in history] == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * (step - 3) / 12)) / 2 for step in (4, 9, 14)], rel=1e-12
    )


def test_without_a_recipe_nothing_is_masked(small_task):
    made = trainer(epochs=1)
    done = made.run()
    assert (len(done.masks), done.flops_multiplier, bool(done.removed), done.notes) == (0, 1.0, False, [])
    assert [(stage.number, stage.begin, stage.end, stage.sparsity) for stage in done.stages] == [(1, 0, 13, 0.0)]
    assert [(epoch.sparsity, epoch.dynamics) for epoch in done.history] == [(0.0, None)]


@pytest.mark.parametrize(("batch_size", "parts"), [(8, 2), (16, 3), (3, 5)])
def test_accumulated_gradients_are_those_of_the_whole_batch(batch_size, parts):
    """Also when parts differ in size, the last batch is smaller, and there are fewer examples than parts."""
    whole, cut = (regression_trainer(batch_size=batch_size, accumulate=n) for n in (1, parts))
    losses = [[epoch.train_loss for epoch in made.run().history] for made in (whole, cut)]
    torch.testing.assert_close(cut.model.weight, whole.model.weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(cut.model.bias, whole.model.bias, rtol=1e-12, atol=1e-14)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert whole.now.step == cut.now.step


def test_clipping_equals_clipping_by_hand():
    made = regression_trainer(clip_norm=0.5)
    *_, last = by_hand(made.training, clip_norm=0.5)
    made.run()
    torch.testing.assert_close(made.model.weight, last[0], rtol=1e-10, atol=1e-14)
    *_, unclipped = by_hand(made.training)
    assert not torch.allclose(last[0], unclipped[0], rtol=1e-3)


def test_the_moving_average_equals_one_by_hand_and_is_what_is_evaluated_and_left():
    made = regression_trainer(ema=0.9)
    steps = list(by_hand(made.training, ema=0.9))
    history = made.run().history
    torch.testing.assert_close(made.model.weight, steps[-1][2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(made.model.bias, steps[-1][3], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(steps[-1][2], steps[-1][0], rtol=1e-3)
    inputs, targets = made.data.test.tensors
    errors = [float((inputs @ steps[i][2].T + steps[i][3] - targets).square().mean()) for i in (4, 9, 14)]
    assert [epoch.metrics["error"] for epoch in history] == pytest.approx(errors, rel=1e-12)


def test_the_moving_average_of_a_model_that_is_pruned_is_masked_and_has_averaged_buffers():
    made = trainer("{sparsity: 0.75, allocation: global, schedule: {cubic: {every: 2 steps, end: 0.75 run}}}", epochs=2, ema=0.8)
    states = []
    done = made.run(progress=lambda *_: states.append(small.weights(made.model)))
    average = states[0]
    for state in states[1 : made.total_steps]:
        average = {name: 0.8 * average[name].double() + 0.2 * state[name].double() for name in state}
    for name, value in made.model.state_dict().items():
        if value.is_floating_point():  # the batch norm's running mean and variance too
            expected = average[name] * done.masks[name] if name in done.masks else average[name]
            torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=1e-7)
    assert done.masks.active == 132
    assert all((made.model.get_parameter(name)[~mask] == 0).all() for name, mask in done.masks.items())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_trains(precision):
    made, full = trainer(precision=precision), trainer()
    seen = set()
    made.model[5].register_forward_hook(lambda module, inputs, output: seen.add((module.training, output.dtype)))
    accuracy = made.run().history[-1].metrics["accuracy"]
    assert seen == {(True, getattr(torch, precision)), (False, torch.float32)}  # metrics are computed in full precision
    assert all(p.dtype == torch.float32 for p in made.model.parameters())
    expected = full.run().history[-1].metrics["accuracy"]
    assert accuracy > 0.9
    assert accuracy == pytest.approx(expected, abs=0.05)
    assert not torch.equal(made.model[0].weight, full.model[0].weight)


def test_clipping_sees_gradients_without_the_scale_of_the_loss():
    clipped, full = (trainer(precision=precision, clip_norm=0.1, model="plain") for precision in ("float16", "float32"))
    clipped.run()
    full.run()
    assert clipped.scaler.get_scale() > 1000
    torch.testing.assert_close(clipped.model[5].weight, full.model[5].weight, rtol=0.1, atol=0.02)


def test_augmentation_draws_from_a_generator_of_seed_and_step_alone():
    draws = []

    def augment(inputs, generator):
        draws.append(torch.rand(3, generator=generator).tolist())
        return inputs + 0.01 * torch.randn(inputs.shape, generator=generator)

    def run(noise, **settings):
        draws.clear()
        torch.manual_seed(noise)
        made = trainer(task=small.plane(augment=augment), **{"epochs": 2} | settings)
        made.run()
        return made, list(draws)

    first, all_draws = run(1)
    again, same = run(2)
    assert same == all_draws
    assert torch.equal(first.model[0].weight, again.model[0].weight)
    assert len({tuple(draw) for draw in all_draws}) == 26  # every step has its own
    assert run(1, epochs=3)[1][:26] == all_draws  # however long the run is
    assert run(1, learning_rate=0.01)[1] == all_draws
    assert run(1, seed=1)[1] != all_draws
    plain = trainer(epochs=2)
    plain.run()
    assert not torch.equal(first.model[0].weight, plain.model[0].weight)


def test_augmentation_touches_no_test_example():
    made = trainer(task=small.plane(augment=lambda inputs, generator: torch.zeros_like(inputs)), epochs=1, model="plain", weight_decay=0)
    before = made.model[0].weight.clone()
    accuracy = made.run().history[-1].metrics["accuracy"]
    assert torch.equal(made.model[0].weight, before)  # nothing was seen of the inputs
    outputs = made.model(made.data.test.tensors[0]).argmax(1)
    assert accuracy == int((outputs == made.data.test.tensors[1]).sum()) / 90
    assert 0 < len(outputs.unique()) <= 2


def test_dropout_depends_on_seed_and_step_and_the_random_state_of_the_process_stays():
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        made = trainer(model="dropout", epochs=1)
        made.run()
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(small.weights(made.model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_stops_the_training_at_its_step(precision):
    made = trainer(task=small.regression(), epochs=2, batch_size=8, precision=precision)
    made.data.train.tensors[0][17] = float("nan")
    numbers = TensorDataset(torch.arange(40))
    at = next(i for i, indices in enumerate(order(numbers, 0, 1).split(8)) if 17 in indices.tolist())
    with pytest.raises(NiwakiError, match=rf"^the loss became nan at step {at + 1} \(epoch 1\); a smaller learning rate may help$"):
        made.run()
    assert made.now.step == at
    assert all(torch.isfinite(p).all() for p in made.model.parameters())


def test_progress_hears_of_every_step_and_epoch():
    heard = []
    made = trainer(epochs=2, batch_size=100)
    made.run(progress=lambda step, total, epoch: heard.append((step, total, epoch and epoch.epoch)))
    assert heard == [(1, 4, None), (2, 4, 1), (3, 4, None), (4, 4, 2)]


def test_checkpoints_are_asked_for_after_every_step_or_at_the_end_alone():
    made, steps = trainer(epochs=1), []
    made.run(save=lambda state: steps.append(state()["counters"]["step"]), every=0)
    assert steps == [*range(1, 14), 13]
    made, steps = trainer(epochs=1), []
    made.run(save=lambda state: steps.append(state()["counters"]["step"]), every=1e9)
    assert steps == [13]


def test_wall_time_adds_up_over_sittings(tmp_path):
    made, done, sittings = small.in_sittings(lambda: trainer(epochs=1), tmp_path / "c", 3)
    assert sittings == 5
    whole = trainer(epochs=1)
    assert 0 < made.now.seconds == done.seconds < 60
    assert whole.run().seconds > 0


def test_the_learning_rate_falls_within_the_run():
    made, rates = trainer(epochs=2), []
    made.run(progress=lambda *_: rates.append(made.optimizer.param_groups[0]["lr"]))
    assert rates[0] == 0.1
    assert all(a > b for a, b in pairwise(rates))
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 26)) for step in range(26)], rel=1e-12)
