"""Objectives against their closed form, term by term in float64."""

import math

import pytest
import torch

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.objective import Distillation
from niwaki.recipe import Recipe


def closed_form(task_loss, logits, teacher, temperature, weight):
    """``(1 - a) L + a T^2 mean_n sum_c p_c (log p_c - log q_c)``, in plain Python."""

    def softmax(row):
        exponentials = [math.exp(z / temperature) for z in row]
        return [e / sum(exponentials) for e in exponentials]

    rows = [
        sum(p * (math.log(p) - math.log(q)) for p, q in zip(softmax(t), softmax(z), strict=True))
        for t, z in zip(teacher.flatten(0, -2).tolist(), logits.flatten(0, -2).tolist(), strict=True)
    ]
    return (1 - weight) * task_loss + weight * temperature**2 * sum(rows) / len(rows)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 2), (7, 5), (3, 4, 6), (2, 3, 2, 4)])
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 0.9), (0.5, 0.3), (20.0, 0.5), (4.0, 0.0)])
def test_the_loss_is_the_closed_form(shape, temperature, weight):
    logits, teacher = normal(*shape), normal(*shape, seed=1)
    got = Distillation(temperature=temperature, weight=weight).loss(torch.tensor(1.7, dtype=torch.float64), logits, teacher)
    assert got.shape == ()
    assert float(got) == pytest.approx(closed_form(1.7, logits, teacher, temperature, weight), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
def test_the_gradient_is_the_difference_of_the_softened_outputs(temperature):
    """dKL/dz = (q - p) / T for each row, so the term's gradient is ``a T (q - p) / rows``."""
    logits, teacher = normal(6, 5).requires_grad_(), normal(6, 5, seed=1)
    Distillation(temperature=temperature, weight=0.6).loss(torch.zeros((), dtype=torch.float64), logits, teacher).backward()
    q, p = torch.softmax(logits.detach() / temperature, -1), torch.softmax(teacher / temperature, -1)
    torch.testing.assert_close(logits.grad, 0.6 * temperature * (q - p) / 6, rtol=1e-12, atol=1e-14)


def test_at_high_temperatures_it_is_the_distance_of_the_centred_logits():
    """Hinton et al. 2015, equation 4: for large T the gradient becomes that of the squared difference of zero-mean logits, over C."""
    logits, teacher = normal(4, 3).requires_grad_(), normal(4, 3, seed=1)
    Distillation(temperature=1e4, weight=1.0).loss(torch.zeros((), dtype=torch.float64), logits, teacher).backward()
    centred = (logits - logits.mean(-1, keepdim=True) - teacher + teacher.mean(-1, keepdim=True)).detach()
    torch.testing.assert_close(logits.grad, centred / 3 / 4, rtol=1e-3, atol=1e-4)


def test_it_is_finite_for_outputs_of_any_size():
    logits = torch.tensor([[0.0, 5e3, -5e3]], requires_grad=True)
    loss = Distillation(temperature=1.0).loss(torch.tensor(0.0), logits, torch.tensor([[5e3, 0.0, -5e3]]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.9 * 5e3)
    assert logits.grad.isfinite().all()


def test_outputs_of_other_classes_are_refused():
    with pytest.raises(InputError, match=r"same classes, and the model's have shape \(2, 3\), the teacher's \(2, 4\)$"):
        Distillation().loss(torch.tensor(0.0), torch.zeros(2, 3), torch.zeros(2, 4))


def test_recipes_name_it():
    assert Recipe.from_yaml("{sparsity: 0.5, objective: distillation}").objective == Distillation(temperature=2, weight=0.9)
    assert "teacher" in Distillation.needs
    for wrong in ({"temperature": 0}, {"weight": 1.5}, {"temperatur": 1}):
        with pytest.raises(InputError, match=r"^objective\.distillation"):
            build("objective", {"distillation": wrong})


def test_movement_pruning_with_distillation_is_complete():
    recipe = Recipe.from_yaml(
        """
sparsity: 0.9
relaxation: {straight_through: {scores: zeros, learning_rate: 1e-2}}
saliency: score
allocation: global
schedule: {cubic: {initial: 0, begin: 0.1 run, every: 1 steps, end: 0.7 run}}
objective: {distillation: {temperature: 2, weight: 0.9}}
"""
    )
    recipe.require_complete()
    assert recipe.objective == Distillation()
