"""Choices that cannot go together: one small function for each rule, each with a sentence that names the field and the way out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from niwaki.clock import Time
from niwaki.component import REGISTRY, Component, Missing
from niwaki.gradient import Superset
from niwaki.granularity import Grouped
from niwaki.growth import DropAndGrow
from niwaki.relaxation import Dropout, Gate, Moment, Relaxation
from niwaki.relaxation.thresholds import LearnedThreshold
from niwaki.saliency import GroupSaliency, Saliency, SignalToNoise
from niwaki.schedule import Constant, Listed, OneShot, Phases, Ramp
from niwaki.selecting import Drawn

if TYPE_CHECKING:
    from niwaki.recipe.fields import Slots

RANKING = ("saliency", "normalization", "allocation", "schedule", "selection", "growth")
"""Slots that only mean something where pieces are ranked and counted."""

TOLERANCE = 1e-9
"""Two sparsities that were computed differently are the same within this."""


def problems(recipe: Slots, given: Collection[str]) -> Iterator[str]:
    """Yield one line for each impossible combination.

    A rule is not asked about components that this version cannot run.

    Args:
        recipe: with all slots filled.
        given: the fields that were said, rather than left at their defaults.
    """
    for slots, rule in RULES:
        if all(known(getattr(recipe, slot)) for slot in slots):
            problem = rule(recipe, given)
            if problem is not None:
                yield problem


def known(component: Component | None) -> bool:
    """Return whether a slot is filled with a component of this version."""
    return component is not None and not isinstance(component, Missing)


def name_of(component: Component) -> str:
    """Return the name that a recipe has for a component, also for one that this version cannot run."""
    return component.component if isinstance(component, Missing) else component.name


def decides(relaxation: Relaxation) -> bool:
    """Return whether the relaxation's strength decides how sparse the model gets (planned ones all do)."""
    return isinstance(relaxation, Missing) or relaxation.decides


def acts_alone(relaxation: Relaxation) -> bool:
    """Return whether the relaxation acts without any mask: it decides, or draws at every step."""
    return decides(relaxation) or relaxation.samples


def fixed_sparsity(recipe: Slots) -> tuple[str, float] | None:
    """Return the sparsity that the granularity or the schedule fixes, after the field that does, or None."""
    if known(recipe.granularity) and recipe.granularity.sparsity is not None:
        return f"granularity.{recipe.granularity.name}", recipe.granularity.sparsity
    if isinstance(recipe.schedule, Listed):
        return "schedule.list", recipe.schedule.sparsity[-1]
    if known(recipe.allocation) and recipe.allocation.budget is not None:
        return f"allocation.{recipe.allocation.name}", 1.0 - recipe.allocation.budget
    return None


def compares(recipe: Slots) -> bool:
    """Return whether scores are compared with values, so that no allocation can share out how many pieces stay."""
    schedule = known(recipe.schedule) and recipe.schedule.quantile is not None
    return schedule or (known(recipe.selection) and not recipe.selection.counted)


def _choices(slot: str, accepted: Callable[[type[Component]], bool]) -> str:
    """Return the names of a slot's components that pass, for an error message."""
    return ", ".join(sorted(name for name, cls in REGISTRY.get(slot, {}).items() if accepted(cls)))


def _relaxations(trait: str) -> str:
    return _choices("relaxation", lambda cls: bool(getattr(cls, trait)))


def _updating_schedules() -> str:
    return _choices("schedule", lambda cls: cls.name != "one_shot")


def _is_at_start(recipe: Slots) -> bool:
    return isinstance(recipe.schedule, OneShot) and recipe.schedule.moment.value == 0


def sparsity_is_the_fixed_one(recipe: Slots, given: Collection[str]) -> str | None:
    """N:M and a list of sparsities say themselves where they end."""
    fixed = fixed_sparsity(recipe)
    if fixed is None or recipe.sparsity is None or abs(recipe.sparsity - fixed[1]) <= TOLERANCE:
        return None
    return f"sparsity: {recipe.sparsity!r} contradicts {fixed[0]}, which ends at {fixed[1]:.12g}; drop it or say {fixed[1]:.12g}"


def list_ends_as_pattern(recipe: Slots, given: Collection[str]) -> str | None:
    """A list of sparsities that ends elsewhere than N:M does."""
    fixed = recipe.granularity.sparsity
    if not isinstance(recipe.schedule, Listed) or fixed is None or abs(recipe.schedule.sparsity[-1] - fixed) <= TOLERANCE:
        return None
    last = recipe.schedule.sparsity[-1]
    return f"schedule.list: its last sparsity {last!r} contradicts granularity.{recipe.granularity.name}, which fixes {fixed:.12g}"


