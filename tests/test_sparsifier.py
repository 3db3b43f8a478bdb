"""The sparsifier in real loops: the model stays the user's own, counts are exact, updates do what their recipe says."""

import copy
import pickle

import pytest
import torch
from support import GMP, RECIPES, RIGL, SET, STATIC, STR, TARGET_ELEMENTS, TARGETS, TOP_KAST, batch, net, pruned_are_zero, recipe, train
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.selection import kept

STEPS = 16


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, **options})


# ---------------------------------------------------------------- your model stays your model


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_looks_the_same_before_during_and_after(name):
    model = net()

    def look():
        modules = [(n, type(m), sorted(k for k in vars(m) if k != "training")) for n, m in model.named_modules()]
        tensors = {k: (v.shape, v.dtype) for k, v in model.state_dict().items()}
        return (
            modules,
            tensors,
            [n for n, _ in model.named_parameters()],
            [n for n, _ in model.named_buffers()],
            [id(p) for p in model.parameters()],
        )

    before = look()
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe(RECIPES[name]), total_steps=STEPS).attach(optimizer)
    assert look() == before
    train(model, [optimizer], range(STEPS), lambda step: None if look() == before else pytest.fail(f"changed at step {step}"))
    sparsifier.finalize()
    assert look() == before
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks is not None)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("name", RECIPES)
def test_copies_of_the_model_are_plain(name):
    model = net()
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe(RECIPES[name]), total_steps=STEPS).attach(optimizer)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    train(model, [optimizer], range(STEPS // 2), lambda step: average.update_parameters(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), model.state_dict().values(), strict=True))
        assert all(not (p._post_accumulate_grad_hooks or p._backward_hooks) for p in twin.parameters())
        images, labels = batch(99)
        functional.cross_entropy(twin(images), labels).backward()  # the twin's gradients are dense: nothing acts on it
        assert (twin.fc1.weight.grad[~sparsifier.masks["fc1.weight"]] != 0).any()
    masks = sparsifier.masks
    masks.apply_(average.module)
    assert pruned_are_zero(average.module, masks)


@pytest.mark.parametrize("name", ["gmp", "rigl", "str"])
def test_compiled_models_train_the_same(name):
    def run(compiled):
        model = net()
        target = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = sgd(model)
        sparsifier = niwaki.Sparsifier(target, recipe(RECIPES[name]), total_steps=STEPS).attach(optimizer)
        losses = train(target, [optimizer], range(STEPS))
        return losses, sparsifier.masks

    plain, compiled = run(False), run(True)
    assert plain[0] == pytest.approx(compiled[0], rel=1e-4)
    assert list(plain[1]) == list(compiled[1]) == list(TARGETS)
    assert plain[1].iou(compiled[1]) > 0.98


def test_tied_weights_are_one_target():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(torch.relu(self.b(torch.relu(self.a(x.flatten(1)[:, :16])))))

    torch.manual_seed(0)
    model = Tied()
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe(GMP), total_steps=STEPS).attach(optimizer)
    train(model, [optimizer], range(STEPS))
    assert list(sparsifier.masks) == ["a.weight"]
    assert model.b.weight is model.a.weight
    assert (model.b.weight == 0).sum() == 256 - kept(0.9, 256)


def test_frozen_parameters_are_pruned_but_not_trained():
    model = net()
    model.fc1.weight.requires_grad_(False)
    start = model.fc1.weight.clone()
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe("sparsity: 0.5"), total_steps=STEPS).attach(optimizer)
    train(model, [optimizer], range(STEPS))
    keep = sparsifier.masks["fc1.weight"]
    assert torch.equal(model.fc1.weight, start.masked_fill(~keep, 0.0))


def test_a_parameter_thawed_later_is_masked_too():
    model = net()
    model.fc1.weight.requires_grad_(False)
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe("sparsity: 0.5"), total_steps=STEPS).attach(optimizer)
    train(model, [optimizer], range(4))
    model.fc1.weight.requires_grad_(True)
    train(model, [optimizer], range(4, 8))
    assert pruned_are_zero(model, sparsifier.masks)
    assert not optimizer.state[model.fc1.weight]["momentum_buffer"][~sparsifier.masks["fc1.weight"]].any()


