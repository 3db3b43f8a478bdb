"""Every saliency with every granularity of units, allocation, normalization and schedule: it works, or says in one line why not."""

import copy
import itertools
import warnings

import pytest
import torch
from support import batch, pruned_are_zero
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.component import REGISTRY
from niwaki.dependency import find_groups
from niwaki.errors import InputError
from niwaki.recipe import Recipe


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.second = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x):
        return x + self.second(torch.relu(self.norm(self.first(x))))


class Model(nn.Module):
    """A residual convolutional network whose positions then attend to each other with three heads of width 2."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(1, 4, 3, stride=4), nn.Sequential(*(Block(4, inner) for inner in (5, 6, 7)))
        self.q, self.k, self.v = (nn.Linear(4, 6) for _ in range(3))
        self.o, self.head = nn.Linear(6, 4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x)).flatten(2).transpose(1, 2)
        q, k, v = (layer(x).unflatten(-1, (3, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model()


MODEL = model()
GROUPS = find_groups(MODEL, (torch.zeros(2, 1, 8, 8),), layers=True)
TARGETS = [group for group in GROUPS.removable if not any((m.name, m.dim) == ("stem.weight", 0) for m in group.members)]
BUFFERS = {name for name, _ in MODEL.named_buffers()}
DATA = [batch(100 + step, size=4) for step in range(2)]
STEPS = 4

UNITS = {"channel": ("channel",), "head": ("head",), "layer": ("layer",), "group": ("channel", "head")}
ALLOCATIONS = ("uniform", "global", "erdos_renyi", "erdos_renyi_kernel")
EVERY_STEP = {"every": "1 steps", "end": "1 run"}
SCHEDULES = {
    "one_shot": {"at": "0.5 run"},
    "iterative": {"rounds": 2, "begin": "0.25 run", "end": "1 run"},
    "constant": {"every": "2 steps"},
    "phases": {"dense": [], "sparse": [1, 3], "unit": "steps"},
    "list": {"sparsity": [0.2, 0.5], "every": "2 steps"},
    "linear": EVERY_STEP,
    "cubic": EVERY_STEP,
    "exponential": EVERY_STEP,
    "cosine": EVERY_STEP,
    "mask_stability": {**EVERY_STEP, "window": 2},
}
NO_NORMS = "saliency: 'norm_scale' scores scales of a normalization, and group q"
REFUSED = {
    ("similarity", "layer"): "saliency: 'similarity' compares the units of one tensor, and a tensor belongs to one layer",
    ("norm_scale", "head"): NO_NORMS,
    ("norm_scale", "group"): NO_NORMS,
}
SALIENCIES = sorted({cls.name for cls in REGISTRY["saliency"].values()})
CASES = list(itertools.product(SALIENCIES, UNITS))


def test_nothing_is_forgotten():
    assert set(SCHEDULES) == {cls.name for cls in REGISTRY["schedule"].values()}
    assert set(REGISTRY["allocation"]) == {*ALLOCATIONS, "explicit"}
    assert {group.kind for group in GROUPS.removable} >= {kind for kinds in UNITS.values() for kind in kinds}


def fit(net, schedule, **slots):
    said = Recipe(sparsity=0.5, schedule=schedule, relaxation="straight_through" if slots["saliency"] == "score" else "hard", **slots)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return niwaki.Sparsifier(
            net, said, groups=GROUPS, total_steps=STEPS, steps_per_epoch=STEPS, data=DATA, loss=functional.cross_entropy
        )


def check(net, masks, granularity, exact=True):
    """The number of units, the same ones in all members of a group, zeros where they are gone, and nothing masked besides."""
    groups = [group for group in TARGETS if group.kind in UNITS[granularity]]
    assert {member.name for group in groups for member in group.members} - BUFFERS == masks.keys()
    kept = []
    for group in groups:
        units = set()
        for member in group.members:
            if member.role == "output":
                rows = masks[member.name].movedim(member.dim, 0).flatten(1).any(1)
                units |= {unit for unit, on in zip(member.units.tolist(), rows.tolist(), strict=True) if on and unit >= 0}
        kept.append(units)
        assert units, group.name
    expected = {name: torch.ones_like(mask) for name, mask in masks.items()}
    for group, units in zip(groups, kept, strict=True):
        for member in group.members:
            for entry, unit in enumerate(member.units.tolist()):
                if member.name in expected and unit >= 0 and unit not in units:
                    expected[member.name].select(member.dim, entry).fill_(False)
    assert masks == niwaki.Masks(expected)
    assert pruned_are_zero(net, masks)
    if exact:
        assert sum(map(len, kept)) == round(0.5 * sum(group.size for group in groups))


@pytest.mark.parametrize(("saliency", "granularity"), CASES)
def test_every_allocation_and_normalization(saliency, granularity):
    schedule = {"constant": {"every": "1 steps"}} if saliency == "score" else "one_shot"
    pairs = list(itertools.product(ALLOCATIONS, REGISTRY["normalization"]))
    if granularity in ("head", "layer"):  # of one group, where no allocation has a choice
        pairs = pairs[:: len(ALLOCATIONS)]
    elif (saliency, "group") not in REFUSED:  # channels alone, or with heads: every pair meets one of the two
        pairs = pairs[granularity == "group" :: 2]
    for allocation, normalization in pairs:
        net = copy.deepcopy(MODEL)
        slots = {"granularity": granularity, "saliency": saliency, "allocation": allocation, "normalization": normalization}
        said = REFUSED.get((saliency, granularity))
        if said is None:
            check(net, fit(net, schedule, **slots).masks, granularity)
        else:
            with pytest.raises(InputError, match=said):
                fit(net, schedule, **slots)


@pytest.mark.parametrize(("saliency", "granularity"), [case for case in CASES if case not in REFUSED])
def test_every_schedule(saliency, granularity):
    others = itertools.cycle(itertools.product(ALLOCATIONS, ("none", "layer_l2", "rank")))  # 12 pairs, 10 schedules
    cases = list(zip(SCHEDULES.items(), others, strict=False))
    if (saliency, "group") not in REFUSED:  # every schedule meets two of the four granularities
        cases = cases[granularity in ("head", "group") :: 2]
    for (name, times), (allocation, normalization) in cases:
        net = copy.deepcopy(MODEL)
        slots = {"granularity": granularity, "saliency": saliency, "allocation": allocation, "normalization": normalization}
        sparsifier = fit(net, {name: times}, **slots)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        sparsifier.attach(optimizer)
        changes = []
        sparsifier.on_masks_changed(changes.append)
        for step in range(STEPS):
            images, labels = batch(step, size=4)
            optimizer.zero_grad()
            functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            if changes and step == 2:
                check(net, sparsifier.masks, granularity, exact=False)
        check(net, sparsifier.finalize().masks, granularity)
        assert all(p.isfinite().all() for p in net.parameters())
