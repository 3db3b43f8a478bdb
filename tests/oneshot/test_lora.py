"""Deltas of low rank, merged under masks, against dense products written out."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from niwaki.errors import InputError
from niwaki.masks import Masks
from niwaki.oneshot.lora import Delta, merge_adapter, merge_delta, read_adapter


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask_of(*shape):
    return random(*shape, seed=9) > 0


def test_a_linear_layer():
    weight, a, b, mask = random(5, 7), random(2, 7, seed=1), random(5, 2, seed=2), mask_of(5, 7)
    expected = torch.zeros(5, 7, dtype=torch.float64)
    for i in range(5):
        for j in range(7):
            if mask[i, j]:
                expected[i, j] = weight[i, j] + 0.25 * sum(b[i, r] * a[r, j] for r in range(2))
    merged = merge_delta(weight, mask, a, b, 0.25)
    assert torch.allclose(merged, expected, rtol=0, atol=1e-15)
    assert not merged[~mask].any()
    assert not torch.signbit(merged[~mask]).any()


def test_without_a_mask_outputs_are_those_of_the_adapter_beside_the_layer():
    weight, a, b, x = random(5, 7), random(2, 7, seed=1), random(5, 2, seed=2), random(3, 7, seed=3)
    beside = x @ weight.T + 0.5 * (x @ a.T) @ b.T
    assert torch.allclose(x @ merge_delta(weight, None, a, b, 0.5).T, beside, rtol=1e-14, atol=1e-14)


def test_a_transposed_layer():
    weight, a, b = random(7, 5), random(2, 7, seed=1), random(5, 2, seed=2)
    assert torch.allclose(merge_delta(weight, None, a, b, 2.0, transposed=True), weight + 2.0 * (b @ a).T, rtol=1e-14)


def test_a_convolution():
    weight, a, b = random(5, 3, 2, 2), random(2, 3, 2, 2, seed=1), random(5, 2, 1, 1, seed=2)
    x = random(1, 3, 6, 6, seed=3)
    conv = nn.functional.conv2d
    beside = conv(x, weight) + 0.5 * conv(conv(x, a), b)
    assert torch.allclose(conv(x, merge_delta(weight, None, a, b, 0.5)), beside, rtol=1e-12, atol=1e-12)


def test_the_sum_is_rounded_once():
    weight, a, b = (random(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate([(4, 4), (2, 4), (4, 2)]))
    exact = weight.double() + 0.3 * b.double() @ a.double()
    merged = merge_delta(weight, None, a, b, 0.3)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.to(torch.bfloat16))


@pytest.mark.parametrize(("a", "b"), [((2, 6), (5, 2)), ((3, 7), (5, 2)), ((7,), (5, 1)), ((2, 7), (5, 2, 3))])
def test_shapes_that_do_not_fit(a, b):
    with pytest.raises(InputError, match="make no change of a weight of shape"):
        merge_delta(random(5, 7), None, random(*a), random(*b), 1.0)


def test_a_mask_that_does_not_fit():
    with pytest.raises(InputError, match=r"the mask has shape \[7, 5\]"):
        merge_delta(random(5, 7), mask_of(7, 5), random(2, 7), random(5, 2), 1.0)


# ---------------------------------------------------------------- adapters in folders

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q", "v"], "use_rslora": False, "fan_in_fan_out": False}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 3)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layers = nn.ModuleList(Attention() for _ in range(2))


def adapter(folder, config=None, tensors=None):
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | (config or {})))
    if tensors is None:
        tensors = {}
        for i in range(2):
            for name, outputs in (("q", 4), ("v", 3)):
                rank = (config or {}).get("rank_pattern", {}).get(f"layers.{i}.{name}", 2)
                tensors |= {
                    f"layers.{i}.{name}.lora_A.weight": random(rank, 4, seed=i),
                    f"layers.{i}.{name}.lora_B.weight": random(outputs, rank),
                }
    save_file({f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return tensors


def test_an_adapter_is_merged_under_masks(tmp_path):
    tensors = adapter(tmp_path)
    model = Model().double()
    mask = mask_of(4, 4)
    masks = Masks({"layers.0.q.weight": mask})
    masks.apply_(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    changed = merge_adapter(model, tmp_path, masks)
    assert sorted(changed) == [f"layers.{i}.{name}.weight" for i in range(2) for name in ("q", "v")]
    for name, parameter in model.named_parameters():
        expected = before[name]
        if name in changed:
            stem = name.removesuffix(".weight")
            expected = expected + 8 / 2 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        if name == "layers.0.q.weight":
            expected = expected * mask
        assert torch.allclose(parameter, expected, rtol=1e-14, atol=1e-15), name


def test_scales_of_single_modules(tmp_path):
    adapter(tmp_path, {"rank_pattern": {"layers.1.q": 3}, "alpha_pattern": {"v": 4, r"layers\.0\.q": 6}})
    scales = {name: delta.scale for name, delta in read_adapter(tmp_path).items()}
    assert scales == {
        "layers.0.q.weight": 6 / 2,
        "layers.0.v.weight": 4 / 2,
        "layers.1.q.weight": 8 / 3,
        "layers.1.v.weight": 4 / 2,
    }


def test_rank_stabilized_scales(tmp_path):
    adapter(tmp_path, {"use_rslora": True})
    assert all(delta.scale == 8 / 2**0.5 for delta in read_adapter(tmp_path).values())


def test_fan_in_fan_out_is_transposed(tmp_path):
    adapter(tmp_path, {"fan_in_fan_out": True})
    assert all(delta.transposed for delta in read_adapter(tmp_path).values())


def test_an_embedding(tmp_path):
    tensors = {"embed.lora_embedding_A": random(2, 6), "embed.lora_embedding_B": random(4, 2, seed=1)}
    adapter(tmp_path, tensors=tensors | {"embed.base_layer.weight": random(6, 4)})  # the frozen weight, as the library stores it
    model = Model().double()
    before = model.embed.weight.detach().clone()
    merge_adapter(model, tmp_path)
    tokens = torch.tensor([1, 5])
    beside = before[tokens] + 4.0 * tensors["embed.lora_embedding_A"].T[tokens] @ tensors["embed.lora_embedding_B"].T
    assert torch.allclose(model.embed(tokens), beside, rtol=1e-14)


def test_a_tied_weight_keeps_its_mask():
    model = Model().double()
    model.head = nn.Linear(4, 6, bias=False).double()
    model.head.weight = model.embed.weight
    mask = mask_of(6, 4)
    masks = Masks({"embed.weight": mask})
    masks.apply_(model)
    merge_adapter(model, {"head.weight": Delta(random(2, 4), random(6, 2), 1.0)}, masks)
    assert not model.embed.weight[~mask].any()
    assert model.embed.weight[mask].all()


A, B = {"layers.0.q.lora_A.weight": random(2, 4)}, {"layers.0.q.lora_B.weight": random(4, 2)}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "LOHA"}, None, "no LoRA adapter"),
        ({"use_dora": True}, None, "use_dora is set"),
        ({"modules_to_save": ["head"]}, None, "modules_to_save is set"),
        ({"bias": "all"}, None, "bias is 'all'"),
        ({"r": 0}, None, "r must be a positive number"),
        ({"r": 3}, None, r"lora_A of 'layers.0.q' has rank 2, and adapter_config.json says 3"),
        ({}, A, "has lora_A and no lora_B"),
        ({}, {**A, **B, "head.weight": random(2, 2)}, "'base_model.model.head.weight' is no lora_A or lora_B"),
        ({}, {**A, **B, "layers.0.q.lora_magnitude_vector": random(4)}, "is no lora_A or lora_B"),
    ],
)
def test_what_cannot_be_merged_is_told(tmp_path, config, tensors, message):
    adapter(tmp_path, config, tensors)
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path)


def test_files_that_are_missing_or_damaged_are_told(tmp_path):
    with pytest.raises(InputError, match=r"adapter_config.json: cannot be read"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match=r"adapter_model.safetensors: cannot be read"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.2.q.weight", r"changes 'layers.2.q.weight', which this Model does not have; did you mean"),
        ("layers.1.v.weight", "make no change"),
    ],
)
def test_nothing_changes_when_a_part_does_not_fit(name, message):
    model = Model().double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    delta = Delta(random(2, 4), random(4, 2), 1.0)
    with pytest.raises(InputError, match=message):
        merge_adapter(model, {"layers.0.q.weight": delta, name: delta})
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
