"""What blocks are called with: equal to what plain hooks record, with every argument; and walking equals running the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from niwaki.bench.architectures import architectures
from niwaki.calibration import Arguments, forward
from niwaki.errors import InputError
from niwaki.oneshot.blocks import find_blocks
from niwaki.oneshot.capture import capture, running, segments
from niwaki.oneshot.store import Store
from niwaki.target import Weights, select_targets


class Block(nn.Module):
    """Takes arguments of all kinds."""

    def __init__(self, width=4, inplace=False):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.inplace = inplace

    def forward(self, x, scale=None, *, mask=None, table=None, flag=False, **rest):
        if self.inplace:
            x = x.mul_(2)
        y = self.layer(x)
        y = y if scale is None else y * scale
        y = y if mask is None else y.masked_fill(mask, 0.0)
        y = y if table is None else y + table["offset"][0]
        return (x + y, "more") if flag else x + y


class Model(nn.Module):
    """Calls its blocks with arguments of all kinds, and can do between them what breaks a chain."""

    def __init__(self, between="nothing", blocks=3, **options):
        super().__init__()
        self.embedding = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block(**options) for _ in range(blocks))
        self.head = nn.Linear(4, 2)
        self.between = between
        self.head_calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        x = self.embedding(x)
        mask, first = x < -1, x
        for i, block in enumerate(self.blocks):
            own = torch.full((4,), float(i)) if self.between == "own arguments" else torch.arange(4.0)
            skip = first if self.between == "skip" and i == 2 else None
            scale = x.mean() if self.between == "depends" else None
            for _ in range(2 if self.between == "repeats" else 1):
                x, _ = block(x, scale, mask=mask, table={"offset": [own]}, flag=True, name="same", skip=skip)
            if self.between == "relu":
                x = torch.relu(x)
            if self.between == "in place":
                x += 1
        self.head_calls += 1
        return self.head(x)


NAMES = ["blocks.0", "blocks.1", "blocks.2"]
DATA = [(torch.randn(3, 4, generator=torch.Generator().manual_seed(i)), None) for i in range(3)]


def recorded(model, names, data):
    """What hooks see, batch after batch: name -> arguments; the calls of a block one after the other."""
    seen = {name: [] for name in names}

    def see(name):
        def hook(module, args, kwargs):
            leaves, spec = tree_flatten((args, kwargs))
            seen[name].append(([leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(see(name), with_kwargs=True) for name in names]
    with running(model):
        for inputs, _ in data:
            forward(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def require_equal(given: Arguments, expected):
    leaves, spec = tree_flatten((given.args, dict(given.kwargs)))
    assert spec == expected[1]
    for mine, theirs in zip(leaves, expected[0], strict=True):
        if isinstance(theirs, torch.Tensor):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
        else:
            assert mine == theirs


def walk(model, names, data, budget=None):
    """Walk through all blocks without pruning; compare every call with the record."""
    seen = recorded(model, names, data)
    parts, never = segments(model, names, data[0][0])
    assert not never
    for part in parts:
        with Store(budget) as store:
            captured = capture(model, part, data, store)
            assert len(captured) == len(data) * part.calls
            for name in part.names:
                for i in range(len(captured)):
                    require_equal(captured.arguments(i, name), seen[name][i])
                    with running(model):
                        output = forward(model.get_submodule(name), captured.arguments(i, name))
                    if name != part.names[-1]:
                        captured.advance(i, output)
            captured.drop()
            assert store.bytes_in_memory == 0
    return parts


@pytest.mark.parametrize("budget", [None, 100])
def test_captured_arguments_equal_a_record(budget):
    model = Model()
    [part] = walk(model, NAMES, DATA, budget)
    assert (part.names, part.slot, part.shared, part.reason) == (tuple(NAMES), 0, True, "")


def test_blocks_with_arguments_of_their_own_are_one_chain():
    [part] = walk(Model("own arguments"), NAMES, DATA)
    assert not part.shared


def test_blocks_that_change_their_input_in_place():
    walk(Model(inplace=True), NAMES, DATA)


@pytest.mark.parametrize(
    ("between", "parts", "reason"),
    [
        ("relu", [("blocks.0",), ("blocks.1",), ("blocks.2",)], "it does not read what blocks.0 wrote, as it was"),
        ("in place", [("blocks.0",), ("blocks.1",), ("blocks.2",)], "it does not read what blocks.0 wrote, as it was"),
        ("depends", [("blocks.0",), ("blocks.1",), ("blocks.2",)], "its other arguments depend on blocks.0"),
        ("repeats", [("blocks.0",), ("blocks.1",), ("blocks.2",)], "blocks.1 is called several times"),
    ],
)
def test_what_is_no_chain_is_caught_anew(between, parts, reason):
    found = walk(Model(between), NAMES, DATA)
    assert [part.names for part in found] == parts
    assert found[0].reason == ""
    assert found[1].reason == reason


def test_the_first_input_may_go_to_later_blocks_too():
    # It depends on no block, so the chain holds.
    assert [part.names for part in walk(Model("skip"), NAMES, DATA)] == [tuple(NAMES)]


@pytest.mark.parametrize("name", ["llama", "gpt-2", "bert", "opt", "t5", "vit", "bart", "gemma2", "resnet-20", "encoder", "nn.Transformer"])
def test_walking_equals_running_real_architectures(name):
    known = architectures()
    if name not in known:
        pytest.skip("transformers is not installed")
    torch.manual_seed(0)
    model = known[name].build().eval()
    example = known[name].inputs()
    inputs = Arguments(kwargs=example) if isinstance(example, dict) else example
    names = find_blocks(model, [target.name for target in select_targets(model, Weights())[0]]).names
    parts = walk(model, names, [(inputs, None)] * 2)
    assert len(parts) == (2 if name in ("t5", "bart", "nn.Transformer") else 1)


def test_the_model_is_left_as_it_was():
    model = Model().train()
    before = torch.random.get_rng_state()
    [part], _ = segments(model, NAMES, DATA[0][0])
    with Store() as store:
        capture(model, part, DATA, store)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.seen == 0
    assert model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_forward_pass_ends_at_the_first_block():
    model = Model()
    [part], _ = segments(model, NAMES, DATA[0][0])
    model.head_calls = 0
    with Store() as store:
        capture(model, part, DATA, store)
    assert model.head_calls == 0


def test_hooks_come_off_when_the_model_fails():
    model = Model()
    [part], _ = segments(model, NAMES, DATA[0][0])
    with Store() as store, pytest.raises(RuntimeError):
        capture(model, part, [(torch.randn(3, 5), None)], store)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_caches_are_off_inside_and_on_again():
    transformers = pytest.importorskip("transformers")
    model = architectures()["llama"].build().eval()
    model.config.use_cache = True
    assert isinstance(model, transformers.PreTrainedModel)
    tokens = torch.randint(0, 50, (2, 6))
    names = ("model.layers.0", "model.layers.1")
    [part], _ = segments(model, names, tokens)
    with Store() as store:
        captured = capture(model, part, [(tokens, None)], store)
        assert captured.arguments(0, names[0]).kwargs["past_key_values"] is None
    assert model.config.use_cache is True


def test_blocks_that_are_not_called_are_told():
    model = Model()
    model.spare = Block()
    parts, never = segments(model, [*NAMES, "spare"], DATA[0][0])
    assert [part.names for part in parts] == [tuple(NAMES)]
    assert never == ["spare"]
    with pytest.raises(InputError, match="none is called"):
        segments(model, ["spare"], DATA[0][0])


def test_blocks_within_blocks_are_refused():
    with pytest.raises(InputError, match=r"'blocks.0.layer' is called from within 'blocks.0'"):
        segments(Model(), ["blocks.0", "blocks.0.layer"], DATA[0][0])


def test_data_without_batches_are_refused():
    model = Model()
    [part], _ = segments(model, NAMES, DATA[0][0])
    with Store() as store, pytest.raises(InputError, match="no batch"):
        capture(model, part, [], store)


def test_data_can_be_read_again_and_again():
    model = Model()
    [part], _ = segments(model, NAMES, DATA[0][0])
    with Store() as store:
        data = capture(model, part, DATA, store).of("blocks.0")
        assert len(data) == 3
        first, second = ([given for given, _ in data] for _ in range(2))
        assert all(torch.equal(a.args[0], b.args[0]) for a, b in zip(first, second, strict=True))