def pattern_fixes_layers(recipe: Slots, given: Collection[str]) -> str | None:
    """N:M gives every layer the same sparsity."""
    if recipe.granularity.sparsity is None or recipe.allocation.name in ("uniform", "global"):
        return None
    granularity, allocation = recipe.granularity.name, recipe.allocation.name
    return f"allocation: {allocation!r} differs between layers, and granularity {granularity!r} fixes all of them; choices: uniform, global"


def sparsity_is_given(recipe: Slots, given: Collection[str]) -> str | None:
    """A selection by count needs a count, unless nothing is to be masked or a relaxation decides."""
    if recipe.selects or decides(recipe.relaxation):
        return None
    asked = next((slot for slot in RANKING if slot in given), None)
    if asked is None and (recipe.acts or not recipe.must_mask):
        return None
    what = "" if asked is None else f" for the {asked} to act on"
    return f"sparsity: missing; say what share of the target is to be masked{what}, in [0, 1)"


def strength_decides(recipe: Slots, given: Collection[str]) -> str | None:
    """Where the strength of a relaxation decides, a sparsity is possible only as a final cut by its learned score."""
    name = recipe.relaxation.name
    if not decides(recipe.relaxation):
        return None
    if recipe.final_sparsity is None:
        useless = next((slot for slot in RANKING if slot in given), None)
        if useless is None:
            return None
        return f"{useless}: has no effect, as the strength of relaxation {name!r} decides; drop it, or add sparsity for a final cut"
    if isinstance(recipe.schedule, OneShot) and not _is_at_start(recipe) and "score" in recipe.saliency.needs:
        return None
    cut = ", or make a final exact cut with saliency: score and schedule: {one_shot: {at: 1 run}}" if recipe.relaxation.has_scores else ""
    return f"sparsity: the strength of relaxation {name!r} decides it; drop it{cut}"


def score_is_learned(recipe: Slots, given: Collection[str]) -> str | None:
    """A learned score needs a relaxation that learns one."""
    trait, what = ("posterior", "a variance") if isinstance(recipe.saliency, SignalToNoise) else ("has_scores", "scores")
    if "score" not in recipe.saliency.needs or getattr(recipe.relaxation, trait):
        return None
    saliency, relaxation = recipe.saliency.name, recipe.relaxation.name
    return f"saliency: {saliency!r} needs a relaxation that learns {what}, not {relaxation!r}; choices: {_relaxations(trait)}"


def score_is_used(recipe: Slots, given: Collection[str]) -> str | None:
    """Scores that nothing ranks by would be learned for nothing, and so would scores that are ranked only before they learn."""
    name = recipe.relaxation.name
    if not recipe.relaxation.has_scores or decides(recipe.relaxation):
        return None
    if "score" not in recipe.saliency.needs:
        return f"saliency: {recipe.saliency.name!r} does not rank by the scores that relaxation {name!r} learns; choices: score"
    if _is_at_start(recipe):
        return (
            f"schedule: 'one_shot' at the start ranks by the scores of relaxation {name!r} before they have learned; choices:"
            f" {{one_shot: {{at: 1 run}}}}, {_updating_schedules()}"
        )
    return None


def watches_steps(saliency: Component) -> bool:
    """Return whether a saliency ranks by what the steps of a training have added up to."""
    return any(request.source == "steps" for request in getattr(saliency, "statistics", ()))


def steps_are_watched(recipe: Slots, given: Collection[str]) -> str | None:
    """What steps add up to is the same for all weights before the first one."""
    if not recipe.selects or not watches_steps(recipe.saliency) or not _is_at_start(recipe):
        return None
    return (
        f"schedule: 'one_shot' at the start ranks by what saliency {recipe.saliency.name!r} adds up while a model trains, before it has"
        f" seen a step; choices: {{one_shot: {{at: 1 run}}}}, {_updating_schedules()}"
    )


def growth_is_reached(recipe: Slots, given: Collection[str]) -> str | None:
    """Growth happens at updates after the first."""
    if recipe.growth.name == "none" or not isinstance(recipe.schedule, OneShot):
        return None
    choices = _choices("schedule", lambda cls: cls.name not in ("one_shot", "mask_stability") and not getattr(cls, "decides"))  # noqa: B009
    return f"growth: {recipe.growth.name!r} needs a schedule that updates again, and 'one_shot' does not; choices: {choices}"


def growth_keeps_pattern(recipe: Slots, given: Collection[str]) -> str | None:
    """Growing wherever it is best would put more than N into a group of M."""
    if recipe.granularity.sparsity is None or not recipe.growth.grows:
        return None
    return f"growth: {recipe.growth.name!r} grows across the groups of granularity {recipe.granularity.name!r}; choices: none, all"


