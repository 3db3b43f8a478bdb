"""The surgeon's update against constrained minima by numpy, and least squares on the support."""

import numpy as np
import pytest
import torch

from niwaki.compensation import Change, Removal, SurgeonUpdate, Units
from niwaki.component import build
from niwaki.curvature import DenseCurvature, KroneckerCurvature, LowRankCurvature, RowsCurvature
from niwaki.errors import InputError
from niwaki.layout import Layout

LAYOUTS = {"a": Layout(("output", "input"), (4, 5)), "b": Layout(("output", "input", "kernel"), (2, 3, 2))}
TOTAL = 32


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def joined(vectors):
    return np.concatenate([vectors[name].numpy().ravel() for name in LAYOUTS])


def split(flat):
    return {"a": torch.as_tensor(flat[:20]).view(4, 5), "b": torch.as_tensor(flat[20:]).view(2, 3, 2)}


def changes(active=None, share=0.6):
    """Weights, what was active, and what stays of it."""
    if active is None:
        active = {name: torch.ones(layout.shape, dtype=torch.bool) for name, layout in LAYOUTS.items()}
    found = {}
    for i, (name, layout) in enumerate(LAYOUTS.items()):
        keep = active[name] & (torch.rand(layout.shape, generator=torch.Generator().manual_seed(i)) < share)
        found[name] = Change(name, layout, random(*layout.shape, seed=10 + i) * active[name], active[name], keep)
    return found


def whole(seed=0):
    root = random(TOTAL, TOTAL + 5, seed=seed)
    return (root @ root.T / TOTAL).numpy()


def minimum(hessian, gradient, weight, active, keep):
    """New weights: the smallest quadratic loss on the support."""
    stay, gone = np.flatnonzero(keep), np.flatnonzero(active & ~keep)
    new = np.zeros_like(weight)
    new[stay] = weight[stay] + np.linalg.solve(hessian[np.ix_(stay, stay)], hessian[np.ix_(stay, gone)] @ weight[gone] - gradient[stay])
    return new


@pytest.mark.parametrize("masked", [False, True])
def test_group_is_the_minimum_on_what_stays(masked):
    active = {name: random(*layout.shape, seed=30 + i) > -0.8 for i, (name, layout) in enumerate(LAYOUTS.items())} if masked else None
    moved = changes(active)
    hessian, gradient = whole(), random(TOTAL, seed=2).numpy()
    flat = [joined({name: getattr(change, what) for name, change in moved.items()}) for what in ("weight", "active", "keep")]
    for used in (np.zeros(TOTAL), gradient * flat[1]):
        given = split(used) if used.any() else None
        curvature = DenseCurvature(torch.tensor(hessian), {n: c.active for n, c in moved.items()}, gradient=given)
        found = SurgeonUpdate().compensate(Removal(moved, curvature=curvature))
        np.testing.assert_allclose(joined(found), minimum(hessian, used, *flat), rtol=1e-10, atol=1e-12)
        # No small step on the support makes the loss smaller.
        change = joined(found) - flat[0]
        slope = used + hessian @ change
        np.testing.assert_allclose(slope[flat[2]], 0, atol=1e-10)


def test_group_equals_the_score_of_the_removed_set():
    moved, hessian = changes(), whole()
    curvature = DenseCurvature(torch.tensor(hessian), {n: c.active for n, c in moved.items()})
    only_a = {"a": moved["a"], "b": Change("b", LAYOUTS["b"], moved["b"].weight, moved["b"].active, moved["b"].active)}
    found = SurgeonUpdate().compensate(Removal(only_a, curvature=curvature))
    change = joined(found) - joined({name: one.weight for name, one in moved.items()})
    gone = (~moved["a"].keep).flatten().nonzero().T
    cost = curvature.costs("a", gone, moved["a"].weight.flatten())
    assert 0.5 * change @ hessian @ change == pytest.approx(float(cost), rel=1e-10)


