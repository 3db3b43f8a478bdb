"""Gradients of single examples against plain backward passes."""

import numpy as np
import pytest
import torch
from calibration.problems import PROBLEMS, cross_entropy, multilayer, watched
from torch import nn
from torch.nn import functional

from niwaki.calibration import Arguments, collect, gradients
from niwaki.calibration.labels import sampled_labels
from niwaki.calibration.run import Run
from niwaki.errors import InputError
from niwaki.statistics import GradientBank, GradientMean, GradientSquare


def by_hand(model, names, data, loss, each=1):
    """Gradients of consecutive ``each`` examples of the whole data, in evaluation mode, by ``backward``."""
    inputs, targets = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    model.eval()
    rows = {name: [] for name in names}
    for start in range(0, len(inputs) - each + 1, each):
        model.zero_grad()
        loss(model(inputs[start : start + each]), targets[start : start + each]).backward()
        for name in names:
            rows[name].append(model.get_parameter(name).grad.clone())
    model.zero_grad()
    model.train()
    return {name: torch.stack(each) for name, each in rows.items()}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("at_once", [True, False])
def test_gradients_of_examples_are_those_of_backward(problem, at_once, monkeypatch):
    model, names, data = PROBLEMS[problem]()
    model.get_parameter(names[0]).requires_grad_(True)
    expected = by_hand(model, names, data, cross_entropy)
    model.get_parameter(names[0]).requires_grad_(False)
    monkeypatch.setattr(gradients, "vectorizes", lambda model: at_once)
    if at_once:
        if problem != "recurrent":  # torch cannot vectorize those
            monkeypatch.setattr(gradients, "one_by_one", None)
        data = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    asked = [GradientBank(None), GradientSquare(None), GradientMean(None)]
    found = collect(model, data, cross_entropy, watched(model, *names), asked)
    for name in names:
        torch.testing.assert_close(found[name][asked[0]].flatten(1), expected[name].flatten(1), rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(found[name][asked[1]].flatten(), expected[name].square().mean(0).flatten(), rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(found[name][asked[2]].flatten(), expected[name].mean(0).flatten(), rtol=1e-11, atol=1e-14)
        assert found[name][asked[1]].shape == watched(model, name)[0].layout.shape
    assert not model.get_parameter(names[0]).requires_grad
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("each", [2, 3, 4])
@pytest.mark.parametrize("at_once", [True, False])
def test_gradients_of_several_examples_cross_batches(each, at_once, monkeypatch):
    model, names, data = multilayer()  # batches of 3, 5 and 2
    monkeypatch.setattr(gradients, "vectorizes", lambda model: at_once)
    monkeypatch.setattr(gradients, "CHUNK", 2)
    bank = GradientBank(None, samples_per_gradient=each)
    found = collect(model, data, cross_entropy, watched(model, *names), [bank])
    expected = by_hand(model, names, data, cross_entropy, each)
    for name in names:
        torch.testing.assert_close(found[name][bank], expected[name], rtol=1e-11, atol=1e-14)


def test_a_gradient_of_each_batch_as_it_is():
    model, names, data = multilayer()
    bank = GradientBank(2, samples_per_gradient=None)
    found = collect(model, data, cross_entropy, watched(model, *names), [bank])["0.weight"][bank]
    for row, (x, y) in zip(found, data, strict=False):
        (expected,) = torch.autograd.grad(cross_entropy(model(x), y), [model[0].weight])
        torch.testing.assert_close(row, expected)
    assert len(found) == 2


def test_a_bank_holds_so_many_and_reads_no_further_and_is_float32_of_a_float32_model():
    model, names, data = multilayer()
    rest = iter([(x.float(), y) for x, y in data])
    bank = GradientBank(4)
    found = collect(model.float(), rest, cross_entropy, watched(model, *names), [bank])["2.weight"][bank]
    assert found.shape == (4, 3, 5)
    assert found.dtype == torch.float32
    assert len(list(rest)) == 1
    with pytest.warns(UserWarning, match="GradientBank: the data has 10 gradients of 50"):
        assert (
            len(
                collect(model, [(x.float(), y) for x, y in data], cross_entropy, watched(model, *names), [GradientBank(50)])[
                    names[0]
                ].popitem()[1]
            )
            == 10
        )


def test_masked_weights_have_no_gradient():
    model, names, data = multilayer()
    active = {"0.weight": torch.rand(5, 4) < 0.5}
    bank = GradientBank(None)
    everything = collect(model, data, cross_entropy, watched(model, *names), [bank])
    found = collect(model, data, cross_entropy, watched(model, *names, active=active), [bank, GradientSquare()])
    assert torch.equal(found["0.weight"][bank], everything["0.weight"][bank] * active["0.weight"])
    assert not found["0.weight"][GradientSquare()][~active["0.weight"]].any()
    assert torch.equal(found["2.weight"][bank], everything["2.weight"][bank])


def test_what_cannot_be_vectorized_is_done_one_by_one():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x if float(x.sum()) > 0 else -x)

    model = Branching().double()
    data = [(torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,)))]
    bank = GradientBank(6)
    found = collect(model, data, cross_entropy, watched(model, "layer.weight"), [bank])["layer.weight"][bank]
    torch.testing.assert_close(found, by_hand(model, ["layer.weight"], data, cross_entropy)["layer.weight"])


