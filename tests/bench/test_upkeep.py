import json

import pytest
import torch
from torch import nn

from niwaki.bench import upkeep


@pytest.fixture
def small(monkeypatch):
    workload = upkeep.Workload(
        "three small layers",
        lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)),
        lambda: (torch.randn(4, 8), torch.randint(3, (4,))),
        nn.functional.cross_entropy,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )
    monkeypatch.setattr(upkeep, "WORKLOADS", {"small": workload})


def test_rows_say_what_was_measured(small):
    done = []
    rows = upkeep.run(["small"], rounds=12, progress=lambda at, of: done.append((at, of)))
    assert [(row["network"], row["method"]) for row in rows] == [("small", "gmp"), ("small", "rigl")]
    assert done == [(i, 15) for i in range(1, 16)]
    gmp, rigl = rows
    assert gmp["steps"] == 12
    assert rigl["steps"] == 10  # of the steps 4 to 15, those before which masks changed (5 and 10 taken) do not count
    assert gmp["update_ms"] is None
    for row in rows:
        assert 0 < row["hooks_ms"] < row["masked_step_ms"]
        assert row["upkeep_by_hooks"] == pytest.approx(row["hooks_ms"] / row["dense_step_ms"])
        assert row["upkeep_by_steps"] == pytest.approx(row["masked_step_ms"] / row["dense_step_ms"] - 1)
    assert rigl["update_amortised"] == pytest.approx(rigl["update_ms"] / 100 / rigl["dense_step_ms"])
    json.dumps(rows, allow_nan=False)
    assert upkeep.table(rows).row_count == 2


def test_timing_does_not_change_what_the_hooks_do(small):
    workload = upkeep.WORKLOADS["small"]
    trainer = upkeep._trainer(workload, "rigl", 0.75, rounds=12)
    batch = workload.batch()
    masks = trainer.sparsifier.masks
    for step in range(6):
        trainer.step(batch)
        assert trainer.in_hooks > 0
        active = trainer.sparsifier.masks
        assert all((dict(trainer.model.named_parameters())[name][~mask] == 0).all() for name, mask in active.items())
        assert (active == masks) == (step < 5)
    assert len(trainer.update_hooks) == 2  # the start, whose masks were already there, and the sixth
