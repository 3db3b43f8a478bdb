"""How scores become a mask: hysteresis against plain Python, draws against their chances."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from support import SURGERY, TARGETS, batch, net, recipe
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.component import build
from niwaki.counter import key, uniform
from niwaki.errors import InputError
from niwaki.selecting import Bernoulli, Gumbel, Hysteresis

# --- hysteresis

floats = st.lists(st.floats(-10, 10), min_size=1, max_size=30)


@given(floats, st.floats(-2, 2))
def test_the_middle_is_of_the_scores_that_are_not_zero(scores, rate):
    scores = [abs(score) for score in scores]
    some = [score for score in scores if score]
    found = Hysteresis(rate=rate).middle(len(some), math.fsum(some), math.fsum(s * s for s in some))
    expected = max(0.0, statistics.fmean(some) + rate * statistics.pstdev(some)) if some else 0.0
    assert found == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), min_size=1), st.floats(0, 1), st.floats(1, 2), st.floats(0, 2))
def test_hysteresis_is_its_rule(pieces, low, high, middle):
    scores, before = (list(values) for values in zip(*pieces, strict=True))
    found = Hysteresis(low=low, high=high).keep(torch.tensor(scores, dtype=torch.float64), torch.tensor(before), middle)
    for score, was, now in zip(scores, before, found.tolist(), strict=True):
        assert now == (False if score < low * middle else True if score >= high * middle else was)


def test_hysteresis_is_updated_with_a_chance_that_falls():
    selection = Hysteresis(gamma=0.5, power=2.0)
    assert [selection.chance(step) for step in (0, 2, 6)] == [1.0, 0.25, 0.0625]
    with pytest.raises(InputError, match=r"selection\.hysteresis: low: 1\.2 must not be above high, 1\.1"):
        Hysteresis(low=1.2)


def test_network_surgery_is_a_loop_over_dense_weights():
    """Guo, Yao, Chen 2016 by hand in float64: masks by plain comparisons, and the gradient of the masked network for all weights."""
    steps, rate = 16, 0.3
    model = net(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    sparsifier = niwaki.Sparsifier(model, recipe(SURGERY), total_steps=steps, seed=2).attach(optimizer)
    other = net(dtype=torch.float64)
    parameters = dict(other.named_parameters())
    dense = {name: parameters[name].detach().clone() for name in TARGETS}
    speed = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in dense.items()}
    middles, skipped, back = {}, 0, 0
    for step in range(steps + 1):
        for name, weight in dense.items():
            sizes = [abs(w) for w in weight.flatten().tolist()]
            if name not in middles:
                middles[name] = statistics.fmean(sizes) + 0.2 * statistics.pstdev(sizes)
            if step > 12 or float(uniform(key(2, step, f"{name}::hysteresis"), 0, 1)) >= 1 / (1 + 0.1 * step):
                skipped += step <= 12
                continue
            low, high, before = 0.9 * middles[name], 1.1 * middles[name], masks[name].flatten().tolist()
            after = [False if size < low else True if size >= high else was for size, was in zip(sizes, before, strict=True)]
            back += sum(now and not was for now, was in zip(after, before, strict=True))
            masks[name] = torch.tensor(after).view(weight.shape)
        assert all(torch.equal(sparsifier.masks[name], masks[name]) for name in TARGETS), step
        if step == steps:
            break
        images, labels = batch(step, dtype=torch.float64)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        with torch.no_grad():
            for name in TARGETS:
                parameters[name].copy_(dense[name].where(masks[name], 0.0))
        other.zero_grad()
        functional.cross_entropy(other(images), labels).backward()
        with torch.no_grad():
            for name, parameter in parameters.items():
                speed[name].mul_(0.9).add_(parameter.grad)
                dense.get(name, parameter).sub_(rate * speed[name])
    assert skipped > 3
    assert back > 0
    for name, parameter in model.named_parameters():
        expected = dense[name].where(masks[name], 0.0) if name in dense else parameters[name]
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-12, atol=1e-13)


def test_a_tensor_is_never_emptied():
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.fill_(1e-3)
        model.weight[1, 2] = 2e-3
    text = "selection: {hysteresis: {rate: 100}}\nrelaxation: latent\ngradient: dense\ntarget: {weights: {include: ['*']}}"
    with pytest.warns(UserWarning, match="kept one piece of weight, which the selection 'hysteresis' would have emptied"):
        sparsifier = niwaki.Sparsifier(model, recipe(text))
    assert sparsifier.masks["weight"].flatten().nonzero().flatten().tolist() == [6]


# --- draws without replacement


def masks_of(selection, scores, keep, draws):
    """Count how often each set of pieces is kept, by whole sparsifiers' first masks over many seeds."""
    text = f"sparsity: {1 - keep / len(scores)}\nselection: {selection}\ntarget: {{weights: {{include: ['*']}}}}"
    chosen, counts = recipe(text), {}
    for seed in range(draws):
        model = nn.Linear(len(scores), 1, bias=False)
        model.weight.data = torch.tensor([scores])
        kept = tuple(niwaki.Sparsifier(model, chosen, seed=seed).masks["weight"].flatten().nonzero().flatten().tolist())
        counts[kept] = counts.get(kept, 0) + 1
    return counts


