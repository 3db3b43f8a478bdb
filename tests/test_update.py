"""One mask update on whole models: counts are exact at every sparsity, granularity and allocation, whatever the weights are."""

import math
import warnings

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import recipe
from torch import nn

import niwaki

VALUES = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.0, -1.0, 1.0000001, 2.5, torch.inf, -torch.inf]
"""Zeros of both signs, denormals, ties, infinities."""

GRANULARITIES = {
    "element": lambda m: m.weight.numel(),
    "kernel": lambda m: m.weight.shape[0] * m.weight.shape[1],  # for a linear layer a kernel is one weight
    "output_channel": lambda m: m.weight.shape[0],
    "input_channel": lambda m: m.weight.shape[1] * getattr(m, "groups", 1),
    "{block: {rows: 2, columns: 3, remainder: pad}}": lambda m: (
        getattr(m, "groups", 1)
        * math.ceil(m.weight.shape[0] // getattr(m, "groups", 1) / 2)
        * math.ceil(m.weight.shape[1] / 3)
        * math.prod(m.weight.shape[2:])
    ),
    "{vector: {length: 4, dimension: input, remainder: pad}}": lambda m: (
        m.weight.shape[0] * math.ceil(m.weight.shape[1] / 4) * math.prod(m.weight.shape[2:])
    ),
}

ALLOCATIONS = ["uniform", "global", "erdos_renyi", "erdos_renyi_kernel"]

modules = st.one_of(
    st.builds(nn.Linear, st.integers(1, 9), st.integers(1, 9), bias=st.just(False)),
    st.builds(nn.Conv2d, st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), bias=st.just(False)),
    st.builds(lambda g, k: nn.Conv1d(2 * g, 3 * g, k, groups=g, bias=False), st.integers(2, 3), st.integers(1, 3)),
)


@st.composite
def models(draw):
    layers = draw(st.lists(modules, min_size=1, max_size=4))
    for layer in layers:
        values = st.just(0.5) if draw(st.booleans()) else st.sampled_from(VALUES)
        numel = layer.weight.numel()
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(draw(st.lists(values, min_size=numel, max_size=numel))).view(layer.weight.shape))
    return nn.ModuleList(layers)


def pieces_of(mask, module, granularity):
    """How many pieces the mask keeps, each wholly kept or wholly masked, counted by brute force on the weight itself."""
    groups = getattr(module, "groups", 1)
    view = mask.view(groups, mask.shape[0] // groups, *mask.shape[1:]).flatten(3) if mask.ndim > 2 else mask[None, :, :, None]
    found = []
    for g in range(groups):
        rows, columns, kernel = view[g].shape
        if granularity == "element":
            found += list(view[g].reshape(-1, 1))
        elif granularity == "kernel":
            found += list(view[g].reshape(rows * columns, kernel))
        elif granularity == "output_channel":
            found += list(view[g].reshape(rows, -1))
        elif granularity == "input_channel":
            found += list(view[g].transpose(0, 1).reshape(columns, -1))
        else:
            r, c = (2, 3) if "block" in granularity else (1, 4)
            found += [view[g][i : i + r, j : j + c, k] for i in range(0, rows, r) for j in range(0, columns, c) for k in range(kernel)]
    assert all(piece.all() or not piece.any() for piece in found)
    return len(found), sum(bool(piece.all()) for piece in found)


@settings(max_examples=300)
@given(
    models(), st.sampled_from(sorted(GRANULARITIES)), st.sampled_from(["uniform", "global", "erdos_renyi", "erdos_renyi_kernel"]), st.data()
)
def test_counts_are_exact(model, granularity, allocation, data):
    sparsity = data.draw(st.one_of(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999]), st.floats(0.0, 1.0, exclude_max=True)))
    norm = data.draw(st.sampled_from(["l1", "l2"]))
    text = f"sparsity: {sparsity!r}\ngranularity: {granularity}\nallocation: {allocation}\nsaliency: {{magnitude: {{norm: {norm}}}}}"
    chosen = recipe(text).replace(target={"weights": {"include": ["*"]}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = niwaki.Sparsifier(model, chosen).masks
    counted = [pieces_of(masks[f"{i}.weight"], layer, granularity) for i, layer in enumerate(model)]
    assert [n for n, _ in counted] == [GRANULARITIES[granularity](layer) for layer in model]
    total = sum(n for n, _ in counted)
    assert sum(k for _, k in counted) == max(round((1 - sparsity) * total), len(model))
    assert all(k >= 1 for _, k in counted)
    for i, layer in enumerate(model):
        assert not layer.weight[~masks[f"{i}.weight"]].view(torch.int32).any()


@settings(max_examples=200)
@given(models(), st.floats(0.0, 1.0, exclude_max=True))
@example(nn.ModuleList([nn.Linear(3, 3, bias=False)]), 0.5)
def test_global_elements_are_the_largest_and_ties_keep_the_lower_index(model, sparsity):
    scores = [abs(v) for layer in model for v in layer.weight.detach().flatten().tolist()]
    owner = [i for i, layer in enumerate(model) for _ in range(layer.weight.numel())]
    keep = max(round((1 - sparsity) * len(scores)), len(model))
    best = {i: min((j for j in range(len(scores)) if owner[j] == i), key=lambda j: (-scores[j], j)) for i in range(len(model))}
    expected: set[int] = set()
    forced: set[int] = set()
    while True:  # the guard, by its definition: an emptied layer keeps its best element, and the rest is ranked anew
        rest = sorted((j for j in range(len(scores)) if j not in forced), key=lambda j: (-scores[j], j))
        expected = forced | set(rest[: keep - len(forced)])
        emptied = set(range(len(model))) - {owner[j] for j in expected}
        if not emptied:
            break
        forced |= {best[i] for i in emptied}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = recipe(f"sparsity: {sparsity!r}\nallocation: global").replace(target={"weights": {"include": ["*"]}})
        masks = niwaki.Sparsifier(model, chosen).masks
    flat = torch.cat([masks[f"{i}.weight"].flatten() for i in range(len(model))])
    assert set(flat.nonzero().flatten().tolist()) == expected


@settings(max_examples=100)
@given(models(), st.lists(st.floats(0.0, 0.99), min_size=2, max_size=6), st.sampled_from(["uniform", "global", "erdos_renyi_kernel"]))
@example(nn.ModuleList(nn.Linear(n, 1, bias=False) for n in (2, 2, 5)), [0.33, 0.36], "uniform")  # 1, 1, 4 pieces, then 2, 1, 3
@example(nn.ModuleList(nn.Linear(n, 1, bias=False) for n in (2, 3, 4)), [0.33, 0.36], "erdos_renyi_kernel")
def test_a_rising_schedule_never_revives_and_stays_exact(model, levels, allocation):
    """Rounding may ask a layer for one piece more than it has left; nothing comes back, and totals hold at every step."""
    levels = sorted(levels)
    text = f"allocation: {allocation}\nschedule: {{list: {{sparsity: {levels!r}, every: 1 steps}}}}"
    chosen = recipe(text).replace(target={"weights": {"include": ["*"]}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier = niwaki.Sparsifier(model, chosen, total_steps=len(levels)).attach(optimizer)
        before = sparsifier.masks
        for step, level in enumerate(levels):
            optimizer.step()
            masks = sparsifier.masks
            assert masks.active == max(round((1 - level) * masks.total), len(model)), step
            assert (masks - before).active == 0
            before = masks