def test_one_weight_alone_is_the_same_in_all_three_ways():
    moved, hessian = changes(), whole()
    keep = torch.ones(4, 5, dtype=torch.bool)
    keep[1, 2] = False
    moved = {"a": Change("a", LAYOUTS["a"], moved["a"].weight, moved["a"].active, keep), "b": moved["b"]}
    moved["b"] = Change("b", LAYOUTS["b"], moved["b"].weight, moved["b"].active, moved["b"].active)
    weight, inverse = joined({n: c.weight for n, c in moved.items()}), np.linalg.inv(hessian)
    expected = weight - weight[7] / inverse[7, 7] * inverse[:, 7]  # Hassibi & Stork
    expected[7] = 0
    for removal in ("group", "block", "single"):
        curvature = DenseCurvature(torch.tensor(hessian), {n: c.active for n, c in moved.items()})
        found = SurgeonUpdate(removal=removal).compensate(Removal(moved, curvature=curvature))
        np.testing.assert_allclose(joined(found), expected, rtol=1e-10, atol=1e-12)


def test_single_adds_what_each_weight_would_do_alone():
    moved, hessian, gradient = changes(), whole(), random(TOTAL, seed=2).numpy()
    weight, keep = joined({n: c.weight for n, c in moved.items()}), joined({n: c.keep for n, c in moved.items()})
    inverse = np.linalg.inv(hessian)
    for used in (np.zeros(TOTAL), gradient):
        newton = inverse @ used
        change = -newton
        for q in np.flatnonzero(~keep):
            change = change - (weight[q] - newton[q]) / inverse[q, q] * inverse[:, q]
        given = split(used) if used.any() else None
        curvature = DenseCurvature(torch.tensor(hessian), {n: c.active for n, c in moved.items()}, gradient=given)
        found = SurgeonUpdate(removal="single").compensate(Removal(moved, curvature=curvature))
        np.testing.assert_allclose(joined(found), np.where(keep, weight + change, 0), rtol=1e-10, atol=1e-12)


def test_block_adds_what_each_tensor_would_do_alone():
    moved, hessian, gradient = changes(), whole(), random(TOTAL, seed=2).numpy()
    weight, keep = joined({n: c.weight for n, c in moved.items()}), joined({n: c.keep for n, c in moved.items()})
    everything, newton = np.ones(TOTAL, dtype=bool), np.linalg.solve(hessian, gradient)
    first = np.arange(TOTAL) < 20
    for used in (np.zeros(TOTAL), gradient):
        step = newton if used.any() else np.zeros(TOTAL)
        change = -step
        for tensor in (first, ~first):
            alone = minimum(hessian, used, weight, everything, keep | ~tensor) - weight
            change = change + alone + step  # each alone has the gradient's own step, which counts once
        given = split(used) if used.any() else None
        curvature = DenseCurvature(torch.tensor(hessian), {n: c.active for n, c in moved.items()}, gradient=given)
        found = SurgeonUpdate(removal="block").compensate(Removal(moved, curvature=curvature))
        np.testing.assert_allclose(joined(found), np.where(keep, weight + change, 0), rtol=1e-10, atol=1e-12)


