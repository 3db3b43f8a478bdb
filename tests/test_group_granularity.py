"""Units of dependency groups as pieces: what goes is what explicit loops in float64 say, and all members share one mask."""

import copy
import math
import re
import warnings

import pytest
import torch
from support import batch, pruned_are_zero, recipe
from torch import nn
from torch.nn import functional

import niwaki
from niwaki import ranking
from niwaki.calibration import Watched, collect
from niwaki.dependency import Group, Member, find_groups
from niwaki.errors import InputError
from niwaki.granularity import Block, Element, Kernel, OutputChannel
from niwaki.layout import Layout, layout_of
from niwaki.pieces import Grid, Slices
from niwaki.pruning import pruned
from niwaki.ranking import rank_targets
from niwaki.recipe import Prune, Recipe
from niwaki.saliency import Observation, Saliency
from niwaki.sparsifier import hold
from niwaki.statistics import InputSize

# ---------------------------------------------------------------- models with groups made by hand


class Residual(nn.Module):
    """A stem and a block whose outputs are added, pooled and read by a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.a, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.third = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 4, 5)

    def forward(self, x):
        x = torch.relu(self.first(self.stem(x)))
        x = torch.relu(x + self.third(self.b(torch.relu(self.second(self.a(x))))))
        return self.head(functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Attention(nn.Module):
    """Four heads of width 2 over four tokens of 16 pixels."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 6)
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8, bias=False), nn.Linear(6, 8)
        self.o, self.head = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.embed(x.reshape(-1, 4, 16))
        q, k, v = (layer(x).unflatten(-1, (4, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(2), -1) @ v
        return self.head((x + self.o(attended.transpose(1, 2).flatten(2))).mean(1))


def chain(activation=nn.ReLU):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7), activation(), nn.Linear(7, 9), activation(), nn.Linear(9, 5))


def member(name, dim, units, role):
    return Member(name, dim, torch.as_tensor(units), role)


def neurons(name, before, after, size):
    """The group of the outputs of one linear layer of a chain."""
    everything = range(size)
    weights = [member(f"{before}.weight", 0, everything, "output"), member(f"{before}.bias", 0, everything, "along")]
    return Group(name, "channel", size, (*weights, member(f"{after}.weight", 1, everything, "input")))


def residual_groups():
    stream, inner = range(4), range(6)
    flat = torch.arange(4).repeat_interleave(4)
    norms = [member(f"{norm}.{own}", 0, stream, "along") for norm in ("first", "third") for own in ("weight", "bias", "running_mean")]
    outside = (
        member("stem.weight", 0, stream, "output"),
        member("b.weight", 0, stream, "output"),
        member("a.weight", 1, stream, "input"),
        member("head.weight", 1, flat, "input"),
    )
    inside = [member(f"second.{own}", 0, inner, "along") for own in ("weight", "bias", "running_mean", "running_var")]
    makers = (member("a.weight", 0, inner, "output"), member("a.bias", 0, inner, "along"), member("b.weight", 1, inner, "input"))
    return [Group("stem", "channel", 4, (*outside, *norms)), Group("a", "channel", 6, (*makers, *inside))]