def test_parameter_groups_and_a_scheduler():
    model = net()
    groups = [{"params": [p], "lr": 0.05 * (i + 1)} for i, p in enumerate(model.parameters())]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1 * (i + 1) for i in range(len(groups))], total_steps=STEPS)
    sparsifier = niwaki.Sparsifier(model, recipe(RIGL), total_steps=STEPS).attach(optimizer, scheduler=scheduler)
    train(model, [optimizer], range(STEPS), lambda step: scheduler.step() if step + 1 < STEPS else None)
    assert pruned_are_zero(model, sparsifier.masks)


SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS)], milestones=[4]
    ),
    "warm_restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
}


@pytest.mark.parametrize(
    ("kind", "when"),
    [(kind, when) for kind in SCHEDULERS for when in ("before", "after") if when == "before" or kind not in ("onecycle", "cyclic")],
)  # made after attach(), those two set the rate of every group themselves
def test_a_relaxation_s_own_group_follows_the_scheduler(kind, when):
    """The scores' learning rate is the configured one times what the scheduler does to the weights' rate."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    text = RECIPES["movement"].replace("learning_rate: 1e-2", "learning_rate: 1e-2, weight_decay: null")
    scheduler = SCHEDULERS[kind](optimizer) if when == "before" else None
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS)
    sparsifier.attach(optimizer, **({"scheduler": scheduler} if scheduler else {}))
    scheduler = scheduler or SCHEDULERS[kind](optimizer)
    ratios = []

    def follow(step):
        scheduler.step(*([1.0] if kind == "plateau" else []))
        ratios.append(optimizer.param_groups[1]["lr"] / optimizer.param_groups[0]["lr"])

    train(model, [optimizer], range(10), follow)
    expected = 0.01 / {"onecycle": 0.1 / 25, "cyclic": 0.01}.get(kind, 0.1)
    assert ratios == pytest.approx([expected] * 10)


def test_a_scheduler_that_is_not_passed_is_an_error():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(niwaki.InputError, match="scheduler="):
        niwaki.Sparsifier(model, recipe(STR), total_steps=STEPS).attach(optimizer)
    assert scheduler is not None


@pytest.mark.parametrize("name", ["gmp", "rigl", "set", "top_kast", "str", "movement"])
def test_gradient_accumulation_equals_the_large_batch(name):
    """Averaged micro-batches of a model without batch norm train as the whole batch does, in float64."""

    def run(parts):
        model = net(dtype=torch.float64)
        model.norm = nn.Identity()
        optimizer = sgd(model)
        sparsifier = niwaki.Sparsifier(model, recipe(RECIPES[name]), total_steps=STEPS).attach(optimizer)
        for step in range(STEPS):
            images, labels = batch(step, 16, dtype=torch.float64)
            optimizer.zero_grad()
            for part in range(parts):
                chunk = slice(part * 16 // parts, (part + 1) * 16 // parts)
                (functional.cross_entropy(model(images[chunk]), labels[chunk]) / parts).backward()
            optimizer.step()
        return sparsifier.masks, torch.cat([p.detach().flatten() for p in model.parameters()])

    masks, weights = run(1)
    masks_of_parts, weights_of_parts = run(4)
    assert masks == masks_of_parts
    torch.testing.assert_close(weights, weights_of_parts, rtol=1e-9, atol=1e-12)


def test_clipping_sees_the_active_norm():
    model = net()
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe(STATIC), total_steps=STEPS).attach(optimizer)
    images, labels = batch(0)
    functional.cross_entropy(model(images), labels).backward()
    seen = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    plain = copy.deepcopy(model)
    functional.cross_entropy(plain(images), labels).backward()
    masks = sparsifier.masks
    expected = torch.stack([(p.grad * masks[n] if n in masks else p.grad).norm() for n, p in plain.named_parameters()]).norm()
    dense = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
    torch.testing.assert_close(seen, expected)
    assert seen < 0.999 * dense


def test_pruned_gradients_that_are_not_finite_do_no_harm():
    model = net()
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe(STATIC), total_steps=STEPS).attach(optimizer)
    masks = sparsifier.masks
    bad = torch.zeros_like(model.fc1.weight).masked_fill_(~masks["fc1.weight"], torch.nan)
    ((model.fc1.weight * bad).sum() + model(batch(0)[0]).sum()).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert pruned_are_zero(model, masks)


# ---------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("name", RECIPES)
def test_bfloat16_autocast(name):
    model = net()
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe(RECIPES[name]), total_steps=STEPS).attach(optimizer)
    for step in range(STEPS):
        images, labels = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        assert pruned_are_zero(model, sparsifier.masks)
    assert sparsifier.step == STEPS
    assert loss.isfinite()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_gradient_scaler_skips_overflows_and_changes_nothing_else(name, fused, unscale):
    """With power-of-two scales, float32 weights end where the unscaled run ends; skipped steps are not counted."""

    def run(scaled):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        sparsifier = niwaki.Sparsifier(model, recipe(RECIPES[name]), total_steps=STEPS).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=scaled)
        step = attempt = 0
        while step < STEPS:
            images, labels = batch(step)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            overflow = scaled and attempt in (2, 4, 9)  # step 4 is an update step of the drop-and-grow recipes
            scaler.scale(loss * torch.inf if overflow else loss).backward()
            before = sparsifier.masks
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            attempt += 1
            if overflow:
                assert sparsifier.masks == before
            else:
                step += 1
            assert sparsifier.step == step
            assert pruned_are_zero(model, sparsifier.masks)
        return sparsifier.masks, torch.cat([p.detach().flatten() for p in model.parameters()])

    masks, weights = run(False)
    scaled_masks, scaled_weights = run(True)
    assert scaled_masks == masks
    torch.testing.assert_close(scaled_weights, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_float16_autocast_on_the_cpu(fused):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
    sparsifier = niwaki.Sparsifier(model, recipe(RIGL), total_steps=STEPS).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # overflows float16 at first
    skipped = 0
    for step in range(60):
        images, labels = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        counted, scale = sparsifier.step, scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        fell = scaler.get_scale() < scale
        skipped += fell
        assert sparsifier.step == counted + (not fell)
        assert pruned_are_zero(model, sparsifier.masks)
    assert skipped > 0


# ---------------------------------------------------------------- what updates do


def test_rigl_keeps_the_count_lets_dropped_weights_compete_and_takes_no_step():
    """Checked against a plain reimplementation of the update order on the tensors themselves."""
    model = net(dtype=torch.float64)
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(
        model, recipe(RIGL.replace("growth: gradient", "growth: {gradient: {fraction: 0.5}}")), total_steps=STEPS
    )
    sparsifier.attach(optimizer)
    active = sparsifier.masks.active
    assert active == kept(0.8, TARGET_ELEMENTS)
    regrown = updates = 0
    for step in range(STEPS):
        images, labels = batch(step, dtype=torch.float64)
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        slots = {n: optimizer.state[p].get("momentum_buffer") for n, p in model.named_parameters()}
        slots = {n: None if s is None else s.clone() for n, s in slots.items()}
        masks = sparsifier.masks
        twin = copy.deepcopy(model)
        functional.cross_entropy(twin(images), labels).backward()
        dense = {n: p.grad for n, p in twin.named_parameters()}
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        assert sparsifier.masks.active == active
        if step not in (4, 8, 12):
            assert sparsifier.masks == masks
            assert not torch.equal(model.head.weight, weights["head.weight"])
            continue
        updates += 1
        for name, parameter in model.named_parameters():
            if name not in masks:
                assert torch.equal(parameter, weights[name])  # no step, not even for parameters without a mask
                continue
            w, g, m = weights[name].flatten(), dense[name].flatten(), masks[name].flatten()
            number = int(m.sum())
            drop = int(number * 0.5)
            by_weight = sorted((i for i in range(len(w)) if m[i]), key=lambda i: (-abs(w[i].item()), i))
            stay = set(by_weight[: number - drop])
            by_gradient = sorted((i for i in range(len(w)) if i not in stay), key=lambda i: (-abs(g[i].item()), i))
            new = stay | set(by_gradient[:drop])
            assert {i for i, on in enumerate(sparsifier.masks[name].flatten().tolist()) if on} == new
            back = new & set(by_weight[number - drop :])
            regrown += len(back)
            slot = optimizer.state[parameter]["momentum_buffer"].flatten()
            for i in new:
                assert parameter.flatten()[i] == (w[i] if m[i] else 0.0)
                assert slot[i] == (slots[name].flatten()[i] if m[i] else 0.0)
    assert updates == 3
    assert regrown > 0


def test_set_grows_at_random_and_keeps_the_count():
    model = net()
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe(SET), total_steps=STEPS).attach(optimizer)
    counts = {n: int(m.sum()) for n, m in sparsifier.masks.items()}
    changes = []

    def check(step):
        assert {n: int(m.sum()) for n, m in sparsifier.masks.items()} == counts
        changes.append(sparsifier.masks)

    train(model, [optimizer], range(STEPS), check)
    assert [changes[i] != changes[i - 1] for i in range(1, STEPS)] == [i in (4, 8, 12) for i in range(1, STEPS)]
    assert sparsifier.ever_active_share > 0.2
    seeds = [niwaki.Sparsifier(net(), recipe(SET), total_steps=STEPS, seed=seed).masks for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1]
    assert seeds[0] != seeds[2]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.97, 0.999])
@pytest.mark.parametrize("allocation", ["uniform", "global", "erdos_renyi", "erdos_renyi_kernel"])
def test_one_shot_counts_are_exact(allocation, sparsity):
    model = net()
    text = f"sparsity: {sparsity}\nallocation: {allocation}"
    masks = niwaki.Sparsifier(model, recipe(text)).masks
    assert masks.active == max(kept(sparsity, TARGET_ELEMENTS), 3)
    assert all(m.any() for m in masks.values())
    assert pruned_are_zero(model, masks)


def test_all_equal_weights_keep_the_lowest_indices():
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    masks = niwaki.Sparsifier(model, recipe("sparsity: 0.75\nallocation: global")).masks
    flat = torch.cat([m.flatten() for m in masks.values()])
    number = kept(0.75, TARGET_ELEMENTS)
    assert flat[: number - 2].all()  # the two later tensors keep one piece each by the guard, taken from the end of the ranking
    assert flat.sum() == number
    assert [int(m.flatten().nonzero()[0]) for m in masks.values()] == [0, 0, 0]


def test_the_guard_keeps_one_piece_and_says_so():
    model = net()
    with torch.no_grad():
        model.fc2.weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"kept one piece of fc2\.weight"):
        sparsifier = niwaki.Sparsifier(model, recipe("sparsity: 0.9\nallocation: global"))
    assert sparsifier.masks["fc2.weight"].sum() == 1
    assert sparsifier.masks.active == kept(0.9, TARGET_ELEMENTS)
    best = model.fc2.weight.abs().argmax()
    assert sparsifier.masks["fc2.weight"].flatten()[best]
    assert any("fc2.weight" in note for note in sparsifier.notes)


@pytest.mark.parametrize(
    "granularity",
    ["2:4", "1:3", "4x1", "2x2", "kernel", "output_channel", "input_channel", "{vector: {length: 4, dimension: input}}"],
)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_granularities_train_and_count(granularity, allocation):
    model = net()
    optimizer = sgd(model)
    sparsity = {"2:4": 0.5, "1:3": 2 / 3}.get(granularity, 0.5)
    # 1:3 divides no input width here: pad says what happens to the remainder
    granularity = "{n_m: {n: 1, m: 3, remainder: pad}}" if granularity == "1:3" else granularity
    schedule = "{cubic: {every: 2 steps, end: 0.5 run}}"
    text = f"granularity: {granularity}\nsparsity: {sparsity!r}\nallocation: {allocation}\nschedule: {schedule}"
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(optimizer)
    train(model, [optimizer], range(STEPS))
    masks = sparsifier.masks
    assert pruned_are_zero(model, masks)
    if "n_m" in granularity or ":4" in granularity:
        n, m = (1, 3) if "n_m" in granularity else (2, 4)
        for mask in masks.values():
            rows = mask.movedim(1, -1).reshape(-1, mask.shape[1])
            for start in range(0, mask.shape[1], m):
                assert (rows[:, start : start + m].sum(1) == min(n, mask.shape[1] - start)).all()
    else:
        assert 0.1 < masks.sparsity < 0.9
    if granularity == "output_channel":
        assert all(mask.flatten(1).all(1).logical_or(~mask.flatten(1).any(1)).all() for mask in masks.values())


def test_snip_from_data_equals_the_gradient_of_a_mask():
    """|dL/dm| at m = 1 by autograd, over two batches, ranked globally; the model is left as it was but for the mask."""
    data = [batch(0), batch(1)]
    model = net(dtype=torch.float32)
    gates = {n: torch.ones_like(p, requires_grad=True) for n, p in model.named_parameters() if n in TARGETS}
    twin = copy.deepcopy(model)
    loss = sum(
        functional.cross_entropy(
            torch.func.functional_call(twin, {n: p * gates[n] if n in gates else p for n, p in twin.named_parameters()}, x), y
        )
        for x, y in data
    )
    loss.backward()
    scores = torch.cat([g.grad.abs().flatten() for g in gates.values()])
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    random_state = torch.get_rng_state()
    masks = niwaki.Sparsifier(
        model, recipe("sparsity: 0.8\nsaliency: snip\nallocation: global"), data=data, loss=functional.cross_entropy
    ).masks
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected[torch.sort(scores, descending=True, stable=True).indices[: kept(0.8, TARGET_ELEMENTS)]] = True
    agreement = (torch.cat([m.flatten() for m in masks.values()]) == expected).float().mean()
    assert agreement > 0.999
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_per_flop_divides_by_how_often_a_weight_is_used():
    """conv2's weights are used 16 times an image, those of the linear layers once; the ranking is brute force."""
    model = net()
    with torch.no_grad():
        model.conv2.weight.mul_(12)  # or its costly weights would all go
    text = "sparsity: 0.4\nallocation: global\nnormalization: per_flop"
    with pytest.raises(niwaki.InputError, match="data="):
        niwaki.Sparsifier(model, recipe(text))
    uses = {"conv2.weight": 16.0, "fc1.weight": 1.0, "fc2.weight": 1.0}
    parameters = dict(model.named_parameters())
    scores = torch.cat([(parameters[n].detach().double().abs() / (2 * u)).flatten() for n, u in uses.items()])
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected[torch.sort(scores, descending=True, stable=True).indices[: kept(0.4, TARGET_ELEMENTS)]] = True
    masks = niwaki.Sparsifier(model, recipe(text), data=[batch(0, 1)]).masks
    assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), expected)
    assert 0 < masks["conv2.weight"].sum() < 288


