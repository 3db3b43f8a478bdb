"""What statistics take is known before anything is collected, and more than is allowed is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import niwaki
from niwaki.dry_run import statistics_bytes
from niwaki.pruning import pruned
from niwaki.recipe import Prune, Recipe

EVERYTHING = {"weights": {"include": ["*"]}}
WEIGHTS = 8 * 12 + 12 * 3
GRADIENTS = {"woodfisher": {"gradients": 10}}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 8, generator=generator), torch.arange(16) % 3) for _ in range(2)]


loss = nn.functional.cross_entropy


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({"saliency": "magnitude"}, 0),
        ({"saliency": "snip"}, 0),  # the gradients themselves are no statistic
        ({"saliency": GRADIENTS}, 10 * WEIGHTS * 4),
        ({"saliency": {"obd": {"estimate": "fisher"}}}, WEIGHTS * 8),
        ({"saliency": "wanda"}, (8 + 12) * 8),
        ({"saliency": "sparsegpt"}, 2 * (8 * 8 + 12 * 12) * 8),
        # What several components ask for counts once; what they ask for apart adds up.
        ({"saliency": "l_obs", "compensation": "least_squares"}, 2 * (8 * 8 + 12 * 12) * 8),
        ({"saliency": GRADIENTS, "compensation": "least_squares"}, 10 * WEIGHTS * 4 + 2 * (8 * 8 + 12 * 12) * 8),
        ({"saliency": GRADIENTS, "target": {"weights": {"include": ["0.weight"]}}}, 10 * 8 * 12 * 4),
    ],
)
def test_bytes_are_those_of_the_numbers_that_are_kept(fields, needed):
    asked, model = {"target": EVERYTHING, **fields}, network()
    recipe = Recipe(**{"sparsity": 0.5, **asked})
    assert statistics_bytes(model, recipe) == needed
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), network().parameters(), strict=True))
    assert statistics_bytes(model, Prune(**{"fraction": 0.5, **asked})) == needed
    assert niwaki.Sparsifier(model, recipe, data=batches(), loss=loss, total_steps=1).statistics_bytes == needed


def test_units_are_found_with_an_example():
    recipe = Recipe(sparsity=0.5, granularity="channel", target=EVERYTHING, saliency={"taylor": {}}, compensation="least_squares")
    readers = 2 * 12 * 12 * 8  # the second layer's inputs make up for units of the first
    assert statistics_bytes(network(), recipe, example=(torch.zeros(1, 8),)) == readers
    with pytest.raises(niwaki.InputError, match="example="):
        statistics_bytes(network(), recipe)


def test_more_than_allowed_is_refused_before_anything_is_collected():
    recipe, needed = Recipe(sparsity=0.5, target=EVERYTHING, saliency=GRADIENTS), 10 * WEIGHTS * 4
    assert statistics_bytes(network(), recipe, memory=needed) == needed

    def unread():
        raise AssertionError("data were read")
        yield

    says = r"^memory: the statistics need 5\.28 kB, 5\.28 kB of it for GradientBank, and 5\.28 kB are allowed; gradients: 9 would fit$"
    for ask in (
        lambda: statistics_bytes(network(), recipe, memory=needed - 1),
        lambda: niwaki.Sparsifier(network(), recipe, data=unread(), loss=loss, total_steps=1, memory=needed - 1),
        lambda: pruned(network(), Prune(fraction=0.5, target=EVERYTHING, saliency=GRADIENTS), data=unread(), loss=loss, memory=needed - 1),
    ):
        with pytest.raises(niwaki.InputError, match=says):
            ask()
    kept = pruned(network(), Prune(fraction=0.5, target=EVERYTHING, saliency=GRADIENTS), data=batches(), loss=loss, memory=needed)
    assert kept.masks.active == WEIGHTS // 2


def test_what_steps_add_up_to_and_what_data_tell_share_the_memory():
    later = {"one_shot": {"at": "4 steps"}}
    recipe = Recipe(sparsity=0.5, target=EVERYTHING, saliency="accumulated_movement", compensation="least_squares", schedule=later)
    steps, data = WEIGHTS * 8, 2 * (8 * 8 + 12 * 12) * 8
    needed = statistics_bytes(network(), recipe)
    assert needed == steps + data
    niwaki.Sparsifier(network(), recipe, data=batches(), loss=loss, total_steps=8, memory=needed)
    with pytest.raises(niwaki.InputError, match=r"memory: the statistics need .* of it for InputGram"):
        niwaki.Sparsifier(network(), recipe, data=batches(), loss=loss, total_steps=8, memory=needed - 1)
