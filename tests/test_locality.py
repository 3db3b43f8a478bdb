"""Growth by where a connection would be, against enumerations and frequencies."""

import itertools
import math
import warnings

import pytest
import torch
from scipy import stats
from support import net, recipe, train
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.calibration import Watched, collect
from niwaki.component import build
from niwaki.granularity import Element, Kernel
from niwaki.layout import Layout, layout_of
from niwaki.saliency import Observation
from niwaki.statistics import Coactivity

LINEAR = Layout(("output", "input"), (4, 5))
ACTIVE = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


def score(by, layout=LINEAR, active=ACTIVE, granularity=None, step=1, **fields):
    options = {"radius": fields.pop("radius")} if "radius" in fields else {}
    seen = Observation("w", torch.zeros(layout.shape), seed=3, step=step, layout=layout, active=active, **fields)
    granularity = granularity or Element()
    return build("growth", {"locality": {"by": by, **options}}).score(seen, lambda values: granularity.reduce(values, layout))


def paths_of_three(active):
    """Paths i - j' - i' - j without a link or unit twice, counted one by one."""
    rows, columns = active.shape
    count = torch.zeros(rows, columns)
    for i, j, other_i, other_j in itertools.product(range(rows), range(columns), range(rows), range(columns)):
        if other_i != i and other_j != j and active[i, other_j] and active[other_i, other_j] and active[other_i, j]:
            count[i, j] += 1
    return count


