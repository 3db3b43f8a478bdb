import copy
import json
import math
import time

import pytest
import torch
from safetensors.torch import save_file
from support import TARGETS, net
from torch import nn

from niwaki.errors import InputError
from niwaki.masks import Masks
from niwaki.measurement import measure
from niwaki.metrics import forward_flops, storage

EXAMPLE = torch.ones(2, 1, 8, 8)


@pytest.fixture
def model():
    return net()


@pytest.fixture
def masks(model):
    generator = torch.Generator().manual_seed(0)
    found = Masks({name: torch.rand(p.shape, generator=generator) < 0.2 for name, p in model.named_parameters() if name in TARGETS})
    found.apply_(model)
    return found


def test_every_number_equals_counting_by_hand(model, masks, tmp_path):
    with torch.no_grad():
        model.fc1.weight[masks["fc1.weight"]] = 0.0  # zeros that no mask asks for
        model.head.bias.zero_()
    found = measure(model, EXAMPLE, masks, rounds=0)
    parameters = dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    targets = sum(parameters[name].numel() for name in TARGETS)
    masked = sum(int((~masks[name]).sum()) for name in TARGETS)
    extra = int(masks["fc1.weight"].sum())
    # Outputs of the convolutions: 8 × 8 places, and 4 × 4 with a stride of 2.
    uses = {"conv1.weight": 64, "conv2.weight": 16, "fc1.weight": 1, "fc2.weight": 1, "head.weight": 1}
    active = {name: int(masks[name].sum()) if name in masks else parameters[name].numel() for name in uses}
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    expected = {
        "parameters": (total, total),
        "active parameters": (total - masked, total),
        "weights of the targets": (targets, targets),
        "sparsity of the targets": (masked / targets, 0),
        "sparsity of all parameters": (masked / total, 0),
        "zeros among active weights": (extra, None),
        "zeros of all parameters": (masked + extra + 5 + 4, None),  # the head's bias, and that of the batch norm
        "forward FLOPs": (2 * sum(uses[n] * active[n] for n in uses), 2 * sum(uses[n] * parameters[n].numel() for n in uses)),
        "dense file size": ((tmp_path / "model.safetensors").stat().st_size,) * 2,
        "bits as dense": (32 * total, 32 * total),
        "bits as bitmap": (32 * (total - masked) + targets, None),
        "bits as COO": (32 * (total - masked) + 9 * active["conv2.weight"] + 12 * active["fc1.weight"] + 9 * active["fc2.weight"], None),
        "bits as entropy bound": (
            32 * (total - masked) + sum(math.ceil(math.log2(math.comb(parameters[n].numel(), active[n]))) for n in TARGETS),
            None,
        ),
    }
    for name, pair in expected.items():
        assert (found[name].value, found[name].dense) == pair, name


def test_numbers_have_unique_names_definitions_and_units(model, masks):
    found = measure(model, EXAMPLE, masks, dense=net(1), accuracy=0.5, dense_accuracy=0.6, rounds=1)
    names = [number.name for number in found.numbers]
    assert len(set(names)) == len(names)
    assert {number.unit for number in found.numbers} <= {"share", "bytes", "bits", "FLOPs", "weights", "milliseconds", "number"}
    text = str(found)
    for number in found.numbers:
        assert len(number.definition) > 10
        assert f"{number.name}: {number.definition}" in " ".join(text.split())
    assert json.loads(json.dumps(found.to_data(), allow_nan=False)) == found.to_data()
    assert [row["name"] for row in found.to_data()["numbers"]] == names
    assert found.layers == forward_flops(model, (EXAMPLE,), masks=masks).layers
    assert found.storage == storage(dict(model.named_parameters()), masks)


def test_a_dense_model_of_another_shape_stands_beside(model, masks):
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 5))
    with torch.no_grad():
        wide[1].weight[0] = 0
    found = measure(model, (EXAMPLE,), masks, dense=wide, rounds=2)
    total = 65 * 50 + 51 * 5
    assert found["parameters"].dense == found["active parameters"].dense == total
    assert found["zeros of all parameters"].dense == 64
    assert found["forward FLOPs"].dense == 2 * (64 * 50 + 50 * 5)
    assert found["bits as dense"].dense == 32 * total
    assert found["peak memory of a forward pass"].dense == 2 * 4 * (50 + 50)
    assert found["latency"].dense > 0
    assert found["latency"].value > 0