def test_dense_phases_restore_everything_at_zero():
    text = "sparsity: 0.8\nallocation: global\ngrowth: all\nschedule: {phases: {dense: [0, 8], sparse: [4, 12], unit: steps}}"
    model = net()
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(optimizer)
    seen = []
    train(model, [optimizer], range(STEPS), lambda step: seen.append(round(sparsifier.sparsity, 2)))
    assert seen == [0.0] * 4 + [0.8] * 4 + [0.0] * 4 + [0.8] * 4


def test_top_kast_learns_in_the_superset_only_and_pulls_by_the_exploration_penalty():
    model = net(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = niwaki.Sparsifier(model, recipe(TOP_KAST.replace("1e-4", "1e-2")), total_steps=STEPS).attach(optimizer)
    for step in range(4):
        latent = {n: t.latent.clone() for n, t in sparsifier._tensors.items()}
        images, labels = batch(step, dtype=torch.float64)
        # The oracle: selection, forward with the published weight, gradient and penalty by hand.
        want = {}
        published = {}
        for name, w in latent.items():
            order = torch.sort(w.abs().flatten(), descending=True, stable=True).indices
            a, b = torch.zeros(w.numel(), dtype=torch.bool), torch.zeros(w.numel(), dtype=torch.bool)
            a[order[: counts(0.8)[name]]] = True
            b[order[: counts(0.6)[name]]] = True
            published[name] = (w * a.view(w.shape)).requires_grad_()
            want[name] = (a.view(w.shape), b.view(w.shape))
        # A mask chosen before step t acts from step t + 1's forward on; at step 0 it is there already.
        twin = copy.deepcopy(model)
        functional.cross_entropy(twin(images), labels).backward()
        gradients = {n: p.grad.clone() for n, p in twin.named_parameters()}
        train(model, [optimizer], range(step, step + 1), dtype=torch.float64)
        for name, w in latent.items():
            a, b = want[name]
            pull = 2e-2 * w * (a + (b & ~a) / 0.2)
            expected = w - 0.1 * (gradients[name] * b + pull)
            torch.testing.assert_close(sparsifier._tensors[name].latent, expected, rtol=1e-12, atol=1e-15)


def counts(sparsity):
    sizes = {"conv2.weight": 288, "fc1.weight": 3072, "fc2.weight": 384}
    total = kept(sparsity, TARGET_ELEMENTS)
    quotas = {n: (1 - sparsity) * s for n, s in sizes.items()}
    floors = {n: int(q) for n, q in quotas.items()}
    for n in sorted(sizes, key=lambda n: -(quotas[n] - floors[n]))[: total - sum(floors.values())]:
        floors[n] += 1
    return floors


def test_masks_changed_is_announced_only_when_they_change():
    model = net()
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe(RIGL), total_steps=STEPS).attach(optimizer)
    heard = []
    sparsifier.on_masks_changed(lambda masks: heard.append((sparsifier.step, masks.hash())))
    train(model, [optimizer], range(STEPS))
    assert [step for step, _ in heard] == [4, 8]  # at 12 the decayed fraction is zero
    assert heard[-1][1] == sparsifier.masks.hash()