def test_layerwise_update_is_least_squares_on_the_support():
    moved = changes()
    inputs = {"a": random(30, 5, seed=1), "b": random(30, 6, seed=2)}
    grams = {name: (x.T @ x / 30)[None] for name, x in inputs.items()}
    curvature = RowsCurvature(grams, LAYOUTS, {n: c.active for n, c in moved.items()})
    found = SurgeonUpdate().compensate(Removal(moved, curvature=curvature))
    for name, x in inputs.items():
        x, rows, keep = x.numpy(), moved[name].weight.flatten(1).numpy(), moved[name].keep.flatten(1).numpy()
        for row, stays, new in zip(rows, keep, found[name].flatten(1).numpy(), strict=True):
            expected = np.zeros(len(row))
            expected[stays] = np.linalg.lstsq(x[:, stays], x @ row, rcond=None)[0]
            np.testing.assert_allclose(new, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("settings", [{"block": 7}, {"joint": True}])
def test_fisher_updates_are_the_minimum_of_their_model(settings):
    moved = changes()
    banks = {name: random(6, *layout.shape, seed=i) for i, (name, layout) in enumerate(LAYOUTS.items())}
    rows = np.concatenate([bank.flatten(1).numpy() for bank in banks.values()], 1)
    fisher = rows.T @ rows / 6
    if "block" in settings:
        label = np.concatenate([np.arange(20) // 7, 10 + np.arange(12) // 7])
        fisher = fisher * (label[:, None] == label)
    curvature = LowRankCurvature(banks, {n: c.active for n, c in moved.items()}, 0.01, **settings)
    found = SurgeonUpdate().compensate(Removal(moved, curvature=curvature))
    flat = [joined({name: getattr(change, what) for name, change in moved.items()}) for what in ("weight", "active", "keep")]
    np.testing.assert_allclose(joined(found), minimum(fisher + 0.01 * np.eye(TOTAL), np.zeros(TOTAL), *flat), rtol=1e-9, atol=1e-11)


def test_units_that_go_take_the_weights_that_make_them_with_them_for_nothing():
    # Unit 1 of three: row 1 of "makes" makes it, column 1 of "reads" reads it.
    layouts = {"makes": Layout(("output", "input"), (3, 2)), "reads": Layout(("output", "input"), (2, 3))}
    stay = torch.tensor([True, False, True])
    keep = {"makes": stay[:, None].expand(3, 2), "reads": stay.expand(2, 3)}
    root = random(12, 15)
    hessian = root @ root.T
    curvature = DenseCurvature(hessian, {n: torch.ones(layout.shape, dtype=torch.bool) for n, layout in layouts.items()})
    moved = {n: Change(n, layout, random(*layout.shape, seed=3), curvature.active[n], keep[n]) for n, layout in layouts.items()}
    numbers = torch.arange(3)
    units = Units("0", stay | True, stay, [("makes", 0, (3, 2), numbers)], [("reads", 1, (2, 3), numbers)])
    found = SurgeonUpdate().compensate(Removal(moved, [units], curvature))
    weight = torch.cat([change.weight.flatten() for change in moved.values()]).numpy()
    mask = torch.cat([values.flatten() for values in keep.values()]).numpy()
    stays, gone = np.flatnonzero(mask), np.flatnonzero(~mask & (np.arange(12) >= 6))
    matrix = hessian.numpy()
    expected = np.zeros(12)
    expected[stays] = weight[stays] + np.linalg.solve(matrix[np.ix_(stays, stays)], matrix[np.ix_(stays, gone)] @ weight[gone])
    np.testing.assert_allclose(torch.cat([values.flatten() for values in found.values()]).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_tensors_without_curvature_are_left_alone_and_notes_are_passed_on(monkeypatch):
    monkeypatch.setattr("niwaki.curvature.kronecker.DIRECT", 0)
    monkeypatch.setattr("niwaki.curvature.kronecker.TOLERANCE", 0.0)
    moved = changes()
    factor, other = random(5, 9, seed=1), random(4, 9, seed=2)
    factors = (factor @ factor.T)[None], (other @ other.T)[None]
    curvature = KroneckerCurvature({"a": factors}, {"a": LAYOUTS["a"]}, {"a": moved["a"].active})
    removal = Removal(moved, curvature=curvature)
    assert set(SurgeonUpdate().compensate(removal)) == {"a"}
    assert len(removal.notes) == 1
    assert "conjugate gradients stopped" in removal.notes[0]


def test_nothing_to_compensate_with_is_told():
    with pytest.raises(InputError, match="has no curvature"):
        SurgeonUpdate().compensate(Removal(changes()))
    assert build("compensation", {"obs": "single"}).removal == "single"
