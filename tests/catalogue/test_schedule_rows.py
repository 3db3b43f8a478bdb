"""The rows about when to sparsify, in short trainings: what they mask, how much, and what is left of it in the end."""

import math

import pytest
import torch
from catalogue.test_runs import Network, examples
from support import pruned_are_zero
from torch.nn import functional
from torch.utils.data import TensorDataset
from training.small import ACCURACY, trainer, weights

import niwaki
from niwaki.recipe.stages import unroll
from niwaki.tasks import Data, Model, Task, Training

TASK = Task(
    name="images",
    models={"network": Model(lambda data: Network(), Training(epochs=3, batch_size=8, learning_rate=0.05, threads=1))},
    data=lambda folder: Data(TensorDataset(*examples(64, 0)), TensorDataset(*examples(32, 1))),
    loss=functional.cross_entropy,
    metrics={"accuracy": ACCURACY},
)
SIZES = {"conv.weight": 8 * 4 * 9, "linear.weight": 8 * 8}
ELEMENTS = sum(SIZES.values())


def run(name, **given):
    made, masks = trainer(niwaki.method(name, **given).to_yaml(), task=TASK), []
    made.run(progress=lambda *_: masks.append(made.masks if made.sparsifier is None else made.sparsifier.masks))
    assert all(value.isfinite().all() for value in made.model.state_dict().values())
    assert pruned_are_zero(made.model, made.masks)
    return made, masks


def kept(masks):
    return {name: int(masks[name].sum()) for name in SIZES}


@pytest.mark.parametrize(
    ("name", "each_layer"),
    [
        ("iterative_hard_thresholding", True),
        ("smallest_weight", False),
        ("speech_sparseness", False),
        ("nmt_class_blind", False),
        ("packnet", True),
        ("bert_magnitude", True),
        ("train_large_then_compress", True),
        ("supermask_signs", True),
    ],
)
def test_as_many_weights_as_asked_are_masked_in_the_end(name, each_layer):
    for sparsity in (None, 0.75):
        made, _ = run(name, sparsity=sparsity)
        said = sparsity or next(leaf.recipe.final_sparsity for leaf in unroll(niwaki.method(name)) if leaf.recipe.final_sparsity)
        found = kept(made.masks)
        assert sum(found.values()) == round((1 - said) * ELEMENTS)
        if each_layer:
            assert all(abs(found[layer] - (1 - said) * size) < 1 for layer, size in SIZES.items())


def test_pieces_of_several_weights():
    made, _ = run("kernel_granularity")
    kernels = made.masks["conv.weight"].flatten(2)
    assert torch.equal(kernels.any(2), kernels.all(2))
    assert int(kernels.any(2).sum()) == round(0.4 * 32)
    made, _ = run("scalpel")
    pairs = made.masks["linear.weight"].view(8, 4, 2)
    assert torch.equal(pairs.any(2), pairs.all(2))
    pieces = 8 * 4 + 8 * 2 * 9
    for _ in range(4):
        pieces = round(0.7 * pieces)
    assert sum(kept(made.masks).values()) == 2 * pieces
    made, _ = run("sparse_wavernn", sparsity=0.5)
    columns = made.masks["linear.weight"]
    assert torch.equal(columns.any(0), columns.all(0))
    assert int(columns.any(0).sum()) == 4


def test_sparse_connections_are_drawn_first_and_pruned_later():
    _, masks = run("sparse_connection")
    assert sum(kept(masks[0]).values()) == ELEMENTS // 2
    assert sum(kept(masks[-1]).values()) == ELEMENTS // 4
    assert all(bool((masks[0][name] >= masks[-1][name]).all()) for name in SIZES)
    initial = trainer(None, task=TASK).model.state_dict()
    for name in SIZES:
        ranks = initial[name].abs().flatten().argsort().argsort().double()
        assert abs(float(ranks[masks[0][name].flatten()].mean()) / (SIZES[name] / 2) - 1) < 0.2  # not by their sizes


@pytest.mark.parametrize(("name", "rounds", "fraction"), [("late_rewinding", 8, 0.2), ("bert_tickets", 5, 0.214)])
def test_tickets_are_masked_round_by_round(name, rounds, fraction):
    made, masks = run(name)
    counts = [ELEMENTS]
    for _ in range(rounds):
        counts.append(round((1 - fraction) * counts[-1]))
    found = list(dict.fromkeys(sum(kept(one).values()) if one else ELEMENTS for one in masks))
    assert found == counts
    assert math.isclose(made.masks.density, {"late_rewinding": 0.168, "bert_tickets": 0.3}[name], abs_tol=5e-3)


def test_signs_of_initial_weights_are_what_a_supermask_leaves():
    made, _ = run("supermask_signs")
    initial = trainer(None, task=TASK).model.state_dict()
    for name, value in made.model.state_dict().items():
        if name in SIZES:
            expected = initial[name].sign() * initial[name].double().std(correction=0).float()
            torch.testing.assert_close(value, expected.masked_fill(~made.masks[name], 0.0))
        else:
            assert torch.equal(value, initial[name])


def test_an_early_bird_trains_a_smaller_model_for_a_whole_run():
    made, _ = run("early_bird_channels")
    first, last = (stage for stage in made.stages if stage.end > stage.begin)
    assert first.end <= 12
    assert last.end - last.begin == 24
    assert made.model.conv.out_channels + made.model.linear.out_features <= 8
    assert made.removed


@pytest.mark.parametrize("name", ["lprune", "autoprune"])
def test_the_validation_loss_decides_how_much_goes(name):
    """Labels that cannot be learned: the loss of the validation examples rises soon, whatever the network learns of the others."""
    noise = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(2))
    data = Data(TensorDataset(examples(64, 0)[0], noise), TensorDataset(*examples(32, 1)))
    task = Task(
        name="noise",
        models={"network": Model(lambda _: Network(), Training(epochs=12, batch_size=8, learning_rate=0.2, threads=1))},
        data=lambda folder: data,
        loss=functional.cross_entropy,
        metrics={"accuracy": ACCURACY},
    )
    for sparsity in (None, 0.3):
        made = trainer(niwaki.method(name, sparsity=sparsity).to_yaml(), task=task)
        done = made.run()
        [note] = [note for note in done.notes if "looks" in note]
        assert done.masks.sparsity > 0.25
        if sparsity is not None:
            assert sum(kept(done.masks).values()) == round(0.7 * ELEMENTS)
            assert "sparsity of 0.2" in note or "sparsity of 0.3" in note
    first = next(epoch.sparsity for epoch in done.history if epoch.sparsity)
    assert first <= 0.36


def test_rising_thresholds_mask_more_and_more():
    recipe = niwaki.method("rnn_threshold_ramp").to_yaml().replace("100 steps", "2 steps")
    made, shares = trainer(recipe, task=TASK), []
    made.run(progress=lambda *_: shares.append(made.sparsifier.sparsity))
    assert shares == sorted(shares)
    assert 0.5 < shares[-1] < 1
    assert shares[12] == shares[-1]  # no update after half of the run
    assert weights(made.model)["linear.weight"].count_nonzero() < 40
