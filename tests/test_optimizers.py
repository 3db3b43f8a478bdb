"""Every optimizer of torch.optim: pruned weights stay zero, slots of pruned and grown weights are those of a fresh state."""

import warnings

import pytest
import torch
from support import GMP, RIGL, SET, TARGETS, batch, net, pruned_are_zero, recipe, train
from torch.nn import functional

import niwaki
from niwaki.slots import reset_slots

STEPS = 16

MAKE = {
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=1e-2),
    "Adam_fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True, weight_decay=1e-2),
    "Adam_foreach": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2), foreach=False, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2, weight_decay=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2, t0=4, weight_decay=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2, weight_decay=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, weight_decay=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "SGD_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True),
}
SPECIAL = {"LBFGS", "Muon", "SparseAdam", "Optimizer"}
"""Those with tests of their own below."""


def test_no_optimizer_of_torch_is_left_out():
    every = {name for name, cls in vars(torch.optim).items() if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)}
    assert every == {name.partition("_")[0] for name in MAKE} | SPECIAL


def fresh_state(make):
    """What each slot holds after the first step of a new weight of value zero that never had a gradient."""
    one = torch.nn.Parameter(torch.zeros(2, 2))
    one.grad = torch.zeros(2, 2)
    optimizer = make([one])
    optimizer.step()
    return {k: v.flatten()[0].item() for k, v in optimizer.state[one].items() if isinstance(v, torch.Tensor) and v.shape == one.shape}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("text", [GMP, RIGL, SET], ids=["gmp", "rigl", "set"])
@pytest.mark.parametrize("name", MAKE)
def test_pruned_weights_stay_zero_and_slots_fresh(name, text):
    model = net()
    optimizer = MAKE[name](model.parameters())
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(optimizer)
    fresh = fresh_state(MAKE[name])
    grown = {"count": 0}
    previous = {"masks": sparsifier.masks}

    def check(step):
        masks = sparsifier.masks
        assert pruned_are_zero(model, masks), f"step {step}"
        for target in TARGETS:
            parameter = dict(model.named_parameters())[target]
            for key, slot in optimizer.state[parameter].items():
                if isinstance(slot, torch.Tensor) and slot.shape == parameter.shape:
                    where = slot[~masks[target]]
                    assert torch.allclose(where, torch.full_like(where, fresh[key]), rtol=1e-6, atol=0.0), (step, target, key)
                    new = masks[target] & ~previous["masks"][target]
                    if step % 4 == 0 and step and text is RIGL and new.any():  # an update step without a step: still untouched
                        grown["count"] += 1
                        assert torch.allclose(slot[new], torch.full_like(slot[new], fresh[key]), rtol=1e-6, atol=0.0), (step, target, key)
        previous["masks"] = masks

    losses = train(model, [optimizer], range(STEPS), check)
    assert torch.tensor(losses).isfinite().all()
    assert 0.75 < sparsifier.sparsity < 0.95
    if text is RIGL and any(k for k in fresh):
        assert grown["count"] > 0
    sparsifier.finalize()
    assert pruned_are_zero(model, sparsifier.masks)


def test_the_fresh_step_size_of_rprop_is_not_zero():
    assert fresh_state(MAKE["Rprop"]) == {"prev": 0.0, "step_size": pytest.approx(1e-3)}


def test_slots_of_a_single_weight_are_reset_too():
    weight = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.1)
    weight(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert not reset_slots(optimizer, weight.weight, torch.ones(1, 1, dtype=torch.bool))
    assert optimizer.state[weight.weight]["exp_avg"].item() == 0.0
    assert optimizer.state[weight.weight]["step"].item() == 1.0


def test_factored_state_is_told_once():
    model = net()
    optimizer = MAKE["Adafactor"](model.parameters())
    sparsifier = niwaki.Sparsifier(model, recipe(GMP), total_steps=STEPS).attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, [optimizer], range(STEPS))
    told = [n for n in sparsifier.notes if "another shape" in n]
    assert told
    assert len(told) == len(set(told)) == len([w for w in caught if "another shape" in str(w.message)])
    assert all("Adafactor" in n for n in told)


