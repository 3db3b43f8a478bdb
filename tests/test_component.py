from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from niwaki.clock import Time, TimeField
from niwaki.component import PLANNED, REGISTRY, Component, Fraction, Missing, build, construct, describe
from niwaki.errors import InputError, NiwakiError, did_you_mean


@pytest.fixture(scope="module")
def toy():
    """A slot of its own with three components, taken out of the registry afterwards."""

    class Toy(Component):
        slot = "toy"

        @classmethod
        def from_text(cls, text):
            return Sized(size=int(text[5:])) if text.startswith("size:") else None

    class Plain(Toy):
        """Do nothing.

        More words.
        """

        name = "plain"

    class Sized(Toy):
        name = "sized"
        single_field = "size"

        size: Annotated[int, Field(ge=1)]
        mode: Literal["fast", "small"] = "fast"
        share: Fraction = 0.5

    class Dated(Toy):
        name = "dated"

        moment: TimeField = Field(default=Time(0.0, "run"), alias="at")
        low: int = 0
        high: int = 9

        @model_validator(mode="after")
        def _check(self):
            if self.low > self.high:
                raise InputError(f"low ({self.low}) must not exceed high ({self.high})")
            return self

    PLANNED["toy"] = frozenset({"sizeless", "later"})
    yield {"Plain": Plain, "Sized": Sized, "Dated": Dated}
    del REGISTRY["toy"], PLANNED["toy"]


def message(slot, data):
    with pytest.raises(InputError) as caught:
        build(slot, data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_declaring_a_class_with_a_name_registers_it(toy):
    assert REGISTRY["toy"] == {"plain": toy["Plain"], "sized": toy["Sized"], "dated": toy["Dated"]}


def test_builds_from_a_name_fields_a_shorthand_or_a_component(toy):
    sized = toy["Sized"](size=3)
    assert build("toy", "plain") == toy["Plain"]()
    assert build("toy", {"plain": None}) == build("toy", {"plain": {}}) == toy["Plain"]()
    assert build("toy", {"sized": {"size": 3}}) == sized
    assert build("toy", {"sized": 3}) == sized
    assert build("toy", "size:3") == sized
    assert build("toy", sized) is sized
    assert build("toy", {"dated": {"at": "5 epochs"}}).moment == Time(5.0, "epochs")


def test_a_component_is_frozen(toy):
    with pytest.raises(ValidationError):
        toy["Sized"](size=3).size = 4


@pytest.mark.parametrize(
    "data",
    ["plain", {"sized": {"size": 3}}, {"sized": {"size": 3, "mode": "small", "share": 0.25}}, "dated", {"dated": {"at": "5 epochs"}}],
)
def test_data_round_trip(toy, data):
    assert build("toy", data).to_data() == data


def test_what_was_left_at_its_default_is_written_on_request(toy):
    sized = build("toy", {"sized": {"size": 3, "mode": "fast"}})
    assert sized.to_data() == {"sized": {"size": 3, "mode": "fast"}}
    assert sized.to_data(defaults=True) == {"sized": {"size": 3, "mode": "fast", "share": 0.5}}
    assert build("toy", "dated").to_data(defaults=True) == {"dated": {"at": "0 run", "low": 0, "high": 9}}
    assert build("toy", "plain").to_data(defaults=True) == "plain"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("plane", "toy: unknown component 'plane'; did you mean 'plain'? choices: dated, later, plain, sized, sizeless"),
        ("zzz", "toy: unknown component 'zzz'; choices: dated, later, plain, sized, sizeless"),
        (7, "toy: unknown component '7'; choices: dated, later, plain, sized, sizeless"),
        ({"plane": {"size": 1}}, "toy: unknown component 'plane'; did you mean 'plain'? choices: dated, later, plain, sized, sizeless"),
        ({"sized": {"size": 3, "mod": "fast"}}, "toy.sized: unknown field 'mod'; did you mean 'mode'? choices: mode, share, size"),
        ({"plain": {"size": 3}}, "toy.plain: unknown field 'size'; it has no fields"),
        ({"dated": {"att": "1 run"}}, "toy.dated: unknown field 'att'; did you mean 'at'? choices: at, high, low"),
        ("sized", "toy.sized.size: this field is required"),
        ({"sized": {"size": 0}}, "toy.sized.size: Input should be greater than or equal to 1, got 0"),
        ({"sized": {"size": "many"}}, "toy.sized.size: Input should be a valid integer, unable to parse string as an integer, got 'many'"),
        ({"sized": {"size": 3, "mode": "slow"}}, "toy.sized.mode: Input should be 'fast' or 'small', got 'slow'"),
        ({"sized": {"size": 3, "share": 1}}, "toy.sized.share: Input should be less than 1, got 1"),
        ({"dated": {"low": 3, "high": 2}}, "toy.dated: low (3) must not exceed high (2)"),
        ({"plain": 3}, "toy.plain: expected {field: value}, got 3; fields: none"),
        ({"dated": "1 run"}, "toy.dated: expected {field: value}, got '1 run'; fields: at, low, high"),
    ],
)
def test_errors_say_what_where_and_what_would_be_right(toy, data, expected):
    assert message("toy", data) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.0])
