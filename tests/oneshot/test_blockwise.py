"""Pruning block by block against oracles that hook the whole model and rank with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import niwaki
from niwaki import Recipe
from niwaki.calibration import Arguments
from niwaki.errors import InputError
from niwaki.masks import Masks
from niwaki.oneshot.blockwise import prune_blocks

WIDTH = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 10)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(10, WIDTH)

    def forward(self, x, *, scale):
        return x + scale * self.down(self.drop(torch.relu(self.up(x))))


class Model(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.embedding = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x, scale=1.0):
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, scale=scale)
        return self.head(x)


def build(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model(**options).double().eval()


def batches(count=3, size=5):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 7, 4, generator=generator, dtype=torch.float64), None) for _ in range(count)]


INNER = [f"blocks.{i}.{side}.weight" for i in range(3) for side in ("up", "down")]
WANDA = Recipe(sparsity=0.5, saliency="wanda", allocation={"uniform": {"per": "row"}})


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def inputs_of(model, name, data):
    """What a linear layer of the model as it is reads: numpy [observations, inputs]."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for x, _ in data:
            model(x)
    hook.remove()
    return torch.cat(seen).numpy()


# ---------------------------------------------------------------- which weights go


def test_magnitude_equals_numpy():
    model = build()
    before = weights(model)
    done = prune_blocks(model, Recipe(sparsity=0.5), batches())
    assert list(done.masks) == INNER
    for name in INNER:
        size = np.abs(before[name].numpy()).ravel()
        keep = np.zeros(size.size, dtype=bool)
        keep[np.argsort(-size, kind="stable")[: round(0.5 * size.size)]] = True
        assert np.array_equal(done.masks[name].numpy().ravel(), keep)
    after = weights(model)
    for name, weight in before.items():
        assert torch.equal(after[name], weight * done.masks[name] if name in done.masks else weight)
    assert [layer.name for layer in done.layers] == INNER
    assert all(layer.sparsity == 0.5 and layer.weights == 60 for layer in done.layers)
    assert str(done.blocks) == "blocks.0 ... blocks.2: 3 blocks of Block"
    assert done.notes == ("outside the blocks, and left dense: embedding.weight",)