def attention_groups():
    def of(units):
        rows = [member(f"{layer}.weight", 0, units, "output") for layer in "qkv"]
        biases = [member(f"{layer}.bias", 0, units, "along") for layer in "qv"]
        return (*rows, *biases, member("o.weight", 1, units, "input"))

    place = torch.arange(8)
    return [Group("q", "head", 4, of(place // 2)), Group("q.inner", "head_dim", 2, of(place % 2))]


NETS = {
    "chain": (chain, lambda: [neurons("1", "1", "3", 7), neurons("3", "3", "5", 9)]),
    "residual": (Residual, residual_groups),
    "attention": (Attention, attention_groups),
}
EVERYTHING = "target: {weights: {include: ['*']}}"
EXAMPLE = (torch.zeros(2, 1, 8, 8),)


def build(name, dtype=torch.float64, seed=0):
    make, groups = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases are of all sizes too
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, groups()


def kinds(name):
    return "{group: {kinds: [channel, head, head_dim]AGG}}" if name == "attention" else "{channel: {AGG}}"


def granularity(name, aggregate):
    text = kinds(name)
    return text.replace("AGG", f", aggregate: {aggregate}" if "kinds" in text else f"aggregate: {aggregate}")


def fit(model, text, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return niwaki.Sparsifier(model, recipe(text), **options)


# ---------------------------------------------------------------- the oracles: loops over single elements


def elements(tensor, part, unit):
    """The elements of a tensor that a unit owns, as Python floats."""
    entries = [i for i, owner in enumerate(part.units.tolist()) if owner == unit]
    return [float(v) for i in entries for v in tensor.detach().select(part.dim, i).flatten()]


def unit_score(tensors, parts, unit, aggregate, of_elements):
    found = [of_elements(values) for part in parts if (values := elements(tensors[part.name], part, unit))]
    if not found:
        return 0.0
    total = math.fsum(found)
    combined = {"sum": total, "mean": total / len(found), "l2": math.sqrt(math.fsum(v * v for v in found)), "max": max(found)}
    return combined[aggregate]


def l1(values):
    return math.fsum(abs(v) for v in values)


def l2(values):
    return math.sqrt(math.fsum(v * v for v in values))


def counts(allocation, sparsity, groups, model):
    """Units that each group keeps, from the definition of the allocation."""
    sizes = [group.size for group in groups]
    total = round((1 - sparsity) * sum(sizes))
    if allocation == "uniform":
        shares = [1 - sparsity] * len(sizes)
    else:
        shapes = [model.get_parameter(group.members[0].name).shape for group in groups]
        rates = [(shape[0] + shape[1] + sum(shape[2:])) / math.prod(shape) for shape in shapes]
        low, high = 0.0, 1e9
        for _ in range(200):
            middle = (low + high) / 2
            enough = sum(min(1, middle * r) * n for r, n in zip(rates, sizes, strict=True)) > (1 - sparsity) * sum(sizes)
            low, high = (low, middle) if enough else (middle, high)
        shares = [min(1.0, high * rate) for rate in rates]
    quotas = [share * n for share, n in zip(shares, sizes, strict=True)]
    keep = [math.floor(quota + 1e-9) for quota in quotas]
    for i in sorted(range(len(keep)), key=lambda i: keep[i] - quotas[i])[: total - sum(keep)]:
        keep[i] += 1
    return keep


def best(scores, keep):
    return set(sorted(range(len(scores)), key=lambda u: (-scores[u], u))[:keep])


def chosen(scores, allocation, sparsity, groups, model):
    """The units that each group keeps."""
    if allocation != "global":
        return [best(s, n) for s, n in zip(scores, counts(allocation, sparsity, groups, model), strict=True)]
    ranking = sorted((-score, g, u) for g, group in enumerate(scores) for u, score in enumerate(group))
    forced: set[tuple[int, int]] = set()
    while True:  # an emptied group keeps its best unit, and the rest is ranked anew
        rest = [(g, u) for _, g, u in ranking if (g, u) not in forced]
        kept = forced | set(rest[: round((1 - sparsity) * len(ranking)) - len(forced)])
        found = [{u for h, u in kept if h == g} for g in range(len(groups))]
        if all(found):
            return found
        forced |= {next((h, u) for _, h, u in ranking if h == g) for g, units in enumerate(found) if not units}


def masks_of(model, groups, kept):
    """Every parameter's mask, element by element."""
    masks = {}
    parameters = dict(model.named_parameters())
    for group, units in zip(groups, kept, strict=True):
        for part in group.members:
            if part.name not in parameters:
                continue
            mask = masks.setdefault(part.name, torch.ones(parameters[part.name].shape, dtype=torch.bool))
            for entry, unit in enumerate(part.units.tolist()):
                if unit >= 0 and unit not in units:
                    mask.select(part.dim, entry).fill_(False)
    return niwaki.Masks(masks)


def units_kept(masks, group):
    """The units of a group that a model's masks keep, read off each member that no other group cuts wholly."""
    found = []
    for part in group.members:
        if part.name in masks:
            active = masks[part.name].movedim(part.dim, 0).flatten(1).any(1) if masks[part.name].ndim > 1 else masks[part.name]
            found.append({unit for unit, on in zip(part.units.tolist(), active.tolist(), strict=True) if on and unit >= 0})
    assert all(units == found[0] for units in found), found
    return found[0]


def outputs(group):
    return [part for part in group.members if part.role == "output"]


# ---------------------------------------------------------------- which units go


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("aggregate", ["sum", "mean", "l2", "max"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("allocation", ["uniform", "global", "erdos_renyi_kernel"])
def test_units_go_as_loops_say(name, aggregate, norm, allocation):
    model, groups = build(name)
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    of_elements = l1 if norm == "l1" else l2
    scores = [[unit_score(parameters, outputs(g), u, aggregate, of_elements) for u in range(g.size)] for g in groups]
    text = f"sparsity: 0.5\ngranularity: {granularity(name, aggregate)}\nallocation: {allocation}\n{EVERYTHING}\n"
    sparsifier = fit(model, f"{text}saliency: {{magnitude: {{norm: {norm}}}}}", groups=groups)
    kept = chosen(scores, allocation, 0.5, groups, model)
    assert sparsifier.masks == masks_of(model, groups, kept)
    assert pruned_are_zero(model, sparsifier.masks)
    for key, mask in sparsifier.masks.items():
        assert torch.equal(model.get_parameter(key)[mask], parameters[key][mask])


@pytest.mark.parametrize(("normalization", "power"), [("layer_l2", 0), ("rank", 0), ("lamp", 0), ("{per_flop: {power: 0.5}}", 0.5)])
def test_scores_are_normalized_over_a_group(normalization, power):
    model, groups = build("residual")
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    scores = [[unit_score(parameters, outputs(g), u, "sum", l1) for u in range(g.size)] for g in groups]
    uses = {"stem.weight": 64, "a.weight": 64, "b.weight": 64, "head.weight": 1}
    normalized = []
    for group, raw in zip(groups, scores, strict=True):
        if power:
            ones = {n: torch.ones_like(p) for n, p in parameters.items()}
            costs = [sum(2 * 3 * uses.get(m.name, 0) * sum(elements(ones[m.name], m, u)) for m in group.members if m.name in ones)
                     for u in range(group.size)]  # fmt: skip
            normalized.append([s / cost**power for s, cost in zip(raw, costs, strict=True)])
        elif normalization == "layer_l2":
            normalized.append([s / l2(raw) for s in raw])
        elif normalization == "rank":
            normalized.append([sum(t <= s for t in raw) / len(raw) for s in raw])
        else:
            normalized.append([s * s / math.fsum(t * t for t in raw if t >= s) for s in raw])
    text = f"sparsity: 0.4\ngranularity: channel\nallocation: global\nnormalization: {normalization}\n{EVERYTHING}"
    sparsifier = fit(model, text, groups=groups, data=[(torch.zeros(3, 1, 8, 8, dtype=torch.float64), None)])
    assert sparsifier.masks == masks_of(model, groups, chosen(normalized, "global", 0.4, groups, model))


@pytest.mark.parametrize("where", ["outputs", "inputs", "norms", "all"])
def test_the_members_that_a_saliency_is_meant_for_are_scored(where):
    class Somewhere(Saliency):
        scored_on = where

        def score(self, seen, reduce):
            return reduce(seen.weight.abs())

    model, groups = build("residual")
    parameters = dict(model.named_parameters())
    scored = {
        "outputs": outputs,
        "inputs": lambda g: [m for m in g.members if m.role == "input"],
        "norms": lambda g: [m for m in g.members if m.name in ("first.weight", "second.weight", "third.weight")],
        "all": lambda g: [m for m in g.members if m.name in parameters],
    }[where]
    values = {n: p.detach().clone() for n, p in parameters.items()}
    scores = [[unit_score(values, scored(g), u, "sum", l1) for u in range(g.size)] for g in groups]
    said = Recipe(sparsity=0.5, granularity="channel", saliency=Somewhere(), target={"weights": {"include": ["*"]}})
    assert niwaki.Sparsifier(model, said, groups=groups).masks == masks_of(model, groups, chosen(scores, "uniform", 0.5, groups, model))


def test_a_group_without_the_members_that_are_scored_is_named():
    model, groups = build("chain")
    with pytest.raises(InputError, match=r"'norm_scale' scores scales of a normalization, and group 1 has none; exclude 1\.weight from"):
        fit(model, f"sparsity: 0.5\ngranularity: channel\nsaliency: norm_scale\n{EVERYTHING}", groups=groups)


def test_units_with_entries_in_some_members_only():
    """A concatenation: two layers make disjoint units, and the third reads both.

    Unit 3 has no scored member, and scores nothing. Unit 5 owns nothing at all, so it is no piece.
    """
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 3), "c": nn.Linear(6, 2)}).double()
    parts = (
        member("a.weight", 0, [0, 1], "output"),
        member("b.weight", 0, [4, 2, 2], "output"),
        member("a.bias", 0, [0, 1], "along"),
        member("b.bias", 0, [4, 2, 2], "along"),
        member("c.weight", 1, [0, 1, 2, 2, 3, 4], "input"),
    )
    group = Group("joined", "channel", 6, parts)
    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
    for aggregate in ("sum", "mean", "l2", "max"):
        for sparsity in (0.2, 0.4, 0.6, 0.8):
            fresh = copy.deepcopy(model)
            scores = [unit_score(tensors, parts[:2], u, aggregate, l1) for u in range(5)]
            assert scores[3] == 0.0
            masks = fit(
                fresh, f"sparsity: {sparsity}\ngranularity: {{channel: {{aggregate: {aggregate}}}}}\n{EVERYTHING}", groups=[group]
            ).masks
            assert masks == masks_of(fresh, [group], [best(scores, round((1 - sparsity) * 5))])


def test_blocks_that_cannot_go_are_no_pieces():
    """Of a container of four children the second and the last can go: units 1 and 3."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).double()
    parts = [member(f"{k}.{own}", 0, [k] * 3, role) for k in (1, 3) for own, role in (("weight", "output"), ("bias", "along"))]
    group = Group(":layer", "layer", 4, tuple(parts))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    for saliency in ("magnitude", "random", "position"):
        text = f"sparsity: 0.5\ngranularity: layer\nsaliency: {saliency}\n{EVERYTHING}"
        masks = fit(copy.deepcopy(model), text, groups=[group]).masks
        gone = 1 if saliency == "magnitude" else 3
        assert [float(masks[f"{k}.weight"].float().mean()) for k in (1, 3)] == [float(k != gone) for k in (1, 3)] or saliency == "random"
        assert masks.sparsity == 0.5
    text = f"sparsity: 0.5\ngranularity: layer\nsaliency: taylor\n{EVERYTHING}"
    data = [(torch.ones(2, 3, dtype=torch.float64), None)]
    scored = fit(model, text, groups=[group], data=data, loss=lambda outputs, _: outputs.square().mean()).ranked[0].scored
    assert [part.bound.name for part in scored] == ["1.weight", "3.weight"]
    with pytest.raises(InputError, match="'similarity' compares the units of one tensor, and a tensor belongs to one layer"):
        fit(model, text.replace("taylor", "similarity"), groups=[group])


def test_units_without_a_norm_cannot_be_ranked_by_it():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "norm": nn.BatchNorm1d(2), "b": nn.Linear(3, 1), "c": nn.Linear(3, 2)})
    parts = (member("a.weight", 0, [0, 1], "output"), member("b.weight", 0, [2], "output"), member("norm.weight", 0, [0, 1], "along"))
    group = Group("joined", "channel", 3, (*parts, member("c.weight", 1, [0, 1, 2], "input")))
    with pytest.raises(InputError, match=r"some units of group joined have none; exclude a\.weight from the target"):
        fit(model, f"sparsity: 0.5\ngranularity: channel\nsaliency: norm_scale\n{EVERYTHING}", groups=[group])


def test_gates_of_a_recurrent_layer_are_one_unit():
    """A hidden unit owns four rows of both matrices and a column of one of them."""
    torch.manual_seed(0)
    model = nn.LSTM(3, 5).double()
    gates = torch.arange(5).repeat(4)
    rows = [member(f"weight_{w}_l0", 0, gates, "output") for w in ("ih", "hh")]
    biases = [member(f"bias_{w}_l0", 0, gates, "along") for w in ("ih", "hh")]
    group = Group("lstm", "channel", 5, (*rows, *biases, member("weight_hh_l0", 1, range(5), "input")))
    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
    scores = [unit_score(tensors, rows, u, "sum", l1) for u in range(5)]
    masks = fit(model, f"sparsity: 0.6\ngranularity: channel\n{EVERYTHING}", groups=[group]).masks
    kept = best(scores, 2)
    assert masks == masks_of(model, [group], [kept])
    hidden = model(torch.randn(4, 2, 3, dtype=torch.float64))[0]
    assert not hidden[..., sorted(set(range(5)) - kept)].any()


def test_whole_layers():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).double()
    parts = tuple(
        member(f"{k}.{own}", 0, [k] * 4, "output" if own == "weight" else "along") for k in range(4) for own in ("weight", "bias")
    )
    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
    group = Group("blocks", "layer", 4, parts)
    masks = fit(model, f"sparsity: 0.5\ngranularity: layer\n{EVERYTHING}", groups=[group]).masks
    kept = best([l1(tensors[f"{k}.weight"].flatten().tolist()) for k in range(4)], 2)
    assert [bool(masks[f"{k}.weight"].all() and masks[f"{k}.bias"].all()) for k in range(4)] == [k in kept for k in range(4)]
    assert masks.sparsity == 0.5


def test_positions_of_a_depthwise_convolution_make_units_where_nothing_else_does():
    model = nn.ModuleDict({"depthwise": nn.Conv2d(4, 4, 3, groups=4), "point": nn.Conv2d(4, 5, 1)}).double()
    parts = (member("depthwise.weight", 0, range(4), "along"), member("depthwise.bias", 0, range(4), "along"),
             member("point.weight", 1, range(4), "input"))  # fmt: skip
    group = Group("depthwise", "channel", 4, parts)
    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
    kept = best([unit_score(tensors, parts[:1], u, "sum", l1) for u in range(4)], 2)
    assert fit(model, f"sparsity: 0.5\ngranularity: channel\n{EVERYTHING}", groups=[group]).masks == masks_of(model, [group], [kept])


# ---------------------------------------------------------------- training


SCHEDULES = [
    "{cubic: {every: 2 steps, end: 0.75 run}}",
    "{iterative: {rounds: 4, end: 0.75 run}}",
    "{linear: {every: 3 steps, end: 0.5 run}}",
    "{list: {sparsity: [0.2, 0.4, 0.5], every: 4 steps}}",
    "{one_shot: {at: 5 steps}}",
]


def steps(model, optimizer, last, first=0, after=lambda step: None, dtype=torch.float64):
    for step in range(first, last):
        images, labels = batch(step, dtype=dtype)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        after(step)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masked_units_stay_exactly_zero_through_training(schedule, allocation, kind):
    model, groups = build("residual")
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=1e-2)
    )
    text = f"sparsity: 0.5\ngranularity: channel\nallocation: {allocation}\nschedule: {schedule}\n{EVERYTHING}"
    sparsifier = fit(model, text, groups=groups, total_steps=16).attach(optimizer)
    said, kept = sparsifier.recipe, [set(range(g.size)) for g in groups]

    def look(step):
        nonlocal kept
        due = said.schedule.at(step, said.final_sparsity, sparsifier.clock)
        now = [units_kept(sparsifier.masks, g) for g in groups]
        if due is not None:
            assert sum(map(len, now)) == round((1 - due) * sum(g.size for g in groups))
            assert all(after <= before for after, before in zip(now, kept, strict=True))
            kept = now
        assert now == kept
        assert sparsifier.masks == masks_of(model, groups, now)
        assert pruned_are_zero(model, sparsifier.masks)
        for parameter, state in optimizer.state.items():
            name = next(n for n, p in model.named_parameters() if p is parameter)
            if name in sparsifier.masks:
                gone = ~sparsifier.masks[name]
                assert all(not slot[gone].any() for slot in state.values() if slot.shape == parameter.shape)

    steps(model, optimizer, 16, after=look)
    assert sum(map(len, kept)) == 5
    images, _ = batch(99, dtype=torch.float64)
    seen = []
    handle = model.third.register_forward_hook(lambda module, args, out: seen.append(out))
    model.eval()(images)
    handle.remove()
    assert not seen[0][:, sorted(set(range(4)) - kept[0])].any()


def test_rigl_over_units_drops_and_grows_as_loops_say():
    """With sigmoids a unit that is zero everywhere still gets a gradient for the weights that read it."""
    model, groups = build("chain")
    model = nn.Sequential(*(nn.Sigmoid() if isinstance(layer, nn.ReLU) else layer for layer in model))

    class Read(Saliency):
        scored_on = "inputs"

        def score(self, seen, reduce):
            return reduce(seen.weight.abs())

    said = Recipe(
        sparsity=0.5,
        granularity="channel",
        saliency=Read(),
        schedule={"constant": {"every": "3 steps"}},
        growth={"gradient": {"fraction": 0.5, "at_update": "step", "initial_mask": "saliency"}},
        target={"weights": {"include": ["*"]}},
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    with pytest.warns(UserWarning, match="a unit that comes back is zero in all its tensors"):
        sparsifier = niwaki.Sparsifier(model, said, groups=groups, total_steps=12).attach(optimizer)
    keeps = [round(0.5 * 7), round(0.5 * 9)]
    moved = 0
    for step in range(12):
        before = [units_kept(sparsifier.masks, g) for g in groups]
        assert [len(b) for b in before] in ([4, 4], [3, 5])
        images, labels = batch(step, dtype=torch.float64)
        twin = copy.deepcopy(model)
        functional.cross_entropy(twin(images), labels).backward()
        weights = {n: p.detach() for n, p in twin.named_parameters()}
        gradients = {n: p.grad for n, p in twin.named_parameters()}
        steps(model, optimizer, step + 1, step)
        after = [units_kept(sparsifier.masks, g) for g in groups]
        if step == 0 or step % 3:
            assert after == before
            continue
        for group, old, new in zip(groups, before, after, strict=True):
            reads = [m for m in group.members if m.role == "input"]
            score = [unit_score(weights, reads, u, "sum", l1) if u in old else -1.0 for u in range(group.size)]
            stay = best(score, len(old) - len(old) // 2)
            gain = [-1.0 if u in stay else unit_score(gradients, reads, u, "sum", l1) for u in range(group.size)]
            assert new == stay | best(gain, len(old) - len(stay))
            moved += len(new - old)
        assert sparsifier.masks == masks_of(model, groups, after)
        assert pruned_are_zero(model, sparsifier.masks)
    assert moved
    assert sum(keeps) == sum(len(units_kept(sparsifier.masks, g)) for g in groups)


@pytest.mark.parametrize("growth", ["{random: {fraction: 0.5}}", "all"])
def test_units_come_back(growth):
    model, groups = build("residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = "{phases: {dense: [0, 8], sparse: [4, 12], unit: steps}}" if growth == "all" else "{constant: {every: 4 steps}}"
    text = f"sparsity: 0.5\ngranularity: channel\nschedule: {schedule}\ngrowth: {growth}\n{EVERYTHING}"
    with pytest.warns(UserWarning, match="a unit that comes back"):
        sparsifier = niwaki.Sparsifier(model, recipe(text), groups=groups, total_steps=16).attach(optimizer)
    found = []
    steps(model, optimizer, 16, after=lambda step: found.append([units_kept(sparsifier.masks, g) for g in groups]))
    numbers = [sum(map(len, kept)) for kept in found]
    assert numbers == ([10] * 4 + [5] * 4 + [10] * 4 + [5] * 4 if growth == "all" else [5] * 16)
    if growth != "all":
        assert len({str(kept) for kept in found}) > 2
    assert pruned_are_zero(model, sparsifier.masks)


def test_latent_units_return_with_their_weights_and_a_superset_of_units_learns():
    model, groups = build("residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    text = "sparsity: 0.6\nschedule: {constant: {every: 1 steps}}\nrelaxation: latent\ngradient: {superset: {sparsity: 0.2}}"
    sparsifier = fit(model, f"{text}\ngranularity: channel\n{EVERYTHING}", groups=groups, total_steps=12).attach(optimizer)

    def look(step):
        active, learns = ([units_kept(m, g) for g in groups] for m in (sparsifier.masks, sparsifier.learning))
        assert all(a <= b for a, b in zip(active, learns, strict=True))
        assert (sum(map(len, active)), sum(map(len, learns))) == (4, 8)
        assert sparsifier.learning == masks_of(model, groups, learns)
        assert pruned_are_zero(model, sparsifier.masks)

    steps(model, optimizer, 12, after=look)
    masks = sparsifier.finalize().masks
    assert masks.sparsity
    assert pruned_are_zero(model, masks)


METHODS = {
    "gradual": "sparsity: 0.5\nallocation: global\nschedule: {cubic: {every: 3 steps, end: 0.75 run}}",
    "set": "sparsity: 0.5\nschedule: {constant: {every: 4 steps, end: 0.75 run}}\ngrowth: {random: {fraction: 0.4}}",
    "dpf": "sparsity: 0.5\nschedule: {cubic: {every: 4 steps, end: 0.75 run}}\nrelaxation: latent\ngradient: dense",
    "movement": "sparsity: 0.5\nsaliency: score\nrelaxation: {straight_through: {learning_rate: 1e-2}}\n"
    "schedule: {cubic: {begin: 0.1 run, every: 1 steps, end: 0.7 run}}",
    "taylor": "sparsity: 0.5\nsaliency: taylor\nschedule: {cubic: {every: 3 steps, end: 0.75 run}}",
}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(method):
    def begin():
        model, groups = build("residual", torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return (
            model,
            optimizer,
            fit(model, f"{METHODS[method]}\ngranularity: channel\n{EVERYTHING}", groups=groups, total_steps=16).attach(optimizer),
        )

    model, optimizer, sparsifier = begin()
    steps(model, optimizer, 9, dtype=torch.float32)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
    steps(model, optimizer, 16, 9, dtype=torch.float32)
    again, other, resumed = begin()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    assert again.training
    steps(again, other, 16, 9, dtype=torch.float32)
    assert sparsifier.finalize().masks == resumed.finalize().masks
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_state_is_taken_before_the_model_has_its_weights():
    """Biases begin at zero: they tell nothing about a model that was pruned before."""
    model, groups = build("chain")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.zero_()
    fresh = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = fit(model, f"sparsity: 0.5\ngranularity: channel\n{EVERYTHING}", groups=groups).attach(optimizer)
    steps(model, optimizer, 3)
    resumed = fit(fresh, f"sparsity: 0.5\ngranularity: channel\n{EVERYTHING}", groups=groups)
    resumed.load_state_dict(sparsifier.state_dict())
    assert resumed.masks == sparsifier.masks


# ---------------------------------------------------------------- masks that are given, kept and saved


def test_masks_of_units_are_held_carried_on_and_saved(tmp_path):
    model, groups = build("residual", torch.float32)
    masks = fit(model, f"sparsity: 0.3\ngranularity: channel\n{EVERYTHING}", groups=groups).masks
    assert {"a.bias", "second.weight", "head.weight"} <= masks.keys()
    path = tmp_path / "model.safetensors"
    niwaki.save(model, path, masks=masks)
    fresh = Residual()
    loaded = niwaki.load(path, fresh).masks
    assert loaded == masks
    assert torch.equal(fresh.a.bias, model.a.bias)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    kept = hold(fresh, loaded).attach(optimizer)
    steps(fresh, optimizer, 3, dtype=torch.float32)
    assert kept.masks == masks
    assert pruned_are_zero(fresh, masks)
    before = [units_kept(masks, g) for g in groups]
    more = fit(fresh, f"sparsity: 0.6\ngranularity: channel\n{EVERYTHING}", groups=groups, masks=masks).masks
    after = [units_kept(more, g) for g in groups]
    assert sum(map(len, before)) == 7
    assert sum(map(len, after)) == 4
    assert all(a <= b for a, b in zip(after, before, strict=True))


def test_masks_that_cut_through_units_stay():
    model, groups = build("chain")
    given = fit(model, f"sparsity: 0.5\n{EVERYTHING.replace('*', '3.weight')}").masks
    masks = fit(model, f"sparsity: 0.5\ngranularity: channel\n{EVERYTHING}", masks=given, groups=groups).masks
    kept = [set(part.nonzero().flatten().tolist()) for part in (masks["1.bias"], masks["3.bias"])]
    whole = masks_of(model, groups, kept)
    assert masks["3.weight"].equal(whole["3.weight"] & given["3.weight"])
    assert [len(k) for k in kept] == [4, 4] or [len(k) for k in kept] == [3, 5]


def test_pruning_a_fraction_of_the_active_units():
    model, groups = build("residual")
    prune = Prune(fraction=0.3, granularity="channel", allocation="global", target={"weights": {"include": ["*"]}})
    masks, left = None, 10
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            masks = pruned(model, prune, masks, groups=groups).masks
        left = round(0.7 * left)
        assert sum(len(units_kept(masks, g)) for g in groups) == left


def test_every_group_keeps_a_unit():
    model, groups = build("residual")
    with torch.no_grad():
        model.a.weight.mul_(1e-6)
    with pytest.warns(UserWarning, match="kept one piece of a, which the allocation 'global' would have emptied"):
        sparsifier = niwaki.Sparsifier(
            model, recipe(f"sparsity: 0.7\ngranularity: channel\nallocation: global\n{EVERYTHING}"), groups=groups
        )
    assert [len(units_kept(sparsifier.masks, g)) for g in groups] == [2, 1]
    with pytest.warns(UserWarning, match="kept 2 pieces, one a group, where the sparsity 0.9 asks for 1"):
        niwaki.Sparsifier(model, recipe(f"sparsity: 0.9\ngranularity: channel\nallocation: global\n{EVERYTHING}"), groups=groups)


# ---------------------------------------------------------------- groups that are found, and those that are left


def test_groups_are_found_with_an_example_or_the_first_batch():
    wanted = fit(build("residual")[0], f"sparsity: 0.5\ngranularity: channel\n{EVERYTHING}", groups=build("residual")[1]).masks
    example = (torch.zeros(2, 1, 8, 8, dtype=torch.float64),)
    text = "sparsity: 0.5\ngranularity: filter\ntarget: {weights: {include: [stem, a, b]}}"
    for options in ({"example": example}, {"data": iter([(example[0], None)])}, {"groups": find_groups(build("residual")[0], example)}):
        found = fit(build("residual")[0], text, **options)
        assert [g.name for g in found.ranked] == ["stem", "a"]
        assert found.masks == wanted
    model, _ = build("residual")
    plan = niwaki.plan(model, recipe(text), example=example)
    assert [(row.name, row.shape, row.pieces, row.keep) for row in plan.tensors] == [
        ("stem", (4, 1, 3, 3), 4, 2),
        ("a", (6, 4, 3, 3), 6, 3),
    ]
    assert plan.tensors[0].why == "allocation uniform; in 8 tensors"


def test_what_is_left_out_is_told_with_the_reason():
    model, _ = build("residual")
    sparsifier = fit(model, "sparsity: 0.5\ngranularity: channel", example=(torch.zeros(2, 1, 8, 8, dtype=torch.float64),))
    assert [one.name for one in sparsifier.ranked] == ["a"]
    assert sparsifier.masks.keys() == {"a.weight", "a.bias", "second.weight", "second.bias", "b.weight"}
    reasons = {one.name: one.reason for one in sparsifier.left_out}
    assert reasons == {
        "stem.weight": "first convolution",
        "first.weight": "not a weight",
        "first.bias": "not a weight",
        "third.weight": "not a weight",
        "third.bias": "not a weight",
        "head.weight": "last layer",
        "head.bias": "not a weight",
    }
    groups = find_groups(model, (torch.zeros(2, 1, 8, 8, dtype=torch.float64),)).veto("second", "the user said so")
    with pytest.raises(InputError, match="the user said so"):
        fit(model, "sparsity: 0.5\ngranularity: channel", groups=groups)
    both = fit(model, "sparsity: 0.5\ngranularity: channel\ntarget: {weights: {include: [stem, a, b]}}", groups=groups)
    assert {one.name: one.reason for one in both.left_out}["a.bias"] == "not a weight"
    assert [one.name for one in both.ranked] == ["stem"]


def test_a_target_in_a_group_that_cannot_go_is_told():
    model, groups = build("chain")
    vetoed = Group("1", "channel", 7, groups[0].members, reason="softmax over it")
    sparsifier = fit(model, f"sparsity: 0.5\ngranularity: channel\n{EVERYTHING}", groups=[vetoed, groups[1]])
    reasons = {one.name: one.reason for one in sparsifier.left_out}
    assert reasons["1.weight"] == "units cannot be masked: softmax over it"


def test_errors_are_one_line_with_a_way_out(monkeypatch):
    model, groups = build("chain")
    text = f"sparsity: 0.5\ngranularity: channel\n{EVERYTHING}"
    outsider = Group("x", "channel", 2, (member("nothing.weight", 0, range(2), "output"),))
    wide = Group("1", "channel", 8, (member("1.weight", 0, range(8), "output"),))
    cases = [
        ({}, "granularity: 'channel' is about dependency groups, which are found in a forward pass: pass example="),
        ({"groups": []}, "the model has no groups of kind channel"),
        ({"groups": [outsider]}, "groups: x has a member 'nothing.weight', which this model does not have"),
        ({"groups": [wide]}, "groups: 1 has 8 entries in dimension 0 of 1.weight, whose shape is (7, 64)"),
        ({"data": []}, "data: there is no batch"),
    ]
    for options, said in cases:
        with pytest.raises(InputError, match=re.escape(said)) as caught:
            fit(model, text, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"1: its units are made by 1\.weight, which is no target \(not matched by include\)"):
        fit(model, "sparsity: 0.5\ngranularity: channel\ntarget: {weights: {include: ['5']}}", groups=groups)
    monkeypatch.setattr(ranking, "is_sharded", lambda parameter: parameter is model[3].bias)
    with pytest.raises(InputError, match=r"units of 3 have entries in 3\.bias, which is sharded; groups need whole tensors"):
        fit(model, text, groups=groups)
    with pytest.raises(InputError, match="'soft_threshold' decides weight by weight"):
        recipe("granularity: channel\nrelaxation: soft_threshold")


# ---------------------------------------------------------------- statistics


def test_rows_are_the_elements_of_each_piece():
    values = torch.arange(24.0).view(4, 6)
    layout = Layout(("output", "input"), (4, 6))
    assert Grid(OutputChannel(), layout).rows(values).equal(values)
    assert Grid(Element(), layout).rows(values).equal(values.view(24, 1))
    blocks = Grid(Block(rows=2, columns=3), layout).rows(values)
    assert blocks.tolist() == [[float(v) for row in values[i : i + 2, j : j + 3] for v in row] for i in (0, 2) for j in (0, 3)]
    kernels = torch.arange(36.0).view(2, 2, 3, 3)
    assert Grid(Kernel(), Layout(("output", "input", "kernel", "kernel"), (2, 2, 3, 3))).rows(kernels).equal(kernels.view(4, 9))
    columns = Slices("w", (4, 6), (4, 6), 1, torch.tensor([3, 5]), torch.tensor([[1, 4], [0, 2]]))
    assert columns.rows(values).tolist() == [values[:, [1, 4]].T.flatten().tolist(), values[:, [0, 2]].T.flatten().tolist()]
    assert columns(values).tolist() == [float(values[:, [1, 4]].sum()), float(values[:, [0, 2]].sum())]
    assert columns.index().tolist() == [3, 5]
    assert Grid(OutputChannel(), layout).index().tolist() == [[0], [1], [2], [3]]
    with pytest.raises(InputError, match="leave a smaller rest"):
        Grid(Block(rows=3, columns=1, remainder="pad"), layout).rows(values)
    with pytest.raises(InputError, match="w: its units differ in size"):
        Slices("w", (4, 6), (4, 6), 1, torch.tensor([0, 1]), torch.tensor([[1, 4], [0, 6]])).rows(values)


class Inputs(nn.Module):
    """One module of each class whose inputs can be observed; a linear layer is called twice."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose1d(6, 4, 2)
        self.twice = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids):
        x = self.up(self.grouped(self.words(ids).transpose(1, 2)))
        return self.twice(self.drop(self.twice(x.transpose(1, 2))))


def test_activity_is_the_mean_size_of_what_each_weight_reads():
    torch.manual_seed(0)
    model = Inputs().double()
    data = [(torch.randint(5, (n, 6)), None) for n in (3, 2)]
    seen = {name: [] for name in ("grouped", "up", "twice")}
    handles = [model.get_submodule(name).register_forward_pre_hook(lambda m, a, n=name: seen[n].append(a[0].detach())) for name in seen]
    model.eval()
    for ids, _ in data:
        model(ids)
    for handle in handles:
        handle.remove()
    model.train()
    weights = {name: model.get_parameter(f"{name}.weight") for name in ("words", *seen)}
    layouts = {w: layout_of(model.get_submodule(name), "weight", w.shape) for name, w in weights.items()}
    state = torch.random.get_rng_state()
    read = collect(model, data, None, [Watched(name, w, layouts[w]) for name, w in weights.items()], [InputSize()])
    found = {w: read[name][InputSize()] for name, w in weights.items()}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for name, axis, shape in (("grouped", 1, (2, 1, 2, 1)), ("up", 1, (6, 1, 1)), ("twice", 2, (1, 4))):
        values = [[abs(float(v)) for x in seen[name] for v in x.select(axis, c).flatten()] for c in range(seen[name][0].shape[axis])]
        expected = torch.tensor([math.fsum(v) / len(v) for v in values], dtype=torch.float64)
        assert found[weights[name]].shape == shape
        assert torch.allclose(found[weights[name]].flatten(), expected, rtol=1e-12)
    ids = torch.cat([ids.flatten() for ids, _ in data])
    assert found[weights["words"]].tolist() == [[float((ids == word).sum()) / len(ids)] for word in range(5)]


def test_activity_decides_over_groups_and_of_columns():
    model, groups = build("chain")
    data = [batch(step, dtype=torch.float64) for step in range(2)]
    hidden = [[], []]
    with torch.no_grad():
        for images, _ in data:
            first = torch.relu(model[1](images.flatten(1)))
            hidden[0].append(first)
            hidden[1].append(torch.relu(model[3](first)))
    scores = [torch.cat(h).abs().mean(0).tolist() for h in hidden]
    fresh = copy.deepcopy(model)
    masks = fit(fresh, f"sparsity: 0.5\ngranularity: channel\nsaliency: activity\n{EVERYTHING}", groups=groups, data=data).masks
    assert masks == masks_of(model, groups, chosen(scores, "uniform", 0.5, groups, model))
    columns = fit(
        copy.deepcopy(model),
        "sparsity: 0.5\ngranularity: input_channel\nsaliency: activity\ntarget: {weights: {include: ['3']}}",
        data=data,
    )
    assert set(columns.masks["3.weight"].any(0).nonzero().flatten().tolist()) == best(scores[0], 4)
    with pytest.raises(InputError, match="saliency: 'activity' needs data="):
        fit(model, f"sparsity: 0.5\ngranularity: channel\nsaliency: activity\n{EVERYTHING}", groups=groups)
    recurrent = nn.LSTM(3, 2)
    weight = recurrent.weight_ih_l0
    layout = layout_of(recurrent, "weight_ih_l0", weight.shape)
    with pytest.raises(InputError, match="weight_ih_l0: what it reads cannot be observed"):
        collect(recurrent, [(torch.zeros(4, 3), None)], None, [Watched("weight_ih_l0", weight, layout)], [InputSize()])


def test_scores_of_each_batch_are_averaged_and_training_is_not_disturbed():
    """An update in the middle of a run: the gradients of the statistics are not those of the step."""

    class PerBatch(Saliency):
        needs = frozenset({"gradient"})

        @property
        def averages(self):
            return "batch"

        def score(self, seen: Observation, reduce):
            return reduce(seen.weight * seen.gradient).abs()

    def loss(outputs, labels):
        return functional.cross_entropy(outputs, labels)

    model, groups = build("residual")
    data = [batch(50 + i, dtype=torch.float64) for i in range(3)]
    said = Recipe(
        sparsity=0.5,
        granularity="channel",
        saliency=PerBatch(),
        target={"weights": {"include": ["*"]}},
        schedule={"one_shot": {"at": "2 steps"}},
    )
    with pytest.raises(InputError, match="needs data= and loss="):
        niwaki.Sparsifier(model, said, groups=groups, total_steps=4, data=data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = niwaki.Sparsifier(model, said, groups=groups, total_steps=4, data=data, loss=loss).attach(optimizer)
    plain = copy.deepcopy(model)
    other = torch.optim.SGD(plain.parameters(), lr=0.05)
    steps(model, optimizer, 2)
    steps(plain, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    scores = [[0.0] * g.size for g in groups]
    seen = copy.deepcopy(plain)
    seen(batch(2, dtype=torch.float64)[0])  # the forward pass of the step has moved the running statistics
    for images, labels in data:
        twin = copy.deepcopy(seen).eval()
        loss(twin(images), labels).backward()
        products = {n: (p * p.grad).detach() for n, p in twin.named_parameters()}
        for g, group in enumerate(groups):
            for u in range(group.size):
                scores[g][u] += unit_score(products, outputs(group), u, "sum", lambda v: abs(math.fsum(v))) / len(data)
    steps(model, optimizer, 3, 2)
    masks = masks_of(plain, groups, chosen(scores, "uniform", 0.5, groups, plain))
    assert sparsifier.masks == masks
    masks.apply_(plain)
    # The gradient of the step itself was taken before the masks changed, by both.
    images, labels = batch(2, dtype=torch.float64)
    reference = build("residual")[0]
    second = torch.optim.SGD(reference.parameters(), lr=0.05)
    steps(reference, second, 3)
    masks.apply_(reference)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_ranked_things_say_their_parts():
    model, groups = build("residual")
    ranked, _ = rank_targets(model, recipe(f"sparsity: 0.5\ngranularity: channel\n{EVERYTHING}"), groups)
    assert [one.name for one in ranked] == ["stem", "a"]
    assert [part.bound.name for part in ranked[0].makers] == ["stem.weight", "b.weight"]
    squares = sum(
        part.spread(part.cut(part.bound.view(part.bound.parameter).square()), one.pieces) for one in ranked[:1] for part in one.parts
    )
    mine = [m for m in groups[0].members if m.name in dict(model.named_parameters())]
    expected = [l2([v for m in mine for v in elements(model.get_parameter(m.name), m, u)]) for u in range(4)]
    assert torch.allclose(squares.sqrt(), torch.tensor(expected, dtype=torch.float64))
    back = ranked[0].parts[3].expand(squares, 0.0)
    assert back.equal(squares.repeat_interleave(4).expand(5, 16))