def test_evaluating_leaves_the_model_as_it_was():
    for text in RECIPES.values():
        model = net()
        optimizer = sgd(model)
        sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(optimizer)
        train(model, [optimizer], range(5))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with sparsifier.evaluating():
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_final_cut_by_the_learned_score_is_exact():
    model = net()
    optimizer = sgd(model, weight_decay=1e-4)
    sparsifier = niwaki.Sparsifier(model, niwaki.method("str", sparsity=0.9, cut=True), total_steps=STEPS).attach(optimizer)
    train(model, [optimizer], range(STEPS - 1))
    assert sparsifier.sparsity < 0.5
    train(model, [optimizer], range(STEPS - 1, STEPS))
    sparsifier.finalize()
    assert sparsifier.masks.active == kept(0.9, TARGET_ELEMENTS)
    assert pruned_are_zero(model, sparsifier.masks)


def test_finalizing_early_is_told():
    model = net()
    optimizer = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe(GMP), total_steps=STEPS).attach(optimizer)
    train(model, [optimizer], range(4))
    with pytest.warns(UserWarning, match="before the schedule's end"):
        sparsifier.finalize()


def test_ever_active_share_counts_what_was_ever_active():
    def share(text):
        model = net()
        optimizer = sgd(model)
        sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(optimizer)
        ever = sparsifier.masks
        seen = [ever]
        train(model, [optimizer], range(STEPS), lambda step: seen.append(sparsifier.masks))
        for masks in seen:
            ever = ever | masks
        assert sparsifier.ever_active_share == pytest.approx(ever.density)
        return ever.density

    assert share(STATIC) == pytest.approx(0.2, abs=1e-3)
    assert share(GMP) == 1.0
    assert 0.2 < share(RIGL) < 1.0
    assert 0.2 < share(TOP_KAST) < 1.0