@pytest.mark.parametrize("at_once", [True, False])
def test_batches_of_any_structure_are_cut_into_examples(at_once, monkeypatch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, *, scale, extra, flag=True):
            assert flag
            return self.layer(x * scale[:, None] + extra["shift"])

    monkeypatch.setattr(gradients, "vectorizes", lambda model: at_once)
    model = Block().double()
    (x, y) = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    scale, shift = torch.rand(6, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    data = [(Arguments((x,), {"scale": scale, "extra": {"shift": shift}, "flag": True}), {"labels": y})]
    bank = GradientBank(3, samples_per_gradient=2)
    found = collect(model, data, lambda o, t: cross_entropy(o, t["labels"]), watched(model, "layer.weight"), [bank])
    for k, row in enumerate(found["layer.weight"][bank]):
        part = slice(2 * k, 2 * k + 2)
        loss = cross_entropy(model.layer(x[part] * scale[part, None] + shift), y[part])
        torch.testing.assert_close(row, torch.autograd.grad(loss, [model.layer.weight])[0])


def test_a_tensor_that_belongs_to_all_examples_stays_whole_whatever_the_chunk(monkeypatch):
    """As long as a chunk, but not as long as the batch."""
    monkeypatch.setattr(gradients, "CHUNK", 4)

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, shift):
            return self.layer(x + shift)

    model = Shifted().double()
    x, y, shift = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,)), torch.randn(4, dtype=torch.float64)
    bank = GradientBank(8)
    for at_once in (True, False):
        monkeypatch.setattr(gradients, "vectorizes", lambda model, at_once=at_once: at_once)
        found = collect(model, [((x, shift), y)], cross_entropy, watched(model, "layer.weight"), [bank])["layer.weight"][bank]
        (last,) = torch.autograd.grad(cross_entropy(model(x[7:], shift), y[7:]), [model.layer.weight])
        torch.testing.assert_close(found[7], last)


def test_sampled_labels_follow_the_softmax_and_do_not_depend_on_batches():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, generator=generator, dtype=torch.float64).expand(40000, 4)
    drawn = sampled_labels(logits, None, 0, "labels 0", 0)
    expected = logits[0].softmax(0)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / len(drawn)).sqrt()).all()
    assert torch.equal(sampled_labels(logits[:30], None, 0, "labels 0", 10), drawn[10:40])
    assert not torch.equal(sampled_labels(logits, None, 1, "labels 0", 0), drawn)


def test_sampled_labels_stand_where_the_targets_do():
    tokens = torch.randint(3, (2, 5))
    tokens[0, 0] = -100  # to be ignored
    found = sampled_labels(torch.randn(2, 5, 3), tokens, 0, "labels 0", 0)
    assert found.shape == (2, 5)
    assert found[0, 0] == -100
    assert sampled_labels(torch.randn(2, 3, 5, 6), None, 0, "labels 0", 0).shape == (2, 5, 6)
    assert sampled_labels(torch.randn(2, 3, 5), torch.zeros(2, 5, dtype=torch.int64), 0, "labels 0", 0).max() < 3
    with pytest.raises(InputError, match="labels: sampled needs targets that are classes"):
        sampled_labels(torch.randn(2, 3), torch.randn(2, 3), 0, "labels 0", 0)


def test_sampled_gradients_need_no_targets_and_are_of_the_drawn_labels():
    model, names, data = multilayer()
    bank = GradientBank(None, labels="sampled")
    found = collect(model, [(x, None) for x, _ in data], cross_entropy, watched(model, *names), [bank], seed=3)
    again = collect(model, [(x, None) for x, _ in data], cross_entropy, watched(model, *names), [bank], seed=3)
    with torch.no_grad():
        labels = sampled_labels(model(torch.cat([x for x, _ in data])), None, 3, "labels 0", 0)
    expected = by_hand(model, names, [(torch.cat([x for x, _ in data]), labels)], cross_entropy)
    for name in names:
        torch.testing.assert_close(found[name][bank], expected[name])
        assert torch.equal(found[name][bank], again[name][bank])


@pytest.mark.parametrize("at_once", [True, False])
def test_a_loss_that_is_not_finite_names_its_batch(at_once, monkeypatch):
    monkeypatch.setattr(gradients, "vectorizes", lambda model: at_once)
    model, names, data = multilayer()
    data[1][0][2, 0] = float("nan")
    with pytest.raises(InputError, match="the loss of batch 1 is not finite"):
        collect(model, data, cross_entropy, watched(model, *names), [GradientSquare()])


def test_bad_data_are_told():
    model, names, data = multilayer()
    tensors = watched(model, *names)
    with pytest.raises(InputError, match="batch 0 has no targets"):
        collect(model, [(x, None) for x, _ in data], cross_entropy, tensors, [GradientSquare()])
    with pytest.raises(InputError, match="fewer than the 40 examples of one gradient"):
        collect(model, data, cross_entropy, tensors, [GradientSquare(samples_per_gradient=40)])
    with pytest.raises(InputError, match="the targets of batch 0 do not lie along"):
        collect(model, [(data[0][0], data[0][1].repeat(2))], cross_entropy, tensors, [GradientSquare()])
    odd = [(torch.randint(7, (3, n)), torch.randint(7, (3, n))) for n in (2, 4)]
    words, names, _ = PROBLEMS["attention"]()
    with pytest.raises(InputError, match="would join batches of different shapes"):
        collect(words, odd, cross_entropy, watched(words, *names), [GradientSquare(samples_per_gradient=2)])


def test_the_way_is_chosen_by_what_is_faster():
    assert gradients.vectorizes(nn.Linear(2, 2))
    assert not gradients.vectorizes(nn.Sequential(nn.Conv2d(1, 1, 1)))
    model, names, data = multilayer()
    run = Run(model, watched(model, *names), data, functional.cross_entropy)
    assert [len(g) for g in next(gradients.gradients_of(run, GradientBank(2), 2))] == [2, 2]
    assert np.isfinite(next(gradients.gradients_of(run, GradientBank(2), 2))[0].numpy()).all()
