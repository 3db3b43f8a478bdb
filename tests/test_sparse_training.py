"""Ways to train sparse from the beginning to the end, against loops by hand in float64."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from support import SELECTED, TARGETS, batch, net, recipe, train
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.exchanging import _ablated, drop_and_grow
from niwaki.growth import AdaptiveThreshold

STEPS, RATE, MOMENTUM, DECAY = 16, 0.1, 0.9, 1e-2


def build(text, seed=0, model=None, **options):
    model = net(dtype=torch.float64) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS, seed=seed).attach(optimizer)
    return model, optimizer, sparsifier


def backward(model, step):
    images, labels = batch(step, dtype=torch.float64)
    model.zero_grad()
    functional.cross_entropy(model(images), labels).backward()


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def close(model, expected):
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name].detach(), rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


# --- dense weights behind masks: DPF, DNW, SWAT


@pytest.mark.parametrize(("allocation", "every"), [("global", 4), ("uniform", 1), ("erdos_renyi_kernel", 1)])
def test_pruned_weights_learn_from_the_gradient_at_the_pruned_network(allocation, every):
    """DPF (global, every few steps), DNW (each layer, each step) and SWAT: top-k of dense weights forward, dense gradient for all."""
    text = (
        f"sparsity: 0.8\nallocation: {allocation}\nrelaxation: latent\ngradient: dense\n"
        f"schedule: {{constant: {{every: {every} steps, end: 1 run}}}}"
    )
    model, optimizer, sparsifier = build(text, momentum=MOMENTUM, weight_decay=DECAY)
    per_layer = counts(sparsifier.masks)
    total = sum(per_layer.values())
    other = net(dtype=torch.float64)
    parameters = dict(other.named_parameters())
    dense = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    speed = {name: torch.zeros_like(weight) for name, weight in dense.items()}
    back = 0
    masks = {}
    for step in range(STEPS + 1):
        if step % every == 0:
            before = masks
            if allocation == "global":
                sizes = torch.cat([dense[name].abs().flatten() for name in TARGETS])
                chosen = torch.zeros_like(sizes, dtype=torch.bool)
                chosen[sizes.argsort(descending=True, stable=True)[:total]] = True
                parts = chosen.split([dense[name].numel() for name in TARGETS])
            else:
                parts = []
                for name in TARGETS:
                    chosen = torch.zeros(dense[name].numel(), dtype=torch.bool)
                    chosen[dense[name].abs().flatten().argsort(descending=True, stable=True)[: per_layer[name]]] = True
                    parts.append(chosen)
            masks = {name: part.view(dense[name].shape) for name, part in zip(TARGETS, parts, strict=True)}
            back += sum(int((masks[name] & ~before[name]).sum()) for name in before)
        assert all(torch.equal(sparsifier.masks[name], masks[name]) for name in TARGETS), step
        if step == STEPS:
            break
        backward(model, step)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(dense[name].where(masks[name], 0.0) if name in masks else dense[name])
        backward(other, step)
        for name, parameter in parameters.items():
            speed[name].mul_(MOMENTUM).add_(parameter.grad + DECAY * dense[name])
            dense[name] -= RATE * speed[name]
    assert back > 0
    close(model, {name: weight.where(masks[name], 0.0) if name in masks else weight for name, weight in dense.items()})


def test_the_sets_of_top_kast_nest():
    text = "sparsity: 0.9\nschedule: {constant: {every: 1 steps, end: 1 run}}\nrelaxation: latent\ngradient: {superset: {multiple: 2}}"
    model, optimizer, sparsifier = build(text)
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        forward, learning = sparsifier.masks, sparsifier.learning
        assert (forward - learning).active == 0
        assert learning.active == pytest.approx(2 * forward.active, abs=len(TARGETS))


# --- growth by momentum, and redistribution


MOMENTUM_GROWTH = "{momentum: {fraction: 0.3, decay: 0.8}}"


@pytest.mark.parametrize("allocation", ["uniform", "redistribution"])
def test_momentum_grows_where_gradients_have_agreed(allocation):
    """Sparse momentum by hand: dense gradients of every step averaged, lowest weights dropped, the largest averages grown."""
    text = f"sparsity: 0.8\nallocation: {allocation}\nschedule: {{constant: {{every: 4 steps, end: 1 run}}}}\ngrowth: {MOMENTUM_GROWTH}"
    model, optimizer, sparsifier = build(text, momentum=MOMENTUM)
    parameters = dict(model.named_parameters())
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    first = counts(masks)
    means = {name: torch.zeros_like(parameters[name]) for name in TARGETS}
    ours = {name: torch.zeros_like(parameters[name]) for name in TARGETS}  # by the moving average that redistribution reads, of 0.9
    for step in range(STEPS):
        assert sparsifier.needs_dense_gradient
        backward(model, step)
        for name in TARGETS:
            gradient = parameters[name].grad
            means[name].lerp_(gradient, 0.2)
            ours[name].lerp_(gradient, 0.1)
        assert any(parameters[name].grad[~masks[name]].any() for name in TARGETS)
        weights = {name: parameters[name].detach().clone() for name in TARGETS}
        optimizer.step()
        if step in (4, 8, 12):
            sizes = {name: int(mask.sum()) for name, mask in masks.items()}
            stay = {name: n - int(0.3 * n) for name, n in sizes.items()}
            target = dict(sizes)
            if allocation == "redistribution":
                grown = sum(sizes.values()) - sum(stay.values())
                rates = {name: float(ours[name][masks[name]].abs().mean()) for name in TARGETS}
                shares = {name: stay[name] + rate / sum(rates.values()) * grown for name, rate in rates.items()}
                target = {name: int(share) for name, share in shares.items()}
                order = sorted(TARGETS, key=lambda name: target[name] - shares[name])
                for name in order[: sum(sizes.values()) - sum(target.values())]:
                    target[name] += 1
            for name in TARGETS:
                kept = torch.zeros(masks[name].numel(), dtype=torch.bool)
                kept[weights[name].abs().masked_fill(~masks[name], -1.0).flatten().argsort(descending=True, stable=True)[: stay[name]]] = (
                    True
                )
                free = means[name].abs().flatten().masked_fill(kept, -1.0)
                kept[free.argsort(descending=True, stable=True)[: target[name] - stay[name]]] = True
                masks[name] = kept.view(masks[name].shape)
        assert all(torch.equal(sparsifier.masks[name], masks[name]) for name in TARGETS), step
        for name in TARGETS:  # what was followed has moved nothing
            assert not optimizer.state[parameters[name]]["momentum_buffer"][~masks[name]].any()
            assert not parameters[name].detach()[~masks[name]].any()
    assert sum(counts(masks).values()) == sum(first.values())
    assert (counts(masks) != first) == (allocation == "redistribution")


def test_gradients_are_followed_no_longer_than_masks_change():
    text = f"sparsity: 0.8\nschedule: {{constant: {{every: 4 steps, end: 0.5 run}}}}\ngrowth: {MOMENTUM_GROWTH}"
    model, optimizer, sparsifier = build(text)
    needed = []
    train(model, [optimizer], range(STEPS), lambda step: needed.append(sparsifier.needs_dense_gradient), dtype=torch.float64)
    assert needed == [True] * 8 + [False] * 8


def test_momentum_cannot_follow_a_closure():
    text = f"sparsity: 0.8\nschedule: {{constant: {{every: 4 steps}}}}\ngrowth: {MOMENTUM_GROWTH}"
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=1)
    niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        return loss

    with pytest.raises(niwaki.InputError, match="growth: 'momentum' follows the gradients of all steps, and a closure"):
        optimizer.step(closure)


# --- one threshold for all


@pytest.mark.parametrize("granularity", ["element", "kernel"])
@pytest.mark.parametrize("initial", [1e-6, 3e-2, 10.0])
def test_dynamic_sparse_reparameterization_by_hand(granularity, initial):
    """One threshold for all tensors, moved towards the share asked for; what is dropped grows back by survivors."""
    text = (
        f"sparsity: 0.7\ngranularity: {granularity}\nallocation: {{redistribution: {{by: survivors}}}}\n"
        "schedule: {constant: {every: 2 steps, end: 1 run}}\n"
        f"growth: {{random: {{fraction: 0.1, threshold: {{initial: {initial}, tolerance: 0.2}}}}}}"
    )
    model, optimizer, sparsifier = build(text, momentum=MOMENTUM)
    parameters = dict(model.named_parameters())

    def of_pieces(values):
        return values.flatten(2).sum(dim=2) if granularity == "kernel" and values.ndim == 4 else values

    masks = {name: of_pieces(mask.long()) > 0 for name, mask in sparsifier.masks.items()}
    total, threshold, thresholds = sum(counts(masks).values()), initial, [initial]
    for step in range(STEPS):
        backward(model, step)
        scores = {name: of_pieces(parameters[name].detach().abs()) for name in TARGETS}
        optimizer.step()
        after = {name: of_pieces(mask.long()) > 0 for name, mask in sparsifier.masks.items()}
        if step and step % 2 == 0:
            stay = {name: masks[name] & (scores[name] >= threshold) for name in TARGETS}
            found = {name: int(mask.sum()) for name, mask in stay.items()}
            gone, asked = total - sum(found.values()), int(0.1 * total)
            for name in TARGETS:
                if not found[name]:  # the best one stays where all would go
                    stay[name] = stay[name].flatten()
                    stay[name][scores[name].masked_fill(~masks[name], -1.0).argmax()] = True
                    stay[name] = stay[name].view(masks[name].shape)
            assert all((stay[name] & ~after[name]).sum() == 0 for name in TARGETS)
            survivors = {name: int(mask.sum()) for name, mask in stay.items()}
            grown = total - sum(survivors.values())
            room = all(after[name].numel() - survivors[name] > grown for name in TARGETS)
            for name in TARGETS:
                share = grown * survivors[name] / sum(survivors.values())
                assert not room or abs(int(after[name].sum()) - survivors[name] - share) < 1
            threshold = threshold / 2 if gone > 1.2 * asked else threshold * 2 if gone < 0.8 * asked else threshold
            thresholds.append(threshold)
            assert sparsifier._selector.numbers == {"growth.threshold": threshold}
        else:
            assert all(torch.equal(after[name], masks[name]) for name in TARGETS)
        masks = after
        assert sum(counts(masks).values()) == total
    assert thresholds[1] == {1e-6: 2e-6, 10.0: 5.0}.get(initial, thresholds[1])
    assert len(set(thresholds)) > 2


def test_the_threshold_stays_within_its_tolerance():
    threshold = AdaptiveThreshold(tolerance=0.1)
    assert [threshold.moved(1.0, dropped, 100) for dropped in (89, 90, 110, 111)] == [2.0, 1.0, 1.0, 0.5]


# --- constant fan-in


@pytest.mark.parametrize(
    "growth", ["{gradient: {fraction: 0.4}}", "{random: {fraction: 0.4}}", MOMENTUM_GROWTH, "{locality: {by: degree}}"]
)
def test_every_row_keeps_its_number_of_inputs_at_every_update(growth):
    text = f"sparsity: 0.8\nallocation: {{uniform: {{per: row}}}}\nschedule: {{constant: {{every: 3 steps, end: 1 run}}}}\ngrowth: {growth}"
    model, optimizer, sparsifier = build(text)
    fan_in = {name: -(-round(0.2 * mask.numel()) // mask.shape[0]) for name, mask in sparsifier.masks.items()}
    seen = set()

    def look(step):
        seen.add(sparsifier.masks.hash())
        for name, mask in sparsifier.masks.items():
            rows = mask.flatten(1).sum(dim=1)
            assert int(rows.sum()) == round(0.2 * mask.numel())
            assert rows.max() == fan_in[name]
            assert rows.min() >= fan_in[name] - 1
            assert rows.tolist() == sorted(rows.tolist(), reverse=True)

    train(model, [optimizer], range(STEPS), look, dtype=torch.float64)
    assert len(seen) > 4


@pytest.mark.parametrize("ablation", [None, 0.3, 0.9])
def test_constant_fan_in_drops_by_tensor_and_grows_by_row(ablation):
    """SRigL by hand: the lowest weights of the tensor go; rows with too few salient ones are ablated; every other grows to its count."""
    option = "" if ablation is None else f", ablation: {ablation}"
    text = (
        f"sparsity: 0.75\nallocation: {{uniform: {{per: row{option}}}}}\nschedule: {{constant: {{every: 2 steps, end: 1 run}}}}\n"
        "growth: {gradient: {fraction: 0.5}}"
    )
    model, optimizer, sparsifier = build(text)
    parameters, gone = dict(model.named_parameters()), 0
    for step in range(STEPS):
        before = {name: mask.flatten(1) for name, mask in sparsifier.masks.items()}
        backward(model, step)
        look = {name: (parameters[name].detach().abs().flatten(1), parameters[name].grad.abs().flatten(1).clone()) for name in TARGETS}
        optimizer.step()
        after = {name: mask.flatten(1) for name, mask in sparsifier.masks.items()}
        if step not in (2, 4, 6):
            continue
        assert sparsifier._selector.selected_at == step
        for name in TARGETS:
            weight, gradient = look[name]
            rows, columns = weight.shape
            count = int(before[name].sum())
            fraction = sparsifier.recipe.growth.fraction.at(step / 16)
            drop = int(fraction * count)
            kept = torch.zeros(rows * columns, dtype=torch.bool)
            kept[weight.masked_fill(~before[name], -1.0).flatten().argsort(descending=True, stable=True)[: count - drop]] = True
            salient = kept.clone()
            salient[gradient.flatten().masked_fill(kept, -1.0).argsort(descending=True, stable=True)[:drop]] = True
            kept = kept.view(rows, columns)
            number = salient.view(rows, columns).sum(dim=1).tolist()
            share = 0.0 if ablation is None else max(1.0, ablation * count / int(before[name].any(dim=1).sum()))
            bad = sorted((row for row in range(rows) if number[row] < share), key=lambda row: (number[row], -row))
            while (rows - len(bad)) * columns < count:
                bad.pop()
            alive = [row for row in range(rows) if row not in bad]
            expected = torch.zeros(rows, columns, dtype=torch.bool)
            for place, row in enumerate(alive):
                fan_in = count // len(alive) + (place < count % len(alive))
                own = kept[row].nonzero().flatten().tolist()
                assert fan_in <= columns
                own = sorted(own, key=lambda j, row=row: (-float(weight[row, j]), j))[:fan_in]
                free = sorted(set(range(columns)) - set(own), key=lambda j, row=row: (-float(gradient[row, j]), j))
                expected[row, own + free[: fan_in - len(own)]] = True
            assert torch.equal(after[name], expected), (step, name)
            gone += len(bad)
    assert (gone > 0) == (ablation is not None)


def test_rows_with_just_enough_salient_weights_stay():
    assert _ablated(6, [2, 1, 0, 3], elements=16, fewest=1.0) == [2, 2, 0, 2]
    assert _ablated(6, [2, 1, 0, 3], elements=16, fewest=2.0) == [3, 0, 0, 3]
    assert _ablated(11, [1, 1, 0, 1], elements=16, fewest=4.0) == [4, 4, 0, 3]  # no more rows go than the others have room for
    assert _ablated(4, [1, 1, 1, 1], elements=16, fewest=4.0) == [4, 0, 0, 0]


@pytest.mark.parametrize("by", ["degree", "paths"])
def test_what_looks_at_whole_tensors_refuses_parts_of_them(by):
    part = SimpleNamespace(name="body.weight", processes=object())
    chosen = recipe(f"sparsity: 0.5\nschedule: {{constant: {{every: 2 steps}}}}\ngrowth: {{locality: {{by: {by}}}}}")
    with pytest.raises(niwaki.InputError, match=r"growth: 'locality' looks at whole tensors, and body\.weight is sharded"):
        drop_and_grow(chosen, chosen.growth, [part], None, [1], None, [None], None)


# --- gradients of a few


def test_only_the_weights_that_would_change_the_loss_most_take_its_gradient():
    """Global sparse momentum by hand: all weights take weight decay and momentum, the best |g w| of all layers the gradient."""
    model, optimizer, sparsifier = build(SELECTED.replace("at: 0.25 run", "at: 1 run"), momentum=MOMENTUM, weight_decay=DECAY)
    other = net(dtype=torch.float64)
    parameters = dict(other.named_parameters())
    speed = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        backward(other, step)
        products = torch.cat([(parameters[name].grad * parameters[name].detach()).abs().flatten() for name in TARGETS])
        chosen = torch.zeros_like(products, dtype=torch.bool)
        chosen[products.argsort(descending=True, stable=True)[: round(0.2 * len(products))]] = True
        parts = dict(zip(TARGETS, chosen.split([parameters[name].numel() for name in TARGETS]), strict=True))
        with torch.no_grad():
            for name, parameter in parameters.items():
                gradient = parameter.grad * parts[name].view(parameter.shape) if name in parts else parameter.grad
                speed[name].mul_(MOMENTUM).add_(gradient + DECAY * parameter)
                parameter -= RATE * speed[name]
        assert sparsifier.sparsity == 0.0
    close(model, parameters)
    sparsifier.finalize()
    sizes = torch.cat([parameters[name].detach().abs().flatten() for name in TARGETS])
    kept = torch.cat([sparsifier.masks[name].flatten() for name in TARGETS])
    assert set(sizes.argsort(descending=True)[: int(kept.sum())].tolist()) == set(kept.nonzero().flatten().tolist())


# --- sparsity that moves while weights are exchanged


def test_granet_prunes_and_exchanges_at_once():
    text = (
        "sparsity: 0.9\nschedule: {cubic: {initial: 0.5, every: 2 steps, end: 0.75 run}}\nallocation: global\n"
        "growth: {gradient: {fraction: 0.3}}"
    )
    model, optimizer, sparsifier = build(text)
    total, exchanged = sum(mask.numel() for mask in sparsifier.masks.values()), 0
    for step in range(STEPS):
        before = sparsifier.masks
        backward(model, step)
        optimizer.step()
        after = sparsifier.masks
        progress = min(step - step % 2, 12) / 12
        assert after.active == round((0.1 + 0.4 * (1 - progress) ** 3) * total)
        exchanged += (after - before).active
    assert after.active == round(0.1 * total)
    assert exchanged > 100


def test_nest_grows_by_gradients_and_then_prunes():
    text = (
        "schedule: {list: {sparsity: [0.9, 0.8, 0.7, 0.8, 0.95], every: 2 steps}}\n"
        "growth: {gradient: {fraction: 0, at_update: step, initial_value: {gradient: {scale: 1e-3, power: 0.5}}}}"
    )
    model, optimizer, sparsifier = build(text)
    parameters, history = dict(model.named_parameters()), []
    for step in range(10):
        before = sparsifier.masks
        backward(model, step)
        look = {name: (parameters[name].detach().abs(), parameters[name].grad.abs().clone()) for name in TARGETS}
        optimizer.step()
        after = sparsifier.masks
        history.append(round(sparsifier.sparsity, 2))
        for name in TARGETS:
            weight, gradient = look[name]
            grown, gone = after[name] & ~before[name], before[name] & ~after[name]
            if step in (2, 4):
                assert not gone.any()
                assert gradient[grown].min() >= gradient[~after[name]].max()
            elif step in (6, 8):
                assert not grown.any()
                assert weight[gone].max() <= weight[after[name]].min()
    assert history == [0.9, 0.9, 0.8, 0.8, 0.7, 0.7, 0.8, 0.8, 0.95, 0.95]


def test_rows_of_a_recurrent_weight_keep_their_inputs():
    """Stacked gates: every output of every gate is a row."""
    model = nn.LSTM(12, 6).double()
    text = (
        "sparsity: 0.75\nallocation: {uniform: {per: row}}\nschedule: {constant: {every: 1 steps, end: 1 run}}\n"
        "growth: {random: {fraction: 0.5}}\ntarget: {weights: {include: ['weight_ih_l0']}}"
    )
    model, optimizer, sparsifier = build(text, model=model)
    for _ in range(4):
        model(torch.randn(5, 2, 12, dtype=torch.float64))[0].sum().backward()
        optimizer.step()
        assert sparsifier.masks["weight_ih_l0"].sum(dim=1).tolist() == [3] * 24


def test_gradients_cannot_be_selected_before_a_closure_computes_them():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    niwaki.Sparsifier(model, recipe(SELECTED), total_steps=STEPS).attach(optimizer)
    with pytest.raises(niwaki.InputError, match="gradient: 'selected' chooses among the gradients of a step, and a closure computes them"):
        optimizer.step(lambda: functional.cross_entropy(model(batch(0)[0]), batch(0)[1]))


# --- the last update at the end of the run, where nothing is exchanged any more


def test_ablated_rows_stay_so_at_the_end_and_the_others_keep_their_inputs():
    text = (
        "sparsity: 0.9\nallocation: {uniform: {per: row, ablation: 0.5}}\nschedule: {constant: {every: 2 steps, end: 1 run}}\n"
        "growth: {gradient: {fraction: 0.5, at_update: step}}"
    )
    model, optimizer, sparsifier = build(text)
    train(model, [optimizer], range(STEPS), dtype=torch.float64)
    masks = sparsifier.masks
    assert (masks["fc1.weight"].sum(dim=1) == 0).any()
    assert sparsifier.finalize().masks == masks


def test_layers_give_up_the_same_share_at_the_end():
    text = (
        "sparsity: 0.9\nallocation: {redistribution: {by: momentum}}\nschedule: {cubic: {initial: 0.5, begin: 0 run, every: 4 steps, end: 1"
        " run}}\ngrowth: {momentum: {fraction: 0.9}}"
    )
    model, optimizer, sparsifier = build(text)
    train(model, [optimizer], range(STEPS), dtype=torch.float64)
    before = counts(sparsifier.masks)
    after = counts(sparsifier.finalize().masks)
    assert sum(after.values()) == 374 < sum(before.values())
    share = sum(after.values()) / sum(before.values())
    assert all(abs(after[name] - share * before[name]) < 1 for name in TARGETS)


def test_nothing_grows_at_the_end_where_the_sparsity_falls():
    text = "sparsity: 0.7\nschedule: {linear: {initial: 0.9, begin: 0 run, every: 4 steps, end: 1 run}}\ngrowth: random"
    model, optimizer, sparsifier = build(text)
    train(model, [optimizer], range(STEPS), dtype=torch.float64)
    masks = sparsifier.masks
    assert sparsifier.sparsity == pytest.approx(0.75, abs=1e-3)
    with pytest.warns(UserWarning, match=r"growth 'random': the sparsity stays at 0\.75\d*, and does not fall to 0\.7, for what grows"):
        sparsifier.finalize()
    assert sparsifier.masks == masks