def growth_needs_hard_masks(recipe: Slots, given: Collection[str]) -> str | None:
    """Where dense weights are kept, what comes back is decided by their values."""
    growth, relaxation = recipe.growth.name, recipe.relaxation.name
    if growth == "none" or not recipe.relaxation.keeps_dense_weights:
        return None
    return (
        f"growth: {growth!r} needs relaxation: hard; with {relaxation!r} pruned weights are kept and come back by themselves; choices: none"
    )


def growth_leaves_steps(recipe: Slots, given: Collection[str]) -> str | None:
    """Skipping the step of every update while every step updates would never train."""
    every: Time | None = getattr(recipe.schedule, "every", None)
    if not isinstance(recipe.growth, DropAndGrow) or recipe.growth.at_update != "skip_step":
        return None
    if every is None or every.unit != "steps" or round(every.value) > 1:
        return None
    return f"growth.{recipe.growth.name}: at_update 'skip_step' with an update at every step never trains; choices: step, or a longer every"


def falling_sparsity_grows(recipe: Slots, given: Collection[str]) -> str | None:
    """Hard-masked weights come back only by growth."""
    schedule, final = recipe.schedule, recipe.final_sparsity
    if recipe.growth.name != "none" or recipe.relaxation.keeps_dense_weights:
        return None
    falls = None
    if isinstance(schedule, Ramp) and final is not None and schedule.initial > final:
        falls = f"from {schedule.initial!r} to {final!r}"
    elif isinstance(schedule, Listed):
        falls = next((f"from {a!r} to {b!r}" for a, b in pairwise(schedule.sparsity) if b < a), None)
    elif isinstance(schedule, Phases) and schedule.dense and max(schedule.dense) > min(schedule.sparse):
        falls = "to 0 in the dense phases"
    if falls is None:
        return None
    choices = _choices("growth", lambda cls: cls.name != "none")
    return f"growth: 'none' brings nothing back, and the sparsity of schedule {schedule.name!r} falls {falls}; choices: {choices}"


def gradient_has_weights(recipe: Slots, given: Collection[str]) -> str | None:
    """A pruned weight can learn only if something keeps it; no weight may learn only if scores do."""
    gradient, relaxation = recipe.gradient.name, recipe.relaxation.name
    if not recipe.gradient.needs_dense_weights:
        return None
    if not recipe.relaxation.keeps_dense_weights:
        choices = f"active, or relaxation {_relaxations('keeps_dense_weights')}"
        return f"gradient: {gradient!r} needs a relaxation that keeps dense weights, not {relaxation!r}; choices: {choices}"
    if not recipe.gradient.weights_learn and not recipe.relaxation.has_scores:
        choices = f"active, dense, or relaxation {_relaxations('has_scores')}"
        return f"gradient: {gradient!r} with relaxation {relaxation!r} would train nothing; choices: {choices}"
    return None


def superset_is_larger(recipe: Slots, given: Collection[str]) -> str | None:
    """The superset contains the active weights and more."""
    if not isinstance(recipe.gradient, Superset):
        return None
    outer, final = recipe.gradient.sparsity, recipe.final_sparsity
    if final is None:
        return "gradient.superset: a superset of what? give the recipe a sparsity, or choose gradient: active or dense"
    if outer is None or outer < final:
        return None
    return f"gradient.superset.sparsity: {outer!r} must be below the recipe's sparsity, {final!r}; or say multiple"


def threshold_decides(recipe: Slots, given: Collection[str]) -> str | None:
    """Where scores are compared with a value, nothing else can say how many pieces go, or bring some back."""
    if recipe.selection.counted:
        return None
    name = recipe.selection.name
    if recipe.final_sparsity is not None:
        field = "sparsity" if recipe.sparsity is not None else "granularity" if recipe.granularity.sparsity is not None else "schedule"
        return f"{field}: how many pieces go is decided by the value of selection {name!r}; drop one of them"
    if "allocation" in given:
        return f"allocation: has no effect, as selection {name!r} compares every score with a value; drop it"
    if recipe.growth.name != "none":
        return f"growth: {recipe.growth.name!r} needs a count of pieces, which selection {name!r} has not; choices: none"
    if not isinstance(recipe.schedule, OneShot | Constant):
        return f"schedule: {recipe.schedule.name!r} says how sparse, and selection {name!r} decides that; choices: constant, one_shot"
    return None


