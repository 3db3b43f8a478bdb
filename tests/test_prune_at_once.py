"""niwaki.prune: what it masks, what it tells, what it refuses. The scores and updates themselves have tests of their own."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import niwaki

EVERYTHING = {"weights": {"include": ["*"]}}
loss = nn.functional.cross_entropy


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 8, dtype=dtype), torch.randint(3, (16,))) for _ in range(4)]


def test_counts_are_exact_and_losses_are_those_of_the_model() -> None:
    model, data = network(), batches()
    with torch.no_grad():
        before = np.mean([float(loss(model(x), y)) for x, y in data])
    done = niwaki.prune(model, "magnitude", sparsity=0.75, data=data, loss=loss, target=EVERYTHING)
    with torch.no_grad():
        after = np.mean([float(loss(model(x), y)) for x, y in data])
    weights = [model[i].weight for i in (0, 2, 4)]
    total = sum(w.numel() for w in weights)
    assert sum(int((w != 0).sum()) for w in weights) == round(0.25 * total)
    assert done.loss_before == pytest.approx(before, rel=1e-6)
    assert done.loss_after == pytest.approx(after, rel=1e-6)
    assert done.sparsity == pytest.approx(0.75, abs=0.5 / total)
    assert done.model is model
    assert sum(row.active for row in done.rows) == round(0.25 * total)


def test_it_is_one_global_magnitude_threshold() -> None:
    model, dense = network(), network()
    niwaki.prune(model, "magnitude", sparsity=0.6, target=EVERYTHING)
    sizes = np.concatenate([dense[i].weight.detach().abs().numpy().ravel() for i in (0, 2, 4)])
    threshold = np.sort(sizes)[::-1][round(0.4 * sizes.size) - 1]
    for i in (0, 2, 4):
        whole = dense[i].weight.detach().numpy()
        np.testing.assert_array_equal(model[i].weight.detach().numpy(), np.where(np.abs(whole) >= threshold, whole, 0))


def test_the_table_and_the_json_tell_the_same() -> None:
    done = niwaki.prune(network(), "magnitude", sparsity=0.5, data=batches(), loss=loss)
    text, data = str(done), json.loads(json.dumps(done.to_data()))
    for row in data["tensors"]:
        assert f"{row['active']:,}" in text
        assert row["name"] in text
    assert f"{data['loss_before']:.4f} before, {data['loss_after']:.4f} after" in text


def test_it_saves_what_loads_again(tmp_path) -> None:
    done = niwaki.prune(network(), "magnitude", sparsity=0.5)
    done.save(tmp_path / "model.safetensors")
    again = network()
    niwaki.load(tmp_path / "model.safetensors", again)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), done.model.state_dict().values(), strict=True))


def test_masks_to_start_from_stay() -> None:
    first = niwaki.prune(network(), "random", sparsity=0.5, target=EVERYTHING)
    model = network()
    second = niwaki.prune(model, "magnitude", sparsity=0.8, masks=first.masks, target=EVERYTHING)
    assert all(not bool((second.masks[name] & ~mask).any()) for name, mask in first.masks.items())


def test_an_iterator_of_batches_is_enough() -> None:
    done = niwaki.prune(network(), "snip", sparsity=0.5, data=iter(batches()), loss=loss)
    again = niwaki.prune(network(), "snip", sparsity=0.5, data=batches(), loss=loss)
    assert done.masks == again.masks


def test_the_model_keeps_its_mode_gradients_and_buffers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    model.train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    niwaki.prune(
        model, niwaki.Recipe(sparsity=0.5, target=EVERYTHING, saliency="woodfisher", compensation="obs"), data=batches(), loss=loss
    )
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_batch_normalization_is_estimated_anew_with_the_masks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    data = batches(torch.float64)
    niwaki.prune(model, niwaki.Recipe(sparsity=0.5, target=EVERYTHING, compensation="batchnorm_recalibration"), data=data, loss=loss)
    with torch.no_grad():
        seen = torch.cat([model[0](x) for x, _ in data])
    torch.testing.assert_close(model[1].running_mean, seen.mean(dim=0), rtol=0, atol=1e-12)


def test_least_squares_puts_out_what_the_normal_equations_say() -> None:
    model, dense, data = network(torch.float64), network(torch.float64), batches(torch.float64)
    recipe = niwaki.Recipe(sparsity=0.5, target={"weights": {"include": ["0.weight"]}}, compensation={"least_squares": {"ridge": 0.0}})
    masks = niwaki.prune(model, recipe, data=data, loss=loss).masks
    inputs = torch.cat([x for x, _ in data]).numpy()
    for row in range(12):
        support = masks["0.weight"][row].numpy()
        wanted = inputs @ dense[0].weight.detach().numpy()[row]
        found, *_ = np.linalg.lstsq(inputs[:, support], wanted, rcond=None)
        np.testing.assert_allclose(model[0].weight.detach().numpy()[row, support], found, atol=1e-10)


def test_a_memory_budget_is_kept() -> None:
    recipe = niwaki.Recipe(sparsity=0.5, target=EVERYTHING, saliency={"woodfisher": {"gradients": 64}})
    weights = 8 * 12 + 12 * 10 + 10 * 3
    needed = 4 * 64 * weights
    done = niwaki.prune(network(), recipe, data=batches(), loss=loss, memory=needed)
    assert done.statistics_bytes == needed
    with pytest.raises(niwaki.InputError, match=r"memory: the statistics need .* and .* are allowed; gradients: 63 would fit"):
        niwaki.prune(network(), recipe, data=batches(), loss=loss, memory=needed - 1)


@pytest.mark.parametrize(
    ("recipe", "given", "says"),
    [
        ("snip", {}, "needs data= and loss="),
        ("woodfisher", {"data": True}, "needs data= and loss="),
        ("wanda", {}, "needs data="),
        ("movement", {"data": True, "loss": True}, "seen of the training"),
        ("str", {"data": True, "loss": True}, "strength of relaxation"),
        ("accumulated_movement", {"data": True, "loss": True}, "seen of the training"),
        ("no_such_method", {}, "unknown method 'no_such_method'"),
    ],
)
def test_what_cannot_be_done_is_refused(recipe: str, given: dict[str, bool], says: str) -> None:
    what = {name: {"data": batches(), "loss": loss}[name] for name in given}
    model = network()
    with pytest.raises(niwaki.InputError, match=says):
        niwaki.prune(model, recipe, sparsity=0.5, **what)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), network().parameters(), strict=True))


def test_a_loss_that_is_not_finite_is_refused() -> None:
    data = batches()
    data[2][0][3, 1] = torch.nan
    model = network()
    with pytest.raises(niwaki.InputError, match="finite"):
        niwaki.prune(model, "woodfisher", sparsity=0.5, data=data, loss=loss)


def test_rows_keep_the_same_number_each() -> None:
    model = network()
    masks = niwaki.prune(
        model, niwaki.Recipe(sparsity=0.5, target=EVERYTHING, saliency="wanda", allocation={"uniform": {"per": "row"}}), data=batches()
    ).masks
    assert masks["0.weight"].sum(dim=1).tolist() == [4] * 12
    assert masks["2.weight"].sum(dim=1).tolist() == [6] * 10


def test_wanda_by_row_is_the_papers_metric() -> None:
    model, dense, data = network(), network(), batches()
    recipe = niwaki.Recipe(
        sparsity=0.5, target={"weights": {"include": ["0.weight"]}}, saliency="wanda", allocation={"uniform": {"per": "row"}}
    )
    mask = niwaki.prune(model, recipe, data=data).masks["0.weight"].numpy()
    metric = np.abs(dense[0].weight.detach().numpy()) * np.linalg.norm(torch.cat([x for x, _ in data]).numpy(), axis=0)
    for row in range(12):
        assert set(np.flatnonzero(mask[row])) == set(np.argsort(-metric[row])[:4])


def test_eigendamage_returns_a_smaller_copy() -> None:
    model = network()
    done = niwaki.prune(model, "eigendamage", sparsity=0.6, data=batches(), loss=loss)
    assert done.model is not model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), network().parameters(), strict=True))
    assert sum(p.numel() for p in done.model.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert done.loss_after == pytest.approx(np.mean([float(loss(done.model(x), y)) for x, y in batches()]), rel=1e-6)


def test_a_permuted_model_computes_the_same_and_keeps_more() -> None:
    kept = {}
    for permute in (False, True):
        model = network(torch.float64)
        done = niwaki.prune(
            model,
            niwaki.Recipe(granularity="1:4", target={"weights": {"include": ["2.weight"]}}),
            data=batches(torch.float64),
            permute=permute,
        )
        kept[permute] = float(model[2].weight.detach().abs().sum())
        assert int(done.masks["2.weight"].sum()) == 10 * 3
        assert not permute or "reordered" in done.notes[0]
    assert kept[True] > kept[False]
    before, model = network(torch.float64), network(torch.float64)
    niwaki.prune(
        model, niwaki.Recipe(granularity="4:4", target={"weights": {"include": ["2.weight"]}}), data=batches(torch.float64), permute=True
    )
    for inputs, _ in batches(torch.float64):
        torch.testing.assert_close(model(inputs), before(inputs), rtol=0, atol=1e-12)


def test_sharing_out_by_loss_is_never_worse_than_all_layers_alike() -> None:
    found = {}
    for allocation in ("uniform", {"evolutionary": {"generations": 3, "population": 6}}, "sensitivity"):
        done = niwaki.prune(network(), niwaki.Recipe(sparsity=0.7, target=EVERYTHING, allocation=allocation), data=batches(), loss=loss)
        assert sum(row.active for row in done.rows) == round(0.3 * sum(row.elements for row in done.rows))
        found[str(allocation)[:5]] = done.loss_after
    assert found["{'evo"] <= found["unifo"] + 1e-9


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_a_budget_of_flops_is_met(granularity: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))
    data = [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,)))]
    recipe = niwaki.Recipe(target=EVERYTHING, granularity=granularity, allocation={"flops_budget": {"flops": 0.4}})
    done = niwaki.prune(model, recipe, data=data, loss=loss)
    positions = {"0.weight": 64, "2.weight": 36, "5.weight": 1}
    whole = {"0.weight": 24 * 27, "2.weight": 32 * 24 * 9, "5.weight": 32 * 36 * 10}
    left = sum(int(done.masks[name].sum()) * uses if name in done.masks else whole[name] * uses for name, uses in positions.items())
    share = left / sum(whole[name] * uses for name, uses in positions.items())
    assert share == pytest.approx(0.4, abs=0.01 if granularity == "element" else 0.03)
    assert share <= 0.4 + 1e-9


@pytest.mark.parametrize("method", ["snip", "woodfisher", "kfac_obs", "taylor_filters"])
def test_data_without_labels_are_refused_where_the_loss_needs_them(method: str) -> None:
    model = network()
    with pytest.raises(niwaki.InputError, match=r"data: batch 0 has no targets \(None\), which the loss needs"):
        niwaki.prune(model, method, sparsity=0.5, data=[(inputs, None) for inputs, _ in batches()], loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), network().parameters(), strict=True))


def test_a_batch_whose_loss_is_not_finite_is_named() -> None:
    data = batches()
    data[2] = (data[2][0] * torch.inf, data[2][1])
    with pytest.raises(niwaki.InputError, match="data: the loss of batch 2 is not finite"):
        niwaki.prune(network(), "snip", sparsity=0.5, data=data, loss=loss)