@pytest.mark.parametrize(
    ("selection", "weights"),
    [
        ("gumbel", [3.0, 1.0, 1.0, 2.0]),
        ("{gumbel: {temperature: 0.5}}", [9.0, 1.0, 1.0, 4.0]),
        ("{gumbel: {weights: exponential, temperature: 2}}", [math.exp(s / 2) for s in (3.0, 1.0, 1.0, 2.0)]),
    ],
)
def test_gumbel_draws_one_after_the_other(selection, weights):
    draws, whole = 500, sum(weights)

    def chance(a, b):
        first, second = weights[a], weights[b]
        return first / whole * second / (whole - first) + second / whole * first / (whole - second)

    counts = masks_of(selection, [3.0, 1.0, 1.0, -2.0], 2, draws)
    pairs = list(itertools.combinations(range(4), 2))
    assert set(counts) <= set(pairs)
    assert stats.chisquare([counts.get(pair, 0) for pair in pairs], [draws * chance(*pair) for pair in pairs]).pvalue > 1e-3


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.sampled_from(["uniform", "global", "{uniform: {per: row}}"]), st.integers(0, 3))
def test_gumbel_counts_are_exact(percent, allocation, seed):
    model = nn.ModuleList([nn.Linear(9, 7, bias=False), nn.Conv2d(3, 5, 2, bias=False)])
    model[0].weight.data[2:5] = 0.0  # weight 0 comes last, and comes if it must
    text = f"sparsity: {1 - percent / 60}\nallocation: {allocation}\nselection: gumbel\ntarget: {{weights: {{include: ['*']}}}}"
    masks = niwaki.Sparsifier(model, recipe(text), seed=seed).masks
    assert masks.active == max(round(percent / 60 * masks.total), 2)
    if "row" in allocation:
        rows = masks["0.weight"].sum(dim=1)
        assert rows.max() - rows.min() <= 1


def test_pieces_without_weight_are_drawn_last_and_by_index():
    scores = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0])
    keys = Gumbel().keys(scores, uniform(5, 0, 5), "w")
    assert keys.argsort(descending=True, stable=True)[2:].tolist() == [0, 2, 4]


def test_every_update_draws_anew_and_at_random_places_of_a_pattern():
    model = net()
    text = "granularity: 2:4\nselection: gumbel\nrelaxation: latent\ngradient: dense\nschedule: {constant: {every: 1 steps, end: 1 run}}"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=4).attach(optimizer)
    hashes = set()
    for _ in range(4):
        model(batch(0)[0]).sum().backward()
        optimizer.step()
        assert set(sparsifier.masks["fc1.weight"].view(-1, 4).sum(dim=1).tolist()) == {2}
        hashes.add(sparsifier.masks.hash())
    assert len(hashes) == 4


# --- each piece by itself


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.data())
def test_chances_add_up_to_the_count_and_are_in_proportion(scores, data):
    scores = [0.0 if score < 1e-6 else score for score in scores]
    keep = data.draw(st.integers(0, len(scores)))
    found = Bernoulli().chances(Bernoulli().log_weights(torch.tensor(scores, dtype=torch.float64), "w"), keep).tolist()
    some = [score for score in scores if score]
    if keep >= len(some):
        rest = len(scores) - len(some)
        expected = [1.0 if score else (keep - len(some)) / rest for score in scores]
    else:
        scale = optimize.brentq(lambda e: sum(min(1.0, e * s) for s in scores) - keep, 0.0, 1e8, xtol=1e-15, rtol=1e-14)
        expected = [min(1.0, scale * score) for score in scores]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert math.fsum(found) == pytest.approx(keep, rel=1e-9, abs=1e-9)