def schedule_decides(recipe: Slots, given: Collection[str]) -> str | None:
    """Where a schedule measures how much is to go, nothing else can say it, and what goes stays away."""
    schedule, growth, granularity = recipe.schedule.name, recipe.growth.name, recipe.granularity.name
    if not recipe.schedule.decides:
        return None
    if recipe.granularity.sparsity is not None:
        return f"granularity: {granularity!r} fixes the sparsity, and schedule {schedule!r} decides it; drop one of them"
    if recipe.allocation.budget is not None:
        allocation = recipe.allocation.name
        return f"allocation: {allocation!r} decides how many pieces go, and so does schedule {schedule!r}; drop one of them"
    if growth != "none":
        return f"growth: {growth!r} needs a sparsity to keep, and schedule {schedule!r} measures how much goes; choices: none"
    if recipe.gradient.name == "superset":
        return f"gradient: 'superset' needs a sparsity to be below, and schedule {schedule!r} measures what goes; choices: active, dense"
    return None


def validation_sees_weights(recipe: Slots, given: Collection[str]) -> str | None:
    """A validation loss is of the weights as they are at an update, not as a relaxation has drawn them for a step."""
    if not recipe.schedule.validates or not (recipe.relaxation.decides or recipe.relaxation.samples):
        return None
    choices = _choices("relaxation", lambda cls: not (getattr(cls, "decides") or getattr(cls, "samples")))  # noqa: B009
    return (
        f"relaxation: {recipe.relaxation.name!r} gives each step other weights, and schedule {recipe.schedule.name!r} follows the loss of"
        f" those that are there at an update; choices: {choices}"
    )


def thresholds_decide(recipe: Slots, given: Collection[str]) -> str | None:
    """Where the scores of each tensor are compared with its threshold, nothing else counts."""
    schedule = recipe.schedule.name
    if recipe.schedule.quantile is None:
        return None
    if recipe.final_sparsity is not None:
        return f"sparsity: how many pieces go is decided by the thresholds of schedule {schedule!r}; drop one of them"
    if "allocation" in given:
        return f"allocation: has no effect, as schedule {schedule!r} has a threshold for each tensor; drop it"
    if recipe.saliency.solves:
        return f"saliency: {recipe.saliency.name!r} needs a count of weights, and schedule {schedule!r} has thresholds; choose another"
    return None


def stability_is_final(recipe: Slots, given: Collection[str]) -> str | None:
    """A schedule that waits for one mask draws no second one, and cannot have masks that act meanwhile."""
    if not recipe.schedule.candidates:
        return None
    schedule = recipe.schedule.name
    if recipe.growth.name != "none":
        return f"growth: {recipe.growth.name!r} needs a schedule that updates again, and {schedule!r} lets one mask act; choices: none"
    if recipe.gradient.name == "superset":
        return f"gradient: 'superset' is drawn anew with each mask, and schedule {schedule!r} lets one act; choices: active, dense"
    return None


def scores_are_of_units(recipe: Slots, given: Collection[str]) -> str | None:
    """Some scores read what surrounds a unit: single tensors in other pieces would be ranked by something else."""
    if not recipe.selects or isinstance(recipe.granularity, Grouped):
        return None
    saliency, granularity = recipe.saliency, recipe.granularity.name
    if saliency.scored_on == "norms" and name_of(recipe.target) != "norm_scale":
        choices = "granularity channel or group, or target: norm_scale"
        return (
            f"saliency: {saliency.name!r} reads the scales of normalizations, and granularity {granularity!r} has none; choices: {choices}"
        )
    if saliency.of_units and (granularity != "input_channel" or isinstance(saliency, GroupSaliency)):
        choices = "channel, group, head" + ("" if isinstance(saliency, GroupSaliency) else ", input_channel")
        return f"granularity: {granularity!r} has no activity of its own, which saliency {saliency.name!r} reads; choices: {choices}"
    return None


def similar_units_share_a_tensor(recipe: Slots, given: Collection[str]) -> str | None:
    """Units are compared within one tensor, and the tensors of a residual block are its own."""
    compares = ("similarity", "merge_cost", "correlation", "subset_selection", "coreset")
    if not recipe.selects or recipe.saliency.name not in compares or not isinstance(recipe.granularity, Grouped):
        return None
    if "layer" not in recipe.granularity.kinds:
        return None
    saliency, choices = recipe.saliency.name, "magnitude, taylor, head_importance, position, random"
    return f"saliency: {saliency!r} compares the units of one tensor, and a tensor belongs to one layer; choices: {choices}"


