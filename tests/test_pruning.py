"""Pruning a fraction of what is active."""

import pytest
import torch
from support import TARGET_ELEMENTS, TARGETS, batch, net, pruned_are_zero
from torch.nn import functional

from niwaki.errors import InputError
from niwaki.masks import Masks
from niwaki.pruning import pruned
from niwaki.recipe import Prune


def prune_masks(*arguments, **options):
    return pruned(*arguments, **options).masks


def flat(tensors):
    return torch.cat([tensors[name].detach().flatten() for name in TARGETS])


@pytest.mark.parametrize("allocation", ["global", "uniform", "erdos_renyi_kernel"])
def test_rounds_keep_the_exact_sequence_and_only_remove(allocation):
    model, masks = net(), None
    active = TARGET_ELEMENTS
    for step in range(12):
        before = masks
        masks = prune_masks(model, Prune(fraction=0.2, allocation=allocation), masks, step=step)
        active = round((1 - 0.2) * active)
        assert masks.active == active
        assert before is None or (masks - before).active == 0
        assert pruned_are_zero(model, masks)


def test_a_global_round_keeps_the_largest_of_the_active_weights():
    """Against a plain sort; weights that came back between rounds (a rewound ticket) are ranked by what they are now."""
    model = net()
    masks = prune_masks(model, Prune(fraction=0.5, allocation="global"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    magnitudes = torch.where(flat(masks), flat(dict(model.named_parameters())).abs(), -1.0)
    expected = torch.zeros(TARGET_ELEMENTS, dtype=torch.bool)
    expected[magnitudes.topk(round(0.7 * masks.active)).indices] = True
    assert torch.equal(flat(prune_masks(model, Prune(fraction=0.3, allocation="global"), masks)), expected)


def test_a_uniform_round_takes_the_same_share_of_every_tensor():
    masks = prune_masks(net(), Prune(fraction=0.25))
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"conv2.weight": 216, "fc1.weight": 2304, "fc2.weight": 288}


def test_other_tensors_keep_their_masks():
    model = net()
    head = torch.rand(model.head.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    masks = prune_masks(model, Prune(fraction=0.5, target={"weights": {"include": ["fc*"]}}), Masks({"head.weight": head}))
    assert torch.equal(masks["head.weight"], head)
    assert set(masks) == {"fc1.weight", "fc2.weight", "head.weight"}
    assert masks["fc1.weight"].sum() + masks["fc2.weight"].sum() == (24 * 128 + 16 * 24) // 2
    assert pruned_are_zero(model, masks)
    assert model.conv2.weight.all()


def test_whole_channels_are_counted_as_pieces():
    model = net()
    masks = prune_masks(model, Prune(fraction=0.25, granularity="input_channel", target={"weights": {"include": ["fc*"]}}))
    masks = prune_masks(model, Prune(fraction=0.5, granularity="input_channel", target={"weights": {"include": ["fc*"]}}), masks)
    columns = [masks[name].any(dim=0) for name in ("fc1.weight", "fc2.weight")]
    assert sum(int(c.sum()) for c in columns) == round(0.5 * round(0.75 * (128 + 24)))
    assert all(torch.equal(masks[n], c.expand_as(masks[n])) for n, c in zip(("fc1.weight", "fc2.weight"), columns, strict=True))


def test_random_rounds_differ_by_seed_and_step():
    prune = Prune(fraction=0.5, saliency="random")
    drawn = [prune_masks(net(), prune, seed=seed, step=step) for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert drawn[0] == drawn[3]
    assert all(0.2 < drawn[0].iou(other) < 0.5 for other in drawn[1:3])  # 1/3 for independent ones


def test_scores_from_gradients():
    model = net()
    images, labels = batch(0)
    weights = [dict(model.named_parameters())[name] for name in TARGETS]
    loss = functional.cross_entropy(model.eval()(images), labels)
    scores = torch.cat([(w * g).abs().flatten() for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)]).detach()
    prune = Prune(fraction=0.75, saliency="snip", allocation="global")
    with pytest.raises(InputError, match=r"^prune\.saliency: 'snip' needs data= and loss=$"):
        prune_masks(model, prune)
    masks = prune_masks(model, prune, data=[(images, labels)], loss=functional.cross_entropy)
    kept = flat(masks)
    assert scores[kept].min() >= scores[~kept].max()


def test_the_last_piece_of_every_tensor_stays():
    model, masks = net(), None
    for step in range(40):
        masks = prune_masks(model, Prune(fraction=0.7, allocation="uniform"), masks, step=step)
    assert [int(mask.sum()) for mask in masks.values()] == [1, 1, 1]


def test_a_tensor_that_was_emptied_before_stays_so():
    given = Masks({"fc1.weight": torch.zeros(24, 128, dtype=torch.bool)})
    masks = prune_masks(net(), Prune(fraction=0.5, allocation="global"), given)
    assert masks["fc1.weight"].sum() == 0
    assert masks.active == round(0.5 * (TARGET_ELEMENTS - 24 * 128))