@pytest.mark.parametrize("kind", ["copy", "second"])
def test_a_copied_optimizer_is_attached_again(kind):
    """A shallow copy holds the same parameters without our hooks; two optimizers may also take turns on one model."""
    model = net()
    first = sgd(model)
    sparsifier = niwaki.Sparsifier(model, recipe(RIGL), total_steps=STEPS).attach(first)
    second = copy.copy(first) if kind == "copy" else torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert not second._optimizer_step_pre_hooks
    sparsifier.attach(second)
    for step in range(STEPS):
        train(model, [second if step % 2 or kind == "copy" else first], range(step, step + 1))
        assert sparsifier.step == step + 1
        assert pruned_are_zero(model, sparsifier.masks)
        sparsifier.state_dict()


def test_a_step_ends_when_one_of_its_optimizers_steps_again():
    """As when a gradient scaler skips the other one: steps are counted, and updates are not held up."""
    model = net()
    some, rest = sgd(model.fc1), torch.optim.SGD([p for n, p in model.named_parameters() if not n.startswith("fc1")], lr=0.1)
    sparsifier = niwaki.Sparsifier(model, recipe(SET), total_steps=STEPS).attach(some, rest)
    seen = [sparsifier.masks]
    for step in range(6):
        images, labels = batch(step)
        functional.cross_entropy(model(images), labels).backward()
        some.step()
        assert sparsifier.step == step  # still waiting for the other one
        seen.append(sparsifier.masks)
    assert [seen[i + 1] != seen[i] for i in range(6)] == [False] * 4 + [True, False]
    rest.step()
    assert sparsifier.step == 6