def test_infinite_weights_are_certain():
    chances = Bernoulli().chances(torch.tensor([math.inf, 0.0, math.inf, 1.0]), 3)
    assert chances.tolist() == [1.0, 0.5, 1.0, 0.5]


def test_bernoulli_draws_every_piece_by_itself():
    draws = 500
    counts = masks_of("bernoulli", [4.0, 1.0, 1.0, -2.0], 2, draws)
    chances = [1.0, 0.25, 0.25, 0.5]
    expected = {}
    for kept in itertools.product([False, True], repeat=4):
        expected[tuple(i for i, k in enumerate(kept) if k)] = math.prod(p if k else 1 - p for p, k in zip(chances, kept, strict=True))
    possible = [kept for kept, chance in expected.items() if chance]
    assert set(counts) <= set(possible)
    assert stats.chisquare([counts.get(kept, 0) for kept in possible], [draws * expected[kept] for kept in possible]).pvalue > 1e-3


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_bernoulli_keeps_as_many_as_asked_on_average(allocation):
    model = nn.ModuleList([nn.Linear(60, 50, bias=False), nn.Linear(40, 30, bias=False)])
    text = f"sparsity: 0.7\nallocation: {allocation}\nselection: bernoulli\ntarget: {{weights: {{include: ['*']}}}}"
    masks = [niwaki.Sparsifier(model, recipe(text), seed=seed).masks for seed in range(2)]
    for mask in masks:
        assert abs(mask.active - 0.3 * 4200) < 4 * math.sqrt(4200 * 0.25)
    assert masks[0] != masks[1]
    if allocation == "uniform":
        assert abs(int(masks[0]["0.weight"].sum()) - 900) < 4 * math.sqrt(3000 * 0.25)


def test_a_tensor_of_which_nothing_is_drawn_keeps_one():
    for seed in range(20):
        model = nn.Linear(10, 1, bias=False)
        text = "sparsity: 0.9\nselection: bernoulli\ntarget: {weights: {include: ['*']}}"
        assert niwaki.Sparsifier(model, recipe(text), seed=seed).masks.active >= 1


def test_negative_scores_have_no_chance_of_their_own():
    with pytest.raises(InputError, match=r"selection\.gumbel: a score of w is negative, and a chance cannot be; choose weights"):
        Gumbel().keys(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5]), "w")
    assert Gumbel(weights="exponential").keys(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5]), "w").isfinite().all()
    with pytest.raises(InputError, match="w: a score is NaN"):
        Bernoulli().log_weights(torch.tensor([math.nan]), "w")


@pytest.mark.parametrize(
    "data", ["gumbel", {"bernoulli": {"weights": "exponential"}}, {"hysteresis": {"rate": 0.5}}, {"threshold": {"value": 1.0}}]
)
def test_data_round_trip(data):
    assert build("selection", data).to_data() == data


@pytest.mark.parametrize("schedule", ["{constant: {every: 1 steps, end: 1 run}}", "{cubic: {every: 1 steps, end: 1 run}}"])
def test_hard_masks_of_which_chance_has_left_fewer_than_asked_stay(schedule):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = niwaki.Sparsifier(model, recipe(f"sparsity: 0.5\nselection: bernoulli\nschedule: {schedule}"), total_steps=20)
    sparsifier.attach(optimizer)
    before = sparsifier.masks
    for step in range(20):
        optimizer.zero_grad()
        functional.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
        assert all(not (mask & ~before[name]).any() for name, mask in sparsifier.masks.items())
        before = sparsifier.masks
    assert sparsifier.finalize().sparsity == pytest.approx(0.5, abs=0.02)


def test_nothing_is_drawn_of_a_tensor_that_was_emptied():
    masks = niwaki.Masks({"fc2.weight": torch.zeros(16, 24, dtype=torch.bool)})
    sparsifier = niwaki.Sparsifier(net(), recipe("sparsity: 0.8\nselection: bernoulli"), masks=masks)
    assert not sparsifier.masks["fc2.weight"].any()
    assert 0.7 < sparsifier.sparsity < 0.9
