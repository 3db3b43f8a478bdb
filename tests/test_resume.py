"""state_dict() -> new process -> load_state_dict() -> more steps equals the uninterrupted run, bit for bit, for catalogue rows and more."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import RECIPES as SHARED
from support import batch, net, recipe, train
from torch.nn import functional

import niwaki
from niwaki.collecting import reasons

STEPS, HALF = 280, 150
"""RigL updates every 100 steps until 0.75 of the run: once before the half and once after it."""

WITHOUT_STAGES = [
    name
    for name, method in niwaki.METHODS.items()
    if method.recipe.stages is None and method.recipe.granularity.name not in ("eigenbasis", "head")  # for niwaki.prune; the net has none
]
"""Rows that one sparsifier carries out; stages are for what trains through them, and are tested with it."""

AFTER_HALF = "sparsity: 0.8\nschedule: {one_shot: {at: 0.75 run}}\n"
GRADUAL = "sparsity: 0.8\nschedule: {cubic: {every: 40 steps, begin: 0.1 run}}\n"
OWN = {
    "movement": AFTER_HALF + "saliency: {accumulated_movement: {decay: 0.9}}",
    "weight_change": AFTER_HALF + "saliency: weight_change\nallocation: global",
    "karnin": AFTER_HALF + "saliency: karnin",
    "from_init": AFTER_HALF + "saliency: from_init",
    "dynamic": GRADUAL + "saliency: {mfac: {dynamic: true, gradients: 24, damping: 1e-3}}\ncompensation: obs",
    "obd": GRADUAL + "saliency: {obd: hutchinson}\nallocation: {sensitivity: {sparsities: [0.5, 0.9]}}",
    "least_squares": GRADUAL + "saliency: wanda\nallocation: {uniform: {per: row}}\ncompensation: least_squares",
    "recalibrated": GRADUAL + "granularity: output_channel\ncompensation: batchnorm_recalibration",
    "redistribution": "sparsity: 0.8\nschedule: {constant: {every: 40 steps}}\n"
    "growth: gradient\nallocation: {redistribution: {by: gradient}}",
    "survivors": "sparsity: 0.8\nschedule: {constant: {every: 40 steps}}\nallocation: {redistribution: {by: survivors}}\n"
    "growth: {random: {fraction: 0.1, threshold: {initial: 1e-3}, initial_value: initial}}",
    "hebbian": "sparsity: 0.8\nschedule: {constant: {every: 40 steps}}\ngrowth: {locality: {by: hebbian, initial_value: uniform}}",
    "sparsegpt": GRADUAL + "saliency: {sparsegpt: {damping: 0.1}}",
}
"""Recipes with something to remember from step to step, or that change weights at an update, before the half and after it."""

RECIPES = {**{f"support.{name}": text for name, text in SHARED.items()}, **{f"own.{name}": text for name, text in OWN.items()}}
ROWS = [*sorted(WITHOUT_STAGES), *RECIPES]


def start(row):
    """Build a run from nothing: model, optimizer, scheduler, sparsifier."""
    chosen = recipe(RECIPES[row]) if row in RECIPES else niwaki.method(row)
    model = net()
    model.fc2.register_forward_hook(lambda module, args, out: functional.dropout(out, 0.1))  # something that draws from torch's generator
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    data = [batch(-1)] if "gradient" in chosen.saliency.needs or any(True for _ in reasons(chosen)) else None
    sparsifier = niwaki.Sparsifier(
        model,
        chosen,
        total_steps=STEPS,
        steps_per_epoch=20,
        data=data,
        loss=functional.cross_entropy,
        validation=[batch(800)],
        example=(batch(-1)[0],),
    )
    sparsifier.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    return model, optimizer, scheduler, sparsifier


def go_on(run, steps):
    model, optimizer, scheduler, _ = run
    losses = train(model, [optimizer], steps, lambda step: scheduler.step())
    return losses


def digest(run, losses):
    model, optimizer, _, sparsifier = run
    sparsifier.finalize()
    h = hashlib.sha256(repr(losses).encode())
    for tensor in [*model.state_dict().values(), *sparsifier.masks.values()]:
        h.update(tensor.detach().contiguous().numpy().tobytes())
    for state in optimizer.state_dict()["state"].values():
        for value in state.values():
            h.update(torch.as_tensor(value).contiguous().numpy().tobytes())
    return h.hexdigest()


def checkpoint(run):
    return {
        "random": torch.get_rng_state(),
        **{k: part.state_dict() for k, part in zip(("model", "optimizer", "scheduler", "sparsifier"), run, strict=True)},
    }


def resume(folder: Path):
    """What the new process does."""
    for row in ROWS:
        saved = torch.load(folder / f"{row}.pt", weights_only=True)
        run = start(row)
        for name, part in zip(("model", "optimizer", "scheduler", "sparsifier"), run, strict=True):
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
        print(row, digest(run, go_on(run, range(HALF, STEPS))))


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.set_num_threads(1)
    expected = {}
    for row in ROWS:
        torch.manual_seed(3)
        run = start(row)
        go_on(run, range(HALF))
        torch.save(checkpoint(run), folder / f"{row}.pt")
        expected[row] = digest(run, go_on(run, range(HALF, STEPS)))
    script = (
        f"import sys, pathlib, torch; sys.path.insert(0, {str(Path(__file__).parent)!r}); torch.set_num_threads(1);"
        f"import test_resume; test_resume.resume(pathlib.Path({str(folder)!r}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return expected, dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("row", ROWS)
def test_resumed_equals_uninterrupted(digests, row):
    expected, resumed = digests
    assert resumed[row] == expected[row]


def test_a_resumed_run_without_its_sparsifier_state_differs(tmp_path):
    """The comparison above can fail: leaving the sparsifier's state out changes the result."""
    torch.manual_seed(3)
    run = start("rigl")
    go_on(run, range(HALF))
    saved = checkpoint(run)
    expected = digest(run, go_on(run, range(HALF, STEPS)))
    other = start("rigl")
    for name, part in zip(("model", "optimizer", "scheduler"), other, strict=False):
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["random"])
    assert digest(other, go_on(other, range(HALF, STEPS))) != expected


