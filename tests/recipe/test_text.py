"""YAML 1.2, and errors that name the place in one line."""

import math

import pytest

from niwaki.errors import InputError
from niwaki.recipe import text


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2:4", "2:4"),  # 124 in YAML 1.1
        ("1:30:00", "1:30:00"),  # 5400 in YAML 1.1
        ("4x1", "4x1"),
        ("1e-4", 1e-4),  # text in YAML 1.1
        ("1E5", 1e5),
        ("-3200", -3200),
        ("no", "no"),  # false in YAML 1.1
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("010", 10),  # 8 in YAML 1.1
        ("0o10", 8),
        ("100 steps", "100 steps"),
        ("1e6 tokens", "1e6 tokens"),
        ("'0.9'", "0.9"),
        ("~", None),
        (".inf", math.inf),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written, meant):
    value = text.parse(f"key: {written}", "recipe")["key"]
    assert value == meant
    assert type(value) is type(meant)


@pytest.mark.parametrize("value", ["2:4", "no", "1e-4", "010", "", "a: b", "# x", "Erdős", "null", 1e-05, 0.1 + 0.2, 10**20, None, True])
def test_scalars_come_back_as_they_went(value):
    back = text.parse(text.write({"key": value}), "recipe")["key"]
    assert back == value
    assert type(back) is type(value)


def test_keys_keep_their_order():
    assert list(text.parse(text.write({"z": 1, "a": 2, "m": 3}), "recipe")) == ["z", "a", "m"]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("a: 1\nb: 2\na: 3", 'recipe.yaml, line 3: found duplicate key "a"'),
        ("a: {b: 1, b: 2}", 'recipe.yaml, line 1: found duplicate key "b"'),
        ("a: [1", "recipe.yaml, line 1: expected ',' or ']'"),
        ("a: b: c", "recipe.yaml, line 1: mapping values are not allowed"),
        ("a: 1\n---\nb: 2", "recipe.yaml, line 2: but found another document"),
        ("%YAML 1.1\n---\na: 2:4", "recipe.yaml: expected YAML 1.2, got %YAML 1.1"),
        ("a: &x [1]\nb: *x", "recipe.yaml, line 2: aliases (*x) are not supported"),
        ("&x [*x]", "recipe.yaml, line 1: aliases (*x) are not supported"),
        ("a: !!python/object/apply:os.system [echo]", "recipe.yaml, line 1: could not determine a constructor for the tag"),
        ("a: \x00", "recipe.yaml"),
        ("[" * 1000, "recipe.yaml"),
    ],
)
def test_what_is_not_yaml_is_told_in_one_line(written, said):
    with pytest.raises(InputError) as error:
        text.parse(written, "recipe.yaml")
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
