"""A budget of memory for statistics: what a run needs is told and compared with it before anything is trained, and changes nothing else."""

import pytest
from training import small
from training.small import ELEMENTS, contents, make

import niwaki
from niwaki.errors import InputError
from niwaki.training import run
from niwaki.training.baseline import Sitting

NEEDED = 10 * ELEMENTS * 4
"""Ten gradients in float32."""

WOODFISHER = "saliency: {woodfisher: {gradients: 10}}"
ONCE = f"{{sparsity: 0.5, {WOODFISHER}}}"
PRUNE = f"stages: [{{for: 5 steps}}, {{prune: {{fraction: 0.5, {WOODFISHER}}}}}]"
REFUSED = r"memory: the statistics need 21\.1 kB, 21\.1 kB of it for GradientBank, and 21\.1 kB are allowed; gradients: 9 would fit"


@pytest.mark.parametrize("text", [ONCE, PRUNE])
def test_a_run_tells_what_it_needs_and_a_budget_changes_nothing(small_task, tmp_path, text):
    told = []
    sitting = Sitting(memory=NEEDED, estimated=told.append, progress=lambda phase, step, total, epoch: told.append(step))
    this = make(small_task, recipe=small.recipe(text), epochs=1)
    within = run(this, tmp_path / "within", sitting=sitting)
    assert told[0] == NEEDED
    assert told[1:]
    assert told.count(NEEDED) == 1
    free = run(this, tmp_path / "free")
    assert within.identity == free.identity
    assert within.results.masks_hash == free.results.masks_hash
    assert (tmp_path / "within" / "model.safetensors").read_bytes() == (tmp_path / "free" / "model.safetensors").read_bytes()
    told.clear()
    run(this, tmp_path / "free", sitting=Sitting(memory=1, estimated=told.append))  # finished: there is nothing to collect
    assert told == []


@pytest.mark.parametrize("text", [ONCE, PRUNE])
def test_more_than_allowed_is_refused_before_anything_is_trained_or_written(small_task, tmp_path, text):
    told = []
    sitting = Sitting(memory=NEEDED - 1, progress=lambda *heard: told.append(heard))
    with pytest.raises(InputError, match=REFUSED):
        run(make(small_task, recipe=small.recipe(text), epochs=1), tmp_path / "run", sitting=sitting)
    assert (told, contents(tmp_path)) == ([], {})


@pytest.mark.parametrize("text", [ONCE, PRUNE])
def test_the_trainer_keeps_the_budget_itself(text):
    made = small.trainer(text, epochs=1)
    made.memory = NEEDED
    made.run()
    made = small.trainer(text, epochs=1)
    made.memory = NEEDED - 1
    with pytest.raises(InputError, match=REFUSED):
        made.run()


def test_the_estimate_is_of_the_stage_that_needs_most(small_task):
    stages = "stages: [{for: 5 steps, sparsity: 0.5, saliency: {woodfisher: {gradients: %d}}}, {for: 5 steps}, {sparsity: 0.75%s}]"
    second = ", saliency: {woodfisher: {gradients: 20}}"
    for first, last, needed in [(10, "", 1), (10, second, 2), (30, second, 3)]:
        assert make(small_task, recipe=small.recipe(stages % (first, last))).statistics_bytes() == needed * NEEDED
    assert make(small_task, recipe=small.recipe("{sparsity: 0.5}")).statistics_bytes() == 0


def test_what_follows_a_change_of_size_is_seen_when_it_is_there(small_task, tmp_path):
    """Half of the columns of the second layer go, and half of the first layer's rows with them."""
    cut = "target: {weights: {include: [3.weight]}}, granularity: input_channel"
    text = f"stages: [{{for: 5 steps, sparsity: 0.5, {cut}, finish: shrink}}, {{for: 1 epochs, sparsity: 0.5, {WOODFISHER}}}]"
    this = make(small_task, recipe=small.recipe(text), model="plain", epochs=1)
    assert this.statistics_bytes(memory=0) == 0
    record = run(this, tmp_path / "run", sitting=Sitting(memory=NEEDED // 2))
    assert record.results.removed
    with pytest.raises(niwaki.NiwakiError, match=r"gradients: 9 would fit; .*checkpoint"):
        run(this, tmp_path / "other", sitting=Sitting(memory=NEEDED // 2 - 1))


def test_units_count_too(small_task):
    """What reads a unit makes up for it, by second moments of its inputs."""
    recipe = small.recipe("{sparsity: 0.5, granularity: channel, compensation: least_squares}")
    assert make(small_task, recipe=recipe, model="plain").statistics_bytes() == 2 * 8 * (24**2 + 16**2)


def test_an_interrupted_run_may_go_on_with_another_budget(small_task, tmp_path):
    this = make(small_task, recipe=small.recipe(ONCE), epochs=1)
    run(this, tmp_path / "whole")
    taken = iter(range(5))
    with pytest.raises(niwaki.NiwakiError, match="interrupted"):
        run(this, tmp_path / "run", sitting=Sitting(memory=NEEDED, stop=lambda: next(taken, None) is None))
    run(this, tmp_path / "run", sitting=Sitting(memory=2 * NEEDED))
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run"))
    assert resumed == whole