def pieces_are_groups(recipe: Slots, given: Collection[str]) -> str | None:
    """A norm of a single weight is its size."""
    assert recipe.penalty is not None
    grouped = next((penalty for penalty in recipe.penalty.penalties if penalty.grouped), None)
    if grouped is None or recipe.granularity.name not in ("element", "n_m"):
        return None
    penalty, granularity = grouped.name, recipe.granularity.name
    choices = "channel, output_channel or another granularity, or penalty: l1"
    return f"penalty: {penalty!r} is about pieces of several weights, and granularity {granularity!r} has single ones; choices: {choices}"


def rescaling_is_linear(recipe: Slots, given: Collection[str]) -> str | None:
    """A unit that spans several tensors would be scaled by each of them."""
    if not isinstance(recipe.relaxation, Dropout) or not recipe.relaxation.rescale or not isinstance(recipe.granularity, Grouped):
        return None
    return (
        f"relaxation.dropout.rescale: pieces of granularity {recipe.granularity.name!r} span several tensors, which would all be scaled;"
        " choices: rescale: false, or granularity output_channel"
    )


def units_share_masks(recipe: Slots, given: Collection[str]) -> str | None:
    """A relaxation that decides weight by weight would cut through units."""
    if not isinstance(recipe.granularity, Grouped) or not recipe.relaxation.decides or isinstance(recipe.relaxation, Gate):
        return None
    relaxation, granularity = recipe.relaxation.name, recipe.granularity.name
    choices = _choices("relaxation", lambda cls: issubclass(cls, Gate) or not getattr(cls, "decides"))  # noqa: B009
    return (
        f"relaxation: {relaxation!r} decides weight by weight, and a unit of granularity {granularity!r} has one mask; choices: {choices}"
    )


def penalty_has_superset(recipe: Slots, given: Collection[str]) -> str | None:
    """The exploration penalty is about the superset."""
    assert recipe.penalty is not None
    if all(penalty.name != "exploration_l2" for penalty in recipe.penalty.penalties) or recipe.gradient.name == "superset":
        return None
    return f"penalty: 'exploration_l2' needs gradient: {{superset: {{sparsity: S}}}}, not {recipe.gradient.name!r}"


def penalty_has_relaxation(recipe: Slots, given: Collection[str]) -> str | None:
    """Only some relaxations have gates, probabilities, posteriors or thresholds."""
    assert recipe.penalty is not None
    for penalty in recipe.penalty.penalties:
        if penalty.reads in WHAT_RELAXATIONS_HAVE and not _has(type(recipe.relaxation), penalty.reads):
            reads = penalty.reads
            choices = _choices("relaxation", lambda cls: issubclass(cls, Relaxation) and _has(cls, reads))  # noqa: B023
            what, relaxation = WHAT_RELAXATIONS_HAVE[penalty.reads], recipe.relaxation.name
            return f"penalty: {penalty.name!r} is of the relaxation's {what}, and {relaxation!r} has none; choices: relaxation {choices}"
        if penalty.reads == "gate" and penalty.apply != "gradient" and not _trains_gates(recipe.relaxation):
            return (
                f"penalty.{penalty.name}.apply: {penalty.apply!r} is of numbers that are trained themselves, and relaxation"
                f" {recipe.relaxation.name!r} computes its gates; choices: apply: gradient, or relaxation: factor"
            )
    return None


WHAT_RELAXATIONS_HAVE = {
    "gate": "gates",
    "active": "probabilities of being active",
    "divergence": "divergences from a prior",
    "threshold": "learned thresholds",
}
"""What a penalty reads of a relaxation -> in words."""

HOOKS = {"gate": "gates", "active": "expected_active", "divergence": "divergence"}
"""What a penalty reads -> the method of a relaxation that returns it for weights."""


def _has(relaxation: type[Relaxation], reads: str) -> bool:
    if reads == "threshold":
        return issubclass(relaxation, LearnedThreshold)
    if issubclass(relaxation, Gate):
        return reads == "gate" or getattr(relaxation, f"gate_{reads}") is not getattr(Gate, f"gate_{reads}")
    return getattr(relaxation, HOOKS[reads]) is not getattr(Relaxation, HOOKS[reads])


def _trains_gates(relaxation: Relaxation) -> bool:
    """Return whether the gates are themselves own parameters."""
    if not isinstance(relaxation, Gate):
        return False
    own = relaxation.initial_parameters((1,), Moment(""))
    return any(relaxation.gate_soft(own, Moment("")) is value for value in own.values())


def penalty_moves_weights(recipe: Slots, given: Collection[str]) -> str | None:
    """Weights that do not learn are not pulled either."""
    assert recipe.penalty is not None
    penalty = next((penalty for penalty in recipe.penalty.penalties if penalty.reads == "weight"), None)
    if penalty is None or recipe.gradient.weights_learn:
        return None
    return f"penalty: {penalty.name!r} pulls weights, and gradient {recipe.gradient.name!r} lets none learn; choices: active, dense"