def test_a_sparsity_in_a_recipe_is_at_least_zero_and_below_one(toy, value):
    assert message("toy", {"sized": {"size": 1, "share": value}}).startswith("toy.sized.share: ")


@pytest.mark.parametrize("data", [{}, {"plain": None, "sized": {"size": 1}}])
def test_one_slot_takes_one_component(toy, data):
    assert message("toy", data).startswith("toy: expected one component as NAME or {NAME: {field: value}}, got {")


def test_a_wrong_time_is_told_once(toy):
    assert message("toy", {"dated": {"at": "5"}}).startswith("toy.dated.at: a time is a number with a unit, such as '1000 steps'")
    assert message("toy", {"dated": {"at": "5"}}).count("'5'") == 1


def test_a_component_of_another_slot_is_refused(toy):
    assert message("saliency", toy["Plain"]()) == "saliency: 'plain' is a component of toy, not of saliency"
    assert message("toy", build("saliency", "signal_to_noise")) == "toy: 'signal_to_noise' is a component of saliency, not of toy"


@pytest.mark.parametrize("data", ["later", {"later": {"size": 3, "parts": [1, {"a": None}]}}, {"later": 3}])
def test_what_cannot_run_yet_is_kept_as_written(toy, data):
    missing = build("toy", data)
    assert isinstance(missing, Missing)
    assert missing.to_data() == data
    assert str(missing) == "toy 'later'"
    assert build("toy", missing) is missing


def test_construct_names_the_place_that_it_is_given(toy):
    with pytest.raises(InputError, match=r"^here: unknown field 'x'; it has no fields$"):
        construct(toy["Plain"], {"x": 1}, "here")


def test_the_purpose_is_the_first_line_of_the_docstring(toy):
    assert describe(toy["Plain"]) == "Do nothing."


def test_the_nearest_choice_is_named_when_there_is_one():
    assert did_you_mean("rigel", ["set", "rigl"]) == "did you mean 'rigl'? choices: rigl, set"
    assert did_you_mean("x", ["set", "rigl"]) == "choices: rigl, set"


def test_wrong_input_is_also_a_value_error():
    assert issubclass(InputError, ValueError)
    assert issubclass(InputError, NiwakiError)


def test_no_name_is_both_known_and_planned():
    for slot, planned in PLANNED.items():
        assert not planned & set(REGISTRY.get(slot, {}))


def test_a_component_built_in_python_says_what_is_wrong_in_one_line():
    from niwaki.schedule import Cubic

    with pytest.raises(InputError, match=r"^schedule\.cubic\.initial: .*, got 2$"):
        Cubic(initial=2)
    with pytest.raises(InputError, match=r"^schedule\.cubic: unknown field 'finall'; "):
        Cubic(finall=0.5)
