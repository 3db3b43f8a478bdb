from safetensors.torch import save_file
from torch import nn

from niwaki.metrics import dense_bytes


def test_dense_bytes_is_the_size_of_the_real_file(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert dense_bytes(model) == (tmp_path / "model.safetensors").stat().st_size


def test_dense_bytes_stores_tied_weights_once(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    save_file({"0.weight": model[0].weight.detach()}, tmp_path / "model.safetensors")
    assert dense_bytes(model) == (tmp_path / "model.safetensors").stat().st_size
