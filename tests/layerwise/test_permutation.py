"""Orders of columns for N:M, against all orders where there are few."""

import itertools

import pytest
import torch

from niwaki.layerwise.permutation import Reading, best_order, kept_score, ordered, permute


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept_by_loop(scores, n, m):
    return sum(sum(sorted(row[i : i + m].tolist(), reverse=True)[:n]) for row in scores for i in range(0, len(row), m))


@pytest.mark.parametrize(("columns", "n", "m"), [(8, 2, 4), (7, 2, 4), (6, 1, 2), (5, 3, 3), (3, 2, 5)])
def test_what_a_pattern_keeps(columns, n, m):
    scores = uniform(4, columns)
    assert kept_score(scores, n, m) == pytest.approx(kept_by_loop(scores, n, m), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("columns", "n", "m"), [(8, 2, 4), (6, 1, 2), (7, 2, 4), (6, 2, 3)])
def test_the_best_of_all_orders_is_found_where_there_are_few(columns, n, m, seed):
    scores = uniform(3, columns, seed=seed) ** 3
    groups = [range(i, min(i + m, columns)) for i in range(0, columns, m)]
    firsts = itertools.combinations(range(columns), m)  # two groups: one choice says all; for three the rest is split again
    best = 0.0
    for first in firsts:
        rest = [c for c in range(columns) if c not in first]
        seconds = itertools.combinations(rest, len(groups[1])) if len(groups) == 3 else [rest]
        for second in seconds:
            last = [c for c in rest if c not in second]
            best = max(best, kept_by_loop(scores[:, [*first, *second, *last]], n, m))
    order = permute(scores, n, m, restarts=20, seed=seed)
    assert sorted(order.tolist()) == list(range(columns))
    assert kept_score(scores[:, order], n, m) == pytest.approx(best, rel=1e-12)


def test_more_is_kept_and_never_less():
    scores = uniform(16, 32) ** 4 * uniform(32, seed=1)
    plain = permute(scores, 2, 4, restarts=0)
    mixed = permute(scores, 2, 4, restarts=5)
    before, after, best = (kept_score(s, 2, 4) for s in (scores, scores[:, plain], scores[:, mixed]))
    assert before * 1.02 < after <= best
    already = permute(scores[:, mixed], 2, 4, restarts=5)
    assert kept_score(scores[:, mixed][:, already], 2, 4) >= best


def test_the_seed_decides():
    scores = uniform(8, 40, seed=3)
    assert torch.equal(permute(scores, 2, 4, seed=1), permute(scores, 2, 4, seed=1))


def test_several_matrices_and_columns_that_stay():
    """One reads the units in order, one in reverse behind other columns, and one with every second column its own."""
    units = 8
    readings = [
        Reading(uniform(3, 8, seed=1) ** 3, torch.arange(8)),
        Reading(uniform(2, 11, seed=2) ** 3, 10 - torch.arange(8)),
        Reading(uniform(4, 16, seed=3) ** 3, 2 * torch.arange(8) + 1),
    ]
    order = best_order(readings, 2, 4, restarts=3)
    assert sorted(order.tolist()) == list(range(units))

    def total(chosen):
        return sum(kept_by_loop(ordered(r, torch.tensor(chosen)), 2, 4) for r in readings)

    before, after = total(range(units)), total(order.tolist())
    assert after > before
    swaps = []
    for a, b in itertools.combinations(range(units), 2):
        other = order.tolist()
        other[a], other[b] = other[b], other[a]
        swaps.append(other)
    assert max(map(total, swaps)) <= after * (1 + 1e-9)  # no exchange gains any more
    fixed = ordered(readings[1], order)
    assert torch.equal(fixed[:, :3], readings[1].scores[:, :3])


def test_nothing_to_gain():
    assert permute(torch.ones(2, 8), 2, 4).tolist() == list(range(8))
    assert permute(torch.zeros(2, 8), 2, 4).tolist() == list(range(8))
    assert permute(uniform(3, 4), 2, 4).tolist() == list(range(4))
