"""Random networks of supported layers, random units of random groups: the smaller network equals the masked one."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from structured.whole import check, masked, masks_of, randomized
from torch import Tensor, nn

from niwaki.dependency import find_groups
from niwaki.masks import Masks
from niwaki.structured import compose, replay, shrink

ACTIVATIONS = (F.relu, F.silu, torch.tanh, torch.sigmoid, F.elu)
STEPS = ("convolution", "norm", "activation", "residual", "concatenation", "depthwise", "gate", "pool", "grouped")


class Graph(nn.Module):
    """Images through steps of kinds that are drawn, then features through linear layers."""

    def __init__(self, steps: list[tuple[str, int]], flatten: bool, tied: bool = False) -> None:
        super().__init__()
        self.steps, self.flatten = steps, flatten
        self.parts = nn.ModuleList()
        width, size = 4, 10
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        for kind, number in steps:
            made, width, size = self._step(kind, number, width, size)
            self.parts.append(made)
        convolutions = [part for part in self.parts if isinstance(part, nn.Conv2d) and part.groups == 1]
        for one, other in pairwise(convolutions) if tied else ():
            if one.weight.shape == other.weight.shape:
                other.weight = one.weight
        self.hidden = nn.Linear(width * size * size if flatten else width, 5)
        self.head = nn.Linear(5, 3)

    @staticmethod
    def _step(kind: str, number: int, width: int, size: int) -> tuple[nn.Module, int, int]:
        if kind == "convolution":
            return nn.Conv2d(width, 4 + 2 * number, 3, padding=number % 2, bias=number != 3), 4 + 2 * number, size - 2 + 2 * (number % 2)
        if kind == "concatenation":
            return nn.Conv2d(width, 4, 1), width + 4, size
        made: dict[str, nn.Module] = {
            "norm": nn.BatchNorm2d(width) if number % 2 else nn.GroupNorm(2, width),
            "residual": nn.Sequential(nn.Conv2d(width, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, width, 1)),
            "depthwise": nn.Conv2d(width, width, 3, padding=1, groups=width),
            "gate": nn.Conv2d(width, width, 1),
            "grouped": nn.Conv2d(width, width, 1, groups=2),
        }
        return made.get(kind, nn.Identity()), width, max(size // 2, 1) if kind == "pool" else size

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for (kind, number), part in zip(self.steps, self.parts, strict=True):
            if kind == "activation":
                x = ACTIVATIONS[number](x)
            elif kind == "residual":
                x = x + part(x)
            elif kind == "concatenation":
                x = torch.cat([x, part(x)], dim=1)
            elif kind == "gate":
                x = x * torch.sigmoid(part(x.mean((2, 3), keepdim=True)))
            elif kind == "pool":
                x = F.max_pool2d(x, 2) if number % 2 and x.shape[-1] > 1 else F.adaptive_avg_pool2d(x, max(x.shape[-1] // 2, 1))
            else:
                x = part(x)
        x = x.flatten(1) if self.flatten else x.mean((2, 3))
        return self.head(torch.tanh(self.hidden(x)))


steps = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 4)), max_size=6).filter(
    lambda drawn: sum(kind == "convolution" and number % 2 == 0 for kind, number in drawn) <= 2 and sum(k == "pool" for k, _ in drawn) <= 1
)


@settings(max_examples=40, deadline=None)
@given(steps, st.booleans(), st.floats(0.1, 0.9), st.integers(0, 1000))
def test_random_units_of_random_networks(drawn, flatten, share, seed):
    model = randomized(Graph(drawn, flatten, tied=bool(seed % 2)), seed)
    example, other = torch.randn(1, 2, 10, 10, dtype=torch.float64), torch.randn(3, 2, 10, 10, dtype=torch.float64)
    masks = masks_of(model, find_groups(model, (example,)), ("channel", "channel_group"), share, seed)
    smaller = check(model, masks, (example,), (other,))
    if masks.sparsity:
        assert smaller.removed


@settings(max_examples=30, deadline=None)
@given(steps, st.booleans(), st.floats(0.3, 0.99), st.integers(0, 1000))
def test_random_weights_of_random_networks(drawn, flatten, sparsity, seed):
    """Masks that follow no plan, of weights, scales and biases: whatever goes, the outputs stay."""
    model = randomized(Graph(drawn, flatten), seed)
    generator = torch.Generator().manual_seed(seed)
    kept = {name: torch.rand(p.shape, generator=generator) > sparsity for name, p in model.named_parameters()}
    masks = Masks({name: keep for name, keep in kept.items() if not name.endswith("bias") or seed % 2})
    example, other = torch.randn(1, 2, 10, 10, dtype=torch.float64), torch.randn(3, 2, 10, 10, dtype=torch.float64)
    check(model, masks, (example,), (other,))


@settings(max_examples=15, deadline=None)
@given(steps, st.booleans(), st.floats(0.2, 0.6), st.integers(0, 1000))
def test_random_networks_shrink_in_place_twice_while_they_are_trained(drawn, flatten, share, seed):
    """Some units masked as a whole, some in part; two removals, with training before and between, equal masked training."""
    model = randomized(Graph(drawn, flatten, tied=bool(seed % 2)), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    example, x = (torch.randn(batch, 2, 10, 10, dtype=torch.float64, generator=generator) for batch in (1, 3))
    fresh, whole = copy.deepcopy(model), copy.deepcopy(model)
    groups = find_groups(model, (example,))
    first = masks_of(model, groups, ("channel", "channel_group"), share, seed)
    first = Masks({name: mask & (torch.rand(mask.shape, generator=generator) > 0.1) for name, mask in first.items()})
    second = masks_of(model, groups, ("channel",), share, seed + 1)
    second = Masks({name: mask & first[name] for name, mask in second.items()})

    def train(model, optimizer, masks):
        masks.apply_(model)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            for name, parameter in model.named_parameters():
                parameter.grad[~masks[name]] = 0.0
            optimizer.step()

    both = [torch.optim.SGD(one.parameters(), lr=0.01, momentum=0.9) for one in (model, whole)]
    train(model, both[0], first)
    train(whole, both[1], first)
    smaller = shrink(model, first, (example,), optimizer=both[0], in_place=True)
    assert smaller.model is model
    removed = smaller.removed
    torch.testing.assert_close(model(x), masked(whole, first)(x), rtol=1e-9, atol=1e-9)
    left = {name: removed_from(second[name], removed.tensors.get(name, {})) for name, _ in model.named_parameters()}
    torch.testing.assert_close(masked(model, Masks(left))(x), masked(whole, second)(x), rtol=1e-9, atol=1e-9)
    again = shrink(model, Masks(left), (example,), optimizer=both[0], in_place=True)
    second.apply_(whole)
    torch.testing.assert_close(model(x), whole(x), rtol=1e-9, atol=1e-9)
    for parameter, slots in both[0].state.items():
        assert slots["momentum_buffer"].shape == parameter.shape
    replay(fresh, compose(removed, again.removed))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert len(list(fresh.parameters())) == len(list(whole.parameters()))


def removed_from(mask, cuts):
    for dim, kept in cuts.items():
        mask = mask.index_select(int(dim), torch.tensor(kept))
    return mask