def test_paths_are_all_that_there_are():
    active = torch.rand(6, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    layout = Layout(("output", "input"), (6, 7))
    assert torch.equal(score("paths", layout, active), paths_of_three(active).double())


def test_paths_of_a_grouped_convolution_are_between_channels_of_a_group():
    layout = layout_of(nn.Conv2d(4, 6, 3, groups=2), "weight", (6, 2, 3, 3))
    active = torch.rand(layout.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    found = score("paths", layout, active)
    for group in range(2):
        expected = paths_of_three(active[group].flatten(2).any(dim=2))
        assert torch.equal(found[group], expected[:, :, None, None].expand(3, 2, 3, 3).double())
    assert found.any()
    of_kernels = score("paths", layout, active, Kernel())
    assert torch.equal(of_kernels, found.sum(dim=(-1, -2), keepdim=True))


def attachment(active):
    degrees_out, degrees_in = active.sum(dim=1).tolist(), active.sum(dim=0).tolist()
    return {(i, j): (degrees_out[i] + 1) * (degrees_in[j] + 1) for i in range(4) for j in range(5) if not active[i, j]}


def drawn(count, step):
    keys = score("degree", step=step).masked_fill(ACTIVE, -torch.inf).flatten()
    return tuple(sorted(divmod(int(k), 5) for k in keys.topk(count).indices))


def test_one_weight_is_drawn_with_the_chances_of_preferential_attachment():
    chances, draws = attachment(ACTIVE), 6000
    counts = dict.fromkeys(chances, 0)
    for step in range(draws):
        counts[drawn(1, step)[0]] += 1
    expected = [draws * chance / sum(chances.values()) for chance in chances.values()]
    assert stats.chisquare(list(counts.values()), expected).pvalue > 1e-3
    alike = [draws / len(chances)] * len(chances)
    assert stats.chisquare(list(counts.values()), alike).pvalue < 1e-9  # the test would see chances that are all alike


def test_two_weights_are_drawn_one_after_the_other_without_replacement():
    chances, draws = attachment(ACTIVE), 12000
    whole = sum(chances.values())

    def chance(a, b):
        return chances[a] / whole * chances[b] / (whole - chances[a]) + chances[b] / whole * chances[a] / (whole - chances[b])

    pairs = {tuple(sorted(pair)): chance(*pair) for pair in itertools.combinations(chances, 2)}
    assert math.isclose(sum(pairs.values()), 1.0)
    counts = dict.fromkeys(pairs, 0)
    for step in range(draws):
        counts[drawn(2, step)] += 1
    assert stats.chisquare(list(counts.values()), [draws * p for p in pairs.values()]).pvalue > 1e-3


def test_near_units_come_first_and_at_random():
    layout = Layout(("output", "input"), (5, 12))
    found = score("spatial", layout, None, radius=0.4)
    near = torch.zeros(5, 12, dtype=torch.bool)
    for i, j in itertools.product(range(5), range(12)):  # grids of 3 x 3 and 4 x 4 places, filled row by row
        apart = math.dist(((i // 3 + 0.5) / 3, (i % 3 + 0.5) / 3), ((j // 4 + 0.5) / 4, (j % 4 + 0.5) / 4))
        near[i, j] = apart < 0.4
    assert 10 < near.sum() < 50
    assert torch.equal(found >= 1.0, near)
    assert stats.kstest(score("spatial", Layout(("output", "input"), (50, 60)), None, radius=9.0).flatten() - 1, "uniform").pvalue > 1e-3


MODULES = [
    (nn.Linear(5, 4), (6, 5)),
    (nn.Linear(5, 4, bias=False), (2, 3, 5)),
    (nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), (3, 4, 7, 6)),
    (nn.Conv1d(3, 2, 2, dilation=2, padding=1), (3, 3, 8)),
]


@pytest.mark.parametrize(("module", "shape"), MODULES)
def test_coactivity_is_the_mean_product_of_what_a_module_reads_and_puts_out(module, shape):
    module = module.double()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(shape, generator=generator, dtype=torch.float64).relu() for _ in range(2)]
    layout = layout_of(module, "weight", tuple(module.weight.shape))
    requests = [Coactivity(), Coactivity(normalized=True)]
    found = collect(module, [(x, None) for x in batches], None, [Watched("weight", module.weight, layout)], requests)["weight"]
    inputs = torch.cat(batches).double()
    with torch.no_grad():
        outputs = module(inputs)
    groups = getattr(module, "groups", 1)
    if isinstance(module, nn.Linear):
        read, put = inputs.flatten(0, -2)[:, None], outputs.flatten(0, -2)[:, None]
    else:
        two = isinstance(module, nn.Conv2d)
        wide = {"kernel_size": module.kernel_size, "stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        wide = {k: v if two else (1, *v) if k != "padding" else (0, *v) for k, v in wide.items()}
        columns = functional.unfold(inputs if two else inputs[:, :, None], **wide)  # [examples, channels x kernel, places]
        read = columns.movedim(1, -1).reshape(-1, groups, columns.shape[1] // groups)
        put = outputs.flatten(2).movedim(1, -1).reshape(-1, groups, outputs.shape[1] // groups)
    products = torch.einsum("ngr,ngc->grc", put, read) / len(read)
    sizes = put.square().mean(0)[:, :, None] * read.square().mean(0)[:, None]
    torch.testing.assert_close(found[Coactivity()], products, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[Coactivity(normalized=True)], (products / sizes.sqrt()).nan_to_num(0.0), rtol=1e-12, atol=1e-14)
    assert found[Coactivity(normalized=True)].abs().max() <= 1 + 1e-12


def test_units_that_are_active_together_are_connected():
    together = torch.tensor([[[0.1, -3.0, 0.2, 0.0, 1.0]] * 4])
    for by, request in (("hebbian", Coactivity()), ("similarity", Coactivity(normalized=True))):
        assert torch.equal(score(by, statistics={request: together}), together[0].abs())
        assert build("growth", {"locality": {"by": by}}).statistics == (request,)


@pytest.mark.parametrize("by", ["degree", "hebbian", "paths", "similarity", "spatial"])
def test_counts_are_exact_in_a_training(by):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    text = f"sparsity: 0.8\nschedule: {{constant: {{every: 3 steps, end: 1 run}}}}\ngrowth: {{locality: {{by: {by}}}}}"
    data = [(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.long))]
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=12, data=data).attach(optimizer)
    first, hashes = sparsifier.masks, set()
    train(model, [optimizer], range(12), lambda step: hashes.add(sparsifier.masks.hash()))
    assert {n: int(m.sum()) for n, m in sparsifier.masks.items()} == {n: round(0.2 * m.numel()) for n, m in first.items()}
    assert len(hashes) > 3


def test_what_looks_at_activity_needs_data():
    text = "sparsity: 0.8\nschedule: {constant: {every: 3 steps}}\ngrowth: {locality: {by: hebbian}}"
    with pytest.raises(niwaki.InputError, match="growth: 'locality' needs data= to collect Coactivity"):
        niwaki.Sparsifier(net(), recipe(text), total_steps=12)


def test_hubs_become_more_likely_to_be_connected_than_by_chance():
    """Preferential attachment makes degrees more unequal than random growth does, other things alike."""

    def spread(growth):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        text = "sparsity: 0.9\nsaliency: random\ntarget: {weights: {include: ['*']}}\n"
        text += f"schedule: {{constant: {{every: 1 steps, end: 1 run}}}}\ngrowth: {growth}"
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=60).attach(optimizer)
        for _ in range(60):
            model(torch.ones(1, 64)).sum().backward()
            optimizer.step()
        [mask] = sparsifier.masks.values()
        return float(mask.sum(dim=0).double().var() + mask.sum(dim=1).double().var())

    assert spread("{locality: {by: degree, fraction: 0.3}}") > 1.5 * spread("{random: {fraction: 0.3}}")
