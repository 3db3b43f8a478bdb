"""Masks of several tasks over one random network: which of them an input belongs to."""

import copy

import pytest
import torch
from support import recipe
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.errors import InputError
from niwaki.superposition import infer_task

TASKS = 5
EDGE_POPUP = (
    "target: {weights: {include: ['*.weight']}}\nsparsity: 0.5\nsaliency: score\ngradient: frozen\nschedule: {constant: {every: 1 steps}}\n"
    "relaxation: {straight_through: {scores: uniform, learning_rate: 0.1}}"
)


def examples(task: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four clusters, whose coordinates each task permutes in its own way."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2.0 * torch.randn(4, 32, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(4, (count,), generator=generator)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(task))
    return (centres[labels] + torch.randn(count, 32, generator=generator))[:, order], labels


@pytest.fixture(scope="module")
def superposed() -> tuple[nn.Module, list[niwaki.Masks]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 400, bias=False), nn.ReLU(), nn.Linear(400, 4, bias=False))
    masks = []
    for task in range(TASKS):
        model = copy.deepcopy(network)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier = niwaki.Sparsifier(model, recipe(EDGE_POPUP), total_steps=60, seed=task).attach(optimizer)
        for step in range(60):
            inputs, labels = examples(task, 64, 1000 * task + step)
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        masks.append(sparsifier.finalize().masks)
        inputs, labels = examples(task, 256, 7)
        assert float((model(inputs).argmax(1) == labels).double().mean()) > 0.9
    return network, masks


@pytest.mark.parametrize("halving", [False, True])
def test_each_tasks_inputs_find_their_own_mask(superposed, halving):
    network, masks = superposed
    before = copy.deepcopy(network.state_dict())
    found = [infer_task(network, masks, examples(task, 128, 8)[0], halving=halving) for task in range(TASKS)]
    assert sum(i == task for task, i in enumerate(found)) >= TASKS - 1  # by chance one of five
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))


def test_the_slopes_are_those_of_finite_differences(superposed):
    network, masks = superposed
    network = copy.deepcopy(network).double()
    inputs = examples(1, 16, 3)[0].double()

    def entropy(shares):
        model = copy.deepcopy(network)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(sum(share * mask[name].double() for share, mask in zip(shares, masks, strict=True)))
        p = torch.softmax(model(inputs), dim=-1)
        return -(p * p.log()).sum(dim=-1).mean().item()

    slopes = []
    for i in range(TASKS):
        ends = [[1.0 / TASKS + (h if j == i else 0.0) for j in range(TASKS)] for h in (1e-5, -1e-5)]
        slopes.append((entropy(ends[0]) - entropy(ends[1])) / 2e-5)
    assert infer_task(network, masks, inputs) == slopes.index(min(slopes))


def test_masks_of_other_parameters_are_refused():
    model = nn.Linear(2, 2)
    mask = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(InputError, match="no masks"):
        infer_task(model, [], torch.ones(1, 2))
    with pytest.raises(InputError, match="other is not"):
        infer_task(model, [niwaki.Masks({"weight": mask}), niwaki.Masks({"other": mask})], torch.ones(1, 2))
    with pytest.raises(InputError, match="weight is not"):
        infer_task(model, [niwaki.Masks({"weight": mask[:1]})] * 2, torch.ones(1, 2))


def test_a_normalization_in_training_mode_is_not_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = [niwaki.Masks({"0.weight": torch.rand(4, 4, generator=torch.Generator().manual_seed(i)) > 0.5}) for i in range(3)]
    infer_task(model, masks, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), halving=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