def pruned_weights_are_pulled(recipe: Slots, given: Collection[str]) -> str | None:
    """What is pruned can decay only where it is kept and learns."""
    assert recipe.penalty is not None
    if all(penalty.name != "sr_ste" for penalty in recipe.penalty.penalties):
        return None
    if recipe.selects and recipe.relaxation.keeps_dense_weights and recipe.gradient.name == "dense":
        return None
    return "penalty: 'sr_ste' is of pruned weights that learn; it needs a sparsity, relaxation: latent and gradient: dense"


def compression_has_a_target(recipe: Slots, given: Collection[str]) -> str | None:
    """A copy that is compressed to a share needs the share, and no mask before both are the same."""
    assert recipe.penalty is not None
    if all(getattr(penalty, "compress", None) != "top_k" for penalty in recipe.penalty.penalties):
        return None
    if recipe.final_sparsity is None:
        return "sparsity: missing; penalty 'learning_compression' draws the weights to a copy with that share of zeros"
    if not _is_at_start(recipe):
        return None
    return (
        "schedule: 'one_shot' at the start masks before penalty 'learning_compression' has drawn the weights to where they are to be;"
        " choices: {one_shot: {at: 1 run}}"
    )


def scales_cost_as_units(recipe: Slots, given: Collection[str]) -> str | None:
    """What a scale costs is what its unit costs."""
    assert recipe.penalty is not None
    for penalty in recipe.penalty.penalties:
        weigh = getattr(penalty, "weigh", "none")
        if penalty.reads == "norm" and weigh != "none" and not isinstance(recipe.granularity, Grouped):
            return (
                f"penalty.{penalty.name}.weigh: {weigh!r} of a scale is that of its unit, and granularity {recipe.granularity.name!r} has"
                " no units; choices: granularity: channel, or weigh: none"
            )
    return None


def layers_are_solved(recipe: Slots, given: Collection[str]) -> str | None:
    """A saliency that chooses mask and weights of a layer together needs its count beforehand, and single weights."""
    if not recipe.selects or not recipe.saliency.solves:
        return None
    saliency = recipe.saliency.name
    if recipe.granularity.name not in ("element", "n_m"):
        granularity = recipe.granularity.name
        return f"granularity: saliency {saliency!r} chooses single weights, not pieces of {granularity!r}; choices: element, 2:4"
    if recipe.allocation.joint:
        allocation, choices = recipe.allocation.name, _choices("allocation", lambda cls: not getattr(cls, "joint"))  # noqa: B009
        return f"allocation: saliency {saliency!r} solves layer by layer, and {allocation!r} ranks all together; choices: {choices}"
    if recipe.normalization.name != "none":
        return f"normalization: {recipe.normalization.name!r} has no effect, as saliency {saliency!r} compares within a layer; drop it"
    if recipe.compensation is not None:
        other = name_of(recipe.compensation)
        return f"compensation: {other!r} has no effect, as saliency {saliency!r} gives survivors their weights; drop it"
    if recipe.growth.name != "none" or recipe.relaxation.keeps_dense_weights:
        return f"saliency: {saliency!r} changes weights for good, so that nothing can come back; choices: growth: none, relaxation: hard"
    return None


def rows_are_of_weights(recipe: Slots, given: Collection[str]) -> str | None:
    """Rows are shared out among single weights."""
    if not recipe.allocation.by_row or not recipe.selects:
        return None
    if recipe.granularity.name != "element" or not recipe.selection.counted:
        return "allocation.uniform.per: 'row' is of single weights that are counted; choices: per: tensor, or granularity element"
    ablation = getattr(recipe.allocation, "ablation", None)
    if ablation is not None and not recipe.growth.grows:
        choices = _choices("growth", lambda cls: bool(getattr(cls, "grows")))  # noqa: B009
        return f"allocation.uniform.ablation: rows are ablated while weights are exchanged; growth choices: {choices}"
    return None


def ablation_has_rows(recipe: Slots, given: Collection[str]) -> str | None:
    """What is ablated are rows."""
    if getattr(recipe.allocation, "ablation", None) is None or recipe.allocation.by_row:
        return None
    return "allocation.uniform.ablation: it is of rows; say per: row, or drop it"


def hysteresis_remembers(recipe: Slots, given: Collection[str]) -> str | None:
    """What falls below the low value can only reach the high one where its weights live on."""
    if recipe.selection.name != "hysteresis" or recipe.relaxation.keeps_dense_weights:
        return None
    relaxation = recipe.relaxation.name
    return f"selection: 'hysteresis' brings weights back by their values, which relaxation {relaxation!r} forgets; choices: latent"