def test_a_closure_s_gradient_is_dense_for_the_update_and_masked_for_the_step():
    """The update before step 2 ranks by the dense gradient of the closure; the step itself must not see it."""
    model = net()
    optimizer = sgd(model)
    text = "sparsity: 0.8\nsaliency: taylor\nallocation: global\nschedule: {one_shot: {at: 2 steps}}"
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(optimizer)
    for step in range(4):
        images, labels = batch(step)

        def closure(images=images, labels=labels):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        if step == 2:
            twin = copy.deepcopy(model)
            functional.cross_entropy(twin(images), labels).backward()
            weights = dict(twin.named_parameters())
            scores = torch.cat([(weights[n] * weights[n].grad).detach().double().square().flatten() for n in TARGETS])
            expected = torch.zeros_like(scores, dtype=torch.bool)
            expected[torch.sort(scores, descending=True, stable=True).indices[: kept(0.8, TARGET_ELEMENTS)]] = True
        optimizer.step(closure)
    masks = sparsifier.masks
    assert (torch.cat([m.flatten() for m in masks.values()]) == expected).float().mean() > 0.999
    for name, parameter in model.named_parameters():
        if name in masks:
            assert not optimizer.state[parameter]["momentum_buffer"][~masks[name]].any()


def test_growth_that_never_acts_is_told():
    with pytest.warns(UserWarning, match="growth 'gradient' never acts"):
        niwaki.Sparsifier(net(), niwaki.method("rigl"), total_steps=STEPS)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9, 0.95])
