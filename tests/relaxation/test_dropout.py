"""Dropout of pieces: the draws."""

import pytest
import torch

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.relaxation import Dropout


def test_draws_follow_the_rate_and_differ_between_steps_and_names():
    relaxation = Dropout(rate=0.3)
    draws = torch.stack([relaxation.dropped("a", 0, 1000, 5, step) for step in range(50)])
    assert float(draws.double().mean()) == pytest.approx(0.3, abs=4 * (0.21 / 50_000) ** 0.5)
    assert len({tuple(draw.tolist()) for draw in draws}) == 50
    assert not torch.equal(draws[0], relaxation.dropped("b", 0, 1000, 5, 0))
    assert not torch.equal(draws[0], relaxation.dropped("a", 0, 1000, 6, 0))
    assert torch.equal(draws[3], relaxation.dropped("a", 0, 1000, 5, 3))


def test_shards_draw_what_the_whole_would():
    relaxation = Dropout(rate=0.5)
    whole = relaxation.dropped("a", 0, 10, 0, 7)
    assert torch.equal(torch.cat([relaxation.dropped("a", 0, 4, 0, 7), relaxation.dropped("a", 4, 6, 0, 7)]), whole)


def test_nothing_is_left_out_at_rate_zero():
    assert not Dropout(rate=0.0).dropped("a", 0, 100, 0, 0).any()


def test_recipe():
    assert build("relaxation", "dropout") == Dropout(rate=0.2, rescale=False)
    assert Dropout.samples
    assert Dropout.keeps_dense_weights
    assert Dropout(rate=0.2).scale == 1.0
    assert Dropout(rate=0.2, rescale=True).scale == 1.25
    with pytest.raises(InputError, match=r"relaxation\.dropout\.rate"):
        build("relaxation", {"dropout": {"rate": 1.0}})