# ---------------------------------------------------------------- a state of another model or recipe


def saved_state():
    run = start("rigl")
    go_on(run, range(HALF))
    return run, run[3].state_dict()


def test_states_of_another_kind_are_refused_and_change_nothing():
    _, state = saved_state()
    model = net()
    rigl = niwaki.method("rigl")
    sparsifier = niwaki.Sparsifier(model, rigl, total_steps=STEPS)
    before = {k: v.clone() for k, v in model.state_dict().items()}, sparsifier.masks
    smaller = {**state, "tensors": {k: v for k, v in state["tensors"].items() if k != "fc1.weight"}}
    reshaped = {**state, "tensors": {**state["tensors"], "fc1.weight": {**state["tensors"]["fc1.weight"], "shape": [24, 64]}}}
    cases = {
        "another recipe": {**state, "recipe": niwaki.method("set").to_yaml()},
        "version": {**state, "version": 99},
        "seed": {**state, "seed": 5},
        "another model; fc1.weight": smaller,
        "(24, 64)": reshaped,
    }
    for what, wrong in cases.items():
        with pytest.raises(niwaki.InputError) as caught:
            sparsifier.load_state_dict(wrong)
        assert what in str(caught.value)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
        assert sparsifier.masks == before[1]


def test_a_model_that_was_loaded_before_its_sparsifier_was_built_is_refused():
    run, state = saved_state()
    model = net()
    model.load_state_dict(run[0].state_dict())
    sparsifier = niwaki.Sparsifier(model, niwaki.method("rigl"), total_steps=STEPS)  # its first random mask cuts trained weights away
    with pytest.raises(niwaki.InputError, match="load the model's weights after building"):
        sparsifier.load_state_dict(state)
    model.load_state_dict(run[0].state_dict())
    sparsifier.load_state_dict(state)
    assert sparsifier.masks == run[3].masks


def test_no_state_while_a_step_is_under_way():
    model = net()
    a, b = torch.optim.SGD(model.fc1.parameters(), lr=0.1), torch.optim.SGD(model.fc2.parameters(), lr=0.1)
    sparsifier = niwaki.Sparsifier(model, niwaki.method("gmp"), total_steps=STEPS).attach(a, b)
    functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    a.step()
    with pytest.raises(niwaki.InputError, match="under way"):
        sparsifier.state_dict()
    b.step()
    assert sparsifier.state_dict()["step"] == 1
