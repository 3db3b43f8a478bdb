import torch
from safetensors.torch import save_file
from torch import nn

from niwaki.metrics import count_parameters, dense_bytes


def test_counts():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight.view(-1)[:5] = torch.tensor([0.0, -0.0, 0.0, 0.0, 0.0])
        model[1].bias.zero_()
    keep = torch.ones(4, 3, dtype=torch.bool)
    keep.view(-1)[:3] = False
    found = count_parameters(model, {"0.weight": keep})
    assert (found.parameters, found.targets, found.masked, found.zeros) == (12 + 4 + 8 + 2, 12, 3, 2)
    assert found.sparsity_of_targets == 3 / 12
    assert found.sparsity_of_parameters == 3 / 26


def test_without_masks_nothing_is_masked():
    found = count_parameters(nn.Linear(2, 2))
    assert (found.targets, found.masked, found.sparsity_of_targets) == (0, 0, 0.0)


def test_dense_bytes_is_the_size_of_the_real_file(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert dense_bytes(model) == (tmp_path / "model.safetensors").stat().st_size


def test_dense_bytes_stores_tied_weights_once(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    save_file({"0.weight": model[0].weight.detach()}, tmp_path / "model.safetensors")
    assert dense_bytes(model) == (tmp_path / "model.safetensors").stat().st_size
