import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from niwaki.errors import InputError
from niwaki.tasks import digits
from niwaki.tasks.digits import DIGITS


def test_every_image_is_in_one_part_once_with_its_class():
    data = digits.load()
    found = sorted((*image.reshape(-1).tolist(), int(label)) for part in (data.train, data.test) for image, label in part)
    bunch = load_digits()
    expected = sorted((*(image.reshape(-1) / 16).tolist(), int(label)) for image, label in zip(bunch.images, bunch.target, strict=True))
    assert found == expected


def test_a_fifth_of_each_class_is_for_testing():
    data = digits.load()
    classes = load_digits().target
    for label in range(10):
        tested = sum(int(other) == label for _, other in data.test)
        assert tested == np.sum(classes == label) // 5


def test_the_split_is_every_fifth_of_a_class():
    classes = [0, 0, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1]
    expected, seen = [], {0: 0, 1: 0}
    for label in classes:
        seen[label] += 1
        expected.append(seen[label] % 5 == 0)
    assert digits.is_test(torch.tensor(classes)).tolist() == expected


def test_missing_scikit_learn_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'niwaki\[demo\]'") as error:
        digits.load()
    assert "\n" not in str(error.value)


def test_unknown_models_offer_the_nearest():
    with pytest.raises(InputError, match="did you mean 'convnet'"):
        DIGITS.model("convnets")


@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_a_seed_decides_the_initial_weights_and_nothing_else(model):
    before = torch.random.get_rng_state()
    first, same, other = (DIGITS.build(model, digits.load(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_models_and_metrics_fit_the_data(model):
    data = DIGITS.data(None)
    assert [tuple(part.shape) for part in DIGITS.example(data)] == [(1, 1, 8, 8)]
    inputs, targets = data.test[torch.arange(7)]
    outputs = DIGITS.build(model, data, 0).double()(inputs.double())
    accuracy = DIGITS.metrics["accuracy"].values(outputs, targets)
    losses = DIGITS.metrics["loss"].values(outputs, targets)
    logits = outputs.detach().numpy()
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(7), targets.numpy()]
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_array_equal(accuracy.numpy(), logits.argmax(1) == targets.numpy())
    assert DIGITS.loss(outputs, targets).item() == pytest.approx(expected.mean(), rel=1e-12)
