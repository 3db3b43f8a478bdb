"""Streaming accumulators against numpy and closed forms."""

import numpy as np
import pytest
import torch

from niwaki.errors import InputError
from niwaki.statistics import Covariance, Mean


def batches(*sizes, entries=3, offset=0.0):
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.randn(n, entries, generator=generator, dtype=torch.float64) + offset for n in sizes]


def mean_of(parts, **settings):
    mean = Mean(**settings)
    for part in parts:
        mean.update(part.sum(0), len(part))
    return mean


def close(found, expected):
    np.testing.assert_allclose(found.numpy(), np.asarray(expected), rtol=1e-12, atol=1e-14)


def test_a_mean_is_over_all_observations_and_float64():
    parts = batches(5, 1, 7)
    close(mean_of(parts).value(), np.concatenate([p.numpy() for p in parts]).mean(0))
    mean = Mean()
    for _ in range(1000):
        mean.update(torch.tensor(0.1), 1)
    assert mean.value().dtype == torch.float64
    assert mean.value().item() == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_a_window_forgets_what_is_older():
    parts = batches(2, 3, 4, 5, 6)
    close(mean_of(parts, window=3).value(), np.concatenate([p.numpy() for p in parts[2:]]).mean(0))
    close(mean_of(parts[:2], window=3).value(), np.concatenate([p.numpy() for p in parts[:2]]).mean(0))


def test_a_fading_mean_is_the_bias_corrected_moving_average():
    parts = batches(4, 4, 4, 4, 4)
    average = np.zeros(3)
    for part in parts:
        average = 0.9 * average + 0.1 * part.numpy().mean(0)
    close(mean_of(parts, decay=0.9).value(), average / (1 - 0.9**5))


@pytest.mark.parametrize("settings", [{}, {"window": 2}, {"decay": 0.7}])
def test_merged_means_are_those_of_all_the_data(settings):
    left, right = batches(3, 5, 2, 4), batches(6, 1, 1, 2, offset=3.0)[:4]
    merged = mean_of(left, **settings)
    merged.merge(mean_of(right, **settings))
    close(merged.value(), mean_of([torch.cat(pair) for pair in zip(left, right, strict=True)], **settings).value())
    empty = Mean(**settings)
    empty.merge(merged)
    close(empty.value(), merged.value())
    other = mean_of(left, **settings)
    other.update(left[0].sum(0), 3)
    empty.update(left[0].sum(0), 3)  # the state was copied
    assert not torch.equal(empty.value(), merged.value())


@pytest.mark.parametrize("settings", [{}, {"window": 3}, {"decay": 0.7}])
def test_a_mean_goes_on_from_its_state(settings):
    parts = batches(3, 1, 4, 1, 5)
    first = mean_of(parts[:3], **settings)
    state = first.state_dict()
    second = Mean(**settings)
    second.load_state_dict(state)
    for part in parts[3:]:
        first.update(part.sum(0), len(part))
        second.update(part.sum(0), len(part))
    assert torch.equal(first.value(), second.value())
    again = Mean(**settings)
    again.load_state_dict(state)  # the state has not moved
    assert torch.equal(again.value(), mean_of(parts[:3], **settings).value())


def test_updates_do_not_touch_what_they_were_given():
    total = torch.ones(2, dtype=torch.float64)
    mean = Mean()
    mean.update(total, 1)
    mean.update(total, 1)
    assert total.tolist() == [1, 1]


@pytest.mark.parametrize("settings", [{"decay": 0.0}, {"decay": 1.5}, {"window": 0}, {"window": 2, "decay": 0.5}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match="decay"):
        Mean(**settings)


def test_means_of_nothing_or_of_different_kinds_are_errors():
    with pytest.raises(InputError, match="no observations"):
        Mean().value()
    with pytest.raises(InputError, match="same decay, window"):
        Mean(decay=0.5).merge(Mean())
    with pytest.raises(InputError, match="same decay, window"):
        mean_of(batches(1, 2), window=3).merge(mean_of(batches(1), window=3))
    with pytest.raises(InputError, match="variance of 0"):
        Covariance(full=True).value()


@pytest.mark.parametrize("full", [True, False])
def test_a_covariance_is_numpys_without_cancellation(full):
    parts = batches(4, 1, 9, 2, offset=1e6)
    everything = torch.cat(parts).numpy()
    expected = np.cov(everything.T, bias=True) if full else everything.var(0)
    covariance = Covariance(full=full)
    for part in parts[:2]:
        covariance.update(part)
    covariance.update(parts[0][:0])
    rest = Covariance(full=full)
    resumed = Covariance(full=full)
    rest.update(parts[2])
    resumed.load_state_dict(rest.state_dict())
    resumed.update(parts[3])
    covariance.merge(resumed)
    covariance.merge(Covariance(full=full))
    np.testing.assert_allclose(covariance.value().numpy(), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(covariance.value(unbiased=True).numpy(), expected * 16 / 15, rtol=1e-9, atol=1e-9)
    close(covariance.mean, everything.mean(0))
