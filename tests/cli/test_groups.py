"""``niwaki groups``: the table, the JSON, and bad input; what the groups are is known from the networks' code."""

import json

import pytest


def test_groups_of_a_convnet(niwaki_command):
    outcome = niwaki_command("groups", "--task", "digits", "--model", "convnet")
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line.split() for line in outcome.out.splitlines() if line.strip()]
    assert ["conv2", "channel", "32", "conv2", "conv3", "4", "yes"] in lines
    last = next(line for line in lines if line[0] == "linear")
    assert last[:3] == ["linear", "channel", "10"]
    assert " ".join(last).endswith("no: it is part of the model's output")


def test_json_names_every_tensor_of_a_group(niwaki_command):
    outcome = niwaki_command("groups", "--task", "digits", "--json")
    found = json.loads(outcome.out)
    assert found["model"] == "mlp"
    first = found["groups"][0]
    hidden = first["units"]
    assert [(m["name"], m["dimension"], m["role"], m["entries"], m["of"]) for m in first["members"]] == [
        ("1.weight", 0, "output", hidden, hidden),
        ("1.bias", 0, "along", hidden, hidden),
        ("3.weight", 1, "input", hidden, hidden),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), "--task: missing"), (("--task", "digts"), "digits"), (("--task", "digits", "--model", "convnt"), "convnet")],
)
def test_bad_input(niwaki_command, arguments, said):
    outcome = niwaki_command("groups", *arguments)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
