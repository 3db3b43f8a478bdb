"""Every saliency with every granularity of units, allocation, normalization and schedule: it works, or says in one line why not."""

import copy
import itertools
import warnings
from contextlib import nullcontext

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

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # notes of guards and of matrices that are damped


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
ALLOCATIONS = (
    "uniform",
    "global",
    "erdos_renyi",
    "erdos_renyi_kernel",
    "smart_ratio",
    "uniform_plus",
    "error_bound",
    "outlier_weighted",
    "dynamic_programming",
    "pfa",
)
"""Those that every saliency and schedule meets; each of the others has a case of its own."""
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
    "polynomial": EVERY_STEP,
    "mask_stability": {**EVERY_STEP, "window": 2},
}
WITHOUT_COUNTS = {"adaptive", "rising_loss", "threshold_ramp"}
"""Schedules that follow a validation loss, or have thresholds in the place of counts: they have tests of their own."""
SALIENCIES = sorted({cls.name for cls in REGISTRY["saliency"].values()})
CASES = list(itertools.product(SALIENCIES, UNITS))
WATCHING = {"accumulated_movement", "from_init", "karnin", "weight_change"}
"""Saliencies that rank by what training steps add up to."""
SINGLE_WEIGHTS = "granularity: saliency '{}' chooses single weights, not pieces of "
NO_NORMS = "saliency: '{}' scores scales of a normalization, and group q:head has none"
ONE_TENSOR = "saliency: '{}' compares the units of one tensor, and a tensor belongs to one layer"
NO_VARIANCE = "saliency: '{}' needs a relaxation that learns a variance, not 'hard'"
NOT_LINEAR = "saliency {}: .* is a convolution; only linear layers have one connection of two neurons"
REFUSED = {
    (saliency, granularity): said.format(saliency)
    for said, saliencies, granularities in (
        (SINGLE_WEIGHTS, ("obc", "sparsegpt"), UNITS),
        (NO_NORMS, ("norm_scale", "gate_decorator"), ("head", "group")),
        (ONE_TENSOR, ("similarity", "merge_cost", "correlation", "subset_selection", "coreset"), ("layer",)),
        (NOT_LINEAR, ("connection_correlation",), ("channel", "layer", "group")),
        (NO_VARIANCE, ("signal_to_noise",), UNITS),
    )
    for saliency in saliencies
    for granularity in granularities
}
JOINT_REFUSED = {"coreset": "allocation: saliency 'coreset' draws from each layer by itself, and 'global' ranks all together"}
NO_SIZES = {
    "lamp": "normalization lamp: the scores must not be negative",
    "per_flop": "normalization per_flop: the scores must not be negative",
    "error_bound": "allocation.error_bound: '.*' has negative or infinite scores, which are no errors",
}
"""What cannot rank scores that are no sizes -> what it says."""
MAY_FALL = {"accumulated_movement", "coreset", "from_init", "grasp", "karnin", "score", "t_statistic"}
"""Saliencies whose scores may be negative or infinite."""


def test_nothing_is_forgotten():
    assert set(SCHEDULES) | WITHOUT_COUNTS == {cls.name for cls in REGISTRY["schedule"].values()}
    assert set(REGISTRY["allocation"]) == {*ALLOCATIONS, *OTHERS, "redistribution"}
    assert {group.kind for group in GROUPS.removable} >= {kind for kinds in UNITS.values() for kind in kinds}
    watching = {name for name in SALIENCIES if any(r.source == "steps" for r in REGISTRY["saliency"][name]().statistics)}
    assert watching == WATCHING


def refusal(saliency, granularity, allocation, normalization):
    """What a combination is refused with, or None."""
    if (saliency, granularity) in REFUSED:
        return REFUSED[saliency, granularity]
    if allocation == "global" and saliency in JOINT_REFUSED:
        return JOINT_REFUSED[saliency]
    return None


def fit(net, schedule, sparsity=0.5, **slots):
    said = Recipe(sparsity=sparsity, schedule=schedule, relaxation="straight_through" if slots["saliency"] == "score" else "hard", **slots)
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


def first_scores(schedule, **slots):
    """The scores that the first selection ranks by."""
    later = {"one_shot": {"at": "1 run"}} if schedule == "one_shot" else schedule
    sparsifier = fit(copy.deepcopy(MODEL), later, 0.0, **slots)
    reads = "gradient" in sparsifier.recipe.saliency.needs
    with sparsifier._statistics.gradients() if reads else nullcontext(), torch.no_grad():
        return torch.cat([score.flatten().double() for score in sparsifier._selector.scores()])


