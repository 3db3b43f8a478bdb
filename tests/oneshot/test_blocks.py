"""Repeated blocks: found in six families of transformers and in residual networks, or named."""

import pytest
from torch import nn

from niwaki.bench.architectures import architectures
from niwaki.errors import InputError
from niwaki.oneshot.blocks import find_blocks
from niwaki.target import Weights, select_targets

FOUND = {
    "llama": ["model.layers.0", "model.layers.1"],
    "gpt-2": ["transformer.h.0", "transformer.h.1"],
    "bert": ["bert.encoder.layer.0", "bert.encoder.layer.1"],
    "opt": ["model.decoder.layers.0", "model.decoder.layers.1"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
    "bart": ["model.encoder.layers.0", "model.encoder.layers.1", "model.decoder.layers.0", "model.decoder.layers.1"],
    "mixtral": ["model.layers.0", "model.layers.1"],
    "decoder": ["blocks.0", "blocks.1"],
    "encoder": ["blocks.0", "blocks.1"],
    "resnet-20": [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3)],
    "nn.Transformer": [f"transformer.{side}.layers.{i}" for side in ("encoder", "decoder") for i in range(2)],
}


def targets(model):
    return [target.name for target in select_targets(model, Weights())[0]]


@pytest.mark.parametrize("name", FOUND)
def test_blocks_are_found_without_scripts(name):
    known = architectures()
    if name not in known:
        pytest.skip("transformers is not installed")
    model = known[name].build()
    assert list(find_blocks(model, targets(model)).names) == FOUND[name]


def test_blocks_of_a_vision_transformer_are_found():
    known = architectures()
    if "vit" not in known:
        pytest.skip("transformers is not installed")
    model = known["vit"].build()
    blocks = find_blocks(model, targets(model))
    assert set(blocks.kinds) == {"ViTLayer"}
    assert len(blocks.names) == 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)


class Other(Block):
    pass


def holder(**modules):
    model = nn.Module()
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def test_short_lists_count_together():
    model = holder(first=nn.ModuleList([Block()]), second=nn.Sequential(Block()), third=nn.ModuleList([Other()]))
    assert find_blocks(model, ["first.0.layer.weight", "second.0.layer.weight", "third.0.layer.weight"]).names == ("first.0", "second.0")


def test_what_holds_no_target_is_no_block():
    model = holder(layers=nn.ModuleList([Block(), Block(), nn.ReLU(), Block()]))
    assert find_blocks(model, ["layers.0.layer.weight", "layers.3.layer.weight"]).names == ("layers.0", "layers.3")
    assert str(find_blocks(model, ["layers.0.layer.weight", "layers.3.layer.weight"])) == "layers.0 ... layers.3: 2 blocks of Block"


def test_the_outermost_lists_count():
    stages = nn.ModuleList(holder(inner=nn.ModuleList([Block(), Block()])) for _ in range(2))
    model = holder(stages=stages)
    assert find_blocks(model, [name for name, _ in model.named_parameters()]).names == ("stages.0", "stages.1")


def test_blocks_can_be_named():
    model = holder(layers=nn.ModuleList([Block(), Block()]), head=nn.Linear(4, 2))
    names = [name for name, _ in model.named_parameters()]
    assert find_blocks(model, names, "layers").names == ("layers.0", "layers.1")
    assert find_blocks(model, names, ["layers.1", "head"]).names == ("layers.1", "head")
    assert str(find_blocks(model, names, ["layers.1", "head"])) == "layers.1: 1 block of Block\nhead: 1 block of Linear"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("layer", r"'layer' is no module of this Module; did you mean 'layers'\?"),
        ("", "'' is no module"),
        ("head", "'head' has no children"),
        (["layers", "layers.0"], "'layers.0' is in 'layers', which is a block too"),
        (["layers.0", "layers.0"], "blocks must not overlap"),
        (["norm"], "none of norm holds a target"),
    ],
)
def test_wrong_names_are_told(blocks, message):
    model = holder(layers=nn.ModuleList([Block(), Block()]), head=nn.Linear(4, 2), norm=nn.LayerNorm(4))
    with pytest.raises(InputError, match=message):
        find_blocks(model, ["layers.0.layer.weight", "head.weight"], blocks)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (holder(layer=nn.Linear(4, 4)), "it has no nn.ModuleList or nn.Sequential"),
        (holder(mlp=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), "mlp has single layers, Linear"),
        (holder(layers=nn.ModuleList([Block()])), "layers has a single Block"),
        (holder(layers=nn.ModuleList([Block(), Other()])), "layers has several classes: Block, Other"),
    ],
)
def test_why_there_are_none_is_told(model, reason):
    with pytest.raises(InputError, match=reason):
        find_blocks(model, [name for name, _ in model.named_parameters()])
