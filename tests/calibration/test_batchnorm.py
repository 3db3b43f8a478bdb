"""Batch normalization, estimated anew."""

import numpy as np
import pytest
import torch
from calibration.problems import convolutional
from torch import nn

from niwaki.calibration import recalibrate_batchnorm
from niwaki.errors import InputError


def test_statistics_are_those_of_all_that_was_read():
    model, _, data = convolutional()
    model.norm.requires_grad_(False)
    model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    assert recalibrate_batchnorm(model, data) == 1
    with torch.no_grad():
        read = torch.cat([model.first(x) for x, _ in data]).movedim(1, -1).reshape(-1, 4).numpy()
    np.testing.assert_allclose(model.norm.running_mean.numpy(), read.mean(0), rtol=1e-12)
    np.testing.assert_allclose(model.norm.running_var.numpy(), read.var(0, ddof=1), rtol=1e-12)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in ("norm.running_mean", "norm.running_var"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not model.norm.training


def test_of_one_batch_it_is_what_torch_finds_with_full_momentum_layer_after_layer():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=1.0), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2, momentum=1.0)
        ).double()

    x = torch.randn(9, 3, dtype=torch.float64)
    ours, theirs = build().eval(), build().train()
    assert recalibrate_batchnorm(ours, [(x, None)]) == 2
    theirs(x)
    for i in (1, 4):
        torch.testing.assert_close(ours[i].running_mean, theirs[i].running_mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours[i].running_var, theirs[i].running_var, rtol=1e-12, atol=1e-14)
        assert ours[i].num_batches_tracked == 0


def test_models_without_running_statistics_stay_and_small_batches_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert recalibrate_batchnorm(model, [(torch.randn(3, 2), None)]) == 0
    model = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(InputError, match="a single value for each channel of 0"):
        recalibrate_batchnorm(model, [(torch.randn(1, 2), None)])
    with pytest.raises(InputError, match="no batch"):
        recalibrate_batchnorm(model, [])
    assert model[0].running_mean.tolist() == [0, 0]
