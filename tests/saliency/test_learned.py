"""Learned scores pass through, summed over pieces."""

import pytest
import torch

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.saliency import Observation, Score


def test_scores_are_those_of_the_relaxation():
    learned = torch.tensor([[-1.0, 0.5], [2.0, 0.25]], dtype=torch.bfloat16)
    seen = Observation("w", torch.zeros(2, 2), score=learned)
    assert Score().score(seen, lambda values: values).tolist() == [[-1.0, 0.5], [2.0, 0.25]]
    assert Score().score(seen, lambda values: values.sum(1, dtype=torch.float64)).tolist() == [-0.5, 2.25]


def test_a_missing_score_is_told():
    with pytest.raises(InputError, match=r"'fc\.weight' has no learned score") as caught:
        Score().score(Observation("fc.weight", torch.ones(2)), lambda values: values)
    assert "relaxation" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipe():
    assert build("saliency", "score") == Score()
    assert Score.needs == {"score"}