def pairs(saliency, granularity):
    """Yield allocations and normalizations for a case: over the granularities a saliency meets all of both, and most pairs."""
    turn = 7 * SALIENCIES.index(saliency) + 3 * list(UNITS).index(granularity)
    normalizations = list(REGISTRY["normalization"])
    count = {"layer": 2, "head": 2}.get(granularity, 5)  # one group leaves allocations no choice
    if saliency == "obs":  # it has a matrix over all weights
        count = {"head": 2, "channel": 1}.get(granularity, 0)
    for i in range(turn, turn + count):
        allocation = ALLOCATIONS[i % len(ALLOCATIONS)]
        if (allocation, granularity) != ("uniform_plus", "layer"):  # has a test of its own
            yield allocation, normalizations[(i + i // len(ALLOCATIONS)) % len(normalizations)]


@pytest.mark.parametrize(("saliency", "granularity"), CASES)
def test_every_allocation_and_normalization(saliency, granularity):
    schedule = "one_shot" if saliency not in WATCHING | {"score"} else {"constant": {"every": "1 steps"}}
    for allocation, normalization in pairs(saliency, granularity):
        net = copy.deepcopy(MODEL)
        slots = {"granularity": granularity, "saliency": saliency, "allocation": allocation, "normalization": normalization}
        said = refusal(**slots)
        if said is None and saliency in WATCHING:
            said = f"the masks of step 0 would be ranked by what saliency '{saliency}' adds up while the model trains"
        for name in (normalization, allocation):
            if said is None and name in NO_SIZES:
                scores = first_scores(schedule, **slots | {"normalization": normalization if name == allocation else "none"})
                if bool((scores < 0).any() or (name == allocation and scores.isinf().any())):
                    assert saliency in MAY_FALL or normalization == "flops_penalty"
                    said = NO_SIZES[name]
        if said is None:
            check(net, fit(net, schedule, **slots).masks, granularity)
            continue
        with pytest.raises(InputError, match=said) as refused:
            fit(net, schedule, **slots)
        assert "\n" not in str(refused.value)
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), MODEL.state_dict().values(), strict=True))


def test_the_one_layer_of_a_group_of_layers_cannot_be_kept_dense():
    with pytest.raises(InputError, match=r"uniform_plus: the first convolution and 0\.2 of the last layer are 1 of all pieces"):
        fit(copy.deepcopy(MODEL), "one_shot", granularity="layer", saliency="magnitude", allocation="uniform_plus")


def train(net, sparsifier, granularity, exact=True):
    """Train to the end of the run, with a look at the masks on the way."""
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
    check(net, sparsifier.finalize().masks, granularity, exact)
    assert all(p.isfinite().all() for p in net.parameters())


LATER = {
    "constant": {"every": "2 steps", "begin": "1 steps", "end": "1 run"},
    "list": {"sparsity": [0.2, 0.5], "at": ["1 steps", "3 steps"]},
    "mask_stability": {**EVERY_STEP, "begin": "1 steps", "window": 2},
}
"""Schedules whose first masks come after a step, for saliencies that have seen nothing before it."""


@pytest.mark.parametrize(("saliency", "granularity"), [case for case in CASES if case not in REFUSED])
def test_every_schedule(saliency, granularity):
    turn, names = SALIENCIES.index(saliency), list(SCHEDULES)
    # Ten for each saliency, over the granularities.
    count = {"head": 2, "layer": 2}.get(granularity, 3) if saliency != "obs" or granularity == "head" else 0
    begin = {"channel": 0, "head": 3, "layer": 5, "group": 7}[granularity]
    for i in range(begin, begin + count):
        name = names[i]
        allocation, normalization = ALLOCATIONS[(turn + i) % len(ALLOCATIONS)], ("none", "layer_l2", "rank")[(turn + i) % 3]
        slots = {"granularity": granularity, "saliency": saliency, "allocation": allocation, "normalization": normalization}
        unfit = (allocation == "error_bound" and saliency in MAY_FALL) or (allocation, granularity) == ("uniform_plus", "layer")
        if unfit or refusal(**slots) is not None:
            slots["allocation"] = "uniform"
        net = copy.deepcopy(MODEL)
        times = (LATER if saliency in WATCHING else {}).get(name, SCHEDULES[name])
        train(net, fit(net, {name: times}, **slots), granularity)


# ---------------------------------------------------------------- allocations that search, or that need more to be said

CHANNELS = [group for group in TARGETS if group.kind == "channel"]
TABLE = {"seconds": 30.0, "layers": {group.name: {0.0: 1.0 + group.size, 0.9: 1.0} for group in CHANNELS}}
OTHERS = {
    "amc": {"episodes": 4, "explore": 2},
    "evolutionary": {"population": 4, "generations": 1},
    "sensitivity": {"sparsities": [0.3, 0.6, 0.9]},
    "explicit": {"layers": {g.name: 0.5 for g in CHANNELS}},
    "flops_budget": {"flops": 0.7},
    "latency_budget": {"table": TABLE, "share": 0.7},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_allocations(name):
    for schedule in ("one_shot", {"linear": EVERY_STEP}):
        net = copy.deepcopy(MODEL)
        budget = name.endswith("_budget")
        said = {"allocation": {name: OTHERS[name]}, "granularity": "channel", "saliency": "taylor"}
        train(net, fit(net, schedule, sparsity=None if budget else 0.5, **said), "channel", exact=not budget and name != "explicit")


def test_redistribution():
    for by in ("weight", "gradient", "nonzeros", "survivors"):
        net = copy.deepcopy(MODEL)
        said = {"allocation": {"redistribution": {"by": by}}, "granularity": "channel", "saliency": "magnitude", "growth": "random"}
        train(net, fit(net, {"constant": {"every": "1 steps"}}, **said), "channel")
