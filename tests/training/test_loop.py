"""The parts of a training step that are plain torch, against torch's own and against loops written out."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset
from training import small

from niwaki.tasks import Data, Training
from niwaki.training.loop import Batches, batches, evaluate, hold_out, learning_rate_factor, make_optimizer, steps_per_epoch, targets


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


def test_examples_that_are_held_out_are_a_share_of_the_training_ones():
    data = Data(TensorDataset(torch.arange(23), torch.arange(23) * 10), TensorDataset(torch.arange(3), torch.arange(3)))
    found = {}
    for seed in range(40):
        split = hold_out(data, 0.1, seed)
        assert split.test is data.test
        rest, held = (examples[torch.arange(len(examples))][0].tolist() for examples in (split.train, split.validation))
        assert len(held) == 2
        assert rest == sorted(set(range(23)) - set(held))
        _, targets = split.train[torch.tensor([3, 0])]
        assert targets.tolist() == [10 * rest[3], 10 * rest[0]]
        found[seed] = tuple(held)
    assert len(set(found.values())) > 30
    assert {one for held in found.values() for one in held} == set(range(23))
    assert hold_out(data, 0.1, 7).validation.indices.tolist() == list(found[7])
    assert len(hold_out(data, 0.01, 0).validation) == 1
    seen = [inputs.tolist() for inputs, _ in Batches(data.train, 10, torch.device("cpu"))]
    assert seen == [list(range(10)), list(range(10, 20)), [20, 21, 22]]


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


def test_the_last_batch_may_be_smaller_and_is_a_step():
    data = small.plane().data(None)
    assert [steps_per_epoch(data, Training(epochs=1, batch_size=size)) for size in (1, 16, 100, 199, 200)] == [200, 13, 2, 2, 1]


def test_evaluation_is_the_mean_over_all_examples_however_they_are_batched(small_task):
    inputs = torch.randn(1300, 6, generator=torch.Generator().manual_seed(2))  # three batches, the last one smaller
    examples = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    model = small_task.build("small", small_task.data(None), 0).train()
    model[2].eval()
    found = evaluate(model, small_task, examples, classes=True)
    assert model.training
    assert not model[2].training
    model.eval()
    one_by_one = torch.tensor([int(model(inputs[i : i + 1]).argmax()) for i in range(1300)])
    assert found.metrics == {"accuracy": int((one_by_one == (inputs[:, 0] > 0)).sum()) / 1300}
    assert torch.equal(found.classes, one_by_one)
    assert evaluate(model, small_task, examples).classes is None


def test_the_optimizers_are_torchs():
    model = nn.Linear(2, 2)
    adamw = make_optimizer(model, Training(epochs=1, batch_size=1, optimizer="adamw", learning_rate=0.01, weight_decay=0.1))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (0.01, 0.1)
    sgd = make_optimizer(model, Training(epochs=1, batch_size=1, learning_rate=0.02, momentum=0.7, weight_decay=0.3))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.02, 0.7, 0.3)


def test_targets_come_from_tensors_and_from_batches():
    class Squares:
        def __len__(self) -> int:
            return 5000

        def __getitem__(self, indices):
            return indices, indices * indices

    assert torch.equal(targets(Squares()), torch.arange(5000) ** 2)
    assert torch.equal(targets(TensorDataset(torch.zeros(3), torch.tensor([3, 1, 2]))), torch.tensor([3, 1, 2]))
