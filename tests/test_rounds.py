"""One-shot pruning in rounds: every round scores anew what the one before has left."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import niwaki
from niwaki.schedule import OneShot
from niwaki.selection import kept

EVERYTHING = {"weights": {"include": ["*"]}}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5, bias=False)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(4)
    return [(torch.randn(16, 6, dtype=torch.float64), torch.randint(5, (16,))) for _ in range(3)]


def snip_in_rounds(sparsity: float, rounds: int, revive: bool) -> dict[str, Tensor]:
    """Iterative SNIP and FORCE, written out with explicit masks."""
    model, data = network(), batches()
    weights = [model[0].weight, model[2].weight]
    dense = [weight.detach().clone() for weight in weights]
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    total = sum(mask.numel() for mask in masks)
    for r in range(1, rounds + 1):
        model.zero_grad()
        sum(nn.functional.cross_entropy(model(inputs), targets) for inputs, targets in data).backward()
        scores = torch.cat([(d * w.grad).abs().flatten() for d, w in zip(dense, weights, strict=True)])
        if not revive:
            scores[~torch.cat([mask.flatten() for mask in masks])] = -1
        keep = torch.zeros(total, dtype=torch.bool)
        keep[scores.argsort(descending=True)[: kept(1 - (1 - sparsity) ** (r / rounds), total)]] = True
        masks = [part.view(w.shape) for part, w in zip(keep.split([m.numel() for m in masks]), weights, strict=True)]
        with torch.no_grad():
            for weight, whole, mask in zip(weights, dense, masks, strict=True):
                weight.copy_(whole.masked_fill(~mask, 0.0))
    return {"0.weight": masks[0], "2.weight": masks[1]}


@pytest.mark.parametrize("revive", [False, True])
@pytest.mark.parametrize("rounds", [2, 7])
def test_snip_in_rounds_is_the_loop_that_the_papers_describe(rounds: int, revive: bool) -> None:
    recipe = niwaki.Recipe(
        sparsity=0.8,
        target=EVERYTHING,
        saliency="snip",
        allocation="global",
        schedule=OneShot(rounds=rounds, revive=revive),
    )
    sparsifier = niwaki.Sparsifier(network(), recipe, total_steps=1, data=batches(), loss=nn.functional.cross_entropy)
    expected = snip_in_rounds(0.8, rounds, revive)
    assert all(torch.equal(sparsifier.masks[name], mask) for name, mask in expected.items())


def test_a_revived_weight_has_the_value_that_it_had() -> None:
    model, before = network(), network()
    recipe = niwaki.Recipe(sparsity=0.8, target=EVERYTHING, saliency="snip", allocation="global", schedule=OneShot(rounds=7, revive=True))
    masks = niwaki.Sparsifier(model, recipe, total_steps=1, data=batches(), loss=nn.functional.cross_entropy).masks
    assert torch.equal(model[0].weight, before[0].weight * masks["0.weight"])


def test_rounds_are_spaced_as_asked() -> None:
    assert OneShot(rounds=4, spacing="linear").sparsities(0.8) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    shares = OneShot(rounds=100).sparsities(0.9)
    left = [1 - s for s in shares]
    assert left[-1] == pytest.approx(0.1)
    assert [b / a for a, b in pairwise(left)] == pytest.approx([0.1**0.01] * 99)


def test_bad_rounds_are_refused() -> None:
    with pytest.raises(niwaki.InputError, match="revive: there is nothing to take back in a single round"):
        niwaki.Recipe(sparsity=0.5, saliency="snip", schedule={"one_shot": {"revive": True}})
    model = network()
    recipe = niwaki.Recipe(sparsity=0.5, target=EVERYTHING, saliency="snip", schedule=OneShot(rounds=3))
    with pytest.warns(UserWarning, match="the first mask is chosen at the first step"):
        sparsifier = niwaki.Sparsifier(model, recipe, total_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    model(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    with pytest.raises(niwaki.InputError, match="3 rounds collect gradients anew in each, so they need data= and loss="):
        optimizer.step()