def test_without_masks_zeros_of_weights_count_as_masked(model, masks):
    given, guessed = (measure(model, EXAMPLE, one, rounds=0) for one in (masks, None))
    assert guessed.numbers == given.numbers
    none = measure(model, EXAMPLE, {}, rounds=0)
    assert none["sparsity of all parameters"].value == none["weights of the targets"].value == 0
    assert none["forward FLOPs"].value == none["forward FLOPs"].dense == given["forward FLOPs"].dense
    assert none["zeros of all parameters"].value == given["zeros of all parameters"].value
    assert [row.format for row in none.storage] == ["dense"]


def test_efficiency_needs_an_accuracy(model, masks):
    assert not any("efficiency" in number.name for number in measure(model, EXAMPLE, masks, rounds=0).numbers)
    found = measure(model, EXAMPLE, masks, accuracy=0.75, rounds=0)
    millions = found["active parameters"].value / 1e6
    assert (found["accuracy"].value, found["accuracy"].dense) == (0.75, None)
    assert found["accuracy density"].value == pytest.approx(75 / millions)
    assert found["parameter efficiency (odds)"].value == pytest.approx(3 / millions)
    assert found["parameter efficiency (bits)"].value == pytest.approx(2 / millions)
    assert found["parameter efficiency (bits)"].dense is None
    perfect = measure(model, EXAMPLE, masks, accuracy=1.0, dense_accuracy=0.5, rounds=0)
    assert perfect["parameter efficiency (odds)"].value is None
    assert perfect["parameter efficiency (bits)"].dense == pytest.approx(1 / (perfect["parameters"].value / 1e6))
    assert perfect["accuracy density"].value == pytest.approx(100 / millions)


def test_the_model_and_the_random_state_are_left_as_they_were(masks):
    model = nn.Sequential(net(), nn.Dropout(0.5))
    model.train()
    model[0].norm.eval()
    model[0].head.weight.grad = torch.ones_like(model[0].head.weight)
    state = copy.deepcopy(model.state_dict())
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    measure(model, EXAMPLE, {f"0.{name}": mask for name, mask in masks.items()}, dense=model, rounds=2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in (model, model[0], model[0].norm, model[1])] == [True, True, False, True]
    assert model[0].head.weight.grad.sum() == model[0].head.weight.numel()
    assert model[0].fc1.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads


def test_wrapped_and_tied_models_count_their_own_parameters_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 4)
            self.output = nn.Linear(4, 11, bias=False)
            self.output.weight = self.embedding.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.output(self.embedding(tokens))

    mask = torch.arange(44).reshape(11, 4) % 4 == 0
    found = measure(nn.DataParallel(Tied()), torch.zeros(1, 3, dtype=torch.long), {"embedding.weight": mask}, rounds=0)
    assert (found["parameters"].value, found["active parameters"].value) == (44, 11)
    assert found["bits as bitmap"].value == 11 * 32 + 44
    assert found["forward FLOPs"].value == 2 * 3 * 11


def test_value_bits_and_block_reach_the_storage(model, masks):
    found = measure(model, EXAMPLE, masks, value_bits=8, block=(8, 1), rounds=0)
    assert found["bits as dense"].value == found["bits as dense"].dense == 8 * found["parameters"].value
    assert "bits as BSR 8×1" in [number.name for number in found.numbers]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"masks": {"fc9.weight": torch.ones(2, 2) > 0}}, "did you mean"),
        ({"masks": {"fc1.weight": torch.ones(2, 2) > 0}}, "shape"),
        ({"masks": {"fc1.weight": torch.ones(24, 128)}}, "bool tensor"),
        ({"rounds": -1}, "rounds must be at least 0"),
        ({"rounds": 0, "accuracy": 75.0}, r"share in \[0, 1\]"),
        ({"rounds": 0, "value_bits": 0}, "at least 1"),
    ],
)
def test_bad_input_is_said(model, arguments, says):
    with pytest.raises(InputError, match=says):
        measure(model, EXAMPLE, **arguments)


def test_an_unknown_number_names_those_there_are(model):
    with pytest.raises(KeyError, match="forward FLOPs"):
        measure(model, EXAMPLE, rounds=0)["flops"]


def test_latency_is_the_median_in_milliseconds(model, monkeypatch):
    ticks = iter([tick for begin, seconds in ((0, 9), (10, 9), (20, 3), (30, 1), (40, 2)) for tick in (begin, begin + seconds)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert measure(model, EXAMPLE, rounds=3)["latency"].value == 2000.0  # of 3, 1 and 2 seconds, after two that warm up
