import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset

from niwaki.errors import NiwakiError
from niwaki.tasks import Data, Metric, Model, Task, Training
from niwaki.training.loop import batches, evaluate, fit, learning_rate_factor, make_optimizer, steps_per_epoch


def test_the_cosine_is_torchs():
    training = Training(epochs=1, batch_size=1, learning_rate=0.3)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert 0.3 * learning_rate_factor(training, step, 50) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_the_warm_up_rises_evenly_to_the_peak():
    training = Training(epochs=1, batch_size=1, warmup=0.1)
    assert [learning_rate_factor(training, step, 40) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert learning_rate_factor(training, 22, 40) == pytest.approx(0.5)  # half of the 36 steps after it
    constant = Training(epochs=1, batch_size=1, warmup=0.1, learning_rate_schedule="constant")
    assert {learning_rate_factor(constant, step, 40) for step in range(4, 40)} == {1.0}


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch():
    examples = TensorDataset(torch.arange(23), torch.arange(23) * 10)

    def order(seed: int, epoch: int) -> list[int]:
        found = list(batches(examples, 5, seed, epoch))
        assert [len(inputs) for inputs, _ in found] == [5, 5, 5, 5, 3]
        assert all(torch.equal(inputs * 10, targets) for inputs, targets in found)
        return torch.cat([inputs for inputs, _ in found]).tolist()

    assert sorted(order(0, 1)) == list(range(23))
    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4
    torch.manual_seed(5)
    first = order(0, 1)
    torch.manual_seed(6)
    assert order(0, 1) == first


def test_evaluation_is_the_mean_over_all_examples_however_they_are_batched(small_task):
    inputs = torch.randn(1300, 6, generator=torch.Generator().manual_seed(2))  # three batches, the last one smaller
    examples = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    model = small_task.build("small", 0).train()
    model[2].eval()
    found = evaluate(model, small_task, examples)
    assert model.training
    assert not model[2].training
    model.eval()
    right = sum(int(model(inputs[i : i + 1]).argmax()) == int(inputs[i, 0] > 0) for i in range(1300))
    assert found == {"accuracy": right / 1300}


def test_training_equals_a_loop_written_by_hand():
    task = _regression()
    data = task.data()
    training = Training(epochs=3, batch_size=8, learning_rate=0.05, momentum=0.8, weight_decay=0.01, warmup=0.2)
    model = task.build("linear", 0)
    weight, bias = (p.detach().clone().double() for p in model.parameters())
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    history = fit(model, task, data, training, seed=3)

    total, step, losses = 3 * 5, 0, []
    for epoch in (1, 2, 3):
        epoch_losses = []
        for inputs, targets in batches(data.train, 8, 3, epoch):
            inputs, targets = inputs.double(), targets.double()
            error = inputs @ weight.T + bias - targets
            epoch_losses.append((error**2).mean().item())
            rate = 0.05 * ((step + 1) / 4 if step < 3 else (1 + math.cos(math.pi * (step - 3) / (total - 3))) / 2)
            for parameter, gradient, speed in zip(
                (weight, bias), (2 * error.T @ inputs / len(inputs), 2 * error.mean(0)), velocity, strict=True
            ):
                speed.mul_(0.8).add_(gradient + 0.01 * parameter)
                parameter.sub_(rate * speed)
            step += 1
        losses.append(sum(epoch_losses) / 5)
    torch.testing.assert_close(model.weight.double(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.bias.double(), bias, rtol=1e-4, atol=1e-6)
    assert [epoch.train_loss for epoch in history] == pytest.approx(losses, rel=1e-4)
    assert [(epoch.epoch, epoch.step) for epoch in history] == [(1, 5), (2, 10), (3, 15)]
    assert steps_per_epoch(data, training) == 5


def test_adamw_is_torchs():
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, Training(epochs=1, batch_size=1, optimizer="adamw", learning_rate=0.01, weight_decay=0.1))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.01, 0.1)


def test_a_loss_that_is_not_finite_stops_the_training():
    task = _regression()
    with pytest.raises(NiwakiError, match=r"the loss became (nan|inf) in epoch"):
        fit(task.build("linear", 0), task, task.data(), Training(epochs=50, batch_size=8, learning_rate=1e6), seed=0)


def test_the_random_state_of_the_process_stays(small_task):
    before = torch.random.get_rng_state()
    fit(small_task.build("small", 0), small_task, small_task.data(), Training(epochs=1, batch_size=50), seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_progress_hears_of_every_step_and_epoch(small_task):
    heard: list[tuple[int, int, bool]] = []
    training = Training(epochs=2, batch_size=100)
    fit(
        small_task.build("small", 0),
        small_task,
        small_task.data(),
        training,
        0,
        progress=lambda s, n, e: heard.append((s, n, e is not None)),
    )
    assert heard == [(1, 4, False), (2, 4, False), (2, 4, True), (3, 4, False), (4, 4, False), (4, 4, True)]


def _regression() -> Task:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 3, generator=generator)
    examples = TensorDataset(inputs, inputs @ torch.tensor([[1.0], [2.0], [-1.0]]))
    return Task(
        name="regression",
        models={"linear": Model(lambda: nn.Linear(3, 1), Training(epochs=1, batch_size=8))},
        data=lambda: Data(examples, examples),
        loss=nn.functional.mse_loss,
        metrics={"error": Metric(lambda outputs, targets: (outputs - targets).square().mean(1), "mean squared error", False, False)},
    )