def test_each_block_is_ranked_on_what_the_pruned_blocks_before_it_write():
    data = batches()
    model, reference = build(), build()
    done = prune_blocks(model, WANDA, data)
    changed = 0
    dense = build()
    for i in range(3):
        # A block is ranked as a whole: both layers see the block as it was, behind pruned blocks.
        norms = {side: np.linalg.norm(inputs_of(reference, f"blocks.{i}.{side}", data), axis=0) for side in ("up", "down")}
        for side in ("up", "down"):
            name = f"blocks.{i}.{side}.weight"
            parameter = reference.get_parameter(name)
            scores = np.abs(parameter.detach().numpy()) * norms[side]
            keep = np.zeros(scores.shape, dtype=bool)
            for row, best in enumerate(np.argsort(-scores, axis=1, kind="stable")):
                keep[row, best[: scores.shape[1] // 2]] = True
            assert np.array_equal(done.masks[name].numpy(), keep), name
            on_dense = np.abs(parameter.detach().numpy()) * np.linalg.norm(inputs_of(dense, f"blocks.{i}.{side}", data), axis=0)
            changed += not np.array_equal(np.argsort(-on_dense, axis=1), np.argsort(-scores, axis=1))
            with torch.no_grad():
                parameter.mul_(torch.from_numpy(keep))
    assert changed  # or else the test could not tell sequential from not
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def test_all_blocks_at_once_equal_the_whole_model():
    data = batches()
    model, reference = build(), build()
    recipe = Recipe(sparsity=0.6, saliency="wanda", allocation="global")
    done = prune_blocks(model, recipe, data, sequential=False)
    whole = niwaki.Sparsifier(reference, recipe.replace(target={"weights": {"include": ["blocks"]}}), data=data).finalize()
    assert done.masks == whole.masks
    assert done.masks.sparsity == 0.6
    assert {layer.block for layer in done.layers} == {"blocks.0", "blocks.1", "blocks.2"}


def test_what_is_outside_can_be_pruned_at_the_end():
    data = batches()
    model = build()
    recipe = Recipe(sparsity=0.5, saliency="wanda", target={"weights": {"include": ["*"]}})
    done = prune_blocks(model, recipe, data, outside="prune")
    assert list(done.masks) == ["embedding.weight", *INNER, "head.weight"]
    assert {name: layer.block for layer in done.layers for name in [layer.name]}["head.weight"] == ""
    # The head is ranked on the pruned network.
    norms = np.linalg.norm(inputs_of(model, "head", data), axis=0)
    scores = np.abs(build().head.weight.detach().numpy()) * norms
    keep = np.zeros(scores.size, dtype=bool)
    keep[np.argsort(-scores.ravel(), kind="stable")[: scores.size // 2]] = True
    assert np.array_equal(done.masks["head.weight"].numpy().ravel(), keep)
    for name, mask in done.masks.items():
        assert not model.get_parameter(name)[~mask].any()


def test_an_update_of_the_survivors_is_what_the_next_block_sees():
    data = batches()
    model, reference = build(), build()
    recipe = Recipe(sparsity=0.5, saliency="sparsegpt")
    prune_blocks(model, recipe, data)
    for i in range(3):
        block = reference.blocks[i]
        seen = []
        hook = block.register_forward_pre_hook(lambda m, args, kwargs, s=seen: s.append((Arguments(args, kwargs), None)), with_kwargs=True)
        with torch.no_grad():
            for x, _ in data:
                reference(x)
        hook.remove()
        niwaki.Sparsifier(block, recipe.replace(target={"weights": {"include": ["up.weight", "down.weight"]}}), data=seen).finalize()
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert not torch.equal(model.blocks[0].up.weight, build().blocks[0].up.weight * (model.blocks[0].up.weight != 0))


def test_random_choices_differ_from_block_to_block_and_by_seed():
    recipe = Recipe(sparsity=0.5, saliency="random")
    first, again, other = (prune_blocks(build(), recipe, batches(), seed=seed).masks for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert not torch.equal(first["blocks.0.up.weight"], first["blocks.1.up.weight"])


def test_masks_to_start_from_stay():
    model = build()
    held = torch.rand(10, WIDTH, generator=torch.Generator().manual_seed(2)) > 0.3
    outside = torch.rand(WIDTH, 4, generator=torch.Generator().manual_seed(2)) > 0.3
    start = Masks({"blocks.1.up.weight": held, "embedding.weight": outside})
    start.apply_(model)
    done = prune_blocks(model, Recipe(sparsity=0.5), batches(), masks=start)
    assert not done.masks["blocks.1.up.weight"][~held].any()
    assert int(done.masks["blocks.1.up.weight"].sum()) == 30
    assert torch.equal(done.masks["embedding.weight"], outside)


def test_channels_inside_a_block():
    model = build()
    recipe = Recipe(sparsity=0.5, granularity="channel", target={"weights": {"include": ["*up*"]}})
    done = prune_blocks(model, recipe, batches())
    for block in model.blocks:
        gone = block.up.weight.eq(0).all(dim=1)
        assert int(gone.sum()) == 5
        assert not block.up.bias[gone].any()
        assert not block.down.weight[:, gone].any()
    assert "blocks.0.up.bias" in done.masks


def test_a_weight_in_two_blocks_is_pruned_once():
    model = build()
    model.blocks[2].up.weight = model.blocks[0].up.weight
    done = prune_blocks(model, Recipe(sparsity=0.5), batches())
    assert "blocks.0.up.weight is in blocks.0 and blocks.2; it was pruned with the first one" in done.notes
    assert "blocks.2.up.weight" not in done.masks
    assert int(model.blocks[2].up.weight.eq(0).sum()) == 30


# ---------------------------------------------------------------- what is told


def test_errors_of_layers_equal_numpy():
    data = batches()
    model, dense = build(), weights(build())
    done = prune_blocks(model, Recipe(sparsity=0.5, saliency="sparsegpt"), data)
    for layer in done.layers:
        module = layer.name.removesuffix(".weight")
        read = inputs_of(model, module, data)
        bias = dense[f"{module}.bias"].numpy()
        was = read @ dense[layer.name].numpy().T + bias
        now = read @ model.get_parameter(layer.name).detach().numpy().T + bias
        assert layer.error == pytest.approx(np.linalg.norm(now - was) / np.linalg.norm(was), rel=1e-12)


def test_progress_counts_blocks():
    seen = []
    prune_blocks(build(), Recipe(sparsity=0.5), batches(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("memory", [0, 2000])
def test_activations_on_disk_make_no_difference(memory):
    model, reference = build(), build()
    done = prune_blocks(model, Recipe(sparsity=0.5, normalization="none"), batches(), memory=memory)
    assert any(note.startswith("memory: ") and note.endswith("of activations went to disk") for note in done.notes)
    assert done.masks == prune_blocks(reference, Recipe(sparsity=0.5), batches()).masks
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def test_statistics_and_activations_share_the_memory():
    needed = prune_blocks(build(), Recipe(sparsity=0.5, saliency="sparsegpt"), batches()).statistics_bytes
    assert needed == 2 * 8 * (WIDTH**2 + 10**2)
    fits = prune_blocks(build(), Recipe(sparsity=0.5, saliency="sparsegpt"), batches(), memory=needed)
    assert any("went to disk" in note for note in fits.notes)
    with pytest.raises(InputError, match="memory: the statistics need"):
        prune_blocks(build(), Recipe(sparsity=0.5, saliency="sparsegpt"), batches(), memory=needed - 1)


def test_data_that_can_be_read_once():
    done = prune_blocks(build(), WANDA, iter(batches()))
    assert done.masks == prune_blocks(build(), WANDA, batches()).masks


def test_the_model_is_left_as_it_was():
    model = build().train()
    state = torch.random.get_rng_state()
    prune_blocks(model, WANDA, batches())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(sparsity=0.5, allocation="global"), "allocation: 'global' compares the blocks, and each is pruned before the next"),
        (Recipe(sparsity=0.5, saliency="taylor"), "needs gradients of a loss, and a block by itself has none"),
        (Recipe(sparsity=0.5, saliency="woodfisher"), "'woodfisher' needs GradientBank, which is not of a block by itself"),
        (Recipe(sparsity=0.5, saliency="synflow"), "'synflow' needs SynapticFlow, which is not of a block by itself"),
        (Recipe(sparsity=0.5, allocation="sensitivity"), "'sensitivity' compares the blocks"),
        (niwaki.method("str"), "does not rank weights to a given sparsity"),
        (niwaki.method("movement", sparsity=0.5), "learns its scores by training"),
    ],
)
def test_what_a_block_cannot_know_is_refused(recipe, message):
    model = build()
    before = weights(model)
    with pytest.raises(InputError, match=message):
        prune_blocks(model, recipe, batches())
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())


class Remembering(Block):
    """Writes something else each time."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, *, scale):
        self.calls += 1
        return super().forward(x, scale=scale * self.calls)


def test_blocks_that_remember_are_refused():
    model = build()
    model.blocks = nn.ModuleList(Remembering().double() for _ in range(2))
    with pytest.raises(InputError, match=r"'blocks.0' writes something else when it is called again"):
        prune_blocks(model, Recipe(sparsity=0.5), batches())


def test_no_data_is_refused():
    with pytest.raises(InputError, match="no batch"):
        prune_blocks(build(), Recipe(sparsity=0.5), [])