def test_top_kast_takes_any_sparsity(sparsity):
    sparsifier = niwaki.Sparsifier(net(), niwaki.method("top_kast", sparsity=sparsity), total_steps=STEPS)
    learning = sum(int((~t.blocked).sum()) for t in sparsifier._tensors.values())
    assert sparsifier.masks.active == kept(sparsity, TARGET_ELEMENTS)
    assert abs(learning - min(2 * (1 - sparsity), 1) * TARGET_ELEMENTS) <= 1


# ---------------------------------------------------------------- bad input


def test_bad_input_is_one_line_that_says_what_and_where():
    class Closure(torch.optim.SGD):
        pass

    def closure_with_relaxation():
        model = net()
        optimizer = torch.optim.LBFGS(model.parameters())
        niwaki.Sparsifier(model, recipe(TOP_KAST), total_steps=STEPS).attach(optimizer)
        optimizer.step(lambda: model(batch(0)[0]).sum())

    def attach_twice():
        model = net()
        optimizer = sgd(model)
        niwaki.Sparsifier(model, recipe(GMP), total_steps=STEPS).attach(optimizer).attach(optimizer)

    def nan_weight():
        model = net()
        with torch.no_grad():
            model.fc1.weight[3, 4] = torch.nan
        niwaki.Sparsifier(model, recipe("sparsity: 0.5"))

    def no_gradient():
        model = net()
        optimizer = sgd(model)
        niwaki.Sparsifier(
            model,
            recipe(RIGL.replace("every: 4 steps", "every: 1 steps").replace("gradient", "{gradient: {at_update: step}}")),
            total_steps=8,
        ).attach(optimizer)
        optimizer.step()
        optimizer.step()

    cases = {
        "total_steps": lambda: niwaki.Sparsifier(net(), recipe(GMP)),
        "closure": closure_with_relaxation,
        "attached already": attach_twice,
        "fc1.weight": nan_weight,
        "backward": no_gradient,
        "remainder": lambda: niwaki.Sparsifier(net(), recipe("granularity: 2:5")),
        "woodfisher": lambda: niwaki.Sparsifier(net(), recipe("sparsity: 0.5\nsaliency: woodfisher")),
        "nowhere": lambda: niwaki.Sparsifier(net(), recipe("sparsity: 0.5\ntarget: {weights: {include: ['nowhere.*']}}")),
        "after the run's 16 steps": lambda: niwaki.Sparsifier(
            net(), recipe("sparsity: 0.5\nschedule: {cubic: {end: 20 steps}}"), total_steps=STEPS
        ),
        "Optimizer": lambda: niwaki.Sparsifier(net(), recipe("sparsity: 0.5")).attach(net()),
    }
    for what, case in cases.items():
        with pytest.raises(niwaki.InputError) as caught:
            case()
        assert what in str(caught.value), what
        assert "\n" not in str(caught.value)
