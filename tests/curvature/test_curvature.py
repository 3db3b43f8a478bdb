"""Curvatures against dense matrices and numpy."""

import numpy as np
import pytest
import torch

from niwaki.curvature import DenseCurvature, KroneckerCurvature, LowRankCurvature, RowsCurvature
from niwaki.curvature import kronecker as kronecker_module
from niwaki.errors import InputError
from niwaki.layout import Layout, from_matrix, matrix

LINEAR = Layout(("output", "input"), (5, 6))
LAYOUTS = {
    "linear": LINEAR,
    "transposed": Layout(("input", "output"), (4, 5)),
    "grouped": Layout(("group", "output", "input", "kernel"), (2, 3, 2, 3)),
    "stacked": Layout(("stack", "output", "input"), (2, 2, 4)),
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite(n, seed=0):
    root = random(n, n + 3, seed=seed)
    return root @ root.T / n


def some(layout, seed, share=0.7):
    return torch.rand(layout.shape, generator=torch.Generator().manual_seed(seed)) < share


def sizes(layout):
    return (
        layout.size("group"),
        layout.size("stack") * layout.size("output"),
        layout.elements // layout.size("group") // (layout.size("stack") * layout.size("output")),
    )


def everything(layouts):
    return {name: torch.ones(layout.shape, dtype=torch.bool) for name, layout in layouts.items()}


def in_matrix_order(layout):
    """Flat indices in the order of the matrix form."""
    return matrix(torch.arange(layout.elements).view(layout.shape), layout).flatten().numpy()


def dense(curvature_of, layouts):
    """Each curvature's matrix over all tensors, one after the other in their views."""
    total = sum(layout.elements for layout in layouts.values())
    whole, start = np.zeros((total, total)), 0
    for name, layout in layouts.items():
        order = start + in_matrix_order(layout)
        whole[np.ix_(order, order)] = curvature_of(name, layout)
        start += layout.elements
    return whole


def make_dense(layouts, active, seed=0):
    whole = definite(sum(layout.elements for layout in layouts.values()), seed)
    return DenseCurvature(whole, active), whole.numpy()


def make_rows(layouts, active, seed=0):
    grams = {}
    for i, (name, layout) in enumerate(layouts.items()):
        groups, _, columns = sizes(layout)
        grams[name] = torch.stack([definite(columns, seed + 10 * i + g) for g in range(groups)])

    def one(name, layout):
        groups, rows, columns = sizes(layout)
        blocks = [2 * grams[name][g].numpy() for g in range(groups) for _ in range(rows)]
        found = np.zeros((layout.elements, layout.elements))
        for i, block in enumerate(blocks):
            found[i * columns : (i + 1) * columns, i * columns : (i + 1) * columns] = block
        return found

    return RowsCurvature(grams, layouts, active), dense(one, layouts)


def make_kronecker(layouts, active, seed=0, damping=0.01):
    factors = {}
    for i, (name, layout) in enumerate(layouts.items()):
        groups, rows, columns = sizes(layout)
        a = torch.stack([definite(columns, seed + 10 * i + g) for g in range(groups)])
        factors[name] = a, torch.stack([definite(rows, seed + 10 * i + g + 5) / 10 for g in range(groups)])

    def one(name, layout):
        _, rows, columns = sizes(layout)
        found, size = np.zeros((layout.elements, layout.elements)), rows * columns
        for g, (a, b) in enumerate(zip(*factors[name], strict=True)):
            a, b = a.numpy(), b.numpy()
            pi = np.sqrt((np.trace(a) / columns) / (np.trace(b) / rows))
            whole = np.kron(b + np.sqrt(damping) / pi * np.eye(rows), a + pi * np.sqrt(damping) * np.eye(columns))
            found[g * size : (g + 1) * size, g * size : (g + 1) * size] = whole
        return found

    return KroneckerCurvature(factors, layouts, active, damping), dense(one, layouts)


def make_low_rank(layouts, active, seed=0, *, gradients, block=None, joint=False, damping=0.1):
    banks = {name: random(gradients, *layout.shape, seed=seed + i) for i, (name, layout) in enumerate(layouts.items())}
    rows = torch.cat([bank.flatten(1) for bank in banks.values()], 1).numpy()
    whole = rows.T @ rows / gradients
    if not joint:
        label = np.concatenate([1000 * i + np.arange(n.elements) // (block or n.elements) for i, n in enumerate(layouts.values())])
        whole = whole * (label[:, None] == label)
    return LowRankCurvature(banks, active, damping, block=block, joint=joint), whole + damping * np.eye(len(whole))


def low_rank(**settings):
    def make(layouts, active, seed=0):
        return make_low_rank(layouts, active, seed, **settings)

    return make


MAKERS = {
    "dense": make_dense,
    "rows": make_rows,
    "kronecker": make_kronecker,
    "blocks of more weights than gradients": low_rank(gradients=4, block=9),
    "blocks of fewer weights": low_rank(gradients=12, block=7),
    "blocks of both kinds": low_rank(gradients=7, block=8),
    "whole tensors": low_rank(gradients=6),
    "all tensors": low_rank(gradients=8, joint=True),
    "all tensors, many gradients": low_rank(gradients=120, joint=True),
}


def flat(vector, layouts):
    return np.concatenate([vector[name].numpy().ravel() for name in layouts])


def views(values, layouts):
    parts = np.split(values, np.cumsum([layout.elements for layout in layouts.values()])[:-1])
    return {name: torch.tensor(part).view(layout.shape) for (name, layout), part in zip(layouts.items(), parts, strict=True)}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.mark.parametrize("masked", [False, True])
def test_every_curvature_is_its_dense_matrix(make, masked):
    active = {name: some(layout, i) for i, (name, layout) in enumerate(LAYOUTS.items())} if masked else everything(LAYOUTS)
    curvature, whole = make(LAYOUTS, active)
    mask = flat(active, LAYOUTS).astype(bool)
    inside = np.flatnonzero(mask)
    inverse = np.linalg.inv(whole[np.ix_(inside, inside)])
    full = np.full((len(mask), len(mask)), 0.0)
    full[np.ix_(inside, inside)] = inverse
    np.fill_diagonal(full, np.where(mask, full.diagonal(), np.inf))

    start = 0
    for name, layout in LAYOUTS.items():
        here = slice(start, start + layout.elements)
        start += layout.elements
        found = curvature.inverse_diagonal(name)
        assert found.shape == layout.shape
        np.testing.assert_allclose(found.numpy().ravel(), full.diagonal()[here], rtol=1e-11)
        index = torch.stack([torch.randperm(layout.elements, generator=torch.Generator().manual_seed(s))[:6] for s in range(5)])
        index[0, 4:] = -1
        blocks = curvature.inverse_blocks(name, index).numpy()
        part = full[here, here]
        for found_one, chosen in zip(blocks, index.numpy(), strict=True):
            size = (chosen >= 0).sum()
            np.testing.assert_allclose(found_one[:size, :size], part[np.ix_(chosen[:size], chosen[:size])], rtol=1e-10, atol=1e-13)
            assert np.isinf(found_one.diagonal()[size:]).all()

    vector = np.where(mask, random(len(mask), seed=3).numpy(), 0.0)
    product = flat(curvature.multiply(views(vector, LAYOUTS)), LAYOUTS)
    np.testing.assert_allclose(product[inside], (whole @ vector)[inside], rtol=1e-10, atol=1e-12)
    assert not product[~mask].any()

    stays = mask & (random(len(mask), seed=4).numpy() > 0)
    expected = np.zeros(len(mask))
    chosen = np.flatnonzero(stays)
    expected[chosen] = np.linalg.solve(whole[np.ix_(chosen, chosen)], vector[chosen])
    solved = curvature.solve(views(stays, LAYOUTS), views(vector, LAYOUTS))
    assert all(solved[name].shape == layout.shape for name, layout in LAYOUTS.items())
    np.testing.assert_allclose(flat(solved, LAYOUTS), expected, rtol=1e-10, atol=1e-12)
    expected[inside] = inverse @ vector[inside]
    np.testing.assert_allclose(flat(curvature.solve(active, views(vector, LAYOUTS)), LAYOUTS), expected * mask, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_costs_are_the_smallest_values_of_the_quadratic_model(make, masked):
    active = {name: some(layout, i) for i, (name, layout) in enumerate(LAYOUTS.items())} if masked else everything(LAYOUTS)
    curvature, whole = make(LAYOUTS, active)
    mask = flat(active, LAYOUTS).astype(bool)
    start = 0
    for name, layout in LAYOUTS.items():
        values = random(layout.elements, seed=7) * active[name].flatten()
        index = torch.randperm(layout.elements, generator=torch.Generator().manual_seed(1))[: layout.elements // 3 * 3].view(3, -1)
        costs = curvature.costs(name, index, values)
        for cost, chosen in zip(costs.tolist(), index.numpy(), strict=True):
            gone = np.zeros(len(mask), dtype=bool)
            gone[start + chosen] = True
            moved, rest = np.flatnonzero(gone & mask), np.flatnonzero(~gone & mask)
            change = np.zeros(len(mask))
            change[moved] = -values.numpy()[moved - start]
            change[rest] = np.linalg.solve(whole[np.ix_(rest, rest)], -whole[np.ix_(rest, moved)] @ change[moved])
            assert cost == pytest.approx(0.5 * change @ whole @ change, rel=1e-10)
        start += layout.elements


def test_a_kronecker_curvature_of_an_irregular_mask_is_exact_whichever_way_it_takes(monkeypatch):
    layout = Layout(("output", "input"), (9, 12))
    active, stays = some(layout, 0, 0.8), some(layout, 1, 0.5)
    curvature, whole = make_kronecker({"w": layout}, {"w": active})
    inside = np.flatnonzero((active & stays).flatten().numpy())
    right = random(*layout.shape)
    expected = np.zeros(layout.elements)
    expected[inside] = np.linalg.solve(whole[np.ix_(inside, inside)], right.numpy().ravel()[inside])
    for direct in (2000, len(inside) - 1, 1):  # itself or what is missing, and conjugate gradients
        monkeypatch.setattr(kronecker_module, "DIRECT", direct)
        found = curvature.solve({"w": stays}, {"w": right})["w"].numpy().ravel()
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    assert curvature.notes == ()
    kept = np.flatnonzero(active.flatten().numpy())
    expected = np.linalg.inv(whole[np.ix_(kept, kept)]).diagonal()
    for direct in (2000, 60):  # of the active weights themselves, and of the few that are missing
        monkeypatch.setattr(kronecker_module, "DIRECT", direct)
        found = make_kronecker({"w": layout}, {"w": active})[0].inverse_diagonal("w").numpy().ravel()[kept]
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    monkeypatch.setattr(kronecker_module, "DIRECT", 1)
    curvature, _ = make_kronecker({"w": layout}, {"w": active})
    np.testing.assert_allclose(curvature.inverse_diagonal("w").numpy().ravel()[kept], np.linalg.inv(whole).diagonal()[kept], rtol=1e-10)
    assert any("without the mask" in note for note in curvature.notes)


def test_kronecker_factors_are_the_exact_fisher_matrix_of_a_linear_gaussian_model():
    # y = W x + noise of covariance R, loss -log p: F = E[x xᵀ] ⊗ R⁻¹ exactly, by the mean over x of ∂²/∂W²
    inputs, noise = random(50, 4), definite(3, 5)
    precision = torch.linalg.inv(noise)
    targets, weight = random(50, 3, seed=2), random(3, 4, seed=3)

    def loss(flat):
        error = targets - inputs @ flat.view(3, 4).T
        return 0.5 * ((error @ precision) * error).sum() / len(inputs)

    hessian = torch.autograd.functional.hessian(loss, weight.flatten()).numpy()
    a, g = (inputs.T @ inputs / 50)[None], precision[None]
    layout = Layout(("output", "input"), (3, 4))
    active = torch.ones(3, 4, dtype=torch.bool)
    curvature = KroneckerCurvature({"w": (a, g)}, {"w": layout}, {"w": active}, damping=0.0)
    inverse = curvature.inverse_blocks("w", torch.arange(12)[None])[0].numpy()
    np.testing.assert_allclose(inverse @ hessian, np.eye(12), atol=1e-10)
    vector = random(3, 4, seed=4)
    np.testing.assert_allclose(curvature.multiply({"w": vector})["w"].numpy().ravel(), hessian @ vector.numpy().ravel(), rtol=1e-10)


def test_float32_gradients_lose_nothing_after_they_were_rounded():
    layouts = {"w": Layout(("output", "input"), (40, 30))}
    bank = random(20, 40, 30).float()
    curvature = LowRankCurvature({"w": bank}, everything(layouts), 1e-3, block=500)
    rows = bank.double().flatten(1).numpy()
    for start in range(0, 1200, 500):
        part = rows[:, start : start + 500]
        inverse = np.linalg.inv(part.T @ part / 20 + 1e-3 * np.eye(part.shape[1]))
        found = curvature.inverse_diagonal("w").numpy().ravel()[start : start + 500]
        np.testing.assert_allclose(found, inverse.diagonal(), rtol=1e-9)


def test_large_banks_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr("niwaki.curvature.woodbury.WORKSPACE", 64 * 5)
    for settings in ({"joint": True}, {"block": 11}):
        curvature, whole = make_low_rank(LAYOUTS, everything(LAYOUTS), gradients=5, **settings)
        vector = random(len(whole), seed=1).numpy()
        np.testing.assert_allclose(flat(curvature.multiply(views(vector, LAYOUTS)), LAYOUTS), whole @ vector, rtol=1e-10, atol=1e-12)
        solved = flat(curvature.solve(curvature.active, views(vector, LAYOUTS)), LAYOUTS)
        np.testing.assert_allclose(solved, np.linalg.solve(whole, vector), rtol=1e-10)
        diagonal = flat({name: curvature.inverse_diagonal(name) for name in LAYOUTS}, LAYOUTS)
        np.testing.assert_allclose(diagonal, np.linalg.inv(whole).diagonal(), rtol=1e-10)


def test_a_window_of_gradients_is_what_a_new_one_would_be():
    active = {name: some(layout, i) for i, (name, layout) in enumerate(LAYOUTS.items())}
    banks = {name: random(6, *layout.shape, seed=i) for i, (name, layout) in enumerate(LAYOUTS.items())}
    later = {name: random(4, *layout.shape, seed=50 + i) for i, (name, layout) in enumerate(LAYOUTS.items())}
    right = {name: random(*layout.shape, seed=9) for name, layout in LAYOUTS.items()}
    window = LowRankCurvature({name: bank.clone() for name, bank in banks.items()}, active, 0.1, joint=True)
    window.solve(window.active, right)  # so that there is something to keep up to date
    for i in range(4):
        window.exchange((i + 3) % 6, {name: gradient[i] for name, gradient in later.items()})
        for name in banks:
            banks[name][(i + 3) % 6] = later[name][i]
        anew = LowRankCurvature(banks, active, 0.1, joint=True)
        for name in LAYOUTS:
            torch.testing.assert_close(window.inverse_diagonal(name), anew.inverse_diagonal(name), rtol=1e-12, atol=0)
            torch.testing.assert_close(window.solve(active, right)[name], anew.solve(active, right)[name], rtol=1e-10, atol=1e-12)
    with pytest.raises(InputError, match="joint"):
        LowRankCurvature(banks, active, 0.1).exchange(0, right)


def test_indefinite_and_singular_matrices_are_damped_and_told():
    active = {"w": torch.ones(3, dtype=torch.bool)}
    indefinite = DenseCurvature(torch.diag(torch.tensor([1.0, -0.5, 2.0])).double(), active)
    assert bool((indefinite.inverse_diagonal("w") > 0).all())
    assert "damping was raised" in indefinite.notes[0]
    dead = DenseCurvature(torch.diag(torch.tensor([1.0, 0.0, 3.0])).double(), active)
    assert dead.notes == ("1 weights do not change the loss: their rows of the Hessian are zero",)
    torch.testing.assert_close(dead.inverse_diagonal("w")[[0, 2]], torch.tensor([1.0, 1 / 3], dtype=torch.float64), rtol=1e-12, atol=0)
    assert float(dead.inverse_diagonal("w")[1]) > 1e6
    layout = Layout(("output", "input"), (1, 3))
    one = random(1, 3)
    rows = RowsCurvature({"w": (one.T @ one)[None]}, {"w": layout}, {"w": torch.ones(1, 3, dtype=torch.bool)})
    assert "damping was raised" in rows.notes[0]
    gram = torch.diag(torch.tensor([2.0, 0.0, 1.0])).double()[None]
    silent = RowsCurvature({"w": gram}, {"w": layout}, {"w": torch.ones(1, 3, dtype=torch.bool)})
    assert silent.notes == ("w: 1 of 3 inputs are always zero",)
    fisher = LowRankCurvature({"w": 1e6 * random(2, 5)}, {"w": torch.ones(5, dtype=torch.bool)}, 1e-9)
    assert "raised" in fisher.notes[0]
    assert bool((fisher.inverse_diagonal("w") > 0).all())
    nothing = LowRankCurvature({"w": torch.zeros(2, 5)}, {"w": torch.ones(5, dtype=torch.bool)}, 0.5)
    assert "zero" in nothing.notes[0]
    assert nothing.inverse_diagonal("w").tolist() == [2.0] * 5
    factors = torch.zeros(1, 3, 3).double(), torch.zeros(1, 1, 1).double()
    silent = KroneckerCurvature({"w": factors}, {"w": layout}, {"w": torch.ones(1, 3, dtype=torch.bool)}, damping=1.0)
    assert "zero" in silent.notes[0]
    assert silent.inverse_diagonal("w").tolist() == [[1.0] * 3]


def test_bad_input_is_told():
    active = {"w": torch.ones(2, dtype=torch.bool)}
    nan = torch.tensor([[1.0, 0.0], [0.0, torch.nan]]).double()
    layout = Layout(("output", "input"), (1, 2))
    cases = [
        (lambda: DenseCurvature(nan, active), "w: its Hessian is not finite"),
        (lambda: DenseCurvature(torch.eye(3).double(), active), r"shape \(3, 3\)"),
        (lambda: DenseCurvature(torch.eye(2).double(), active, memory=100), "1 weights fit"),
        (lambda: RowsCurvature({"w": nan[None]}, {"w": layout}, active), "w: its input gram is not finite"),
        (lambda: LowRankCurvature({"w": nan}, active), "w: its bank of gradients is not finite"),
        (lambda: LowRankCurvature({"w": torch.zeros(0, 2)}, active), "needs gradients"),
        (lambda: LowRankCurvature({"w": torch.ones(1, 2)}, active, 0.0), "damping 0.0"),
        (lambda: KroneckerCurvature({"w": (nan[None], torch.ones(1, 1, 1))}, {"w": layout}, active), "w: its Kronecker factor of inputs"),
    ]
    for function, message in cases:
        with pytest.raises(InputError, match=message):
            function()


def test_a_curvature_follows_the_layout():
    layout = LAYOUTS["grouped"]
    gram = torch.stack([definite(6, g) for g in range(2)])
    curvature = RowsCurvature({"w": gram}, {"w": layout}, everything({"w": layout}))
    expected = torch.linalg.inv(2 * gram).diagonal(dim1=-2, dim2=-1)[:, None, :].expand(2, 3, 6)
    torch.testing.assert_close(curvature.inverse_diagonal("w"), from_matrix(expected, layout), rtol=1e-11, atol=0)