def draws_are_free(recipe: Slots, given: Collection[str]) -> str | None:
    """A selection by chance cannot keep what others count exactly, or choose."""
    selection = recipe.selection
    if not isinstance(selection, Drawn):
        return None
    if recipe.saliency.solves:
        return f"selection: {selection.name!r} has no effect, as saliency {recipe.saliency.name!r} chooses the masks; drop it"
    if recipe.schedule.quantile is not None:
        return f"selection: {selection.name!r} draws a count, and schedule {recipe.schedule.name!r} has thresholds; drop one of them"
    counts = "growth" if recipe.growth.grows else "granularity" if recipe.granularity.sparsity is not None else None
    counts = "allocation" if counts is None and recipe.allocation.by_row else counts
    if selection.name == "bernoulli" and counts is not None:
        other = getattr(recipe, counts).name
        return f"selection: 'bernoulli' draws every piece by itself, and {counts} {other!r} counts them; choices: gumbel, top_k"
    return None


def rewiring_never_rests(recipe: Slots, given: Collection[str]) -> str | None:
    """A weight that crosses zero goes at once, and its sign is its own."""
    if recipe.growth.name != "rewiring":
        return None
    schedule, granularity = recipe.schedule, recipe.granularity.name
    always = isinstance(schedule, Constant) and (schedule.begin.value, str(schedule.end), str(schedule.every)) == (0, "1 run", "1 steps")
    if not always:
        return "schedule: growth 'rewiring' acts after every step; choices: {constant: {every: 1 steps, end: 1 run}}"
    if granularity != "element":
        return f"granularity: growth 'rewiring' is of single weights, which have a sign, not of pieces of {granularity!r}; choices: element"
    if "gradient" in recipe.allocation.wants:
        return f"allocation: {recipe.allocation.name!r} looks at gradients, and growth 'rewiring' acts after the step; choose another"
    return None


def locality_has_connections(recipe: Slots, given: Collection[str]) -> str | None:
    """Units of whole networks have no two ends."""
    if recipe.growth.name != "locality" or not isinstance(recipe.granularity, Grouped):
        return None
    granularity = recipe.granularity.name
    return f"growth: 'locality' is about connections between units, and granularity {granularity!r} has units; choices: element, kernel"


def gradients_are_of_the_model(recipe: Slots, given: Collection[str]) -> str | None:
    """Gradients that are selected are those of the weights that the model computes with, and their share must be known."""
    if recipe.gradient.name != "selected":
        return None
    if recipe.relaxation.keeps_dense_weights:
        relaxation = recipe.relaxation.name
        return f"gradient: 'selected' is of the weights themselves, not of those behind relaxation {relaxation!r}; choices: hard"
    if getattr(recipe.gradient, "sparsity", None) is None and recipe.final_sparsity is None:
        return "gradient.selected.sparsity: missing; say what share takes no gradient, or give the recipe a sparsity"
    return None


def survivors_are_hard(recipe: Slots, given: Collection[str]) -> str | None:
    """What survivors are given must stay what it is, and must have been asked for."""
    assert recipe.compensation is not None
    compensation = recipe.compensation
    if not recipe.selects:
        return f"compensation: {compensation.name!r} is about what goes, and nothing is masked; add a sparsity"
    if recipe.relaxation.keeps_dense_weights:
        relaxation = recipe.relaxation.name
        return f"compensation: {compensation.name!r} is of weights that go, and relaxation {relaxation!r} keeps them; choices: hard"
    if getattr(recipe.schedule, "revive", False) and not compensation.recalibrates:
        return f"compensation: {compensation.name!r} cannot be taken back, as the rounds of schedule.one_shot.revive do; drop one"
    if compensation.needs_curvature and not has_curvature(recipe.saliency):
        choices = _choices("saliency", lambda cls: issubclass(cls, Saliency) and cls.curvature is not Saliency.curvature)
        saliency = recipe.saliency.name
        return f"compensation: {compensation.name!r} needs a saliency with a curvature, not {saliency!r}; choices: {choices}"
    if compensation.needs_units and not isinstance(recipe.granularity, Grouped):
        granularity = recipe.granularity.name
        return f"compensation: {compensation.name!r} is about units, not pieces of {granularity!r}; choices: channel, head, group"
    return None


def has_curvature(saliency: Saliency) -> bool:
    """Return whether a saliency builds a quadratic model of the loss."""
    return type(saliency).curvature is not Saliency.curvature