@pytest.mark.parametrize("text", [GMP, RIGL], ids=["gmp", "rigl"])
def test_lbfgs_with_its_closure(text):
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, history_size=5)
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(optimizer)
    images, labels = batch(0, 32)
    calls = {"n": 0}

    def closure():
        calls["n"] += 1
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    first = closure().item()
    for step in range(STEPS):
        before = sparsifier.masks
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step(closure)
        assert pruned_are_zero(model, sparsifier.masks)
        if text is RIGL and step in (4, 8):  # at 12 the decayed fraction is zero
            assert sparsifier.masks != before
            for name in ("head.weight", "conv1.weight"):  # the update step takes no step
                assert torch.equal(dict(model.named_parameters())[name], weights[name])
    assert closure().item() < first
    assert sparsifier.step == STEPS


def test_lbfgs_forgets_its_history_when_masks_change():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    niwaki.Sparsifier(model, recipe("sparsity: 0.8\nschedule: {one_shot: {at: 3 steps}}"), total_steps=5).attach(optimizer)
    images, labels = batch(0)
    seen = []

    def closure():
        state = next(iter(optimizer.state.values()), {})
        seen.append(len(state.get("old_dirs") or []))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    first_of_step = []
    for _ in range(5):
        seen.clear()
        optimizer.step(closure)
        first_of_step.append(seen[0])
    assert first_of_step[2] > 0
    assert first_of_step[3] == 0
    assert first_of_step[4] > 0


@pytest.mark.parametrize("text", [GMP, RIGL, SET], ids=["gmp", "rigl", "set"])
def test_muon_and_adamw_together(text):
    model = net()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    muon, adamw = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(others, lr=1e-2)
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS).attach(muon, adamw)
    counts = []

    def check(step):
        assert sparsifier.step == step + 1
        assert pruned_are_zero(model, sparsifier.masks)
        counts.append(sparsifier.masks.active)

    train(model, [muon, adamw], range(STEPS), check)
    assert len(set(counts)) == 1 or text is GMP


def test_sparse_adam_on_a_sparse_embedding():
    torch.manual_seed(0)
    embedding = torch.nn.EmbeddingBag(50, 8, mode="sum", sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=1e-2)
    text = "sparsity: 0.7\ntarget: {weights: {include: ['*']}}\nschedule: {cubic: {every: 2 steps, end: 8 steps}}"
    sparsifier = niwaki.Sparsifier(embedding, recipe(text), total_steps=12).attach(optimizer)
    start = embedding.weight.detach().clone()
    for _ in range(12):
        optimizer.zero_grad()
        embedding(torch.randint(0, 50, (16, 4))).square().sum().backward()
        assert embedding.weight.grad.is_sparse
        optimizer.step()
        masks = sparsifier.masks
        assert pruned_are_zero(embedding, masks)
        assert not optimizer.state[embedding.weight]["exp_avg"][~masks["weight"]].any()
    assert masks["weight"].sum() == round(0.3 * 400)
    assert not torch.equal(embedding.weight[masks["weight"]], start[masks["weight"]])


def test_an_optimizer_that_cannot_be_asked_is_told():
    class Odd(torch.optim.SGD):
        """Steps only parameters of the size it was made for."""

        def step(self, closure=None):
            if any(p.numel() == 1 for g in self.param_groups for p in g["params"]):
                raise RuntimeError("no scalars here")
            return super().step(closure)

    model = net()
    optimizer = Odd(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = niwaki.Sparsifier(model, recipe(GMP), total_steps=STEPS).attach(optimizer)
    with pytest.warns(UserWarning, match="Odd could not be asked for its fresh state"):
        train(model, [optimizer], range(STEPS))
    assert pruned_are_zero(model, sparsifier.masks)
