import pytest
import torch
from torch import nn

from niwaki.errors import InputError
from niwaki.masks import Masks
from niwaki.metrics import forward_flops
from niwaki.metrics.training_flops import active_flops, gradual_step_flops, rigl_step_flops, step_flops, training_multiplier

torch.manual_seed(0)

MODELS = {
    "linear on tokens": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Flatten()), (2, 3, 9, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 4)),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (2, 5, 16)),
    "recurrent": (lambda: nn.GRU(3, 4, batch_first=True), (5, 7, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_active_flops_equal_those_of_a_forward_pass_with_the_masks(name):
    make, shape = MODELS[name]
    model = make()
    example = (torch.randn(shape),)
    counted = forward_flops(model, example)
    assert active_flops(counted, {}) == counted.dense
    for density in (0.0, 0.1, 0.5, 1.0):
        masks = Masks({name: torch.rand_like(p) < density for name, p in model.named_parameters() if p.dim() > 1})
        assert active_flops(counted, masks) == forward_flops(model, example, masks=masks).sparse


def test_a_step_costs_a_forward_pass_and_two_gradients():
    sparse, dense = 7.0, 50.0
    assert step_flops(sparse, dense) == sparse + sparse + sparse
    assert step_flops(sparse, dense, dense_gradient=True) == sparse + sparse + dense
    assert step_flops(dense, dense) == step_flops(dense, dense, dense_gradient=True) == 3 * dense


@pytest.mark.parametrize("every", [1, 5, 100])
def test_rigls_mean_is_that_of_a_loop(every):
    steps = [step_flops(7.0, 50.0, dense_gradient=step % (every + 1) == every) for step in range(10 * (every + 1))]
    assert rigl_step_flops(7.0, 50.0, every) == pytest.approx(sum(steps) / len(steps), rel=1e-12)
    assert rigl_step_flops(7.0, 50.0, every) == pytest.approx((3 * 7 * every + 2 * 7 + 50) / (every + 1), rel=1e-12)
    pairs = [(step_flops(7.0, 50.0), every), (step_flops(7.0, 50.0, dense_gradient=True), 1)]
    assert training_multiplier(pairs, 50.0) == pytest.approx(rigl_step_flops(7.0, 50.0, every) / 150, rel=1e-12)


def test_gradual_pruning_is_the_mean_over_its_schedule():
    sparsities = [0.9 * (1 - (1 - step / 50) ** 3) for step in range(51)]
    steps = [(step_flops(50.0 * (1 - sparsity), 50.0), 1) for sparsity in sparsities]
    assert gradual_step_flops(50.0, sparsities) == pytest.approx(training_multiplier(steps, 50.0) * 150, rel=1e-12)


def test_a_dense_training_is_one():
    assert training_multiplier([(step_flops(50.0, 50.0), 12)], 50.0) == 1.0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: training_multiplier([], 10.0), "at least one step"),
        (lambda: training_multiplier([(3.0, 1)], 0.0), "dense FLOPs above 0"),
        (lambda: rigl_step_flops(1.0, 2.0, 0), "every 0"),
        (lambda: gradual_step_flops(1.0, []), "at least one step"),
        (lambda: gradual_step_flops(1.0, [1.5]), "a share"),
    ],
)
def test_bad_input_is_said(call, says):
    with pytest.raises(InputError, match=says):
        call()