def redistribution_grows(recipe: Slots, given: Collection[str]) -> str | None:
    """What is redistributed is what grows back."""
    if "survivors" not in recipe.allocation.wants or not recipe.selects or isinstance(recipe.growth, DropAndGrow):
        return None
    choices = _choices("growth", lambda cls: issubclass(cls, DropAndGrow))
    return (
        f"allocation: {recipe.allocation.name!r} shares out what grows back, and growth {recipe.growth.name!r} does not; choices: {choices}"
    )


def coresets_are_whole(recipe: Slots, given: Collection[str]) -> str | None:
    """Weights of a sample only mean something for the sample that they were drawn with."""
    sampled, reweighted = recipe.saliency.name == "coreset", name_of(recipe.compensation) if recipe.compensation is not None else ""
    if sampled and recipe.selects and recipe.allocation.joint:
        return "allocation: saliency 'coreset' draws from each layer by itself, and 'global' ranks all together; choices: uniform, explicit"
    if reweighted == "coreset" and (
        not sampled
        or any(getattr(recipe.compensation, field, None) != getattr(recipe.saliency, field, None) for field in ("bound", "examples"))
    ):
        return "compensation: 'coreset' gives a sample the weights that it was drawn with: saliency: coreset with the same fields"
    return None


def memory_has_gradients(recipe: Slots, given: Collection[str]) -> str | None:
    """Only what is sent has a remainder that was not."""
    if recipe.memory is None or name_of(recipe.target) == "gradients":
        return None
    return f"memory: {name_of(recipe.memory)!r} is of gradients that were not sent; it needs target: gradients"


RULES: tuple[tuple[tuple[str, ...], Callable[[Slots, Collection[str]], str | None]], ...] = (
    (("granularity", "schedule"), list_ends_as_pattern),
    ((), sparsity_is_the_fixed_one),
    (("saliency", "relaxation"), score_is_learned),
    (("saliency", "relaxation", "schedule"), score_is_used),
    (("saliency", "schedule", "selection"), steps_are_watched),
    (("saliency", "relaxation", "schedule", "selection"), strength_decides),
    (("selection",), sparsity_is_given),
    (("granularity", "allocation"), pattern_fixes_layers),
    (("growth", "schedule"), growth_is_reached),
    (("growth", "granularity"), growth_keeps_pattern),
    (("growth", "relaxation"), growth_needs_hard_masks),
    (("growth", "schedule"), growth_leaves_steps),
    (("growth", "relaxation", "schedule"), falling_sparsity_grows),
    (("gradient", "relaxation"), gradient_has_weights),
    (("gradient",), superset_is_larger),
    (("penalty", "gradient"), penalty_has_superset),
    (("penalty", "gradient"), penalty_moves_weights),
    (("penalty", "relaxation"), penalty_has_relaxation),
    (("penalty", "relaxation", "gradient"), pruned_weights_are_pulled),
    (("penalty", "schedule"), compression_has_a_target),
    (("penalty", "granularity"), scales_cost_as_units),
    (("granularity", "schedule", "selection", "growth"), threshold_decides),
    (("granularity", "allocation", "schedule", "growth", "gradient"), schedule_decides),
    (("schedule", "relaxation"), validation_sees_weights),
    (("schedule", "granularity", "saliency"), thresholds_decide),
    (("schedule", "growth", "gradient"), stability_is_final),
    (("selection", "granularity", "saliency"), scores_are_of_units),
    (("saliency", "granularity", "selection"), similar_units_share_a_tensor),
    (("penalty", "granularity"), pieces_are_groups),
    (("relaxation", "granularity"), units_share_masks),
    (("relaxation", "granularity"), rescaling_is_linear),
    (("selection", "saliency", "granularity", "allocation", "normalization", "growth", "relaxation"), layers_are_solved),
    (("allocation", "granularity", "selection", "growth"), rows_are_of_weights),
    (("allocation",), ablation_has_rows),
    (("selection", "relaxation"), hysteresis_remembers),
    (("selection", "saliency", "schedule", "growth", "granularity", "allocation"), draws_are_free),
    (("growth", "schedule", "granularity", "allocation"), rewiring_never_rests),
    (("growth", "granularity"), locality_has_connections),
    (("gradient", "relaxation"), gradients_are_of_the_model),
    (("compensation", "saliency", "granularity", "relaxation", "schedule"), survivors_are_hard),
    (("selection", "growth", "allocation"), redistribution_grows),
    (("saliency", "allocation", "selection"), coresets_are_whole),
    ((), memory_has_gradients),
)
"""The slots that a rule is about, and the rule; the first one that is broken is told."""
